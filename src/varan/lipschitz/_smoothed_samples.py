"""What a classifier does under Gaussian noise: means over samples, for many maps.

A simplex map turns logits into scores that are not negative and sum to one: the
arg max (classical randomised smoothing), or softmax and sparsemax at a temperature.
One pass of samples through the network serves every map; what is kept of a block of
samples are the mean and the squared deviations of each score, pooled in float64 with
the deviations between blocks, so that neither memory nor rounding grows with n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from ..core._checks import (
    check_choice,
    check_finite,
    check_nonempty,
    check_positive,
    is_traced,
)
from ..operators import project_simplex

# Samples of a block: the rounding of a block's sum is at most so many units.
BLOCK = 256
# Blocks of one compiled call: what is kept of them fits memory whatever n is.
_CALL = 64


class SimplexMap(NamedTuple):
    """A map from logits to the simplex.

    Args:
        name: `"hard"` (one for the largest logit), `"softmax"` or `"sparsemax"`.
        temperature: What the logits are multiplied by, positive; `"hard"` ignores it.

    Example:
        >>> from varan.lipschitz import SimplexMap
        >>> SimplexMap("softmax", 2.0).lipschitz(3.0)
        3.0
    """

    name: Literal["hard", "softmax", "sparsemax"]
    temperature: float = 1.0

    def lipschitz(self, logits: float) -> float:
        """A constant of the map after logits of a constant, both from l2 to l2.

        The Jacobian of the softmax has norms up to 1/2; sparsemax is a projection.
        """
        slope = {"hard": math.inf, "softmax": 0.5, "sparsemax": 1.0}[self.name]
        return slope if self.name == "hard" else slope * self.temperature * logits


Maps = Literal["hard", "lvm"] | Sequence[SimplexMap]


class SmoothedSamples(eqx.Module):
    """Sample means and variances of every map's scores at some inputs.

    Args:
        mean: Of each score, in float64.
        variance: Of each score, with `n - 1` below.
        n: Samples behind each, independent of one another.
        sigma: Standard deviation of the noise.
        rounding: Bound of the error of a mean by summation.
        maps: The maps, in the order of the axis.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.lipschitz import SimplexMap, smooth_samples
        >>> maps = [SimplexMap("hard"), SimplexMap("softmax", 2.0)]
        >>> found = smooth_samples(lambda x: x, jnp.array([[1.0, 0.0]]), sigma=0.5,
        ...                        n=100, maps=maps, key=jax.random.key(0))
        >>> found.mean.shape, found.only(1).mean.shape
        ((1, 2, 2), (1, 1, 2))
    """

    mean: Float[np.ndarray, "points maps classes"]
    variance: Float[np.ndarray, "points maps classes"]
    n: int = eqx.field(static=True)
    sigma: float = eqx.field(static=True)
    rounding: float = eqx.field(static=True)
    maps: tuple[SimplexMap, ...] = eqx.field(static=True)

    def only(self, index: int) -> SmoothedSamples:
        """The samples of one map."""
        part = slice(index, index + 1)
        return SmoothedSamples(
            self.mean[:, part],
            self.variance[:, part],
            self.n,
            self.sigma,
            self.rounding,
            (self.maps[index],),
        )


def lvm_maps(temperatures: int = 100) -> tuple[SimplexMap, ...]:
    """The family of maps among which the method chooses.

    The arg max, and softmax and sparsemax each at 1, at evenly spaced temperatures
    from 0.1 to 50, and at ten millions, where they hardly differ from the arg max.

    Args:
        temperatures: How many are spaced evenly, at least 1.

    Returns:
        `2 (temperatures + 2) + 1` maps.

    Raises:
        ValueError: Fewer than one temperature.

    Example:
        >>> from varan.lipschitz import lvm_maps
        >>> len(lvm_maps())
        205

    Source:
        Delattre, Araujo, Barthélemy and Allauzen, 2024, arXiv:2309.16883, with the
        grid of the authors' program.
    """
    if temperatures < 1:
        raise ValueError(
            f"lvm_maps: `temperatures` must be at least 1 (got {temperatures})."
        )
    grid = [1.0, *np.linspace(0.1, 50, temperatures).tolist(), 1e7]
    return (
        SimplexMap("hard"),
        *(SimplexMap("softmax", t) for t in grid),
        *(SimplexMap("sparsemax", t) for t in grid),
    )


def smooth_samples(
    predict: Callable[[Array], Array],
    x: Float[Array, "points ..."],
    *,
    sigma: float,
    n: int,
    maps: Maps = "lvm",
    key: PRNGKeyArray,
) -> SmoothedSamples:
    """Samples a classifier under Gaussian noise, for all maps at once.

    Costs `n` evaluations of the classifier an input; a map adds some ten operations
    for each class and sample. New values, another `n` and another number of inputs
    compile nothing. The same key gives the same noise whatever the maps are.

    Args:
        predict: Logits, one for each class, of one input without batch axis; any JAX
            callable. Where a logit is NaN the input counts for no class.
        x: The inputs.
        sigma: Standard deviation of the noise, positive, in the units of `x`.
        n: Samples, at least 2.
        maps: `"hard"`, `"lvm"` (205 maps), or some of your own.
        key: Random key of the noise.

    Returns:
        The means and variances.

    Raises:
        ValueError: Fewer than two samples or classes, a `sigma` or temperature that
            is not positive, an input that is empty or not finite, a `predict` that
            returns probabilities.
        TypeError: Under a transformation: the pooling is done in float64 on the host.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.lipschitz import smooth_samples
        >>> net = lambda x: jnp.stack([x[0], -x[0]])
        >>> found = smooth_samples(net, jnp.array([[0.0], [3.0]]), sigma=1.0, n=1000,
        ...                        maps="hard", key=jax.random.key(0))
        >>> bool(abs(found.mean[0, 0, 0] - 0.5) < 0.1), bool(found.mean[1, 0, 0] > 0.9)
        (True, True)

    Source:
        Delattre, Araujo, Barthélemy and Allauzen, 2024, arXiv:2309.16883.
    """
    owner = "smooth_samples"
    check_positive(owner, "sigma", sigma)
    if n < 2:
        raise ValueError(f"{owner}: `n` must be at least 2 (got {n}).")
    maps = read_maps(owner, maps)
    x = _check_inputs(owner, predict, x, sigma, key)
    softmax, sparsemax = (
        jnp.asarray([m.temperature for m in maps if m.name == name], x.dtype)
        for name in ("softmax", "sparsemax")
    )
    calls = -(-n // (BLOCK * _CALL))
    # As many places as the calls have; blocks beyond the last have no samples.
    sizes = np.clip(n - BLOCK * np.arange(calls * _CALL), 0, BLOCK).astype(np.int32)
    pieces = jnp.asarray(sizes.reshape(calls, _CALL))
    spread, each = jnp.asarray(sigma, x.dtype), []
    for i, point in enumerate(x):
        own = jax.random.fold_in(key, i)
        parts = [
            _blocks(
                predict, point, spread, jnp.int32(call), piece, softmax, sparsemax, own
            )
            for call, piece in enumerate(pieces)
        ]
        sums, deviations = (np.concatenate(k) for k in zip(*parts, strict=True))
        each.append(_pool(sums, deviations, sizes))
    mean, variance = (np.stack(k)[:, _places(maps)] for k in zip(*each, strict=True))
    rounding = BLOCK * float(jnp.finfo(x.dtype).eps)
    return SmoothedSamples(mean, variance, n, float(sigma), rounding, maps)


def read_maps(owner: str, maps: Maps) -> tuple[SimplexMap, ...]:
    """The maps meant, checked."""
    if isinstance(maps, str):
        check_choice(owner, "maps", maps, ("hard", "lvm"))
        return (SimplexMap("hard"),) if maps == "hard" else lvm_maps()
    maps = tuple(maps)
    check_nonempty(owner, "maps", maps)
    for one in maps:
        if not isinstance(one, SimplexMap):
            raise TypeError(
                f"{owner}: `maps` must hold `SimplexMap`s (got {one!r}). Write "
                'SimplexMap("softmax", 2.0).'
            )
        check_choice(owner, "maps", one.name, ("hard", "softmax", "sparsemax"))
        check_positive(owner, "maps", one.temperature)
    return maps


def _check_inputs(owner, predict, x, sigma, key) -> Array:
    if is_traced(x):
        raise TypeError(
            f"{owner}: `x` must be a known array (got a traced one). Call it outside "
            "jit and vmap; it takes whole batches."
        )
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.result_type(float))
    check_nonempty(owner, "x", x)
    check_finite(owner, "x", x)
    # Logits of a single input may look like probabilities; those of many do not.
    noise = jax.random.normal(key, (16, *x.shape[1:]), x.dtype)
    logits = np.asarray(_logits(predict, x[0], jnp.asarray(sigma, x.dtype) * noise))
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"{owner}: `predict` must return a vector of at least two logits "
            f"(got shape {logits.shape[1:]})."
        )
    if np.all(logits >= 0) and np.allclose(logits.sum(1), 1, atol=1e-3):
        raise ValueError(
            f"{owner}: `predict` must return logits (got probabilities). Return the "
            "scores before the softmax."
        )
    return x


def _places(maps) -> list[int]:
    """Where each map's scores stand among those of a block."""
    counts, places = {"softmax": 0, "sparsemax": 0}, []
    total = sum(m.name == "softmax" for m in maps)
    for one in maps:
        if one.name == "hard":
            places.append(0)
            continue
        start = 1 if one.name == "softmax" else 1 + total
        places.append(start + counts[one.name])
        counts[one.name] += 1
    return places


@eqx.filter_jit
def _logits(predict, x, noise):
    return jax.vmap(predict)(x[None] + noise)


@eqx.filter_jit
def _blocks(predict, x, sigma, call, sizes, softmax, sparsemax, key):
    """Sums and squared deviations of some blocks of samples, until a size is 0."""

    def scores(key):
        noise = jax.random.normal(key, (BLOCK, *x.shape), x.dtype)
        logits = jax.vmap(predict)(x[None] + sigma * noise)
        best = jax.nn.one_hot(jnp.argmax(logits, 1), logits.shape[1], dtype=x.dtype)
        known = jnp.all(~jnp.isnan(logits), 1, keepdims=True)
        top = jnp.max(logits, 1, keepdims=True)
        lag = jnp.where(known, logits - top, 0).astype(x.dtype)[None]
        parts = [best[None]]
        if softmax.size:
            parts.append(jax.nn.softmax(softmax[:, None, None] * lag, -1))
        if sparsemax.size:
            each = jax.vmap(jax.vmap(project_simplex))
            parts.append(each(sparsemax[:, None, None] * lag))
        return jnp.where(known[None], jnp.concatenate(parts), 0)

    def block(i, kept):
        values = scores(jax.random.fold_in(key, call * _CALL + i))
        used = (jnp.arange(BLOCK, dtype=sizes.dtype) < sizes[i])[None, :, None]
        # The sum, not the mean: counts of the arg max stay exact.
        total = jnp.sum(jnp.where(used, values, 0), 1)
        mean = total / sizes[i].astype(x.dtype)
        off = jnp.where(used, values - mean[:, None], 0)
        return kept[0].at[i].set(total), kept[1].at[i].set(jnp.sum(off**2, 1))

    shape = jax.eval_shape(scores, key).shape
    empty = jnp.zeros((_CALL, shape[0], shape[2]), x.dtype)
    return lax.fori_loop(0, jnp.count_nonzero(sizes), block, (empty, empty))


def _pool(sums, deviations, sizes) -> tuple[np.ndarray, np.ndarray]:
    """The mean and variance of all samples from the sums of their blocks."""
    sums, deviations = (np.asarray(k, float)[sizes > 0] for k in (sums, deviations))
    weights = sizes[sizes > 0][:, None, None]
    mean = np.sum(sums, 0) / np.sum(weights)
    between = np.sum(weights * (sums / weights - mean) ** 2, 0)
    return mean, (np.sum(deviations, 0) + between) / (np.sum(weights) - 1)
