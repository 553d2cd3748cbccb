"""Sparse activations: thresholds by bracketing, Jacobians in closed form, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from scipy.optimize import brentq

from varan.fenchel_young import entmax, sparsemax
from varan.operators import project_simplex
from varan.testing import Case, contract

SCORES = jnp.array([0.4, -0.3, 1.1, 0.9, -2.0])
OTHER = jnp.array([0.1, 0.25, -0.2, 0.3, 0.05])
ALPHAS = (1.1, 1.5, 1.7, 2.0, 2.5, 4.0)

CASES = [
    Case(lambda: sparsemax, [(SCORES,), (OTHER,)], kind="function", name="sparsemax"),
    Case(lambda: entmax, [(SCORES,), (OTHER,)], kind="function", name="entmax15"),
    Case(
        lambda: lambda s: entmax(s, 1.2),
        [(SCORES,), (OTHER,)],
        kind="function",
        name="entmax12",
    ),
]
test_contract = contract(CASES)


def by_bracketing(scores, alpha):
    """The definition, with SciPy's root finder for the threshold."""
    z = (alpha - 1) * (scores - scores.max())

    def p(t):
        return np.maximum(z - t, 0) ** (1 / (alpha - 1))

    t = brentq(lambda t: p(t).sum() - 1, -1, 0, xtol=1e-15, rtol=1e-15)
    return p(t) / p(t).sum()


@pytest.fixture(scope="module")
def batched():
    """Of a batch, for each alpha, compiled once; the alpha is an array."""
    return jax.jit(jax.vmap(entmax, (0, None)))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_agrees_with_the_definition(alpha, batched):
    rng = np.random.default_rng(0)
    for scale in (0.01, 1.0, 30.0):
        scores = scale * rng.standard_normal((20, 7))
        want = [by_bracketing(s, alpha) for s in scores]
        got = batched(jnp.array(scores), jnp.array(alpha))
        # p = u^(1/(alpha - 1)) magnifies the threshold's rounding tenfold at 1.1, and
        # without bound near a corner of the support above 2.
        np.testing.assert_allclose(got, want, atol=1e-12 if alpha <= 2 else 1e-8)
        np.testing.assert_allclose(jnp.sum(got, 1), 1.0, atol=1e-14)
        if alpha in (1.5, 2.0):
            fixed = jax.jit(jax.vmap(lambda s, a=alpha: entmax(s, a)))
            np.testing.assert_allclose(fixed(jnp.array(scores)), got, atol=1e-14)


def test_sparsemax_is_the_projection_on_the_simplex():
    scores = jnp.array(np.random.default_rng(1).standard_normal((50, 30)))
    np.testing.assert_allclose(
        jax.vmap(sparsemax)(scores), jax.vmap(project_simplex)(scores), atol=1e-14
    )


def test_thousands_of_entries_in_float32():
    scores = np.random.default_rng(2).standard_normal(20_000).astype(np.float32)
    for scale in (1e-4, 1.0, 50.0):
        for alpha in (1.5, 2.0):
            p = entmax(jnp.asarray(scale * scores, jnp.float32), alpha)
            want = by_bracketing(scale * scores.astype(np.float64), alpha)
            assert p.dtype == jnp.float32
            np.testing.assert_allclose(p, want, atol=2e-6)


def test_the_softmax_is_the_limit(batched):
    np.testing.assert_array_equal(entmax(SCORES, 1.0), jax.nn.softmax(SCORES))
    near = batched(SCORES[None], jnp.array(1 + 1e-5))[0]
    np.testing.assert_allclose(near, jax.nn.softmax(SCORES), atol=1e-5)


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0, 3.0])
def test_jacobian_in_closed_form(alpha):
    p = entmax(SCORES, alpha)
    assert jnp.any(p == 0) or alpha < 1.5
    g = np.where(p > 0, np.where(p > 0, p, 1) ** (2 - alpha), 0)
    want = np.diag(g) - np.outer(g, g) / g.sum()
    for derive in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(
            derive(lambda s: entmax(s, alpha))(SCORES), want, atol=1e-12
        )


@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.9])
def test_derivatives_with_respect_to_alpha(alpha):
    check_grads(jax.jit(entmax), (SCORES, jnp.array(alpha)), order=2, rtol=1e-5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-5, 5), min_size=5, max_size=5),
    st.floats(1.05, 3.0),
    st.floats(-1e3, 1e3),
)
def test_shift_order_and_domain(scores, alpha, shift):
    run = _shift_order_and_domain
    p, shifted, mirrored = run(jnp.array(scores), jnp.array(alpha), jnp.array(shift))
    assert jnp.all(p >= 0) and abs(jnp.sum(p) - 1) < 1e-12
    # Scores of size 1e3 keep about 1e-13; above 2 small entries magnify that.
    np.testing.assert_allclose(shifted, p, atol=1e-9 if alpha <= 2 else 1e-4)
    np.testing.assert_allclose(mirrored[::-1], p, atol=1e-9 if alpha <= 2 else 1e-4)
    order = np.argsort(scores, kind="stable")
    assert np.all(np.diff(np.asarray(p)[order]) >= -1e-12)


@jax.jit
def _shift_order_and_domain(scores, alpha, shift):
    return (
        entmax(scores, alpha),
        entmax(scores + shift, alpha),
        entmax(scores[::-1], alpha),
    )


def test_scores_of_minus_infinity_are_left_out():
    masked = jnp.concatenate([SCORES, jnp.array([-jnp.inf])])
    for alpha in (1.0, 1.4, 1.5, 2.0, 3.0):
        p = entmax(masked, alpha)
        np.testing.assert_allclose(p[:-1], entmax(SCORES, alpha), atol=1e-12)
        assert p[-1] == 0
        jacobian = jax.jacrev(lambda s, a=alpha: entmax(s, a))(masked)
        assert jnp.all(jnp.isfinite(jacobian))


def test_a_lead_of_the_margin_is_certainty():
    for alpha in (1.5, 2.0, 3.0):
        lead = 1 / (alpha - 1)
        p = entmax(jnp.array([0.3, 0.3 - lead, -9.0]), alpha)
        np.testing.assert_allclose(p, [1.0, 0.0, 0.0], atol=1e-15)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_bad_values_are_nan_in_every_entry(bad):
    for alpha in (1.5, 2.0, 3.0):
        assert jnp.all(jnp.isnan(entmax(SCORES.at[1].set(bad), alpha)))
    assert jnp.all(jnp.isnan(entmax(jnp.full(3, -jnp.inf))))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`scores` must have shape"):
        entmax(jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="`scores` must not be empty"):
        sparsemax(jnp.ones(0))
    with pytest.raises(TypeError, match="`scores` must be floating"):
        sparsemax(jnp.arange(3))
    with pytest.raises(ValueError, match="`alpha` must be a finite number at least 1"):
        entmax(SCORES, 0.5)
    with pytest.raises(ValueError, match="`alpha` must be a finite number above 1"):
        entmax(SCORES, jnp.array(1.0))
    assert jnp.all(jnp.isnan(jax.jit(entmax)(SCORES, jnp.array(0.9))))
    assert jnp.all(jnp.isnan(jax.jit(entmax)(SCORES, jnp.array(1.0))))
