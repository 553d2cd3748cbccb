"""Solutions and statuses: what they print, and what `require` insists on."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan import GradientDescent, Smooth, Status, solve


def objective(x, c):
    return 0.5 * jnp.sum((x - c) ** 2)


@jax.jit
def run(c):
    return solve(
        Smooth(objective, c), GradientDescent(0.5), jnp.zeros(2), tol=1e-6, max_steps=30
    )


GOOD, FAR, BAD = jnp.ones(2), jnp.full(2, 1e9), jnp.full(2, np.nan)


def test_printed_form_says_status_numbers_and_certificate():
    text = str(run(GOOD))
    assert text == repr(run(GOOD))
    assert "Solution: converged" in text
    assert "steps        21" in text and "evaluations  22" in text
    assert "met (proof)" in text and "tol 1e-06" in text


def test_printed_form_of_failures_says_what_to_do():
    assert "step limit: the step or evaluation limit" in str(run(FAR))
    assert "diverged: the condition became NaN" in str(run(BAD))
    assert "not met" in str(run(FAR))


def test_printed_form_of_lanes_counts_them():
    text = str(jax.vmap(run)(jnp.stack([GOOD, FAR, BAD, GOOD])))
    assert "2 converged, 1 step limit, 1 diverged" in text
    assert "over 4 lanes" in text


def test_printed_form_under_jit():
    texts = []

    @jax.jit
    def traced(c):
        end = run(c)
        texts.append(f"{end} {end!r}")
        return end.x

    traced(GOOD)
    assert texts == ["Solution(traced) Solution(traced)"]


def test_require_returns_converged_answers():
    assert np.allclose(run(GOOD).require(), 1.0, atol=1e-6)
    assert np.allclose(jax.jit(lambda c: run(c).require())(GOOD), 1.0, atol=1e-6)


def test_require_refuses_eagerly_with_advice():
    with pytest.raises(RuntimeError, match="solve: the step or evaluation limit"):
        run(FAR).require()
    with pytest.raises(RuntimeError, match=r"limit.*NaN or infinite"):
        jax.vmap(run)(jnp.stack([GOOD, FAR, BAD])).require()


def test_require_refuses_under_jit():
    required = eqx.filter_jit(lambda c: run(c).require())
    with pytest.raises(RuntimeError, match="a run did not converge"):
        jax.block_until_ready(required(FAR))


def test_every_status_has_advice_in_one_sentence():
    for status in Status:
        assert status.advice.endswith(".") and status.advice[0].islower()


def test_converged_is_an_array_of_lanes():
    lanes = jax.vmap(run)(jnp.stack([GOOD, FAR]))
    assert lanes.converged.tolist() == [True, False]
    assert lanes.status.dtype == jnp.int32
