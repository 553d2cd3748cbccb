"""Langevin sampling of unnormalised densities, with a replay buffer for training.

`y <- y + (s / 2) grad log p(y) + sqrt(s) noise`: the unadjusted chain has a bias of
order s; with the Metropolis test (MALA) it has none, and the acceptance rate tells
whether s is right (0.57 is the best in high dimensions). A step takes one value and
gradient of the log density for each particle; all particles run together.

Source: G. Roberts and R. Tweedie, Exponential convergence of Langevin distributions and
their discrete approximations, Bernoulli 2 (1996).
"""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from ..core._checks import check_finite, check_nonempty, check_positive


class LangevinRun(eqx.Module):
    """Where the particles ended, and how the chains fared.

    Args:
        samples: The particles after the last step, shape (n, d).
        acceptance: Share of the proposals that were taken; 1 without the test.
        finite: Whether every particle is finite. A step too long for the curvature
            makes the unadjusted chain diverge.
    """

    samples: Float[Array, "n d"]
    acceptance: Float[Array, ""]
    finite: Bool[Array, ""]


def langevin(
    key: PRNGKeyArray,
    log_density: Callable[[Float[Array, "n d"]], Float[Array, " n"]],
    start: Float[Array, "n d"],
    *,
    stepsize: float | Float[Array, ""],
    steps: int,
    metropolis: bool = False,
) -> LangevinRun:
    """Runs one Langevin chain for each particle.

    Args:
        key: Random key.
        log_density: From all particles to the logarithms of their densities, up to
            constants; entry i must depend on particle i alone. It may close over
            traced arrays.
        start: First particles.
        stepsize: `s`, positive, in squared units of the particles. Without the test
            the chain is stable while `s` times the largest curvature of `-log p` is
            below 4, and accurate while it is well below 1.
        steps: Steps of each chain, at least 1.
        metropolis: Accept or refuse each step by Metropolis's test (MALA).

    Returns:
        A `LangevinRun`. No derivative flows through it.

    Raises:
        ValueError: If `start` is empty, not (n, d) or not finite, `stepsize` is not
            positive or `steps` below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.transport import langevin
        >>> normal = lambda y: -jnp.sum(y**2, axis=1) / 2
        >>> run = langevin(jax.random.key(0), normal, jnp.zeros((4000, 1)),
        ...                stepsize=0.5, steps=40, metropolis=True)
        >>> round(float(jnp.var(run.samples)), 1)
        1.0

    Source:
        Roberts, Tweedie, 1996.
    """
    check_nonempty("langevin", "start", start)
    check_finite("langevin", "start", start)
    check_positive("langevin", "stepsize", stepsize)
    if jnp.ndim(start) != 2 or not isinstance(steps, int) or steps < 1:
        raise ValueError(
            "langevin: `start` must have shape (n, d) and `steps` be a positive "
            f"integer (got {jnp.shape(start)} and {steps!r})."
        )
    shape = jnp.shape(jax.eval_shape(log_density, start))
    if shape != (len(start),):
        raise ValueError(
            f"langevin: `log_density` must return one number a row (got shape {shape} "
            f"for {len(start)} rows)."
        )
    stepsize = jnp.asarray(stepsize, start.dtype)

    def at(y):
        value, pull = jax.vjp(log_density, y)
        return value, pull(jnp.ones_like(value))[0]

    def step(carry, key):
        y, value, slope = carry
        for_noise, for_test = jax.random.split(key)
        noise = jax.random.normal(for_noise, y.shape, y.dtype)
        new = y + stepsize / 2 * slope + jnp.sqrt(stepsize) * noise
        new_value, new_slope = at(new)
        if not metropolis:
            return (new, new_value, new_slope), jnp.ones((), y.dtype)
        back = y - new - stepsize / 2 * new_slope
        gain = jnp.sum(noise**2, axis=1) - jnp.sum(back**2, axis=1) / stepsize
        ratio = new_value - value + gain / 2
        draw = jax.random.uniform(for_test, value.shape, value.dtype)
        # A proposal whose density is NaN is refused.
        taken = jnp.log(draw) < ratio
        keep = taken[:, None]
        carry = (
            jnp.where(keep, new, y),
            jnp.where(taken, new_value, value),
            jnp.where(keep, new_slope, slope),
        )
        return carry, jnp.mean(taken.astype(y.dtype))

    start = jax.lax.stop_gradient(start)
    (samples, *_), taken = jax.lax.scan(
        step, (start, *at(start)), jax.random.split(key, steps)
    )
    samples = jax.lax.stop_gradient(samples)
    return LangevinRun(samples, jnp.mean(taken), jnp.all(jnp.isfinite(samples)))


class ReplayBuffer(eqx.Module):
    """Chains that go on from where an earlier training step left them.

    Holds entries of any structure, so that a sample keeps what it belongs to: the pair
    `(x, y)` for a chain in y given x. All methods are pure and work under jit.

    Args:
        entries: Pytree of arrays with one leading axis of entries.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.transport import ReplayBuffer
        >>> buffer = ReplayBuffer((jnp.arange(8), jnp.zeros(8)))
        >>> places, (x, y) = buffer.draw(jax.random.key(0), 3)
        >>> buffer = buffer.put(places, (x, y + 1))
        >>> float(buffer.entries[1].sum()), bool((buffer.entries[0][places] == x).all())
        (3.0, True)

    Source:
        T. Tieleman, Training restricted Boltzmann machines using approximations to the
        likelihood gradient, ICML 2008 (persistent chains).
    """

    entries: PyTree[Array]

    def __check_init__(self):
        sizes = {jnp.shape(leaf)[:1] for leaf in jtu.tree_leaves(self.entries)}
        if len(sizes) != 1 or () in sizes:
            raise ValueError(
                "ReplayBuffer: `entries` must have one leading axis in common (got "
                f"{sorted(sizes)})."
            )

    @property
    def size(self) -> int:
        """How many entries there are."""
        return jtu.tree_leaves(self.entries)[0].shape[0]

    def draw(self, key: PRNGKeyArray, count: int) -> tuple[Int[Array, " n"], PyTree]:
        """Distinct random places, at most `size`, and their entries."""
        if not 1 <= count <= self.size:
            raise ValueError(
                f"ReplayBuffer: `count` must be within 1 and {self.size} (got {count})."
            )
        places = jax.random.choice(key, self.size, (count,), replace=False)
        return places, jtu.tree_map(lambda leaf: leaf[places], self.entries)

    def put(self, places: Int[Array, " n"], entries: PyTree) -> ReplayBuffer:
        """The buffer with other entries at these places."""
        return ReplayBuffer(
            jtu.tree_map(
                lambda old, new: old.at[places].set(new), self.entries, entries
            )
        )
