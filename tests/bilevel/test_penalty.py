"""Penalty methods: their rounds written out, their bias, sets, draws and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan import solve
from varan.bilevel import (
    BilevelProblem,
    Penalty,
    SingleLoopPenalty,
    hypergradient,
    hypergradient_pinv,
    penalty_hypergradient,
    trajectory,
)

# The lower level fixes G y = A x, a line of the three lower variables.
G = np.array([[1.0, 0.5, 0.0], [0.0, 1.0, -0.5]])
A = np.array([[1.0, 0.2], [-0.3, 0.8]])
T = np.array([1.0, -0.5, 0.4])


def upper(x, y, t, noise):
    return jnp.sum((y - t) ** 2) / 2 + jnp.sum(x**2) / 4 + noise @ y


def lower(x, y, t, noise):
    G_, A_ = (jnp.asarray(v, y.dtype) for v in (G, A))
    return jnp.sum((G_ @ y - A_ @ x) ** 2) / 2 + (noise @ y) * x[0]


def many_answers(**settings):
    return BilevelProblem(
        upper, lower, jnp.asarray(T), jnp.zeros(3), unique=False, **settings
    )


def draw(key, t, noise):
    return t, 0.1 * jax.random.normal(key, noise.shape)


PROBLEM = many_answers()
X = jnp.array([0.4, -0.6])


def best(x):
    """The lower answer that the upper level prefers."""
    return T + np.linalg.pinv(G) @ (A @ x - G @ T)


def value(x):
    return float(upper(x, best(x), T, np.zeros(3)))


def psi(x, s):
    """The penalised value in closed form."""
    hessian = s * np.eye(3) + G.T @ G
    y = np.linalg.solve(hessian, s * T + G.T @ (A @ x))
    return float((s * upper(x, y, T, np.zeros(3)) + lower(x, y, T, np.zeros(3))) / s)


def slope_of(function, x):
    step = 1e-6 * np.eye(x.size)
    return np.array([(function(x + e) - function(x - e)) / 2e-6 for e in step])


def start_of(problem):
    return problem.point(X, jnp.array([0.1, 0.4, -0.2]))


@jax.jit
def penalised(sigma):
    start = jnp.array([0.3, 0.1, -0.2])
    return penalty_hypergradient(PROBLEM, X, start, sigma, tol=1e-11)


@pytest.mark.parametrize("sigma", [1.0, 0.1, 0.01])
def test_value_and_gradient_are_those_of_the_closed_form(sigma):
    found = penalised(sigma)
    assert found.certificate.met
    np.testing.assert_allclose(found.value, psi(X, sigma), atol=1e-8)
    numeric = slope_of(lambda x: psi(x, sigma), np.asarray(X))
    np.testing.assert_allclose(found.gradient, numeric, atol=1e-6)
    # Never above the true value; the lower gap is never above its bound.
    assert found.value <= value(np.asarray(X)) + 1e-9
    details = found.certificate.details
    assert 0 <= details["lower gap"] <= details["lower gap bound"]


def test_the_bias_is_of_the_order_of_sigma():
    exact = hypergradient_pinv(PROBLEM, X, jnp.asarray(best(X))).value
    errors = [jnp.linalg.norm(penalised(s).gradient - exact) for s in (0.02, 0.01)]
    assert 1.9 < errors[0] / errors[1] < 2.1


def test_the_derivative_in_sigma_is_the_upper_value():
    # d/ds l(x, s) = F(x, y_s), the envelope theorem.
    found, s = penalised(0.1), 1e-5
    least = lambda s: s * psi(np.asarray(X), s)  # noqa: E731
    numeric = (least(0.1 + s) - least(0.1 - s)) / (2 * s)
    wanted = upper(X, found.y, jnp.asarray(T), jnp.zeros(3))
    np.testing.assert_allclose(numeric, wanted, rtol=1e-6)


def test_without_y_in_the_upper_level_the_gradient_is_exact():
    problem = BilevelProblem(
        lambda x, y: jnp.sum(x**3), lambda x, y: jnp.sum((y - x) ** 4 + (y - x) ** 2)
    )
    found = penalty_hypergradient(problem, X, jnp.zeros(2), 0.3)
    np.testing.assert_array_equal(found.y, found.z)
    np.testing.assert_array_equal(found.gradient, 3 * X**2)


def test_the_pseudo_inverse_formula_is_the_derivative_of_the_best_value():
    found = hypergradient_pinv(PROBLEM, X, jnp.asarray(best(X)))
    np.testing.assert_allclose(found.value, slope_of(value, np.asarray(X)), atol=1e-6)
    assert found.residual < 1e-10
    # At an answer that the upper level does not prefer it says so.
    flat = np.linalg.svd(G)[2][2]
    other = hypergradient_pinv(PROBLEM, X, jnp.asarray(best(X) + 0.1 * flat))
    assert other.residual > 0.05


@pytest.mark.parametrize("bounded", ["constraint", "set"])
def test_the_pseudo_inverse_formula_with_constraints_and_sets(bounded):
    def above(x, y):
        return jnp.sum((y - 1) ** 2) / 2 + x @ y

    def below(x, y):
        return jnp.sum((y - x) ** 2) / 2

    x = jnp.array([0.2, 0.9])  # the second entry is at its bound 0.5
    y = jnp.minimum(x, 0.5)
    if bounded == "set":
        cut = lambda v: jnp.minimum(v, 0.5)  # noqa: E731
        problem = BilevelProblem(above, below, project_y=cut)
        found = hypergradient_pinv(problem, x, y)
    else:
        problem = BilevelProblem(above, below, inequality=lambda x, y: y - 0.5)
        found = hypergradient_pinv(problem, x, y, jnp.array([0.0, 0.4]))
    # F = sum (y - 1)^2 / 2 + x . y with y = (x_0, 1/2).
    np.testing.assert_allclose(found.value, [0.2 - 1 + 2 * 0.2, 0.5], atol=1e-12)


def test_a_strongly_convex_lower_level_gives_the_implicit_gradient():
    problem = BilevelProblem(
        lambda x, y: jnp.sum(jnp.cos(y) + x * y),
        lambda x, y: jnp.sum(jnp.cosh(y - x)) + y @ y / 2,
    )
    y = solve_lower(X)
    exact = hypergradient(problem, X, y, method="cg", tol=1e-12).value
    found = hypergradient_pinv(problem, X, y)
    np.testing.assert_allclose(found.value, exact, atol=1e-10)
    penal = penalty_hypergradient(problem, X, y, 1e-4, tol=1e-11)
    np.testing.assert_allclose(penal.gradient, exact, atol=1e-3)


def solve_lower(x):
    """Gradient steps, written out."""
    y = x / 2
    for _ in range(100):
        y = y - 0.4 * (jnp.sinh(y - x) + y)
    return y


def seen(problem, iterate):
    return iterate.x, iterate.y, iterate.extra.u, iterate.extra.y, iterate.extra.z


def test_rounds_are_the_algorithm_written_out():
    s, gamma, rho, beta, alpha = 0.2, 0.15, 0.8, 0.6, 0.05
    method = Penalty(alpha, gamma, s, rho, beta, inner_steps=2)
    last, found = trajectory(PROBLEM, method, start_of(PROBLEM), seen, steps=3)
    x = np.asarray(X)
    w = u = y = z = np.array([0.1, 0.4, -0.2])
    for k in range(3):
        for _ in range(2):
            w, u = (
                w - gamma * (s * (w - T) + G.T @ (G @ w - A @ x) + (w - y) / rho),
                u - gamma * (G.T @ (G @ u - A @ x) + (u - z) / rho),
            )
        y, z = y + beta * (w - y), z + beta * (u - z)
        gap = -A.T @ (G @ w - A @ x) + A.T @ (G @ u - A @ x)
        x = x - alpha * (x / 2 + gap / s)
        for got, wanted in zip(found, (x, w, u, y, z), strict=True):
            np.testing.assert_allclose(got[k], wanted, atol=1e-12)
    assert (last.oracles.upper, last.oracles.lower) == (9, 18)
    assert last.oracles.hessian == 0 and last.oracles.cross == 0


def test_the_single_loop_without_noise_is_the_plain_gradient():
    """Whatever the momentum, an exact oracle's estimates are its gradients."""
    runs = [
        trajectory(
            PROBLEM,
            SingleLoopPenalty(0.02, 0.2, 0.2, momentum=eta),
            start_of(PROBLEM),
            seen,
            steps=40,
        )[1][0]
        for eta in (1.0, 0.2)
    ]
    np.testing.assert_allclose(runs[0], runs[1], atol=1e-12)


def estimate(problem, iterate):
    return iterate.extra.estimates[0]


def test_momentum_reduces_the_noise_of_the_estimates():
    problem = many_answers(sample=draw)
    start = start_of(problem)

    @jax.jit
    @jax.vmap
    def spread(eta):
        def end(key):
            # Still points: the noise is what is left.
            method = SingleLoopPenalty(1e-6, 1e-6, 0.2, momentum=eta, key=key)
            return trajectory(problem, method, start, estimate, steps=100, every=100)[
                1
            ][-1]

        keys = jax.random.split(jax.random.key(0), 200)
        return jnp.mean(jnp.var(jax.vmap(end)(keys), axis=0))

    averaged, plain = spread(jnp.array([0.1, 1.0]))
    # An average with weights eta (1 - eta)^k has variance eta / (2 - eta) = 0.053.
    assert 0.04 < averaged / plain < 0.07


def test_solves_to_the_order_of_sigma_and_certifies():
    problem = many_answers()
    answer = np.linalg.solve(
        A.T @ np.linalg.solve(G @ G.T, A) + np.eye(2) / 2,
        A.T @ np.linalg.solve(G @ G.T, G @ T),
    )
    method = Penalty(0.02, 0.25, 0.02, 2.0, 1.0, inner_steps=5)
    solution = solve(problem, method, start_of(problem), max_steps=4000, tol=0.05)
    assert solution.converged
    np.testing.assert_allclose(solution.x.x, answer, atol=0.05)
    assert solution.evaluations == 1 + 18 * solution.steps


def test_sets_are_honoured_and_their_adjoint_completed():
    cut = lambda v: jnp.clip(v, -1.0, 0.3)  # noqa: E731
    problem = BilevelProblem(
        lambda x, y: jnp.sum((y - 1) ** 2) / 2 + jnp.sum((x - 1) ** 2),
        lambda x, y: jnp.sum((y - jnp.array([2.0, 0.1]) * x) ** 2) / 2,
        project_y=cut,
    )
    method = Penalty(0.05, 0.5, 0.01, 2.0, 1.0, inner_steps=5)
    start = problem.point(jnp.array([0.8, 0.5]), jnp.zeros(2))
    solution = solve(problem, method, start, max_steps=3000, tol=0.02)
    # y_0 is at its bound and does not move with x; y_1 = x_1 / 10 does.
    assert solution.converged
    np.testing.assert_allclose(solution.x.x[0], 1.0, atol=0.02)
    np.testing.assert_allclose(solution.x.x[1], 2.1 / 2.01, atol=0.02)
    assert solution.x.y[0] == 0.3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Penalty(sigma=0.0), "Penalty: `sigma` must be positive"),
        (lambda: Penalty(averaging=1.2), r"`averaging` must lie in \(0, 1\]"),
        (lambda: Penalty(power=-1.0), "`power` must not be negative"),
        (
            lambda: SingleLoopPenalty(momentum=0.0),
            r"SingleLoopPenalty: `momentum` must lie in \(0, 1\]",
        ),
        (
            lambda: Penalty().begin(many_answers(sample=draw), start_of(PROBLEM)),
            "Penalty: a problem with `sample` needs `key`",
        ),
        (
            lambda: penalty_hypergradient(PROBLEM, X, jnp.zeros(3), -1.0),
            "penalty_hypergradient: `sigma` must be positive",
        ),
        (
            lambda: hypergradient_pinv(
                BilevelProblem(upper, lower, equality=lambda x, y: y), X, X
            ),
            "hypergradient_pinv: a constrained lower level needs `multipliers`",
        ),
        (
            lambda: Penalty().check(
                BilevelProblem(upper, lower, equality=lambda x, y: y)
            ),
            "Penalty: needs a lower level without constraints",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
