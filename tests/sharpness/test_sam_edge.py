"""The edge of stability: exact on quadratics, and the model whose curvature moves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan.sharpness import QuadraticRegression, normalised_eigenvalue, sam_edge, usam


@partial(jax.jit, static_argnames="momentum")
def after(eigenvalue, stepsize, rho, momentum=0.0):
    """Size of an iterate after many steps of the optimiser along one eigenvector."""
    method = usam(optax.sgd(stepsize, momentum=momentum), rho)

    def step(carry, _):
        x, state = carry
        gradient = lambda y, i=0: eigenvalue * y  # noqa: E731
        updates, state = method.update(gradient(x), state, x, grad_fn=gradient)
        return (x + updates, state), None

    start = jnp.ones_like(eigenvalue)
    (x, _), _ = jax.lax.scan(step, (start, method.init(start)), length=2000)
    return jnp.abs(x)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_is_exactly_where_steps_begin_to_grow(momentum):
    edge = sam_edge(0.05, 0.2, momentum=momentum)
    below, above = (
        after(factor * edge, 0.05, 0.2, momentum) for factor in (0.99, 1.01)
    )
    assert below < 1e-3 and above > 1e3


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.floats(1e-3, 1.0), st.floats(0.0, 1.0), st.floats(0.1, 10.0))
def test_solves_its_equation(stepsize, rho, grad_norm):
    edge = sam_edge(stepsize, rho)
    at_edge = normalised_eigenvalue(edge, stepsize, rho)
    np.testing.assert_allclose(at_edge, 2.0, rtol=1e-12)
    assert edge <= 2 / stepsize
    # SAM is unnormalised SAM of the radius over the gradient's norm.
    same = sam_edge(stepsize, rho / grad_norm)
    found = sam_edge(stepsize, rho, grad_norm=grad_norm)
    np.testing.assert_allclose(found, same, rtol=1e-12)


def test_small_radii_do_not_cancel():
    with jax.enable_x64(False):
        edges = sam_edge(jnp.float32(0.1), jnp.float32([0.0, 1e-7, 0.2]))
        assert edges.dtype == jnp.float32
        np.testing.assert_allclose(edges, [20.0, 20.0, 7.8078], rtol=1e-4)


def test_derivative_agrees_with_finite_differences():
    slope = jax.grad(sam_edge, argnums=1)(0.1, 0.2)
    step = 1e-5
    measured = (sam_edge(0.1, 0.2 + step) - sam_edge(0.1, 0.2 - step)) / (2 * step)
    np.testing.assert_allclose(slope, measured, rtol=1e-7)


def test_quadratic_model_is_what_it_says():
    model = QuadraticRegression(3, 6, 0.5, key=jax.random.key(0))
    theta = jnp.linspace(-1.0, 1.0, 6)
    np.testing.assert_array_equal(model.quadratic, jnp.swapaxes(model.quadratic, 1, 2))

    @jax.jit
    def look(theta):
        return (
            jax.jacfwd(model.residual)(theta),
            model.jacobian(theta),
            model.kernel(theta),
            jax.hessian(model)(theta),
            jnp.tensordot(model.residual(theta), model.quadratic, 1),
        )

    derivative, jacobian, kernel, hessian, curvature = look(theta)
    np.testing.assert_allclose(derivative, jacobian, rtol=1e-10)
    np.testing.assert_allclose(kernel, jacobian @ jacobian.T, rtol=1e-10)
    np.testing.assert_allclose(hessian, jacobian.T @ jacobian + curvature, atol=1e-10)


def test_sizes_of_the_model_are_per_row():
    model = QuadraticRegression(10, 40, 0.7, key=jax.random.key(1))
    theta = jax.random.normal(jax.random.key(2), (40,))
    theta = theta / jnp.linalg.norm(theta)
    rows = jnp.linalg.norm(model.linear, axis=1)
    change = jnp.linalg.norm(model.jacobian(theta) - model.linear, axis=1)
    # Means of 10 lengths of Gaussian vectors of 40 entries: within a tenth.
    np.testing.assert_allclose(jnp.mean(rows), 1.0, rtol=0.1)
    np.testing.assert_allclose(jnp.mean(change), 0.7, rtol=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sam_edge(0.0, 0.1), "`stepsize` must be positive"),
        (lambda: sam_edge(0.1, -0.1), "`rho` must not be negative"),
        (lambda: sam_edge(0.1, 0.1, grad_norm=0.0), "`grad_norm` must be positive"),
        (lambda: sam_edge(0.1, 0.1, momentum=1.0), "`momentum` must lie in"),
        (lambda: normalised_eigenvalue(1.0, -1.0, 0.1), "`stepsize` must be positive"),
        (
            lambda: QuadraticRegression(0, 3, key=jax.random.key(0)),
            "`d_out` must be at least 1",
        ),
        (
            lambda: QuadraticRegression(1, 3, -1.0, key=jax.random.key(0)),
            "`q_scale` must not be negative",
        ),
    ],
)
def test_values_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_traced_zero_gradient_has_edge_zero():
    edge = jax.jit(lambda size: sam_edge(0.1, 0.1, grad_norm=size))(0.0)
    assert float(edge) == 0.0
