"""Hypergradients against closed forms and finite differences, and their bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from varan import Newton, Smooth, solve
from varan.bilevel import (
    BilevelProblem,
    hypergradient,
    hypergradient_error_bound,
)

RNG = np.random.default_rng(0)
HALF = RNG.standard_normal((4, 4))
HESSIAN = jnp.asarray(HALF @ HALF.T / 4 + np.eye(4))
MIXED = jnp.asarray(RNG.standard_normal((4, 3)))
TARGET = jnp.asarray(RNG.standard_normal(4))
X = jnp.array([0.5, -1.0, 0.2])


def upper(x, y):
    return jnp.sum((y - TARGET) ** 2) / 2 + jnp.sum(jnp.cos(x))


QUADRATIC = BilevelProblem(upper, lambda x, y: y @ HESSIAN @ y / 2 - y @ MIXED @ x)
# Strongly convex with modulus 1; the softplus term's second and third derivatives
# are at most 1/4 and 1 / (6 sqrt 3) entry by entry.
CURVED = BilevelProblem(
    upper,
    lambda x, y: jnp.sum(y**2) / 2 + jnp.sum(jax.nn.softplus(y)) - y @ MIXED @ x,
)


def answer(x):
    return jnp.linalg.solve(HESSIAN, MIXED @ x)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("implicit", {}),
        ("cg", {"tol": 1e-12}),
        ("neumann", {"stepsize": 0.2, "max_steps": 200}),
        ("unroll", {"stepsize": 0.2, "max_steps": 200}),
    ],
)
def test_methods_agree_with_the_reduced_gradient(method, settings):
    exact = jax.grad(lambda x: upper(x, answer(x)))(X)
    found = jax.jit(
        lambda x, y: hypergradient(QUADRATIC, x, y, method=method, **settings).value
    )(X, answer(X))
    # Twice the steps' contraction factor to the power 200 is below 1e-8 here.
    np.testing.assert_allclose(found, exact, atol=1e-7)


def test_few_terms_are_worse_than_many():
    exact = hypergradient(QUADRATIC, X, answer(X)).value
    settings = {"method": "neumann", "stepsize": 0.2}
    errors = [
        jnp.linalg.norm(
            hypergradient(QUADRATIC, X, answer(X), **settings, max_steps=k).value
            - exact
        )
        for k in (2, 10, 50)
    ]
    assert errors[0] > errors[1] > errors[2]


def constrained_problem():
    return BilevelProblem(
        upper,
        lambda x, y: y @ HESSIAN @ y / 2 - y @ MIXED @ x,
        equality=lambda x, y: (jnp.sum(y) - x[0])[None],
        inequality=lambda x, y: y[:2] - 0.1 * x[1:],
    )


def constrained_answer(x):
    """By enumeration of the active sets of the two inequalities, in NumPy."""
    x, G = np.asarray(x), np.eye(4)[:2]
    hessian, mixed = np.asarray(HESSIAN), np.asarray(MIXED)
    for active in ([], [0], [1], [0, 1]):
        rows = np.concatenate([np.ones((1, 4)), G[active]])
        right = np.concatenate([x[:1], 0.1 * x[1:][active]])
        m = rows.shape[0]
        kkt = np.block([[hessian, rows.T], [rows, np.zeros((m, m))]])
        both = np.linalg.solve(kkt, np.concatenate([mixed @ x, right]))
        y, multipliers = both[:4], np.zeros(3)
        multipliers[[0, *(1 + i for i in active)]] = both[4:]
        if np.all(y[:2] <= 0.1 * x[1:] + 1e-12) and np.all(multipliers[1:] >= 0):
            return jnp.array(y), jnp.array(multipliers)
    raise AssertionError


def test_implicit_honours_constraints():
    problem = constrained_problem()
    y, multipliers = constrained_answer(X)
    assert float(jnp.sum(jnp.abs(multipliers[1:]))) > 0, "a constraint is active"
    found = jax.jit(lambda m: hypergradient(problem, X, y, multipliers=m))(multipliers)
    assert found.residual < 1e-12
    h = 1e-6
    for i in range(3):
        e = h * jnp.eye(3)[i]
        ahead, behind = (upper(x, constrained_answer(x)[0]) for x in (X + e, X - e))
        np.testing.assert_allclose(
            found.value[i], (ahead - behind) / (2 * h), atol=1e-7
        )


def test_implicit_honours_a_set():
    problem = BilevelProblem(
        upper,
        lambda x, y: jnp.sum((y - MIXED @ x) ** 2) / 2,
        project_y=lambda y: jnp.clip(y, -0.3, 0.3),
    )
    follow = lambda x: jnp.clip(MIXED @ x, -0.3, 0.3)  # noqa: E731
    exact = jax.grad(lambda x: upper(x, follow(x)))(X)
    np.testing.assert_allclose(
        hypergradient(problem, X, follow(X)).value, exact, atol=1e-12
    )


def test_singular_lower_level_gives_nan_unless_the_upper_level_does_not_care():
    flat = lambda x, y: (y[0] - x[0]) ** 2  # noqa: E731
    y = jnp.array([0.5, 3.0])
    blind = BilevelProblem(lambda x, y: y[0] ** 2, flat, unique=False)
    picky = BilevelProblem(lambda x, y: y[1] ** 2, flat, unique=False)
    strict = BilevelProblem(lambda x, y: y[0] ** 2, flat)
    x = jnp.array([0.5])
    np.testing.assert_allclose(hypergradient(blind, x, y).value, [1.0], atol=1e-10)
    assert jnp.isnan(hypergradient(picky, x, y).value[0])
    assert jnp.isnan(hypergradient(strict, x, y).value[0])


@pytest.fixture(scope="module")
def curved_answer():
    problem = Smooth(lambda y: CURVED.lower_value(X, y))
    return solve(problem, Newton(), jnp.zeros(4), tol=1e-12).x


def test_second_derivatives_nest():
    value = lambda x: jnp.sum(jnp.sin(hypergradient(QUADRATIC, x, answer(x)).value))  # noqa: E731
    check_grads(jax.jit(value), (X,), order=1, modes=["rev"])


@pytest.mark.parametrize("method", ["implicit", "cg"])
def test_the_error_bound_is_never_below_the_error(curved_answer, method):
    @jax.jit
    @jax.vmap
    def found_and_bound(y):
        found = hypergradient(CURVED, X, y, method=method, max_steps=2)
        bound = hypergradient_error_bound(
            CURVED,
            found,
            strong_convexity=1.0,
            upper_x=0.0,
            upper_y=1.0,
            hessian=1 / (6 * 3**0.5),
            cross=0.0,
        )
        assert bound.proof
        return found.value, bound.value

    directions = np.random.default_rng(1).standard_normal((6, 4))
    sizes = np.array([0.0, 1e-8, 1e-3, 1e-1, 1.0, 3.0])
    found, bound = found_and_bound(curved_answer[None] + sizes[:, None] * directions)
    exact = jax.grad(CURVED.upper_value)(X, curved_answer) + MIXED.T @ (
        jax.grad(CURVED.upper_value, argnums=1)(X, curved_answer)
        / jax.vmap(jax.hessian(lambda v: v**2 / 2 + jax.nn.softplus(v)))(curved_answer)
    )
    errors = np.linalg.norm(np.asarray(found) - np.asarray(exact), axis=1)
    # The answer itself is known to about 1e-12.
    assert np.all(errors <= bound + 1e-11)
    if method == "implicit":
        assert bound[0] < 1e-9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hypergradient(QUADRATIC, X, TARGET, method="magic"), "must be one of"),
        (lambda: hypergradient(QUADRATIC, X, TARGET, method="neumann"), "`stepsize`"),
        (lambda: hypergradient(constrained_problem(), X, TARGET), "`multipliers`"),
        (
            lambda: hypergradient(constrained_problem(), X, TARGET, method="cg"),
            "without constraints",
        ),
        (
            lambda: hypergradient(
                constrained_problem(), X, TARGET, method="unroll", stepsize=0.1
            ),
            "cannot take constraints",
        ),
        (
            lambda: hypergradient_error_bound(
                QUADRATIC,
                hypergradient(QUADRATIC, X, TARGET),
                strong_convexity=0.0,
                upper_x=0.0,
                upper_y=1.0,
                hessian=0.0,
                cross=0.0,
            ),
            "`strong_convexity` must be positive",
        ),
        (
            lambda: hypergradient_error_bound(
                QUADRATIC,
                hypergradient(QUADRATIC, X, TARGET),
                strong_convexity=1.0,
                upper_x=-1.0,
                upper_y=1.0,
                hessian=0.0,
                cross=0.0,
            ),
            "`upper_x` must not be negative",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_point_with_nan_has_no_hypergradient():
    # Affine gradients do not see it: their derivatives are constant.
    problem = BilevelProblem(
        lambda x, y: jnp.sum(y), lambda x, y: jnp.sum((y - 2 * x) ** 2)
    )
    one = jnp.ones(2)
    with pytest.raises(ValueError, match="hypergradient: `x` must be finite"):
        hypergradient(problem, jnp.nan * one, one)
    value = jax.jit(lambda x: hypergradient(problem, x, one, method="cg").value)
    assert bool(jnp.all(jnp.isnan(value(jnp.nan * one))))
    assert bool(jnp.all(jnp.isfinite(value(one))))
