"""What the solvers of games share: stepsizes, oracle calls, moves."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

from ..core._checks import check_positive, is_traced
from ..core._status import Status

Stepsize = float | Float[Array, ""] | Callable[[Int[Array, ""]], Float[Array, ""]]


class InverseTime(eqx.Module):
    """The schedule `scale / (step + offset)`, steps counted from one.

    For a strongly monotone operator (modulus `alpha`) with noise, `scale > 1 / alpha`
    and `offset >= 4 scale L` give the rate `O(1 / step)` of the last iterate.

    Args:
        scale: Positive.
        offset: Non-negative.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import InverseTime
        >>> float(InverseTime(3.0, 2.0)(jnp.array(1)))
        1.0

    Source:
        Hsieh, Iutzeler, Malick and Mertikopoulos, 2019 (arXiv 1908.08465),
        the last iterate with noise.
    """

    scale: float | Float[Array, ""]
    offset: float | Float[Array, ""] = 0.0

    def __check_init__(self):
        check_positive("InverseTime", "scale", self.scale)
        if not is_traced(self.offset) and not self.offset >= 0:
            raise ValueError(
                f"InverseTime: `offset` must not be negative (got {self.offset})."
            )

    def __call__(self, step: Int[Array, ""]) -> Float[Array, ""]:
        scale, offset = jnp.asarray(self.scale), jnp.asarray(self.offset)
        return scale / (step.astype(scale.dtype) + offset.astype(scale.dtype))


def check_stepsize(owner: str, stepsize, name: str = "stepsize") -> None:
    """Refuses a number that is not positive; a schedule is called by the solver."""
    if not callable(stepsize):
        check_positive(owner, name, stepsize)


def stepsize_at(stepsize: Stepsize, count, like) -> Float[Array, ""]:
    """The stepsize of step `count`, in the dtype of the iterate."""
    value = stepsize(count) if callable(stepsize) else stepsize
    return jnp.asarray(value, jnp.result_type(*jtu.tree_leaves(like)))


def permitted(game, stepsize: Stepsize, start) -> Int[Array, ""]:
    """`DIVERGED` where a constant stepsize exceeds the promised `1 / L`."""
    if game.lipschitz is None or callable(stepsize):
        return jnp.asarray(Status.RUNNING, jnp.int32)
    size = stepsize_at(stepsize, None, start)
    long = size * jnp.asarray(game.lipschitz, size.dtype) > 1
    return jnp.where(long, Status.DIVERGED, Status.RUNNING).astype(jnp.int32)


def query(game, key, z: PyTree[Array]) -> PyTree[Array]:
    """One oracle call: exact without a key."""
    return game.apply(z) if key is None else game.sample(key, z)


def fresh(key, number: int):
    """The key to keep and `number` keys to use; all `None` without a key."""
    if key is None:
        return (None,) * (number + 1)
    return tuple(jax.random.split(key, number + 1))


def forward(z: PyTree[Array], stepsize, force: PyTree[Array]) -> PyTree[Array]:
    """`z - stepsize * force`."""
    return jtu.tree_map(lambda v, f: v - stepsize * f, z, force)


def slow_first(force: PyTree[Array], timescale) -> PyTree[Array]:
    """The first player's block over `timescale`; `None` leaves all as it is."""
    if timescale is None:
        return force
    if not isinstance(force, (tuple, list)) or len(force) != 2:
        raise ValueError(
            "varan.games: with a `timescale` the iterate must be a pair (x, y) (got "
            f"{jtu.tree_structure(force)}). See Game.from_saddle."
        )
    first = jtu.tree_map(lambda v: v / jnp.asarray(timescale, v.dtype), force[0])
    return type(force)((first, force[1]))


def check_timescale(owner: str, timescale) -> None:
    """Refuses to slow the second player down."""
    if timescale is None or is_traced(timescale):
        return
    if not timescale >= 1:
        raise ValueError(
            f"{owner}: `timescale` must be at least 1 (got {timescale}). Exchange the "
            "players to slow the second one down."
        )
