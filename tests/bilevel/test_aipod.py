"""AiPOD: its implicit gradient, its answers, and where it fails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan import solve
from varan.bilevel import AiPOD, BilevelProblem, linear_lower_example

RNG = np.random.default_rng(0)
A = jnp.asarray(RNG.standard_normal((2, 4)))
H = jnp.asarray(RNG.standard_normal((2, 3)))
MIXED = jnp.asarray(RNG.standard_normal((4, 3)))
HALF = RNG.standard_normal((4, 4))
HESSIAN = jnp.asarray(HALF @ HALF.T / 4 + np.eye(4))


def upper(x, y):
    return jnp.sum((y - 1) ** 2) / 2 + jnp.sum(x**2) / 2 + jnp.sum(jnp.cos(x))


PROBLEM = BilevelProblem(
    upper,
    lambda x, y: y @ HESSIAN @ y / 2 - y @ MIXED @ x,
    equality=lambda x, y: A @ y + H @ x - 0.1,
)


def answer(x):
    kkt = jnp.block([[HESSIAN, A.T], [A, jnp.zeros((2, 2))]])
    return jnp.linalg.solve(kkt, jnp.concatenate([MIXED @ x, 0.1 - H @ x]))[:4]


def test_at_the_lower_answer_its_step_is_the_reduced_gradient():
    x = jnp.array([0.3, -0.5, 0.1])
    method = AiPOD(0.1, 0.1, inner_steps=1)
    state = method.init(PROBLEM, PROBLEM.point(x, answer(x)))
    exact = jax.grad(lambda x: upper(x, answer(x)))(x)
    np.testing.assert_allclose(state.condition.x, exact, atol=1e-12)
    moved = method.step(PROBLEM, state).x
    np.testing.assert_allclose((x - moved.x) / 0.1, exact, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [{}, {"upper_steps": 2, "probability": 0.5, "key": jax.random.key(3)}],
)
def test_converges_under_a_strongly_convex_lower_level(settings):
    start = PROBLEM.point(jnp.zeros(3), jnp.zeros(4))
    method = AiPOD(0.02, 0.2, **settings)
    solution = solve(PROBLEM, method, start, max_steps=10_000, tol=1e-6)
    assert bool(solution.converged)
    np.testing.assert_allclose(solution.x.y, answer(solution.x.x), atol=1e-6)


def test_cannot_choose_among_the_answers_of_the_lower_level():
    problem, (x, y) = linear_lower_example(jnp.array([1.0, -1.0, 0.5]))
    start = problem.point(x, {"y1": y["y1"], "y2": y["y2"][::-1]})
    end = solve(problem, AiPOD(0.02, 0.1), start, max_steps=3000).x
    assert jnp.linalg.norm(end.y["y2"] - y["y2"]) > 0.1 * jnp.linalg.norm(y["y2"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AiPOD(-1.0), "`stepsize` must be positive"),
        (lambda: AiPOD(inner_steps=0), "must be positive"),
        (lambda: AiPOD(probability=0.0), r"must lie in \(0, 1\]"),
        (
            lambda: AiPOD().init(
                problem := BilevelProblem(upper, upper), problem.point(A[0], A[0])
            ),
            "needs equality constraints",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
