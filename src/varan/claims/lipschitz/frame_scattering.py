"""Any admissible network of frames is safe: no expansion, invariance by depth.

Claim: whatever the frames, the Lipschitz nonlinearities and the pooling, a network
whose products of constants stay below one never moves two signals apart, forgets
translations layer by layer through pooling, and moves in proportion to a deformation.

Kept: wavelet, Weyl-Heisenberg and random frames, modulus, rectifier, hyperbolic tangent
and shifted logistic function, the three kinds of pooling, depth three, all three
theorems. Given up: signals on the line (periodic ones on a grid here), cartoon and
Lipschitz functions, classification with the features.

Refuted by: one pair of signals that an admissible network moves apart, one layer beyond
the bound of translations, features that grow no more invariant through pooling, or
differences that are not linear in the deformation.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from varan.claims import Curve, Measurements
from varan.lipschitz import (
    FrameNet,
    random_filters,
    translation_bound,
    wavelet_filters,
    weyl_heisenberg_filters,
)

BAND = 0.25  # cycles per sample: half of what the grid holds
_SIZES = (0.01, 0.03, 0.1, 0.3)  # of deformations in samples, for their scaling
_SHIFTS = (1, 3, 8)  # in units of the pooling of all layers together
_ATOMS = 6  # a module, in every family: the networks then share compiled functions


class Pairs(NamedTuple):
    """Signals to compare, and what they are there for."""

    one: np.ndarray
    other: np.ndarray
    shifts: np.ndarray
    strengths: np.ndarray  # R |tau| + |omega| of the random deformations
    parts: dict[str, slice]


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures every network of the scale on the same pairs of signals."""
    pairs = draw(scale, np.random.default_rng(seed))
    results = {
        (family, nonlinearity, *pooled): measure(
            network(family, nonlinearity, pooled, scale, seed), pairs
        )
        for family in scale["families"]
        for nonlinearity in scale["nonlinearities"]
        for pooled in (("average", 1), *((p, 2) for p in scale["pools"]))
    }
    large = [
        jax.tree.map(
            lambda a: 2 * a, network(f, "modulus", ("average", 1), scale, seed)
        )
        for f in scale["families"]
    ]
    numbers = {
        name: float(max(r[name] for r in results.values()))
        for name in ("expansion", "translation_over_bound", "deformation_quotient")
    }
    numbers["expansion_when_inadmissible"] = max(
        expansion(np.asarray(compare(n, pairs.one, pairs.other)[0]), pairs)
        for n in large
    )
    for name, factor in (("unpooled", 1), ("pooled", 2)):
        slopes = [r["layer_slope"] for k, r in results.items() if k[-1] == factor]
        numbers[f"{name}_slope"] = float(np.mean(slopes))
        numbers[f"{name}_slope_highest"] = max(slopes)
    slopes = [r["deformation_slope"] for r in results.values()]
    numbers |= {
        "deformation_slope_low": min(slopes),
        "deformation_slope_high": max(slopes),
    }
    return Measurements(numbers, list(curves(results)))


def network(family: str, nonlinearity, pooled, scale, seed: int) -> FrameNet:
    """An admissible network of one family."""
    makers = {
        "wavelet": partial(wavelet_filters, scales=_ATOMS // 2),
        "weyl-heisenberg": partial(weyl_heisenberg_filters, bands=_ATOMS + 1),
        "random": partial(random_filters, atoms=_ATOMS, key=jax.random.key(seed)),
    }
    return FrameNet.repeat(
        makers[family],
        (scale["samples"],),
        depth=scale["depth"],
        nonlinearity=nonlinearity,
        pool=pooled[0],
        factor=pooled[1],
    )


# Signals --------------------------------------------------------------------------


def draw(scale, rng) -> Pairs:
    """Random pairs, translated signals, deformed signals, deformations that grow."""
    n, step = scale["samples"], 2 ** scale["depth"]
    signals = band_limited(rng, scale["signals"], n)
    some = signals[: scale["moved"]]
    shifts = np.repeat([step * k for k in _SHIFTS], len(some))
    moved = np.tile(some, (len(_SHIFTS), 1))
    bent = signals[np.arange(scale["deformations"]) % len(signals)]
    tau = smooth(rng, len(bent), n) * 10 ** rng.uniform(-2, 0, (len(bent), 1))
    omega = smooth(rng, len(bent), n) * 10 ** rng.uniform(-3, -1, (len(bent), 1))
    grown = np.repeat(signals[:2], len(_SIZES), 0)
    ways = np.repeat(smooth(rng, 2, n), len(_SIZES), 0) * np.tile(_SIZES, 2)[:, None]
    groups = {
        "random": (signals, np.roll(signals, 1, 0)),
        "translated": (
            moved,
            np.array([np.roll(f, t) for f, t in zip(moved, shifts, strict=True)]),
        ),
        "deformed": (bent, deform(bent, tau, omega)),
        "growing": (grown, deform(grown, ways, 0 * ways)),
    }
    ends = np.cumsum([0, *(len(one) for one, _ in groups.values())])
    return Pairs(
        np.concatenate([one for one, _ in groups.values()]),
        np.concatenate([other for _, other in groups.values()]),
        shifts,
        BAND * np.max(np.abs(tau), 1) + np.max(np.abs(omega), 1),
        {name: slice(*ends[k : k + 2]) for k, name in enumerate(groups)},
    )


def band_limited(rng, count: int, n: int) -> np.ndarray:
    """Real signals with a flat random spectrum up to the band's end, of norm 1."""
    spectrum = np.zeros((count, n // 2 + 1), complex)
    inside = int(BAND * n) + 1
    spectrum[:, :inside] = rng.normal(size=(2, count, inside)).T.dot([1, 1j]).T
    signals = np.fft.irfft(spectrum, n)
    return (signals / np.linalg.norm(signals, axis=1, keepdims=True)).astype(complex)


def smooth(rng, count: int, n: int) -> np.ndarray:
    """Functions of the four lowest frequencies with largest absolute value 1."""
    angles = 2 * np.pi * np.arange(1, 5)[:, None] * np.arange(n) / n
    waves = np.concatenate([np.cos(angles), np.sin(angles)])
    functions = rng.normal(size=(count, len(waves))) @ waves
    return functions / np.max(np.abs(functions), 1, keepdims=True)


def deform(signals, tau, omega) -> np.ndarray:
    """`e^(2 pi i omega(x)) f(x - tau(x))`, exactly, by the trigonometric polynomial."""
    n = signals.shape[1]
    inside = np.abs(np.fft.fftfreq(n)) <= BAND
    waves = np.fft.fftfreq(n)[inside]
    coefficients = np.fft.fft(signals)[:, inside] / n
    places = np.arange(n) - tau
    moved = [
        np.exp(2j * np.pi * x[:, None] * waves) @ c
        for x, c in zip(places, coefficients, strict=True)
    ]
    return np.exp(2j * np.pi * omega) * np.array(moved)


# Measuring ------------------------------------------------------------------------


def measure(net: FrameNet, pairs: Pairs) -> dict[str, Any]:
    """What the theorems speak of, for one network."""
    squares, sizes = (np.asarray(v) for v in compare(net, pairs.one, pairs.other))
    distances = np.sqrt(squares.sum(1))
    deformed = distances[pairs.parts["deformed"]]
    relative = relative_change(squares, sizes, pairs)
    return {
        "expansion": expansion(squares, pairs),
        "translation_over_bound": over_bound(net, squares, pairs),
        "deformation_quotient": float(np.max(deformed / pairs.strengths)),
        "deformation_slope": scaling(distances[pairs.parts["growing"]]),
        "relative": relative,
        "layer_slope": slope(np.arange(1, len(relative)), np.log2(relative[1:])),
    }


def expansion(squares, pairs: Pairs) -> float:
    """The largest ratio of the features' distance to the signals'."""
    apart = np.linalg.norm(pairs.one - pairs.other, axis=1)
    return float(np.max(np.sqrt(squares.sum(1)) / apart))


def over_bound(net: FrameNet, squares, pairs: Pairs) -> float:
    """The largest change under translation, layer by layer, over its bound."""
    part = pairs.parts["translated"]
    changes = np.sqrt(squares[part]) / np.linalg.norm(pairs.one[part], axis=1)[:, None]
    return max(
        float(np.max(changes[pairs.shifts == shift, layer]))
        / float(translation_bound(net, int(shift), layer).value)
        for shift in np.unique(pairs.shifts)
        for layer in range(net.depth + 1)
    )


def relative_change(squares, sizes, pairs: Pairs) -> np.ndarray:
    """The change by the smallest translation, a layer, over the features' own norm.

    Over their norm, so that the decay of energy with depth is not read as invariance;
    the smallest, because larger ones turn the features' phases round.
    """
    part, least = pairs.parts["translated"], pairs.shifts == np.min(pairs.shifts)
    return np.sqrt(squares[part][least].sum(0) / sizes[part][least].sum(0))


@eqx.filter_jit
def compare(net, one, other):
    """Squared norms a layer of the difference of features, and of the features."""

    def squares(features):
        return jnp.stack([jnp.sum(jnp.abs(layer) ** 2) for layer in features])

    def pair(both):
        first, second = net(both[0]), net(both[1])
        return squares(jax.tree.map(jnp.subtract, first, second)), squares(first)

    return jax.lax.map(pair, (one, other))


def scaling(distances) -> float:
    """The slope of the difference in the size of the deformation, both logarithmic."""
    mean = np.mean(distances.reshape(-1, len(_SIZES)), 0)
    return slope(np.log(_SIZES), np.log(mean))


def slope(x, y) -> float:
    """Of the least-squares line."""
    return float(np.polyfit(x, y, 1)[0])


def curves(results):
    """The relative change of features under translation, layer by layer."""
    for (family, nonlinearity, pool, factor), found in results.items():
        if nonlinearity == "modulus" and pool == "average":
            yield Curve(
                list(range(len(found["relative"]))),
                found["relative"].tolist(),
                f"{family}, pooling by {factor}",
                "change of the features under translation",
                "layer",
                "change over the features' norm",
                log_y=True,
            )
