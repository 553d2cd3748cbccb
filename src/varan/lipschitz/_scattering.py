"""Scattering networks of any frames: features that provably do not expand.

A layer convolves every signal it gets with the atoms of a frame, takes a pointwise
nonlinearity and pools; a low-pass atom lets features out. Whatever the filters, if the
product of the frame's upper bound and the squared Lipschitz constants stays below one,
the whole feature extractor is non-expansive, its features are stable to deformations of
the signal, and they become more invariant to translations with every pooled layer.
Take it for features without training, or to make learned filters safe. A network that
must separate close inputs is better off without.
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
from jaxtyping import Array, Complex, Float, Inexact

from ..core import Certificate
from ..core._checks import (
    check_choice,
    check_finite,
    check_positive,
    check_shape,
    is_traced,
)
from ._filters import FilterBank, frequencies

Pool = Literal["subsample", "average", "max"]
Nonlinearity = (
    Literal["modulus", "relu", "tanh", "shifted_sigmoid"] | Callable[[Array], Array]
)
# On the real and the imaginary part each; a function that does not expand reals does
# not expand pairs of them.
_BY_PARTS = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "shifted_sigmoid": lambda x: jax.nn.sigmoid(x) - 0.5,
}
_CONSTANTS = {"modulus": 1.0, "relu": 1.0, "tanh": 1.0, "shifted_sigmoid": 0.25}


class FrameModule(eqx.Module):
    """One layer: a frame, a pointwise nonlinearity, pooling.

    On a signal `u` it computes `S^(d/2) P(M(u * g))(S .)` for every atom `g`, in one
    batched FFT, and the features `u * output`.

    Args:
        filters: The frame, on the grid of the layer's signals.
        nonlinearity: `"modulus"`; `"relu"`, `"tanh"`, `"shifted_sigmoid"` (the logistic
            function minus 1/2) on real and imaginary parts; or a function of complex
            arrays that works entry by entry, maps 0 to 0 and comes with `lipschitz`.
        pool: `"subsample"` keeps every S-th sample, `"average"` the mean and `"max"`
            the largest entry (of real and imaginary parts) of S^d neighbours.
        factor: S, at least 1; divides every side of the grid.
        lipschitz: The Lipschitz constant of a nonlinearity of one's own; nothing
            checks it, and what follows from it is called an estimate.

    Raises:
        ValueError: An unknown choice, a factor that does not divide the grid, a
            nonlinearity that does not map 0 to 0 or lacks its constant.

    Example:
        >>> from varan.lipschitz import FrameModule, wavelet_filters
        >>> layer = FrameModule(wavelet_filters((64,), 3), factor=2)
        >>> layer.nonlinearity_constant, layer.pooling_constant
        (1.0, 1.0)
    """

    filters: FilterBank
    nonlinearity: Nonlinearity = eqx.field(static=True)
    pool: Pool = eqx.field(static=True)
    factor: int = eqx.field(static=True)
    lipschitz: float | None = eqx.field(static=True)

    def __init__(
        self,
        filters: FilterBank,
        nonlinearity: Nonlinearity = "modulus",
        *,
        pool: Pool = "average",
        factor: int = 1,
        lipschitz: float | None = None,
    ):
        owner = "FrameModule"
        check_choice(owner, "pool", pool, ("subsample", "average", "max"))
        if factor < 1 or any(side % factor for side in filters.shape):
            raise ValueError(
                f"{owner}: `factor` must divide every side of the grid (got {factor} "
                f"for {filters.shape}). Pad the signal or pool less."
            )
        if not callable(nonlinearity):
            check_choice(owner, "nonlinearity", nonlinearity, tuple(_CONSTANTS))
            if lipschitz is not None:
                raise ValueError(
                    f"{owner}: `lipschitz` of {nonlinearity!r} is known. Leave it out."
                )
        else:
            _check_own(owner, nonlinearity, lipschitz)
        self.filters = filters
        self.nonlinearity = nonlinearity
        self.pool = pool
        self.factor = factor
        self.lipschitz = lipschitz

    @property
    def nonlinearity_constant(self) -> float:
        """L, the nonlinearity's Lipschitz constant."""
        if self.lipschitz is not None:
            return self.lipschitz
        return _CONSTANTS[str(self.nonlinearity)]

    @property
    def pooling_constant(self) -> float:
        """R, that of pooling on the grid, the factor S^(d/2) included.

        The sum over all samples is not the integral that subsampling preserves: a
        signal that lives on the samples kept grows by S^(d/2), and so may maxima.
        Means do not expand.
        """
        if self.pool == "average":
            return 1.0
        return math.sqrt(self.factor ** len(self.filters.shape))

    def features(self, u: Complex[Array, "paths ..."]) -> Complex[Array, "paths ..."]:
        """Every signal through the output atom."""
        return self._filtered(u, self.filters.output[None])[:, 0]

    def propagate(self, u: Complex[Array, "paths ..."]) -> Complex[Array, "more ..."]:
        """Every signal through every atom, the nonlinearity and pooling."""
        v = self._filtered(u, self.filters.atoms)
        return self._pooled(self._bent(v.reshape(-1, *u.shape[1:])))

    def _filtered(self, u, responses):
        axes = tuple(range(1, u.ndim))
        spectra = jnp.fft.fftn(u, axes=axes)
        product = spectra[:, None] * responses.astype(u.dtype)[None]
        return jnp.fft.ifftn(product, axes=tuple(a + 1 for a in axes))

    def _bent(self, v):
        if callable(self.nonlinearity):
            return self.nonlinearity(v).astype(v.dtype)
        if self.nonlinearity == "modulus":
            return jnp.abs(v).astype(v.dtype)
        function = _BY_PARTS[str(self.nonlinearity)]
        return lax.complex(function(v.real), function(v.imag))

    def _pooled(self, v):
        s, sides = self.factor, v.shape[1:]
        if s == 1:
            return v
        scale = math.sqrt(s ** len(sides))
        if self.pool == "subsample":
            return scale * v[(slice(None), *(slice(None, None, s) for _ in sides))]
        blocks = v.reshape(len(v), *(n for side in sides for n in (side // s, s)))
        axes = tuple(range(2, blocks.ndim, 2))
        if self.pool == "average":
            return scale * jnp.mean(blocks, axes)
        top = lax.complex(jnp.max(blocks.real, axes), jnp.max(blocks.imag, axes))
        return scale * top


class FrameNet(eqx.Module):
    """A feature extractor of frame modules, for periodic signals in 1-D or 2-D.

    Layer n's features are what the output atom of module n makes of all signals that
    the modules before it have produced, one for each path of atoms: with `a` atoms a
    module there are `a^n` of them, on a grid that is smaller by the product of the
    pooling factors. The cost is that of the FFTs of all paths. Differentiable in
    signals and filters almost everywhere.

    Args:
        modules: One for each layer 0 .. depth; of the last one only the output atom is
            used. Each grid is that of the module before it divided by its factor.

    Raises:
        ValueError: No module, grids that do not follow each other; on a call a signal
            that is not finite or not on the first module's grid.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import FrameNet, admissible, wavelet_filters
        >>> bank = lambda shape: wavelet_filters(shape, 2)
        >>> net = FrameNet.repeat(bank, (64,), depth=2, factor=2)
        >>> [layer.shape for layer in net(jnp.sin(jnp.arange(64.0)))]
        [(1, 64), (4, 32), (16, 16)]
        >>> bool(admissible(net).met)
        True

    Source:
        Wiatowski, Boelcskei (2018), "A Mathematical Theory of Deep Convolutional Neural
        Networks for Feature Extraction", IEEE Transactions on Information Theory 64,
        arXiv:1512.06293: module-sequences and their feature extractor.

    Differences:
        Periodic signals on a grid in place of square-integrable functions. On the grid
        subsampling expands (see `FrameModule.pooling_constant`), which the condition of
        admissibility takes into account, and translations are by whole samples. Real
        functions applied to both parts of a complex number keep their Lipschitz
        constant; the paper counts it twice.
    """

    modules: tuple[FrameModule, ...]

    def __init__(self, modules: Sequence[FrameModule]):
        self.modules = tuple(modules)
        if not self.modules:
            raise ValueError("FrameNet: `modules` must not be empty (got none).")
        for n, (one, next_) in enumerate(
            zip(self.modules, self.modules[1:], strict=False)
        ):
            wanted = tuple(side // one.factor for side in one.filters.shape)
            if next_.filters.shape != wanted:
                raise ValueError(
                    f"FrameNet: module {n + 1} must have filters on the grid {wanted}, "
                    f"what module {n} leaves (got {next_.filters.shape})."
                )

    @classmethod
    def repeat(
        cls,
        family: Callable[[tuple[int, ...]], FilterBank],
        shape: tuple[int, ...],
        *,
        depth: int,
        nonlinearity: Nonlinearity = "modulus",
        pool: Pool = "average",
        factor: int = 1,
        lipschitz: float | None = None,
    ) -> FrameNet:
        """An admissible network with the same kind of module in every layer.

        Args:
            family: Makes the bank for a grid; it is normalised.
            shape: The signals' grid.
            depth: The last layer's number, at least 0.
            nonlinearity, pool, factor, lipschitz: As for `FrameModule`.

        Returns:
            The network, of `depth + 1` modules.

        Raises:
            ValueError: A negative depth, a grid that `factor` does not divide so often.
        """
        if depth < 0:
            raise ValueError(
                f"FrameNet.repeat: `depth` must be at least 0 (got {depth})."
            )
        modules = []
        for layer in range(depth + 1):
            module = FrameModule(
                family(shape),
                nonlinearity,
                pool=pool,
                # Nothing follows the last layer, whose grid need not divide.
                factor=factor if layer < depth else 1,
                lipschitz=lipschitz,
            )
            bank = normalize_frame(module.filters, 1 / _growth(module))
            modules.append(eqx.tree_at(lambda m: m.filters, module, bank))
            shape = tuple(side // factor for side in shape)
        return cls(modules)

    @property
    def depth(self) -> int:
        """The last layer's number."""
        return len(self.modules) - 1

    def __call__(
        self, signal: Inexact[Array, ...]
    ) -> tuple[Complex[Array, "paths ..."], ...]:
        """The features of every layer, the first path of atoms varying slowest.

        Args:
            signal: Real or complex, on the first module's grid.

        Returns:
            One array a layer, (paths, *grid), complex in the signal's precision; where
            signal, output atom and nonlinearity are real, so are the features.

        Raises:
            ValueError: A signal of another shape, or one that is not finite.
        """
        check_shape("FrameNet", "signal", signal, self.modules[0].filters.shape)
        check_finite("FrameNet", "signal", signal)
        signal = jnp.asarray(signal)
        if not jnp.issubdtype(signal.dtype, jnp.inexact):
            signal = signal.astype(jnp.result_type(float))
        return _features(self, signal)

    def distance(
        self, one: Inexact[Array, ...], other: Inexact[Array, ...]
    ) -> Float[Array, ""]:
        """The norm of the difference of two signals' features, all layers together.

        Args:
            one, other: Signals, as for a call.

        Returns:
            The square root of the sum of squares over layers, paths and samples.

        Raises:
            ValueError: As a call.
        """
        return _norm_of_difference(self(one), self(other))


@eqx.filter_jit
def _features(net: FrameNet, signal):
    paths = signal.astype(np.result_type(signal.dtype, np.complex64))[None]
    features = [net.modules[0].features(paths)]
    for module, after in zip(net.modules, net.modules[1:], strict=False):
        paths = module.propagate(paths)
        features.append(after.features(paths))
    return tuple(features)


@jax.jit
def _norm_of_difference(ones, others):
    pairs = zip(ones, others, strict=True)
    return jnp.sqrt(sum(jnp.sum(jnp.abs(a - b) ** 2) for a, b in pairs))


class FrameBounds(NamedTuple):
    """How much of a signal's energy a frame's coefficients hold, at least and at most.

    Args:
        lower: The largest A with `A |f|^2 <= sum |f * g|^2` over all atoms.
        upper: The smallest B with `sum |f * g|^2 <= B |f|^2`.
    """

    lower: Float[Array, ""]
    upper: Float[Array, ""]


def frame_bounds(filters: FilterBank) -> FrameBounds:
    """The frame bounds of a bank, its output atom included.

    The least and the largest of `|output^|^2 + sum |atom^|^2` over the grid's
    frequencies: exact for periodic signals, rounded outward. One pass over the bank.
    The upper bound is no filter's norm: many weak filters may add up.

    Args:
        filters: The bank.

    Returns:
        Both bounds.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import FilterBank, frame_bounds
        >>> bank = FilterBank(jnp.ones((3, 8)), jnp.zeros(8))
        >>> [round(float(b), 3) for b in frame_bounds(bank)]
        [3.0, 3.0]

    Source:
        Wiatowski, Boelcskei (2018), arXiv:1512.06293, on semi-discrete frames.
    """
    return FrameBounds(*_extremes(filters))


@jax.jit
def _extremes(filters: FilterBank):
    total = jnp.abs(filters.output) ** 2 + jnp.sum(jnp.abs(filters.atoms) ** 2, 0)
    slack = _slack(filters)
    return jnp.min(total) * (1 - slack), jnp.max(total) * (1 + slack)


def normalize_frame(filters: FilterBank, bound: float = 1.0) -> FilterBank:
    """Scales a bank so that its upper frame bound is what is wanted, or just below.

    Args:
        filters: The bank; not all zero.
        bound: The upper frame bound to reach, positive: 1 for an admissible layer
            that neither nonlinearity nor pooling expands.

    Returns:
        The bank, all atoms multiplied by one number.

    Raises:
        ValueError: A bound that is not positive, or a bank of zeros.

    Example:
        >>> import jax
        >>> from varan.lipschitz import frame_bounds, normalize_frame, random_filters
        >>> bank = normalize_frame(random_filters((32,), 4, key=jax.random.key(0)))
        >>> bool(frame_bounds(bank).upper <= 1)
        True

    Source:
        Wiatowski, Boelcskei (2018), arXiv:1512.06293, on admissibility by scaling.
    """
    check_positive("normalize_frame", "bound", bound)
    upper = frame_bounds(filters).upper
    if not is_traced(upper) and upper == 0:
        raise ValueError("normalize_frame: `filters` must not all be zero.")
    # Rounding of the division and of the next evaluation must not carry it above.
    scale = jnp.sqrt(bound / upper) * (1 - 2 * _slack(filters))
    return jax.tree.map(lambda leaf: scale.astype(leaf.dtype) * leaf, filters)


def admissible(net: FrameNet) -> Certificate:
    """Whether a network cannot expand: `max(B, B L^2 R^2) <= 1` in every module.

    Then `|||Phi(f) - Phi(h)||| <= |f - h|_2` for all signals, whatever the filters.

    Args:
        net: The network.

    Returns:
        A certificate with the largest of the products and the tolerance 1; `.met` is
        the answer. A proof for periodic signals on the grid, in exact arithmetic of the
        network; an estimate where a module has a nonlinearity of its own, whose
        Lipschitz constant was declared.

    Example:
        >>> from varan.lipschitz import FrameModule, FrameNet, admissible
        >>> from varan.lipschitz import wavelet_filters
        >>> expanding = FrameModule(wavelet_filters((64,), 2), pool="max", factor=2)
        >>> found = admissible(FrameNet([expanding]))
        >>> round(float(found.value), 3), bool(found.met)
        (2.0, False)

    Source:
        Wiatowski, Boelcskei (2018), arXiv:1512.06293, the condition of admissibility
        and what the proof of deformation stability draws from it.
    """
    products = [_growth(m) * frame_bounds(m.filters).upper for m in net.modules]
    return Certificate(
        "admissibility",
        jnp.max(jnp.stack(products)),
        tol=1.0,
        proof=all(module.lipschitz is None for module in net.modules),
        statement="where value <= 1, |||Phi(f) - Phi(h)||| <= |f - h|_2 for periodic "
        "signals on the grid",
    )


def translation_bound(
    net: FrameNet, shift: int | tuple[int, ...], layer: int
) -> Certificate:
    """How far a layer's features can move when the signal is translated.

    `2 pi |t| K / (S_1 .. S_n)` with K the largest `|output^(w)| |w|`: after pooling by
    S the features have moved by `t / S` samples only. Costs a pass over the bank.

    Args:
        net: An admissible network.
        shift: t in samples, one number an axis; a multiple of the product of the
            pooling factors before the layer, because only then the features of the
            translated signal are the translated features.
        layer: n, from 0 to the network's depth.

    Returns:
        A certificate whose value times `|f|_2` bounds the change of layer n's features.

    Raises:
        ValueError: A layer that does not exist, a shift of another dimension or between
            the grid's points, a network that is not admissible.

    Example:
        >>> from varan.lipschitz import FrameNet, translation_bound, wavelet_filters
        >>> bank = lambda shape: wavelet_filters(shape, 2)
        >>> net = FrameNet.repeat(bank, (64,), depth=2, factor=2)
        >>> bounds = [float(translation_bound(net, 4, n).value) for n in range(3)]
        >>> [bounds[n + 1] < 0.55 * bounds[n] for n in range(2)]
        [True, True]

    Source:
        Wiatowski, Boelcskei (2018), arXiv:1512.06293, theorem 1 on vertical
        translation invariance.
    """
    owner = "translation_bound"
    if not 0 <= layer <= net.depth:
        raise ValueError(
            f"{owner}: `layer` must be 0 to {net.depth}, the depth (got {layer})."
        )
    shifts = np.atleast_1d(shift)
    filters, product = net.modules[layer].filters, 1
    for module in net.modules[:layer]:
        product *= module.factor
    if shifts.shape != (len(filters.shape),) or np.any(shifts % product):
        raise ValueError(
            f"{owner}: `shift` must be one multiple of {product} for each of "
            f"{len(filters.shape)} axes (got {shift}). In between, aliasing is no "
            "translation."
        )
    safe = admissible(net)
    if not is_traced(safe.value) and not safe.met:
        raise ValueError(
            f"{owner}: `net` must be admissible (got {float(safe.value):.3g} > 1). "
            "Normalise its frames with `normalize_frame`."
        )
    decay = _decay(filters)
    return Certificate(
        "translation bound",
        2 * math.pi * float(np.linalg.norm(shifts)) / product * decay,
        proof=safe.proof,
        statement=f"|||Phi^{layer}(T_t f) - Phi^{layer}(f)||| <= value |f|_2 for t = "
        f"{shift} and periodic signals on the grid",
        details={"decay": decay},
    )


@jax.jit
def _decay(filters: FilterBank):
    """K, the largest `|output^(w)| |w|`."""
    response = jnp.abs(filters.output)
    radius = np.sqrt(np.sum(frequencies(filters.shape) ** 2, 0))
    radius = jnp.asarray(radius, response.dtype)
    return jnp.max(response * radius) * (1 + _slack(filters))


def _growth(module: FrameModule) -> float:
    """What nonlinearity and pooling can do to energy, at least 1."""
    return max(1.0, (module.nonlinearity_constant * module.pooling_constant) ** 2)


def _slack(filters: FilterBank) -> float:
    """Relative rounding of a sum of as many squares as there are atoms."""
    eps = float(jnp.finfo(filters.output.dtype).eps)
    return (len(filters.atoms) + 8) * eps


def _check_own(owner: str, nonlinearity, lipschitz) -> None:
    if lipschitz is None:
        raise ValueError(
            f"{owner}: `lipschitz` must be given with a nonlinearity of your own."
        )
    check_positive(owner, "lipschitz", lipschitz)
    with jax.ensure_compile_time_eval():
        at_zero = np.asarray(nonlinearity(jnp.zeros(1, jnp.complex64)))
    if np.any(at_zero != 0):
        raise ValueError(
            f"{owner}: `nonlinearity` must map 0 to 0 (got {at_zero[0]}). Subtract its "
            "value there."
        )
