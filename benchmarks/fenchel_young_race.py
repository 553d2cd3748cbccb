"""Race: sparse activations, their losses and perturbed optimisers against jaxopt.

Sparsemax and its loss with gradient on vectors of growing size, alone and in a batch of
256; entmax at 1.5 beside them (jaxopt has none). Softmax regression on digits with
the sparsemax loss, value and gradient of all 1797 images. The perturbed argmax, value
and Jacobian-vector product; there the spread of the estimates is printed beside the
times, since error is what samples buy. float32, compiled; compile time apart.

    python benchmarks/fenchel_young_race.py [--repeats 15]
"""

import argparse
import warnings

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from varan.fenchel_young import Tsallis, entmax, perturbed_argmax, sparsemax
from varan.lab.race import compile_time, race
from varan.operators import project_simplex

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jaxopt.loss import multiclass_sparsemax_loss
    from jaxopt.perturbations import make_perturbed_argmax
    from jaxopt.projection import projection_simplex

KEY = jax.random.key(0)


def show(title, functions, args, repeats):
    """Races compiled functions of the same arguments; the peer is the reference."""
    compiled = {name: jax.jit(f) for name, f in functions.items()}
    runs = {name: lambda f=f: f(*args) for name, f in compiled.items()}
    result = race(runs, repeats=repeats, warmup=3, reference="jaxopt")
    print(f"\n{title}\n{result.table()}", flush=True)
    answer = result.answers["jaxopt"]
    for name, other in result.answers.items():
        if "entmax" not in name:
            gaps = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), answer, other)
            print(f"  {name}: at most {max(map(float, jax.tree.leaves(gaps))):.0e} off")


def activations(repeats):
    functions = {
        "jaxopt": projection_simplex,
        "varan sparsemax": sparsemax,
        "varan project_simplex": project_simplex,
        "varan entmax 1.5": entmax,
    }
    for size in (10, 100, 1000, 10_000):
        scores = jax.random.normal(KEY, (256, size))
        show(f"sparsemax, n = {size}", functions, (scores[0],), repeats)
        batch = {name: jax.vmap(f) for name, f in functions.items()}
        show(f"sparsemax, 256 of n = {size}", batch, (scores,), repeats)


def losses(repeats):
    def ours(label, scores):
        target = jax.nn.one_hot(label, scores.size, dtype=scores.dtype)
        return Tsallis(2.0).loss(scores, target)

    def theirs_in_optax(label, scores):
        return optax.losses.multiclass_sparsemax_loss(scores[None], label[None])[0]

    functions = {
        "jaxopt": multiclass_sparsemax_loss,
        "optax": theirs_in_optax,
        "varan": ours,
    }
    for size in (10, 1000):
        scores = jax.random.normal(KEY, (256, size))
        labels = jnp.arange(256) % size
        derived = {n: jax.value_and_grad(f, 1) for n, f in functions.items()}
        show(f"loss and gradient, n = {size}", derived, (labels[0], scores[0]), repeats)
        batch = {n: jax.vmap(f) for n, f in derived.items()}
        show(f"loss and gradient, 256 of n = {size}", batch, (labels, scores), repeats)

    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images / 16, jnp.float32)
    labels = jnp.asarray(labels)
    weights = 0.1 * jax.random.normal(KEY, (64, 10))

    def regression(loss):
        def mean(weights):
            return jnp.mean(jax.vmap(loss)(labels, images @ weights))

        return jax.value_and_grad(mean)

    digits = {name: regression(f) for name, f in functions.items()}
    show("digits, loss and gradient of all images", digits, (weights,), repeats)


def top(x):
    return jax.nn.one_hot(jnp.argmax(x), x.size, dtype=x.dtype)


def ranks(x):
    return jnp.argsort(jnp.argsort(x)).astype(x.dtype)


def pulled_back(function):
    """A vector-Jacobian product, as a training step takes it."""

    def gradient(x, key):
        return jax.vjp(lambda u: function(u, key), x)[1](x)[0]

    return gradient


def perturbations(repeats):
    settings = {"sigma": 0.3}
    for name, argmax in (("one-hot", top), ("ranks", ranks)):
        functions = {
            "jaxopt": make_perturbed_argmax(argmax, 1000, **settings),
            "jaxopt, control variate": make_perturbed_argmax(
                argmax, 1000, control_variate=True, **settings
            ),
            "varan": perturbed_argmax(argmax, **settings),
        }
        x = jax.random.normal(KEY, (32, 20))
        keys = jax.random.split(KEY, 32)
        show(f"perturbed {name}, value", functions, (x[0], KEY), repeats)

        derived = {n: pulled_back(f) for n, f in functions.items()}
        # The estimators differ, so the answers do: their spread is compared below.
        for title, fs, args in (
            ("gradient", derived, (x[0], KEY)),
            ("gradient, 32", {n: jax.vmap(f) for n, f in derived.items()}, (x, keys)),
        ):
            show(f"perturbed {name}, {title}", fs, args, repeats)
        many = jax.random.split(KEY, 200)
        for n, f in derived.items():
            draws = jax.jit(jax.vmap(f, (None, 0)))(x[0], many)
            spread = float(jnp.sqrt(jnp.sum(jnp.var(draws, 0))))
            print(f"  {n}: standard error of the gradient {spread:.3g}")


def compiling():
    x = jnp.zeros(1000)
    print("\nseconds to compile value and Jacobian-vector product")
    for name, f in {
        "jaxopt sparsemax": projection_simplex,
        "varan sparsemax": sparsemax,
        "varan entmax 1.5": entmax,
        "jaxopt perturbed": lambda x: make_perturbed_argmax(top, 1000)(x, KEY),
        "varan perturbed": lambda x: perturbed_argmax(top)(x, KEY),
    }.items():
        seconds = compile_time(lambda x, f=f: jax.jvp(f, (x,), (x,)), x)
        print(f"  {name}: {seconds.total:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    activations(repeats)
    losses(repeats)
    perturbations(repeats)
    compiling()


if __name__ == "__main__":
    main()
