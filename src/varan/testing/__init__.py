"""Contracts: what every method of a kind must pass, as a list of named checks.

A test module states its cases as data and gets one test for each case and check:

    CASES = [Case(lambda: GradientDescent(0.3), (problem, other), jnp.zeros(3))]
    test_contract = contract(CASES)

Kinds and what their cases hold:

- `"solver"`: `factory()` makes the solver; `instances` are problems of equal shapes.
- `"optimiser"`: `factory()` makes an optax transformation; `instances` are `Smooth`
  problems; `start` holds the parameters.
- `"certificate"`: `factory()` makes a function `(*instance, budget) -> Certificate`.
- `"function"`: `factory()` makes a differentiable function of `*instance`.

Checks run in float64 unless they say otherwise, share one compilation where only
values differ, and never skip: what a method cannot do stands in its case as
`xfail={"check": "why"}`, and fails when it passes after all.
"""

from ._case import MINIMUM, Case, checks, contract
from ._tools import assert_close, difference

__all__ = ["MINIMUM", "Case", "assert_close", "checks", "contract", "difference"]
