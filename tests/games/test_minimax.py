"""Local minimax points: classification, predicted and true stability, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.games import (
    Extragradient,
    Game,
    GradientDescentAscent,
    classify_minimax,
    degenerate_minimax,
    rotation_game,
    stability_radius,
)

ZERO = (jnp.zeros(()), jnp.zeros(()))


def blocks(x, y, A, B, C):
    return x @ A @ x / 2 + y @ B @ y / 2 + x @ C @ y


def quadratic(A, B, C):
    return Game.from_saddle(blocks, *(jnp.asarray(v) for v in (A, B, C)))


def kind(A, B, C):
    A, B, C = (np.atleast_2d(np.asarray(v, float)) for v in (A, B, C))
    zero = (jnp.zeros(len(A)), jnp.zeros(len(B)))
    return classify_minimax(quadratic(A, B, C), zero)


def test_the_three_kinds():
    assert kind(1.0, -1.0, 0.0).kind == "strict local minimax"
    # Concave in x, but answering it costs more: S = -1 + 4.
    point = kind(-1.0, -1.0, 2.0)
    assert point.kind == "strict local minimax"
    np.testing.assert_allclose(point.schur, [3.0])
    assert kind(-5.0, -1.0, 2.0).kind == "not minimax"
    assert kind(1.0, 0.5, 2.0).kind == "not minimax"
    point = kind(-5.0, 0.0, 2.0)
    assert point.kind == "necessary condition holds"
    np.testing.assert_allclose(point.hemicurvature, [-2.5])
    np.testing.assert_allclose(point.coupling, [2.0])
    assert point.certificate.met and not point.certificate.proof
    # Degenerate B that the coupling does not reach: U is everything.
    assert kind(-5.0, 0.0, 0.0).kind == "not minimax"


def test_only_the_uncoupled_directions_are_restricted():
    # y_1 answers x_1 without bound, nobody answers x_2: its curvature decides.
    C = np.array([[1.0, 0.0], [0.0, 0.0]])
    B = np.diag([0.0, -1.0])
    assert kind(np.diag([-3.0, 0.1]), B, C).kind == "necessary condition holds"
    assert kind(np.diag([-3.0, -0.1]), B, C).kind == "not minimax"


def test_equal_singular_values_split_along_the_schur_complement():
    S = np.array([[1.0, 2.0], [2.0, -1.0]])
    point = kind(S, np.zeros((2, 2)), np.eye(2))
    np.testing.assert_allclose(
        np.sort(point.hemicurvature), [-(5**0.5) / 2, 5**0.5 / 2]
    )
    game, zero = quadratic(S, np.zeros((2, 2)), np.eye(2)), (jnp.zeros(2), jnp.zeros(2))
    for step, stable in ((2.1, False), (2.4, True)):
        # The radius' expansion only asks for eta s / sqrt(tau) to be small.
        assert point.stable(step)[0] == stable
        assert (stability_radius(game, zero, step, 1e5) < 1) == stable


@pytest.mark.parametrize("step", [0.05, 0.15, 0.3])
def test_the_hemicurvature_sets_the_least_step(step):
    point = classify_minimax(degenerate_minimax(), ZERO)
    predicted, margin = point.stable(step)
    assert predicted == (step > 0.1)
    np.testing.assert_allclose(margin, abs(-0.1 + step))
    # 1 - (2 iota eta + eta^2 s^2) / (2 tau) to leading order.
    radius = stability_radius(degenerate_minimax(), ZERO, step, 1e4)
    expected = 1 - step * (-0.1 + step) / 2e4
    np.testing.assert_allclose(radius, expected, atol=1e-8)
    assert not point.stable(step, "descent_ascent")[0]
    assert stability_radius(degenerate_minimax(), ZERO, step, 1e4, "descent_ascent") > 1


@pytest.mark.parametrize(
    ("method", "solver"),
    [
        ("extragradient", Extragradient(0.3, timescale=7.0)),
        ("descent_ascent", GradientDescentAscent(0.3, 7.0)),
    ],
)
def test_the_radius_is_that_of_the_solvers_own_step(method, solver):
    rng = np.random.default_rng(0)
    A, B, C = rng.standard_normal((3, 3, 3))
    game = quadratic(A + A.T, B + B.T, C)

    def step(v):
        state = solver.init(game, (v[:3], v[3:]))
        return jnp.concatenate(solver.step(game, state).x)

    values = np.linalg.eigvals(jax.jacobian(step)(jnp.zeros(6)))
    zero = (jnp.zeros(3), jnp.zeros(3))
    radius = stability_radius(game, zero, 0.3, 7.0, method)
    np.testing.assert_allclose(radius, np.abs(values).max(), rtol=1e-10)


def test_predictions_hold_on_random_degenerate_quadratics():
    rng = np.random.default_rng(1)
    outcomes = set()
    zero = (jnp.zeros(2), jnp.zeros(2))
    for _ in range(30):
        A, C = rng.standard_normal((2, 2, 2))
        A, B = A + A.T, np.diag([0.0, -1.0])
        point = classify_minimax(quadratic(A, B, C), zero)
        step = 0.5 / np.linalg.norm(np.block([[A, C], [-C.T, -B]]), 2)
        for method in ("extragradient", "descent_ascent"):
            predicted, margin = point.stable(step, method)
            if margin > 1e-2:
                radius = stability_radius(quadratic(A, B, C), zero, step, 1e5, method)
                assert (radius < 1) == predicted
                outcomes.add((method, predicted))
    assert len(outcomes) == 4


def kinked(x, y):
    return jnp.sqrt(jnp.abs(x)) * x + y * x


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: classify_minimax(rotation_game(), jnp.zeros(2)),
            r"`z` must be a pair \(x, y\)",
        ),
        (
            lambda: classify_minimax(
                Game.from_players([lambda z: z[0] * z[1], lambda z: z[0] * z[1]]), ZERO
            ),
            "must be a saddle problem",
        ),
        (
            lambda: classify_minimax(Game.from_saddle(kinked), ZERO),
            "second derivatives at z` must be finite",
        ),
        (
            lambda: classify_minimax(degenerate_minimax(), ZERO, cutoff=-1.0),
            "`cutoff` must be positive",
        ),
        (
            lambda: stability_radius(degenerate_minimax(), ZERO, 0.3, 0.5),
            "`timescale` must be at least 1",
        ),
        (
            lambda: stability_radius(degenerate_minimax(), ZERO, 0.0),
            "`stepsize` must be positive",
        ),
        (
            lambda: stability_radius(degenerate_minimax(), ZERO, 0.3, 1.0, "newton"),
            "`method` must be one of",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
