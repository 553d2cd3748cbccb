"""The entropic cost and the Sinkhorn divergence as losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from varan.transport import cost_matrix, entropic_cost, sinkhorn_divergence

N, D, EPSILON = 7, 2, 0.2


def clouds(seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(N, D)), rng.normal(size=(N, D)) + 1
    a, b = rng.uniform(0.5, 1.5, N), rng.uniform(0.5, 1.5, N)
    return tuple(jnp.asarray(v) for v in (x, y, a / a.sum(), b / b.sum()))


@pytest.fixture(scope="module")
def loss():
    def both(x, y, a, b, epsilon):
        return jnp.stack(
            [
                entropic_cost(x, y, a, b, epsilon=epsilon, tol=1e-12),
                sinkhorn_divergence(x, y, a, b, epsilon=epsilon, tol=1e-12),
            ]
        )

    return jax.jit(both)


@pytest.fixture(scope="module")
def jacobian(loss):
    return jax.jit(jax.jacrev(loss, argnums=(0, 1, 2, 4)))


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_gradients_match_finite_differences(loss, jacobian, which):
    args = [*clouds(), jnp.asarray(EPSILON)]
    place = (0, 1, 2, 4)[which]
    rng = np.random.default_rng(which)
    direction = jnp.asarray(rng.normal(size=args[place].shape)) * 0.05
    if which == 2:  # the masses keep their sum
        direction = direction - direction.mean()

    def along(t):
        moved = [v + t * direction if i == place else v for i, v in enumerate(args)]
        return loss(*moved)

    h = 1e-3
    numeric = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
    got = jnp.tensordot(jacobian(*args)[which], direction, axes=direction.ndim)
    np.testing.assert_allclose(got, numeric, rtol=1e-7, atol=1e-10)


def test_second_derivative_is_right_too(jacobian):
    x, y, a, b = clouds(1)
    direction = jnp.asarray(np.random.default_rng(0).normal(size=x.shape))

    def slope(t):
        value = lambda x: entropic_cost(  # noqa: E731
            x, y, a, b, epsilon=EPSILON, tol=1e-12
        )
        return jnp.sum(jax.grad(value)(x + t * direction) * direction)

    compiled, h = jax.jit(slope), 1e-5
    numeric = (compiled(h) - compiled(-h)) / (2 * h)
    np.testing.assert_allclose(jax.jit(jax.grad(slope))(0.0), numeric, rtol=1e-6)


def test_divergence_is_a_divergence(loss):
    x, y, a, b = clouds(2)
    assert abs(float(loss(x, x, a, a, EPSILON)[1])) < 1e-12
    forward, back = loss(x, y, a, b, EPSILON)[1], loss(y, x, b, a, EPSILON)[1]
    np.testing.assert_allclose(forward, back, rtol=1e-9)
    assert float(forward) > 0
    # Under squared distances a shift by v adds |v|^2 to the divergence of equal clouds.
    shift = jnp.asarray([3.0, 4.0])
    np.testing.assert_allclose(loss(x, x + shift[None], a, a, EPSILON)[1], 25.0)
    order = np.random.default_rng(0).permutation(N)
    np.testing.assert_allclose(
        loss(x[order], y, a[order], b, EPSILON)[1], forward, rtol=1e-9
    )


def test_cost_lies_between_the_exact_one_and_its_entropy(loss):
    x, y, _, _ = clouds(3)
    even = jnp.full(N, 1 / N)
    matrix = np.asarray(cost_matrix(x, y))
    least = matrix[linear_sum_assignment(matrix)].mean()
    for epsilon in (1e-3, 0.1, 2.0):
        value = float(loss(x, y, even, even, epsilon)[0])
        assert least - 1e-9 <= value <= least + epsilon * np.log(N) + 1e-9
    np.testing.assert_allclose(loss(x, y, even, even, 1e5)[0], matrix.mean(), rtol=1e-4)


def test_costs():
    x, y, _, _ = clouds()
    by_hand = np.array([[np.sum((p - q) ** 2) for q in np.asarray(y)] for p in x])
    np.testing.assert_allclose(cost_matrix(x, y), by_hand)
    np.testing.assert_allclose(cost_matrix(x, y, "euclidean"), np.sqrt(by_hand))
    np.testing.assert_allclose(
        cost_matrix(x, y, lambda p, q: jnp.sum((p - q) ** 2)), by_hand
    )
    slope = jax.grad(lambda x: jnp.sum(cost_matrix(x, x, "euclidean")))(x)
    assert np.all(np.isfinite(slope))


def test_what_did_not_converge_is_nan_with_its_gradient():
    x, y, _, _ = clouds()
    value, slope = jax.value_and_grad(entropic_cost)(
        x, y, epsilon=1e-3, method="sinkhorn", max_steps=1
    )
    assert np.isnan(value) and np.all(np.isnan(slope))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((3, 2)), np.zeros((3, 1))), "must have shapes"),
        ((np.zeros(3), np.zeros(3)), "must have shapes"),
        ((np.zeros((0, 2)), np.zeros((3, 2))), "`x` must not be empty"),
        ((np.zeros((3, 2)), np.full((3, 2), np.nan)), "`y` must be finite"),
    ],
)
def test_bad_clouds_are_refused(arguments, message):
    for call in (entropic_cost, sinkhorn_divergence):
        with pytest.raises(ValueError, match=message):
            call(*arguments, epsilon=0.1)
    with pytest.raises(ValueError, match="`cost` must be one of"):
        cost_matrix(np.zeros((3, 2)), np.zeros((3, 2)), "manhattan")
    with pytest.raises(ValueError, match="`cost` must return a scalar"):
        cost_matrix(np.zeros((3, 2)), np.zeros((3, 2)), lambda x, y: x)
