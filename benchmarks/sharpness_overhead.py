"""What each rule costs beyond its gradients: gradients a second, against plain SGD.

    python benchmarks/sharpness_overhead.py [--rounds 11]

The same perceptron on MNIST-1D, the same batches, and the same number of gradients of a
batch for all, each in one compiled loop: a rule that takes c a step makes 1/c of SGD's
steps, so that equal times mean no cost but the gradients. Every round runs all in a new
order; the ratio to SGD is taken within a round. Run it with one thread:
`OMP_NUM_THREADS=1 XLA_FLAGS=--xla_cpu_multi_thread_eigen=false`.
"""

import argparse
import random
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from varan.claims.sharpness._benchmark import TRAINING_LOSS, column, logits_fn
from varan.lab.race import ratio_interval
from varan.nets import MLPNet
from varan.sharpness import (
    amp,
    asam,
    dnsam,
    fad,
    fsam,
    gam,
    gr,
    grad_fn_from,
    gsam,
    looksam,
    lsam,
    norm_params,
    sam,
    tram,
    tram_fisher,
    usam,
    wasam,
)
from varan.train import epoch_batches

# Width, batch, gradients.
SIZES = ((128, 128, 1200), (512, 256, 240))
# Gradients of a batch a step, and the rule around its base.
RULES = {
    "sam": (2, sam),
    "sam, p = inf": (2, partial(sam, p=np.inf)),
    "sam, two ascents": (3, partial(sam, ascent_steps=2)),
    "sam, on norms": (2, partial(sam, mask=norm_params)),
    "asam": (2, asam),
    "usam": (2, usam),
    "lsam": (2, lsam),
    "gsam": (2, gsam),
    "wasam": (2, wasam),
    "looksam": (1.2, looksam),
    "fsam": (2, partial(fsam, fisher="batch")),
    "gr, forward": (2, partial(gr, gamma=0.1)),
    "gr, central": (3, partial(gr, gamma=0.1, scheme="central")),
    "gr, exact": (3, partial(gr, gamma=0.1, scheme="exact")),
    "amp": (2, amp),
    "amp, each tensor": (2, partial(amp, ball="leaf")),
    "gam": (4, gam),
    "fad": (4, fad),
    "dnsam": (3, dnsam),
    "tram": (2, partial(tram, distance="input")),
    "tram, Fisher": (3, tram_fisher),
}


def start(width):
    return MLPNet(40, 10, (width,) * 2, key=jax.random.key(0))


def batches(samples, size, steps):
    epochs = -(-steps // (samples // size))
    keys = jax.random.split(jax.random.key(1), epochs)
    return jnp.concatenate([epoch_batches(key, samples, size) for key in keys])[:steps]


def loop(name, cost, make, width, size, gradients):
    """A compiled training of `gradients // cost` steps, and the gradients it takes."""
    x, y = column("clean", 0).train
    order = batches(len(y), size, int(gradients / cost))
    base = optax.sgd(0.05, momentum=0.9)
    optimiser = base if make is None else make(base)

    @jax.jit
    def run(params, order):
        def step(carry, chosen):
            params, state = carry
            batch = x[chosen], y[chosen]
            grad = jax.grad(TRAINING_LOSS)(params, batch)
            more = {} if make is None else extras(name, params, batch)
            updates, state = optimiser.update(grad, state, params, **more)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimiser.init(params)), order)
        return params

    call = partial(run, start(width), order)
    jax.block_until_ready(call())  # compiled here, and not timed
    return call


def extras(name, params, batch):
    """What the rule's `update` is given."""
    grad_fn = grad_fn_from(TRAINING_LOSS, batch)
    found = {"grad_fn": grad_fn}
    if name == "dnsam":
        # Of another batch: the same one's gradient would not be taken twice.
        other = (2 * batch[0], batch[1])
        found["full_grad_fn"] = jax.grad(lambda params: TRAINING_LOSS(params, other))
    noisy = lambda noise: (noise(batch[0]), batch[1])  # noqa: E731
    if name == "tram":
        found["logits_fn"] = lambda params, noise: logits_fn(params, noisy(noise)[0])
    if name == "tram, Fisher":
        found["noisy_grad_fn"] = lambda params, noise: jax.grad(TRAINING_LOSS)(
            params, noisy(noise)
        )
    return found


def race(width, size, gradients, rounds):
    """Ratios of a rule's time to SGD's, one a round, by name."""
    calls = {"SGD": loop("SGD", 1, None, width, size, gradients)}
    for name, (cost, make) in RULES.items():
        calls[name] = loop(name, cost, make, width, size, gradients)
    ratios = {name: [] for name in RULES}
    names, shuffle = list(calls), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(names)
        times = {}
        for name in names:
            begin = time.process_time()
            jax.block_until_ready(calls[name]())
            times[name] = time.process_time() - begin
        for name in RULES:
            ratios[name].append(times[name] / times["SGD"])
    return ratios


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    found = [race(*size, arguments.rounds) for size in SIZES]
    heads = [f"40-{width}-{width}-10, batches of {size}" for width, size, _ in SIZES]
    print("| rule | gradients a step | " + " | ".join(heads) + " |")
    print("| --- " * (2 + len(heads)) + "|")
    for name, (cost, _) in RULES.items():
        cells = []
        for ratios in found:
            middle, low, high = ratio_interval(ratios[name])
            cells.append(f"{middle:.2f} [{low:.2f}, {high:.2f}]")
        print(f"| {name} | {cost} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
