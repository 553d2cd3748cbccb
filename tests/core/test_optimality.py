"""Conditions: each is zero at the solution, and all give the solution's derivative."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan import FixedPoint, FixedPointIteration, Root, solve
from varan.core import custom_root, optimality, root_jvp, root_vjp
from varan.operators import project_box, project_nonnegative, project_simplex, prox_l1
from varan.testing import assert_close, difference

SIZE = 5
RANDOM = np.random.default_rng(0)
FACTOR = RANDOM.standard_normal((SIZE, SIZE))
Q = jnp.asarray(FACTOR @ FACTOR.T / SIZE + 0.5 * np.eye(SIZE))
LINEAR = jnp.asarray([1.0, -2.0, 0.3, 0.8, -0.4])
DIRECTION = jnp.asarray(RANDOM.standard_normal(SIZE))
STEPSIZE = float(1 / np.linalg.norm(np.asarray(Q), 2))


def quadratic(x, q):
    return x @ Q @ x / 2 + q @ x


def soft(v, stepsize, q):
    return prox_l1(v, 0.4, stepsize)


def box(v, q):
    return project_box(v, -0.5, 0.5)


def box_sides(x, q):
    return {"lower": -0.5 - x, "upper": x - 0.5}


def simplex(v, q):
    return project_simplex(v)


def log(x):
    return jnp.log(jnp.maximum(x, 1e-300))


def softmax(v, q):
    return jax.nn.softmax(v)


CONDITIONS = {
    "stationary": lambda s: optimality.stationary(quadratic),
    "newton": lambda s: optimality.newton(optimality.stationary(quadratic), s),
    "lasso": lambda s: optimality.prox_grad(quadratic, soft, s),
    "box": lambda s: optimality.proj_grad(quadratic, box, s),
    "simplex": lambda s: optimality.proj_grad(quadratic, simplex, s),
    "mirror": lambda s: optimality.mirror(quadratic, softmax, log, s),
}
# Which conditions iterate to the solution, for those that do not.
ITERATED = {"stationary": None, "newton": None, "mirror": "simplex"}


@jax.jit
def smooth_solution(q):
    return jnp.linalg.solve(Q, -q)


def solution(name, q):
    name = ITERATED.get(name, name)
    if name is None:
        return smooth_solution(q)
    return iterate(name, q)


@functools.partial(jax.jit, static_argnums=0)
def iterate(name, q):
    step = CONDITIONS[name](STEPSIZE).map
    return jax.lax.fori_loop(0, 600, lambda _, x: step(x, q), jnp.ones(SIZE) / SIZE)


@pytest.mark.parametrize("name", CONDITIONS)
def test_zero_at_the_solution_and_nowhere_near(name):
    condition, x = CONDITIONS[name](STEPSIZE), solution(name, LINEAR)
    assert jnp.linalg.norm(condition(x, LINEAR)) < 1e-13
    moved = x + 1e-3 * jnp.asarray([1.0, -1.0, 0.5, 0.0, -0.5])
    assert jnp.linalg.norm(condition(moved, LINEAR)) > 1e-5


@pytest.mark.parametrize("name", CONDITIONS)
def test_derivative_matches_differences_for_any_stepsize(name):
    x = solution(name, LINEAR)
    wanted = difference(lambda q: solution(name, q), LINEAR, DIRECTION, 1e-4)

    @jax.jit
    def derivative(stepsize):
        condition = CONDITIONS[name](stepsize)
        return root_jvp(condition, x, (LINEAR,), (DIRECTION,))

    for stepsize in (0.02, STEPSIZE, 1.7):
        assert_close(derivative(stepsize), wanted, 1e-8)


@pytest.mark.parametrize("name", ["lasso", "mirror"])
def test_fixed_point_and_root_forms_agree(name):
    condition, x = CONDITIONS[name](STEPSIZE), solution(name, LINEAR)
    for problem in (FixedPoint(condition.map, LINEAR), Root(condition, LINEAR)):
        assert_close(problem.condition(x), jnp.zeros(SIZE), 1e-13)

    def fixed_point(q):
        problem = FixedPoint(condition.map, q)
        return solve(problem, FixedPointIteration(), x, tol=1e-10).x

    got = jax.jit(lambda q: jax.jvp(fixed_point, (q,), (DIRECTION,))[1])(LINEAR)
    assert_close(got, root_jvp(condition, x, (LINEAR,), (DIRECTION,)), 1e-9)


@pytest.mark.parametrize("name", CONDITIONS)
def test_forward_and_reverse_are_adjoint(name):
    condition, x = CONDITIONS[name](STEPSIZE), solution(name, LINEAR)
    cotangent = jnp.arange(1.0, SIZE + 1)

    @jax.jit
    def both(q):
        (pulled,) = root_vjp(condition, x, (q,), cotangent)
        return root_jvp(condition, x, (q,), (DIRECTION,)), pulled

    tangent, pulled = both(LINEAR)
    assert_close(tangent @ cotangent, DIRECTION @ pulled, 1e-11)


def test_derivative_of_closed_forms():
    assert_close(
        jax.jit(jax.jacobian(lambda q: root_of("stationary", q)))(LINEAR),
        -jnp.linalg.inv(Q),
        1e-10,
    )
    # On the box: zero in the active entries, minus the free block's inverse elsewhere.
    x = solution("box", LINEAR)
    free = np.flatnonzero(np.abs(np.asarray(x)) < 0.5)
    assert 0 < len(free) < SIZE
    wanted = np.zeros((SIZE, SIZE))
    wanted[np.ix_(free, free)] = -np.linalg.inv(np.asarray(Q)[np.ix_(free, free)])
    got = jax.jit(jax.jacobian(lambda q: root_of("box", q)))(LINEAR)
    assert_close(got, wanted, 1e-10)


def tangent_of(condition, x, params, tangents, **settings):
    """`root_jvp`, compiled whole: far quicker than operation by operation."""
    return jax.jit(lambda p, t: root_jvp(condition, x, p, t, **settings))(
        params, tangents
    )


def root_of(name, q):
    solver = custom_root(CONDITIONS[name](STEPSIZE))(lambda _, q: solution(name, q))
    return solver(None, q)


def cubic(x, c):
    return jnp.sum(x**4) / 4 + jnp.sum(x**2) / 2 - c @ x


def test_second_derivative_by_nesting():
    # x^3 + x = c: x' = 1/(3x^2 + 1), x'' = -6x x'^3.
    x = jnp.asarray([0.7, -1.2])
    c = x**3 + x
    for condition in (
        optimality.stationary(cubic),
        optimality.prox_grad(cubic, lambda v, s, c: v, 0.3),
        optimality.newton(optimality.stationary(cubic)),
    ):
        solver = custom_root(condition)(lambda _, c: x)
        got = jax.jit(jax.hessian(lambda c, s=solver: jnp.sum(s(None, c))))(c)
        assert_close(got, jnp.diag(-6 * x / (3 * x**2 + 1) ** 3), 1e-10)


# ------------------------------------------------------------------------- kkt


def test_kkt_of_an_equality_constrained_quadratic_program_in_closed_form():
    A = jnp.asarray(RANDOM.standard_normal((2, SIZE)))
    b = jnp.asarray([0.3, -1.0])

    def objective(x, q, b):
        return quadratic(x, q)

    condition = optimality.kkt(objective, equality=lambda x, q, b: A @ x - b)
    matrix = jnp.block([[Q, A.T], [A, jnp.zeros((2, 2))]])
    answer = jnp.linalg.solve(matrix, jnp.concatenate([-LINEAR, b]))
    point = optimality.KKTPoint(answer[:SIZE], equality=answer[SIZE:])
    residual = condition(point, LINEAR, b)
    assert_close(residual, jnp.zeros(SIZE + 2), 1e-12)
    assert residual.inequality is None
    tangents = (DIRECTION, jnp.asarray([1.0, 2.0]))
    got = tangent_of(condition, point, (LINEAR, b), tangents)
    right = jnp.concatenate([-tangents[0], tangents[1]])
    assert_close(got, jnp.linalg.solve(matrix, right), 1e-10)


def box_point(q):
    x = solution("box", q)
    slope = Q @ x + q
    sides = {"lower": jax.nn.relu(slope), "upper": jax.nn.relu(-slope)}
    return optimality.KKTPoint(x, inequality=sides)


def test_kkt_and_projected_gradient_agree_on_the_box():
    condition = optimality.kkt(quadratic, inequality=box_sides)
    point = box_point(LINEAR)
    assert_close(condition(point, LINEAR), jnp.zeros(3 * SIZE), 1e-12)
    got = tangent_of(condition, point, (LINEAR,), (DIRECTION,))
    assert_close(
        got.x,
        tangent_of(CONDITIONS["box"](1.0), point.x, (LINEAR,), (DIRECTION,)),
        1e-10,
    )
    wanted = difference(lambda q: box_point(q), LINEAR, DIRECTION, 1e-4)
    assert_close(got, wanted, 1e-8)


def test_kkt_agrees_with_proximal_gradient_on_the_lasso():
    def split(parts, q):
        return quadratic(parts[0] - parts[1], q) + 0.4 * jnp.sum(parts[0] + parts[1])

    def signs(parts, q):
        return (-parts[0], -parts[1])

    x = solution("lasso", LINEAR)
    assert 0 < jnp.count_nonzero(x) < SIZE
    parts = (jax.nn.relu(x), jax.nn.relu(-x))
    multipliers = tuple(jax.nn.relu(g) for g in jax.grad(split)(parts, LINEAR))
    point = optimality.KKTPoint(parts, inequality=multipliers)
    condition = optimality.kkt(split, inequality=signs)
    assert_close(condition(point, LINEAR), jnp.zeros(4 * SIZE), 1e-12)
    got = tangent_of(condition, point, (LINEAR,), (DIRECTION,)).x
    wanted = tangent_of(CONDITIONS["lasso"](1.0), x, (LINEAR,), (DIRECTION,))
    assert_close(got[0] - got[1], wanted, 1e-10)


def test_kkt_rejects_points_that_complementary_products_accept():
    # min (x - 2)^2 with x <= 1: x = 2 with multiplier 0 and x = 1 with the multiplier's
    # sign reversed both make multiplier * g vanish.
    condition = optimality.kkt(
        lambda x, c: (x - c) ** 2, inequality=lambda x, c: x - 1.0
    )
    for x, multiplier, size in ((2.0, 0.0, 1.0), (1.0, 2.0, 0.0)):
        point = optimality.KKTPoint(jnp.asarray(x), None, jnp.asarray(multiplier))
        assert_close(condition(point, 2.0).inequality, -size, 1e-12)
    flipped = optimality.KKTPoint(jnp.asarray(1.0), None, jnp.asarray(-2.0))
    assert condition(flipped, 0.0).inequality == -2.0


def test_kkt_refuses_multipliers_of_another_shape():
    condition = optimality.kkt(quadratic, inequality=box_sides)
    for bad in (None, jnp.zeros(SIZE), {"lower": jnp.zeros(2), "upper": jnp.zeros(2)}):
        with pytest.raises(ValueError, match="kkt: the multipliers `inequality` must"):
            condition(optimality.KKTPoint(LINEAR, inequality=bad), LINEAR)


# ---------------------------------------------------------------- block, conic


class Blocks(NamedTuple):
    left: jax.Array
    right: jax.Array


def test_blocks_share_the_solution_and_derivative_of_the_whole():
    x = solution("box", LINEAR)
    whole = tangent_of(CONDITIONS["box"](1.0), x, (LINEAR,), (DIRECTION,))

    def objective(x, q):
        return quadratic(jnp.concatenate([x[0], x[1]]), q)

    proxes = [lambda v, stepsize, q: box(v, q)] * 2
    condition = optimality.block(objective, proxes, (0.1, 0.7))
    blocks = (x[:2], x[2:])
    assert_close(condition(blocks, LINEAR), jnp.zeros(SIZE), 1e-12)
    got = tangent_of(condition, blocks, (LINEAR,), (DIRECTION,))
    assert_close(got, whole, 1e-9)
    assert isinstance(condition.map(list(blocks), LINEAR), list)


def test_block_counts_are_checked():
    prox = lambda v, stepsize, q: v  # noqa: E731
    with pytest.raises(ValueError, match="block: the number of stepsizes must be"):
        optimality.block(quadratic, [prox], (0.1, 0.2))
    with pytest.raises(ValueError, match="block: the number of blocks of x must be"):
        optimality.block(quadratic, [prox])((LINEAR, LINEAR), LINEAR)


def second_order_cone(v):
    t, norm = v[0], jnp.linalg.norm(v[1:])
    mixed = (1 + t / norm) / 2 * jnp.concatenate([norm[None], v[1:]])
    return jnp.where(norm <= t, v, jnp.where(norm <= -t, jnp.zeros_like(v), mixed))


def test_conic_linear_program_against_its_vertex():
    # max x1 + x2 on {x1 <= b1, x1 + 2 x2 <= b2, -x2 <= b3}: the first two's vertex.
    A = jnp.asarray([[1.0, 0.0], [1.0, 2.0], [0.0, -1.0]])
    b, c = jnp.asarray([1.0, 3.0, 0.0]), jnp.asarray([-1.0, -1.0])
    x = jnp.linalg.solve(A[:2], b[:2])
    y = jnp.concatenate([jnp.linalg.solve(A[:2].T, -c), jnp.zeros(1)])
    point = (x, y - (b - A @ x))
    condition = optimality.conic(project_nonnegative)
    assert_close(condition(point, A, b, c), jnp.zeros(5), 1e-12)
    move = (jnp.zeros_like(A), jnp.asarray([1.0, -0.5, 2.0]), jnp.zeros(2))
    got, _ = tangent_of(condition, point, (A, b, c), move)
    assert_close(got, jnp.linalg.solve(A[:2], move[1][:2]), 1e-10)


def test_conic_second_order_cone_against_the_closed_form():
    # min c'x with |x| <= r: x = -r c/|c|.
    c, r = jnp.asarray([1.0, -2.0, 0.5]), 1.5
    A, b = -jnp.eye(4, 3, -1), jnp.asarray([r, 0.0, 0.0, 0.0])
    size = jnp.linalg.norm(c)
    x = -r * c / size
    y = jnp.concatenate([size[None], c])
    condition = optimality.conic(second_order_cone)
    point = (x, y - (b - A @ x))
    assert_close(condition(point, A, b, c), jnp.zeros(7), 1e-12)
    move = (jnp.zeros_like(A), jnp.zeros(4), jnp.asarray([0.3, 0.1, -1.0]))
    got, _ = tangent_of(condition, point, (A, b, c), move)
    wanted = jax.jvp(lambda c: -r * c / jnp.linalg.norm(c), (c,), (move[2],))[1]
    assert_close(got, wanted, 1e-10)


# -------------------------------------------------------- singular and inexact


def test_ridge_makes_a_singular_system_answer():
    # x1 + x2 = c leaves x1 - x2 free. With weight w: J + wI = 11' + wI.
    def condition(x, c):
        return jnp.full(2, jnp.sum(x) - c)

    x = jnp.asarray([0.2, 0.8])
    with pytest.raises(AssertionError):
        assert_close(tangent_of(condition, x, (1.0,), (1.0,)), jnp.full(2, 0.5), 1e-6)
    weight = 1e-3
    regular = optimality.ridge(condition, weight)
    assert_close(regular(x, 0.3), condition(x, 0.3), 1e-15)
    got = tangent_of(regular, x, (1.0,), (1.0,))
    assert_close(got, jnp.full(2, 1 / (2 + weight)), 1e-10)
    exact = tangent_of(condition, x, (1.0,), (1.0,), unique=False)
    assert_close(exact, jnp.full(2, 0.5), 1e-10)
    krylov = lx.CG(rtol=1e-12, atol=1e-12)
    tags = frozenset({"positive_semidefinite"})
    got = tangent_of(regular, x, (1.0,), (1.0,), tags=tags, linear_solver=krylov)
    assert_close(got, jnp.full(2, 1 / (2 + weight)), 1e-8)


@jax.jit
def cubic_errors(c, error):
    """Jacobian error of x^3 + x = c at an inexact x, and theorem 1's bound."""
    x = jax.lax.fori_loop(0, 60, lambda _, x: x - (x**3 + x - c) / (3 * x**2 + 1), c)
    near = x + error

    def jacobian(x):
        return root_jvp(lambda x, c: x**3 + x - c, x, (c,), (jnp.ones(()),))

    largest = jnp.maximum(jnp.abs(x), jnp.abs(near))
    bound = optimality.jacobian_error(
        jnp.abs(error), alpha=1.0, beta=0.0, gamma=6 * largest, cross_norm=1.0
    )
    return jnp.abs(jacobian(near) - jacobian(x)), bound.value


@given(
    st.floats(-3.0, 3.0, allow_nan=False), st.floats(-0.5, 0.5, allow_subnormal=False)
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_jacobian_error_is_never_below_the_truth(c, error):
    truth, bound = cubic_errors(c, error)
    # Rounding of the Newton solve stands beside an error of zero.
    assert truth <= bound + 1e-13


def test_jacobian_error_refuses_what_is_no_bound():
    with pytest.raises(ValueError, match="jacobian_error: `alpha` must be positive"):
        optimality.jacobian_error(0.1, alpha=0.0, beta=1.0)
    with pytest.raises(ValueError, match="`beta` must be nonnegative"):
        optimality.jacobian_error(0.1, alpha=1.0, beta=-1.0)
    with pytest.raises(ValueError, match="`cross_norm` must bound"):
        optimality.jacobian_error(0.1, alpha=1.0, beta=1.0, gamma=1.0)


@pytest.mark.parametrize(
    "build",
    [
        lambda s: optimality.prox_grad(quadratic, soft, s),
        lambda s: optimality.proj_grad(quadratic, box, s),
        lambda s: optimality.mirror(quadratic, softmax, log, s),
        lambda s: optimality.block(quadratic, [soft], [s]),
        lambda s: optimality.newton(optimality.stationary(quadratic), s),
        lambda s: optimality.ridge(optimality.stationary(quadratic), s),
    ],
)
@pytest.mark.parametrize("stepsize", [0.0, -1.0, float("nan")])
def test_settings_must_be_positive(build, stepsize):
    with pytest.raises(ValueError, match="must be positive"):
        build(stepsize)


def test_functions_must_be_callable():
    with pytest.raises(TypeError, match="kkt: `objective` must be callable"):
        optimality.kkt(3.0)


@pytest.mark.parametrize("name", CONDITIONS)
def test_dtype_follows_the_input(name):
    x, q = jnp.ones(SIZE, jnp.float32) / SIZE, LINEAR.astype(jnp.float32)

    def single(x, q):
        return jnp.vdot(x, x) / 2 + q @ x

    build = {
        "stationary": lambda: optimality.stationary(single),
        "newton": lambda: optimality.newton(optimality.stationary(single)),
        "lasso": lambda: optimality.prox_grad(single, soft, 0.1),
        "box": lambda: optimality.proj_grad(single, box, 0.1),
        "simplex": lambda: optimality.proj_grad(single, simplex, 0.1),
        "mirror": lambda: optimality.mirror(single, softmax, jnp.log, 0.1),
    }[name]
    assert jax.eval_shape(build(), x, q).dtype == jnp.float32
