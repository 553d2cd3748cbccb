"""A Flax model, with its nested dictionaries of parameters, in a loop of its own."""

import jax
import jax.numpy as jnp
import optax
import pytest

from varan.sharpness import elementwise_scale, norm_params, sam

linen = pytest.importorskip("flax.linen")


@pytest.fixture(autouse=True)
def standard_promotion():
    """Flax's normalisation promotes float64 itself."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Classifier(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.LayerNorm(param_dtype=x.dtype)(linen.Dense(8, param_dtype=x.dtype)(x))
        return linen.Dense(2, param_dtype=x.dtype)(linen.relu(x))


def test_a_flax_model_trains_with_its_norms_perturbed():
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (64, 3))
    y = (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)
    model = Classifier()
    params = jax.jit(model.init)(keys[1], x)["params"]
    method = sam(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.03)),
        optax.linear_schedule(0.5, 0.1, 100),
        adaptive=elementwise_scale,
        mask=norm_params,
    )

    def loss(params):
        logits = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def train(params):
        def one(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = method.update(
                gradient, state, params, grad_fn=lambda p, i: jax.grad(loss)(p)
            )
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(one, (params, method.init(params)), length=100)

    (_, state), values = train(params)
    assert values[-1] < 0.2 * values[0]
    assert int(state.grad_evals) == 200
    marked = norm_params(params)
    assert marked["LayerNorm_0"] == {"scale": True, "bias": True}
    assert sum(jax.tree.leaves(marked)) == 2
