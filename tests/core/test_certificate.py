"""Certificates: met or not, in numbers and in words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan import Certificate


def make(value, tol=None, proof=True):
    return Certificate("gap", value, tol=tol, proof=proof, statement="gap <= value")


@pytest.mark.parametrize(
    ("value", "tol", "met"),
    [
        (1e-9, 1e-6, True),
        (1e-6, 1e-6, True),
        (1e-3, 1e-6, False),
        (np.nan, 1e-6, False),
        (np.inf, 1e-6, False),
        (3.0, None, True),
        (np.nan, None, False),
        (np.inf, None, False),
    ],
)
def test_met_only_within_tolerance_and_never_by_nan(value, tol, met):
    assert bool(make(value, tol).met) is met
    assert bool(jax.jit(lambda v: make(v, tol).met)(value)) is met


def test_printed_forms():
    assert str(make(1e-9, 1e-6)) == ("gap 1e-09, met (proof): gap <= value")
    assert "not met (proof)" in str(make(1.0, 1e-6))
    assert str(make(2.0, proof=False)) == "gap 2 (estimate): gap <= value"
    lanes = jax.vmap(lambda v: make(v, 1.0))(jnp.asarray([0.5, 2.0, 3.0]))
    assert "0.5 .. 3 over 3 lanes, met in 1 of 3 lanes" in str(lanes)


def test_printing_under_jit_does_not_fail():
    texts = []

    @jax.jit
    def run(value):
        texts.append(str(make(value, 1e-6)))
        return value

    run(1.0)
    assert "traced" in texts[0]


def test_survives_jit_and_vmap_as_a_pytree():
    certificate = jax.jit(lambda v: make(v, 1.0))(0.5)
    assert certificate.kind == "gap" and certificate.proof and certificate.met
    assert certificate.details == {}
