"""Characters of the standard library."""

import numpy as np
import pytest

from varan.data import source_characters


def test_numbers_are_text_again():
    numbers, symbols = source_characters(50_000)
    assert numbers.shape == (50_000,) and numbers.dtype == np.int32
    assert len(set(symbols)) == len(symbols) == 96
    assert numbers.min() >= 0 and numbers.max() < 96
    text = "".join(symbols[n] for n in numbers)
    assert "\n    def " in text and "import" in text


def test_the_order_is_fixed_and_more_characters_continue_it():
    few, many = source_characters(1000)[0], source_characters(60_000)[0]
    np.testing.assert_array_equal(few, many[:1000])


@pytest.mark.parametrize(
    ("characters", "message"),
    [(0, "at least 1"), (10**10, "at most [1-9][0-9]+, what")],
)
def test_bad_input_is_named(characters, message):
    with pytest.raises(ValueError, match=f"`characters` must be {message}"):
        source_characters(characters)
