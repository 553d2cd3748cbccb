"""Filters of scattering networks: wavelets, Weyl-Heisenberg and random families.

A bank is given by its frequency responses on the FFT grid of a periodic signal: some
atoms, which carry a signal on to the next layer, and one low-pass atom, through which a
layer's features leave. Frequencies are in cycles per sample, between -1/2 and 1/2.
"""

from __future__ import annotations

import math
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact, PRNGKeyArray

from ..core._checks import check_choice, check_finite, check_nonempty

# Centre of the finest Morlet atom, and the width of an atom relative to its centre:
# neighbours an octave apart meet at a third of their height.
_FINEST, _RELATIVE_WIDTH = 0.375, 0.35


class FilterBank(eqx.Module):
    """Filters of periodic signals by their frequency responses.

    Learned filters fit too: everything here is differentiable in both fields.

    Args:
        atoms: Discrete Fourier transforms of the filters, (atoms, *grid), real or
            complex; at least one atom, a grid of one or two dimensions.
        output: That of the output atom, of the grid's shape.

    Raises:
        ValueError: A grid of other dimensions, shapes that differ, no atom, values
            that are not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import FilterBank, frame_bounds
        >>> taps = jnp.zeros((1, 8)).at[0, :2].set(jnp.array([0.5, -0.5]))
        >>> mean = jnp.zeros(8).at[:2].set(0.5)
        >>> haar = FilterBank(jnp.fft.fft(taps), jnp.fft.fft(mean))
        >>> [round(float(b), 3) for b in frame_bounds(haar)]
        [1.0, 1.0]
    """

    atoms: Inexact[Array, "atoms ..."]
    output: Inexact[Array, ...]

    def __check_init__(self):
        check_nonempty("FilterBank", "atoms", self.atoms)
        if self.output.ndim not in (1, 2):
            raise ValueError(
                "FilterBank: the grid must have one or two dimensions (got "
                f"{self.output.ndim}: `output` of shape {self.output.shape})."
            )
        if self.atoms.shape[1:] != self.output.shape:
            raise ValueError(
                "FilterBank: `atoms` must be (atoms, *grid) with the grid of `output` "
                f"(got {self.atoms.shape} and {self.output.shape})."
            )
        check_finite("FilterBank", "atoms", self.atoms)
        check_finite("FilterBank", "output", self.output)

    @property
    def shape(self) -> tuple[int, ...]:
        """The grid's shape."""
        return self.output.shape


def wavelet_filters(
    shape: tuple[int, ...],
    scales: int,
    *,
    kind: Literal["meyer", "morlet"] = "meyer",
    orientations: int | None = None,
) -> FilterBank:
    """Directional wavelets, an octave a scale, with their low-pass.

    Meyer's are products of a radial and an angular window whose squares add up to one:
    a tight frame of bound 1. Morlet's are Gaussians in frequency, corrected to vanish
    at zero; `normalize_frame` brings them below a bound.

    Args:
        shape: The grid, one or two lengths.
        scales: Octaves below the finest, at least 1.
        kind: `"meyer"` or `"morlet"`.
        orientations: Directions on the whole circle, at least 2; 4 by default. In one
            dimension the two signs of the frequency, always.

    Returns:
        The bank, `scales * orientations` atoms with real responses.

    Raises:
        ValueError: A grid that is empty or of other dimensions, too few scales or
            orientations, an unknown kind.

    Example:
        >>> from varan.lipschitz import frame_bounds, wavelet_filters
        >>> bank = wavelet_filters((64,), 3)
        >>> bank.atoms.shape, [round(float(b), 3) for b in frame_bounds(bank)]
        ((6, 64), [1.0, 1.0])

    Source:
        Meyer (1985), "Principe d'incertitude, bases hilbertiennes et algebres
        d'operateurs", and Grossmann, Morlet (1984), "Decomposition of Hardy functions
        into square integrable wavelets of constant shape", in the frames of
        arXiv:1512.06293.
    """
    owner = "wavelet_filters"
    check_choice(owner, "kind", kind, ("meyer", "morlet"))
    _check_grid(owner, shape)
    directions = orientations or (2 if len(shape) == 1 else 4)
    if scales < 1 or directions < 2 or (len(shape) == 1 and directions != 2):
        raise ValueError(
            f"{owner}: `scales` must be at least 1 and `orientations` at least 2, 2 in "
            f"one dimension (got {scales} and {orientations})."
        )
    grid = frequencies(shape)
    if kind == "meyer":
        return _meyer(grid, scales, directions)
    return _morlet(grid, scales, directions)


def weyl_heisenberg_filters(shape: tuple[int, ...], bands: int) -> FilterBank:
    """One window moved along the frequency axis in equal steps.

    Cosine windows that overlap by half, so that their squares add up to one: a tight
    frame of bound 1. In two dimensions products of both axes' windows.

    Args:
        shape: The grid, one or two lengths.
        bands: Windows an axis, at least 2; the one at zero is the output atom.

    Returns:
        The bank, `bands ** len(shape) - 1` atoms with real responses.

    Raises:
        ValueError: A grid that is empty or of other dimensions, fewer than two bands.

    Example:
        >>> from varan.lipschitz import frame_bounds, weyl_heisenberg_filters
        >>> bank = weyl_heisenberg_filters((16, 16), 3)
        >>> bank.atoms.shape, [round(float(b), 3) for b in frame_bounds(bank)]
        ((8, 16, 16), [1.0, 1.0])

    Source:
        The Weyl-Heisenberg frames of Wiatowski, Boelcskei (2018), arXiv:1512.06293,
        with a cosine window.
    """
    _check_grid("weyl_heisenberg_filters", shape)
    if bands < 2:
        raise ValueError(
            f"weyl_heisenberg_filters: `bands` must be at least 2 (got {bands})."
        )
    windows = np.ones((1, *(1 for _ in shape)))
    for line in frequencies(shape):
        away = np.abs(_wrapped(line - _column(np.arange(bands) / bands, shape)))
        one = _half_cosine(away * bands)
        windows = (windows[:, None] * one).reshape(-1, *shape)
    return _bank(windows[1:], windows[0])


def random_filters(
    shape: tuple[int, ...], atoms: int, *, width: int = 9, key: PRNGKeyArray
) -> FilterBank:
    """Normal taps on a small support, as networks start from, and a local mean.

    Of variance 1 / (atoms taps), so that the atoms together neither gain nor lose
    energy on average. The bank is no tight frame; `normalize_frame` brings it below a
    bound.

    Args:
        shape: The grid, one or two lengths.
        atoms: Number of random filters, at least 1.
        width: Taps a side, of the output atom's mean too; cut to the grid.
        key: Randomness.

    Returns:
        The bank, with complex responses.

    Raises:
        ValueError: A grid that is empty or of other dimensions, no atom or no tap.

    Example:
        >>> import jax
        >>> from varan.lipschitz import random_filters
        >>> random_filters((32,), 6, key=jax.random.key(0)).atoms.shape
        (6, 32)
    """
    _check_grid("random_filters", shape)
    if atoms < 1 or width < 1:
        raise ValueError(
            "random_filters: `atoms` and `width` must be at least 1 (got "
            f"{atoms} and {width})."
        )
    sides = tuple(min(width, side) for side in shape)
    size = math.prod(sides)
    taps = jax.random.normal(key, (atoms, *sides)) / math.sqrt(atoms * size)
    mean = jnp.full((1, *sides), 1 / size)
    pad = [(0, 0), *((0, side - own) for side, own in zip(shape, sides, strict=True))]
    axes = range(1, len(shape) + 1)
    responses = jnp.fft.fftn(jnp.pad(jnp.concatenate([taps, mean]), pad), axes=axes)
    return FilterBank(responses[:-1], responses[-1])


def frequencies(shape: tuple[int, ...]) -> Float[np.ndarray, "dimensions ..."]:
    """Each axis's frequency at each point of the FFT grid, in cycles per sample."""
    lines = [np.fft.fftfreq(side) for side in shape]
    return np.stack(np.meshgrid(*lines, indexing="ij"))


# Families: on the host, in double precision -------------------------------------------


def _meyer(grid: np.ndarray, scales: int, directions: int) -> FilterBank:
    radius = np.sqrt(np.sum(grid**2, 0))
    angular = _angular_windows(grid, directions)
    low, atoms = np.ones_like(radius), []
    for scale in range(1, scales + 1):
        edge = 2.0**-scale / 3
        # Smooth from 0 at `edge` to 1 at `2 edge`, odd about the middle.
        t = np.clip(radius / edge - 1, 0, 1)
        turn = np.pi / 2 * t**4 * (35 - 84 * t + 70 * t**2 - 20 * t**3)
        atoms.append((low * np.sin(turn))[None] * angular)
        low = low * np.cos(turn)
    return _bank(np.concatenate(atoms), low)


def _morlet(grid: np.ndarray, scales: int, directions: int) -> FilterBank:
    atoms = []
    for scale in range(scales):
        centre = _FINEST * 2.0**-scale
        width = _RELATIVE_WIDTH * centre
        zero = math.exp(-(centre**2) / 2 / width**2)
        for turn in range(directions):
            angle = 2 * math.pi * turn / directions
            heading = np.array([math.cos(angle), math.sin(angle)])[: len(grid)]
            away = _wrapped(grid - _column(centre * heading, grid.shape[1:]))
            atoms.append(_bump(away, width) - zero * _bump(grid, width))
    coarsest = _FINEST * 2.0 ** (1 - scales)
    return _bank(np.stack(atoms), _bump(grid, coarsest / 2))


def _bump(away: np.ndarray, width: float) -> np.ndarray:
    return np.exp(-np.sum(away**2, 0) / 2 / width**2)


def _angular_windows(grid: np.ndarray, directions: int) -> np.ndarray:
    """Windows on the circle of directions whose squares add up to one."""
    if len(grid) == 1:
        return np.stack([grid[0] > 0, grid[0] < 0]).astype(float)
    turns = np.arctan2(grid[1], grid[0]) / (2 * np.pi)
    own = _column(np.arange(directions) / directions, grid.shape[1:])
    return _half_cosine(np.abs(_wrapped(turns - own)) * directions)


def _half_cosine(away: np.ndarray) -> np.ndarray:
    """The cosine's arch about 0, zero from a distance of 1 on."""
    return np.where(away < 1, np.cos(np.pi / 2 * away), 0.0)


def _wrapped(x: np.ndarray) -> np.ndarray:
    """The representative modulo 1 in [-1/2, 1/2)."""
    return (x + 0.5) % 1 - 0.5


def _column(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return values.reshape(-1, *(1 for _ in shape))


def _bank(atoms: np.ndarray, output: np.ndarray) -> FilterBank:
    dtype = jnp.result_type(float)
    return FilterBank(jnp.asarray(atoms, dtype), jnp.asarray(output, dtype))


def _check_grid(owner: str, shape: tuple[int, ...]) -> None:
    if len(shape) not in (1, 2) or min(shape) < 1:
        raise ValueError(
            f"{owner}: `shape` must be one or two positive lengths (got {shape})."
        )
