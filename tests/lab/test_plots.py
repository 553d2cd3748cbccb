"""Plots: one figure a plot, the same files for the same numbers, odd data survived."""

from pathlib import Path

import pytest

from varan.claims import Curve
from varan.lab.plots import draw


def curve(y, label="ours", plot="Error over steps", x=None, **fields):
    x = list(range(len(y))) if x is None else x
    return dict(vars(Curve(x, y, label, plot, "steps", "error", **fields)))


def test_one_svg_and_one_png_a_plot(tmp_path):
    curves = {
        0: [curve([1.0, 0.5]), curve([2.0], plot="Other"), curve([3.0], "peer")],
        1: [curve([1.2, 0.7])],
    }
    files = draw(curves, tmp_path / "plots", "toy")
    assert [Path(f).name for f in files] == [
        "error-over-steps.svg",
        "error-over-steps.png",
        "other.svg",
        "other.png",
    ]
    text = files[0].read_text()
    assert "toy: Error over steps" in text
    assert text.index("ours") < text.index("peer")
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_the_same_numbers_give_the_same_files(tmp_path):
    curves = {seed: [curve([1.0, 0.1 * seed], log_y=True)] for seed in (1, 2, 3)}
    first = draw(curves, tmp_path / "a", "toy")
    second = draw(dict(reversed(curves.items())), tmp_path / "b", "toy")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "curves",
    [
        {0: [curve([1.0, 0.0, -1.0], log_y=True, log_x=True)]},
        {0: [curve(["inf", "nan", 1.0])], 1: [curve(["inf", "nan", "inf"])]},
        {0: [curve(["nan", "nan"], log_y=True)]},
        {0: [curve([1.0, 2.0])], 1: [curve([1.0, 2.0, 3.0])]},
        {0: [curve([], label="empty")]},
        {0: [curve([1.0], label=f"{n}", marker=True) for n in range(12)]},
        {0: [curve([1.0], label="$x", plot="$5 % of /<>")]},
    ],
    ids=["nonpositive", "infinite", "nothing", "ragged", "empty", "many", "odd names"],
)
def test_odd_data_is_drawn_without_complaint(tmp_path, curves):
    assert len(draw(curves, tmp_path, "toy")) == 2


def test_no_curves_no_files(tmp_path):
    assert draw({0: []}, tmp_path / "plots", "toy") == []
    assert not (tmp_path / "plots").exists()
