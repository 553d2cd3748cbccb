"""Solvers of optimistix and optax gain certificates, statuses and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

from varan import FixedPoint, Root, Smooth, Status, solve
from varan.core import FromOptimistix
from varan.testing import assert_close

TOLS = {"rtol": 1e-10, "atol": 1e-10}


def bowl(x, c):
    """Strictly convex, its minimiser is c."""
    return jnp.sum(jnp.cosh(x - c)) + 0.5 * jnp.sum((x - c) ** 2)


C = jnp.asarray([1.0, -0.5, 2.0])
SMOOTH = Smooth(bowl, C, convex=True)
ROOT = Root(lambda x, c: jnp.sinh(x - c) + 0.1 * (x - c), C)
FIXED = FixedPoint(lambda x, c: 0.3 * jnp.sin(x - c) + c, C)

SOLVERS = {
    "optimistix BFGS": (optx.BFGS(**TOLS), SMOOTH),
    "optimistix LBFGS": (optx.LBFGS(**TOLS), SMOOTH),
    "optimistix NonlinearCG": (optx.NonlinearCG(**TOLS), SMOOTH),
    "optimistix Newton": (optx.Newton(**TOLS), ROOT),
    "optimistix Chord": (optx.Chord(**TOLS), ROOT),
    "optimistix Dogleg": (optx.Dogleg(**TOLS), ROOT),
    "optimistix LevenbergMarquardt": (optx.LevenbergMarquardt(**TOLS), ROOT),
    "optimistix GaussNewton": (optx.GaussNewton(**TOLS), ROOT),
    "optimistix FixedPointIteration": (optx.FixedPointIteration(**TOLS), FIXED),
    "optax sgd": (optax.sgd(0.3), SMOOTH),
    "optax sgd with momentum": (optax.sgd(0.1, momentum=0.5, nesterov=True), SMOOTH),
    "optax adam": (optax.adam(0.05), SMOOTH),
    "optax lbfgs": (optax.lbfgs(), SMOOTH),
    "optax chain": (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.2)), ROOT),
}


@pytest.fixture(autouse=True)
def usual_promotion():
    """optax and optimistix rely on JAX's usual promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", SOLVERS)
def test_reaches_the_solution_with_its_certificate(name):
    solver, problem = SOLVERS[name]

    end = solve(problem, solver, jnp.zeros(3), tol=1e-6, max_steps=3000)
    assert end.converged, Status(int(end.status)).advice
    assert end.certificate.met and end.certificate.value <= 1e-6
    assert_close(end.x, C, 1e-5)
    assert end.evaluations >= end.steps
    assert_close(end.residual, jnp.linalg.norm(problem.condition(end.x)), 1e-9)


@pytest.mark.parametrize("name", ["optimistix BFGS", "optax lbfgs", "optax adam"])
def test_derivatives_do_not_go_through_the_foreign_loop(name):
    solver, _ = SOLVERS[name]

    @jax.jit
    def jacobian(c):
        def answer(c):
            problem = Smooth(bowl, c, convex=True)
            return solve(problem, solver, jnp.zeros(3), tol=1e-8, max_steps=3000).x

        return jax.jacrev(answer)(c)

    assert_close(jacobian(C), np.eye(3), 1e-6)


def test_foreign_solvers_batch_with_statuses_of_their_own():
    def run(c):
        return solve(Smooth(bowl, c), optax.sgd(0.3), jnp.zeros(3), max_steps=100)

    lanes = jax.vmap(run)(jnp.stack([jnp.zeros(3), C, jnp.full(3, jnp.nan)]))
    wanted = [Status.CONVERGED, Status.CONVERGED, Status.DIVERGED]
    assert lanes.status.tolist() == wanted
    assert lanes.steps[0] == 0 < lanes.steps[1]


def test_options_reach_the_solver():
    bisection = FromOptimistix(optx.Bisection(**TOLS), {"lower": 0.0, "upper": 2.0})
    end = solve(Root(lambda x: x**2 - 2.0), bisection, jnp.ones(()), tol=1e-8)
    assert end.converged
    assert_close(end.x, np.sqrt(2), 1e-8)


def test_optax_lbfgs_evaluates_no_gradient_twice():
    """What it reports is what runs: counted at run time."""
    calls = []

    def objective(x):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum(jnp.cosh(x - 1.0))

    end = solve(Smooth(objective), optax.lbfgs(), jnp.zeros(3), tol=1e-8)
    jax.effects_barrier()
    assert end.converged
    # One for the start, the line searches' own, and optax's value at the iterate.
    assert len(calls) <= int(end.evaluations) + int(end.steps) + 1


@pytest.mark.parametrize(
    ("solver", "problem", "message"),
    [
        (optx.BFGS(**TOLS), ROOT, "BFGS is a minimiser and needs .*got Root"),
        (optx.FixedPointIteration(**TOLS), ROOT, "needs a FixedPoint problem"),
        (optax.adam, SMOOTH, "`solver` must be a varan.Solver.*got adam"),
        (optx.BFGS, SMOOTH, "got BFGS.*Instantiate it"),
        (None, SMOOTH, "got NoneType"),
    ],
)
def test_what_does_not_fit_is_refused(solver, problem, message):
    with pytest.raises(TypeError, match="solve: .*" + message):
        solve(problem, solver, jnp.zeros(3))
