"""The plain solvers keep the whole contract; a solver of a user's own does too."""

import jax.numpy as jnp
import numpy as np
import pytest

from varan import FixedPoint, FixedPointIteration, GradientDescent, Problem, Smooth
from varan.testing import Case, contract


def ridge_loss(w, X, y, lam):
    return 0.5 * jnp.mean((X @ w - y) ** 2) + 0.5 * lam * w @ w


def ridge(seed):
    rng = np.random.default_rng(seed)
    X, y = rng.standard_normal((6, 3)), rng.standard_normal(6)
    return Smooth(ridge_loss, jnp.asarray(X), jnp.asarray(y), 0.3, convex=True)


def tilted(x, c):
    """Contracts at 1/2, with its fixed points away from the origin."""
    return 0.5 * jnp.cos(x) + c


def unbounded(seed):
    """Ridge with a negative penalty has no minimum."""
    problem = ridge(seed)
    return Smooth(ridge_loss, *problem.params[:2], -5.0, convex=True)


RIGID = {"shift", "permutation", "reflection"}
CASES = [
    Case(
        lambda: GradientDescent(0.3),
        (ridge(0), ridge(1)),
        jnp.zeros(3),
        tags=RIGID,
        unsolvable=unbounded(0),
        name="GradientDescent",
    ),
    Case(
        lambda: FixedPointIteration(0.9),
        [FixedPoint(tilted, jnp.asarray(c)) for c in ([20.0, -1.0], [3.0, 4.0])],
        jnp.zeros(2),
        tags=RIGID | {"scale"},
        name="FixedPointIteration",
    ),
]
test_contract = contract(CASES)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_settings_must_be_positive(value):
    with pytest.raises(ValueError, match="GradientDescent: `stepsize` must be pos"):
        GradientDescent(value)
    with pytest.raises(ValueError, match="FixedPointIteration: `damping` must be posi"):
        FixedPointIteration(value)


def test_problems_refuse_what_is_not_callable():
    with pytest.raises(TypeError, match=r"Smooth: `objective` must be callable \(got"):
        Smooth(3.0)
    with pytest.raises(TypeError, match="FixedPoint: `function` must be callable"):
        FixedPoint(None)


def test_a_problem_must_state_its_condition():
    with pytest.raises(TypeError, match="condition"):
        Problem()
