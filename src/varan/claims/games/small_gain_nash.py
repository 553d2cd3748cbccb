"""Weighted norms certify games that are not monotone, with steps that then contract.

The claim: from each player's curvature and the couplings follow weights, a rate and
step sizes; on games where Euclid's norm fails, every certified step contracts. Parts:

- band: the paper's quadratic game of two players, whose band of weights has a formula;
- quadratics: random games of 2 to 5 players with uneven couplings: Euler and RK4 at
  0.9 of their longest certified steps; where nothing is certified, Euler with the step
  that each player alone would take, the reciprocal of the own smoothness (on certified
  games that step converges too: their rows dominate in a weighted maximum norm);
- nonlinear: couplings through tanh, with bounds that hold everywhere, on a box;
- markov: softmax policies of two players in a Markov game with two states and entropy
  0.5, in logits and in the Fisher metric at the equilibrium, with sampled bounds.

Kept: the certificates and both steppers. Given up: larger Markov games. Refuted by: a
certified run that does not contract as promised, weights better than the closed form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from varan import solve
from varan.claims import Curve, Measurements
from varan.games import (
    Extragradient,
    Game,
    GradientDescentAscent,
    RungeKutta,
    quadratic_game,
    small_gain_band,
    small_gain_certificate,
    small_gain_margin,
    small_gain_weights,
)

PART_OF_LONGEST = 0.9


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures the parts of the scale for one seed."""
    numbers: dict[str, float] = {}
    curves: list[Curve] = []
    notes: list[str] = []
    parts = {
        "band": _band,
        "quadratics": _quadratics,
        "nonlinear": _nonlinear,
        "markov": _markov,
    }
    for name in scale["parts"]:
        rng = np.random.default_rng([seed, len(name)])
        parts[name](scale, rng, numbers, curves, notes)
    return Measurements(numbers, curves, notes)


@eqx.filter_jit
def _run(solver, game, start, steps):
    """The start and every iterate."""

    def advance(state, _):
        return solver.step(game, state), state.x

    return jax.lax.scan(advance, solver.init(game, start), None, length=steps + 1)[1]


def _box(low, high):
    """Corners at a distance from two points."""

    def corner(z, size):
        return jtu.tree_map(lambda v: v + size, z)

    return corner(*low), corner(*high)


def _everywhere(z):
    return _box((z, -jnp.inf), (z, jnp.inf))


def _band(scale, rng, numbers, curves, notes):
    del scale, rng, notes
    one = jnp.ones((1, 1))
    game = quadratic_game([[one, 10 * one], [0.05 * one, one]], [jnp.zeros(1)] * 2)
    found = small_gain_certificate(game, _everywhere((jnp.zeros(1),) * 2))
    numbers["euclidean_margin"] = float(found.unweighted_margin)
    mu, L = np.ones(2), np.array([[1.0, 10.0], [0.05, 1.0]])
    low, high = small_gain_band(mu, L)

    def margins(ratios):
        return np.array(
            [small_gain_margin(mu, L, np.array([r, 1.0]))[0] for r in ratios]
        )

    ends = margins([low, high])
    numbers["band_end_margin"] = float(np.max(np.abs(ends)))
    inside = np.geomspace(low, high, 201)[1:-1]
    outside = np.concatenate([low / inside * low, high / inside * high])
    numbers["band_errors"] = float(
        np.sum(margins(inside) <= 0) + np.sum(margins(outside) > 1e-9)
    )
    alpha, beta = small_gain_margin(mu, L, np.array([0.005, 1.0]))
    reference = np.array([1 - 0.5**0.5, 1 + 0.5**0.5])
    numbers["constants_error"] = float(np.max(np.abs([alpha, beta] - reference)))
    ratios = np.geomspace(low / 10, high * 10, 100)
    curves.append(
        Curve(
            ratios,
            margins(ratios),
            "margin alpha",
            "the band of the paper's game",
            "weight ratio w1 / w2",
            "alpha",
            log_x=True,
        )
    )


def _uneven(rng, players):
    """Couplings relative to curvature one, and scales that make them uneven."""
    gain = rng.uniform(0.3, 1.6)
    couplings = rng.uniform(0, 1, (players, players)) * 2 * gain / (players - 1)
    scales = 10 ** rng.uniform(-1, 1, players)
    return couplings * (1 - np.eye(players)), scales


def _matrix(rng, norm, size=2):
    A = rng.standard_normal((size, size))
    return norm * A / np.linalg.norm(A, 2)


def _quadratic(rng, players):
    couplings, scales = _uneven(rng, players)
    blocks = []
    for i in range(players):
        row = [
            _matrix(rng, couplings[i, j]) * scales[i] / scales[j]
            for j in range(players)
        ]
        Q = np.linalg.qr(rng.standard_normal((2, 2)))[0]
        spectrum = rng.uniform(0.8, 2.0, 2)
        row[i] = (Q * spectrum[None, :]) @ Q.T
        blocks.append([jnp.asarray(B) for B in row])
    offsets = [jnp.asarray(rng.standard_normal(2)) for _ in range(players)]
    return quadratic_game(blocks, offsets)


def _start(rng, players):
    return tuple(jnp.asarray(rng.standard_normal(2)) for _ in range(players))


def _quadratics(scale, rng, numbers, curves, notes):
    certified, monotone, failures, naive, gap, worst = 0, 0, 0, 0, -np.inf, 0.0
    for draw in range(scale["draws"]):
        players = 2 + draw % 4
        game, start = _quadratic(rng, players), _start(rng, players)
        found = small_gain_certificate(game, _everywhere(start))
        mu, L = np.asarray(found.curvature), np.asarray(found.coupling)
        best = small_gain_margin(mu, L, small_gain_weights(mu, L))[0]
        for spread in (2.0, 0.1, 0.01):
            near = small_gain_weights(mu, L) * np.exp(
                spread * rng.standard_normal(players)
            )
            gap = max(gap, small_gain_margin(mu, L, near)[0] - best)
        if not found.certificate.met:
            alone = jnp.asarray(1 / np.max(np.diag(L)))
            path = _run(GradientDescentAscent(alone), game, start, scale["steps"])
            size = np.linalg.norm(np.concatenate([np.asarray(v[-1]) for v in path]))
            naive += not size < 1e6
            continue
        certified += 1
        monotone += bool(found.unweighted_margin > 0)
        for method, solver, longest in (
            ("euler", GradientDescentAscent, found.euler_stepsize),
            ("rk4", RungeKutta, found.rk4_stepsize),
        ):
            h = PART_OF_LONGEST * longest
            path = _run(solver(h), game, start, scale["steps"])
            seen = found.verify(path, float(h), method)
            failures += not bool(seen.met)
            worst = max(worst, float(seen.value / seen.details["factor"]))
    numbers["certified"] = float(certified)
    numbers["certified_not_monotone"] = float(certified - monotone)
    numbers["certified_failures"] = float(failures)
    numbers["contraction_ratio"] = worst
    numbers["naive_divergences"] = float(naive)
    numbers["weights_gap"] = float(gap)
    notes.append(
        f"{certified} of {scale['draws']} quadratic games certified, {monotone} of "
        f"them monotone in Euclid's norm; the uncoupled step diverges on {naive} of "
        "the others"
    )


def _coupled(player):
    def loss(z, own, couplings, offset):
        mine = z[player]
        curved = (
            own[player] * jnp.sum(mine**2) / 2 + jnp.sum(jnp.log(jnp.cosh(mine))) / 2
        )
        pulled = sum(
            mine @ couplings[player][other] @ jnp.tanh(z[other])
            for other in range(len(z))
            if other != player
        )
        return curved + pulled + offset[player] @ mine

    return loss


def _clip(z, *params):
    del params
    return jtu.tree_map(lambda v: jnp.clip(v, -3, 3), z)


def _nonlinear(scale, rng, numbers, curves, notes):
    players, failures, certified, optimistic = 3, 0, 0, 0
    losses = [_coupled(player) for player in range(players)]
    for draw in range(scale["nonlinear_draws"]):
        couplings, scales = _uneven(rng, players)
        norms = couplings * scales[:, None] / scales[None, :]
        blocks = [[jnp.asarray(_matrix(rng, c)) for c in row] for row in norms]
        own, offset = (
            jnp.asarray(rng.uniform(0.8, 1.5, players)),
            list(_start(rng, players)),
        )
        params = own, blocks, offset
        origin = (jnp.zeros(2),) * players
        box = _box((origin, -3.0), (origin, 3.0))
        # d tanh and the curvature of log cosh lie between zero and one everywhere.
        bounds = np.asarray(own), norms + np.diag(np.asarray(own) + 0.5)
        free = Game.from_players(losses, *params)
        held = Game.from_players(losses, *params, project=_clip)
        for game, region, solver, method in (
            (held, box, GradientDescentAscent, "euler"),
            (free, _everywhere(box[0]), RungeKutta, "rk4"),
        ):
            found = small_gain_certificate(game, region, bounds=bounds)
            if not found.certificate.met:
                continue
            certified += 1
            h = PART_OF_LONGEST * getattr(found, f"{method}_stepsize")
            path = _run(solver(h), game, _start(rng, players), scale["steps"])
            resting = solve(
                game, solver(h), box[0], tol=1e-11, max_steps=scale["rest_steps"]
            )
            rest, arrived = resting.x, bool(resting.converged)
            factor = found.factor(float(h), method)
            away = jax.vmap(found.norm)(
                jtu.tree_map(lambda v, r: v - r[None], path, rest)
            )
            envelope = np.asarray(away[0]) * factor ** np.arange(len(away))
            early = envelope >= 1e-8 * envelope[0]
            inside = np.all((np.asarray(away) <= envelope * (1 + 1e-6))[early])
            seen = found.verify(path, float(h), method)
            failures += not (arrived and inside and bool(seen.met))
            if draw == 0 and method == "euler":
                for values, label in ((away, "measured"), (envelope, "certified")):
                    curves.append(
                        Curve(
                            np.arange(len(away)),
                            np.maximum(values, 1e-12),
                            label,
                            "tanh couplings, projected Euler",
                            "step",
                            "weighted distance to the equilibrium",
                            log_y=True,
                        )
                    )
        sampled = small_gain_certificate(
            free, box, bounds="sampled", key=jax.random.key(draw)
        )
        proved = small_gain_certificate(free, box, bounds=bounds)
        optimistic += not sampled.margin >= proved.margin - 1e-9
    numbers["nonlinear_certified"] = float(certified)
    numbers["nonlinear_failures"] = float(failures)
    numbers["sampled_below_proof"] = float(optimistic)
    notes.append(f"tanh couplings: {certified} certificates (projected Euler and RK4)")


ENTROPY, DISCOUNT = 0.5, 0.8


def _occupancy(z, transition):
    """Probabilities of the actions, and discounted visits from a uniform start."""
    p, q = (jnp.stack([jax.nn.sigmoid(v), jax.nn.sigmoid(-v)], 1) for v in z)
    moves = jnp.einsum("sa,sb,sabt->st", p, q, transition)
    system = jnp.eye(2) - DISCOUNT * moves
    visits = jnp.linalg.solve(system.T, jnp.full(2, 0.5))
    return p, q, visits


def _policy_loss(player):
    def loss(z, rewards, transition):
        p, q, visits = _occupancy(z, transition)
        mine = (p, q)[player]
        entropy = -jnp.sum(mine * jnp.log(mine), axis=1)
        reward = jnp.einsum("sa,sb,sab->s", p, q, rewards[player])
        return -visits @ (reward + ENTROPY * entropy)

    return loss


# Made once: new functions would be compiled anew for every game.
_POLICIES = (_policy_loss(0), _policy_loss(1))


def _natural(z, rewards, transition, fisher):
    force = Game.from_players(_POLICIES, rewards, transition).apply(z)
    return tuple(f / d for f, d in zip(force, fisher, strict=True))


def _markov(scale, rng, numbers, curves, notes):
    del curves
    failures, certified, tried = 0, {"logits": 0, "Fisher": 0}, 0
    rates = {"logits": [], "Fisher": []}
    for draw in range(scale["markov_draws"]):
        rewards = jnp.asarray(rng.uniform(-1, 1, (2, 2, 2, 2)))
        transition = jnp.asarray(rng.dirichlet(np.ones(2), (2, 2, 2)))
        plain = Game.from_players(_POLICIES, rewards, transition)
        zero = (jnp.zeros(2), jnp.zeros(2))
        solution = solve(plain, Extragradient(0.3), zero, tol=1e-10, max_steps=20000)
        if not solution.converged:
            continue
        tried += 1
        z = solution.x
        p, q, visits = _occupancy(z, transition)
        fisher = tuple(visits * v[:, 0] * v[:, 1] for v in (p, q))
        natural = Game(_natural, rewards, transition, fisher)
        box = _box((z, -0.1), (z, 0.1))
        for name, game, metrics in (
            ("logits", plain, None),
            ("Fisher", natural, [jnp.diag(d) for d in fisher]),
        ):
            found = small_gain_certificate(
                game, box, bounds="sampled", metrics=metrics, key=jax.random.key(draw)
            )
            if not found.certificate.met:
                continue
            certified[name] += 1
            # A start on the sphere inside of the largest ball that fits in the box.
            way = _start(rng, 2)
            far = PART_OF_LONGEST * found.room(z) / found.norm(way)
            start = jtu.tree_map(lambda v, d, r=far: v + r * d, z, way)
            h = PART_OF_LONGEST * found.euler_stepsize
            path = _run(GradientDescentAscent(h), game, start, scale["markov_steps"])
            seen = found.verify(path, float(h))
            failures += not bool(seen.met)
            rates[name].append(float(seen.value))
    numbers["markov_games"] = float(tried)
    for name in ("logits", "Fisher"):
        numbers[f"markov_certified_{name.lower()}"] = float(certified[name])
        if rates[name]:
            numbers[f"markov_factor_{name.lower()}"] = float(np.median(rates[name]))
    numbers["markov_certified"] = float(max(certified.values()))
    numbers["markov_failures"] = float(failures)
    notes.append(
        f"{tried} Markov games: {certified['logits']} certified in logits, "
        f"{certified['Fisher']} in the Fisher metric (sampled bounds, half-width 0.1)"
    )
