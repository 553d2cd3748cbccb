"""`compare`: one budget for all, a table and a plot."""

import jax.numpy as jnp
import numpy as np
import pytest

from varan import GradientDescent, Newton, Smooth, compare


def objective(x, c):
    return jnp.sum(jnp.cosh(x - c)) + 50 * (x[0] - x[1]) ** 2


PROBLEM = Smooth(objective, jnp.asarray([1.0, 2.0]))


@pytest.fixture(scope="module")
def comparison():
    solvers = {
        "slow": GradientDescent(1e-4),
        "fast": GradientDescent(9e-3),
        "newton": Newton(),
    }
    return compare(PROBLEM, solvers, jnp.zeros(2), tol=1e-8, max_evaluations=2_000)


def test_the_budget_binds_every_solver(comparison):
    rows = {row["solver"]: row for row in comparison.rows()}
    assert list(rows) == ["slow", "fast", "newton"]
    assert not rows["slow"]["met"] and rows["slow"]["status"] == "step limit"
    assert rows["slow"]["evaluations"] == 2_000
    assert rows["fast"]["met"] and rows["newton"]["met"]
    assert rows["newton"]["evaluations"] < rows["fast"]["evaluations"] < 2_000
    answers = [comparison.solutions[name].x for name in ("fast", "newton")]
    assert np.allclose(*answers, atol=1e-7)


def test_printed_form_is_an_aligned_table(comparison):
    lines = str(comparison).splitlines()
    assert len(lines) == 4 and lines[0].startswith("solver")
    assert len({line.index("step limit") for line in lines if "step l" in line}) == 1
    assert lines[0].index("status") == lines[1].index("step limit")


def test_plot_has_a_curve_for_each_solver(comparison):
    figure = comparison.plot()
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["slow", "fast", "newton"]
    assert axes.get_yscale() == "log" and "evaluations" in axes.get_xlabel()
    newton = axes.lines[2]
    assert len(newton.get_xdata()) == int(comparison.solutions["newton"].steps) + 1


def test_solvers_in_a_list_get_names_of_their_own():
    table = compare(
        PROBLEM,
        [GradientDescent(9e-3), GradientDescent(5e-3)],
        jnp.zeros(2),
        max_evaluations=5,
    )
    assert list(table.solutions) == ["GradientDescent", "GradientDescent 2"]
    assert [row["evaluations"] for row in table.rows()] == [5, 5]


def test_no_solver_is_refused():
    with pytest.raises(ValueError, match="compare: `solvers` must hold at least one"):
        compare(PROBLEM, [], jnp.zeros(2))
