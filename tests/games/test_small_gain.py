"""Small-gain certificates: optimal weights, bounds above the truth, honest runs."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

from varan import solve
from varan.games import (
    Game,
    GradientDescentAscent,
    RungeKutta,
    bilinear_game,
    quadratic_game,
    rotation_game,
    small_gain_band,
    small_gain_certificate,
    small_gain_margin,
    small_gain_weights,
)
from varan.testing import Case, contract

ONE = jnp.ones((1, 1))
ZERO = (jnp.zeros(1), jnp.zeros(1))
LINE = (jnp.full(1, -jnp.inf),) * 2, (jnp.full(1, jnp.inf),) * 2


def two_players(b12, b21):
    return quadratic_game([[ONE, b12 * ONE], [b21 * ONE, ONE]], [jnp.ones(1)] * 2)


CASES = [
    Case(
        lambda: RungeKutta(0.5),
        [two_players(1.0, 0.1), two_players(0.5, 0.2)],
        ZERO,
        name="runge-kutta",
    )
]
test_contract = contract(CASES)


def random_bounds(rng, n):
    mu = rng.uniform(0.5, 2, n)
    L = rng.uniform(0, 1, (n, n)) * 10 ** rng.uniform(-1, 1, (n, n))
    np.fill_diagonal(L, mu * rng.uniform(1, 2, n))
    return mu, L


def bent(z, scale):
    """Two scalar players; Jacobian [[1, s cos y], [s cos x, 1]]."""
    x, y = z
    return x + scale * jnp.sin(y), y + scale * jnp.sin(x)


def rollout(solver, game, start, steps):
    points = [start]
    state = solver.init(game, start)
    step = jax.jit(lambda state: solver.step(game, state))
    for _ in range(steps):
        state = step(state)
        points.append(state.x)
    return jtu.tree_map(lambda *v: jnp.stack(v), *points)


@pytest.mark.parametrize("players", [2, 3, 5])
def test_no_weights_beat_the_closed_form(players):
    rng = np.random.default_rng(players)
    for _ in range(20):
        mu, L = random_bounds(rng, players)
        best = small_gain_weights(mu, L)
        N = np.diag(mu) - L + np.diag(np.diag(L))
        alpha = small_gain_margin(mu, L, best)[0]
        np.testing.assert_allclose(alpha, np.min(np.linalg.eigvals(N).real), atol=1e-8)
        for spread in (1.0, 0.01):
            other = best * np.exp(spread * rng.standard_normal(players))
            assert small_gain_margin(mu, L, other)[0] <= alpha + 1e-12


def test_weights_for_the_longest_step():
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(30):
        mu, L = random_bounds(rng, 3)
        found = [small_gain_weights(mu, L, goal) for goal in ("margin", "stepsize")]
        (a, b), (c, d) = (small_gain_margin(mu, L, w) for w in found)
        if a <= 0:
            continue
        seen += 1
        assert c / d**2 >= a / b**2
        for spread in (0.3, 0.01):
            e, f = small_gain_margin(
                mu, L, found[1] * np.exp(spread * rng.standard_normal(3))
            )
            assert e / f**2 <= c / d**2 * (1 + 1e-7)
    assert seen >= 3


def test_a_player_whom_nobody_influences():
    mu, L = np.ones(3), np.array([[1.0, 9, 9], [0, 1, 9], [0, 0, 1]])
    alpha, _ = small_gain_margin(mu, L, small_gain_weights(mu, L))
    assert 0.9 < alpha <= 1


def test_the_band_is_where_the_margin_is_positive():
    mu, L = np.array([1.5, 0.7]), np.array([[1.5, 8.0], [0.1, 0.7]])
    low, high = small_gain_band(mu, L)

    def margin(r):
        return small_gain_margin(mu, L, np.array([r, 1.0]))[0]

    assert abs(margin(low)) + abs(margin(high)) < 1e-12
    assert margin(low * 0.99) < 0 < margin(low * 1.01)
    assert margin(high * 1.01) < 0 < margin(high * 0.99)
    assert small_gain_band(mu, L * np.array([[1, 2], [1, 1]])) is None
    assert small_gain_band(mu, L * np.array([[1, 0], [1, 1]]))[1] == np.inf


@pytest.fixture(scope="module")
def uneven():
    game = two_players(10.0, 0.05)
    return game, small_gain_certificate(game, LINE)


def test_certified_steps_contract_and_longer_ones_are_caught(uneven):
    game, found = uneven
    assert found.certificate.met and found.certificate.proof
    assert found.unweighted_margin < -4 and found.geometry == "small gain"
    start = (jnp.array([3.0]), jnp.array([-1.0]))
    h = 0.9 * found.euler_stepsize
    path = rollout(GradientDescentAscent(h), game, start, 60)
    seen = found.verify(path, float(h))
    assert seen.met and 0 < seen.value < 1
    # A run that is too slow for its step does not pass.
    slow = rollout(GradientDescentAscent(jnp.asarray(1e-3)), game, start, 10)
    assert not found.verify(slow, float(h)).met
    h = 0.9 * found.rk4_stepsize
    path = rollout(RungeKutta(h), game, start, 60)
    assert found.verify(path, float(h), "rk4").met
    assert found.factor(float(found.rk4_stepsize), "rk4") == pytest.approx(1)
    diverging = rollout(RungeKutta(2 * found.rk4_stepsize), game, start, 60)
    assert not found.verify(diverging, float(h), "rk4").met
    # With the true equilibrium: the envelope.
    x, y = (float(v[0]) for v in solve(game, RungeKutta(1.0), start).x)
    assert (x, y) == (pytest.approx((10 - 1) / 0.5), pytest.approx((0.05 - 1) / 0.5))


def test_the_distance_bounds_the_truth(uneven):
    game, found = uneven
    z = (jnp.array([10.0]), jnp.array([4.0]))
    bound = found.distance(z)
    true = found.norm((z[0] - 18.0, z[1] + 1.9))
    assert bound.proof and bound.met and true <= bound.value <= 20 * true
    box = (jnp.full(1, -5.0),) * 2, (jnp.full(1, 5.0),) * 2
    assert not small_gain_certificate(game, box).distance(ZERO).met  # it is outside


def test_skew_couplings_are_left_to_equal_weights():
    found = small_gain_certificate(two_players(5.0, -5.0), LINE)
    assert found.geometry == "unweighted" and found.band is None
    np.testing.assert_allclose(found.margin, 1.0)
    np.testing.assert_allclose(found.euler_stepsize, 2 / 26)
    weights, gap = (
        np.array([1.0, 1.0]),
        small_gain_margin(found.curvature, found.coupling, np.ones(2)),
    )
    assert gap[0] < 0
    np.testing.assert_allclose(found.weights, weights)


def test_nothing_is_certified_without_curvature():
    found = small_gain_certificate(bilinear_game(jnp.eye(1)), LINE)
    assert not found.certificate.met and found.euler_stepsize == 0
    assert found.rk4_stepsize == 0 and jnp.isinf(found.distance(ZERO).value)


def test_mean_value_bounds_contain_the_truth_and_samples_are_typed_as_estimates():
    game, size = Game(bent, 0.6), 0.4
    box = (jnp.asarray(-size),) * 2, (jnp.asarray(size),) * 2
    # |d cos| <= 1, and own blocks are constant.
    variation = 0.6 * (1 - np.eye(2))
    found = small_gain_certificate(game, box, variation=variation)
    assert found.certificate.proof
    assert np.all(found.coupling >= np.array([[1, 0.6], [0.6, 1]]))
    np.testing.assert_allclose(found.curvature, 1.0)
    promised = small_gain_certificate(
        game, box, bounds=(np.ones(2), np.array([[1, 0.6], [0.6, 1]]))
    )
    assert promised.certificate.proof
    assert found.margin <= promised.margin + 1e-12
    sampled = small_gain_certificate(
        game, box, bounds="sampled", samples=64, key=jax.random.key(0)
    )
    assert not sampled.certificate.proof and sampled.margin >= promised.margin - 1e-12
    assert small_gain_certificate(two_players(1.0, 0.1), LINE).certificate.proof
    # Runge-Kutta's bound for a Jacobian that varies: shorter than the exact one, true.
    h = 0.99 * promised.rk4_stepsize
    assert 0 < h < promised.euler_stepsize
    path = rollout(RungeKutta(h), game, (jnp.asarray(0.3), jnp.asarray(-0.2)), 40)
    assert promised.verify(path, float(h), "rk4").met
    outside = jtu.tree_map(lambda v: v + 1.0, path)
    assert not promised.verify(outside, float(h), "rk4").met


def test_a_metric_changes_norms_not_the_flow():
    P = [jnp.array([[4.0]]), jnp.array([[0.25]])]
    found = small_gain_certificate(two_players(10.0, 0.05), LINE, metrics=P)
    np.testing.assert_allclose(found.coupling, [[1, 40], [0.0125, 1]], rtol=1e-12)
    # The best weights undo a scalar metric.
    np.testing.assert_allclose(found.margin, 1 - 0.5**0.5, rtol=1e-9)
    np.testing.assert_allclose(
        found.norm((jnp.ones(1), jnp.ones(1))) ** 2,
        found.weights @ jnp.array([4, 0.25]),
    )


def test_runge_kutta_is_of_fourth_order():
    game, start = rotation_game(1.0, 1.2), jnp.array([1.0, 0.5])
    angle = np.array([[np.cos(1.2), -np.sin(1.2)], [np.sin(1.2), np.cos(1.2)]])
    values, vectors = np.linalg.eig(-angle)
    exact = (vectors * np.exp(values)) @ np.linalg.solve(vectors, np.asarray(start))
    errors = []
    for steps in (8, 16):
        path = rollout(RungeKutta(1 / steps), game, start, steps)
        errors.append(np.linalg.norm(path[-1] - exact.real))
    assert 3.8 < np.log2(errors[0] / errors[1]) < 4.2


@pytest.mark.parametrize(
    ("region", "settings", "message"),
    [
        (ZERO[0], {}, "must be a pair of corners"),
        ((ZERO[0], ZERO[0]), {}, "tuples with one block"),
        (((jnp.ones(1),) * 2, ZERO), {}, "lower corner below"),
        ((ZERO, (jnp.ones(2),) * 2), {}, "same structure and shapes"),
        (LINE, {"bounds": "exact"}, "`bounds` must be one of"),
        (LINE, {"bounds": (np.ones(3), np.ones((3, 3)))}, "one entry a player"),
        (LINE, {"bounds": (np.ones(2), np.zeros((2, 2)))}, "at least `curvature`"),
        (LINE, {"metrics": [ONE]}, "one matrix a player"),
        (LINE, {"metrics": [ONE, -ONE]}, "positive definite"),
        (LINE, {"objective": "speed"}, "`objective` must be one of"),
    ],
)
def test_bad_input_is_named(region, settings, message):
    with pytest.raises(ValueError, match=message):
        small_gain_certificate(two_players(1.0, 1.0), region, **settings)


def test_a_varying_jacobian_needs_bounds():
    game = Game(bent, 0.5)
    box = (jnp.asarray(-1.0),) * 2, (jnp.asarray(1.0),) * 2
    with pytest.raises(ValueError, match="Jacobian is not constant"):
        small_gain_certificate(game, box)
    with pytest.raises(ValueError, match="finite `region` and a `key`"):
        small_gain_certificate(game, box, bounds="sampled")
    with pytest.raises(TypeError, match="must be a Game"):
        small_gain_certificate(bent, box)
    held = Game(bent, 0.5, project=lambda z, scale: z)
    with pytest.raises(ValueError, match="without `project`"):
        RungeKutta(0.1).init(held, box[0])
    with pytest.raises(ValueError, match="three points or more"):
        found = small_gain_certificate(two_players(1.0, 0.1), LINE)
        found.verify(jtu.tree_map(lambda v: jnp.zeros((2, 1)), ZERO), 0.1)


def test_a_certificate_shows_its_numbers():
    one, zero = jnp.ones((1, 1)), jnp.zeros(1)
    game = quadratic_game([[one, 2 * one], [-one / 8, one]], [zero, zero])
    found = small_gain_certificate(game, ((-one[0],) * 2, (one[0],) * 2))
    text = str(found)
    assert text.startswith("SmallGainCertificate: ")
    assert f"{float(found.margin):.3g}" in text and "proof" in text
