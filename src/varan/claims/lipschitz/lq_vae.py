"""Bits for latents make an autoencoder a filter that attacks do not pass.

Claim: a filter through a quantised latent space, trained without the classifier and
without attacks, restores a classifier's accuracy under several attacks, at the price
of one evaluation.

Kept: the encoder, both decoders, their losses and optimiser; FGSM, projected gradients
in both norms and transferred examples, made against the classifier alone; classifiers
trained on clean and on filtered data; and, beyond the paper, attacks that know the
filter. Given up: image data sets and convolutions (digits and perceptrons), Defense-GAN
and MagNet (a plain variational autoencoder, an autoencoder and a median filter).

Refuted by: a filter no better than a plain autoencoder of the same size against an
attacker who ignores it; the certificate by an output that changes within its radius.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from varan.claims import Curve, Measurements
from varan.data import digit_images
from varan.lipschitz import LQVAE
from varan.metrics import accuracy, fgsm, pgd
from varan.train import start_training, train_epochs

_INPUTS, _CLASSES, _TEST, _LATENTS = 64, 10, 360, 32
_BATCH, _RATE, _WEIGHT, _RANGE = 64, 3e-4, 10.0, (-1.0, 1.0)
_ADAM = optax.adam(1e-3)
_RMSPROP = optax.rmsprop(optax.exponential_decay(_RATE, 10_000, 0.98))
_GENTLE = 10.0  # gain of soft bits whose gradient does not vanish


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures every filter under every attack, and the certified balls."""
    keys = jax.random.split(jax.random.key(seed), 5)
    train, test = digits(seed)
    classifier, other = (
        train_classifier(train, scale["epochs_classifier"], key) for key in keys[:2]
    )
    filters = train_filters(scale, train[0], keys[2])
    attacked = ignoring_the_filter(scale, classifier, other, test)
    table = {
        name: {
            attack: percent(classifier, jax.vmap(one)(x), test[1])
            for attack, x in attacked.items()
        }
        for name, one in filters.items()
    }
    for name in scale["retrained"]:
        own = train_on_filtered(scale, filters[name], train, keys[3])
        mine = ignoring_the_filter(scale, own, other, test)
        table[f"{name}_retrained"] = {
            attack: percent(own, jax.vmap(filters[name])(x), test[1])
            for attack, x in mine.items()
        }
    for name in scale["adaptive"]:
        table[name]["adaptive"] = knowing_the_filter(
            scale, filters[name], classifier, test
        )
    numbers = {f"{n}_{k}": v for n, row in table.items() for k, v in row.items()}
    numbers |= headline(table)
    numbers |= certified(scale, filters["lq_vae"], classifier, test[0], keys[4])
    return Measurements(numbers, curves(scale, filters, classifier, test))


def headline(table) -> dict[str, float]:
    """What the checks read: the worse of the two norms."""
    ours, vae, none = (table[name] for name in ("lq_vae", "vae", "none"))
    norms = ("pgd_linf", "pgd_l2")
    return {
        "over_vae": min(ours[k] - vae[k] for k in norms),
        "over_none": min(ours[k] - none[k] for k in norms),
        "clean_drop": none["clean"] - ours["clean"],
    }


def digits(seed: int):
    """Vectors in [-1, 1] with labels, to train and to test on."""
    images, labels = digit_images()
    order = np.random.default_rng(seed).permutation(len(labels))
    x = jnp.asarray(2 * images.reshape(-1, _INPUTS)[order] - 1, jnp.result_type(float))
    y = jnp.asarray(labels[order])
    return (x[_TEST:], y[_TEST:]), (x[:_TEST], y[:_TEST])


# Networks --------------------------------------------------------------------------


def train_classifier(data, epochs, key):
    """A perceptron 64-128-10, by Adam."""
    net = eqx.nn.MLP(_INPUTS, _CLASSES, 128, 1, key=key)
    state = start_training(net, _ADAM, key=key)
    trained, _ = train_epochs(
        state, cross_entropy, data, _ADAM, epochs=epochs, batch_size=_BATCH
    )
    return trained.model


def cross_entropy(net, batch):
    logits = jax.vmap(net)(batch[0])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))


def train_on_filtered(scale, one, train, key):
    """The same classifier on what the filter makes of the training data."""
    data = (jax.vmap(one)(train[0]), train[1])
    return train_classifier(data, scale["epochs_classifier"], key)


class Quantised(eqx.Module):
    """Our filter; `gain` puts soft bits in the backward pass, as an attacker would."""

    model: LQVAE
    gain: Array | None = None

    def __call__(self, x):
        mean, _ = self.model.latents(x)
        code = self.model.code(mean)
        if self.gain is not None:
            soft = self.model.soft_code(mean, self.gain)
            code = soft + jax.lax.stop_gradient(code - soft)
        return self.model.decoder_d(code)


class Plain(eqx.Module):
    """An autoencoder of the size of ours; a variational one with noise in training."""

    encoder: Callable[[Array], Array]
    decoder: Callable[[Array], Array]
    variational: bool = eqx.field(static=True)

    def __call__(self, x):
        return self.decoder(self.encoder(x)[:_LATENTS])


class Median(eqx.Module):
    """The median of each pixel's neighbourhood of three by three."""

    def __call__(self, x):
        image = jnp.pad(x.reshape(8, 8), 1, mode="edge")
        near = [image[i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
        return jnp.median(jnp.stack(near), 0).reshape(_INPUTS)


def train_filters(scale, x, key):
    """Ours and the plain ones: the same sizes, optimiser, batches and epochs."""
    keys, width, epochs = jax.random.split(key, 3), scale["width"], scale["epochs"]
    ours = LQVAE.dense(_INPUTS, _LATENTS, width=width, key=keys[0])
    ours, _ = ours.fit(x, epochs=epochs, batch_size=_BATCH, stepsize=_RATE, key=keys[0])
    filters = {"none": eqx.nn.Identity(), "median": Median(), "lq_vae": Quantised(ours)}
    for name, own in zip(("vae", "autoencoder"), keys[1:], strict=True):
        if name in scale["plain"]:
            fresh = LQVAE.dense(_INPUTS, _LATENTS, width=width, key=own)
            net = Plain(fresh.encoder, fresh.decoder_d, name == "vae")
            filters[name] = train_plain(net, x, epochs, own)
    return filters


def train_plain(net, x, epochs, key):
    """RMSProp on what `plain_loss` says."""
    state = start_training(net, _RMSPROP, key=key)
    return train_epochs(
        state, plain_loss, x, _RMSPROP, epochs=epochs, batch_size=_BATCH
    )[0].model


def plain_loss(net, batch, key):
    """Ten times the squared error, and for the variational one the divergence."""

    def one(x, key):
        mean, log_variance = jnp.split(net.encoder(x), 2)
        noise = jax.random.normal(key, mean.shape)
        z = mean + jnp.exp(log_variance / 2) * noise if net.variational else mean
        error = _WEIGHT * jnp.mean((net.decoder(z) - x) ** 2)
        divergence = (mean**2 + jnp.exp(log_variance) - log_variance - 1) / 2
        return error + (jnp.mean(divergence) if net.variational else 0)

    return jnp.mean(jax.vmap(one)(batch, jax.random.split(key, len(batch))))


# Attacks ---------------------------------------------------------------------------


def ignoring_the_filter(scale, classifier, other, test):
    """Examples made on the classifier alone, or on another one."""
    x, y = test
    attack = partial(pgd, x=x, labels=y, steps=scale["steps"], bounds=_RANGE)
    mine, foreign = eqx.filter_vmap(classifier), eqx.filter_vmap(other)
    return {
        "clean": x,
        "fgsm": fgsm(mine, x, y, scale["linf"], bounds=_RANGE),
        "pgd_linf": attack(mine, eps=scale["linf"]),
        "pgd_l2": attack(mine, eps=scale["l2"], norm="l2"),
        "transfer": attack(foreign, eps=scale["linf"]),
    }


class Chain(eqx.Module):
    """A filter and the classifier behind it; `through` lets gradients pass around."""

    filter: Callable[[Array], Array]
    classifier: eqx.nn.MLP
    through: bool = eqx.field(static=True)

    def __call__(self, x):
        seen = self.filter(x)
        if self.through:
            seen = x + jax.lax.stop_gradient(seen - x)
        return self.classifier(seen)


def knowing_the_filter(scale, one, classifier, test) -> float:
    """Accuracy that survives three attacks through the filter, in l_inf.

    A backward pass around every filter; through ours with the bits soft, at the gain
    of training and at a gentle one; through the others, which have gradients, from the
    inputs themselves and from a random point of the ball.
    """
    x, y = test
    attack = partial(
        pgd, x=x, labels=y, eps=scale["linf"], steps=scale["steps"], bounds=_RANGE
    )
    around = [(Chain(one, classifier, True), None)]
    if isinstance(one, Quantised):
        soft = [Quantised(one.model, jnp.asarray(gain)) for gain in (500.0, _GENTLE)]
        ways = [(Chain(each, classifier, False), None) for each in soft]
    else:
        ends = (None, jax.random.key(0))
        ways = [(Chain(one, classifier, False), key) for key in ends]
    right = jnp.ones(len(y), bool)
    for chain, key in around + ways:
        found = attack(eqx.filter_vmap(chain), key=key)
        answers = jnp.argmax(jax.vmap(classifier)(jax.vmap(one)(found)), 1)
        right &= answers == y
    return 100 * float(jnp.mean(right))


def percent(classifier, x, y) -> float:
    return 100 * float(accuracy(jax.vmap(classifier)(x), y))


# Certified balls -------------------------------------------------------------------


def certified(scale, one, classifier, x, key) -> dict[str, float]:
    """Radii, and how many trials inside changed the output."""
    changed, radii = 0, []
    chain = Chain(Quantised(one.model, jnp.asarray(_GENTLE)), classifier, False)
    for place, point in enumerate(x[: scale["certified"]]):
        radius = float(one.model.certify(point, scale["radius_max"]).value)
        radii.append(radius)
        if radius == 0:
            continue
        key_noise, key_start = jax.random.split(jax.random.fold_in(key, place))
        noise = jax.random.normal(key_noise, (scale["random_trials"], _INPUTS))
        noise = noise / jnp.linalg.norm(noise, axis=1, keepdims=True)
        label = jnp.argmax(classifier(one(point)))
        attacked = pgd(
            eqx.filter_vmap(chain),
            jnp.tile(point, (scale["pgd_trials"], 1)),
            jnp.full(scale["pgd_trials"], label),
            radius,
            norm="l2",
            steps=10,
            bounds=_RANGE,
            key=key_start,
        )
        tried = jnp.clip(point + radius * noise, *_RANGE)
        outputs = filtered(one, jnp.concatenate([point[None], tried, attacked]))
        changed += int(jnp.sum(jnp.any(outputs[1:] != outputs[:1], 1)))
    return {
        "changed_in_certified_balls": float(changed),
        "certified_share": float(np.mean(np.array(radii) > 0)),
        "certified_radius": float(np.median(radii)),
    }


@eqx.filter_jit
def filtered(one, x):
    return jax.vmap(one)(x)


def curves(scale, filters, classifier, test):
    """Accuracy against the radius of the attack that ignores the filter."""
    x, y = test
    radii = [share * scale["linf"] for share in scale["shares"]]
    mine = eqx.filter_vmap(classifier)
    examples = [
        pgd(mine, x, y, radius, steps=scale["steps"], bounds=_RANGE) for radius in radii
    ]
    return [
        Curve(
            radii,
            [percent(classifier, filtered(one, found), y) for found in examples],
            name.replace("_", "-"),
            "projected gradients that ignore the filter",
            "l_inf radius",
            "accuracy in %",
        )
        for name, one in filters.items()
    ]
