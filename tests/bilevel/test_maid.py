"""MAID and inexact hypergradients: bounds above the truth, searches, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan import solve
from varan.bilevel import (
    HOAG,
    MAID,
    BilevelProblem,
    Smoothness,
    inexact_hypergradient,
    trajectory,
)
from varan.testing import difference

# f = log cosh(y - B x) + y^2 / 2: Hessian in [1, 2], third derivatives <= 0.77.
B = np.array([[1.0, -0.5], [0.3, 0.8], [0.2, 0.1]])


def upper(x, y, t):
    return jnp.sum((y - t) ** 2) / 2


def lower(x, y, t):
    u = y - jnp.asarray(B, y.dtype) @ x
    return jnp.sum(jnp.log(jnp.cosh(u))) + y @ y / 2


def problem_with(*t, **settings):
    return BilevelProblem(upper, lower, jnp.array(t), **settings)


# sech^2 has slope at most 4 / 3^(3/2) = 0.77; the mixed derivative is -sech^2 B.
SPREAD = float(np.linalg.norm(B, 2))
KNOWN = Smoothness(1.0, 2.0, 1.0, hessian=0.77, cross=0.77 * SPREAD)
PROBLEM = problem_with(0.4, -0.3, 0.2)
START = PROBLEM.point(jnp.array([0.8, -0.9]), jnp.array([0.1, 0.4, -0.2]))


def lower_answer(x):
    def step(y, _):
        return y - jax.grad(PROBLEM.lower_value, argnums=1)(x, y) / 2, None

    return jax.lax.scan(step, jnp.zeros(3), None, length=60)[0]


@jax.jit
@jax.vmap
def truth(x):
    """The lower answer, the objective, and its gradient through a converged run."""
    value = lambda x: PROBLEM.upper_value(x, lower_answer(x))  # noqa: E731
    return lower_answer(x), value(x), jax.grad(value)(x)


@jax.jit
@jax.vmap
def found_at(x, y, epsilon, delta):
    return inexact_hypergradient(PROBLEM, x, y, KNOWN, epsilon=epsilon, delta=delta)


def test_the_bound_is_never_below_the_error():
    draw = np.random.default_rng(3)
    accuracies = [(e, d) for e in (3.0, 0.1, 1e-3, 1e-8) for d in (3.0, 1e-2, 1e-8)]
    epsilon, delta = (
        jnp.repeat(jnp.array(v), 5) for v in zip(*accuracies, strict=True)
    )
    x, y = (jnp.asarray(draw.normal(size=(60, n))) for n in (2, 3))
    found, (answer, _, exact) = found_at(x, y, epsilon, delta), truth(x)
    error = jnp.linalg.norm(found.value - exact, axis=1)
    assert jnp.all(error <= found.bound.value + 1e-12)
    distance = jnp.linalg.norm(found.y - answer, axis=1)
    assert jnp.all(distance <= found.lower_distance + 1e-12)
    assert jnp.all(found.lower_distance <= epsilon)
    assert found.bound.proof and jnp.all(found.bound.value[-5:] < 1e-6)


def test_beyond_rounding_no_accuracy_is_asked_for():
    tiny = jnp.full(1, 1e-30)
    found = found_at(START.x[None], START.y[None], tiny, tiny)
    assert found.oracles.total[0] < 100 and found.bound.value[0] < 1e-13


def test_probed_constants_are_an_estimate_and_a_mixed_bound_saves_products():
    guessed = Smoothness(1.0, 2.0, 1.0, 0.0, 0.77, 0.77 * SPREAD, SPREAD, proof=False)
    x, y = START.x, START.y
    call = jax.jit(
        lambda: inexact_hypergradient(PROBLEM, x, y, guessed, epsilon=0.1, delta=0.1)
    )
    found = call()
    assert not found.bound.proof
    tenth = jnp.full(1, 0.1)
    same = found_at(x[None], y[None], tenth, tenth)
    np.testing.assert_allclose(found.value, same.value[0], atol=1e-12)
    assert found.oracles.cross == 1 and same.oracles.cross[0] == 3


def look(problem, iterate):
    search = iterate.extra
    return (
        iterate.x,
        search.value_bound,
        search.error,
        search.direction,
        search.at,
    )


def test_bounds_on_the_objective_fall_and_hold():
    @jax.jit
    @jax.vmap
    def run(stepsize, epsilon):
        method = MAID(KNOWN, stepsize, epsilon, epsilon, shrink=0.5)
        return trajectory(PROBLEM, method, START, look, steps=40)[1]

    starts = jnp.array([1e-2, 100.0, 1.0]), jnp.array([10.0, 0.1, 1e-4])
    for xs, bounds, errors, gradients, places in zip(*run(*starts), strict=True):
        finite = np.isfinite(bounds)
        assert finite[-1] and np.all(np.diff(np.asarray(bounds)[finite]) <= 0)
        values, slopes = truth(xs)[1], truth(places)[2]
        assert np.all(np.asarray(values - bounds)[finite] <= 1e-12)
        assert np.all(np.linalg.norm(gradients - slopes, axis=1) <= errors + 1e-12)
        # Proved descent directions, until rounding.
        norms = np.linalg.norm(gradients, axis=1)
        assert np.all((errors <= (1 - 1e-4) * norms) | (norms < 1e-9))
        assert np.linalg.norm(slopes[-1]) < 0.05


@jax.jit
def answer(t):
    problem = BilevelProblem(upper, lower, t)
    # Values of size one prove no descent where the gradient is below 1e-8 or so.
    return solve(problem, MAID(KNOWN, 1.0, convex=True), START, tol=1e-7)


def test_solves_certifies_and_differentiates():
    t = jnp.array([0.4, -0.3, 0.2])
    solution = answer(t)
    assert solution.converged and solution.certificate.met
    np.testing.assert_allclose(truth(solution.x.x[None])[2], 0, atol=2e-7)
    again = solve(PROBLEM, MAID(KNOWN, 1.0, convex=True), solution.x, tol=2e-7)
    assert again.steps == 0
    tangent = jax.jacobian(lambda t: answer(t).x.x)(t) @ t
    numeric = difference(lambda t: answer(t).x.x, t, t)
    np.testing.assert_allclose(tangent, numeric, atol=1e-5)


def test_projections_of_x_are_honoured():
    problem = problem_with(0.4, -0.3, 0.2, project_x=lambda x: jnp.clip(x, -0.1, 0.1))
    end = solve(problem, MAID(KNOWN, convex=True), START, tol=1e-4)
    assert end.converged and jnp.max(jnp.abs(end.x.x)) == 0.1


def test_hoag_reaches_the_answer_with_every_sequence():
    exact = answer(jnp.array([0.4, -0.3, 0.2])).x.x
    for sequence in ("geometric", "quadratic", "cubic"):
        method = HOAG(KNOWN, 1.0, 0.1, sequence)
        last, spent = trajectory(
            PROBLEM, method, START, lambda p, i: i.oracles.total, steps=120
        )
        np.testing.assert_allclose(last.x, exact, atol=1e-3)
        assert jnp.all(jnp.diff(spent) > 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Smoothness(0.0, 1.0, 1.0), "`strong_convexity` must be positive"),
        (lambda: Smoothness(1.0, np.inf, 1.0), "`lower` must be positive"),
        (lambda: Smoothness(1.0, 1.0, -1.0), "`upper_y` must not be negative"),
        (lambda: Smoothness(2.0, 1.0, 1.0), "`lower` must be at least `strong_conv"),
        (lambda: MAID(KNOWN, stepsize=0.0), "MAID: `stepsize` must be positive"),
        (lambda: MAID(KNOWN, shrink=1.0), r"MAID: `shrink` must lie in \(0, 1\)"),
        (lambda: MAID(KNOWN, relax=0.9), "MAID: `relax` must be at least 1"),
        (lambda: HOAG(KNOWN, sequence="linear"), "HOAG: `sequence` must be one of"),
        (
            lambda: MAID(KNOWN).check(problem_with(0.0, sample=lambda key, t: (t,))),
            "MAID: needs exact oracles",
        ),
        (
            lambda: inexact_hypergradient(
                PROBLEM, START.x, START.y, KNOWN, epsilon=0.0, delta=1.0
            ),
            "inexact_hypergradient: `epsilon` must be positive",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
