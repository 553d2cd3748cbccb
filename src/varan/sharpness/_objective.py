"""What the measures work on: a loss as a function of one vector, and what they return.

Every measure takes `loss_fn(params, batch)` and any pytree of parameters. Its floating
arrays become one vector, in float32 at least; all else (an Equinox model's activation
functions, None leaves) is carried along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..core._certificate import Certificate
from ..core._checks import check_positive, is_traced
from ._engine import is_function

_SAYS = {
    "lower_bound": "the measure is at least value: the witness attains it",
    "estimate": "the measure is about value",
    "exact": "the measure is value, up to rounding",
}


def _count(number) -> Int[Array, ""]:
    return jnp.asarray(number, jnp.int32)


class MeasureResult(eqx.Module):
    """A measured number, what kind of knowledge it is, and what attains it.

    Args:
        value: The number.
        kind: `"lower_bound"` (proved up to rounding: the witness attains it),
            `"estimate"`, or `"exact"` (up to rounding).
        witness: What anyone can evaluate again: the perturbation, a tree like the
            parameters (with a leading axis over the chunks of a microbatch), or the
            eigenvector; None where there is none.
        n_grad: Gradients of the batch that were evaluated; a Hessian-vector product
            counts as two.
        half_width: Half the width of a 95 % confidence interval around a sampled
            value, from Student's t; None where nothing was sampled. A few samples that
            happen to agree make it zero, which then says nothing.
    """

    value: Float[Array, ""]
    kind: Literal["lower_bound", "estimate", "exact"] = eqx.field(static=True)
    witness: PyTree
    n_grad: Int[Array, ""] = eqx.field(converter=_count)
    half_width: Float[Array, ""] | None = None

    @property
    def certificate(self) -> Certificate:
        """The same as a certificate."""
        more = {} if self.half_width is None else {"half_width": self.half_width}
        return Certificate(
            "sharpness",
            self.value,
            proof=self.kind != "estimate",
            statement=_SAYS[self.kind],
            details=more,
        )


class LogitLoss(eqx.Module):
    """The mean loss of a classifier, with the logits still in reach.

    A loss function `(params, batch) -> scalar` for all measures; a batch is a pair of
    inputs and labels. Since it knows the logits, it can be measured on normalised ones
    (`normalised`, or `sharpness(normalize_logits=...)`) and has a Gauss-Newton matrix
    (`ggn_operator`).

    Args:
        logits_fn: `(params, x) -> logits`, a batch of inputs to (batch, classes).
        loss: `(logits, y) -> scalar`, the mean over the batch; by default
            cross-entropy with integer labels 0 .. classes - 1, one a row; under jit
            any other label makes the loss NaN.
        temperature: With a positive number, each sample's logits are centred and
            divided by their norm and by this; None leaves them as they are.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import LogitLoss
        >>> loss = LogitLoss(lambda w, x: x @ w)
        >>> batch = (jnp.eye(2), jnp.array([0, 1]))
        >>> sharp = loss.normalised(1.0)
        >>> bool(jnp.allclose(sharp(jnp.eye(2), batch), sharp(9 * jnp.eye(2), batch)))
        True

    Source: M. Andriushchenko, F. Croce, M. Müller, M. Hein, N. Flammarion, 2023,
        "A Modern Look at the Relationship between Sharpness and Generalization",
        arXiv:2302.07011, section 3 (logit normalisation; centring as in their code).
    """

    logits_fn: Callable[[Any, Any], Float[Array, "batch classes"]]
    loss: Callable[[Any, Any], Float[Array, ""]] | None = None
    temperature: Float[Array, ""] | float | None = None

    def __check_init__(self):
        if self.temperature is not None:
            check_positive("LogitLoss", "temperature", self.temperature)

    def __call__(self, params: PyTree, batch: tuple[Any, Any]) -> Float[Array, ""]:
        """The loss of a batch."""
        return self.of_logits(self.logits(params, batch[0]), batch[1])

    def logits(self, params: PyTree, x: Any) -> Float[Array, "batch classes"]:
        """The logits, normalised where a temperature says so."""
        logits = self.logits_fn(params, x)
        if self.temperature is None:
            return logits
        centred = logits - jnp.mean(logits, -1, keepdims=True)
        square = jnp.sum(centred * centred, -1, keepdims=True)
        # Equal logits stay zero, with a zero gradient.
        nonzero = square > 0
        scale = jnp.where(nonzero, jax.lax.rsqrt(jnp.where(nonzero, square, 1)), 0)
        return centred * (scale / jnp.asarray(self.temperature, logits.dtype))

    def of_logits(
        self, logits: Float[Array, "batch classes"], y: Int[Array, " batch"] | Any
    ) -> Float[Array, ""]:
        """The mean loss of given logits."""
        if self.loss is not None:
            return self.loss(logits, y)
        _check_labels(logits, y)
        y = jnp.asarray(y)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        # Out of range an index would wrap around, or be clipped, to another class.
        known = (y >= 0) & (y < logits.shape[-1])
        return jnp.mean(jnp.where(known, losses, jnp.nan))

    def normalised(self, temperature: Float[Array, ""] | float) -> LogitLoss:
        """The same loss on centred logits of norm `1 / temperature`."""
        return LogitLoss(self.logits_fn, self.loss, temperature)


def _check_labels(logits, y):
    dtype, shape = jnp.result_type(y), np.shape(y)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"LogitLoss: `y` must hold integer labels (got {dtype}). For other targets "
            "give a `loss`."
        )
    if shape != logits.shape[:-1]:
        raise ValueError(
            f"LogitLoss: `y` must have shape {logits.shape[:-1]}, one label for each "
            f"row of the logits (got {shape})."
        )
    if is_traced(y) or not np.size(y):
        return
    low, high = int(np.min(np.asarray(y))), int(np.max(np.asarray(y)))
    if low < 0 or high >= logits.shape[-1]:
        raise ValueError(
            f"LogitLoss: `y` must lie in 0 .. {logits.shape[-1] - 1} (got {low} to "
            f"{high})."
        )


class Objective(NamedTuple):
    """A loss as a function of the vector of all parameters."""

    owner: str
    value: Callable[[Float[Array, " n"]], Float[Array, ""]]
    point: Float[Array, " n"]
    selected: Float[Array, " n"]  # 1 where measured, 0 off the mask
    unravel: Callable[[Float[Array, " n"]], PyTree]
    batch: PyTree  # what `value` hands to the loss

    def hessian(self) -> Callable[[Float[Array, " n"]], Float[Array, " n"]]:
        """Products with the Hessian at the point; the gradient is linearised once.

        NaN where the loss or its gradient is not finite: neither need show in the
        second derivatives.
        """

        def gradient_and_loss(vector):
            return jax.value_and_grad(self.value)(vector)[::-1]

        gradient, product, loss = jax.linearize(
            gradient_and_loss, self.point, has_aux=True
        )
        scale = jnp.where(self.defined(loss, gradient), self.selected, jnp.nan)
        return lambda vector: scale * product(self.selected * vector)

    def defined(self, loss, gradient) -> Bool[Array, ""]:
        """Whether both are finite where measured; outside of jit it must be so."""
        bad = ~jnp.isfinite(gradient) & (self.selected > 0)
        good = jnp.isfinite(loss) & ~jnp.any(bad)
        if not is_traced(good) and not good:
            raise ValueError(
                f"{self.owner}: `loss_fn` must be finite at `params`, with a finite "
                f"gradient (got a loss of {float(loss):.3g} and {int(jnp.sum(bad))} "
                f"NaN or infinite of {gradient.size} entries of the gradient). Look "
                "for NaN in the parameters and in the batch."
            )
        return good


def objective(owner: str, loss_fn, params, batch, mask: Any = None) -> Objective:
    """Flattens a loss at parameters; checks what is known while tracing."""
    arrays, static = eqx.partition(params, eqx.is_inexact_array)
    leaves = jtu.tree_leaves(arrays)
    dtypes = [leaf.dtype for leaf in leaves]
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        raise TypeError(f"{owner}: `params` must be real (got {dtypes}).")
    # Half precision cannot hold a difference of losses.
    double = any(dtype == jnp.float64 for dtype in dtypes)
    dtype = jnp.dtype(jnp.float64 if double else jnp.float32)
    selected = selection(owner, mask, arrays, dtype)
    if any(map(_is_half, leaves)):
        # Layers that want one dtype of weights and inputs must find one.
        batch = jtu.tree_map(
            lambda leaf: leaf.astype(dtype) if _is_half(leaf) else leaf, batch
        )
    arrays = jtu.tree_map(lambda leaf: leaf.astype(dtype), arrays)
    point, unravel = ravel_pytree(arrays)

    def value(vector):
        out = jnp.asarray(loss_fn(eqx.combine(unravel(vector), static), batch))
        if out.shape != ():
            raise ValueError(
                f"{owner}: `loss_fn` must return a scalar (got shape {out.shape}). "
                "Take the mean over the batch."
            )
        return out

    return Objective(owner, value, point, selected, unravel, batch)


def _is_half(leaf):
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and (
        jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    )


def refuse_undefined(owner: str, number, loss_fn, params, batch, mask=None) -> None:
    """Outside of jit: where a measure came out NaN, says so if it is the loss's doing.

    Evaluates the loss again only then.
    """
    if is_traced(number) or not np.any(np.isnan(np.asarray(number))):
        return
    flat = objective(owner, loss_fn, params, batch, mask)
    flat.defined(*jax.value_and_grad(flat.value)(flat.point))


def selection(owner, mask, arrays, dtype) -> Float[Array, " n"]:
    """1 for the parameters of the mask, 0 for the others, as one vector."""
    chosen = _spread(
        owner,
        mask,
        arrays,
        lambda here, leaf: jnp.broadcast_to(jnp.asarray(here), leaf.shape),
    )
    return ravel_pytree(jtu.tree_map(lambda leaf: leaf.astype(dtype), chosen))[0]


def selected_size(owner: str, params: PyTree, mask: Any) -> int:
    """How many parameters a mask selects; all where its values are not known yet."""
    arrays = eqx.filter(params, eqx.is_inexact_array)
    if mask is None or any(map(is_traced, jtu.tree_leaves(mask))):
        return sum(leaf.size for leaf in jtu.tree_leaves(arrays))
    chosen = _spread(
        owner, mask, arrays, lambda here, leaf: np.broadcast_to(here, leaf.shape)
    )
    return sum(int(np.sum(leaf)) for leaf in jtu.tree_leaves(chosen))


def _spread(owner, mask, arrays, spread):
    """The mask's booleans over the parameters, whose prefix it may be."""
    if mask is None:
        return jtu.tree_map(lambda leaf: spread(True, leaf), arrays)
    try:
        return jtu.tree_map(
            lambda here, part: jtu.tree_map(lambda leaf: spread(here, leaf), part),
            mask,
            arrays,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{owner}: `mask` must have the structure of the parameters or be a prefix "
            f"of it (got {jtu.tree_structure(mask)})."
        ) from error


def checked(owner: str, params: PyTree, batch: PyTree, mask: Any = None):
    """Parameters with arrays as leaves and the mask as a tree; refuses empty input."""
    params = jtu.tree_map(
        lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, params
    )
    arrays = eqx.filter(params, eqx.is_inexact_array)
    if not sum(leaf.size for leaf in jtu.tree_leaves(arrays)):
        raise ValueError(
            f"{owner}: `params` must hold floating arrays (got none): there is nothing "
            "to measure."
        )
    for leaf in jtu.tree_leaves(batch):
        if np.ndim(leaf) and np.size(leaf) == 0:
            raise ValueError(
                f"{owner}: `batch` must not be empty (got an array of shape "
                f"{np.shape(leaf)})."
            )
    return params, _checked_mask(owner, params, mask)


def _checked_mask(owner, params, mask):
    if is_function(mask):
        mask = mask(eqx.filter(params, eqx.is_inexact_array))
    for leaf in jtu.tree_leaves(mask):
        if eqx.is_array_like(leaf) and jnp.result_type(leaf) != jnp.bool_:
            raise TypeError(
                f"{owner}: `mask` must hold booleans (got {jnp.result_type(leaf)})."
            )
    if not selected_size(owner, params, mask):
        raise ValueError(
            f"{owner}: `mask` must select a parameter (got none): there is nothing to "
            "measure."
        )
    return mask


def check_counts(owner: str, **counts: Any) -> None:
    """Refuses what is no whole number."""
    for name, value in counts.items():
        if not isinstance(value, int | np.integer):
            raise TypeError(f"{owner}: `{name}` must be an integer (got {value!r}).")


def t_half_width(samples: Float[Array, " n"]) -> Float[Array, ""]:
    """Half the 95 % interval of Student's t for the mean of independent samples."""
    from scipy.special import stdtrit

    n = samples.shape[0]
    quantile = jnp.asarray(stdtrit(n - 1, 0.975) / np.sqrt(n), samples.dtype)
    return jnp.std(samples, ddof=1) * quantile
