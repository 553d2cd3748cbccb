"""Single-call extragradient: ours and optax's optimistic gradient descent.

Without constraints they make the same points from the same start with the same step.
Ours runs under `varan.solve`, which checks the residual at every step, records it and
certifies the answer; optax's rule stands in a plain compiled loop that checks the same
residual and does nothing else. Both stand in a jitted function, as in a larger
program; what differs is what `solve` costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from varan import solve
from varan.claims import Contestant, Heat
from varan.games import PastExtragradient, estimate_lipschitz, quartic_saddle

MAX_STEPS = 5000


def heats(settings: Mapping[str, Any]) -> Iterator[Heat]:
    """One heat a dimension."""
    for size in settings["sizes"]:
        instance = _Instance(size, settings["tol"])
        yield Heat(
            name=f"strongly monotone saddle, {size} + {size} variables",
            contestants=[
                Contestant("ours", partial(_ours, instance)),
                Contestant("optax", partial(_optax, instance), package="optax"),
            ],
            error=instance.error,
            tolerance=settings["tol"],
            measure="norm of the operator",
        )


class _Instance:
    """A saddle function, a start and the step of both; made when first asked for."""

    def __init__(self, size: int, tol: float):
        self.size, self.tol = size, tol

    @cache  # noqa: B019 (an instance lives as long as its race)
    def data(self):
        key, draw = jax.random.split(jax.random.key(self.size))
        game = quartic_saddle(key, self.size)
        L = estimate_lipschitz(game, (jnp.zeros((1, self.size)),) * 2).value
        return game, tuple(jax.random.normal(draw, (2, self.size))), 0.5 / L

    def error(self, z) -> float:
        game, _, _ = self.data()
        return float(game.residual(game.apply(z)))


def _ours(instance):
    game, start, step = instance.data()
    settings = {"tol": instance.tol, "max_steps": MAX_STEPS, "differentiate": "none"}

    @jax.jit
    def run(game, start, step):
        return solve(game, PastExtragradient(step), start, **settings).x

    return lambda: jax.block_until_ready(run(game, start, step))


def _optax(instance):
    import optax

    game, start, step = instance.data()

    @jax.jit
    def run(game, start, step):
        rule = optax.optimistic_gradient_descent(step)

        def proceed(carry):
            _, _, force, count = carry
            return (game.residual(force) > 0.999 * instance.tol) & (count < MAX_STEPS)

        def advance(carry):
            z, state, force, count = carry
            updates, state = rule.update(force, state, z)
            z = optax.apply_updates(z, updates)
            return z, state, game.apply(z), count + 1

        first = (start, rule.init(start), game.apply(start), jnp.asarray(0, jnp.int32))
        return jax.lax.while_loop(proceed, advance, first)[0]

    return lambda: jax.block_until_ready(run(game, start, step))
