"""Second-order solvers against jaxopt: same instances, answers and derivatives.

jaxopt's Hager-Zhang search is compared within its L-BFGS; its `BFGS`, `LBFGS`,
`GaussNewton`, `LevenbergMarquardt` and `Bisection` are here optimistix's and optax's
on varan's problems.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

from varan import FixedPoint, FixedPointIteration, GradientDescent, Root, Smooth, solve
from varan.core import FromOptimistix
from varan.problems import BoxConstrained, LeastSquares
from varan.secondorder import (
    LBFGSB,
    Anderson,
    Broyden,
    nonlinear_cg,
    scale_by_hager_zhang_linesearch,
)

jaxopt = pytest.importorskip("jaxopt")

# Its code predates some of JAX's renamings.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

RNG = np.random.default_rng(0)
X, Y = jnp.asarray(RNG.standard_normal((20, 4))), jnp.asarray(RNG.choice([-1.0, 1], 20))
START, WEIGHT = jnp.zeros(4), jnp.arange(1.0, 5.0)
M = jnp.asarray(0.3 * RNG.standard_normal((4, 4)))
TOL = 1e-9


def logistic(w, lam, X):
    return jnp.mean(jnp.logaddexp(0.0, -Y * (X @ w))) + lam * w @ w / 2


def compare(ours, theirs, *data, atol=1e-6):
    """Answers, and the derivatives of a weighted sum in all data."""
    weight = WEIGHT

    def both(run):
        @jax.jit
        def all_of(*data):
            answer = run(*data)
            return answer, jax.grad(lambda *d: weight @ run(*d), range(len(data)))(
                *data
            )

        return all_of(*data)

    (one, slopes), (two, others) = both(ours), both(theirs)
    np.testing.assert_allclose(one, two, atol=atol)
    for slope, other in zip(slopes, others, strict=True):
        np.testing.assert_allclose(slope, other, atol=20 * atol, rtol=1e-3)


PAIRS = {
    "LBFGS": (
        lambda: optax.lbfgs(),
        lambda f: jaxopt.LBFGS(f, tol=TOL, maxiter=500),
    ),
    "HagerZhangLineSearch": (
        lambda: optax.lbfgs(linesearch=scale_by_hager_zhang_linesearch()),
        lambda f: jaxopt.LBFGS(f, tol=TOL, maxiter=500, linesearch="hager-zhang"),
    ),
    "ZoomLineSearch": (
        lambda: nonlinear_cg(
            "polak-ribiere", optax.scale_by_zoom_linesearch(max_linesearch_steps=30)
        ),
        lambda f: jaxopt.NonlinearCG(f, tol=TOL, maxiter=500),
    ),
    "BacktrackingLineSearch": (
        lambda: optax.lbfgs(
            linesearch=optax.scale_by_backtracking_linesearch(30, store_grad=True)
        ),
        lambda f: jaxopt.LBFGS(f, tol=TOL, maxiter=500, linesearch="backtracking"),
    ),
    "BFGS": (
        lambda: optx.BFGS(rtol=TOL, atol=TOL),
        lambda f: jaxopt.BFGS(f, tol=TOL, maxiter=500),
    ),
    "NonlinearCG": (
        lambda: nonlinear_cg(),
        lambda f: jaxopt.NonlinearCG(f, tol=TOL, maxiter=500),
    ),
    "ScipyMinimize": (
        lambda: optax.lbfgs(),
        lambda f: jaxopt.ScipyMinimize(fun=f, method="BFGS", tol=TOL),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_minimisers(name):
    mine, peer = PAIRS[name]

    def ours(lam, X):
        problem = Smooth(logistic, lam, X, convex=True)
        # optimistix's BFGS compares values, and ends at half of the digits.
        tol = 1e-7 if name == "BFGS" else TOL
        return solve(problem, mine(), START, tol=tol).x

    solver = peer(logistic)

    def theirs(lam, X):
        return solver.run(START, lam, X).params

    if name == "ScipyMinimize":  # it runs outside jit
        np.testing.assert_allclose(ours(0.1, X), theirs(0.1, X), atol=1e-6)
    else:
        compare(ours, theirs, 0.1, X)


@pytest.mark.parametrize("name", ["LBFGSB", "ScipyBoundedMinimize"])
def test_bounds(name):
    def ours(lam, X, upper):
        problem = BoxConstrained(logistic, jnp.full(4, -0.2), upper, lam, X)
        return solve(problem, LBFGSB(), START, tol=TOL).x

    if name == "LBFGSB":
        solver = jaxopt.LBFGSB(logistic, tol=TOL, maxiter=500)
    else:
        solver = jaxopt.ScipyBoundedMinimize(
            fun=logistic, method="l-bfgs-b", tol=1e-14, maxiter=500
        )

    def theirs(lam, X, upper):
        return solver.run(START, (jnp.full(4, -0.2), upper), lam, X).params

    data = 0.01, X, jnp.full(4, 0.3)
    if name == "LBFGSB":
        compare(ours, theirs, *data)
    else:
        np.testing.assert_allclose(ours(*data), theirs(*data), atol=1e-5)


def contraction(x, c, M):
    return jnp.tanh(M @ x) + c


FIXED = {
    "FixedPointIteration": (
        FixedPointIteration(),
        lambda: jaxopt.FixedPointIteration(contraction, tol=TOL, maxiter=500),
    ),
    "AndersonAcceleration": (
        Anderson(),
        lambda: jaxopt.AndersonAcceleration(contraction, tol=TOL, maxiter=500),
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_fixed_points(name):
    mine, peer = FIXED[name]

    def ours(c, M):
        return solve(FixedPoint(contraction, c, M), mine, START, tol=TOL).x

    def theirs(c, M):
        return peer().run(START, c, M).params

    compare(ours, theirs, WEIGHT, M)


def test_anderson_around_a_solver():
    def ours(lam, X):
        accelerated = Anderson(GradientDescent(0.5))
        return solve(Smooth(logistic, lam, X), accelerated, START, tol=TOL).x

    def theirs(lam, X):
        descent = jaxopt.GradientDescent(
            logistic, stepsize=0.5, acceleration=False, tol=TOL, maxiter=500
        )
        return jaxopt.AndersonWrapper(descent).run(START, lam, X).params

    compare(ours, theirs, 0.1, X)


def test_roots():
    def equation(x, c, M):
        return contraction(x, c, M) - x

    def ours(c, M):
        return solve(Root(equation, c, M), Broyden(), START, tol=TOL).x

    def theirs(c, M):
        return jaxopt.Broyden(equation, tol=TOL, maxiter=500).run(START, c, M).params

    compare(ours, theirs, WEIGHT, M)


def test_bisection():
    def equation(x, c):
        return x**3 + x - c

    bisection = FromOptimistix(
        optx.Bisection(rtol=TOL, atol=TOL), {"lower": 0.0, "upper": 9.0}
    )

    def ours(c):
        return solve(Root(equation, c), bisection, jnp.ones(()), tol=TOL).x * WEIGHT

    def theirs(c):
        solver = jaxopt.Bisection(
            equation, 0.0, 9.0, tol=TOL, maxiter=100, check_bracket=False
        )
        return solver.run(None, c).params * WEIGHT

    compare(ours, theirs, 3.0)


@pytest.mark.parametrize("name", ["GaussNewton", "LevenbergMarquardt"])
def test_least_squares(name):
    def residuals(w, X, y):
        return jnp.tanh(X @ w) - y

    targets = jnp.tanh(X @ (WEIGHT / 5)) + 0.01 * Y
    mine = getattr(optx, name)(rtol=TOL, atol=TOL)

    def ours(X, y):
        return solve(LeastSquares(residuals, X, y), mine, WEIGHT / 4, tol=TOL).x

    def theirs(X, y):
        solver = getattr(jaxopt, name)(residuals, tol=1e-10, maxiter=200)
        return solver.run(WEIGHT / 4, X, y).params

    np.testing.assert_allclose(ours(X, targets), theirs(X, targets), atol=1e-6)
    slope = jax.grad(lambda y: WEIGHT @ ours(X, y))(targets)
    other = jax.grad(lambda y: WEIGHT @ theirs(X, y))(targets)
    # jaxopt differentiates the Gauss-Newton model in part; its linear solve is loose.
    np.testing.assert_allclose(slope, other, atol=5e-3)
