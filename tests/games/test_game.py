"""Games: constructors, the natural map, derivative, certificate, estimators, input."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan import Root, solve, stability
from varan.games import (
    EntropySimplex,
    EuclideanBox,
    Extragradient,
    Game,
    InverseTime,
    PastExtragradient,
    bilinear_game,
    degenerate_minimax,
    estimate_comonotonicity,
    estimate_lipschitz,
    estimate_monotonicity,
    matrix_game,
    quadratic_game,
    quartic_saddle,
    rotation_game,
)
from varan.operators import prox_l1

RNG = np.random.default_rng(0)
A = jnp.asarray(RNG.standard_normal((3, 4)))


def test_a_saddle_function_and_its_players_make_one_operator():
    def f(x, y, A):
        return jnp.sum(jnp.cos(x)) + x @ A @ y - jnp.sum(y**3)

    z = (jnp.arange(3.0), jnp.arange(4.0))
    saddle = Game.from_saddle(f, A)
    players = Game.from_players([lambda z, A: f(*z, A), lambda z, A: -f(*z, A)], A)
    for one, two in zip(saddle.apply(z), players.apply(z), strict=True):
        np.testing.assert_allclose(one, two)
    np.testing.assert_allclose(saddle.apply(z)[0], -jnp.sin(z[0]) + A @ z[1])
    np.testing.assert_allclose(saddle.apply(z)[1], -z[0] @ A + 3 * z[1] ** 2)


def test_components_are_averaged_and_sampled():
    shifts = jnp.asarray(RNG.standard_normal((5, 2)))
    game = Game(
        None, shifts, components=lambda i, z, b: z - b[i], count=5, monotone=True
    )
    z = jnp.ones(2)
    np.testing.assert_allclose(game.apply(z), z - shifts.mean(0))
    draws = jax.vmap(lambda k: game.sample(k, z))(
        jax.random.split(jax.random.key(0), 64)
    )
    known = {tuple(np.round(b, 9)) for b in np.asarray(1 - shifts)}
    assert {tuple(np.round(d, 9)) for d in np.asarray(draws)} == known


def test_noise_is_unbiased_and_of_the_size_asked_for():
    game = rotation_game(1.0, 1.0).with_noise(0.5)
    z = jnp.array([2.0, -1.0])
    keys = jax.random.split(jax.random.key(1), 4000)
    draws = jax.vmap(lambda k: game.sample(k, z))(keys)
    # Four standard errors: a false alarm in 16000.
    assert jnp.all(jnp.abs(draws.mean(0) - game.apply(z)) < 4 * 0.5 / 4000**0.5)
    assert jnp.all(jnp.abs(draws.std(0) - 0.5) < 4 * 0.5 / 8000**0.5)


@pytest.fixture(scope="module")
def boxed():
    """A strongly monotone game whose solution touches its box."""
    box = EuclideanBox(jnp.full(2, -1.0), jnp.full(2, 0.5))
    matrix = jnp.array([[1.0, 2.0], [-2.0, 1.0]])
    return lambda b: Game(
        lambda z, b: matrix @ z - b, b, project=box, monotone=True, lipschitz=3.0
    )


def test_the_derivative_sees_the_active_bound(boxed):
    def answer(b):
        return solve(boxed(b), Extragradient(0.3), jnp.zeros(2), tol=1e-11).x

    b = jnp.array([2.0, 0.3])
    x = answer(b)
    assert x[0] == 0.5  # at its bound: z_1 = b_1 + 2 z_0
    np.testing.assert_allclose(x[1], 0.5, atol=1e-9)
    b = jnp.array([2.0, -0.7])
    np.testing.assert_allclose(answer(b), [0.5, 0.3], atol=1e-9)
    np.testing.assert_allclose(jax.jacobian(answer)(b), [[0, 0], [0, 1]], atol=1e-9)


def test_the_gap_bounds_every_deviation_and_falls_to_zero(boxed):
    game = boxed(jnp.array([2.0, -0.7]))
    rough = solve(game, Extragradient(0.3), jnp.zeros(2), max_steps=3)
    gap = rough.certificate
    assert gap.kind == "gap" and gap.proof
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 0.5, 40)] * 2), -1).reshape(-1, 2)
    forces = jax.vmap(game.apply)(jnp.asarray(grid))
    worst = jnp.max(jnp.sum(forces * (rough.x[None, :] - grid), axis=1))
    assert 0 < worst <= gap.value
    fine = solve(game, Extragradient(0.3), jnp.zeros(2), tol=1e-10)
    assert abs(fine.certificate.value) < 1e-9


def test_a_matrix_games_certificate_is_its_duality_gap():
    game = matrix_game(A)
    start = (jnp.full(3, 1 / 3), jnp.full(4, 1 / 4))
    solution = solve(game, Extragradient(0.2), start, max_steps=7)
    x, y = solution.x
    gap = jnp.max(x @ A) - jnp.min(A @ y)
    np.testing.assert_allclose(solution.certificate.value, gap, atol=1e-12)
    value = solve(game, Extragradient(0.2), start, tol=1e-9, max_steps=20_000)
    assert value.certificate.value < 1e-7


def test_a_resolvent_is_more_than_a_set():
    # min_x max_y |x|_1 + (x - y)^2 / 2 ... solved by soft thresholding.
    game = Game(
        lambda z, c: z - c,
        jnp.array([3.0, 0.2]),
        resolvent=lambda z, stepsize, c: prox_l1(z, 1.0, stepsize),
    )
    x = solve(game, Extragradient(0.5), jnp.ones(2), tol=1e-10).x
    np.testing.assert_allclose(x, [2.0, 0.0], atol=1e-9)


def test_stability_is_that_of_the_inverse_operator():
    found = stability(
        solve(rotation_game(2.0, 1.2), Extragradient(0.4), jnp.ones(2), tol=1e-10)
    )
    np.testing.assert_allclose(found.regularity, 2.0, atol=1e-9)


def test_other_problems_are_taken_by_their_condition():
    problem = Root(
        lambda x, b: jnp.array([[0.1, 1.0], [-1.0, 0.1]]) @ x - b, jnp.ones(2)
    )
    solution = solve(problem, PastExtragradient(0.3), jnp.zeros(2), tol=1e-9)
    assert solution.converged


def test_estimates_are_exact_for_linear_operators():
    M = RNG.standard_normal((5, 5))
    game = Game(lambda z, M: M @ z, jnp.asarray(M))
    point = jnp.ones((1, 5))
    L = estimate_lipschitz(game, point).value
    mu = estimate_monotonicity(game, point).value
    rho = estimate_comonotonicity(game, point).value
    np.testing.assert_allclose(L, np.linalg.norm(M, 2), rtol=1e-9)
    np.testing.assert_allclose(mu, np.linalg.eigvalsh((M + M.T) / 2)[0], rtol=1e-9)
    inverse = np.linalg.inv(M)
    np.testing.assert_allclose(
        rho, -np.linalg.eigvalsh((inverse + inverse.T) / 2)[0], rtol=1e-9
    )


def test_comonotonicity_of_singular_operators():
    def rho(M):
        game = Game(lambda z: jnp.asarray(M) @ z)
        return float(estimate_comonotonicity(game, jnp.ones((2, 2))).value)

    # The null space is orthogonal to the range: 1-cocoercive along it.
    np.testing.assert_allclose(rho(np.diag([1.0, 0.0])), -1.0, atol=1e-12)
    assert rho(np.array([[1.0, 1.0], [0.0, 0.0]])) == np.inf


def test_a_path_shows_less_than_the_region():
    game = quartic_saddle(jax.random.key(0), 3, (1.0, 0.0))
    game = eqx.tree_at(lambda g: g.params[-1], game, jnp.array([0.0, 1.0]))
    near, far = (
        tuple(scale * jnp.asarray(RNG.standard_normal((6, 3))) for _ in range(2))
        for scale in (0.01, 3.0)
    )
    assert estimate_lipschitz(game, near).value < estimate_lipschitz(game, far).value
    # Not monotone far from the solution, and with curvature at it.
    game = eqx.tree_at(lambda g: g.params[-1], game, jnp.array([1.0, -1.0]))
    assert estimate_monotonicity(game, far).value < 0
    assert estimate_monotonicity(game, near).value > 0.4


def test_a_bilinear_game_is_solved_where_it_says():
    b, c = jnp.arange(3.0), jnp.arange(1.0, 4.0)
    square = A[:, :3]
    game = bilinear_game(square, b, c)
    y = -jnp.linalg.solve(square, b)
    x = jnp.linalg.solve(square.T, c)
    assert game.residual(game.condition((x, y))) < 1e-12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Game(3.0), "`operator` must be callable"),
        (lambda: Game(None), "`operator` must be callable"),
        (lambda: Game(lambda z: z, count=3), "`components` and `count`"),
        (
            lambda: Game(None, components=lambda i, z: z, count=0),
            "`count` must be a positive integer",
        ),
        (
            lambda: Game(lambda z: z, project=jnp.abs, resolvent=jnp.abs),
            "must not both be given",
        ),
        (lambda: Game(lambda z: z, project=EntropySimplex(3)), "Euclidean geometry"),
        (lambda: Game(lambda z: z, lipschitz=-1.0), "`lipschitz` must be positive"),
        (lambda: Game(lambda z: z).with_noise(-1.0), "`deviation` must not be"),
        (lambda: Game(lambda z: z).component(0, 1.0), "needs a finite sum"),
        (
            lambda: solve(
                Game(lambda z: z),
                Extragradient(0.5, key=jax.random.key(0)),
                jnp.ones(2),
                max_steps=1,
            ),
            "no noisy oracle",
        ),
        (
            lambda: Game.from_players([lambda z: z[0]]).apply((1.0, 2.0)),
            "one block a player",
        ),
        (lambda: quadratic_game([[A]], []), "square table"),
        (lambda: degenerate_minimax(0.0), "`coupling` must not be zero"),
        (lambda: rotation_game(0.0), "`lipschitz` must be positive"),
        (lambda: InverseTime(0.0), "`scale` must be positive"),
        (lambda: InverseTime(1.0, -1.0), "`offset` must not be negative"),
        (
            lambda: estimate_lipschitz(rotation_game(), jnp.zeros((0, 2))),
            "one point at least",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize(
    ("name", "game"),
    [
        ("operator", Game(lambda z: jnp.sum(z))),
        ("operator", Game(lambda z: z[None])),
        ("project", Game(lambda z: z, project=lambda z: z[:1])),
        ("resolvent", Game(lambda z: z, resolvent=lambda z, a: (z, z))),
    ],
)
def test_what_does_not_return_an_iterate_is_named(name, game):
    with pytest.raises(ValueError, match=f"`{name}` must return the structure"):
        solve(game, Extragradient(0.1), jnp.ones(3))


def test_players_pairs_and_matrices_are_checked():
    with pytest.raises(ValueError, match="got none"):
        Game.from_players([])
    with pytest.raises(ValueError, match="got one function"):
        Game.from_players(lambda z: z)
    game = Game.from_saddle(lambda x, y: x @ y)
    for start in (jnp.ones(4), (jnp.ones(2),) * 3):
        with pytest.raises(ValueError, match="`z` must be a pair"):
            game.apply(start)
    for make in (bilinear_game, matrix_game):
        for bad, message in (
            (jnp.ones(3), "shape"),
            (jnp.zeros((0, 2)), "must not be empty"),
            (jnp.full((2, 2), jnp.nan), "must be finite"),
        ):
            with pytest.raises(ValueError, match=message):
                make(bad)
    assert bilinear_game(jnp.ones((2, 2), jnp.int32)).params[0].dtype == float


def test_constants_of_an_operator_with_nan_are_nan():
    points = jnp.arange(6.0).reshape(3, 2)
    broken = Game(lambda z, scale: scale * z, jnp.nan)
    for estimate in (
        estimate_lipschitz,
        estimate_monotonicity,
        estimate_comonotonicity,
    ):
        assert bool(jnp.isnan(estimate(broken, points).value))
        with pytest.raises(ValueError, match="`points` must be finite"):
            estimate(broken, jnp.nan * points)
