"""The distance of a response from training: never above the truth, zero at it."""

import equinox as eqx
import jax
import jax.numpy as jnp

from varan.bilevel import HyperLinear, Hyperparameter, best_response_error

KEY = jax.random.key(0)


def test_the_estimate_never_exceeds_the_distance_to_the_minimiser():
    # One weight, no regularisation: the minimiser is 2 whatever h is.
    inputs = jnp.linspace(-1.0, 1.0, 8)[:, None]
    spec = {"none": Hyperparameter(0.0)}

    def loss(model, batch, h, values, key):
        return jnp.mean((jax.vmap(model)(batch, h) - 2 * batch) ** 2)

    model = HyperLinear(1, 1, 1, key=KEY)
    certify = lambda model, stepsize: best_response_error(  # noqa: E731
        KEY, model, jnp.zeros(1), spec, loss, inputs, stepsize=stepsize
    )
    draws = jax.random.split(KEY, 4)
    truth = []
    for draw in draws:
        for_h, _ = jax.random.split(draw)
        h = 0.5 * jax.random.normal(for_h, (1, 1))[0]
        plain = model.response(h)
        start = jnp.array([plain.weight[0, 0], plain.bias[0]])
        away = jnp.linalg.norm(start - jnp.array([2.0, 0.0]))
        truth.append(away / jnp.linalg.norm(start))
    short, long = certify(model, 0.01), certify(model, 0.5)
    assert not short.proof
    assert 0 < short.value < long.value <= jnp.mean(jnp.array(truth)) + 1e-9
    # A response that is the minimiser does not move.
    exact = eqx.tree_at(
        lambda n: (n.base.weight, n.scale),
        jax.tree.map(lambda leaf: 0 * leaf if eqx.is_array(leaf) else leaf, model),
        (jnp.full((1, 1), 2.0), jnp.ones(())),
    )
    assert float(certify(exact, 0.5).value) < 1e-12
