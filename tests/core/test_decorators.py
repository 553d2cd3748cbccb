"""`custom_root`, `custom_fixed_point`: any solver, any parameters, or one sentence."""

import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.optimize

from varan.core import custom_fixed_point, custom_root, optimality
from varan.testing import assert_close, difference

X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)))
Y = jnp.asarray([1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0, -1.0])
DEFINITE = frozenset({"positive_semidefinite"})


def loss(w, X, y, lam):
    return jnp.mean(jax.nn.softplus(-y * (X @ w))) + lam * w @ w / 2


gradient = optimality.stationary(loss)
compiled_gradient = jax.jit(gradient)


def newton(start, X, y, lam):
    def step(_, w):
        hessian = jax.jacfwd(gradient)(w, X, y, lam)
        return w - jnp.linalg.solve(hessian, gradient(w, X, y, lam))

    return jax.lax.fori_loop(0, 12, step, start)


def scipy_root(start, X, y, lam):
    # Only concrete arrays pass through here: NumPy would refuse a tracer.
    X, y, lam = np.asarray(X), np.asarray(y), float(lam)
    return scipy.optimize.root(compiled_gradient, start, (X, y, lam), tol=1e-12).x


def descent(start, X, y, lam):
    def proceed(w):
        return jnp.linalg.norm(gradient(w, X, y, lam)) > 1e-12

    return jax.lax.while_loop(proceed, lambda w: w - gradient(w, X, y, lam), start)


START = jnp.zeros(3)
WANTED = difference(jax.jit(lambda lam: newton(START, X, Y, lam)), 0.3, 1.0)


@pytest.mark.parametrize("solver", [newton, descent, scipy_root])
def test_any_solver_has_the_derivative_of_its_condition(solver):
    function = custom_root(gradient, tags=DEFINITE)(solver)
    # SciPy runs outside jit, on concrete arrays alone.
    jit = (lambda f: f) if solver is scipy_root else jax.jit
    forward, reverse = (
        jit(jacobian(lambda lam: function(START, X, Y, lam)))
        for jacobian in (jax.jacfwd, jax.jacrev)
    )
    assert_close(forward(0.3), WANTED, 1e-8)
    assert_close(reverse(0.3), WANTED, 1e-8)


def slope(function):
    """The derivative in the penalty, compiled."""
    return jax.jit(jax.jacrev(lambda lam: function(START, X, Y, lam)))(0.3)


def test_fixed_point_form_has_the_same_derivative():
    condition = optimality.prox_grad(loss, lambda v, stepsize, *params: v, 0.5)
    function = custom_fixed_point(condition.map)(newton)
    assert_close(slope(function), WANTED, 1e-8)


def test_derivatives_with_respect_to_several_parameters_and_a_batch():
    function = custom_root(gradient)(newton)
    move = jnp.ones_like(X)

    @jax.jit
    @jax.vmap
    def slopes(lam):
        return jax.jvp(lambda X, lam: function(START, X, Y, lam), (X, lam), (move, 1.0))

    @jax.jit
    def moved(t):
        return newton(START, X + t * move, Y, 0.3 + t)

    answers, tangents = slopes(jnp.asarray([0.1, 0.3]))
    assert_close(answers[1], moved(0.0), 1e-10)
    assert_close(tangents[1], difference(moved, 0.0, 1.0), 1e-8)


def test_second_derivative_by_nesting():
    function = custom_root(gradient)(newton)
    first = jax.jit(jax.grad(lambda lam: function(START, X, Y, lam)[0]))
    got = jax.jit(jax.grad(first))(0.3)
    assert_close(got, difference(first, 0.3, 1.0), 1e-7)


def test_aux_is_handed_through_and_not_differentiated():
    @custom_root(gradient, has_aux=True)
    def function(start, X, y, lam):
        w = newton(start, X, y, lam)
        return w, {"loss": loss(w, X, y, lam), "steps": 12}

    w, aux = function(START, X, Y, 0.3)
    assert aux["steps"] == 12
    assert_close(aux["loss"], loss(w, X, Y, 0.3), 1e-12)
    got, tangents = jax.jvp(
        lambda lam: (lambda w, aux: (w, aux["loss"]))(*function(START, X, Y, lam)),
        (0.3,),
        (1.0,),
    )[1]
    assert_close(got, WANTED, 1e-8)
    assert tangents == 0.0


def test_pytrees_of_answers_and_parameters():
    # x' = a, y' = 2 b with the parameters and the answer in trees of other shapes.
    def condition(x, data):
        return {"p": x["p"] - data[0], "q": x["q"] - 2.0 * data[1]}

    @custom_root(condition)
    def function(start, data):
        return {"p": data[0], "q": 2.0 * data[1]}

    data = (jnp.asarray(1.0), jnp.asarray([2.0, 3.0]))
    got = jax.grad(lambda d: jnp.sum(function(None, d)["q"]) + function(None, d)["p"])
    assert_close(got(data), [1.0, 2.0, 2.0], 1e-12)


def test_integer_and_static_parameters_stand_beside_differentiable_ones():
    def condition(x, c, counts, power):
        return x**power - c * counts

    @custom_root(condition)
    def function(start, c, counts, power):
        return (c * counts) ** (1 / power)

    counts, power = jnp.asarray([1, 4]), 2

    def total(c, counts):
        return jnp.sum(function(None, c, counts.astype(float), power))

    assert_close(jax.grad(total)(4.0, counts), 0.5 / 2 + 2 * 0.5 / 2, 1e-12)

    def indexed(x, c, index):
        return x - c[index]

    pick = custom_root(indexed)(lambda start, c, index: c[index])
    c, index = jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([2, 0])
    got = jax.grad(lambda c: pick(None, c, index) @ jnp.asarray([1.0, 10.0]))(c)
    assert_close(got, [10.0, 0.0, 1.0], 1e-12)
    _, pullback = jax.vjp(lambda c, index: pick(None, c, index), c, index)
    assert pullback(jnp.ones(2))[1].dtype == jax.dtypes.float0


def test_arrays_closed_over_by_the_condition_are_differentiated():
    def answer(lam):
        @custom_root(lambda w, X: gradient(w, X, Y, lam))
        def function(start, X):
            return newton(start, X, Y, jax.lax.stop_gradient(lam))

        return function(START, X)

    for jacobian in (jax.jacfwd, jax.jacrev):
        assert_close(jax.jit(jacobian(answer))(0.3), WANTED, 1e-8)


def test_nothing_is_differentiated_with_respect_to_the_start():
    function = custom_root(gradient)(newton)
    got = jax.grad(lambda start: jnp.sum(function(start, X, Y, 0.3)))(START)
    assert_close(got, jnp.zeros(3), 0.0)


def test_wrong_structure_is_refused_by_name():
    @custom_root(lambda x, c: x[:1] - c)
    def two_numbers(start, c):
        return jnp.stack([c, c])

    with pytest.raises(ValueError, match="two_numbers: the condition must have as"):
        two_numbers(None, 1.0)


def test_solver_objects_without_a_name_work():
    function = custom_root(gradient)(functools.partial(newton))
    assert_close(slope(function), WANTED, 1e-8)


def test_certificate_tells_solutions_from_other_points():
    function = custom_root(gradient)(newton)
    good = function(START, X, Y, 0.3)
    assert function.certificate(good, X, Y, 0.3, tol=1e-9).met
    bad = good + 0.1
    certificate = function.certificate(bad, X, Y, 0.3, tol=1e-9)
    assert certificate.proof and not certificate.met
    # Strong convexity lam bounds the distance, never below the truth.
    distance = function.certificate(bad, X, Y, 0.3, strong_convexity=0.3)
    assert distance.value >= jnp.linalg.norm(bad - good)
    assert not function.certificate(bad * jnp.nan, X, Y, 0.3, tol=1e-9).met


@pytest.mark.parametrize("spoil", [0.1, jnp.nan])
def test_with_a_tolerance_what_is_no_solution_has_no_derivative(spoil):
    def spoilt(start, X, y, lam):
        return newton(start, X, y, lam) + spoil

    assert jnp.all(jnp.isnan(slope(custom_root(gradient, tol=1e-9)(spoilt))))


def test_with_a_tolerance_a_solution_has_its_derivative():
    assert_close(slope(custom_root(gradient, tol=1e-9)(newton)), WANTED, 1e-8)


def sum_is(x, c):
    return jnp.full(2, jnp.sum(x) - c)


def half(start, c):
    return jnp.full(2, c / 2)


def test_a_singular_jacobian_gives_nan_unless_told_what_is_meant():
    function = custom_root(sum_is)(half)
    got = jax.jit(jax.jacrev(lambda c: function(None, c)))(1.0)
    assert jnp.all(jnp.isnan(got))
    for settings, wanted in (
        ({"condition": sum_is, "unique": False}, 0.5),
        ({"condition": optimality.ridge(sum_is, 0.1)}, 1 / 2.1),
    ):
        function = custom_root(**settings)(half)
        got = jax.jit(jax.jacfwd(lambda c, f=function: f(None, c)))(1.0)
        assert_close(got, jnp.full(2, wanted), 1e-10)


@pytest.mark.parametrize(
    "linear_solver", [lx.LU(), lx.GMRES(1e-11, 1e-11), lx.BiCGStab(1e-11, 1e-11)]
)
def test_the_linear_solver_can_be_chosen(linear_solver):
    function = custom_root(gradient, linear_solver=linear_solver)(newton)
    assert_close(slope(function), WANTED, 1e-8)
