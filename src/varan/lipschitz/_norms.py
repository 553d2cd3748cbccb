"""Spectral norms of matrices: bounds that are proofs, and an estimate."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core._checks import (
    check_choice,
    check_finite,
    check_nonempty,
    check_shape,
)

_DENSE, _SQUARINGS, _SWEEPS = 512, 6, 30


def spectral_norm_bound(
    matrix: Float[Array, "rows columns"],
    *,
    method: Literal["auto", "svd", "gram", "holder", "collatz"] = "auto",
) -> Float[Array, ""]:
    """A number that the largest singular value does not exceed.

    - `"svd"`: the largest singular value itself; cubic in the smaller side.
    - `"gram"`: the Frobenius norm of the 64th power of the Gram matrix, its root: at
      most 4 % above for 100 rows, seven products of matrices.
    - `"holder"`: the root of the largest row sum times the largest column sum of the
      absolute values; reads the matrix once.
    - `"collatz"`: the Collatz-Wielandt quotient of the absolute values at a positive
      vector: close where the entries have one sign.
    - `"auto"`: `"svd"` up to a smaller side of 512, `"gram"` beyond.

    Rounding is covered outward in each, so every one is a proof in any precision and
    at any scale of the entries; half precisions are computed in float32.
    Differentiable almost everywhere.

    Args:
        matrix: Two-dimensional, finite, real and floating point.
        method: One of the above.

    Returns:
        The bound; NaN under jit if an entry is NaN. Infinite where the bound is above
        the largest number.

    Raises:
        ValueError: An array that is empty, not finite or not a matrix, or an unknown
            method.
        TypeError: Integers or complex numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import spectral_norm_bound
        >>> matrix = jnp.array([[2.0, 1.0], [1.0, 2.0]])
        >>> for method in ("svd", "gram"):
        ...     bound = spectral_norm_bound(matrix, method=method)
        ...     print(method, round(float(bound), 3))
        svd 3.0
        gram 3.0

    Source: quotients: L. Collatz, 1942, "Einschließungssatz für die
        charakteristischen Zahlen von Matrizen", Mathematische Zeitschrift 48; powers
        of the Gram matrix: B. Delattre, Q. Barthélemy, A. Araujo and A. Allauzen, 2023,
        "Efficient bound of Lipschitz constant for convolutional layers by Gram
        iteration", arXiv:2305.16173.
    """
    owner = "spectral_norm_bound"
    _check_matrix(owner, matrix)
    check_choice(owner, "method", method, ("auto", *_METHODS))
    if method == "auto":
        method = "svd" if min(matrix.shape) <= _DENSE else "gram"
    half = jnp.finfo(matrix.dtype).bits < 32
    wide = matrix.astype(jnp.float32) if half else matrix
    return _cast_up(_bound_at_any_scale(_METHODS[method], wide), matrix.dtype)


def _bound_at_any_scale(method, matrix):
    """A method's bound of the matrix at size one, scaled back.

    Powers of two scale exactly. An entry that underflows when scaled changes the norm,
    then at least one, by far less than the rounding that the methods cover. Subnormal
    entries may count as zeros on a CPU: each adds at most the smallest normal number
    to the norm, in the square.
    """
    subnormal = _subnormal(matrix)
    normal = jnp.where(subnormal, jnp.zeros_like(matrix), matrix)
    down, up = unit_scaling(normal)
    count = jnp.sum(subnormal, dtype=matrix.dtype)
    lost = jnp.sqrt(count) * jnp.finfo(matrix.dtype).smallest_normal
    return (method(normal * down) * up + lost) * (1 + 4 * _eps(matrix))


def _subnormal(matrix):
    """Which entries are subnormal, by their bits: comparing may flush them to zero."""
    info = jnp.finfo(matrix.dtype)
    bits = jax.lax.bitcast_convert_type(
        jax.lax.stop_gradient(matrix), jnp.dtype(f"uint{info.bits}")
    )
    unsigned = bits << 1
    return (unsigned != 0) & (unsigned >> (info.nmant + 1) == 0)


def _cast_up(bound, dtype):
    """The bound in a narrower dtype, rounded up."""
    if bound.dtype == dtype:
        return bound
    info = jnp.finfo(dtype)
    least = jnp.where(bound > 0, float(info.smallest_normal), 0)
    bound = jnp.maximum(bound, least.astype(bound.dtype))
    return (bound * (1 + float(info.eps))).astype(dtype)


def spectral_norm_estimate(
    matrix: Float[Array, "rows columns"],
    *,
    steps: int = 30,
    start: Float[Array, " columns"] | None = None,
) -> Float[Array, ""]:
    """A lower estimate of the largest singular value, by power iteration.

    The value is `‖matrix v‖` at a unit vector `v`, so up to rounding it never exceeds
    the norm and may lie far below it: use `spectral_norm_bound` for a proof.

    Args:
        matrix: Two-dimensional, finite, real and floating point.
        steps: Products with the matrix and its transpose, at least 0.
        start: Where to begin; a fixed vector without structure if left out.

    Returns:
        The estimate, differentiable in the matrix (the vector is held fixed).

    Raises:
        ValueError: An array that is empty, not finite or of the wrong shape, or
            negative `steps`.
        TypeError: Integers or complex numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import spectral_norm_estimate
        >>> matrix = jnp.array([[2.0, 1.0], [1.0, 2.0]])
        >>> round(float(spectral_norm_estimate(matrix)), 3)
        3.0
    """
    owner = "spectral_norm_estimate"
    _check_matrix(owner, matrix)
    if steps < 0:
        raise ValueError(f"{owner}: `steps` must not be negative (got {steps}).")
    if start is None:
        start = _unstructured(matrix)
    else:
        check_shape(owner, "start", start, matrix.shape[1:])
        check_finite(owner, "start", start)
    # At size one no product of entries leaves the range of the numbers.
    down, up = unit_scaling(matrix)
    matrix, start = matrix * down, start * unit_scaling(start)[0]
    vector = _dominant(jax.lax.stop_gradient(matrix), start, steps)
    return jnp.linalg.norm(matrix @ vector) * up


def _check_matrix(owner, matrix):
    check_shape(owner, "matrix", matrix, (None, None))
    check_nonempty(owner, "matrix", matrix)
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        raise TypeError(
            f"{owner}: `matrix` must be real and floating point (got {matrix.dtype}). "
            "Convert it with `astype`."
        )
    check_finite(owner, "matrix", matrix)


def _svd(matrix):
    # Singular values are backward stable: the error is a small multiple of eps.
    return jnp.linalg.norm(matrix, 2) * (1 + 4 * sum(matrix.shape) * _eps(matrix))


def _holder(matrix):
    sizes = jnp.abs(matrix)
    product = jnp.max(jnp.sum(sizes, 0)) * jnp.max(jnp.sum(sizes, 1))
    return jnp.sqrt(product) * (1 + sum(matrix.shape) * _eps(matrix))


def _gram(matrix):
    """Squares the Gram matrix; carries what rounding may have moved its norm by.

    Scaled by powers of two, which round nothing, the matrix stays near norm one. If
    the exact one is within `error` of the computed `power` (Frobenius), its square is
    within `rounding |power|^2 + (2 |power| + error) error` of the computed square.
    """
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    rounding = (sum(matrix.shape) + 2) * _eps(matrix)
    scale = _power_of_two(jnp.linalg.norm(matrix))
    matrix = matrix / scale
    power, log = matrix.T @ matrix, jnp.log2(scale)
    error = rounding * jnp.sum(matrix**2)
    for level in range(_SQUARINGS):
        size = jnp.linalg.norm(power)
        power, error = (
            power @ power,
            rounding * size**2 + (2 * size + error) * error,
        )
        scale = _power_of_two(jnp.linalg.norm(power))
        power, error = power / scale, error / scale
        log = log + jnp.log2(scale) / 2 ** (level + 2)
    nonzero = jnp.any(matrix != 0)
    size = jnp.linalg.norm(power) * (1 + rounding) + error
    size = jnp.where(nonzero, size, 1)
    # Few numbers remain; their logarithms' rounding is covered by the last factor.
    log = log + jnp.log2(size) / 2 ** (_SQUARINGS + 1)
    slack = 1 + 8 * (1 + jnp.abs(log)) * _eps(matrix)
    return jnp.where(nonzero, 2**log * slack, 0)


def _collatz(matrix):
    sizes = jnp.abs(matrix)
    fixed = jax.lax.stop_gradient(sizes)
    vector = _dominant(fixed, jnp.ones_like(matrix[0]), _SWEEPS)
    # The quotient bounds at every positive vector.
    vector = jnp.maximum(vector, jnp.sqrt(_eps(matrix)) * jnp.max(vector))
    vector = jnp.where(vector > 0, vector, 1)
    quotient = jnp.max(sizes.T @ (sizes @ vector) / vector)
    return jnp.sqrt(quotient) * (1 + (sum(matrix.shape) + 4) * _eps(matrix))


_METHODS = {"svd": _svd, "gram": _gram, "holder": _holder, "collatz": _collatz}


def _dominant(matrix, start, steps):
    """A unit vector near the leading right singular vector."""

    def one(_, vector):
        return _unit(matrix.T @ _unit(matrix @ vector))

    return jax.lax.fori_loop(0, steps, one, _unit(start))


def _unit(vector):
    length = jnp.linalg.norm(vector)
    return vector / jnp.where(length > 0, length, 1)


def _unstructured(matrix):
    places = jnp.arange(matrix.shape[1], dtype=matrix.dtype)
    return 1 + jnp.sin(1 + 12.9898 * places) / 2


def _power_of_two(value):
    """The power of two next to a number; one for zero. No gradient flows."""
    value = jax.lax.stop_gradient(value)
    _, exponent = jnp.frexp(jnp.where(value > 0, value, 1))
    return jnp.ldexp(jnp.ones_like(value), exponent)


def unit_scaling(array):
    """Powers of two: the factor that brings the largest size near one, and its inverse.

    Both are one for zeros, and always normal numbers. Factors, because compilers turn
    `a / b / c` into `a / (b c)`, which may overflow. No gradient flows.
    """
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(array)))
    usable = (largest > 0) & jnp.isfinite(largest)
    one = jnp.ones_like(largest)
    _, exponent = jnp.frexp(jnp.where(usable, largest, one))
    least = int(jnp.finfo(array.dtype).minexp)
    exponent = jnp.clip(exponent - 1, least, -least)
    return jnp.ldexp(one, -exponent), jnp.ldexp(one, exponent)


def _eps(matrix):
    return jnp.asarray(jnp.finfo(matrix.dtype).eps, matrix.dtype)
