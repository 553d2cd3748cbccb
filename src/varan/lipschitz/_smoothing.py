"""Randomised smoothing with a choice of how logits become scores.

The smoothed classifier of a map s gives an input the class with the largest mean score
`g_k(x) = E s_k(f(x + sigma noise))`. Two theorems say how far x may move before
another class leads, from a lower bound a of the mean score of the class and an upper
bound b of all others:

    radius 1 = sigma / 2 (Phi^-1(a) - Phi^-1(b)),    for scores in [0, 1],
    radius 2 = (a - b) / (sqrt(2) Lip(g)),           Lip(g) <= L erf(1 / (2 L sigma)),

the second with a Lipschitz constant L of the scores before smoothing; without one
`Lip(g) = 1 / (sigma sqrt(pi))`, and then radius 2 is never the larger. Softmax or
sparsemax at the right temperature have smaller variance than the arg max, so that the
bounds a and b, by the empirical Bernstein inequality, are closer to the means.

Use it where a network is too large for `certified_radius`, and l2 is the norm. A
certificate costs `n` evaluations and holds with probability `1 - alpha`. The choice of
a map is part of the statement: see `certify_samples`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..core import Certificate
from ..core._checks import (
    check_choice,
    check_nonnegative,
    check_positive,
    is_traced,
)
from ..metrics import clopper_pearson
from ._result import Certified
from ._smoothed_samples import (
    Maps,
    SimplexMap,
    SmoothedSamples,
    read_maps,
    smooth_samples,
)

Rule = Literal["holdout", "per_input_bonferroni", "repo"]
_RULES = ("holdout", "per_input_bonferroni", "repo")


class SmoothedCertificate(Certified):
    """What is proved of a smoothed classifier at some inputs, each by itself.

    Args:
        labels: The class of each input; -1 where it abstains.
        radii: The l2 radius around each input; 0 where it abstains.
        radii_1, radii_2: What the two theorems give, of the map that was chosen.
        lower: Lower bound of the mean score of the class.
        upper: Upper bound of the mean score of every other class.
        chosen: Which of `maps` each certificate speaks of.
        maps: The maps that there were to choose from.
        certificate: The statement, with the radii for its value.
    """

    labels: Int[np.ndarray, " points"]
    radii: Float[np.ndarray, " points"]
    radii_1: Float[np.ndarray, " points"]
    radii_2: Float[np.ndarray, " points"]
    lower: Float[np.ndarray, " points"]
    upper: Float[np.ndarray, " points"]
    chosen: Int[np.ndarray, " points"]
    maps: tuple[SimplexMap, ...] = eqx.field(static=True)
    certificate: Certificate


def smooth_certify(
    predict: Callable[[Array], Array],
    x: Float[Array, "points ..."],
    *,
    sigma: float,
    n: int = 100_000,
    n_select: int | None = None,
    alpha: float = 1e-3,
    maps: Maps = "lvm",
    select: Literal["global", "holdout", "per_input_bonferroni", "repo"] = "global",
    validation: Float[Array, "others ..."] | None = None,
    two_sided: bool = True,
    lipschitz: float | None = None,
    key: PRNGKeyArray,
) -> SmoothedCertificate:
    """Certified l2 radii of a classifier smoothed by Gaussian noise.

    `maps="hard"` is classical randomised smoothing, one-sided (`two_sided=False`) or
    two-sided; the maps of `"lvm"` trade variance against margin. Costs `n + n_select`
    evaluations of `predict` an input.

    Args:
        predict: As for `smooth_samples`: logits of one input.
        x: The inputs.
        sigma: Standard deviation of the noise, positive, in the units of `x`.
        n: Samples for the bounds, at least 2.
        n_select: Samples, drawn before, that choose the class (and with `"holdout"`
            the map), at least 2; a tenth of `n` if left out.
        alpha: How often the certificate of an input may be wrong, in (0, 1).
        maps: `"hard"`, `"lvm"`, or some of your own. A single map needs no choice.
        select: How the map is chosen. `"global"`: once for all inputs, as that of the
            largest mean radius on `validation`. Others: see `certify_samples`.
        validation: Inputs that are none of `x`, for `"global"`; needs no labels.
        two_sided: Bound every class; otherwise only the leading one, and the others
            by what it leaves.
        lipschitz: A certified constant of the logits, l2 to l2, such as a product of
            `spectral_norm_bound`s. It is not checked.
        key: Random key of the noise.

    Returns:
        Labels and radii, with their certificate.

    Raises:
        ValueError: As `smooth_samples`; an `alpha` outside (0, 1), an unknown rule, a
            negative `lipschitz`, or `"global"` with several maps and no `validation`.
        TypeError: Under a transformation.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.lipschitz import smooth_certify
        >>> net = lambda x: jnp.stack([x[0], -x[0]])
        >>> found = smooth_certify(net, jnp.array([[1.0]]), sigma=0.5, n=1000,
        ...                        maps="hard", key=jax.random.key(0))
        >>> int(found.labels[0]), bool(0.5 < found.radii[0] < 1.0)
        (0, True)

    Source:
        Delattre, Araujo, Barthélemy and Allauzen, 2024, "The Lipschitz-Variance-Margin
        Tradeoff for Enhanced Randomized Smoothing", arXiv:2309.16883. Radius 1 and the
        one-sided rule: Cohen, Rosenfeld and Kolter, 2019, arXiv:1902.02918.

    Differences:
        The default chooses one map for all inputs; the authors' program takes the
        largest radius over all maps on the same samples, here `select="repo"`, an
        estimate. Other classes also have at most what the leading one leaves.
    """
    owner = "smooth_certify"
    check_choice(owner, "select", select, ("global", *_RULES))
    _check_level(owner, alpha)
    maps, few = read_maps(owner, maps), -(-n // 10) if n_select is None else n_select
    first, second, third = jax.random.split(key, 3)
    if select == "global" and len(maps) > 1:
        if validation is None:
            raise ValueError(
                f'{owner}: `select="global"` chooses among {len(maps)} maps on '
                "`validation` (got none). Pass inputs that are not certified, or "
                'select="holdout".'
            )
        seen = smooth_samples(
            predict, validation, sigma=sigma, n=few, maps=maps, key=third
        )
        maps = (maps[choose_map(seen, n, alpha=alpha, lipschitz=lipschitz)],)
    draws = {"predict": predict, "x": x, "sigma": sigma}
    samples = smooth_samples(n=n, maps=maps, key=second, **draws)
    selection = samples
    if select != "repo":
        selection = smooth_samples(n=few, maps=maps, key=first, **draws)
    return certify_samples(
        samples,
        selection,
        alpha=alpha,
        rule="holdout" if select == "global" else select,
        two_sided=two_sided,
        lipschitz=lipschitz,
    )


def certify_samples(
    samples: SmoothedSamples,
    selection: SmoothedSamples,
    *,
    alpha: float = 1e-3,
    rule: Rule = "holdout",
    two_sided: bool = True,
    lipschitz: float | None = None,
) -> SmoothedCertificate:
    """Certificates from samples that are there already, by one of the rules.

    `"holdout"` chooses the map of each input by `selection`, as that whose radius
    would be largest if `samples` had the same moments, and certifies it on `samples`.
    `"per_input_bonferroni"` bounds all maps at once, each with its share of `alpha`,
    and takes the largest radius. Both are proofs about the map chosen at that input:
    another input may get another map, so they say nothing of a classifier that
    chooses anew each time. `"repo"` takes the largest radius of all maps on `samples`
    without a share of `alpha`: an estimate, as the best of many is no longer a bound.

    Args:
        samples: For the bounds.
        selection: Of the same inputs and maps, drawn independently: for the class, and
            the map. `"repo"` does not read it.
        alpha: How often the certificate of an input may be wrong, in (0, 1).
        rule: One of the above.
        two_sided: As for `smooth_certify`.
        lipschitz: As for `smooth_certify`.

    Returns:
        Labels and radii, with their certificate.

    Raises:
        ValueError: Samples of other inputs or maps, an `alpha` outside (0, 1), an
            unknown rule, or a negative `lipschitz`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.lipschitz import certify_samples, smooth_samples
        >>> net, x = lambda x: jnp.stack([x[0], -x[0]]), jnp.ones((1, 1))
        >>> few, many = (
        ...     smooth_samples(net, x, sigma=0.5, n=1000, maps="hard", key=key)
        ...     for key in jax.random.split(jax.random.key(0)))
        >>> print(certify_samples(many, few, two_sided=False).kind)
        proof

    Source:
        Delattre, Araujo, Barthélemy and Allauzen, 2024, arXiv:2309.16883; Maurer and
        Pontil, 2009, arXiv:0907.3740, theorem 4.

    Differences:
        Only `"repo"` is the authors'. The class comes from samples of its own, so that
        each map needs one one-sided bound a class, and the bounds need no more.
    """
    owner = "certify_samples"
    check_choice(owner, "rule", rule, _RULES)
    _check_level(owner, alpha)
    if lipschitz is not None:
        check_nonnegative(owner, "lipschitz", lipschitz)
    if samples.maps != selection.maps or samples.mean.shape != selection.mean.shape:
        raise ValueError(
            f"{owner}: `selection` must be of the inputs and maps of `samples` (got "
            f"shapes {selection.mean.shape} and {samples.mean.shape})."
        )
    maps, points = samples.maps, np.arange(len(samples.mean))
    share = alpha / len(maps) if rule == "per_input_bonferroni" else alpha
    leaders = np.argmax((samples if rule == "repo" else selection).mean, 2)
    bounded = _bounds(samples, leaders, samples.n, share, two_sided)
    radii = _radii(*bounded, samples, lipschitz)
    judged = radii
    if rule == "holdout":
        expected = _bounds(selection, leaders, samples.n, share, two_sided)
        judged = _radii(*expected, selection, lipschitz)
    chosen = np.argmax(np.max(judged, 0), 1)
    lower, upper = (bound[points, chosen] for bound in bounded)
    radius_1, radius_2 = (radius[points, chosen] for radius in radii)
    radius = np.maximum(radius_1, radius_2)
    labels = np.where(radius > 0, leaders[points, chosen], -1)
    certificate = Certificate(
        "certified radius",
        radius,
        proof=rule != "repo",
        statement=_statement(rule, alpha, len(maps)),
        details={"confidence": jnp.asarray(1 - alpha), "chosen": jnp.asarray(chosen)},
    )
    return SmoothedCertificate(
        labels, radius, radius_1, radius_2, lower, upper, chosen, maps, certificate
    )


def choose_map(
    samples: SmoothedSamples,
    n: int,
    *,
    alpha: float = 1e-3,
    two_sided: bool = True,
    lipschitz: float | None = None,
) -> int:
    """The map that certifies best on average, if others' samples were as these.

    Args:
        samples: Of inputs that are not certified.
        n: Samples that certificates will take, at least 2.
        alpha: As for `certify_samples`.
        two_sided: As for `certify_samples`.
        lipschitz: As for `certify_samples`.

    Returns:
        Its place among `samples.maps`.

    Raises:
        ValueError: Fewer than two samples, an `alpha` outside (0, 1), or a negative
            `lipschitz`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.lipschitz import SimplexMap, choose_map, smooth_samples
        >>> maps = [SimplexMap("softmax", 0.01), SimplexMap("softmax", 2.0)]
        >>> seen = smooth_samples(lambda x: x, jnp.array([[1.0, 0.0]]), sigma=0.3,
        ...                       n=1000, maps=maps, key=jax.random.key(0))
        >>> choose_map(seen, 10_000)
        1
    """
    _check_level("choose_map", alpha)
    if n < 2:
        raise ValueError(f"choose_map: `n` must be at least 2 (got {n}).")
    if lipschitz is not None:
        check_nonnegative("choose_map", "lipschitz", lipschitz)
    leaders = np.argmax(samples.mean, 2)
    expected = _bounds(samples, leaders, n, alpha, two_sided)
    radii = _radii(*expected, samples, lipschitz)
    return int(np.argmax(np.mean(np.max(radii, 0), 0)))


def smoothed_lipschitz(
    lipschitz: Float[Array, ...] | float,
    sigma: Float[Array, ...] | float,
    *,
    width: float = 1.0,
) -> Float[Array, ...]:
    """The Lipschitz constant of a function after smoothing by Gaussian noise.

    `L erf(width / (2 sqrt(2) L sigma))`: tight, attained by a ramp that is cut to the
    function's range. Never above `L`, nor above `width / (sigma sqrt(2 pi))`.

    Args:
        lipschitz: The constant before, not negative; infinite if there is none.
        sigma: Standard deviation of the noise, positive.
        width: Length of the range of the function, positive. The scores of a simplex
            map, along any unit direction, have `sqrt(2)`.

    Returns:
        The constant after.

    Raises:
        ValueError: A negative or NaN constant, a `sigma` or width that is not positive.

    Example:
        >>> from varan.lipschitz import smoothed_lipschitz
        >>> round(float(smoothed_lipschitz(2.0, 0.5)), 4)
        0.7658

    Source:
        Delattre, Araujo, Barthélemy and Allauzen, 2024, arXiv:2309.16883, theorem 1.

    Differences:
        The authors' program divides by `sqrt(2) L sigma`, which is up to twice as
        large; this is the constant that the ramp attains.
    """
    owner = "smoothed_lipschitz"
    check_positive(owner, "sigma", sigma)
    check_positive(owner, "width", width)
    constant = jnp.asarray(lipschitz, jnp.result_type(lipschitz, float))
    if not is_traced(constant) and not np.all(np.asarray(constant) >= 0):
        raise ValueError(
            f"{owner}: `lipschitz` must not be negative (got {lipschitz})."
        )
    spread = jnp.asarray(sigma, constant.dtype)
    return _smoothed(constant, spread, jnp.asarray(width, constant.dtype))


@jax.jit
def _smoothed(constant, sigma, width):
    limit = width / (sigma * math.sqrt(2 * math.pi))
    usable = (constant > 0) & jnp.isfinite(constant)
    inside = jnp.where(usable, constant, 1)
    value = inside * jax.scipy.special.erf(width / (math.sqrt(8) * inside * sigma))
    return jnp.where(usable, value, jnp.where(constant > 0, limit, 0 * sigma))


def _bounds(samples, leaders, n, alpha, two_sided):
    """A lower bound of the leader's mean score and an upper one of all others'.

    Of shape (points, maps), for each map by itself: one one-sided bound a class, or a
    single one of the leader.
    """
    mean, classes = samples.mean, samples.mean.shape[2]
    tail = alpha / classes if two_sided else alpha
    low, high = _bernstein(samples, n, tail)
    for place, one in enumerate(samples.maps):
        if one.name == "hard":
            low[:, place], high[:, place] = _exact(mean[:, place], n, tail)
    leads = leaders[..., None]
    lower = np.clip(np.take_along_axis(low, leads, 2)[..., 0], 0, 1)
    # The scores sum to one at most; a sum of rounded scores to that and their rounding.
    left = 1 - lower + classes * samples.rounding / 256
    if not two_sided:
        return lower, left
    others = np.where(np.arange(classes) == leads, -np.inf, high)
    return lower, np.minimum(np.max(others, 2), left)


def _bernstein(samples, n, tail):
    # In float64, as all of these: `1 - tail` is no number of float32.
    log = math.log(2 / tail)
    half = np.sqrt(2 * samples.variance * (1 + samples.rounding) * log / n)
    half += 7 * log / (3 * (n - 1)) + samples.rounding
    return samples.mean - half, samples.mean + half


def _exact(mean, n, tail):
    # Counts of `n` samples with these means: their own counts if `n` is their number.
    # A tail below what was asked for is wider; halves make no interval.
    interval = clopper_pearson(np.rint(mean * n), n, confidence=max(1 - 2 * tail, 1e-6))
    low, high = (np.asarray(end, float) for end in interval)
    outward = float(jnp.finfo(interval.low.dtype).eps)
    return low - outward, high + outward


def _radii(lower, upper, samples, lipschitz):
    """Both radii, zero where no class leads for certain."""
    from scipy.special import ndtri

    leads = lower > upper
    a, b = np.where(leads, lower, 0.5), np.where(leads, upper, 0.5)
    radius_1 = samples.sigma / 2 * (ndtri(a) - ndtri(b))
    constants = [
        math.inf if lipschitz is None else one.lipschitz(float(lipschitz))
        for one in samples.maps
    ]
    after = smoothed_lipschitz(
        jnp.asarray(constants), samples.sigma, width=math.sqrt(2)
    )
    # Outward by what its own precision may have lost.
    slope = np.asarray(after, float) * (1 + 16 * jnp.finfo(after.dtype).eps)
    return np.stack([radius_1, (a - b) / (math.sqrt(2) * slope)])


def _check_level(owner: str, alpha: float) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"{owner}: `alpha` must lie between 0 and 1 (got {alpha}).")


def _statement(rule: str, alpha: float, maps: int) -> str:
    which = "smoothed classifier" + (" of the map `chosen`" if maps > 1 else "")
    if rule == "repo":
        return (
            f"the {which} keeps its label at y with |y - x|_2 < value, if the best of "
            f"{maps} maps on the same samples were not the best by chance"
        )
    return (
        f"with probability {1 - alpha:g} over the samples, for each input by itself, "
        f"the {which} keeps its label at all y with |y - x|_2 < value"
    )
