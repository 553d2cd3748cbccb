"""Losses between stochastic and adversarial, with their noise and drift known exactly.

In the stochastically extended adversarial (SEA) model the environment picks a
distribution each round and draws the loss from it. Here all losses are quadratics

    f_t(x) = x'(Q + s_t W) x / 2 + <b_t, x>,    F_t(x) = x'Q x / 2 + <m_t, x>,

on a ball around the origin, with `b_t = m_t + noise` and `s_t` a random sign: then the
noise `sigma_t^2 = max_x E||grad f_t - grad F_t||^2` and the drift `Sigma_t^2 = max_x
||grad F_t - grad F_{t-1}||^2` do not depend on what is played and have closed forms. A
`W` that is not below `Q` makes single losses non-convex while all `F_t` are convex.

Source: S. Sachs, H. Hadiji, T. van Erven and C. Guzman, Between Stochastic and
Adversarial Online Convex Optimization, NeurIPS 2022, sections 2 and 4; S. Chen et al.,
ICML 2023, arXiv 2302.04552.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..core._checks import check_finite, check_nonnegative, check_positive, check_shape
from ..operators import minimise_quadratic_on_ball


class Stream(eqx.Module):
    """A sequence of random quadratic losses on a ball around the origin.

    Args:
        curvature: `Q`, symmetric positive semidefinite, (d, d).
        means: `m_t`, (T, d).
        slopes: `b_t`, as drawn, (T, d).
        wobble: `W`, symmetric, (d, d), or `None` for none.
        signs: `s_t`, as drawn, (T,), +1 or -1.
        variances: `sigma_t^2`, (T,).
        variations: `Sigma_t^2`, (T,); the first is an upper bound, `(max |Q| r +
            |m_1|)^2`, as `grad F_0 = 0`.
        gradient_bound: `G`: no gradient on the ball can be longer.
        radius: `r`, the ball's radius.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.games import sea
        >>> losses = sea.iid(jax.random.key(0), 100, jnp.array([3.0, 4.0]), noise=0.1)
        >>> [round(float(x), 3) for x in losses.best()]
        [-0.6, -0.8]
        >>> float(losses.expected_loss(0, jnp.array([1.0, 0.0])))
        3.0
    """

    curvature: Float[Array, "d d"]
    means: Float[Array, "T d"]
    slopes: Float[Array, "T d"]
    wobble: Float[Array, "d d"] | None
    signs: Float[Array, " T"]
    variances: Float[Array, " T"]
    variations: Float[Array, " T"]
    gradient_bound: Float[Array, ""]
    radius: Float[Array, ""]

    def loss(self, t: Int[Array, ""], x: Float[Array, " d"]) -> Float[Array, ""]:
        """`f_t(x)`, t from 0."""
        return x @ (self._matrix(t) @ x) / 2 + self.slopes[t] @ x

    def gradient(self, t: Int[Array, ""], x: Float[Array, " d"]) -> Float[Array, " d"]:
        """The gradient of `f_t` at x, t from 0."""
        return self._matrix(t) @ x + self.slopes[t]

    def expected_loss(
        self, t: Int[Array, ""], x: Float[Array, " d"]
    ) -> Float[Array, ""]:
        """`F_t(x)`, t from 0."""
        return x @ (self.curvature @ x) / 2 + self.means[t] @ x

    def smoothness(self) -> Float[Array, ""]:
        """`L` of the expected losses: the largest eigenvalue of `Q`."""
        return jnp.linalg.eigvalsh(self.curvature)[-1]

    def best(self, rounds: int | None = None) -> Float[Array, " d"]:
        """The point of the ball with the least expected loss over the first rounds.

        Args:
            rounds: How many rounds count; all by default.

        Returns:
            A point, (d,).
        """
        return self._minimiser(jnp.sum(self.means[:rounds], axis=0), rounds)

    def best_in_hindsight(self, rounds: int | None = None) -> Float[Array, " d"]:
        """The point of the ball with the least realised loss over the first rounds.

        Args:
            rounds: How many rounds count; all by default.

        Returns:
            A point, (d,).

        Raises:
            ValueError: if single losses wobble: their sum need not be convex.
        """
        if self.wobble is not None:
            raise ValueError(
                "Stream.best_in_hindsight: `wobble` must be None (single losses are "
                "not convex). Compare with `best`."
            )
        return self._minimiser(jnp.sum(self.slopes[:rounds], axis=0), rounds)

    def minimisers(self) -> Float[Array, "T d"]:
        """The minimiser of each round's expected loss: the comparators of (T, d)."""
        return jax.vmap(lambda m: self._minimiser(m, 1))(self.means)

    def _minimiser(self, slope, rounds):
        count = self.means[:rounds].shape[0]
        return minimise_quadratic_on_ball(self.curvature * count, -slope, self.radius)

    def _matrix(self, t):
        if self.wobble is None:
            return self.curvature
        return self.curvature + self.signs[t] * self.wobble


def stream(
    key: PRNGKeyArray,
    means: Float[Array, "T d"],
    *,
    curvature: Float[Array, "d d"] | None = None,
    noise: Float[Array, "d d"] | Float[Array, ""] | float = 0.0,
    wobble: Float[Array, "d d"] | None = None,
    radius: Float[Array, ""] | float = 1.0,
) -> Stream:
    """Losses with given expected slopes, whatever made these.

    Args:
        key: Draws noise and signs.
        means: `m_t`, (T, d).
        curvature: `Q`, symmetric positive semidefinite; zero (linear losses) by
            default.
        noise: The slopes' noise is `noise u`, `u` uniform on the unit sphere: a scalar
            for noise of that length in every direction, or a matrix.
        wobble: `W`, symmetric; none by default.
        radius: The ball's radius, positive.

    Returns:
        A `Stream`.

    Raises:
        ValueError: if shapes do not fit, data are not finite or `radius` is not
            positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.games import sea
        >>> losses = sea.stream(jax.random.key(0), jnp.zeros((8, 3)), noise=0.5)
        >>> losses.variances.tolist()[0], float(losses.gradient_bound)
        (0.25, 0.5)
    """
    check_shape("stream", "means", means, (None, None))
    check_finite("stream", "means", means)
    check_positive("stream", "radius", radius)
    horizon, d = means.shape
    dtype = means.dtype
    radius = jnp.asarray(radius, dtype)
    curvature = jnp.zeros((d, d), dtype) if curvature is None else curvature
    check_shape("stream", "curvature", curvature, (d, d))
    noise = jnp.asarray(noise, dtype)
    noise = noise * jnp.eye(d, dtype=dtype) if noise.ndim == 0 else noise
    check_shape("stream", "noise", noise, (d, d))
    noise_key, sign_key = jax.random.split(key)
    slopes = means + _on_sphere(noise_key, horizon, d, dtype) @ noise.T
    signs = jax.random.rademacher(sign_key, (horizon,), dtype)
    variance = jnp.sum(noise**2) / d
    reach = _norm(curvature) * radius
    swing = jnp.zeros((), dtype)
    if wobble is not None:
        check_shape("stream", "wobble", wobble, (d, d))
        swing = _norm(wobble) * radius
    sizes = jnp.linalg.norm(means, axis=1)
    return Stream(
        curvature=curvature,
        means=means,
        slopes=slopes,
        wobble=wobble,
        signs=signs,
        # Signs and noise are independent with mean zero: their squares add.
        variances=jnp.full(horizon, variance + swing**2),
        variations=_variations(means, reach + sizes[0]),
        gradient_bound=reach + jnp.max(sizes) + _norm(noise) + swing,
        radius=radius,
    )


def iid(
    key: PRNGKeyArray, horizon: int, mean: Float[Array, " d"], **settings
) -> Stream:
    """The stochastic model: one distribution for all rounds.

    Args:
        key: Draws noise and signs.
        horizon: The number of rounds T.
        mean: `m`, (d,).
        settings: The settings of `stream`.

    Returns:
        A `Stream` without drift after the first round.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.games import sea
        >>> losses = sea.iid(jax.random.key(0), 5, jnp.array([0.5]), noise=0.1)
        >>> losses.variations.tolist()
        [0.25, 0.0, 0.0, 0.0, 0.0]
    """
    return stream(key, jnp.broadcast_to(mean, (horizon, *mean.shape)), **settings)


def adversarial(
    key: PRNGKeyArray,
    horizon: int,
    mean: Float[Array, " d"],
    period: Int[Array, ""] | int,
    **settings,
) -> Stream:
    """The expected slope flips its sign every `period` rounds.

    Args:
        key: Draws noise and signs, where the settings ask for them.
        horizon: The number of rounds T.
        mean: The slope of the first rounds, (d,).
        period: Rounds between flips, at least 1; `horizon` or more for none.
        settings: The settings of `stream`; without noise, the losses are adversarial.

    Returns:
        A `Stream`.

    Raises:
        ValueError: if `period` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.games import sea
        >>> sea.adversarial(jax.random.key(0), 4, jnp.ones(1), 2).means[:, 0].tolist()
        [1.0, 1.0, -1.0, -1.0]
    """
    check_positive("adversarial", "period", period)
    odd = (jnp.arange(horizon) // period) % 2
    return stream(
        key, (1 - 2 * odd).astype(mean.dtype)[:, None] * mean[None, :], **settings
    )


def corrupted(
    key: PRNGKeyArray,
    horizon: int,
    mean: Float[Array, " d"],
    corruption: Float[Array, " d"],
    fraction: Float[Array, ""] | float,
    **settings,
) -> Stream:
    """Independent losses, a few of which an adversary shifts.

    Args:
        key: Draws noise, signs and the corrupted rounds.
        horizon: The number of rounds T.
        mean: The slope of the honest rounds, (d,).
        corruption: What the adversary adds to the slope, (d,).
        fraction: How many rounds are corrupted on average, in [0, 1].
        settings: The settings of `stream`.

    Returns:
        A `Stream` whose drift is the corruption's.

    Raises:
        ValueError: if `fraction` is negative.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.games import sea
        >>> key, e = jax.random.key(0), jnp.ones(1)
        >>> losses = sea.corrupted(key, 1000, e, -2 * e, 0.1)
        >>> 60 < int(jnp.sum(losses.means < 0)) < 140
        True
    """
    check_nonnegative("corrupted", "fraction", fraction)
    key, pick = jax.random.split(key)
    hit = jax.random.bernoulli(pick, fraction, (horizon,)).astype(mean.dtype)
    return stream(key, mean[None, :] + hit[:, None] * corruption[None, :], **settings)


def random_order(
    key: PRNGKeyArray,
    slopes: Float[Array, "n d"],
    passes: int = 1,
    *,
    curvature: Float[Array, "d d"] | None = None,
    radius: Float[Array, ""] | float = 1.0,
) -> Stream:
    """The random order model: n losses, drawn without replacement, in some passes.

    Each round's distribution is uniform on what is left of the pass; its mean and
    variance are those of the rest, exactly, along the order drawn.

    Args:
        key: Draws the orders.
        slopes: The slopes of the n losses, (n, d).
        passes: How many passes, each in an order of its own, at least 1.
        curvature: `Q`, shared by the losses; zero by default.
        radius: The ball's radius, positive.

    Returns:
        A `Stream` of `n * passes` rounds.

    Raises:
        ValueError: if shapes do not fit or `radius` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.games import sea
        >>> losses = sea.random_order(jax.random.key(0), jnp.array([[1.0], [-1.0]]))
        >>> losses.means[0].tolist(), losses.variances.tolist()
        ([0.0], [1.0, 0.0])
    """
    check_shape("random_order", "slopes", slopes, (None, None))
    n, d = slopes.shape
    orders = jax.vmap(lambda k: jax.random.permutation(k, n))(
        jax.random.split(key, passes)
    )
    drawn = slopes[orders]
    left = jnp.arange(n, 0, -1).astype(slopes.dtype)[None, :, None]

    def of_the_rest(values):
        return jnp.cumsum(values[:, ::-1], axis=1)[:, ::-1] / left

    means = of_the_rest(drawn)
    spread = of_the_rest(jnp.sum(drawn**2, axis=2, keepdims=True))[..., 0]
    variances = jnp.maximum(spread - jnp.sum(means**2, axis=2), 0).reshape(-1)
    still = stream(key, means.reshape(-1, d), curvature=curvature, radius=radius)
    realised = drawn.reshape(-1, d)
    reach = _norm(still.curvature) * still.radius
    bound = reach + jnp.max(jnp.linalg.norm(slopes, axis=1))
    return eqx.tree_at(
        lambda s: (s.slopes, s.variances, s.gradient_bound),
        still,
        (realised, variances, bound),
    )


def drift(
    key: PRNGKeyArray,
    targets: Float[Array, "T d"],
    curvature: Float[Array, "d d"],
    **settings,
) -> Stream:
    """Quadratics around a moving target: `F_t(x) = (x - u_t)'Q (x - u_t) / 2 + const`.

    Args:
        key: Draws noise and signs.
        targets: `u_t`, (T, d), inside the ball; the minimisers of the expected losses.
        curvature: `Q`, symmetric positive definite, (d, d).
        settings: The other settings of `stream`.

    Returns:
        A `Stream`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.games import sea
        >>> targets = jnp.linspace(-0.5, 0.5, 4)[:, None]
        >>> losses = sea.drift(jax.random.key(0), targets, jnp.eye(1))
        >>> bool(jnp.allclose(losses.minimisers(), targets))
        True
    """
    return stream(key, -targets @ curvature, curvature=curvature, **settings)


def _variations(means, first):
    steps = jnp.sum(jnp.diff(means, axis=0) ** 2, axis=1)
    return jnp.concatenate([(first**2)[None], steps])


def _on_sphere(key, horizon, d, dtype):
    directions = jax.random.normal(key, (horizon, d), dtype)
    return directions / jnp.linalg.norm(directions, axis=1, keepdims=True)


def _norm(matrix):
    return jnp.linalg.norm(matrix, ord=2)
