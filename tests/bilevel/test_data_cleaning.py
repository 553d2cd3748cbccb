"""Data cleaning: the weights' gradient, minibatches, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.bilevel import data_cleaning, hypergradient


def losses(y, data):
    return (data[0] @ y - data[1]) ** 2


def problem_with(**settings):
    draw = np.random.default_rng(0)
    inputs = jnp.asarray(draw.standard_normal((6, 2)))
    targets = inputs @ jnp.array([1.0, -2.0])
    wrong = targets.at[0].add(5.0)
    return data_cleaning(
        losses, (inputs, wrong), (inputs[3:], targets[3:]), penalty=0.01, **settings
    )


def answer(problem, x):
    """Weighted ridge regression in closed form."""
    (inputs, targets), _ = problem.params[1]
    weights = jax.nn.sigmoid(x) / 6
    gram = inputs.T @ (weights[:, None] * inputs) + 0.01 * jnp.eye(2)
    return jnp.linalg.solve(gram, inputs.T @ (weights * targets))


def test_the_weights_gradient_is_that_of_weighted_regression():
    problem, x = problem_with(), jnp.linspace(-1.0, 1.0, 6)

    @jax.jit
    def both(x):
        direct = jax.grad(lambda x: problem.upper_value(x, answer(problem, x)))(x)
        y = answer(problem, x)
        return direct, hypergradient(problem, x, y, method="cg", tol=1e-14).value

    direct, found = both(x)
    np.testing.assert_allclose(found, direct, atol=1e-12)
    # Trusting the wrong sample costs, trusting the others gains on the whole.
    assert found[0] > 0 > jnp.sum(found[1:])


def test_minibatches_are_right_on_average():
    problem, x = problem_with(batch=(2, 3)), jnp.linspace(-1.0, 1.0, 6)
    y = jnp.array([0.5, 0.5])
    gradient = jax.grad(problem.lower_value)(x, y)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.jit(jax.vmap(lambda k: jax.grad(problem.draw(k).lower_value)(x, y)))(
        keys
    )
    deviation = drawn.std(0) / np.sqrt(4000)
    # Five standard errors.
    assert jnp.all(jnp.abs(drawn.mean(0) - gradient) < 5 * deviation)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="data_cleaning: `penalty` must not be neg"):
        data_cleaning(losses, jnp.ones(2), jnp.ones(2), penalty=-1.0)
    with pytest.raises(TypeError, match="data_cleaning: `losses` must be callable"):
        data_cleaning(3, jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match="`sizes` must be positive"):
        problem_with(batch=(0, 1))


def test_samples_without_a_weight_or_a_loss_of_their_own_are_named():
    problem, y = problem_with(), jnp.array([0.5, 0.5])
    # Not the weights of other samples.
    assert jnp.isnan(problem.lower_value(jnp.zeros(1), y))
    whole = data_cleaning(lambda y, data: jnp.sum(data), jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match="`losses` must return one number a sample"):
        whole.lower_value(jnp.zeros(2), y)
    for bad in ((jnp.ones(2), jnp.ones(3)), (jnp.ones(0),)):
        with pytest.raises(ValueError, match="`train` must have one leading axis"):
            data_cleaning(losses, bad, (jnp.ones(2),))
