"""`solve`: closed forms, and the traps that a solve-and-differentiate loop can hide."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan import (
    FixedPoint,
    FixedPointIteration,
    GradientDescent,
    Problem,
    Root,
    Smooth,
    Solver,
    State,
    Status,
    solve,
)
from varan.testing import assert_close, difference

TIGHT = 1e-11  # differences divide the solve's error by 1e-3: derivatives to 1e-8


def quadratic(x, matrix, vector):
    return 0.5 * x @ matrix @ x - vector @ x


def ridge_loss(w, X, y, lam):
    return 0.5 * jnp.sum((X @ w - y) ** 2) + 0.5 * lam * w @ w


def logistic_loss(w, X, y, lam):
    return jnp.mean(jax.nn.softplus(-y * (X @ w))) + 0.5 * lam * w @ w


class QuadraticProgram(Problem):
    """min 0.5 x'Qx - c'x subject to Ax = b, through its KKT map in (x, multiplier)."""

    Q: jax.Array
    c: jax.Array
    A: jax.Array
    b: jax.Array

    def condition(self, z):
        x, multiplier = z
        return self.Q @ x - self.c + self.A.T @ multiplier, self.A @ x - self.b

    @property
    def jacobian_tags(self):
        return frozenset({"symmetric"})


class Linearised(Solver):
    """Solves the dense linearised condition: exact in one step on affine maps."""

    def init(self, problem, start):
        return State(start, problem.condition(start))

    def step(self, problem, state):
        flat, unravel = jax.flatten_util.ravel_pytree(state.x)

        def condition(v):
            return jax.flatten_util.ravel_pytree(problem.condition(unravel(v)))[0]

        move = jnp.linalg.solve(jax.jacfwd(condition)(flat), condition(flat))
        x = unravel(flat - move)
        return State(x, problem.condition(x), evaluations=2)


def data(seed=0, rows=8, columns=3):
    rng = np.random.default_rng(seed)
    X = jnp.asarray(rng.standard_normal((rows, columns)))
    y = jnp.asarray(np.sign(rng.standard_normal(rows)))
    return X, y


def ridge_closed_form(X, y, lam):
    return jnp.linalg.solve(X.T @ X + lam * jnp.eye(X.shape[1]), X.T @ y)


def assert_derivatives(answer, params):
    """Every array leaf: differences, forward against reverse; second order too."""
    size = sum(np.size(leaf) for leaf in jax.tree_util.tree_leaves(answer(*params)))
    weight = jnp.cos(jnp.arange(size, dtype=float))
    every = tuple(range(len(params)))

    def scalar(*params):
        return weight @ jnp.ravel(answer(*params))

    @jax.jit
    def values(params):
        return answer(*params), jax.grad(scalar, every)(*params)

    @jax.jit
    def tangents(params, direction):
        return jax.jvp(lambda p: (answer(*p), jax.grad(scalar, every)(*p)),
                       (params,), (direction,))[1]  # fmt: skip

    pulled = values(params)[1]
    for number, leaf in enumerate(params):
        direction = [jnp.zeros_like(p) for p in params]
        rng = np.random.default_rng(number)
        direction[number] = jnp.asarray(rng.standard_normal(leaf.shape))
        direction = tuple(direction)
        first, second = tangents(params, direction)
        assert_close((first, second), difference(values, params, direction), 1e-6)
        forward = weight @ jnp.ravel(first)
        assert_close(forward, jnp.vdot(pulled[number], direction[number]), 1e-8)


# ------------------------------------------------------------------ closed forms


def test_ridge_matches_closed_form_and_its_derivatives():
    X, y = data()
    params = (X, y, jnp.asarray(0.7))

    def answer(*params):
        problem = Smooth(ridge_loss, *params, convex=True)
        return solve(problem, Linearised(), jnp.zeros(3), tol=TIGHT).x

    assert_close(answer(*params), ridge_closed_form(*params), 1e-10)
    every = (0, 1, 2)
    exact = jax.jit(jax.jacobian(ridge_closed_form, every))(*params)
    assert_close(jax.jit(jax.jacrev(answer, every))(*params), exact, 1e-9)
    assert_derivatives(answer, params)


def test_logistic_regression_derivatives():
    X, y = data(1)
    params = (X, y, jnp.asarray(0.5))

    def answer(*params):
        problem = Smooth(logistic_loss, *params, convex=True)
        return solve(problem, Linearised(), jnp.zeros(3), tol=TIGHT).x

    assert_derivatives(answer, params)


def test_equality_constrained_qp_matches_its_kkt_system():
    rng = np.random.default_rng(2)
    factor = rng.standard_normal((4, 4))
    params = (
        jnp.asarray(factor @ factor.T + np.eye(4)),
        jnp.asarray(rng.standard_normal(4)),
        jnp.asarray(rng.standard_normal((2, 4))),
        jnp.asarray(rng.standard_normal(2)),
    )

    def solution(*params):
        start = (jnp.zeros(4), jnp.zeros(2))
        return solve(QuadraticProgram(*params), Linearised(), start, tol=TIGHT)

    def exact(Q, c, A, b):
        system = jnp.block([[Q, A.T], [A, jnp.zeros((2, 2))]])
        z = jnp.linalg.solve(system, jnp.concatenate([c, b]))
        return z[:4], z[4:]

    end = solution(*params)
    assert end.converged
    assert_close(end.x, exact(*params), 1e-10)
    assert_derivatives(lambda *p: jnp.concatenate(solution(*p).x), params)


def test_fixed_point_derivatives():
    rng = np.random.default_rng(3)
    weights = jnp.asarray(0.3 * rng.standard_normal((3, 3)))
    params = (weights, jnp.asarray(rng.standard_normal(3)))

    def answer(*params):
        problem = FixedPoint(lambda x, W, b: jnp.tanh(W @ x + b), *params)
        return solve(problem, FixedPointIteration(), jnp.zeros(3), tol=TIGHT).x

    assert_derivatives(answer, params)


def test_scalar_root_matches_square_root():
    def root(c):
        problem = Root(lambda x, c: x * x - c, c)
        return solve(problem, Linearised(), jnp.ones(()), tol=TIGHT).x

    @jax.jit
    def orders(c):
        first = jax.grad(root)
        return root(c), first(c), jax.grad(first)(c), jax.grad(jax.grad(first))(c)

    assert_close(orders(4.0), (2.0, 0.25, -1 / 32, 3 / 256), 1e-9)


@eqx.filter_jit
def _ridge_and_gradient(X, y, lam):
    def answer(X, y, lam):
        problem = Smooth(ridge_loss, X, y, lam, convex=True)
        return solve(problem, Linearised(), jnp.zeros(3), tol=1e-9)

    end = answer(X, y, lam)
    ours = jax.jacrev(lambda *p: answer(*p).x, (0, 1, 2))(X, y, lam)
    exact = jax.jacrev(ridge_closed_form, (0, 1, 2))(X, y, lam)
    return end.converged, end.x, ridge_closed_form(X, y, lam), ours, exact


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), lam=st.floats(1e-2, 1e2))
def test_random_well_posed_ridge_problems(seed, lam):
    X, y = data(seed)
    converged, x, closed, ours, exact = _ridge_and_gradient(X, y, jnp.asarray(lam))
    assert converged
    # Condition numbers reach about 1e4 here; 1e-8 leaves room for their rounding.
    assert_close(x, closed, 1e-8)
    assert_close(ours, exact, 1e-8)


def test_pytree_starts_keep_structure_and_dtype():
    problem = Smooth(
        lambda x: jnp.sum((x["a"] - 1) ** 2) + jnp.sum((x["b"][0] + 2) ** 2)
    )
    start = {"a": jnp.zeros((2, 2)), "b": (jnp.zeros(()),)}
    end = solve(problem, GradientDescent(0.4), start)
    assert_close(end.x, {"a": np.ones((2, 2)), "b": (-2.0,)}, 1e-6)
    assert jax.tree_util.tree_structure(end.x) == jax.tree_util.tree_structure(start)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtype_follows_the_start(dtype):
    problem = Smooth(quadratic, jnp.eye(2, dtype=dtype), jnp.ones(2, dtype))
    end = solve(problem, GradientDescent(0.5), jnp.zeros(2, dtype))
    assert end.converged
    for array in (end.x, end.residual, end.tol, end.trace.residual):
        assert array.dtype == dtype
    assert end.status.dtype == end.steps.dtype == end.evaluations.dtype == jnp.int32


# ------------------------------------------------------------------------- traps


class Held(Problem):
    """A problem of the user's own that holds a callable."""

    function: Callable

    def condition(self, x):
        return self.function(x)


def closing_over(kind, c):
    """A problem with the answer c**2 that never names `c` among its parameters."""
    if kind == "Smooth":
        return Smooth(lambda x: 0.5 * jnp.sum((x - c**2) ** 2))
    if kind == "Root":
        return Root(lambda x: x - c**2)
    if kind == "FixedPoint":
        return FixedPoint(lambda x: 0.5 * (x + c**2))
    if kind == "callable field":
        return Held(jax.tree_util.Partial(lambda x: x - c**2))

    class Own(Problem):
        def condition(self, x):
            return x - c**2

    return Own()


KINDS = ["Smooth", "Root", "FixedPoint", "callable field", "own class"]


def closing_answer(kind, c, differentiate="implicit"):
    solver = FixedPointIteration() if kind == "FixedPoint" else GradientDescent(0.5)
    settings = {"tol": 1e-12, "max_steps": 60, "differentiate": differentiate}
    return solve(closing_over(kind, c), solver, jnp.zeros(()), **settings).x


@pytest.mark.parametrize("kind", KINDS)
def test_trap_callable_that_closes_over_traced_array(kind):
    def answer(c):
        return closing_answer(kind, c)

    @jax.jit
    def under_jit(c, lanes):
        return {
            "value": answer(c) - c**2,
            "grad": jax.grad(answer)(c) - 2 * c,
            "jvp": jax.jvp(answer, (c,), (jnp.ones(()),))[1] - 2 * c,
            "vmap of grad": jax.vmap(jax.grad(answer))(lanes) - 2 * lanes,
            "grad of vmap": jax.grad(lambda c: jax.vmap(answer)(c).sum())(lanes)
            - 2 * lanes,
            "grad of jit": jax.grad(jax.jit(answer))(c) - 2 * c,
            "hessian": jax.hessian(answer)(c) - 2,
        }

    c, lanes = jnp.asarray(3.0), jnp.asarray([1.0, 2.0])
    for name, error in under_jit(c, lanes).items():
        assert np.all(np.abs(error) < 1e-8), name
    assert_close(jax.grad(answer)(c), 6.0, 1e-9)


def test_trap_callable_that_closes_over_traced_array_unrolled():
    @jax.jit
    def slopes(c):
        return [
            jax.grad(lambda c, kind=kind: closing_answer(kind, c, "unroll"))(c)
            for kind in KINDS
        ]

    assert_close(slopes(jnp.asarray(3.0)), 6 * np.ones(len(KINDS)), 1e-9)


def test_trap_closure_under_nested_solves():
    """The inner problem closes over the outer iterate and over the parameter."""

    def inner(outer, c):
        problem = Smooth(lambda y: 0.5 * (y - c * outer) ** 2 + 0.05 * y**4)
        return solve(problem, Linearised(), jnp.zeros(()), tol=1e-13).x

    def answer(c):
        problem = Smooth(lambda x: 0.5 * (inner(x, c) - 1) ** 2 + 0.1 * x**2)
        return solve(problem, GradientDescent(0.5), jnp.zeros(()), tol=1e-12).x

    c = jnp.asarray(0.8)
    tangent = jax.jit(lambda c: jax.jvp(answer, (c,), (jnp.ones(()),))[1])(c)
    assert_close(tangent, difference(jax.jit(answer), c, jnp.ones(())), 1e-6)
    assert_close(jax.jit(jax.grad(answer))(c), tangent, 1e-8)


@pytest.mark.parametrize("kind", ["gradient descent", "picard"])
def test_trap_condition_is_evaluated_once_a_step(kind):
    """Counted when it runs, not when it is traced."""
    calls = []
    picard = kind == "picard"
    solver = FixedPointIteration(0.1) if picard else GradientDescent(0.1)

    class Counted(Problem):
        target: jax.Array

        def condition(self, x):
            jax.debug.callback(lambda: calls.append(1))
            return self.target - x if picard else x - self.target

    for tol, status in ((1e-6, Status.CONVERGED), (1e-30, Status.STEP_LIMIT)):
        calls.clear()
        end = solve(Counted(jnp.ones(2)), solver, jnp.zeros(2), tol=tol, max_steps=200)
        jax.effects_barrier()
        assert end.status == status
        # One at the start, one a step; and one of the returned point, for its
        # certificate, which is not the solver's.
        assert len(calls) == int(end.steps) + 2 == int(end.evaluations) + 1


def test_trap_trace_is_recorded_without_host_calls():
    problem = Smooth(quadratic, jnp.eye(2), jnp.ones(2))

    def run(problem):
        return solve(problem, GradientDescent(0.5), jnp.zeros(2), max_steps=80)

    assert "callback" not in str(jax.make_jaxpr(run)(problem))
    end = run(problem)
    steps = int(end.steps)
    wanted = np.sqrt(2) * 0.5 ** np.arange(steps + 1)
    assert_close(end.trace.residual[: steps + 1], wanted, 1e-12)
    assert np.all(np.isnan(end.trace.residual[steps + 1 :]))
    assert np.array_equal(end.trace.evaluations[: steps + 1], np.arange(steps + 1) + 1)
    assert not np.any(end.trace.evaluations[steps + 1 :])


def ill_conditioned(dtype, condition, size=6):
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((size, size)))
    curvatures = np.geomspace(1 / condition, 1, size)
    matrix = (basis * curvatures) @ basis.T
    vector = matrix @ rng.standard_normal(size)
    return Smooth(quadratic, jnp.asarray(matrix, dtype), jnp.asarray(vector, dtype))


@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_trap_tolerance_below_reach_is_stalled(dtype, condition):
    problem, start = ill_conditioned(dtype, condition), jnp.zeros(6, dtype)
    solver = GradientDescent(0.9)
    end = solve(problem, solver, start, tol=1e-30, max_steps=1_000_000)
    if end.residual == 0:
        assert end.converged  # exact arithmetic happened: nothing is out of reach
        return
    assert end.status == Status.STALLED
    # log(eps) / log(1 - 0.9 / condition) steps to rounding, and the patience after.
    reach = -np.log(np.finfo(dtype).eps) * condition / 0.9
    assert int(end.steps) <= 2 * reach + 300
    assert end.residual <= 1e3 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_trap_slow_progress_is_not_stalled(dtype):
    problem = ill_conditioned(dtype, 1e3)
    start = 10 * jnp.ones(6, dtype)
    for stepsize in (1e-3, 1e-6):
        solver = GradientDescent(jnp.asarray(stepsize, dtype))
        end = solve(problem, solver, start, tol=1e-5, max_steps=2_000)
        assert end.status == Status.STEP_LIMIT
        assert end.residual < end.trace.residual[0]


class HeavyBall(Solver):
    """Its residual rises for long stretches while the energy falls."""

    stepsize: float
    momentum: float

    def init(self, problem, start):
        return State(start, problem.condition(start), jnp.zeros_like(start))

    def step(self, problem, state):
        stepsize, momentum = (
            jnp.asarray(s, state.x.dtype) for s in (self.stepsize, self.momentum)
        )
        velocity = momentum * state.memory - stepsize * state.condition
        x = state.x + velocity
        return State(x, problem.condition(x), velocity)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_trap_slow_oscillation_is_not_stalled(dtype):
    """Momentum on curvatures 1e-6 and 1: a period of about 6000 steps."""
    curvatures = jnp.asarray([1e-6, 1.0], dtype)
    problem = Smooth(quadratic, jnp.diag(curvatures), jnp.asarray([0.0, 0.0], dtype))
    start = jnp.asarray([1e-2, 1.0], dtype)
    solver = HeavyBall(1.0, 0.9995)
    end = solve(problem, solver, start, tol=1e-12, max_steps=30_000)
    assert end.status == Status.STEP_LIMIT or end.converged
    assert end.residual < 1e-2 * end.trace.residual[0]


def test_trap_each_lane_has_its_own_status_and_steps():
    matrix = jnp.eye(2)
    targets = jnp.asarray([[0.0, 0.0], [1.0, 2.0], [jnp.nan, 1.0], [1e3, 1e3]])

    def run(target, stepsize):
        problem = Smooth(quadratic, matrix, target)
        return solve(
            problem, GradientDescent(stepsize), jnp.zeros(2), tol=1e-6, max_steps=40
        )

    stepsizes = jnp.asarray([0.5, 0.5, 0.5, 2.5])
    together = jax.vmap(run)(targets, stepsizes)
    wanted = [Status.CONVERGED, Status.CONVERGED, Status.DIVERGED, Status.STEP_LIMIT]
    assert together.status.tolist() == wanted
    assert together.steps[0] == 0 and together.steps[2] == 0
    for lane in range(4):
        alone = run(targets[lane], stepsizes[lane])
        for name in ("status", "steps", "evaluations", "residual", "x"):
            mine, single = getattr(together, name)[lane], getattr(alone, name)
            assert np.allclose(mine, single, rtol=1e-9, equal_nan=True), name
        recorded = together.trace.residual[lane]
        assert np.allclose(recorded, alone.trace.residual, rtol=1e-9, equal_nan=True)


def test_trap_singular_jacobian_gives_nan():
    def answer(c, matrix):
        problem = Smooth(quadratic, matrix, c)
        return solve(problem, GradientDescent(0.5), jnp.zeros(2), tol=1e-8).x

    singular = jnp.diag(jnp.asarray([1.0, 0.0]))
    c = jnp.asarray([1.0, 0.0])
    assert np.all(np.isnan(jax.grad(lambda *a: answer(*a).sum())(c, singular)))
    # In a batch only the singular lane suffers.
    pair = jnp.stack([singular, jnp.eye(2)])
    for mode in (jax.jacrev, jax.jacfwd):
        jacobians = jax.jit(jax.vmap(mode(answer), in_axes=(None, 0)))(c, pair)
        assert np.all(np.isnan(jacobians[0]))
        assert_close(jacobians[1], np.eye(2), 1e-9)


def test_trap_rank_deficient_least_squares_differentiates_what_is_unique():
    """Fitted values are unique, coefficients are not."""
    rng = np.random.default_rng(4)
    thin = rng.standard_normal((5, 2))
    mixing = rng.standard_normal((2, 3))  # three columns of rank two
    X, y = jnp.asarray(thin @ mixing), jnp.asarray(rng.standard_normal(5))

    def loss(w, X, y):
        return 0.5 * jnp.sum((X @ w - y) ** 2)

    def coefficients(y):
        problem = Smooth(loss, X, y, convex=True, unique=False)
        stepsize = 1 / jnp.linalg.norm(X, 2) ** 2
        return solve(
            problem, GradientDescent(stepsize), jnp.zeros(3), tol=1e-9, max_steps=5000
        )

    @jax.jit
    def report(y):
        def fitted(y):
            return X @ coefficients(y).x

        return {
            "converged": coefficients(y).converged,
            "fitted": fitted(y),
            "reverse": jax.jacrev(fitted)(y),
            "forward": jax.jacfwd(fitted)(y),
            "least norm": jax.jacfwd(lambda y: coefficients(y).x)(y),
            "which": jax.grad(lambda y: coefficients(y).x[0])(y),
        }

    got = report(y)
    projector = thin @ np.linalg.pinv(thin)
    assert got["converged"]
    assert_close(got["fitted"], projector @ np.asarray(y), 1e-7)
    assert_close(got["reverse"], projector, 1e-7)
    assert_close(got["forward"], projector, 1e-7)
    # Forward mode follows the solution of minimum norm.
    assert_close(got["least norm"], np.linalg.pinv(np.asarray(X)), 1e-7)
    # A cotangent outside the row space asks for what is not unique.
    assert np.all(np.isnan(got["which"]))


def test_unrolled_equals_implicit():
    X, y = data(5)

    def answer(lam, differentiate):
        problem = Smooth(ridge_loss, X, y, lam)
        return solve(
            problem,
            GradientDescent(0.05),
            jnp.zeros(3),
            tol=1e-11,
            max_steps=600,
            differentiate=differentiate,
        ).x

    jacobian = jax.jit(jax.jacrev(answer), static_argnums=1)
    lam = jnp.asarray(2.0)
    assert_close(jacobian(lam, "unroll"), jacobian(lam, "implicit"), 1e-8)


def test_differentiate_none_refuses():
    def answer(c):
        problem = Smooth(lambda x, c: jnp.sum((x - c) ** 2), c)
        return solve(
            problem, GradientDescent(0.4), jnp.zeros(()), differentiate="none"
        ).x

    assert_close(answer(jnp.ones(())), 1.0, 1e-6)
    assert_close(jax.jit(jax.vmap(answer))(jnp.ones(2)), np.ones(2), 1e-6)
    for transform in (jax.grad, jax.jacfwd):
        with pytest.raises(ValueError, match=r"solve: .*differentiate='none'.* Use"):
            transform(answer)(jnp.ones(()))


def test_differentiate_none_refuses_for_closures_too():
    def answer(c):
        problem = Smooth(lambda x: jnp.sum((x - c) ** 2))
        return solve(
            problem, GradientDescent(0.4), jnp.zeros(()), differentiate="none"
        ).x

    with pytest.raises(ValueError, match="differentiate='none'"):
        jax.grad(answer)(jnp.ones(()))


@pytest.mark.parametrize("differentiate", ["implicit", "unroll"])
def test_not_converged_gives_nan_derivative_in_its_lane_only(differentiate):
    def answer(c, stepsize):
        problem = Smooth(lambda x, c: 0.5 * (x - c) ** 2, c)
        return solve(
            problem,
            GradientDescent(stepsize),
            jnp.zeros(()),
            tol=1e-10,
            max_steps=50,
            differentiate=differentiate,
        ).x

    c, stepsizes = jnp.ones(3), jnp.asarray([0.5, 0.01, 1.0])
    for mode in (jax.grad, jax.jacfwd)[: 2 if differentiate == "implicit" else 1]:
        slopes = jax.jit(jax.vmap(mode(answer)))(c, stepsizes)
        assert_close(slopes[jnp.asarray([0, 2])], np.ones(2), 1e-9)
        if differentiate == "implicit":
            assert np.isnan(slopes[1])
        else:  # what unrolling promises: the derivative of these very iterations
            assert_close(slopes[1], 1 - 0.99**50, 1e-9)


def test_solver_settings_and_start_have_zero_implicit_derivative():
    def answer(start, stepsize):
        problem = Smooth(lambda x: 0.5 * (x - 1) ** 2)
        return solve(problem, GradientDescent(stepsize), start).x

    slopes = jax.grad(answer, (0, 1))(jnp.zeros(()), jnp.asarray(0.5))
    assert slopes == (0.0, 0.0)


# -------------------------------------------------------------- compilation count


def test_new_values_do_not_compile_again():
    traces = []
    # A bound method: a captured list may change, and its loop is never reused.
    note = traces.append

    def objective(x, c):
        note(1)
        return jnp.sum((x - c) ** 2)

    def run(c, start=0.0, tol=1e-6, evaluations=None, stepsize=0.4):
        return solve(
            Smooth(objective, c),
            GradientDescent(jnp.asarray(stepsize)),
            jnp.full(2, start),
            tol=tol,
            max_evaluations=evaluations,
        )

    run(jnp.zeros(2))
    first = len(traces)
    run(jnp.ones(2))
    run(np.ones(2))
    run(jnp.ones(2), start=3.0)
    run(jnp.ones(2), tol=1e-3)
    run(jnp.ones(2), evaluations=3)
    run(jnp.ones(2), stepsize=0.3)
    assert len(traces) == first


def test_python_numbers_in_solvers_and_problems_do_not_compile_again():
    traces = []
    # A bound method: a captured list may change, and its loop is never reused.
    note = traces.append

    def objective(x, c):
        note(1)
        return jnp.sum((x - c) ** 2)

    def run(c, stepsize):
        return solve(Smooth(objective, c), GradientDescent(stepsize), jnp.zeros(2))

    run(1.0, 0.4)
    first = len(traces)
    run(2.0, 0.4)
    assert len(traces) == first, "a parameter"
    run(2.0, 0.3)
    assert len(traces) == first, "a stepsize"


def test_derivatives_with_new_values_do_not_compile_again():
    traces = []

    @jax.jit
    def slope(c):
        traces.append(1)

        def answer(c):
            problem = Smooth(lambda x, c: jnp.sum((x - c) ** 2), c)
            return solve(problem, GradientDescent(0.4), jnp.zeros(())).x

        return jax.grad(answer)(c)

    assert_close([slope(jnp.asarray(c)) for c in (1.0, 2.0, 3.0)], np.ones(3), 1e-6)
    assert len(traces) == 1


# ----------------------------------------------------------------- limits, status


def test_limits_are_kept_and_said():
    problem = ill_conditioned(jnp.float64, 100.0)
    solver, start = GradientDescent(0.9), jnp.zeros(6)
    cut = solve(problem, solver, start, max_steps=7)
    assert cut.status == Status.STEP_LIMIT and cut.steps == 7
    cut = solve(problem, solver, start, max_evaluations=5)
    assert cut.status == Status.STEP_LIMIT and cut.evaluations == 5
    assert not cut.converged and not cut.certificate.met
    # `init` has spent one already: no step may begin.
    cut = solve(problem, solver, start, max_evaluations=1)
    assert cut.status == Status.STEP_LIMIT and cut.steps == 0


def test_started_at_the_solution_stops_at_once():
    problem = Smooth(lambda x: jnp.sum((x - 1) ** 2))
    end = solve(problem, GradientDescent(0.5), jnp.ones(2))
    assert end.converged and end.steps == 0 and end.evaluations == 1


def test_divergence_is_said_and_the_last_finite_iterate_kept():
    problem = Smooth(lambda x: jnp.sum(x**4))
    end = solve(problem, GradientDescent(1.0), 10 * jnp.ones(2))
    assert end.status == Status.DIVERGED
    assert np.all(np.isfinite(end.x)) and np.isfinite(end.residual)
    assert not end.certificate.met


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_data_are_never_converged(value):
    X, y = data(6)
    solver = GradientDescent(0.05)
    for params in ((X.at[0, 0].set(value), y), (X, y.at[0].set(value))):
        problem = Smooth(ridge_loss, *params, 0.5)
        for run in (solve, jax.jit(lambda p, s, x: solve(p, s, x).status)):
            end = run(problem, solver, jnp.zeros(3))
            status = getattr(end, "status", end)
            assert status == Status.DIVERGED
    end = solve(Smooth(ridge_loss, X, y, 0.5), solver, jnp.full(3, value))
    assert end.status == Status.DIVERGED


def test_a_solver_may_stop_the_run_itself():
    class GivesUp(GradientDescent):
        def step(self, problem, state):
            moved = super().step(problem, state)
            return State(moved.x, moved.condition, status=Status.INFEASIBLE)

    problem = Smooth(lambda x: jnp.sum((x - 1) ** 2))
    end = solve(problem, GivesUp(0.1), jnp.zeros(2))
    assert end.status == Status.INFEASIBLE and end.steps == 1


# ----------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"problem": jnp.sum}, TypeError, "`problem` must be a varan.Problem"),
        ({"start": jnp.zeros(0)}, ValueError, "`start` must not be empty"),
        ({"start": ()}, ValueError, "`start` must not be empty"),
        ({"start": jnp.zeros(2, int)}, TypeError, "`start` must hold floating"),
        ({"tol": 0.0}, ValueError, "`tol` must be positive"),
        ({"tol": np.nan}, ValueError, "`tol` must be positive"),
        ({"max_steps": 0}, ValueError, "`max_steps` must be a positive integer"),
        ({"max_steps": 2.5}, ValueError, "`max_steps` must be a positive integer"),
        ({"max_evaluations": -1}, ValueError, "`max_evaluations` must be a positive"),
        ({"differentiate": "exact"}, ValueError, "'implicit', 'unroll', 'none'"),
        ({"solver": "newton"}, TypeError, "solver"),
    ],
)
def test_bad_arguments_give_one_clear_sentence(change, error, message):
    arguments = {
        "problem": Smooth(lambda x: jnp.sum(x**2)),
        "solver": GradientDescent(0.5),
        "start": jnp.zeros(2),
        **change,
    }
    with pytest.raises(error, match="^solve: .*" + message):
        solve(**arguments)


def test_a_condition_of_another_size_is_refused():
    problem = Root(lambda x: x[:1])
    with pytest.raises(ValueError, match=r"as many entries as the start.*1 for 2"):
        solve(problem, GradientDescent(0.5), jnp.zeros(2))


# --- what the loop does not take on trust --------------------------------------------


class Liar(GradientDescent):
    """Reports a condition that is met."""

    def init(self, problem, start):
        return State(start, jnp.zeros_like(start))


class Late(GradientDescent):
    """Reports the condition of the iterate before."""

    def step(self, problem, state):
        return State(state.x - 0.4 * state.condition, problem.condition(state.x))


@pytest.mark.parametrize("solver", [Liar(0.4), Late(0.4)])
def test_certificate_is_of_the_returned_point_whatever_the_solver_says(solver):
    problem = Smooth(lambda x: jnp.sum(jnp.cosh(x - 3.0)))
    end = solve(problem, solver, jnp.zeros(2), tol=1e-3, max_steps=3)
    assert_close(end.residual, jnp.linalg.norm(problem.condition(end.x)), 1e-12)
    assert end.status != Status.CONVERGED
    assert not end.certificate.met


def test_nan_iterate_is_not_converged_though_its_gradient_is_zero():
    problem = Smooth(lambda x: jnp.sum(jax.nn.relu(x - 1.0)))
    end = solve(problem, GradientDescent(0.1), jnp.full(2, jnp.nan))
    assert end.status == Status.DIVERGED
    assert not end.certificate.met


def test_counter_that_would_never_count_is_refused():
    class Counts(GradientDescent):
        def init(self, problem, start):
            return State(start, problem.condition(start), memory=0)

        def step(self, problem, state):
            new = super().step(problem, state)
            return State(new.x, new.condition, memory=state.memory + 1)

    with pytest.raises(TypeError, match=r"Begin with arrays, for instance jnp.array"):
        solve(Smooth(jnp.sum), Counts(0.1), jnp.zeros(2))


def test_healthy_slow_run_in_float32_is_not_stalled():
    def rosenbrock(x):
        return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2

    start = jnp.asarray([-1.2, 1.0], jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        end = solve(Smooth(rosenbrock), optax.adam(3e-4), start, max_steps=8000)
    assert end.status == Status.STEP_LIMIT
    assert rosenbrock(end.x) < 3.0  # from 24.2, along the valley


# --- callables whose captured values change ------------------------------------------


class Model:
    def loss(self, x):
        return (x - self.target) ** 2


MODEL, BOX, TARGET = Model(), {"target": 0.0}, 0.0


def loss_of_box(x):
    return (x - BOX["target"]) ** 2


def loss_of_global(x):
    return (x - TARGET) ** 2


def fit_model(target):
    MODEL.target = target
    return solve(Smooth(MODEL.loss), GradientDescent(0.3), jnp.zeros(()), tol=1e-9).x


def fit_box(target):
    BOX["target"] = target
    return solve(Smooth(loss_of_box), GradientDescent(0.3), jnp.zeros(()), tol=1e-9).x


def fit_global(target):
    global TARGET
    TARGET = target
    problem = Smooth(loss_of_global)
    return solve(problem, GradientDescent(0.3), jnp.zeros(()), tol=1e-9).x


@pytest.mark.parametrize("fit", [fit_model, fit_box, fit_global])
def test_trap_captured_value_that_changes_is_not_stale(fit):
    for target in (1.0, 5.0, 1.0):
        assert_close(fit(target), jnp.asarray(target), 1e-8)
    assert_close(jax.grad(fit)(2.0), jnp.asarray(1.0), 1e-8)
    lanes = jnp.asarray([0.0, 1.0])
    assert_close(jax.vmap(fit)(lanes), lanes, 1e-8)
