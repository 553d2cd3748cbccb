"""Bilevel problems whose answers are known, and one on real data.

Both toys and the support vector machine are those of arXiv 2401.16164, sections 4 and
5, with their constraints scaled so that a saddle step of ordinary size contracts.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core._checks import check_shape
from ..operators import Polyhedron
from ._problem import BilevelProblem, Projected


def linear_lower_example(
    target: Float[Array, " n"],
) -> tuple[BilevelProblem, tuple[Array, dict[str, Array]]]:
    """A lower level with infinitely many answers, and the best of them.

    `F = ||x - y2||^2 / 2 + ||y1 - target||^2 / 2`,
    `f = ||y1||^2 / 2 - x . y1 + sum(y2)`, subject to
    `sum(x) + sum(y1) + sum(y2) = 0`, scaled by `1 / sqrt(3 n)`. The lower level fixes
    `y1 = x + 1` and only the sum of `y2`; the upper level chooses `y2`.

    Args:
        target: Shape (n,); all ones in the paper.

    Returns:
        The problem, whose `y` is `{"y1": ..., "y2": ...}`, and its answer `(x, y)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.bilevel import linear_lower_example
        >>> problem, (x, y) = linear_lower_example(jnp.ones(2))
        >>> [round(float(v[0]), 3) for v in (x, y["y1"], y["y2"])]
        [-0.3, 0.7, -0.4]

    Source: arXiv 2401.16164, section 4.1; the answer for a general target is that of
        the equality-constrained quadratic programme left after `y1 = x + 1`.
    """
    check_shape("linear_lower_example", "target", target, (None,))
    n = target.shape[0]
    price = (3 * jnp.sum(target - 1) + n) / (10 * n)
    answer = (target - 1 - 3 * price, {"y1": target - 3 * price})
    answer[1]["y2"] = target - 1 - 4 * price
    problem = BilevelProblem(
        _linear_upper, _linear_lower, target, equality=_linear_equality, unique=False
    )
    return problem, answer


# Functions of the module, not closures: problems of one shape share compiled code.


def _linear_upper(x, y, target):
    return (jnp.sum((x - y["y2"]) ** 2) + jnp.sum((y["y1"] - target) ** 2)) / 2


def _linear_lower(x, y, target):
    return jnp.sum(y["y1"] ** 2) / 2 - x @ y["y1"] + jnp.sum(y["y2"])


def _linear_equality(x, y, target):
    total = jnp.sum(x) + jnp.sum(y["y1"]) + jnp.sum(y["y2"])
    return ((3 * x.size) ** -0.5 * total)[None]


def coupled_quadratic_example(
    key: Array, size: int = 100, rows: int = 90
) -> tuple[BilevelProblem, Float[Array, "n n"], Float[Array, "n k"]]:
    """A strongly convex lower level under many coupled equalities.

    `F = sin(c . x + d . y) + log(||x + y||^2 + 1)`, `f = ||x - y||^2 / 2`, subject to
    `A y + H x = 0` in the lower and `B x = 0` in the upper level, all entries uniform
    in [0, 1]; the rows of `[H A]` are replaced by orthonormal ones with the same null
    space.

    Args:
        key: Draws the data.
        size: Length of `x` and of `y`.
        rows: Lower equalities, fewer than `size`; the upper level has half as many.

    Returns:
        The problem; the matrix `S` with `y(x) = S x`; and an orthonormal basis of the
        `x` with `B x = 0`.

    Raises:
        ValueError: if `rows` is not between 2 and `size - 1`.

    Example:
        >>> import jax
        >>> from varan.bilevel import coupled_quadratic_example
        >>> problem, answer, basis = coupled_quadratic_example(jax.random.key(0), 6, 4)
        >>> answer.shape, basis.shape
        ((6, 6), (6, 4))

    Source: arXiv 2401.16164, section 4.2.
    """
    if not 2 <= rows < size:
        raise ValueError(
            f"coupled_quadratic_example: `rows` must lie between 2 and size - 1 (got "
            f"{rows} for size {size})."
        )
    draw = [jax.random.uniform(k, (size,)) for k in jax.random.split(key, 2)]
    keys = jax.random.split(jax.random.fold_in(key, 1), 2)
    coupled = jax.random.uniform(keys[0], (rows, 2 * size))
    B = jax.random.uniform(keys[1], (rows // 2, size))
    orthonormal = jnp.linalg.qr(coupled.T)[0].T
    H, A = orthonormal[:, :size], orthonormal[:, size:]

    full = jnp.linalg.qr(B.T, mode="complete")[0]
    basis = full[:, rows // 2 :]
    joint = Polyhedron(
        jnp.concatenate([orthonormal, jnp.concatenate([B, jnp.zeros_like(B)], axis=1)]),
        jnp.zeros(rows + rows // 2, B.dtype),
    )
    problem = BilevelProblem(
        _coupled_upper,
        _coupled_lower,
        *draw,
        A,
        H,
        equality=_coupled_equality,
        project_x=_Subspace(basis),
        joint=joint,
    )
    eye = jnp.eye(size, dtype=A.dtype)
    inverse = jnp.linalg.pinv(A)
    return problem, eye - inverse @ (A + H), basis


class _Subspace(eqx.Module):
    """Projects on the span of orthonormal columns."""

    basis: Float[Array, "n k"]

    def __call__(self, x):
        return self.basis @ (self.basis.T @ x)


def _coupled_upper(x, y, c, d, A, H):
    return jnp.sin(c @ x + d @ y) + jnp.log(jnp.sum((x + y) ** 2) + 1)


def _coupled_lower(x, y, c, d, A, H):
    return jnp.sum((x - y) ** 2) / 2


def _coupled_equality(x, y, c, d, A, H):
    return A @ y + H @ x


def weighted_svm(
    features: Float[Array, "n d"],
    labels: Float[Array, " n"],
    validation_features: Float[Array, "m d"],
    validation_labels: Float[Array, " m"],
    *,
    slacks: bool = True,
) -> BilevelProblem:
    """A linear support vector machine whose samples' weights are learned.

    `x` holds the logarithms of the weights. The lower level is
    `||w||^2 / 2 + sum(exp(x) xi^2) / 2` subject to `1 - xi - label (w . z + b) <= 0`;
    the upper level a smoothed count of validation errors.

    Args:
        features: Training inputs, standardised.
        labels: Training labels, +1 or -1.
        validation_features: As `features`.
        validation_labels: As `labels`.
        slacks: `True`: `y` is `{"w", "b", "xi"}` with the constraints, divided by
            their matrix's spectral norm. `False`: the slacks are eliminated and `y` is
            `{"w", "b"}` without constraints; the answers agree.

    Returns:
        The problem.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.bilevel import weighted_svm
        >>> z, labels = jnp.array([[1.0], [-1.0]]), jnp.array([1.0, -1.0])
        >>> problem = weighted_svm(z, labels, z, labels)
        >>> y = {"w": jnp.ones(1), "b": jnp.zeros(()), "xi": jnp.zeros(2)}
        >>> problem.constraints(jnp.zeros(2), y).shape
        (2,)

    Source: arXiv 2401.16164, section 5.1; the upper loss is that of the authors'
        released code.
    """
    n, d = features.shape
    check_shape("weighted_svm", "labels", labels, (n,))
    check_shape("weighted_svm", "validation_features", validation_features, (None, d))
    m = validation_features.shape[0]
    check_shape("weighted_svm", "validation_labels", validation_labels, (m,))
    matrix = jnp.concatenate([features, jnp.ones_like(labels)[:, None]], axis=1)
    # Inverse of the spectral norm of [labels * matrix, I].
    scale = 1 / jnp.sqrt(jnp.linalg.norm(matrix, ord=2) ** 2 + 1)
    data = (features, labels, validation_features, validation_labels, scale)
    if not slacks:
        return BilevelProblem(_svm_upper, _svm_hinge, *data)
    rows = labels[:, None] * jnp.concatenate(
        [jnp.ones_like(labels)[:, None], features], axis=1
    )
    return BilevelProblem(
        _svm_upper,
        _svm_lower,
        *data,
        inequality=_svm_inequality,
        joint=_MarginSet(rows, scale),
    )


class _MarginSet(eqx.Module):
    """`{(x, b, w, xi) : 1 - xi - rows (b, w) <= 0}`, projected on by Newton's method.

    The best slacks for given `u = (b, w)` are `xi0 + max(1 - xi0 - rows u, 0)`, which
    leaves a strongly convex, piecewise quadratic function of the d + 1 entries of `u`:
    a few steps of O(n d^2), where a general method would work on all n constraints.
    """

    rows: Float[Array, "n d+1"]
    scale: Float[Array, ""]

    def project(self, vector, warm=None):
        n, d = self.rows.shape
        x, u0, xi0 = jnp.split(vector, [n, n + d])
        tol = jnp.finfo(vector.dtype).eps ** 0.75 * (1 + jnp.linalg.norm(vector))

        def short(u):
            return jax.nn.relu(1 - xi0 - self.rows @ u)

        def objective(u):
            return (jnp.sum((u - u0) ** 2) + jnp.sum(short(u) ** 2)) / 2

        def step(carry):
            u, _, count = carry
            missing = short(u)
            gradient = u - u0 - self.rows.T @ missing
            active = jnp.where((missing > 0)[:, None], self.rows, 0)
            hessian = jnp.eye(d, dtype=u.dtype) + active.T @ active
            direction = jnp.linalg.solve(hessian, gradient)
            # The full step ends the search once the active set is right; shorter ones
            # keep the descent monotone until then.
            sizes = 0.5 ** jnp.arange(6, dtype=u.dtype)
            trials = u[None, :] - sizes[:, None] * direction[None, :]
            best = jnp.argmin(jax.vmap(objective)(trials))
            return trials[best], jnp.linalg.norm(gradient), count + 1

        def go(carry):
            _, size, count = carry
            return (size > tol) & (count < 50)

        start = u0 if warm is None else u0 + self.rows.T @ (warm * self.scale)
        infinite = jnp.full((), jnp.inf, vector.dtype)
        u, size, _ = jax.lax.while_loop(go, step, (start, infinite, 0))
        missing = short(u)
        return Projected(
            jnp.concatenate([x, u, xi0 + missing]), missing / self.scale, size
        )


def _svm_upper(x, y, z, labels, z_val, labels_val, scale):
    reach = _margins(y, z_val, labels_val) / jnp.linalg.norm(y["w"])
    return jnp.sum(jax.nn.leaky_relu(2 * jax.nn.sigmoid(-5 * reach) - 1))


def _svm_lower(x, y, z, labels, z_val, labels_val, scale):
    return y["w"] @ y["w"] / 2 + jnp.sum(jnp.exp(x) * y["xi"] ** 2) / 2


def _svm_inequality(x, y, z, labels, z_val, labels_val, scale):
    return scale * (1 - y["xi"] - _margins(y, z, labels))


def _svm_hinge(x, y, z, labels, z_val, labels_val, scale):
    short = jax.nn.relu(1 - _margins(y, z, labels))
    return y["w"] @ y["w"] / 2 + jnp.sum(jnp.exp(x) * short**2) / 2


def _margins(y, z, labels):
    return labels * (z @ y["w"] + y["b"])
