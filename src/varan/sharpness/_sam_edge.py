"""Where SAM holds the curvature: the edge of stability, moved by the radius.

Near an eigenvector of curvature l a step of gradient descent multiplies by 1 - a l. The
gradient that unnormalised SAM takes at x + rho g is larger by 1 + rho l, so its steps
multiply by 1 - a l (1 + rho l), stable while

    a l (1 + rho l) <= 2,   that is   l <= l* = (sqrt(1 + 8 rho / a) - 1) / (2 rho).

Training that sharpens stops sharpening there, below gradient descent's 2 / a and below
it early, far from any minimum. Normalised SAM has rho / |g| in the place of rho, so its
edge falls as the gradient does.

Source: Agarwala, Dauphin, 2023 (arXiv 2302.08692).
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ..core import _checks as checks

Number = Float[Array | np.ndarray, " *shape"] | float


def sam_edge(
    stepsize: Number,
    rho: Number,
    *,
    grad_norm: Number | None = None,
    momentum: float = 0.0,
) -> Float[Array, " *shape"]:
    """The largest curvature at which full-batch SAM is stable.

    The positive root of rho l^2 + l = 2 (1 + momentum) / stepsize; for `rho = 0` it is
    the edge of gradient descent.

    Args:
        stepsize: Stepsize of the optimiser, positive.
        rho: Radius, not negative: of unnormalised SAM, or with `grad_norm` of SAM.
        grad_norm: Norm of the current gradient, positive, by which SAM divides `rho`;
            None for unnormalised SAM.
        momentum: Of the heavy ball (`optax.sgd`'s), in [0, 1).

    Returns:
        The edge, in the common shape of the arguments.

    Raises:
        ValueError: On values out of range. A traced `grad_norm` of zero gives 0.

    Example:
        >>> from varan.sharpness import sam_edge
        >>> round(float(sam_edge(0.05, 0.05)), 4), round(float(sam_edge(0.05, 0.0)), 4)
        (20.0, 40.0)

    Source:
        Agarwala and Dauphin, 2023, "SAM operates far from home: eigenvalue
        regularization as a dynamical phenomenon", arXiv:2302.08692.

    Differences:
        With momentum, which the source leaves out; the root in a form that does not
        cancel for small `rho`.
    """
    radius = _radius("sam_edge", stepsize, rho, grad_norm)
    if not checks.is_traced(momentum) and not 0 <= momentum < 1:
        raise ValueError(f"sam_edge: `momentum` must lie in [0, 1) (got {momentum}).")
    limit = 2 * (1 + momentum) / jnp.asarray(stepsize)
    return 2 * limit / (1 + jnp.sqrt(1 + 4 * radius * limit))


def normalised_eigenvalue(
    eigenvalue: Number,
    stepsize: Number,
    rho: Number,
    *,
    grad_norm: Number | None = None,
) -> Float[Array, " *shape"]:
    """a l (1 + rho l), which training at the edge holds at 2.

    Args:
        eigenvalue: Largest eigenvalue l of the Hessian.
        stepsize: Stepsize a, positive.
        rho: Radius, as in `sam_edge`.
        grad_norm: As in `sam_edge`.

    Returns:
        The number, in the common shape of the arguments; beyond 2 a step along the
        eigenvector overshoots to a farther point (without momentum).

    Raises:
        ValueError: On values out of range.

    Example:
        >>> from varan.sharpness import normalised_eigenvalue
        >>> round(float(normalised_eigenvalue(20.0, 0.05, 0.05)), 4)
        2.0

    Source:
        Agarwala and Dauphin, 2023, arXiv:2302.08692.
    """
    radius = _radius("normalised_eigenvalue", stepsize, rho, grad_norm)
    eigenvalue = jnp.asarray(eigenvalue)
    return jnp.asarray(stepsize) * eigenvalue * (1 + radius * eigenvalue)


def _radius(owner, stepsize, rho, grad_norm):
    checks.check_positive(owner, "stepsize", stepsize)
    checks.check_nonnegative(owner, "rho", rho)
    if grad_norm is None:
        return jnp.asarray(rho)
    checks.check_positive(owner, "grad_norm", grad_norm)
    return jnp.asarray(rho) / grad_norm


class QuadraticRegression(eqx.Module):
    """The simplest model whose curvature moves: a random quadratic map, least squares.

    z(theta) = J theta + theta' Q theta / 2 - y, with the loss |z|^2 / 2. Its Jacobian
    J + Q theta changes at constant rate, so the kernel's eigenvalues sharpen, and reach
    an edge, as those of networks do. One gradient costs about 3 d_out d_par^2
    multiplications.

    Args:
        d_out: Number of residuals.
        d_par: Number of parameters.
        q_scale: Size of the curvature: by how much a row of the Jacobian changes for a
            unit step, not negative. Rows of J, and the targets, have unit length on
            average.
        key: Random key of J, Q and the targets.

    Raises:
        ValueError: On sizes below one or a negative `q_scale`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.sharpness import QuadraticRegression
        >>> model = QuadraticRegression(3, 8, key=jax.random.key(0))
        >>> theta = jnp.zeros(8)
        >>> bool(jnp.allclose(jax.grad(model)(theta),
        ...                   model.jacobian(theta).T @ model.residual(theta)))
        True

    Source:
        Agarwala and Dauphin, 2023, arXiv:2302.08692.

    Differences:
        Scales are per row, so that they keep their meaning as sizes change.
    """

    linear: Float[Array, "m n"]
    quadratic: Float[Array, "m n n"]
    targets: Float[Array, " m"]

    def __init__(
        self, d_out: int, d_par: int, q_scale: float = 1.0, *, key: PRNGKeyArray
    ):
        owner = "QuadraticRegression"
        for name, value in (("d_out", d_out), ("d_par", d_par)):
            if value < 1:
                raise ValueError(f"{owner}: `{name}` must be at least 1 (got {value}).")
        checks.check_nonnegative(owner, "q_scale", q_scale)
        keys = jax.random.split(key, 3)
        unit = 1 / np.sqrt(d_par)
        self.linear = unit * jax.random.normal(keys[0], (d_out, d_par))
        # Of symmetric matrices, whose entries keep the variance off the diagonal.
        square = jax.random.normal(keys[1], (d_out, d_par, d_par)) / np.sqrt(2)
        square = square + jnp.swapaxes(square, 1, 2)
        self.quadratic = q_scale * unit * square
        self.targets = jax.random.normal(keys[2], (d_out,)) / np.sqrt(d_out)

    def residual(self, theta: Float[Array, " n"]) -> Float[Array, " m"]:
        """z(theta)."""
        return self.linear @ theta + (self.quadratic @ theta) @ theta / 2 - self.targets

    def __call__(self, theta: Float[Array, " n"], batch=None) -> Float[Array, ""]:
        """The loss; there is one batch."""
        del batch
        return jnp.sum(self.residual(theta) ** 2) / 2

    def jacobian(self, theta: Float[Array, " n"]) -> Float[Array, "m n"]:
        """Derivative of the residual."""
        return self.linear + self.quadratic @ theta

    def kernel(self, theta: Float[Array, " n"]) -> Float[Array, "m m"]:
        """The tangent kernel; at zero loss it shares the Hessian's eigenvalues."""
        jacobian = self.jacobian(theta)
        return jacobian @ jacobian.T
