"""Group actions: identity, inverse, exactness on all inputs, and who may use them."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

from varan.sharpness import (
    DataDependentGL,
    EllipsoidRotation,
    GLLinear,
    OrthogonalRadial,
    RescaleReLU,
    linear_layers,
)


class Layer(NamedTuple):
    weight: Any
    bias: Any


def leaky(z):
    return jnp.where(z > 0, z, z / 10)


def radial(z):
    square = jnp.sum(z * z, axis=-1, keepdims=True)
    return z * square / (1 + square)


def linear(z):
    return z


# The same in NumPy, where nothing has to be compiled.
IN_NUMPY = {
    jax.nn.relu: lambda z: np.maximum(z, 0),
    leaky: lambda z: np.where(z > 0, z, z / 10),
    radial: lambda z: z * (q := np.sum(z * z, -1, keepdims=True)) / (1 + q),
    linear: linear,
}


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def net(widths, use_bias):
    sizes = enumerate(zip(widths[1:], widths[:-1], strict=True))
    return [
        Layer(draw(n, *shape), draw(9 + n, shape[0]) if use_bias else None)
        for n, shape in sizes
    ]


def outputs(layers, x, activation):
    x = np.asarray(x)
    for number, layer in enumerate(layers):
        if number:
            x = IN_NUMPY[activation](x)
        x = x @ np.asarray(layer.weight).T
        x = x if layer.bias is None else x + np.asarray(layer.bias)
    return x


X = draw(1, 5, 3)
EXACT = [
    (RescaleReLU(layers=list), jax.nn.relu),
    (RescaleReLU(leaky, list), leaky),
    (GLLinear(list), linear),
    (OrthogonalRadial(radial, list), radial),
]
exact = pytest.mark.parametrize(
    ("action", "activation"), EXACT, ids=["relu", "leaky", "linear", "radial"]
)


def element_of(action, params, size=0.2):
    identity = action.identity(params)
    leaves, structure = jtu.tree_flatten(identity)
    drawn = [size * draw(20 + n, *leaf.shape) for n, leaf in enumerate(leaves)]
    return identity, jtu.tree_unflatten(structure, drawn)


@exact
def test_exact_actions_keep_every_output_and_have_inverses(action, activation):
    params = net((3, 4, 6, 2), True)
    identity, element = element_of(action, params)
    act = jax.jit(lambda params, element: action.act(params, element, None))
    moved = act(params, element)
    assert float(jnp.max(jnp.abs(moved[0].weight - params[0].weight))) > 1e-2
    np.testing.assert_allclose(
        outputs(moved, X, activation), outputs(params, X, activation), atol=1e-12
    )
    back, same = act(moved, action.inverse(element)), act(params, identity)
    for found in (back, same):
        jtu.tree_map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, params
        )


@pytest.mark.parametrize(
    "action", [GLLinear(list), OrthogonalRadial(radial, list)], ids=["linear", "cayley"]
)
def test_curves_are_one_parameter_groups_to_the_second_order(action):
    # exp(2 t M) = exp(t M) exp(t M) up to O(t^3).
    params = net((3, 4, 2), False)
    _, direction = element_of(action, params, size=1.0)

    @jax.jit
    def defect(t):
        once = action.act(params, action.curve(direction, t), None)
        twice = action.act(once, action.curve(direction, t), None)
        straight = action.act(params, action.curve(direction, 2 * t), None)
        return jnp.linalg.norm(twice[0].weight - straight[0].weight)

    assert defect(jnp.asarray(1e-2)) < 0.15 * defect(jnp.asarray(2e-2))


def test_wide_data_dependent_action_is_exact_on_its_batch_and_nowhere_else():
    params = net((3, 7, 7, 2), False)
    action = DataDependentGL(leaky, list)
    identity, element = element_of(action, params, size=0.1)
    act = jax.jit(lambda params, element: action.act(params, element, (X,)))
    same = act(params, identity)
    for a, b in zip(same, params, strict=True):
        np.testing.assert_allclose(a.weight, b.weight, atol=1e-12)
    moved = act(params, element)
    np.testing.assert_allclose(
        outputs(moved, X, leaky), outputs(params, X, leaky), atol=1e-10
    )
    there_and_back = act(moved, action.inverse(element))
    np.testing.assert_allclose(there_and_back[0].weight, params[0].weight, atol=1e-12)
    np.testing.assert_allclose(
        outputs(there_and_back, X, leaky), outputs(params, X, leaky), atol=1e-10
    )
    fresh = X + 0.5
    assert not np.allclose(
        outputs(moved, fresh, leaky), outputs(params, fresh, leaky), atol=1e-3
    )


def test_narrow_data_dependent_action_is_the_papers_least_squares_fit():
    params = net((3, 2, 2), False)
    _, element = element_of(DataDependentGL(leaky, list), params)
    action = DataDependentGL(leaky, list)
    moved = jax.jit(lambda element: action.act(params, element, (X,)))(element)
    g = np.eye(2) + np.asarray(element[0])
    before = np.asarray(params[0].weight) @ np.asarray(X).T
    old, new = IN_NUMPY[leaky](before), IN_NUMPY[leaky](g @ before)
    wanted = np.asarray(params[1].weight) @ old @ np.linalg.pinv(new)
    np.testing.assert_allclose(moved[1].weight, wanted, atol=1e-10)


def test_rank_deficient_activations_are_seen():
    params = net((3, 4, 2), False)
    action = DataDependentGL(leaky, list)
    degenerate = jax.jit(lambda x: action.degenerate(params, (x,)))
    assert not degenerate(X)
    assert degenerate(jnp.asarray(np.tile(X[:1], (5, 1))))


def test_ellipsoid_rotations_keep_the_quadratic():
    A = np.array([[2.0, 0.5, 0], [0.5, 1, 0], [0, 0, 5]])
    center, w = np.array([1.0, -1, 0]), np.array([0.3, 2.0, 1])
    element = jnp.arange(9.0).reshape(3, 3)

    @jax.jit
    def there_and_back():
        action = EllipsoidRotation(jnp.asarray(A), jnp.asarray(center))
        moved = action.act(jnp.asarray(w), element, None)
        return moved, action.act(moved, action.inverse(element), None)

    moved, back = (np.asarray(part) for part in there_and_back())
    values = [(point - center) @ A @ (point - center) for point in (moved, w)]
    assert values[0] == pytest.approx(values[1], abs=1e-12)
    np.testing.assert_allclose(back, w, atol=1e-12)


def test_layers_of_a_model_are_found_through_its_structure():
    shapes = eqx.filter_eval_shape(eqx.nn.MLP, 3, 2, 4, 2, key=jax.random.key(0))
    model = jax.tree.map(
        lambda leaf: draw(0, *leaf.shape) if hasattr(leaf, "shape") else leaf, shapes
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    assert len(linear_layers(params)) == 3
    action = RescaleReLU()
    moved = action.act(params, element_of(action, params)[1], None)
    np.testing.assert_allclose(
        eqx.combine(moved, static)(X[0]), model(X[0]), atol=1e-12
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RescaleReLU(jnp.tanh), "positively homogeneous .*; tanh is not"),
        (lambda: OrthogonalRadial(jax.nn.relu), "radial .*; relu is not"),
        (
            lambda: RescaleReLU(layers=list).identity(net((3, 2), True)),
            "two or more layers",
        ),
        (
            lambda: GLLinear(list).identity(2 * net((3, 2), True)),
            r"as wide as the next one's input \(got weights of shapes",
        ),
        (
            lambda: DataDependentGL(leaky, list).identity(net((3, 2, 2), True)),
            r"must have no bias \(layer 0 has one\)",
        ),
        (lambda: EllipsoidRotation(-jnp.eye(2)), "positive definite"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
