"""Weights that stay below a spectral norm while they train, as optax transformations.

A network of matrices and fixed curves is as steep as the product of its matrices'
norms. Each transformation here comes last in an optax chain and changes the step so
that the weights after it keep a norm. The norm of a matrix with `out` rows and `in`
columns is that of the root mean square (RMS) in input and output,
`sqrt(in / out) * ||W||_2`: one number is then a fair cap at any width.

Leaves with two axes are matrices (out, in), as in `equinox.nn.Linear`; further axes in
front make a stack of matrices (blocks, heads). Leaves with fewer axes pass unchanged.
Kernels of convolutions are no such stacks: keep them out with `optax.masked`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ..core._checks import check_choice, check_nonnegative, check_positive
from ._norms import _dominant, _unit, _unstructured, spectral_norm_bound

# Newton-Schulz, six steps, odd quintics (in 1024ths): the paper's.
_ORTHOGONALISE = tuple(
    (a / 1024, b / 1024, c / 1024)
    for a, b, c in (
        (3955, -8306, 5008),
        (3735, -6681, 3463),
        (3799, -6499, 3211),
        (4019, -6385, 2906),
        (2677, -3029, 1162),
        (2172, -1833, 682),
    )
)
# Four quintics that approach min(1, x), the paper's; on [0, 3.5] none exceeds the peak.
_HARD_CAP = (
    (0.805032, 0.206361, -0.019763),
    (0.649867, 0.162935, -0.011150),
    (1.810259, -0.200265, 0.008251),
    (1.004384, -0.183490, 0.014413),
)
_HARD_RANGE, _HARD_PEAK = 3.5, 1.01089
# The soft cap is increasing on [0, k] while it sends k no lower than this share of it.
_SOFT_SHARE = 62 / 81
_POWER_STEPS = 16


def spectral_cap(
    w_max: float | Float[Array, ""] = 1.0,
    kind: Literal["soft", "hard", "svd", "normalize", "hammer"] = "soft",
) -> optax.GradientTransformation:
    """Keeps every matrix's RMS norm at most `w_max`: the last link of an optax chain.

    - `"soft"`: the singular values go through `x - a x^3` and then `x + a x^3`, with
      the least `a >= 0` that brings the largest value the step can have reached to
      the cap. Small values hardly move, order and vectors stay. Four products of
      matrices, and fourteen for the two norms that the reach is measured by.
    - `"hard"`: `min(w_max, x)` to about 5 %, by four quintic polynomials; twelve
      products and a norm.
    - `"svd"`: `min(w_max, x)` itself, by a singular value decomposition.
    - `"normalize"`: the whole matrix is divided, where its norm exceeds the cap.
    - `"hammer"`: the largest singular value alone is set to `w_max`, as power
      iteration finds it; made for AdamW, whose steps are of low rank. **It guarantees
      nothing**: the second singular value may be as large.

    All but the last keep the norm up to rounding, whatever the step was: norms come
    from `spectral_norm_bound`, never from power iteration. What a trained network can
    be certified for, `lipschitz_bound` measures from its weights.

    Args:
        w_max: The cap, positive, in the RMS norm.
        kind: One of the above.

    Returns:
        An optax transformation without state; `update` needs the parameters.

    Raises:
        ValueError: If `w_max` is not positive, `kind` is unknown, or `update` is
            called without parameters. Under jit, weights that are not finite stay so.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from varan.lipschitz import spectral_cap
        >>> weight, step = 0.9 * jnp.eye(2), jnp.diag(jnp.array([0.2, -0.2]))
        >>> cap = spectral_cap(1.0)
        >>> change, _ = cap.update(step, cap.init(weight), weight)
        >>> [round(float(x), 3) for x in jnp.diag(weight + change)]
        [0.964, 0.684]

    Source: L. Newhouse, R. P. Hess, F. Cesista, A. Zahorodnii, J. Bernstein and
        P. Isola, 2025, "Training Transformers with Enforced Lipschitz Constants",
        arXiv:2507.13338, sections 3 and 4.

    Differences: The reach of the soft cap is measured, the norm of the weights (the
        cap, if that is more) plus that of the step, instead of `w_max (1 - decay)`
        plus a nominal step: a Newton-Schulz step is not exactly of norm one. Where
        the step is so long that the soft cap would no longer be increasing
        (more than 81/62 of the cap), it is applied more than once. The hard cap is
        divided by its overshoot of 1.1 %.
    """
    check_positive("spectral_cap", "w_max", w_max)
    check_choice("spectral_cap", "kind", kind, tuple(_KINDS))

    def capped(matrix, update):
        out, into = matrix.shape[-2:]
        limit = jnp.asarray(w_max, matrix.dtype) * (out / into) ** 0.5
        return _KINDS[kind](matrix, update, limit)

    return _on_matrices("spectral_cap", capped)


def spectral_weight_decay(
    rate: float | Float[Array, ""] = 0.1,
) -> optax.GradientTransformation:
    """Shrinks each matrix's largest singular value, as power iteration finds it.

    Weight decay that leaves the rest of the matrix alone: after the step `W`, with
    leading singular vectors u and v and value s, becomes `W - rate * s * u v'`. It
    bounds nothing; it pulls. Sixteen products of a matrix and a vector.

    Args:
        rate: Share by which the value shrinks in one step, not negative, at most 1;
            not multiplied by any learning rate.

    Returns:
        An optax transformation without state; the last in a chain.

    Raises:
        ValueError: If `rate` is negative or `update` is called without parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import spectral_weight_decay
        >>> weight = jnp.diag(jnp.array([2.0, 1.0]))
        >>> decay = spectral_weight_decay(0.5)
        >>> change, _ = decay.update(0 * weight, decay.init(weight), weight)
        >>> [round(float(x), 3) for x in jnp.diag(weight + change)]
        [1.0, 1.0]

    Source: Newhouse et al., 2025, arXiv:2507.13338, section 3.
    """
    check_nonnegative("spectral_weight_decay", "rate", rate)

    def decayed(matrix, update):
        matrix = matrix + update
        return matrix - jnp.asarray(rate, matrix.dtype) * _top(matrix)[1]

    return _on_matrices("spectral_weight_decay", decayed)


def rms_cap(radius: float | Float[Array, ""] = 1.0) -> optax.GradientTransformation:
    """Keeps every row's root mean square at most `radius`: for embedding tables.

    Args:
        radius: The largest RMS of a row, positive.

    Returns:
        An optax transformation without state; the last in a chain.

    Raises:
        ValueError: If `radius` is not positive or `update` is called without
            parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import rms_cap
        >>> table, cap = jnp.array([[3.0, -3.0], [0.5, 0.25]]), rms_cap(1.0)
        >>> change, _ = cap.update(0 * table, cap.init(table), table)
        >>> (table + change).tolist()
        [[1.0, -1.0], [0.5, 0.25]]

    Source: Newhouse et al., 2025, arXiv:2507.13338, section 4.
    """
    check_positive("rms_cap", "radius", radius)

    def capped(table, update):
        table = table + update
        size = jnp.sqrt(jnp.mean(table**2, -1, keepdims=True))
        return table / jnp.maximum(size / jnp.asarray(radius, table.dtype), 1)

    return _on_matrices("rms_cap", capped)


def rms_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    weight_decay: float | Float[Array, ""] = 0.0,
) -> optax.GradientTransformation:
    """Muon whose steps have an RMS norm of about the learning rate, at any shape.

    `optax.contrib.scale_by_muon` with the paper's six Newton-Schulz steps, for
    matrices stored (out, in) and stacks of them, times `sqrt(out / in)`. Every leaf
    must be one: train embeddings and vectors by something else (`optax.partition`).

    Args:
        learning_rate: The RMS norm of a step, or a schedule.
        momentum: Decay of the averaged gradient, in [0, 1).
        weight_decay: Decoupled decay, multiplied by the learning rate.

    Returns:
        An optax transformation.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from varan.lipschitz import rms_muon, spectral_cap
        >>> weight = jnp.eye(3)
        >>> chain = optax.chain(rms_muon(0.1, weight_decay=0.1), spectral_cap(1.0))
        >>> change, _ = chain.update(-weight, chain.init(weight), weight)
        >>> bool(jnp.linalg.norm(weight + change, 2) <= 1.001)
        True

    Source: K. Jordan et al., 2024, "Muon"; the form here: Newhouse et al., 2025,
        arXiv:2507.13338, section 3.
    """
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)

    def in_rms(updates, params=None):
        del params
        return jax.tree.map(lambda u: u * (u.shape[-2] / u.shape[-1]) ** 0.5, updates)

    return optax.chain(
        optax.contrib.scale_by_muon(
            _ORTHOGONALISE,
            ns_steps=len(_ORTHOGONALISE),
            beta=momentum,
            nesterov=False,
            weight_dimension_numbers=lambda p: jax.tree.map(lambda _: axes, p),
        ),
        optax.stateless(in_rms),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _on_matrices(
    owner: str, after: Callable[[Array, Array], Array]
) -> optax.GradientTransformation:
    """Replaces each matrix's step by the one to `after(matrix, step)`."""

    def update(updates, state, params=None):
        if params is None:
            raise ValueError(
                f"{owner}: `update` must be given the parameters (got none). Call "
                "`update(gradients, state, params)`."
            )

        steps, structure = jax.tree.flatten(updates)
        matrices = structure.flatten_up_to(params)
        # Matrices of one shape go together: less to compile, and longer products.
        for shape in dict.fromkeys(step.shape for step in steps if step.ndim > 1):
            alike = [i for i, step in enumerate(steps) if step.shape == shape]
            old = jnp.stack([matrices[i] for i in alike])
            new = after(old, jnp.stack([steps[i] for i in alike]))
            for i, change in zip(alike, new - old, strict=True):
                steps[i] = change
        return structure.unflatten(steps), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


# The kinds of cap: from weights, step and limit to the weights after it --------------


def _soft(matrix, update, limit):
    weight_norm, step_norm = _bound(jnp.stack([matrix, update]))
    reach = jnp.maximum(weight_norm, limit) + step_norm

    def above(carry):
        return jnp.any((carry[1] > limit) & jnp.isfinite(carry[1]))

    def shrink(carry):
        matrix, reach = carry
        aim = jnp.maximum(limit, _SOFT_SHARE * reach)
        strength = _soft_strength(aim / reach)
        # Divided by their reach, the values are at most one: no power overflows.
        unit = matrix / reach
        unit = _polynomial(unit, 1, -strength)
        return reach * _polynomial(unit, 1, strength), aim

    return jax.lax.while_loop(above, shrink, (matrix + update, reach))[0]


def _soft_strength(share):
    """The `t = a k^2` with which the soft cap sends k to `share * k`.

    It sends k to `k (1 - 3 t^2 + 3 t^3 - t^4)`. Solved for the square, with
    `share >= 62/81` and so `t <= 1/3`, the error falls by 0.19 a pass.
    """

    def one(_, t):
        return jnp.sqrt((1 - share) / (3 - 3 * t + t**2))

    return jax.lax.fori_loop(0, 24, one, jnp.zeros_like(share))


def _hard(matrix, update, limit):
    matrix = matrix + update
    unit = matrix / jnp.maximum(limit, _bound(matrix) / _HARD_RANGE)
    for a, b, c in _HARD_CAP:
        unit = _polynomial(unit, a, b, c)
    return unit * (limit / _HARD_PEAK)


def _svd(matrix, update, limit):
    left, values, right = jnp.linalg.svd(matrix + update, full_matrices=False)
    return (left * jnp.minimum(values, limit)[..., None, :]) @ right


def _normalise(matrix, update, limit):
    matrix = matrix + update
    return matrix / jnp.maximum(_bound(matrix) / limit, 1)


def _hammer(matrix, update, limit):
    matrix = matrix + update
    value, part = _top(matrix)
    return matrix + part * (limit / jnp.where(value > 0, value, limit) - 1)


_KINDS = {
    "soft": _soft,
    "hard": _hard,
    "svd": _svd,
    "normalize": _normalise,
    "hammer": _hammer,
}


def _polynomial(matrix, a, b, c=None):
    """`a x + b x^3 + c x^5` of the singular values, on the smaller side."""
    wide = matrix.shape[-2] <= matrix.shape[-1]
    transposed = jnp.swapaxes(matrix, -1, -2)
    gram = matrix @ transposed if wide else transposed @ matrix
    inner = b * gram if c is None else b * gram + c * (gram @ gram)
    return a * matrix + (inner @ matrix if wide else matrix @ inner)


def _bound(matrix):
    """An upper bound of the norm of each matrix of a stack, with two axes kept."""
    one = partial(spectral_norm_bound, method="gram")
    return jnp.vectorize(one, signature="(r,c)->()")(matrix)[..., None, None]


def _top(matrix):
    """The largest singular value of each matrix, estimated, and its part of it."""

    def one(matrix):
        right = _dominant(matrix, _unstructured(matrix), _POWER_STEPS)
        left = matrix @ right
        return jnp.linalg.norm(left), jnp.linalg.norm(left) * jnp.outer(
            _unit(left), right
        )

    value, part = jnp.vectorize(one, signature="(r,c)->(),(r,c)")(matrix)
    return value[..., None, None], part
