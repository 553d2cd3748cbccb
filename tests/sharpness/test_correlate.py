"""Kendall's tau as SciPy has it, its interval, subgroups, bad input."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kendalltau

from varan.sharpness import MeasureResult, correlate

KEY = jax.random.key(0)


def test_tau_is_scipys_with_ties_and_infinities():
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 30))
    y = x + random.normal(size=(2, 30))
    x[0, :10], y[1] = np.round(x[0, :10]), np.round(y[1])
    x[1, 3] = np.inf
    table = correlate(
        None, {"a": x[0], "b": x[1]}, {"c": y[0], "d": y[1]}, resamples=200, key=KEY
    )
    wanted = [[kendalltau(a, b).statistic for b in y] for a in x]
    np.testing.assert_allclose(table.tau, wanted)
    assert np.all(table.low < table.tau) and np.all(table.tau < table.high)
    lines = str(table).splitlines()
    assert len(lines) == 3 and f"{wanted[0][0]:.2f} [" in lines[1]
    few = table.among(np.arange(30) < 12, resamples=200, key=KEY)
    np.testing.assert_allclose(
        few.tau[0, 0], kendalltau(x[0, :12], y[0, :12]).statistic
    )


def test_the_interval_covers_what_a_large_sample_says():
    # Of normal pairs with correlation r: tau = 2 / pi arcsin(r).
    truth, covered = 2 / np.pi * np.arcsin(0.6), 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        x, z = random.normal(size=(2, 30))
        table = correlate(
            None, {"x": x}, {"y": 0.6 * x + 0.8 * z}, resamples=200, key=KEY
        )
        covered += bool(table.low[0, 0] <= truth <= table.high[0, 0])
    # 95 % of 40 is 38; the percentile bootstrap of 30 pairs falls a little short.
    assert covered >= 33


def test_functions_of_models_are_measured_one_by_one():
    models = [
        {"w": jnp.array([a, b])} for a, b in ((1.0, 2.0), (3.0, 0.0), (5.0, -4.0))
    ]
    traced = []

    def first(model):
        traced.append(1)
        return MeasureResult(model["w"][0], "exact", None, 0)

    table = correlate(
        models, {"first": first}, {"sum": lambda model: jnp.sum(model["w"])}, key=KEY
    )
    np.testing.assert_allclose(table.measured, [[1.0, 3.0, 5.0]])
    np.testing.assert_allclose(table.aimed, [[3.0, 3.0, 1.0]])
    np.testing.assert_allclose(table.tau, kendalltau([1, 3, 5], [3, 3, 1]).statistic)
    assert len(traced) == 1


def test_models_with_functions_as_leaves():
    models = [
        eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(i), activation=jnp.tanh)
        for i in range(4)
    ]
    first = {"first": lambda model: model(jnp.ones(2))[0]}
    table = correlate(models, first, {"rank": [1, 2, 3, 4]}, resamples=20, key=KEY)
    wanted = [model(jnp.ones(2))[0] for model in models]
    np.testing.assert_allclose(table.measured[0], wanted)
    other = eqx.nn.MLP(2, 1, 3, 1, key=KEY, activation=jnp.sin)
    for odd, message in (
        (other, "may differ in arrays and numbers only"),
        (jnp.ones(3), "must have one structure"),
    ):
        with pytest.raises(ValueError, match=message):
            correlate([*models, odd], first, {"rank": [1, 2, 3, 4, 5]}, key=KEY)
    with pytest.raises(ValueError, match="arrays of one shape"):
        correlate([jnp.ones(2), jnp.ones(3)], first, {"rank": [1, 2]}, key=KEY)
    # Numbers that differ are stacked, others stay what they are in Python.
    pairs = [(float(i), 2, jnp.ones(1)) for i in range(3)]
    product = lambda model: model[0] * (1.0 if model[1] == 2 else 0.0)  # noqa: E731
    table = correlate(pairs, {"product": product}, {"i": [0, 1, 2]}, key=KEY)
    np.testing.assert_allclose(table.measured[0], [0, 1, 2])


def test_agreement_of_all_pairs_is_no_certainty():
    for n, least in ((3, -0.95), (10, 2 * 0.025**0.2 - 1), (60, 0.76)):
        x = np.arange(float(n))
        table = correlate(None, {"up": x, "down": -x}, {"x": x}, resamples=20, key=KEY)
        np.testing.assert_allclose(table.tau[:, 0], [1, -1])
        np.testing.assert_allclose(table.low[0, 0], least, atol=0.01)
        np.testing.assert_allclose(table.high[:, 0], [1, -least], atol=0.01)
    # With so low a tau, all of n // 2 = 5 pairs agree in 2.5 % of the cases.
    np.testing.assert_allclose(((1 + (2 * 0.025**0.2 - 1)) / 2) ** 5, 0.025)


def test_what_says_nothing_is_nan():
    values = {"same": np.ones(5), "nan": [0, 1, np.nan, 2, 3], "good": np.arange(5)}
    table = correlate(None, values, {"good": np.arange(5)}, resamples=20, key=KEY)
    np.testing.assert_array_equal(np.isnan(table.tau[:, 0]), [True, True, False])
    np.testing.assert_array_equal(np.isnan(table.low[:, 0]), [True, True, False])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, {}, {"a": [1, 2, 3]}), "at least one of `measures`"),
        ((None, {"a": [1, 2]}, {"b": [1, 2]}), "at least 3 models"),
        ((None, {"a": [1, 2, 3]}, {"b": [1, 2, 3, 4]}), r"\(got \[3, 4\]\)"),
        ((None, {"a": jnp.sum}, {"b": [1, 2, 3]}), "`models` must be given"),
        ((jnp.ones((3, 2)), {"a": jnp.abs}, {"b": [1, 2, 3]}), "one number a model"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        correlate(*arguments, key=KEY)
    with pytest.raises(TypeError, match="`resamples` must be an integer"):
        correlate(None, {"a": [1, 2, 3]}, {"b": [1, 2, 3]}, resamples=2.5, key=KEY)
