"""Entropic transport between continuous measures by an energy-based model.

The weak dual of `min E c(X, Y) - epsilon E H(pi(. | X))` over the plans of two measures
has a single unknown, a potential f of the target's points:
`max E f(Y) - epsilon E log Z(f, X)` with `Z = int exp((f(y) - c(X, y)) / epsilon) dy`.
Its gradient compares f on samples of the target with f on samples of
`pi_f(y | x) ~ exp((f(y) - c(x, y)) / epsilon)`: the training of an energy-based model,
whose negatives are drawn by Langevin chains that go on from step to step in a buffer of
pairs. The trained f is the plan: conditional samples come from the same chains.

Use it where only samples of both measures are there and new points must be carried; for
two fixed samples, or at small epsilon, discrete transport is faster and exact.

Cost: a training step takes `chain_steps + 2` gradients of f on a batch.

Source: Mokrov, Korotin, Kolesov, Gushchin, Burnaev, 2024 (arXiv 2304.06094).
"""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from ..core import Certificate
from ..core._checks import check_positive, is_traced
from ..metrics import mmd
from ._langevin import LangevinRun, ReplayBuffer, langevin
from ._monge_gap import Sampler

# A chain for the cost alone is stable while stepsize / epsilon is below 4.
_LONGEST = 2.0


def half_sqeuclidean(x: Float[Array, " d"], y: Float[Array, " d"]) -> Float[Array, ""]:
    """`|x - y|^2 / 2`.

    Args:
        x: A point.
        y: A point.

    Returns:
        A scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.transport import half_sqeuclidean
        >>> float(half_sqeuclidean(jnp.zeros(2), jnp.array([3.0, 4.0])))
        12.5
    """
    return jnp.sum((x - y) ** 2) / 2


class EnergyPlan(eqx.Module):
    """An entropic plan given by a potential on the target's space.

    Args:
        potential: From a point (d,) to a scalar.
        epsilon: Weight of the entropy in units of the cost.
        stepsize: Of the Langevin chains that sample it.
        cost: A differentiable function of two points.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.transport import EnergyPlan, half_sqeuclidean
        >>> plan = EnergyPlan(lambda y: 0.0 * y[0], 0.5, 0.2, half_sqeuclidean)
        >>> x = jnp.zeros((4000, 1))
        >>> y = plan.sample(jax.random.key(0), x, steps=40).samples
        >>> round(float(jnp.var(y)), 1)  # N(x, epsilon)
        0.5
    """

    potential: Callable[[Float[Array, " d"]], Float[Array, ""]]
    epsilon: Float[Array, ""] | float
    stepsize: Float[Array, ""] | float
    cost: Callable[[Float[Array, " d"], Float[Array, " d"]], Float[Array, ""]]

    def log_density(
        self, x: Float[Array, " d"], y: Float[Array, " d"]
    ) -> Float[Array, ""]:
        """The logarithm of `pi_f(y | x)`, up to a function of x."""
        return (self.potential(y) - self.cost(x, y)) / self.epsilon

    def sample(
        self,
        key: PRNGKeyArray,
        x: Float[Array, "n d"],
        *,
        steps: int,
        start: Float[Array, "n d"] | None = None,
        metropolis: bool = True,
    ) -> LangevinRun:
        """One sample of `pi_f(. | x)` for each point, by a chain from `start`.

        Chains begin at the points themselves by default. With Metropolis's test they
        have no bias once they have mixed, and the acceptance rate is reported.
        """
        return langevin(
            key,
            lambda y: jax.vmap(self.log_density)(x, y),
            x if start is None else start,
            stepsize=self.stepsize,
            steps=steps,
            metropolis=metropolis,
        )

    def certify(
        self,
        key: PRNGKeyArray,
        x: Float[Array, "n d"],
        y: Float[Array, "m d"],
        *,
        steps: int,
    ) -> Certificate:
        """The squared energy distance between pushed samples and the target's.

        The optimal potential is the one whose plan has the right second marginal.
        """
        run = self.sample(key, x, steps=steps)
        return Certificate(
            "marginal mismatch",
            mmd(run.samples, y, kernel="energy"),
            proof=False,
            statement=(
                "value is an unbiased estimate of the squared energy distance between "
                "the plan's second marginal and the target, but for chains that have "
                "not mixed; zero only for the optimal potential"
            ),
            details={"acceptance": run.acceptance},
        )

    def dual_value(
        self,
        key: PRNGKeyArray,
        x: Float[Array, "n d"],
        y: Float[Array, "m d"],
        *,
        draws: int,
    ) -> Float[Array, ""]:
        """An estimate of `E f(Y) - epsilon E log Z(f, X)`, for few dimensions.

        The optimal value exceeds it by epsilon times the divergence of `pi_f` from the
        optimal plan. Draws of `N(x, epsilon)` estimate Z; the estimate errs upwards,
        by about the relative variance of `exp(f / epsilon)` over twice `draws`. For
        `half_sqeuclidean` alone.
        """
        if self.cost is not half_sqeuclidean:
            raise ValueError(
                "EnergyPlan: `dual_value` needs the cost `half_sqeuclidean` (got "
                f"{getattr(self.cost, '__name__', self.cost)!r})."
            )
        size = x.shape[1]
        noise = jax.random.normal(key, (draws, size), x.dtype)
        spread = jnp.sqrt(jnp.asarray(self.epsilon, x.dtype))
        at = jax.vmap(lambda p: jax.vmap(self.potential)(p[None] + spread * noise))(x)
        logs = jax.nn.logsumexp(at / self.epsilon, axis=1) - jnp.log(float(draws))
        whole = size / 2 * jnp.log(2 * jnp.pi * spread**2)
        positive = jnp.mean(jax.vmap(self.potential)(y))
        return positive - self.epsilon * (jnp.mean(logs) + whole)


class EnergyFit(eqx.Module):
    """A trained plan and the way there.

    Args:
        plan: The plan.
        contrast: Of each step, the mean of f on the target minus that on negatives;
            near zero when the plan has the right marginal.
        finite: Whether all negatives stayed finite.
    """

    plan: EnergyPlan
    contrast: Float[Array, " steps"]
    finite: Array


def energy_ot(
    key: PRNGKeyArray,
    source: Sampler,
    target: Sampler,
    potential: Callable[[Float[Array, " d"]], Float[Array, ""]],
    *,
    epsilon: float | Float[Array, ""],
    cost: Callable[[Array, Array], Array] = half_sqeuclidean,
    stepsize: float | Float[Array, ""] | None = None,
    chain_steps: int = 20,
    buffer_size: int = 2000,
    fresh: float = 0.05,
    steps: int,
    optimiser: optax.GradientTransformation,
) -> EnergyFit:
    """Trains the potential of the entropic plan between two sampled measures.

    Args:
        key: Random key.
        source: From a key to a batch of the source, (n, d).
        target: From a key to a batch of the target, (n, d).
        potential: f at the start, an Equinox module, differentiable in its input.
        epsilon: Weight of the entropy in units of the cost, positive.
        cost: A differentiable function of two points.
        stepsize: Of the chains, in squared units of the points; default: a quarter of
            epsilon.
        chain_steps: Unadjusted Langevin steps in each training step.
        buffer_size: Pairs `(x, y)` kept, at least a batch.
        fresh: Share of a batch whose pairs begin anew, at y = x, in (0, 1].
        steps: Training steps.
        optimiser: An optax transformation.

    Returns:
        An `EnergyFit`. `finite` false means that chains diverged: shorten `stepsize`.

    Raises:
        ValueError: If `epsilon` is not positive, `stepsize` above twice epsilon (under
            the cost `|x - y|^2 / 2` alone the chain is at the edge at four times), the
            buffer is smaller than a batch, `fresh` out of range, or the two samplers
            differ in shape.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, optax
        >>> from varan.transport import energy_ot
        >>> class Linear(eqx.Module):
        ...     slope: jax.Array
        ...     def __call__(self, y):
        ...         return self.slope @ y
        >>> normal = lambda key: jax.random.normal(key, (64, 1))
        >>> wider = lambda key: 2**0.5 * normal(key) + 1
        >>> fit = energy_ot(
        ...     jax.random.key(0), normal, wider, Linear(jnp.zeros(1)), epsilon=1.0,
        ...     chain_steps=5, buffer_size=256, steps=150, optimiser=optax.adam(0.05))
        >>> bool(fit.finite), bool(abs(fit.plan.potential.slope[0] - 1) < 0.4)
        (True, True)

    Source:
        Mokrov et al., 2024 (arXiv 2304.06094), algorithm 1 and theorem 3.

    Differences:
        The chains run at the temperature of the dual, not at a lower one, so that
        epsilon means what it says; a pair goes back to the place it was drawn from,
        once.
    """
    check_positive("energy_ot", "epsilon", epsilon)
    length = epsilon / 4 if stepsize is None else stepsize
    check_positive("energy_ot", "stepsize", length)
    known = not (is_traced(epsilon) or is_traced(length))
    if known and length > _LONGEST * epsilon:
        raise ValueError(
            f"energy_ot: `stepsize` must be at most twice `epsilon` (got {length} "
            f"for {epsilon}): the chains would diverge."
        )
    if not 0 < fresh <= 1:
        raise ValueError(f"energy_ot: `fresh` must lie in (0, 1] (got {fresh}).")
    shapes = [jax.eval_shape(s, key).shape for s in (source, target)]
    if len(shapes[0]) != 2 or shapes[0] != shapes[1]:
        raise ValueError(
            "energy_ot: `source` and `target` must give batches of one shape (n, d) "
            f"(got {shapes[0]} and {shapes[1]})."
        )
    if buffer_size < shapes[0][0]:
        raise ValueError(
            f"energy_ot: `buffer_size` must be at least a batch, {shapes[0][0]} (got "
            f"{buffer_size})."
        )
    plan = EnergyPlan(potential, jnp.asarray(epsilon), jnp.asarray(length), cost)
    settings = chain_steps, buffer_size, fresh, steps
    return _train(key, source, target, plan, settings, optimiser)


@eqx.filter_jit
def _train(key, source, target, plan, settings, optimiser):
    chain_steps, buffer_size, fresh, steps = settings
    params, static = eqx.partition(plan.potential, eqx.is_inexact_array)
    for_buffer, for_steps = jax.random.split(key)

    def with_potential(params):
        potential = eqx.combine(params, static)
        return EnergyPlan(potential, plan.epsilon, plan.stepsize, plan.cost)

    def contrast(params, positive, negative):
        f = jax.vmap(eqx.combine(params, static))
        return jnp.mean(f(positive)) - jnp.mean(f(negative))

    def step(carry, key):
        params, state, buffer = carry
        keys = jax.random.split(key, 5)
        x_new, positive = source(keys[0]), target(keys[1])
        count = x_new.shape[0]
        places, (x, y) = buffer.draw(keys[2], count)
        anew = jax.random.bernoulli(keys[3], fresh, (count, 1))
        x, y = jnp.where(anew, x_new, x), jnp.where(anew, x_new, y)
        run = with_potential(params).sample(
            keys[4], x, start=y, steps=chain_steps, metropolis=False
        )
        value, slope = jax.value_and_grad(contrast)(params, positive, run.samples)
        # The dual is ascended.
        descent = jax.tree_util.tree_map(jnp.negative, slope)
        updates, state = optimiser.update(descent, state, params)
        params = optax.apply_updates(params, updates)
        buffer = buffer.put(places, (x, run.samples))
        return (params, state, buffer), (value, run.finite)

    batches = -(-buffer_size // jax.eval_shape(source, key).shape[0])
    drawn = jax.vmap(source)(jax.random.split(for_buffer, batches))
    first = drawn.reshape(-1, drawn.shape[-1])[:buffer_size]
    start = params, optimiser.init(params), ReplayBuffer((first, first))
    (params, _, _), (values, finite) = jax.lax.scan(
        step, start, jax.random.split(for_steps, steps)
    )
    return EnergyFit(with_potential(params), values, jnp.all(finite))
