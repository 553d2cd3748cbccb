"""Hager and Zhang's search: Wolfe's conditions, hard lines, counts, contract."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan import Smooth, solve
from varan.secondorder import scale_by_hager_zhang_linesearch
from varan.secondorder._hager_zhang import search
from varan.testing import Case, contract


def bowl(x, c):
    return jnp.sum(jnp.cosh(x - c)) + jnp.sum(x) ** 2


def descent(**settings):
    return optax.chain(optax.scale(-1.0), scale_by_hager_zhang_linesearch(**settings))


# It hands on neither value nor function, to optax's own searches as little.
BLIND = {"accumulates": "optax.MultiSteps passes no extra arguments on"}
BOWLS = [Smooth(bowl, jnp.asarray(c)) for c in ([1.0, -1.0], [0.5, 2.0])]
CASES = [
    Case(
        lambda: descent(),
        BOWLS,
        jnp.zeros(2),
        kind="optimiser",
        max_steps=5,
        xfail=BLIND,
        name="one",
    ),
    Case(
        lambda: descent(first_trial="previous"),
        BOWLS,
        jnp.zeros(2),
        kind="optimiser",
        max_steps=5,
        xfail=BLIND,
        name="previous",
    ),
]
test_contract = contract(CASES)


def line(name):
    """A function of the step, of one parameter."""
    return {
        "quartic": lambda t, a: (t - a) ** 4 + 0.1 * (t - a) ** 2,
        "wiggly": lambda t, a: -a * t + t**2 + 0.3 * jnp.sin(9 * t),
        "flat then steep": lambda t, a: -t / (t**2 + a),
        "barrier": lambda t, a: -jnp.log(jnp.where(t < a, a - t, jnp.nan)) - 3 * t,
        "far away": lambda t, a: jnp.log1p((t - 1000 * a) ** 2),
    }[name]


LINES = ["quartic", "wiggly", "flat then steep", "barrier", "far away"]


def run(name, look):
    function = line(name)

    @jax.jit
    def one(a, trial):
        def evaluate(x):
            value, slope = jax.value_and_grad(lambda t: function(t, a))(x[0])
            return value, slope[None]

        zero = jnp.zeros(1)
        value, gradient = evaluate(zero)
        end = search(
            evaluate, zero, jnp.ones(1), value, gradient, trial, look=look, max_steps=60
        )
        return end, value, gradient[0]

    return one


SEARCHES = {(name, look): run(name, look) for name in LINES for look in (False, True)}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.floats(0.5, 4.0), st.floats(-4, 4), st.sampled_from(sorted(SEARCHES)))
def test_the_end_meets_wolfes_conditions(a, exponent, key):
    end, value, slope = SEARCHES[key](jnp.asarray(a), jnp.asarray(10.0**exponent))
    if not slope < 0:
        assert end.t == 0 and end.count == 0
        return
    assert end.accepted
    falls = end.value - value <= 0.1 * end.t * slope
    flat = (end.value <= value + 1e-6 * abs(value)) & (end.gradient[0] <= -0.8 * slope)
    assert end.t > 0 and (falls or flat)
    assert end.gradient[0] >= 0.9 * slope
    np.testing.assert_allclose(end.value, line(key[0])(end.t, a), rtol=1e-13)


def test_where_values_are_blind_slopes_still_see():
    # At 1e8 a decrease of 1e-12 is no decrease: a search that compares values stops.
    problem = Smooth(lambda x: 1e8 + jnp.sum(jnp.cosh(x - 1.0)))
    method = optax.lbfgs(linesearch=scale_by_hager_zhang_linesearch())
    with jax.numpy_dtype_promotion("standard"):
        end = solve(problem, method, jnp.zeros(3), tol=1e-12)
    assert end.converged


def test_evaluations_are_those_that_were_made():
    calls = []

    def seen(x):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum((x - 1.0) ** 4)

    method = descent()
    x = jnp.zeros(2)
    value, grad = jax.value_and_grad(lambda x: jnp.sum((x - 1.0) ** 4))(x)
    _, state = method.update(
        grad, method.init(x), x, value=value, grad=grad, value_fn=seen
    )
    jax.effects_barrier()
    assert len(calls) == int(state[-1].info.num_linesearch_steps) > 0


def test_the_state_holds_value_and_gradient_of_the_new_point():
    problem, x = BOWLS[0], jnp.zeros(2)
    method = descent()
    value, grad = jax.value_and_grad(problem.value)(x)
    updates, state = method.update(
        grad, method.init(x), x, value=value, grad=grad, value_fn=problem.value
    )
    new = optax.apply_updates(x, updates)
    kept = optax.value_and_grad_from_state(problem.value)(new, state=state)
    fresh = jax.value_and_grad(problem.value)(new)
    np.testing.assert_allclose(kept[0], fresh[0], rtol=1e-14)
    np.testing.assert_allclose(kept[1], fresh[1], rtol=1e-14)


def test_along_an_ascent_nothing_is_tried():
    problem, x = BOWLS[0], jnp.zeros(2)
    method = scale_by_hager_zhang_linesearch()
    value, grad = jax.value_and_grad(problem.value)(x)
    updates, state = method.update(
        grad, method.init(x), x, value=value, grad=grad, value_fn=problem.value
    )
    assert not np.any(updates) and state.info.num_linesearch_steps == 0


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`max_linesearch_steps` must be a positive"):
        scale_by_hager_zhang_linesearch(0)
    with pytest.raises(ValueError, match="`first_trial` must be one of"):
        scale_by_hager_zhang_linesearch(first_trial="two")
    method = scale_by_hager_zhang_linesearch()
    state = method.init(jnp.zeros(1))
    with pytest.raises(ValueError, match="`params` must be passed"):
        method.update(jnp.ones(1), state, value=0.0, grad=jnp.ones(1), value_fn=jnp.sum)
