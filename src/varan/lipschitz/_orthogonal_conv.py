"""Orthogonal convolutions: when they exist, how far one is, and a loss that gets there.

A convolution with kernel K (M filters over C channels, side k, stride S) maps circular
signals of C channels and side S N to M channels and side N. Its matrix is orthogonal by
rows where `M <= C S^d` and by columns where `M >= C S^d` (d = 1 for signals, 2 for
images) exactly if the kernel's correlations with itself, at shifts by the stride, are
those of one point. The sum of their squared errors is a loss that no image size enters,
yet N^d times it is the squared distance of the matrix from an orthogonal one, and a
constant times it bounds the error in the spectral norm for images of every size.

Flattening the kernel to `M x C k^d` and making that orthogonal is not the same.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ..core import Certificate
from ..core._checks import check_choice, check_finite
from ._one_lipschitz import check_sizes

Kernel = Float[Array, "filters channels ..."]
Padding = Literal["circular", "valid", "zero"]


def orth_conv_loss(kernel: Kernel, stride: int = 1) -> Float[Array, ""]:
    """The squared error of a convolution's correlations: 0 exactly if it is orthogonal.

    `|conv(K, K; stride S, padding P) - I|^2` with `P = floor((k - 1) / S) S`, less
    `M - C S^d` where there are more filters than that. Equal to the squared Frobenius
    distance of the layer's matrix from an orthogonal one over `N^d`, for circular
    padding and every `S N >= 2 k - 1`. Costs `M^2 C k^d (2 P / S + 1)^d` products,
    however large the images.

    Args:
        kernel: Filters by channels by one side (signals) or two (images); of a
            convolution in groups, the kernel of each.
        stride: At least 1, the same along both sides.

    Returns:
        The loss, differentiable; a rounding below 0 at worst.

    Raises:
        ValueError: A kernel of another form or not finite, or a stride below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import orth_conv_loss
        >>> float(orth_conv_loss(jnp.array([[[0.0, 1.0, 0.0]]])))
        0.0

    Source:
        Wang, Chen, Chakraborty and Yu, 2020, "Orthogonal Convolutional Neural
        Networks", arXiv:1911.12207; Achour, Malgouyres and Mamalet, 2022, "Existence,
        Stability and Scalability of Orthogonal Convolutional Neural Networks",
        arXiv:2108.05623, theorem 2.
    """
    filters, channels, side, dimensions = _form("orth_conv_loss", kernel, stride)
    reach = (side - 1) // stride * stride
    correlations = jax.lax.conv_general_dilated(
        kernel,
        kernel,
        (stride,) * dimensions,
        [(reach, reach)] * dimensions,
        dimension_numbers=_layout(dimensions),
    )
    centre = (slice(None), slice(None), *[reach // stride] * dimensions)
    eye = jnp.eye(filters, dtype=kernel.dtype)
    errors = correlations.at[centre].add(-eye)
    surplus = max(filters - channels * stride**dimensions, 0)
    return jnp.sum(errors**2) - surplus


def conv_singular_values(
    kernel: Kernel, size: int, stride: int = 1
) -> Float[Array, "frequencies values"]:
    """All singular values of a circular convolution, by Fourier blocks.

    The matrix is block diagonal over the `N^d` frequencies of the output, each block
    `M x C S^d`: the transform of the kernel's phases. Costs one small decomposition a
    frequency in place of one of the whole matrix.

    Args:
        kernel: As for `orth_conv_loss`.
        size: Side N of the output; the input's is `N stride`, at least the kernel's.
        stride: As for `orth_conv_loss`.

    Returns:
        One row a frequency, descending.

    Raises:
        ValueError: As `orth_conv_loss`, or a size at which the kernel does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import conv_singular_values
        >>> values = conv_singular_values(jnp.array([[[1.0, -1.0]]]), 4)
        >>> [round(float(v), 3) for v in values[:, 0]]
        [0.0, 1.414, 2.0, 1.414]

    Source:
        Sedghi, Gupta and Long, 2019, "The Singular Values of Convolutional Layers",
        arXiv:1805.10408; with a stride, arXiv:2108.05623, section 5.
    """
    owner = "conv_singular_values"
    _, _, side, _ = _form(owner, kernel, stride)
    if size * stride < side:
        raise ValueError(
            f"{owner}: `size` times `stride` must be at least the kernel's side {side} "
            f"(got {size * stride})."
        )
    return jnp.linalg.svd(_blocks(kernel, size, stride), compute_uv=False)


class OrthogonalityErrors(eqx.Module):
    """How far a circular convolution is from orthogonal.

    Args:
        frobenius: Of `A A' - I` (rows) or `A' A - I` (columns), A the layer's matrix.
        spectral: The largest singular value of the same: `|sigma^2 - 1|` at worst,
            widened by the rounding.
        bound: A number that `spectral` does not exceed for images of any size.
        case: `"rows"` or `"columns"`: what is compared with the identity.
    """

    frobenius: Float[Array, ""]
    spectral: Float[Array, ""]
    bound: Float[Array, ""]
    case: Literal["rows", "columns"] = eqx.field(static=True)

    @property
    def certificate(self) -> Certificate:
        """That the layer nearly keeps lengths, at this size."""
        where = "all x" if self.case == "columns" else "all x in the span of the rows"
        return Certificate(
            "isometry error",
            self.spectral,
            proof=True,
            statement=f"| |A x|^2 - |x|^2 | <= value |x|^2 for {where}, A the layer "
            "with circular padding at this size",
            details={"frobenius": self.frobenius, "any_size": self.bound},
        )


def orthogonality_errors(
    kernel: Kernel, size: int, stride: int = 1
) -> OrthogonalityErrors:
    """Distances of a circular convolution from an orthogonal one, in two norms.

    The Frobenius norm is `sqrt(N^d loss)`; the spectral norm comes from the Fourier
    blocks. Both cases obey `spectral^2 <= (2 floor((k - 1) / S) + 1)^d loss`, whatever
    N: a block of the error at one frequency is a sum of that many correlation errors,
    and Cauchy's inequality does the rest.

    Args:
        kernel: As for `orth_conv_loss`.
        size: Side N of the output, with `N stride >= 2 k - 1`.
        stride: As for `orth_conv_loss`.

    Returns:
        The errors, differentiable; `certificate` says what they prove.

    Raises:
        ValueError: As `orth_conv_loss`, or images on which the kernel's correlations
            wrap around, `N stride < 2 k - 1`: there they do not determine the errors.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import orthogonality_errors
        >>> found = orthogonality_errors(jnp.array([[[0.0, 1.1, 0.0]]]), 8)
        >>> round(float(found.spectral), 3), found.certificate.proof
        (0.21, True)

    Source:
        Achour, Malgouyres and Mamalet, 2022, arXiv:2108.05623, theorems 2 and 3.

    Differences: The constant has no factor M, and is the same in both cases: derived
        here with Frobenius norms of the correlations and of their phases.
    """
    owner = "orthogonality_errors"
    filters, channels, side, dimensions = _form(owner, kernel, stride)
    if size * stride < 2 * side - 1:
        raise ValueError(
            f"{owner}: `size` times `stride` must be at least {2 * side - 1}, twice "
            f"the kernel's side less one (got {size * stride}). Take a larger image."
        )
    squares = conv_singular_values(kernel, size, stride) ** 2
    columns = channels * stride**dimensions
    eps = jnp.asarray(jnp.finfo(kernel.dtype).eps, kernel.dtype)
    rounding = 8 * (filters + columns + math.log2(size * stride)) * eps
    # What the decompositions and the transform err by in each square.
    slack = rounding * (1 + jnp.max(squares))
    frobenius = jnp.linalg.norm(squares - 1)
    # The root of the loss: unlike the loss itself, no difference of large numbers.
    root = frobenius / size ** (dimensions / 2) + slack * squares.shape[1] ** 0.5
    terms = 2 * ((side - 1) // stride) + 1
    return OrthogonalityErrors(
        frobenius,
        jnp.max(jnp.abs(squares - 1)) + slack,
        terms ** (dimensions / 2) * root,
        "columns" if filters > columns else "rows",
    )


class OrthogonalConvExistence(NamedTuple):
    """Whether an orthogonal convolution of a form exists, and why.

    Args:
        exists: The answer.
        case: `"rows"` if `M <= C S^d`, else `"columns"`: what would be orthonormal.
        reason: One sentence.
    """

    exists: bool
    case: Literal["rows", "columns"]
    reason: str


def orthogonal_conv_exists(
    filters: int,
    channels: int,
    side: int,
    stride: int = 1,
    *,
    dimensions: int = 2,
    padding: Padding = "circular",
) -> OrthogonalConvExistence:
    """Whether any kernel of a form makes the convolution orthogonal.

    For images with `S N >= 2 k - 1`, where necessary and sufficient coincide. Padding
    with zeros or none leaves little: pixels at the border meet fewer taps than others,
    and as all must weigh the same, the taps that they miss have to vanish.

    Args:
        filters: M.
        channels: C.
        side: Of the kernel, k. With `padding="zero"`, `(k - 1) // 2` zeros stand
            before the image and the rest after it.
        stride: S.
        dimensions: 1 for signals, 2 for images.
        padding: `"circular"`, `"valid"` (none) or `"zero"` (to the same size over S).

    Returns:
        An `OrthogonalConvExistence`.

    Raises:
        ValueError: A number below 1 or an unknown padding.

    Example:
        >>> from varan.lipschitz import orthogonal_conv_exists
        >>> orthogonal_conv_exists(64, 16, 3, 2).exists
        True
        >>> orthogonal_conv_exists(64, 16, 3, padding="valid").exists
        False

    Source:
        Achour, Malgouyres and Mamalet, 2022, arXiv:2108.05623, theorem 1 and
        propositions 1 to 3.

    Differences: The paper's limits for `"valid"` and `"zero"` are completed to all
        strides by the same count of taps at the border.
    """
    owner = "orthogonal_conv_exists"
    check_sizes(
        owner,
        filters=filters,
        channels=channels,
        side=side,
        stride=stride,
        dimensions=dimensions,
    )
    check_choice(owner, "padding", padding, ("circular", "valid", "zero"))
    taps = min(stride, side - _before(side) if padding == "zero" else side)
    if filters <= channels * stride**dimensions:
        most = channels * taps**dimensions
        return OrthogonalConvExistence(
            filters <= most,
            "rows",
            f"{filters} filters must be orthonormal on the {most} taps that may differ "
            "from zero without meeting another position's",
        )
    if padding == "valid":
        return OrthogonalConvExistence(
            side == stride,
            "columns",
            "without padding every pixel weighs the same only if patches tile the "
            "image, so that the kernel's side is the stride",
        )
    return OrthogonalConvExistence(
        taps == stride,
        "columns",
        f"every pixel must meet a tap: {taps} usable taps a side for a stride of "
        f"{stride}",
    )


def construct_orthogonal_conv(
    filters: int,
    channels: int,
    side: int,
    stride: int = 1,
    *,
    dimensions: int = 2,
    padding: Padding = "circular",
    key: PRNGKeyArray,
) -> Kernel:
    """A random kernel whose convolution is orthogonal.

    An orthonormal matrix on one patch of the stride's size; where the padding allows
    it, further taps come from products with `P + (I - P) z`, P a random projection and
    z a shift by the stride, each of which is orthogonal at every frequency.

    Args:
        filters, channels, side, stride, dimensions, padding: As for
            `orthogonal_conv_exists`.
        key: Random key.

    Returns:
        The kernel, filters by channels by sides.

    Raises:
        ValueError: As `orthogonal_conv_exists`, or where none exists.

    Example:
        >>> import jax
        >>> from varan.lipschitz import construct_orthogonal_conv, orth_conv_loss
        >>> kernel = construct_orthogonal_conv(8, 2, 5, 2, key=jax.random.key(0))
        >>> kernel.shape, bool(abs(orth_conv_loss(kernel, 2)) < 1e-5)
        ((8, 2, 5, 5), True)

    Source:
        Existence: arXiv:2108.05623, theorem 1; factors: P. P. Vaidyanathan, 1993,
        "Multirate Systems and Filter Banks", chapter 14.
    """
    found = orthogonal_conv_exists(
        filters, channels, side, stride, dimensions=dimensions, padding=padding
    )
    if not found.exists:
        raise ValueError(
            "construct_orthogonal_conv: no orthogonal convolution of this form exists: "
            f"{found.reason}."
        )
    first = _before(side) if padding == "zero" else 0
    taps = min(stride, side - first)
    width = channels * taps**dimensions
    for_matrix, for_factors = jax.random.split(key)
    matrix = jax.nn.initializers.orthogonal()(
        for_matrix, (filters, width), jnp.result_type(float)
    )
    phases = matrix[(..., *[None] * dimensions)]
    # Without padding the case of columns leaves one patch, and zeros bar every shift.
    extra = 0 if padding == "zero" else max(side // stride - 1, 0)
    for axis, step in product(range(dimensions), range(extra)):
        draw = jax.random.fold_in(for_factors, axis * extra + step)
        phases = _lengthened(phases, axis + 2, draw)
    return _kernel(phases, channels, taps, stride, first, side)


def _lengthened(phases, axis, key):
    """Times `P + (I - P) z` along one axis of shifts, P of half the rank."""
    width = phases.shape[1]
    draw = jax.random.normal(key, (width, (width + 1) // 2), phases.dtype)
    basis, _ = jnp.linalg.qr(draw)
    kept = jnp.einsum("mj...,ji->mi...", phases, basis @ basis.T)
    ends = [(0, 0)] * phases.ndim
    before, after = list(ends), list(ends)
    before[axis], after[axis] = (1, 0), (0, 1)
    return jnp.pad(kept, after) + jnp.pad(phases - kept, before)


def _kernel(phases, channels, taps, stride, first, side):
    """From phases and shifts by the stride to taps, the first at `first`."""
    filters, _, *shifts = phases.shape
    d = len(shifts)
    split = phases.reshape(filters, channels, *[taps] * d, *shifts)
    order = [axis for k in range(d) for axis in (2 + d + k, 2 + k)]
    split = split.transpose(0, 1, *order)
    split = jnp.pad(split, [(0, 0)] * 2 + [(0, 0), (0, stride - taps)] * d)
    kernel = split.reshape(filters, channels, *[n * stride for n in shifts])
    kernel = kernel[(..., *[slice(0, side - first)] * d)]
    room = [(first, side - first - n) for n in kernel.shape[2:]]
    return jnp.pad(kernel, [(0, 0), (0, 0), *room])


class OrthConv2d(eqx.Module):
    """A convolution of images with circular padding, to be kept nearly orthogonal.

    An ordinary layer that knows its loss: add `weight * layer.loss()` to what is
    minimised. Starts orthogonal where that is possible.

    Args:
        channels: Of the input.
        filters: Of the output.
        side: Of the kernel; `(side - 1) // 2` pixels stand before the first.
        stride: Divides the image's sides.
        key: Random key of the kernel.

    Raises:
        ValueError: A number below 1; in the call, an image whose sides the stride does
            not divide or that is smaller than the kernel.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.lipschitz import OrthConv2d
        >>> layer = OrthConv2d(3, 12, 3, 2, key=jax.random.key(0))
        >>> x = jax.random.normal(jax.random.key(1), (3, 8, 8))
        >>> y = layer(x)
        >>> y.shape, bool(jnp.isclose(jnp.sum(y**2), jnp.sum(x**2)))
        ((12, 4, 4), True)

    Source:
        Achour, Malgouyres and Mamalet, 2022, arXiv:2108.05623.
    """

    kernel: Float[Array, "filters channels side side"]
    bias: Float[Array, " filters"]
    stride: int = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        filters: int,
        side: int = 3,
        stride: int = 1,
        *,
        key: PRNGKeyArray,
    ):
        form = (filters, channels, side, stride)
        if orthogonal_conv_exists(*form).exists:
            self.kernel = construct_orthogonal_conv(*form, key=key)
        else:
            draw = jax.random.normal(key, (filters, channels, side, side))
            self.kernel = draw / (channels * side**2) ** 0.5
        self.bias = jnp.zeros(filters)
        self.stride = stride

    def __call__(
        self, x: Float[Array, "channels height width"]
    ) -> Float[Array, "filters rows columns"]:
        """The output for one image."""
        side = self.kernel.shape[-1]
        if any(n % self.stride or n < side for n in x.shape[1:]):
            raise ValueError(
                f"OrthConv2d: the image's sides must be multiples of {self.stride} and "
                f"at least {side} (got {x.shape[1:]})."
            )
        before = _before(side)
        around = (before, side - 1 - before)
        x = jnp.pad(x, [(0, 0), around, around], mode="wrap")
        y = jax.lax.conv_general_dilated(
            x[None],
            self.kernel,
            (self.stride,) * 2,
            "VALID",
            dimension_numbers=_layout(2),
        )[0]
        return y + self.bias[:, None, None]

    def loss(self) -> Float[Array, ""]:
        """`orth_conv_loss` of the kernel."""
        return orth_conv_loss(self.kernel, self.stride)


def _blocks(kernel, size, stride):
    """The layer's matrix at every frequency: frequencies by filters by `C S^d`."""
    filters, channels, *sides = kernel.shape
    d = len(sides)
    shifts = -(-sides[0] // stride)
    room = shifts * stride - sides[0]
    kernel = jnp.pad(kernel, [(0, 0), (0, 0), *[(0, room)] * d])
    split = kernel.reshape(filters, channels, *[shifts, stride] * d)
    over = tuple(range(2, 2 + 2 * d, 2))
    # Frequencies in front, then filters, channels and phases.
    split = split.transpose(*over, 0, 1, *(axis + 1 for axis in over))
    transformed = jnp.fft.fftn(split, (size,) * d, axes=range(d))
    return transformed.reshape(size**d, filters, channels * stride**d)


def _form(owner, kernel, stride):
    """Filters, channels, side and dimensions of a kernel that passes the checks."""
    if kernel.ndim not in (3, 4) or len(set(kernel.shape[2:])) != 1 or not kernel.size:
        raise ValueError(
            f"{owner}: `kernel` must be filters by channels by one side or two equal "
            f"ones (got shape {kernel.shape})."
        )
    check_finite(owner, "kernel", kernel)
    check_sizes(owner, stride=stride)
    filters, channels, side, *_ = kernel.shape
    return filters, channels, side, kernel.ndim - 2


def _before(side: int) -> int:
    """Pixels before the first that a kernel with padding sees."""
    return (side - 1) // 2


def _layout(dimensions: int) -> tuple[str, str, str]:
    return ("NCH", "OIH", "NCH") if dimensions == 1 else ("NCHW", "OIHW", "NCHW")
