"""Which parameters a perturbation touches, and how each is scaled by its size.

Masks are trees of booleans, or of boolean arrays, like the parameters. Any method made
with `perturbed` takes them as `mask`, the scales here as `sam`'s `adaptive`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from ..core._checks import check_nonnegative, is_traced
from ._engine import Mask, check_booleans, is_function
from ._vectors import norm_dtype

_NORM_NAMES = (
    *("norm", "bn", "ln", "scale", "gamma"),
    *("layernorm", "batchnorm", "groupnorm", "instancenorm", "rmsnorm"),
)
_SHIFT_NAMES = {"bias", "shift", "beta", "offset", "b"}
# What is stored beside the parameters of a layer and is none.
_STATISTICS = {"batch_stats", "mean", "var", "running_mean", "running_var"}
_NORM_LAYERS = (
    eqx.nn.LayerNorm,
    eqx.nn.RMSNorm,
    eqx.nn.GroupNorm,
    eqx.nn.BatchNorm,
)
# Whatever a model calls them. Weight and spectral normalisation rescale weights, not
# what passes through the network.
_OTHER_LAYERS = (
    *(eqx.nn.Linear, eqx.nn.Conv, eqx.nn.ConvTranspose, eqx.nn.Embedding),
    *(eqx.nn.GRUCell, eqx.nn.LSTMCell, eqx.nn.PReLU, eqx.nn.StateIndex),
    *(eqx.nn.WeightNorm, eqx.nn.SpectralNorm),
)


def norm_params(
    params: PyTree, *, names: Sequence[str] = _NORM_NAMES
) -> PyTree[bool | None]:
    """Marks the scales and shifts of normalisation layers: SAM-ON's mask.

    `sam(base, rho, mask=norm_params)` perturbs only them, which are far fewer than one
    in a hundred parameters; the radius wants to be five to twenty times larger than
    that of all. Equinox's own layers are told by their type. In all other trees
    (parameters of Flax, Haiku or your own) a parameter counts if its path has one of
    `names` as a word: `LayerNorm_0/scale`, `encoder/ln_1/bias`. Names can mislead:
    look at the mask once. Running statistics are never marked.

    Args:
        params: A model or its parameters; only its floating arrays matter.
        names: Words in lower case. `BatchNorm_0` has the words "batch" and "norm".

    Returns:
        A tree like the parameters with True and False, None where they have no
        floating array.

    Raises:
        ValueError: If nothing is marked: the model has no normalisation layer with
            parameters, or calls it by another name.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from varan.sharpness import norm_params, sam
        >>> layer = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
        >>> params = {"Dense_0": layer, "LayerNorm_0": {"scale": jnp.ones(2)}}
        >>> norm_params(params)["LayerNorm_0"], norm_params(params)["Dense_0"]
        ({'scale': True}, {'bias': False, 'kernel': False})
        >>> method = sam(optax.sgd(0.1), rho=0.5, mask=norm_params)

    Source: M. Müller, T. Vlaar, D. Rolnick and M. Hein, 2023, "Normalization Layers Are
        All That Sharpness-Aware Minimization Needs", arXiv:2306.04226, section 3.

    Differences: The authors select by name alone, "norm" or "bn" anywhere in it.
    """
    arrays = eqx.filter(params, _is_floating)
    nodes, structure = jtu.tree_flatten_with_path(arrays, is_leaf=_has_known_type)
    mask = structure.unflatten([_marked(path, node, names) for path, node in nodes])
    if not any(jtu.tree_leaves(mask)):
        paths = [_shown(path) for path, _ in jtu.tree_flatten_with_path(arrays)[0]]
        shown = ", ".join(paths[:12]) + (", ..." if len(paths) > 12 else "")
        raise ValueError(
            "norm_params: the parameters must hold some of a normalisation layer (got "
            f"{shown or 'none'}). Name the layers in `names`, or pass a mask of your "
            "own."
        )
    return mask


def complement(mask: Mask) -> Mask:
    """The mask of everything else.

    Args:
        mask: A tree of booleans or boolean arrays, or a function of the parameters.

    Returns:
        The same kind: a tree, or a function of the parameters.

    Raises:
        ValueError: If the mask is not of booleans.

    Example:
        >>> from varan.sharpness import complement, norm_params
        >>> complement({"scale": True, "kernel": False})
        {'kernel': True, 'scale': False}
        >>> everything_else = complement(norm_params)

    Source: M. Müller, T. Vlaar, D. Rolnick and M. Hein, 2023, arXiv:2306.04226 ("no
        norm").
    """
    if is_function(mask):
        return lambda params: complement(mask(params))
    check_booleans("complement", "mask", mask)
    return jtu.tree_map(
        lambda leaf: not leaf if isinstance(leaf, bool) else ~leaf, mask
    )


def random_mask_like(
    mask: Mask, params: PyTree[Array], *, key: PRNGKeyArray
) -> PyTree[Bool[Array, "*shape"]]:
    """A mask with as many entries as another, drawn uniformly from all parameters.

    Args:
        mask: A tree of booleans or boolean arrays, or a function of the parameters.
        params: The parameters.
        key: Random key.

    Returns:
        A tree of boolean arrays like the parameters.

    Raises:
        ValueError: If the mask does not have the parameters' structure, or is not of
            booleans.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.sharpness import random_mask_like
        >>> params = {"kernel": jnp.ones((5, 4)), "scale": jnp.ones(4)}
        >>> like = {"kernel": False, "scale": True}
        >>> mask = random_mask_like(like, params, key=jax.random.key(0))
        >>> int(mask["kernel"].sum() + mask["scale"].sum())
        4

    Source: M. Müller, T. Vlaar, D. Rolnick and M. Hein, 2023, arXiv:2306.04226 (the
        random sparse control).
    """
    params = eqx.filter(params, _is_floating)
    chosen = mask(params) if is_function(mask) else mask
    check_booleans("random_mask_like", "mask", chosen)
    try:
        counts = jtu.tree_map(
            lambda here, part: sum(
                jnp.sum(jnp.broadcast_to(jnp.asarray(here, bool), leaf.shape))
                for leaf in jtu.tree_leaves(part)
            ),
            chosen,
            params,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            "random_mask_like: `mask` must have the structure of the parameters or be "
            f"a prefix of it (got {jtu.tree_structure(chosen)})."
        ) from error
    total = sum(jtu.tree_leaves(counts))
    size = sum(leaf.size for leaf in jtu.tree_leaves(params))
    return _as_tree(jax.random.permutation(key, size) < total, params)


def topk_mask(
    scores: PyTree[Float[Array, "*shape"]],
    ratio: float | Float[Array, ""],
    *,
    maskable: PyTree[bool] | None = None,
) -> PyTree[Bool[Array, "*shape"]]:
    """Marks the parameters with the largest scores, counted over all leaves together.

    Exactly the integer part of `ratio` times the number of entries is marked; of equal
    scores the first in the tree's order. One sort of all entries.

    Args:
        scores: One score for each parameter.
        ratio: Share that is marked, in [0, 1].
        maskable: Leaves that take part, a tree of booleans or a prefix of one; all
            when left out. The others are not marked and do not count.

    Returns:
        A tree of boolean arrays like the scores.

    Raises:
        ValueError: If `ratio` lies outside [0, 1], or `maskable` is not of booleans.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import topk_mask
        >>> topk_mask({"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 2.0])}, 0.5)
        {'a': Array([ True, False], dtype=bool), 'b': Array([ True, False], dtype=bool)}

    Source: Q. Zhong, L. Ding, L. Shen, P. Mi, J. Liu, B. Du and D. Tao, 2022,
        "Improving Sharpness-Aware Minimization with Fisher Mask for Better
        Generalization on Language Models", arXiv:2210.05497, section 3.
    """
    if not is_traced(ratio) and not 0 <= float(ratio) <= 1:
        raise ValueError(f"topk_mask: `ratio` must lie in [0, 1] (got {ratio}).")
    check_booleans("topk_mask", "maskable", maskable)
    leaves = jtu.tree_leaves(scores)
    parts = _spread(True if maskable is None else maskable, scores)
    dtype = norm_dtype(scores)
    vectors = [
        leaf.ravel().astype(dtype)
        for leaf, part in zip(leaves, parts, strict=True)
        if part
    ]
    if not vectors:
        return jtu.tree_map(lambda leaf: jnp.zeros(leaf.shape, bool), scores)
    marked = iter(_largest(vectors, ratio))
    return jtu.tree_unflatten(
        jtu.tree_structure(scores),
        [
            next(marked).reshape(leaf.shape) if part else jnp.zeros(leaf.shape, bool)
            for leaf, part in zip(leaves, parts, strict=True)
        ],
    )


def elementwise_scale(
    params: PyTree[Array], *, eta: float = 0.0, shifts: bool = False
) -> PyTree[Array]:
    """The absolute value of each parameter, for `sam`'s `adaptive`.

    Unlike `adaptive=True` it tells shifts by their name and so scales the vectors of
    normalisation layers too: `sam(base, 5.0, adaptive=elementwise_scale,
    mask=norm_params)` is elementwise ASAM-ON.

    Args:
        params: The parameters.
        eta: Added to the absolute values, not negative.
        shifts: Whether shifts ("bias", "shift", "beta", "offset") are scaled; else
            their scale is 1.

    Returns:
        A tree like the parameters.

    Raises:
        ValueError: If `eta` is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import elementwise_scale
        >>> params = {"scale": jnp.array([-2.0, 0.5]), "bias": jnp.array([3.0])}
        >>> [leaf.tolist() for leaf in elementwise_scale(params).values()]
        [[1.0], [2.0, 0.5]]

    Source: M. Müller, T. Vlaar, D. Rolnick and M. Hein, 2023, arXiv:2306.04226,
        section 2.
    """
    check_nonnegative("elementwise_scale", "eta", eta)
    return _scales(params, lambda leaf: jnp.abs(leaf) + eta, shifts)


def layerwise_scale(
    params: PyTree[Array], *, eta: float = 0.0, shifts: bool = False
) -> PyTree[Array]:
    """The norm of the array that each parameter stands in, for `sam`'s `adaptive`.

    Args:
        params: The parameters.
        eta: Added to the norms, not negative.
        shifts: Whether shifts ("bias", "shift", "beta", "offset") are scaled; else
            their scale is 1.

    Returns:
        A tree like the parameters.

    Raises:
        ValueError: If `eta` is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import layerwise_scale
        >>> layerwise_scale({"scale": jnp.array([3.0, 4.0])})["scale"].tolist()
        [5.0, 5.0]

    Source: M. Müller, T. Vlaar, D. Rolnick and M. Hein, 2023, arXiv:2306.04226,
        section 2.
    """
    check_nonnegative("layerwise_scale", "eta", eta)
    return _scales(
        params, lambda leaf: jnp.full_like(leaf, jnp.linalg.norm(leaf) + eta), shifts
    )


def _is_floating(leaf):
    return jnp.issubdtype(getattr(leaf, "dtype", np.bool_), jnp.inexact)


def _has_known_type(node):
    return isinstance(node, _NORM_LAYERS + _OTHER_LAYERS)


def _marked(path, node, names):
    """The mask of a layer of known type, or of a leaf by its path."""
    if isinstance(node, _NORM_LAYERS):
        return jtu.tree_map_with_path(
            lambda inner, _: _key(inner[0]) in ("weight", "bias"), node
        )
    if isinstance(node, _OTHER_LAYERS):
        return jtu.tree_map(lambda _: False, node)
    keys = [_key(entry) for entry in path]
    words = {word for key in keys for word in _words(key)}
    return not words.isdisjoint(names) and _STATISTICS.isdisjoint(keys)


def _key(entry):
    return jtu.keystr((entry,), simple=True)


def _words(key):
    return [part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", key)]


def _shown(path):
    return jtu.keystr(path, simple=True, separator="/") or "one array"


def _scales(params: PyTree, size: Callable[[Array], Array], shifts: bool) -> PyTree:
    def scale(path, leaf):
        shift = bool(path) and _key(path[-1]) in _SHIFT_NAMES
        return jnp.ones_like(leaf) if shift and not shifts else size(leaf)

    return jtu.tree_map_with_path(scale, params)


def _spread(mask, tree):
    """The booleans of a mask, or of a prefix of one, leaf by leaf."""
    spread = jtu.tree_map(lambda m, part: jtu.tree_map(lambda _: m, part), mask, tree)
    return jtu.tree_leaves(spread)


def _largest(vectors, ratio):
    """Which entries of some vectors are among the largest of all."""
    everything = jnp.concatenate(vectors)
    size = everything.size
    # Rounded first: 0.29 of 100 is 28.999999999999996.
    count = (
        jnp.floor(ratio * size).astype(jnp.int32)
        if is_traced(ratio)
        else jnp.asarray(math.floor(round(float(ratio) * size, 6)), jnp.int32)
    )
    least = jnp.sort(everything)[jnp.clip(size - count, 0, size - 1)]
    above, equal = everything > least, everything == least
    room = count - jnp.sum(above, dtype=jnp.int32)
    marked = above | (equal & (jnp.cumsum(equal, dtype=jnp.int32) <= room))
    edges = np.cumsum([vector.size for vector in vectors])[:-1]
    return jnp.split(marked & (count > 0), edges)


def _as_tree(vector, like):
    leaves, structure = jtu.tree_flatten(like)
    parts = jnp.split(vector, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return structure.unflatten(
        [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    )
