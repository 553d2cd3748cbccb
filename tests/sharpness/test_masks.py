"""Masks and scales: what they mark, counted; and what a masked step perturbs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan.sharpness import (
    complement,
    elementwise_scale,
    layerwise_scale,
    norm_params,
    random_mask_like,
    sam,
    topk_mask,
)

W = {
    "Dense_0": {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.ones(2)},
    "LayerNorm_0": {"scale": jnp.array([1.0, -0.5]), "bias": jnp.array([0.2, 0.1])},
}
SLOPE = jax.tree.map(lambda leaf: leaf + 1.0, W)


def perturbation(method, params=W, gradient=SLOPE):
    """What a step adds to the weights where it takes its second gradient."""
    seen = []

    def grad_fn(point, i):
        seen.append(jax.tree.map(jnp.subtract, point, params))
        return gradient

    method.update(gradient, method.init(params), params, grad_fn=grad_fn)
    return seen[0]


def length(tree):
    return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))


class Net(eqx.Module):
    first: eqx.nn.Linear
    here: eqx.nn.LayerNorm
    norm_head: eqx.nn.Linear
    batch: eqx.nn.BatchNorm
    plain: eqx.nn.LayerNorm
    wrapped: eqx.nn.WeightNorm
    own_norm: jax.Array
    activation: object = jax.nn.relu

    def __call__(self, x):
        return self.activation(self.here(self.first(x)))

    def __init__(self):
        linear = eqx.nn.Linear(2, 2, key=jax.random.key(0))
        self.first = self.norm_head = linear
        self.here = eqx.nn.LayerNorm(2)
        self.batch = eqx.nn.BatchNorm(2, "batch", mode="batch")
        self.plain = eqx.nn.LayerNorm(2, use_weight=False, use_bias=False)
        self.wrapped = eqx.nn.WeightNorm(linear)
        self.own_norm = jnp.ones(3)


def test_equinox_layers_are_told_by_their_type():
    net = Net()
    params = eqx.filter(net, eqx.is_inexact_array)
    mask = norm_params(net)
    # Like the parameters, leaf by leaf, for the model as for its parameters.
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert jax.tree.leaves(norm_params(params)) == jax.tree.leaves(mask)
    assert mask.here.weight and mask.here.bias and mask.own_norm
    assert mask.batch.weight and mask.batch.bias
    others = (
        mask.first,
        mask.norm_head,
        mask.wrapped,
        mask.batch.batch_counter,
        mask.batch.batch_state_index,
    )
    assert not any(jax.tree.leaves(others))
    assert sum(jax.tree.leaves(mask)) == 5
    # A model of booleans can be called and yet is a tree.
    assert sum(jax.tree.leaves(complement(mask))) == len(jax.tree.leaves(mask)) - 5
    drawn = random_mask_like(mask, params, key=jax.random.key(0))
    assert sum(np.sum(leaf) for leaf in jax.tree.leaves(drawn)) == 4 * 2 + 3


@pytest.mark.parametrize(
    ("path", "marked"),
    [
        ("LayerNorm_0/scale", True),
        ("encoder/ln_1/bias", True),
        ("bn2/weight", True),
        ("rmsnorm/gamma", True),
        ("InstanceNorm/offset", True),
        ("block_norm1/w", True),
        ("subnet/kernel", False),
        ("normal_head/kernel", False),
        ("upscale/kernel", False),
        ("BatchNorm_0/mean", False),
        ("batch_stats/BatchNorm_0/var", False),
    ],
)
def test_other_trees_are_told_by_their_names(path, marked):
    params = {"norm": jnp.ones(1)}
    here = params
    *above, last = path.split("/")
    for name in above:
        here = here.setdefault(name, {})
    here[last] = jnp.ones(2)
    leaves = jax.tree.leaves(norm_params(params))
    assert sum(leaves) == 1 + marked
    del params["norm"]
    if not marked:
        with pytest.raises(ValueError, match=f"must hold some .*got {path}"):
            norm_params(params)


def test_own_names():
    params = {"kernel": jnp.ones(2), "affine": jnp.ones(2)}
    assert norm_params(params, names=["affine"]) == {"kernel": False, "affine": True}


def test_a_model_without_is_refused():
    with pytest.raises(ValueError, match=r"got one array.* Name the layers in `names`"):
        norm_params(jnp.ones(3))
    with pytest.raises(ValueError, match="got none"):
        norm_params({"count": jnp.arange(3)})


def test_masked_step_has_all_its_length_on_the_mask():
    e = perturbation(sam(optax.sgd(0.1), 0.7, mask=norm_params))
    assert not np.any(e["Dense_0"]["kernel"]) and not np.any(e["Dense_0"]["bias"])
    np.testing.assert_allclose(length(e), 0.7, rtol=1e-12)
    # Whatever the gradient is elsewhere.
    other = {**SLOPE, "Dense_0": jax.tree.map(lambda g: 50 * g, SLOPE["Dense_0"])}
    again = perturbation(sam(optax.sgd(0.1), 0.7, mask=norm_params), gradient=other)
    jax.tree.map(np.testing.assert_array_equal, e, again)


def test_all_and_nothing():
    def everything(params):
        return jax.tree.map(lambda _: True, params)

    whole = perturbation(sam(optax.sgd(0.1), 0.7))
    same = perturbation(sam(optax.sgd(0.1), 0.7, mask=everything))
    jax.tree.map(np.testing.assert_array_equal, whole, same)
    none = perturbation(sam(optax.sgd(0.1), 0.7, mask=complement(everything)))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(none))


def test_complement_of_arrays():
    mask = {"a": jnp.array([True, False]), "b": True}
    other = complement(mask)
    np.testing.assert_array_equal(other["a"], [False, True])
    assert other["b"] is False


def test_random_mask_has_the_size_and_no_preference():
    draw = jax.jit(jax.vmap(lambda key: random_mask_like(norm_params, W, key=key)))
    masks = draw(jax.random.split(jax.random.key(0), 4000))
    flat = np.concatenate(
        [leaf.reshape(4000, -1) for leaf in jax.tree.leaves(masks)], 1
    )
    assert np.all(flat.sum(1) == 4)
    # Each of 10 with probability 0.4: four deviations of 4000 draws are 0.031.
    np.testing.assert_allclose(flat.mean(0), 0.4, atol=0.031)
    with pytest.raises(ValueError, match="must have the structure"):
        random_mask_like({"a": True}, W, key=jax.random.key(0))


@jax.jit
def ranked(scores, ratio):
    tree = {"a": scores[:3], "b": scores[3:].reshape(2, 2)}
    return jax.tree.leaves(topk_mask(tree, ratio))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), min_size=7, max_size=7), st.integers(0, 7))
def test_topk_marks_that_many_of_the_largest(scores, count):
    scores = np.array(scores, float)
    found = np.concatenate([np.ravel(m) for m in ranked(scores, (count + 0.5) / 7.5)])
    count = int((count + 0.5) / 7.5 * 7)
    # The first of equals: a stable sort.
    expected = np.zeros(7, bool)
    expected[np.argsort(-scores, kind="stable")[:count]] = True
    np.testing.assert_array_equal(found, expected)


def test_topk_counts_exactly_and_leaves_out():
    scores = {"a": jnp.arange(100.0), "b": jnp.full((3,), 1e9, jnp.float32)}
    mask = topk_mask(scores, 0.29, maskable={"a": True, "b": False})
    assert int(mask["a"].sum()) == 29 and not np.any(mask["b"])
    assert bool(mask["a"][71:].all())
    assert int(topk_mask(scores, 1.0)["a"].sum()) == 100
    assert not np.any(topk_mask(scores, 1.0, maskable=False)["a"])
    for ratio in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"`ratio` must lie in \[0, 1\]"):
            topk_mask(scores, ratio)


def test_scales():
    sizes = elementwise_scale(W, eta=0.5)
    np.testing.assert_array_equal(sizes["LayerNorm_0"]["scale"], [1.5, 1.0])
    np.testing.assert_array_equal(sizes["LayerNorm_0"]["bias"], 1.0)
    shifted = elementwise_scale(W, shifts=True)["LayerNorm_0"]["bias"]
    np.testing.assert_array_equal(shifted, [0.2, 0.1])
    layer = layerwise_scale(W)["Dense_0"]
    np.testing.assert_allclose(layer["kernel"], np.sqrt(1 + 4 + 0.25 + 9))
    np.testing.assert_array_equal(layer["bias"], 1.0)
    for scale in (elementwise_scale, layerwise_scale):
        with pytest.raises(ValueError, match="`eta` must not be negative"):
            scale(W, eta=-1.0)


def test_adaptive_step_on_the_mask():
    """e = rho T^2 g / |T g| over the mask, and rho T sign(g) for p = inf."""
    method = sam
    e = perturbation(
        method(optax.sgd(0.1), 2.0, adaptive=elementwise_scale, mask=norm_params)
    )
    g = np.concatenate([SLOPE["LayerNorm_0"]["scale"], SLOPE["LayerNorm_0"]["bias"]])
    T = np.array([1.0, 0.5, 1.0, 1.0])
    expected = 2.0 * T**2 * g / np.linalg.norm(T * g)
    found = np.concatenate([e["LayerNorm_0"]["scale"], e["LayerNorm_0"]["bias"]])
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert not np.any(e["Dense_0"]["kernel"])
    e = perturbation(
        sam(optax.sgd(0.1), 2.0, p=np.inf, adaptive=layerwise_scale, mask=norm_params)
    )
    size = np.linalg.norm(W["LayerNorm_0"]["scale"])
    np.testing.assert_allclose(e["LayerNorm_0"]["scale"], 2.0 * size, rtol=1e-12)
