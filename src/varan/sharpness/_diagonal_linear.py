"""Gradient regularisation of diagonal linear networks, where its bias is known.

The network predicts `X beta` with `beta = u^2 - v^2`, from `u = v = alpha`. Along the
gradient flow of `L + gamma/2 ||g||^2`, with the penalty's gradient a difference of
length eps, the products `u v` fall by a known integral and `log(u / v)` stays in the
row space of X. The limit is therefore the interpolating beta of least potential
`phi_s`, with scales `s = sqrt(u v)` that the penalty has made smaller: nearer to the
rich regime, in which the potential is like the l1 norm.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..core import Newton, Smooth, solve
from ..core import _checks as checks

# Error of a step of the flow, relative and absolute.
_RTOL, _ATOL, _MAX_STEPS = 1e-5, 1e-8, 2048
# All weights below this share of their start: at the origin, to stay.
_COLLAPSED = 1e-3


class DiagonalFlow(eqx.Module):
    """Where the flow of a diagonal linear network ended.

    Args:
        u: Positive weights.
        v: Negative weights.
        drift: The integral of `G * G'` over time, G the gradient with respect to beta
            and G' the same at the weights a step eps away.
        time: When the flow was stopped.
        residual: Norm of `X beta - y` over that of y.
        converged: Whether the residual fell below the tolerance. If not, the flow was
            drawn into a saddle, or its time or the solver's steps were over.
    """

    u: Float[Array, " d"]
    v: Float[Array, " d"]
    drift: Float[Array, " d"]
    time: Float[Array, ""]
    residual: Float[Array, ""]
    converged: Bool[Array, ""]

    @property
    def beta(self) -> Float[Array, " d"]:
        """The coefficients, `u^2 - v^2`."""
        return self.u**2 - self.v**2

    @property
    def scales(self) -> Float[Array, " d"]:
        """The potential's scales, `sqrt(u v)`."""
        return jnp.sqrt(self.u * self.v)

    @property
    def dual(self) -> Float[Array, " d"]:
        """`arcsinh(beta / (2 scales^2))`, which is `log(u / v)`: in X's row space."""
        return jnp.log(self.u / self.v)


class DiagonalLinear(eqx.Module):
    """A diagonal linear network on data, its flow, and what theory says of its end.

    The loss is `||X beta - y||^2 / (4 n)`.

    Args:
        X: Inputs, more columns than rows.
        y: Targets.

    Raises:
        ValueError: If shapes do not fit or an entry is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import DiagonalLinear
        >>> net = DiagonalLinear(jnp.array([[1.0, 2.0]]), jnp.array([2.0]))
        >>> rich, lazy = net.least_potential(0.01), net.least_potential(10.0)
        >>> [round(float(b), 1) for b in rich], [round(float(b), 1) for b in lazy]
        ([0.0, 1.0], [0.4, 0.8])

    Source:
        Karakida, Takase, Hayase and Osawa, 2023, arXiv:2210.02720, section 5; the
        potential: Woodworth et al., 2020, arXiv:2002.09277.
    """

    X: Float[Array, "n d"]
    y: Float[Array, " n"]

    def __check_init__(self):
        checks.check_nonempty("DiagonalLinear", "X", self.X)
        checks.check_shape("DiagonalLinear", "X", self.X, (None, None))
        checks.check_shape("DiagonalLinear", "y", self.y, (self.X.shape[0],))
        checks.check_finite("DiagonalLinear", "X", self.X)
        checks.check_finite("DiagonalLinear", "y", self.y)

    def loss(
        self, weights: tuple[Float[Array, " d"], Float[Array, " d"]]
    ) -> Float[Array, ""]:
        """The loss at weights (u, v)."""
        u, v = weights
        return jnp.sum((self.X @ (u**2 - v**2) - self.y) ** 2) / (4 * self.y.size)

    def slope(
        self, weights: tuple[Float[Array, " d"], Float[Array, " d"]]
    ) -> Float[Array, " d"]:
        """The gradient with respect to beta."""
        u, v = weights
        return self.X.T @ (self.X @ (u**2 - v**2) - self.y) / (2 * self.y.size)

    def flow(
        self,
        alpha: Float[Array, ""] | float,
        gamma: Float[Array, ""] | float = 0.0,
        eps: Float[Array, ""] | float = 0.0,
        *,
        tol: float = 1e-6,
        max_time: float = 1e6,
    ) -> DiagonalFlow:
        """The regularised gradient flow from `u = v = alpha` to interpolation.

        An implicit Runge-Kutta method of order 3 with controlled error; a step costs
        one Jacobian of 3 d unknowns and its factorisation. The flow is that of `gr`:
        forward differences for positive `eps`, backward for negative, exact for zero.

        Args:
            alpha: Initial weight, positive.
            gamma: Strength of the regularisation, not negative.
            eps: Length of the difference in units of the gradient, of any sign.
            tol: The flow stops where the residual is below this, relative to y.
            max_time: Or at this time.

        Returns:
            A `DiagonalFlow`; read `converged`.

        Raises:
            ValueError: If `alpha` is not positive or `gamma` negative.

        Example:
            >>> import jax.numpy as jnp
            >>> from varan.sharpness import DiagonalLinear
            >>> net = DiagonalLinear(jnp.array([[1.0, 2.0]]), jnp.array([2.0]))
            >>> end = net.flow(0.1, gamma=0.1, eps=0.1, tol=1e-3)
            >>> bool(end.converged), bool(jnp.all(end.scales < 0.1))
            (True, True)
        """
        checks.check_positive("DiagonalLinear.flow", "alpha", alpha)
        checks.check_nonnegative("DiagonalLinear.flow", "gamma", gamma)
        dtype = self.X.dtype
        first, strength, length, least = (
            jnp.asarray(value, dtype) for value in (alpha, gamma, eps, tol)
        )
        return _flow(self, first, strength, length, least, max_time)

    @property
    def attracting_gamma(self) -> Float[Array, ""]:
        """The gamma above which the saddle at the origin attracts, whatever eps.

        There a pair (u, v) grows at rate `2 |G| (1 - 2 gamma |G|)` at most: the penalty
        vanishes at saddles too.
        """
        origin = jnp.zeros(self.X.shape[1], self.X.dtype)
        return 1 / (2 * jnp.min(jnp.abs(self.slope((origin, origin)))))

    def predicted_scales(
        self, end: DiagonalFlow, alpha: float, gamma: float
    ) -> Float[Array, " d"]:
        """Theory's scales `alpha exp(-4 gamma drift)` for a flow."""
        return alpha * jnp.exp(-4 * gamma * end.drift)

    def least_potential(
        self, scales: Float[Array, " d"] | Float[Array, ""] | float
    ) -> Float[Array, " d"]:
        """The interpolating beta of least potential `phi_s`, by the convex dual.

        `phi_s` has gradient `arcsinh(beta / (2 s^2))`; the dual has one unknown a row.

        Args:
            scales: s, positive: one number, or one a coordinate.

        Returns:
            beta with `X beta = y`; NaN where the dual did not converge, for instance
            because no beta interpolates.

        Raises:
            ValueError: If a scale is not positive.
        """
        checks.check_positive("DiagonalLinear.least_potential", "scales", scales)
        width = jnp.broadcast_to(jnp.asarray(scales, self.X.dtype), self.X.shape[1])
        return _least_potential(self, width)


@eqx.filter_jit
def _flow(net, alpha, gamma, eps, tol, max_time):
    import diffrax  # heavy, and only the flow needs it

    gradient = jax.grad(net.loss)

    def ahead(weights, g, length):
        return jax.tree.map(lambda w, s: w + length * s, weights, g)

    def field(t, state, args):
        del t, args
        weights, _ = state
        g = gradient(weights)
        # The derivative along eps at zero is the exact scheme.
        length = jnp.where(eps == 0, 1, eps)
        product = jax.lax.cond(
            eps == 0,
            lambda: jax.jvp(gradient, (weights,), (g,))[1],
            lambda: jax.tree.map(
                lambda a, b: (a - b) / length, gradient(ahead(weights, g, eps)), g
            ),
        )
        velocity = jax.tree.map(lambda a, h: -(a + gamma * h), g, product)
        other = net.slope(ahead(weights, g, eps))
        return velocity, net.slope(weights) * other

    def residual(weights):
        u, v = weights
        return jnp.linalg.norm(net.X @ (u**2 - v**2) - net.y) / jnp.linalg.norm(net.y)

    def settled(weights):
        largest = jnp.maximum(*(jnp.max(w) for w in weights))
        return (residual(weights) < tol) | (largest < _COLLAPSED * alpha)

    # The weights themselves, not their logarithms: a Runge-Kutta method would keep the
    # linear invariants of those exactly, and nothing would be left to check.
    begin = jnp.full(net.X.shape[1], alpha)
    result = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Kvaerno3(),
        jnp.zeros((), begin.dtype),
        jnp.asarray(max_time, begin.dtype),
        None,
        ((begin, begin), jnp.zeros_like(begin)),
        stepsize_controller=diffrax.PIDController(_RTOL, _ATOL),
        event=diffrax.Event(lambda t, y, args, **rest: settled(y[0])),
        max_steps=_MAX_STEPS,
        throw=False,
    )
    last = jax.tree.map(lambda leaf: leaf[-1], (result.ys, result.ts))
    ((u, v), drift), time = last
    left = residual((u, v))
    return DiagonalFlow(u, v, drift, time, left, left < 2 * tol)


@eqx.filter_jit
def _least_potential(net, scales):
    # 2 s^2 sinh(X'nu) is beta; cosh is its potential.
    def dual(nu, data):
        X, y, weight = data
        return jnp.sum(weight * jnp.cosh(nu @ X)) - y @ nu

    weight = 2 * scales**2
    problem = Smooth(dual, (net.X, net.y, weight))
    end = solve(problem, Newton(), jnp.zeros_like(net.y), max_steps=500)
    beta = weight * jnp.sinh(end.x @ net.X)
    return jnp.where(end.converged, beta, jnp.nan)
