"""Real data that libraries bundle, generators, and what experiments do to them."""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._cstr import cstr_sequences as cstr_sequences
    from ._cstr import cstr_trajectories as cstr_trajectories
    from ._digits import digit_images as digit_images
    from ._mnist1d import mnist1d as mnist1d
    from ._point_clouds import checkerboard as checkerboard
    from ._point_clouds import gaussian_mixture as gaussian_mixture
    from ._point_clouds import sphere_points as sphere_points
    from ._point_clouds import swiss_roll as swiss_roll
    from ._point_clouds import two_moons as two_moons
    from ._random_k import random_k as random_k
    from ._sample_images import sample_images as sample_images
    from ._series import eeg as eeg
    from ._series import windows as windows
    from ._tabular import breast_cancer as breast_cancer
    from ._tabular import flip_labels as flip_labels
    from ._tabular import long_tail as long_tail
    from ._tabular import split as split
    from ._tabular import standardise as standardise
    from ._text import documentation_sentences as documentation_sentences
    from ._text import token_sequences as token_sequences
    from ._text_corpus import source_characters as source_characters

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "breast_cancer": "_tabular",
        "checkerboard": "_point_clouds",
        "cstr_sequences": "_cstr",
        "cstr_trajectories": "_cstr",
        "digit_images": "_digits",
        "documentation_sentences": "_text",
        "eeg": "_series",
        "flip_labels": "_tabular",
        "gaussian_mixture": "_point_clouds",
        "long_tail": "_tabular",
        "mnist1d": "_mnist1d",
        "random_k": "_random_k",
        "sample_images": "_sample_images",
        "source_characters": "_text_corpus",
        "sphere_points": "_point_clouds",
        "split": "_tabular",
        "standardise": "_tabular",
        "swiss_roll": "_point_clouds",
        "token_sequences": "_text",
        "two_moons": "_point_clouds",
        "windows": "_series",
    },
)
