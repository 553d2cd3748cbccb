"""Orthogonal convolutions: existence, the identity of the loss, errors of any size."""

from itertools import product
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan.lipschitz import (
    OrthConv2d,
    construct_orthogonal_conv,
    conv_singular_values,
    orth_conv_loss,
    orthogonal_conv_exists,
    orthogonality_errors,
)

# Filters, channels, side, stride, dimensions: rows and columns, odd and even sides,
# strides that divide the side and that do not, a kernel smaller than the stride.
FORMS = [
    (2, 3, 3, 1, 1),
    (5, 2, 3, 2, 1),
    (3, 2, 2, 3, 1),
    (2, 1, 3, 2, 2),
    (3, 2, 2, 1, 2),
]


def random_kernel(form, seed=0):
    filters, channels, side, _, d = form
    rng = np.random.default_rng(seed)
    return jnp.asarray(0.4 * rng.normal(size=(filters, channels, *[side] * d)))


def matrix_of(kernel, size, stride, padding="circular"):
    """The layer's matrix, entry by entry, on images of side `size * stride`."""
    kernel = np.asarray(kernel)
    filters, channels, side, *_ = kernel.shape
    d, image = kernel.ndim - 2, size * stride
    before = (side - 1) // 2 if padding == "zero" else 0
    out = (image - side) // stride + 1 if padding == "valid" else size
    matrix = np.zeros((filters, *[out] * d, channels, *[image] * d))
    for n in product(range(out), repeat=d):
        for tap in product(range(side), repeat=d):
            place = [stride * a + i - before for a, i in zip(n, tap, strict=True)]
            if padding == "circular":
                place = [p % image for p in place]
            if all(0 <= p < image for p in place):
                matrix[(slice(None), *n, slice(None), *place)] += kernel[(..., *tap)]
    return matrix.reshape(filters * out**d, channels * image**d)


def squared_distance(matrix, columns):
    gram = matrix.T @ matrix if columns else matrix @ matrix.T
    return np.sum((gram - np.eye(len(gram))) ** 2), np.linalg.norm(
        gram - np.eye(len(gram)), 2
    )


@pytest.mark.parametrize("form", FORMS)
class TestAgainstTheMatrix:
    def test_loss_is_the_squared_distance_per_position(self, form):
        filters, channels, side, stride, d = form
        kernel = random_kernel(form)
        size = -(-(2 * side - 1) // stride)
        columns = filters > channels * stride**d
        matrix = matrix_of(kernel, size, stride)
        frobenius, spectral = squared_distance(matrix, columns)
        loss = orth_conv_loss(kernel, stride)
        np.testing.assert_allclose(size**d * loss, frobenius, rtol=1e-10)
        found = orthogonality_errors(kernel, size, stride)
        np.testing.assert_allclose(found.frobenius**2, frobenius, rtol=1e-10)
        np.testing.assert_allclose(found.spectral, spectral, rtol=1e-10)
        assert found.case == ("columns" if columns else "rows")
        terms = (2 * ((side - 1) // stride) + 1) ** d
        np.testing.assert_allclose(found.bound, np.sqrt(terms * loss), rtol=1e-10)
        assert spectral <= found.spectral <= found.bound

    def test_singular_values(self, form):
        _, _, side, stride, _ = form
        kernel = random_kernel(form, 1)
        size = -(-side // stride) + 1
        found = np.sort(conv_singular_values(kernel, size, stride).ravel())
        exact = np.linalg.svd(matrix_of(kernel, size, stride), compute_uv=False)
        np.testing.assert_allclose(found, np.sort(exact), atol=1e-12)

    def test_constructed_kernels_are_orthogonal(self, form):
        filters, channels, side, stride, d = form
        for padding in ("circular", "valid", "zero"):
            found = orthogonal_conv_exists(
                filters, channels, side, stride, dimensions=d, padding=padding
            )
            options = {"dimensions": d, "padding": padding, "key": jax.random.key(0)}
            if not found.exists:
                with pytest.raises(ValueError, match="no orthogonal convolution"):
                    construct_orthogonal_conv(*form[:4], **options)
                continue
            kernel = construct_orthogonal_conv(*form[:4], **options)
            assert kernel.shape == (filters, channels, *[side] * d)
            size = -(-(2 * side - 1) // stride)
            matrix = matrix_of(kernel, size, stride, padding)
            square, _ = squared_distance(matrix, found.case == "columns")
            assert square < 1e-20


class TestExistence:
    # Filters, channels, side, stride, dimensions, padding: does one exist?
    @pytest.mark.parametrize(
        "form, padding, exists",
        [
            ((64, 3, 3, 1, 2), "circular", True),
            ((4, 1, 1, 2, 2), "circular", False),
            ((5, 1, 1, 2, 2), "circular", False),
            ((1, 1, 1, 2, 2), "circular", True),
            ((9, 2, 2, 2, 2), "circular", True),
            ((5, 4, 3, 1, 2), "valid", False),
            ((4, 4, 3, 1, 2), "valid", True),
            ((4, 4, 1, 1, 2), "valid", True),
            ((9, 2, 2, 2, 2), "valid", True),
            ((9, 2, 4, 2, 2), "valid", False),
            ((4, 4, 3, 1, 2), "zero", True),
            ((9, 1, 3, 3, 2), "zero", False),
            ((5, 1, 3, 3, 2), "zero", False),
            ((4, 1, 3, 3, 2), "zero", True),
        ],
    )
    def test_table(self, form, padding, exists):
        *sizes, d = form
        found = orthogonal_conv_exists(*sizes, dimensions=d, padding=padding)
        assert found.exists is exists and found.reason

    @pytest.mark.parametrize("padding", ["circular", "valid", "zero"])
    def test_descent_finds_what_exists_and_nothing_else(self, padding):
        """Signals of one channel: the least distance over many starts, by SciPy."""
        from scipy.optimize import least_squares

        for filters, side, stride in [(1, 2, 1), (1, 3, 2), (2, 2, 2), (3, 3, 2)]:
            found = orthogonal_conv_exists(
                filters, 1, side, stride, dimensions=1, padding=padding
            )
            size = -(-(2 * side - 1) // stride) + 1

            def errors(flat):
                kernel = flat.reshape(filters, 1, side)  # noqa: B023
                matrix = matrix_of(kernel, size, stride, padding)  # noqa: B023
                tall = found.case == "columns"  # noqa: B023
                gram = matrix.T @ matrix if tall else matrix @ matrix.T
                return (gram - np.eye(len(gram))).ravel()

            least = min(
                least_squares(
                    errors, np.random.default_rng(s).normal(size=filters * side)
                ).cost
                for s in range(4)
            )
            assert (least < 1e-12) == found.exists, (filters, side, stride)

    def test_square_kernels_with_zeros_keep_the_centre_alone(self):
        kernel = construct_orthogonal_conv(
            3, 3, 3, padding="zero", key=jax.random.key(1)
        )
        still = kernel.at[:, :, 1, 1].set(0.0)
        assert not np.any(still)

    def test_constructed_kernels_use_all_taps(self):
        kernel = construct_orthogonal_conv(3, 3, 4, 2, key=jax.random.key(1))
        assert np.all(np.abs(kernel) > 1e-6)


class TestInvariants:
    def test_side_one_is_an_orthogonal_matrix(self):
        matrix = random_kernel((3, 4, 1, 1, 2))
        flat = matrix[:, :, 0, 0]
        exact = np.sum((flat @ flat.T - np.eye(3)) ** 2)
        np.testing.assert_allclose(orth_conv_loss(matrix), exact, rtol=1e-12)

    def test_rotating_channels_and_permuting_filters_change_nothing(self):
        kernel = random_kernel((2, 3, 3, 1, 1))
        turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
        turned = jnp.einsum("mci,cd->mdi", kernel[::-1], turn)
        np.testing.assert_allclose(
            orth_conv_loss(turned), orth_conv_loss(kernel), rtol=1e-12
        )

    def test_zeros_never_enlarge_the_circular_norm(self):
        """The layer with zeros is a part of the circular one on a larger image."""
        kernel = random_kernel((2, 3, 3, 1, 1))
        zero = np.linalg.norm(matrix_of(kernel, 6, 1, "zero"), 2)
        assert zero <= jnp.max(conv_singular_values(kernel, 8)) + 1e-12

    @given(st.integers(0, 10_000), st.floats(1e-6, 2.0))
    @settings(max_examples=15, deadline=None, derandomize=True)
    def test_bound_of_any_size_and_near_isometry(self, seed, size):
        rng = np.random.default_rng(seed)
        exact = construct(jax.random.key(seed))
        kernel = exact + size * rng.normal(size=exact.shape)
        for side in (5, 9):
            found = errors(kernel, side)
            assert found.spectral <= found.bound * (1 + 1e-12)
        matrix = matrix_of(kernel, 5, 1)
        x = rng.normal(size=len(matrix.T))
        change = abs(np.sum((matrix @ x) ** 2) - np.sum(x**2))
        assert change <= errors(kernel, 5).spectral * np.sum(x**2)


construct = jax.jit(
    lambda key: construct_orthogonal_conv(4, 2, 3, dimensions=1, key=key)
)
errors = jax.jit(orthogonality_errors, static_argnums=(1, 2))


def test_gradient_against_differences():
    kernel, ahead = random_kernel(FORMS[3]), random_kernel(FORMS[3], 1)
    slope = jnp.sum(jax.grad(orth_conv_loss)(kernel, 2) * ahead)
    there, back = (orth_conv_loss(kernel + s * ahead, 2) for s in (1e-6, -1e-6))
    np.testing.assert_allclose(slope, (there - back) / 2e-6, rtol=1e-7)


def test_single_precision_keeps_its_promise(float32):
    kernel = construct(jax.random.key(0))
    found = errors(kernel, 5)
    assert found.spectral.dtype == jnp.float32
    gram = matrix_of(np.asarray(kernel, np.float64), 5, 1)
    exact = np.linalg.norm(gram.T @ gram - np.eye(10), 2)
    assert exact <= found.spectral <= found.bound < 1e-3


class TestLayer:
    @pytest.mark.parametrize("side, stride", [(3, 1), (2, 2), (3, 2)])
    def test_is_the_matrix_after_a_shift(self, side, stride):
        layer = OrthConv2d(1, 2, side, stride, key=jax.random.key(0))
        rng = np.random.default_rng(0)
        x = rng.normal(size=(1, 6, 6))
        before = (side - 1) // 2
        moved = np.roll(x, (before, before), (1, 2))
        matrix = matrix_of(layer.kernel, 6 // stride, stride)
        expected = (matrix @ moved.ravel()).reshape(2, 6 // stride, 6 // stride)
        np.testing.assert_allclose(layer(jnp.asarray(x)), expected, atol=1e-12)
        assert abs(layer.loss()) < 1e-20

    def test_starts_random_where_none_is_orthogonal(self):
        layer = OrthConv2d(1, 5, 1, 2, key=jax.random.key(0))
        assert layer(jnp.ones((1, 4, 4))).shape == (5, 2, 2)
        assert layer.loss() > 1e-2

    def test_refuses_images_that_do_not_fit(self):
        layer = OrthConv2d(1, 2, 3, 2, key=jax.random.key(0))
        for shape in [(1, 5, 4), (1, 2, 2)]:
            with pytest.raises(ValueError, match="sides must be multiples of 2"):
                layer(jnp.ones(shape))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: orth_conv_loss(jnp.ones((2, 2))), "filters by channels"),
        (lambda: orth_conv_loss(jnp.ones((2, 2, 3, 2))), "two equal ones"),
        (lambda: orth_conv_loss(jnp.full((1, 1, 2), jnp.nan)), "`kernel` must be fini"),
        (lambda: orth_conv_loss(jnp.ones((1, 1, 2)), 0), "`stride` must be at least 1"),
        (lambda: conv_singular_values(jnp.ones((1, 1, 3)), 2), "kernel's side 3"),
        (lambda: orthogonality_errors(jnp.ones((1, 1, 3)), 4), "at least 5, twice"),
        (lambda: orthogonal_conv_exists(0, 1, 1), "`filters` must be at least 1"),
        (
            lambda: orthogonal_conv_exists(1, 1, 1, padding=cast("Any", "same")),
            "`padding` must be one of",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
