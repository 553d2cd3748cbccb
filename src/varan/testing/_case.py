"""Cases, and the pytest test that a list of them becomes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.tree_util as jtu

from ..core import Problem
from ._benches import BENCHES
from ._checks import ALL, KINDS, bounds_hold, key_decides, moves_likewise
from ._tools import MOTIONS

# Fewer checks than these for a case is an error: a battery that shrinks unnoticed
# (a renamed tag, an emptied table) would stay green.
MINIMUM = {"solver": 14, "optimiser": 12, "certificate": 10, "function": 11}


@dataclass(frozen=True, eq=False)
class Case:
    """One method on a few instances, with what it promises there.

    Args:
        factory: Makes the method; takes a key where the case is `"stochastic"`.
        instances: At least two, of equal structure and shapes: problems (solver,
            optimiser) or argument tuples (certificate, function). Of unit scale.
        start: The start of solvers, the parameters of optimisers.
        kind: See the module's docstring.
        tags: Claimed properties: `"stochastic"`; for solvers the motions of the
            problem that move the answer likewise, `"shift"`, `"scale"`,
            `"permutation"`, `"reflection"` (on `Smooth`, `Root`, `FixedPoint` and
            problems that are no more than their condition).
        xfail: Check name to the reason why it fails.
        tol: Tolerance of a float64 solve; differences are taken of such solves.
        max_steps: Step limit of a solve; the optimiser's steps until it must have
            lowered the objective.
        observe: From a problem and `x` to what is unique of the answer.
        project: Makes a perturbation of an instance feasible (a tree like it).
        unsolvable: A problem of the same shapes that has no solution.
        bounds: Lower and upper bound that every iterate keeps.
        truths: For a certificate, the true value of each instance.
        side: The side of the truth on which the certificate must stay.
        budgets: Increasing budgets of a certificate.
        name: Of the case in test reports; by default made of the method.
    """

    factory: Callable[..., Any]
    instances: Sequence[Any]
    start: Any = None
    kind: Literal["solver", "optimiser", "certificate", "function"] = "solver"
    tags: frozenset[str] | set[str] = frozenset()
    xfail: dict[str, str] = field(default_factory=dict)
    tol: float = 1e-10
    max_steps: int = 2000
    observe: Callable[[Any, Any], Any] = lambda problem, x: x
    project: Callable[[Any], Any] = lambda direction: direction
    unsolvable: Problem | None = None
    bounds: tuple[Any, Any] | None = None
    truths: Sequence[float] = ()
    side: Literal["above", "below"] = "above"
    budgets: Sequence[Any] = ()
    name: str | None = None

    def __post_init__(self):
        if self.kind not in MINIMUM:
            raise ValueError(f"Case: `kind` must be in {sorted(MINIMUM)}.")
        if len(self.instances) < 2:
            raise ValueError("Case: `instances` must be two at least.")
        if len({str(jtu.tree_structure(i)) for i in self.instances}) > 1:
            raise ValueError("Case: `instances` must have one structure and function.")
        unknown = set(self.tags) - {"stochastic", *MOTIONS}
        unknown |= set(self.xfail) - set(checks(self))
        if unknown:
            raise ValueError(f"Case: unknown tags or checks {sorted(unknown)}.")


def checks(case: Case) -> dict[str, Callable[[Any], None]]:
    """The checks of a case by name: those of its kind and those its tags claim."""
    table = {**ALL, **KINDS[case.kind]}
    if "stochastic" in case.tags:
        table["key_decides"] = key_decides
    if case.bounds is not None:
        table["bounds_hold"] = bounds_hold
    for motion in sorted(set(case.tags) & set(MOTIONS)):
        table[motion] = functools.partial(moves_likewise, motion)
    return table


def contract(cases: Sequence[Case]) -> Callable:
    """One pytest test for each case and check; assign it to `test_contract`.

    Raises:
        ValueError: If there is no case, or one has fewer checks than its kind's.
    """
    import pytest

    if not cases:
        raise ValueError("contract: `cases` must not be empty.")
    params = []
    for number, case in enumerate(cases):
        table, bench = checks(case), BENCHES[case.kind](case)
        if len(table) < MINIMUM[case.kind]:
            raise ValueError(f"contract: case {number} has only {len(table)} checks.")
        for name, check in table.items():
            why = case.xfail.get(name)
            marks = [pytest.mark.xfail(reason=why, strict=True)] if why else []
            label = f"{case.name or case.kind + str(number)}-{name}"
            params.append(pytest.param(check, bench, id=label, marks=marks))

    @pytest.mark.parametrize(("check", "bench"), params)
    def test(check, bench):
        # optax itself relies on JAX's usual promotion.
        usual = contextlib.nullcontext()
        if bench.case.kind == "optimiser":
            usual = jax.numpy_dtype_promotion("standard")
        with jax.enable_x64(True), usual:
            try:
                check(bench)
            except pytest.skip.Exception:
                pytest.fail("a check must not skip; use `xfail` with a reason")

    test.cases = tuple(cases)
    return test
