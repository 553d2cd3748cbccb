"""Gradient flows in Wasserstein space by samples: the JKO scheme with a critic.

Each step moves the particles by the map that solves
`min_T E |X - T(X)|^2 / (2 a) + F(T#P)`, the implicit Euler step of length a for the
flow of F. With F in variational form that is a small min-max problem between a map and
a critic, which minibatches solve; both start where the last step ended. Maps are kept,
so that new particles can follow.

Use it to sample a density, or to follow an evolution equation, where densities of the
particles are not available. In few dimensions, and for densities alone, Langevin chains
are cheaper.

Cost: a step takes `iterations` rounds of a few gradients of critic and map on a batch.

Source: Fan, Zhang, Taghvaei, Chen, 2022 (arXiv 2112.02424).
"""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..core import Certificate
from ..core._checks import check_finite, check_nonempty, check_positive, is_traced
from ._functionals import Functional


class FlowResult(eqx.Module):
    """The particles along the flow, and what moves new ones.

    Args:
        particles: After the last step.
        values: The lower bound on F after each step.
        errors: Standard errors of the values.
        movement: Mean of `|x - T(x)|^2 / (2 a)` in each step.
        maps: The maps of all steps, their arrays stacked along a first axis.
        critic: The last critic.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, optax
        >>> from varan.transport import jko_flow, kl_to_density
        >>> class Shift(eqx.Module):
        ...     by: jax.Array
        ...     def __call__(self, x):
        ...         return x + self.by
        >>> x = jax.random.normal(jax.random.key(0), (500, 1))
        >>> divergence = kl_to_density(lambda x: -jnp.sum((x - 2) ** 2) / 2)
        >>> flow = jko_flow(
        ...     jax.random.key(1), x, divergence,
        ...     stepsize=1.0, steps=3, map_model=Shift(jnp.zeros(1)),
        ...     critic=eqx.nn.Linear(1, "scalar", key=jax.random.key(2)),
        ...     iterations=40, batch_size=100,
        ...     map_optimiser=optax.sgd(0.2), critic_optimiser=optax.sgd(0.1))
        >>> bool((flow.push(x) == flow.particles).all())
        True
    """

    particles: Float[Array, "n d"]
    values: Float[Array, " steps"]
    errors: Float[Array, " steps"]
    movement: Float[Array, " steps"]
    maps: PyTree
    critic: Callable

    def push(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """Moves other particles through all steps."""
        arrays, static = eqx.partition(self.maps, eqx.is_array)

        def step(x, arrays):
            return jax.vmap(eqx.combine(arrays, static))(x), None

        return jax.lax.scan(step, x, arrays)[0]

    @property
    def certificate(self) -> Certificate:
        """The last lower bound on F, and whether the steps went down."""
        noise = 2 * jnp.sqrt(self.errors[1:] ** 2 + self.errors[:-1] ** 2)
        down = self.values[1:] + self.movement[1:] <= self.values[:-1] + noise
        return Certificate(
            "functional value",
            self.values[-1],
            proof=False,
            statement=(
                "value is a lower bound on the functional at the particles' law, but "
                "for sampling: its standard error is standard_error; descents is the "
                "share of steps whose objective fell, within two standard errors"
            ),
            details={
                "standard_error": self.errors[-1],
                "descents": jnp.mean(down.astype(self.values.dtype)),
            },
        )


def jko_flow(
    key: PRNGKeyArray,
    particles: Float[Array, "n d"],
    functional: Functional,
    *,
    stepsize: float | Float[Array, ""],
    steps: int,
    map_model: Callable[[Float[Array, " d"]], Float[Array, " d"]],
    critic: Callable[[Float[Array, " d"]], Float[Array, ""]],
    inner: tuple[int, int] = (3, 2),
    iterations: int = 100,
    batch_size: int = 512,
    map_optimiser: optax.GradientTransformation,
    critic_optimiser: optax.GradientTransformation,
) -> FlowResult:
    """Follows the Wasserstein gradient flow of a functional from given particles.

    Args:
        key: Random key.
        particles: Samples of the first law.
        functional: `kl_to_density`, `kl_to_samples`, `jensen_shannon`,
            `porous_medium`, or a `Functional` of your own.
        stepsize: a, positive: the flow's time in one step.
        steps: JKO steps.
        map_model: T at the start, best near the identity; the gradient of a convex
            network, `varan.nets.InputConvex(...).gradient`, gives the JKO-ICNN variant.
        critic: u at the start, from a point to a scalar.
        inner: Ascent steps of the critic and descent steps of the map in each round;
            the paper's are 3 and 2. With 0 the critic stays as it is.
        iterations: Rounds in a step, each on new batches.
        batch_size: Particles in a batch, drawn with replacement.
        map_optimiser: An optax transformation; its state lasts over all steps.
        critic_optimiser: An optax transformation.

    Returns:
        A `FlowResult`. NaN stays visible in its values.

    Raises:
        ValueError: If `particles` is empty or not finite, `stepsize` not positive,
            `steps`, `iterations` or `inner` out of range, or the functional is not
            finite at the particles.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, optax
        >>> from varan.transport import jko_flow, kl_to_density
        >>> class Shift(eqx.Module):
        ...     by: jax.Array
        ...     def __call__(self, x):
        ...         return x + self.by
        >>> x = jax.random.normal(jax.random.key(0), (500, 1))
        >>> divergence = kl_to_density(lambda x: -jnp.sum((x - 2) ** 2) / 2)
        >>> flow = jko_flow(
        ...     jax.random.key(1), x, divergence,
        ...     stepsize=1.0, steps=3, map_model=Shift(jnp.zeros(1)),
        ...     critic=eqx.nn.Linear(1, "scalar", key=jax.random.key(2)),
        ...     iterations=40, batch_size=100,
        ...     map_optimiser=optax.sgd(0.2), critic_optimiser=optax.sgd(0.1))
        >>> bool(abs(flow.particles.mean() - 2 * (1 - 0.5**3)) < 0.3)
        True

    Source:
        Fan et al., 2022 (arXiv 2112.02424), algorithm 1.

    Differences:
        One set of particles is moved; the released code draws new ones in each step
        and pushes them through all maps, as `push` does.
    """
    check_nonempty("jko_flow", "particles", particles)
    check_finite("jko_flow", "particles", particles)
    check_positive("jko_flow", "stepsize", stepsize)
    if min(steps, iterations, batch_size, inner[1]) < 1 or inner[0] < 0:
        raise ValueError(
            "jko_flow: `steps`, `iterations`, `batch_size` and the map's share of "
            f"`inner` must be at least 1 (got {steps}, {iterations}, {batch_size} and "
            f"{inner})."
        )
    reference = functional.fit(particles)
    first, _ = functional.estimate(critic, particles, particles[:1], reference)
    if not is_traced(first) and not bool(jnp.all(jnp.isfinite(first))):
        raise ValueError(
            "jko_flow: `functional` must be finite at the particles (got NaN or "
            "infinity). Its log density may vanish there."
        )
    stepsize = jnp.asarray(stepsize, particles.dtype)
    sizes = steps, tuple(inner), iterations, batch_size
    optimisers = map_optimiser, critic_optimiser
    return _flow(
        key, particles, functional, stepsize, map_model, critic, sizes, optimisers
    )


@eqx.filter_jit
def _flow(key, particles, functional, stepsize, map_model, critic, sizes, optimisers):
    steps, (ascents, descents), iterations, batch_size = sizes
    map_optimiser, critic_optimiser = optimisers
    moving, fixed_map = eqx.partition(map_model, eqx.is_inexact_array)
    judging, fixed_critic = eqx.partition(critic, eqx.is_inexact_array)

    def images(moving, x):
        return jax.vmap(eqx.combine(moving, fixed_map))(x)

    def bound(judging, y, z, reference):
        critic = eqx.combine(judging, fixed_critic)
        first, second = functional.estimate(critic, y, z, reference)
        return jnp.mean(first) - jnp.mean(second)

    def cost(moving, judging, x, reference):
        y = images(moving, x)
        movement = jnp.mean(jnp.sum((x - y) ** 2, axis=1)) / (2 * stepsize)
        # The reference's part does not depend on the map.
        critic = eqx.combine(judging, fixed_critic)
        first = functional.first(jax.vmap(critic)(y), y, reference)
        return movement + jnp.mean(first)

    def draw(key, particles):
        places = jax.random.randint(key, (batch_size,), 0, particles.shape[0])
        return particles[places]

    def one_round(particles, reference, carry, key):
        moving, judging, map_state, critic_state = carry
        for_critic, for_map = jax.random.split(key)

        def ascend(carry, key):
            judging, state = carry
            for_x, for_z = jax.random.split(key)
            y = images(moving, draw(for_x, particles))
            z = reference.sample(for_z, batch_size)
            slope = jax.grad(bound)(judging, y, z, reference)
            slope = jtu.tree_map(jnp.negative, slope)
            updates, state = critic_optimiser.update(slope, state, judging)
            return (optax.apply_updates(judging, updates), state), None

        (judging, critic_state), _ = jax.lax.scan(
            ascend, (judging, critic_state), jax.random.split(for_critic, ascents)
        )

        def descend(carry, key):
            moving, state = carry
            slope = jax.grad(cost)(moving, judging, draw(key, particles), reference)
            updates, state = map_optimiser.update(slope, state, moving)
            return (optax.apply_updates(moving, updates), state), None

        (moving, map_state), _ = jax.lax.scan(
            descend, (moving, map_state), jax.random.split(for_map, descents)
        )
        return (moving, judging, map_state, critic_state), None

    def one_step(carry, key):
        particles, inner = carry
        for_rounds, for_value = jax.random.split(key)
        reference = functional.fit(particles)
        inner, _ = jax.lax.scan(
            lambda c, k: one_round(particles, reference, c, k),
            inner,
            jax.random.split(for_rounds, iterations),
        )
        moving, judging = inner[:2]
        moved = images(moving, particles)
        critic = eqx.combine(judging, fixed_critic)
        value, error = functional.value(critic, moved, reference, for_value)
        apart = jnp.mean(jnp.sum((particles - moved) ** 2, axis=1)) / (2 * stepsize)
        return (moved, inner), (value, error, apart, moving)

    states = map_optimiser.init(moving), critic_optimiser.init(judging)
    inner = (moving, judging, *states)
    (particles, inner), (values, errors, movement, maps) = jax.lax.scan(
        one_step, (particles, inner), jax.random.split(key, steps)
    )
    return FlowResult(
        particles,
        values,
        errors,
        movement,
        eqx.combine(maps, fixed_map),
        eqx.combine(inner[1], fixed_critic),
    )
