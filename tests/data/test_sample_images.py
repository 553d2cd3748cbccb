"""The two photographs: range, means over areas, bad input."""

import numpy as np
import pytest

from varan.data import sample_images


def test_pixels_are_means_over_what_they_cover():
    fine, coarse = sample_images(64), sample_images(16)
    blocks = fine.reshape(2, 16, 4, 16, 4).mean((2, 4))
    np.testing.assert_allclose(coarse, blocks, atol=1e-9)
    assert fine.min() >= 0 and fine.max() <= 1 and fine.std() > 0.1


def test_the_full_size_is_the_photograph():
    assert sample_images(427).shape == (2, 427, 427)


@pytest.mark.parametrize("side", [1, 428])
def test_bad_sizes_are_named(side):
    with pytest.raises(ValueError, match="sample_images: `side` must lie between"):
        sample_images(side)
