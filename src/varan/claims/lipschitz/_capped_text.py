"""Transformers trained on characters, with caps and without."""

from __future__ import annotations

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from varan.claims import Curve
from varan.data import source_characters
from varan.lipschitz import (
    LipschitzTransformer,
    lipschitz_bound,
    rms_cap,
    rms_muon,
    spectral_cap,
)

# How often a run's weights are kept, to be certified.
LOGS = 6
_RATES = {"adamw": 3e-3, "muon": 0.1}
_TABLE_RATE, _DECAY = 3e-3, 0.1


def optimiser(name, rate, strength, steps):
    """An optimiser with its constraint, as `"muon-soft"` names them."""
    base, constraint = name.split("-")
    schedule = optax.linear_schedule(rate, 0.0, steps)
    decay = strength if constraint == "decay" else 0.0
    if base == "muon":
        step = rms_muon(schedule, weight_decay=decay)
    else:
        step = optax.adamw(schedule, weight_decay=decay)
    if constraint == "decay":
        return step
    return optax.chain(step, spectral_cap(strength, constraint))


def transformers(scale, seed):
    """Capped transformers of given bounds, and a free one by AdamW."""
    numbers_of_text, symbols = source_characters(scale["characters"])
    held_out = len(numbers_of_text) // 10
    text, test = numbers_of_text[:-held_out], numbers_of_text[-held_out:]
    time = scale["context"]
    rows = len(test) // (time + 1)
    rows = test[: rows * (time + 1)].reshape(rows, time + 1)[: scale["test_rows"]]
    common = float(np.mean(rows[:, 1:] == np.bincount(test).argmax()))
    start = LipschitzTransformer(
        len(symbols),
        blocks=scale["blocks"],
        heads=scale["heads"],
        width=scale["text_width"],
        key=jax.random.key(seed),
    )
    steps, batch = scale["text_steps"], scale["text_batch"]
    places = np.random.default_rng(seed).integers(len(text) - time, size=(steps, batch))
    batches = text[places[..., None] + np.arange(time + 1)]
    numbers, curves, finite, overshoot = {}, [], True, 0.0
    runs = [("muon-soft", bound) for bound in scale["text_bounds"]]
    for name, bound in [*runs, ("adamw-decay", None)]:
        strength = _DECAY if bound is None else cap_for(bound, start)
        logged, losses, right = train_transformer(
            name, np.float32(strength), start, batches, rows
        )
        bounds = [float(lipschitz_bound(model).value) for model in logged]
        finite = finite and bool(jnp.all(jnp.isfinite(losses)))
        label = "text_free" if bound is None else f"text_{bound:g}"
        numbers[label + "_accuracy"] = float(right)
        numbers[label + "_bound"] = bounds[-1]
        if bound is not None:
            overshoot = max(overshoot, max(bounds) / bound)
        curves.append(
            Curve(
                np.arange(1, len(losses) + 1).tolist(),
                np.asarray(losses).tolist(),
                name if bound is None else f"{name}, bound {bound:g}",
                "text: training",
                "steps",
                "loss (nats a character)",
            )
        )
    lowest = f"text_{min(scale['text_bounds']):g}_accuracy"
    return {
        **numbers,
        "text_common": common,
        "text_gain": numbers[lowest] - common,
        "text_overshoot": overshoot,
        "text_finite": float(finite),
    }, curves


def cap_for(bound, model):
    """The cap with which a transformer of that shape has that bound (bisection)."""
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (low, middle) if model.capped_bound(middle) > bound else (middle, high)
        )
    return low


@partial(jax.jit, static_argnums=0)
def train_transformer(name, strength, model, batches, rows):
    """Logged models, losses, and the accuracy on the held-out rows."""
    steps = len(batches)
    method = optimiser(name, _RATES[name.split("-")[0]], strength, steps)
    if name.startswith("muon"):
        schedule = optax.linear_schedule(_TABLE_RATE, 0.0, steps)
        table = optax.chain(optax.adam(schedule), rms_cap(1.0))
        parts = jax.tree.map(lambda _: "matrix", model)
        parts = eqx.tree_at(lambda m: m.embedding, parts, "table")
        method = optax.partition({"matrix": method, "table": table}, lambda _: parts)

    def text_loss(model, rows):
        logits = jax.vmap(model)(rows[:, :-1])
        each = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
        return jnp.mean(each)

    def step(carry, chosen):
        model, state = carry
        value, slope = jax.value_and_grad(text_loss)(model, chosen)
        change, state = method.update(slope, state, model)
        return (optax.apply_updates(model, change), state), value

    def stretch(carry, batches):
        carry, losses = jax.lax.scan(step, carry, batches)
        return carry, (carry[0], losses)

    stretches = batches.reshape(LOGS, -1, *batches.shape[1:])
    start = (model, method.init(model))
    (model, _), (logged, losses) = jax.lax.scan(stretch, start, stretches)
    right = jnp.argmax(jax.vmap(model)(rows[:, :-1]), -1) == rows[:, 1:]
    logged = [jax.tree.map(lambda leaf, i=i: leaf[i], logged) for i in range(LOGS)]
    return logged, losses.ravel(), jnp.mean(right)
