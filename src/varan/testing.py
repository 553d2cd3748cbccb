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

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.flatten_util import ravel_pytree

from .core import FixedPoint, Problem, Root, Smooth, Status, solve
from .core._solve import _as_solver

__all__ = ["MINIMUM", "Case", "assert_close", "checks", "contract", "difference"]

# Fewer checks than these for a case is an error: a battery that shrinks unnoticed
# (a renamed tag, an emptied table) would stay green.
MINIMUM = {"solver": 14, "optimiser": 12, "certificate": 10, "function": 11}
_STEPS = 4  # enough for memory to matter, few enough to run without jit
_SETTINGS = (
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_debug_nans",
    "jax_default_matmul_precision",
    "jax_disable_jit",
)


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
        unknown = set(self.tags) - {"stochastic", *_MOTIONS}
        unknown |= set(self.xfail) - set(checks(self))
        if unknown:
            raise ValueError(f"Case: unknown tags or checks {sorted(unknown)}.")


def checks(case: Case) -> dict[str, Callable[[Any], None]]:
    """The checks of a case by name: those of its kind and those its tags claim."""
    table = {**_ALL, **_KINDS[case.kind]}
    if "stochastic" in case.tags:
        table["key_decides"] = _key_decides
    if case.bounds is not None:
        table["bounds_hold"] = _bounds_hold
    for motion in sorted(set(case.tags) & set(_MOTIONS)):
        table[motion] = functools.partial(_moves_likewise, motion)
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
        table, bench = checks(case), _BENCHES[case.kind](case)
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


# ---------------------------------------------------------------------- benches


class _Bench:
    """A case made ready: instances in float64, compiled functions shared."""

    def __init__(self, case: Case):
        self.case = case
        self.traces = 0

    @functools.cached_property
    def method(self):
        return self.make(0)

    @functools.cached_property
    def instances(self):
        return [_cast(i, jnp.float64) for i in self.case.instances]

    @functools.cached_property
    def compiled(self):
        return jax.jit(self.run)

    @functools.cached_property
    def derivative(self):
        return eqx.filter_jit(self._derive)

    def make(self, seed):
        stochastic = "stochastic" in self.case.tags
        return self.case.factory(*([jax.random.key(seed)] if stochastic else []))

    def call(self, instance):
        return self.method(*instance)

    def run(self, instance):
        self.traces += 1
        return self.call(instance)

    def eager_and_jitted(self):
        return self.call(self.instances[0]), self.compiled(self.instances[0])

    def count_traces(self, instances):
        before = self.traces
        for instance in instances:
            jax.block_until_ready(self.compiled(instance))
        return self.traces - before

    def key_run(self, seed):
        return self.make(seed)(*self.instances[0])

    def refuse_bad(self, value):
        if np.isnan(value):  # a function may saturate at infinity, tanh for one
            bad = self.call(_fill(self.instances[0], value))
            assert not _finite(bad), f"{value} gave finite numbers: {bad}"

    def refuse_empty(self):
        # Sums and means of nothing exist; a refusal must only be clear.
        self.call(_map(lambda leaf: leaf[..., :0], self.instances[0]))

    def refuse_shape(self):
        leaves, structure = jtu.tree_flatten(self.instances[0])
        if len(leaves) > 1:
            leaves[0] = jnp.concatenate([jnp.atleast_1d(leaves[0])] * 2, axis=-1)
            self.call(jtu.tree_unflatten(structure, leaves))
            raise AssertionError("arrays that do not fit together were accepted")

    def other_structure(self):
        """The answer for equal numbers in another dress, and the plain answer."""
        instance = jtu.tree_map(np.asarray, self.instances[0])
        return self.call(instance), self.call(self.instances[0])

    def smooth(self, floating, rest):
        return _inexact(self.compiled(eqx.combine(floating, rest)))

    def _derive(self, floating, rest, direction, weight):
        function = functools.partial(self.smooth, rest=rest)
        _, tangent = jax.jvp(function, (floating,), (direction,))
        _, pullback = jax.vjp(function, floating)
        return tangent, pullback(weight)[0]


class _CertificateBench(_Bench):
    def call(self, instance):
        return self.certify(instance, self.case.budgets[-1]).value

    def certify(self, instance, budget):
        return self.method(*instance, budget)

    def refuse_bad(self, value):
        bad = self.call(_fill(self.instances[0], value))
        assert not _finite(bad), f"data {value} were certified as {bad}"

    def refuse_empty(self):
        bad = self.call(_map(lambda leaf: leaf[..., :0], self.instances[0]))
        assert not _finite(bad), f"nothing was certified as {bad}"


class _SolverBench(_Bench):
    @functools.cached_property
    def instances(self):
        return [_counted(_cast(p, jnp.float64), self) for p in self.case.instances]

    @functools.cached_property
    def start(self):
        return _cast(self.case.start, jnp.float64)

    def solve(self, problem, start=None, method=None, **settings):
        settings = {"tol": self.case.tol, **settings}
        start = self.start if start is None else start
        method = self.method if method is None else method
        return solve(problem, method, start, max_steps=self.case.max_steps, **settings)

    def compiled(self, problem, **settings):  # `solve` compiles by itself
        end = self.solve(problem, **settings)
        return self.case.observe(problem, end.x), end.status, end.steps

    run = compiled

    def call(self, problem):
        return self.solve(problem).x

    def eager_and_jitted(self):
        step = eqx.filter_jit(lambda state: solver.step(problem, state))
        problem, solver = self.instances[0], _as_solver(self.method, self.instances[0])
        one = two = solver.init(problem, self.start)
        for _ in range(_STEPS):
            one, two = solver.step(problem, one), step(two)
        return one.x, two.x

    def key_run(self, seed):
        return self.solve(self.instances[0], method=self.make(seed)).trace.residual

    def refuse_bad(self, value):
        problem = self.instances[0]
        if jtu.tree_leaves(eqx.filter(problem, eqx.is_inexact_array)):
            end = self.solve(_fill(problem, value))
            # Infinite data may still leave a finite answer (a bound at infinity).
            solved = np.isinf(value) and _finite(end.x)
            assert solved or not end.converged, f"converged on data {value}"
        end = self.solve(problem, _fill(self.start, value))
        assert _finite(end.x) or not end.converged, f"converged from start {value}"

    def refuse_empty(self):
        self.solve(self.instances[0], _map(lambda x: x[..., :0], self.start))
        raise AssertionError("an empty start was accepted")

    def refuse_shape(self):
        longer = _map(lambda x: jnp.concatenate([jnp.atleast_1d(x)] * 2), self.start)
        end = self.solve(self.instances[0], longer, max_evaluations=9)
        assert _flat(end.x).size == _flat(longer).size, "the start was not used whole"

    def other_structure(self):
        flat = _flat(self.start)
        split = {"head": flat[:1], "tail": (flat[1:],)} if flat.size > 1 else [flat]
        view = _View.make(self.start)
        end = self.solve(_moved(self.instances[0], view), split)
        assert jtu.tree_structure(end.x) == jtu.tree_structure(split)
        return view(end.x), self.solve(self.instances[0]).x

    def smooth(self, floating, rest):
        problem = eqx.combine(floating, rest)
        return _inexact(self.case.observe(problem, self.solve(problem).x))


class _OptimiserBench(_Bench):
    @functools.cached_property
    def start(self):
        return _cast(self.case.start, jnp.float64)

    def call(self, problem):
        return self.train(self.method, problem, self.start)

    def eager_and_jitted(self):
        import optax

        params, problem = self.start, self.instances[0]
        state = self.method.init(params)
        for _ in range(_STEPS):
            updates, state = self.update(self.method, problem, state, params)
            params = optax.apply_updates(params, updates)
        return params, self.compiled(problem)

    def key_run(self, seed):
        return self.train(self.make(seed), self.instances[0], self.start)

    def update(self, method, problem, state, params):
        import optax

        value, grad = jax.value_and_grad(problem.value)(params)
        return optax.with_extra_args_support(method).update(
            grad, state, params, value=value, grad=grad, value_fn=problem.value
        )

    def train(self, method, problem, params, steps=_STEPS):
        import optax

        def body(carry, _):
            params, state = carry
            updates, state = self.update(method, problem, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = params, method.init(params)
        return jax.lax.scan(body, carry, length=steps)[0][0]

    def refuse_bad(self, value):
        if np.isnan(value):  # an infinite gradient may be clipped rightly
            state = self.method.init(self.start)
            problem = _fill(self.instances[0], value)
            flat = _flat(self.update(self.method, problem, state, self.start)[0])
            assert np.all(np.isnan(flat) | (flat == 0)), f"NaN became {flat}"

    def refuse_empty(self):
        params = [self.start, jnp.zeros(0)]
        problem = Smooth(lambda p, inner: inner.value(p[0]), self.instances[0])
        end = self.train(self.method, problem, params)
        assert end[1].shape == (0,) and _finite(end)

    def refuse_shape(self):
        state = self.method.init(self.start)
        self.method.update([self.start, self.start], state, self.start)
        raise AssertionError("updates of another structure were accepted")

    def other_structure(self):
        flat, view = _flat(self.start), _View.make(self.start)
        split = {"head": flat[:1], "tail": (flat[1:],)}
        end = self.train(self.method, _moved(self.instances[0], view), split)
        return view(end), self.run(self.instances[0])


_BENCHES = {
    "solver": _SolverBench,
    "optimiser": _OptimiserBench,
    "certificate": _CertificateBench,
    "function": _Bench,
}


# ------------------------------------------------------------- checks for all


def _jit_equals_eager(bench):
    assert_close(*bench.eager_and_jitted(), 1e-8)


def _new_values_compile_nothing(bench):
    bench.count_traces(bench.instances[:1])
    again = bench.count_traces(bench.instances)
    assert again == 0, f"new values were traced {again} times"


def _dtype_follows_input(bench):
    for dtype in (jnp.float32, jnp.float64):
        if bench.case.kind in ("solver", "optimiser"):
            method, problem = bench.method, _cast(bench.instances[0], dtype)
            start = _cast(bench.start, dtype)
            if bench.case.kind == "solver":
                end = bench.solve(problem, start, tol=None)
                out = end.x, end.residual
            else:
                state = method.init(start)
                out = bench.update(method, problem, state, start)[0]
        else:
            out = bench.compiled(_cast(bench.instances[0], dtype))
        got = {leaf.dtype for leaf in jtu.tree_leaves(_inexact(out))}
        assert got == {np.dtype(dtype)}, f"{np.dtype(dtype)} gave {got}"


def _pytrees(bench):
    assert_close(*bench.other_structure(), 1e-6)


def _vmap_equals_loop(bench):
    lanes = bench.instances
    if bench.case.kind == "solver":
        lanes = [*lanes, _fill(lanes[0], np.nan)]
    arrays, rest = zip(*(eqx.partition(i, eqx.is_array) for i in lanes), strict=True)
    stacked = jtu.tree_map(lambda *leaves: jnp.stack(leaves), *arrays)

    @jax.jit
    @jax.vmap
    def together(arrays):
        return bench.run(eqx.combine(arrays, rest[0]))

    out = together(stacked)
    for lane, instance in enumerate(lanes):
        mine = jtu.tree_map(lambda leaf, lane=lane: leaf[lane], out)
        alone = bench.compiled(instance)
        if bench.case.kind == "solver":
            assert mine[1] == alone[1], f"lane {lane}: {mine[1]}, alone {alone[1]}"
            # Batched sums round differently: one step more or less is honest.
            assert abs(int(mine[2] - alone[2])) <= 1, f"lane {lane} shares its steps"
            mine, alone = mine[0], alone[0]
        if _finite(alone):
            assert_close(mine, alone, 1e-6)


def _bad_values_say_so(bench):
    for value in (np.nan, np.inf):
        _accept_refusal(bench, bench.refuse_bad, value)


def _bad_shapes_say_so(bench):
    _accept_refusal(bench, bench.refuse_empty)
    _accept_refusal(bench, bench.refuse_shape)


def _inputs_and_settings_untouched(bench):
    settings = {name: getattr(jax.config, name) for name in _SETTINGS}
    numbers = str(np.random.get_state())
    instance = bench.instances[0]
    before = jtu.tree_map(np.array, eqx.filter(instance, eqx.is_array))
    if bench.case.kind in ("certificate", "function"):
        instance = jtu.tree_map(np.array, instance)  # NumPy arrays can be overwritten
    bench.call(instance)
    after = eqx.filter(instance, eqx.is_array)
    same = jtu.tree_map(lambda a, b: np.array_equal(a, b, True), before, after)
    assert all(jtu.tree_leaves(same)), "the input was overwritten"
    now = {name: getattr(jax.config, name) for name in _SETTINGS}
    assert now == settings, f"JAX settings became {now}"
    assert numbers == str(np.random.get_state()), "drew from NumPy's global generator"


def _key_decides(bench):
    first, again, other = (_flat(bench.key_run(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again, True), "one key, two answers"
    assert not np.array_equal(first, other, True), "the key is not used"


# -------------------------------------------------------------- solver's checks


def _solves_and_status_is_true(bench):
    for problem in bench.instances:
        end = bench.solve(problem)
        assert end.converged, Status(int(end.status)).advice
        residual = problem.residual(problem.condition(end.x))
        # Rounding of a recomputed condition, relative to the answer's size.
        slack = 1e3 * np.finfo(np.float64).eps * (1 + np.linalg.norm(_flat(end.x)))
        assert residual <= bench.case.tol + slack, f"says converged, at {residual}"
        assert end.certificate.met


def _stops_at_once_at_solution(bench):
    end = bench.solve(bench.instances[0])
    again = bench.solve(bench.instances[0], end.x)
    assert again.steps == 0 and again.converged, f"{again.steps} steps from a solution"


def _cut_off_says_so(bench):
    full = bench.solve(bench.instances[0])
    cut = bench.solve(bench.instances[0], max_evaluations=2)
    assert cut.steps <= 1, f"{cut.steps} steps on two evaluations"
    assert full.steps <= 1 or cut.status == Status.STEP_LIMIT, "cut off in silence"


def _failing_says_so(bench):
    tiny = np.finfo(np.float64).tiny
    end = bench.solve(bench.instances[0], tol=tiny)
    assert end.status != Status.RUNNING
    assert not end.converged or end.residual <= tiny, "tol beyond reach, yet converged"
    if bench.case.unsolvable is not None:
        problem = _counted(_cast(bench.case.unsolvable, jnp.float64), bench)
        assert not bench.solve(problem).converged, "solved what has no solution"


def _bounds_hold(bench):
    lower, upper = (jnp.asarray(b) for b in bench.case.bounds)
    problem = bench.instances[0]
    solver = _as_solver(bench.method, problem)
    step = eqx.filter_jit(lambda p, state: solver.step(p, state))
    state = solver.init(problem, bench.start)
    for _ in range(20):
        for x in jtu.tree_leaves(state.x):
            assert jnp.all((lower <= x) & (x <= upper)), f"left its bounds: {x}"
        state = step(problem, state)


def _moves_likewise(motion, bench):
    view = _View.make(bench.start, **{motion: True})
    for problem in bench.instances:
        end = bench.solve(_moved(problem, view), view.inverse(bench.start))
        assert end.converged, f"{motion}: {Status(int(end.status)).advice}"
        assert_close(view(end.x), bench.solve(problem).x, 1e-6)


# ---------------------------------------------------------- derivatives' checks


def _derivative_matches_differences(bench):
    for floating, rest, direction in _directions(bench):
        weight = bench.smooth(floating, rest)
        tangent, _ = bench.derivative(floating, rest, direction, weight)
        numeric = difference(lambda f, r=rest: bench.smooth(f, r), floating, direction)
        assert_close(tangent, numeric, 1e-6)


def _forward_matches_reverse(bench):
    for floating, rest, direction in _directions(bench):
        value = bench.smooth(floating, rest)
        weight = _random_like(value, 1)
        tangent, pulled = bench.derivative(floating, rest, direction, weight)
        forward = np.vdot(_flat(tangent), _flat(weight))
        reverse = np.vdot(_flat(direction), _flat(pulled))
        assert_close(forward, reverse, 1e-8)


def _second_order_matches_differences(bench):
    @eqx.filter_jit
    def gradient(floating, rest, weight):
        function = functools.partial(bench.smooth, rest=rest)
        return jax.vjp(function, floating)[1](weight)[0]

    @eqx.filter_jit
    def curvature(floating, rest, weight, direction):
        function = functools.partial(gradient, rest=rest, weight=weight)
        return jax.jvp(function, (floating,), (direction,))[1]

    for floating, rest, direction in _directions(bench):
        weight = _random_like(bench.smooth(floating, rest), 1)
        exact = curvature(floating, rest, weight, direction)
        numeric = difference(
            lambda f, r=rest, w=weight: gradient(f, r, w), floating, direction
        )
        assert_close(exact, numeric, 1e-6)


def _directions(bench):
    """For each floating leaf of the first instance a direction in it alone."""
    floating, rest = eqx.partition(bench.instances[0], eqx.is_inexact_array)
    leaves, structure = jtu.tree_flatten(floating)
    assert leaves, "nothing to differentiate: the instances hold no floating array"
    for number, leaf in enumerate(leaves):
        zeros = [jnp.zeros_like(other) for other in leaves]
        zeros[number] = _random_like(leaf, number + 2)
        direction = bench.case.project(jtu.tree_unflatten(structure, zeros))
        yield floating, rest, direction


def difference(function, point, direction, step=1e-3):
    """Fourth-order central difference of a function along a direction.

    Its error is about `step**4` plus the function's noise divided by `step`: 1e-9 to
    1e-12 for functions of unit scale in float64.

    Args:
        function: Maps a pytree of floating arrays to a pytree of arrays.
        point: Where.
        direction: A pytree like `point`.
        step: Length of the step along the direction.

    Returns:
        The derivative, all leaves of the output in one NumPy vector.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.testing import difference
        >>> difference(lambda x: x**2, jnp.float32(1), jnp.float32(1), 0.1).round(2)
        array([2.], dtype=float32)
    """

    def at(t):
        shifted = jtu.tree_map(lambda p, d: p + t * step * d, point, direction)
        return _flat(function(shifted))

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


# ----------------------------------------------------------- optimiser's checks


def _lowers_the_objective(bench):
    problem = bench.instances[0]
    train = jax.jit(
        lambda p: bench.train(bench.method, problem, p, bench.case.max_steps)
    )
    before, after = problem.value(bench.start), problem.value(train(bench.start))
    assert after < before, f"the objective went from {before} to {after}"


def _chains(bench):
    import optax

    problem, start = bench.instances[0], bench.start
    chained = optax.chain(optax.identity(), bench.method, optax.scale(0.5))
    half, _ = bench.update(chained, problem, chained.init(start), start)
    whole, _ = bench.update(bench.method, problem, bench.method.init(start), start)
    assert_close(half, _map(lambda u: 0.5 * u, whole), 1e-10)


def _accumulates(bench):
    import optax

    problem, start = bench.instances[0], bench.start
    pair = optax.MultiSteps(bench.method, 2).gradient_transformation()
    none, state = bench.update(pair, problem, pair.init(start), start)
    assert not np.any(_flat(none)), "moved before the accumulation was full"
    both, _ = bench.update(pair, problem, state, start)
    whole, _ = bench.update(bench.method, problem, bench.method.init(start), start)
    assert_close(both, whole, 1e-10)


def _state_survives_scan(bench):
    """Structure, shapes and dtypes of the state never change (float32, float64)."""
    for dtype in (jnp.float32, jnp.float64):
        problem, start = (_cast(t, dtype) for t in (bench.instances[0], bench.start))
        first = bench.method.init(start)
        updates, second = bench.update(bench.method, problem, first, start)
        assert jtu.tree_structure(first) == jtu.tree_structure(second)
        one, two = (
            [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jtu.tree_leaves(s)]
            for s in (first, second)
        )
        assert one == two, f"the state changed from {one} to {two}"
        kinds = {leaf.dtype for leaf in jtu.tree_leaves(updates)}
        assert kinds == {np.dtype(dtype)}, f"{np.dtype(dtype)} updates became {kinds}"


# --------------------------------------------------------- certificate's checks


def _right_side_of_truth(bench):
    case = bench.case
    assert len(case.truths) == len(case.instances), "a truth for each instance"
    for dtype in (jnp.float32, jnp.float64):
        for instance, truth in zip(bench.instances, case.truths, strict=True):
            slack = 1e2 * np.finfo(dtype).eps * (1 + abs(truth))
            for budget in case.budgets:
                value = float(bench.certify(_cast(instance, dtype), budget).value)
                gap = value - truth if case.side == "above" else truth - value
                assert gap >= -slack, f"{value} is on the wrong side of {truth}"


def _tightens_with_budget(bench):
    assert len(bench.case.budgets) > 1, "two budgets at least"
    sign = 1 if bench.case.side == "above" else -1
    strictly = False
    for instance in bench.instances:
        values = [
            sign * float(bench.certify(instance, budget).value)
            for budget in bench.case.budgets
        ]
        drops = -np.diff(values)
        assert np.all(drops >= -1e-12 * (1 + np.abs(values[0]))), f"loosened: {values}"
        strictly |= bool(drops.sum() > 0)
    assert strictly, "a larger budget never helped"


_ALL = {
    "jit_equals_eager": _jit_equals_eager,
    "new_values_compile_nothing": _new_values_compile_nothing,
    "dtype_follows_input": _dtype_follows_input,
    "pytrees": _pytrees,
    "vmap_equals_loop": _vmap_equals_loop,
    "bad_values_say_so": _bad_values_say_so,
    "bad_shapes_say_so": _bad_shapes_say_so,
    "inputs_and_settings_untouched": _inputs_and_settings_untouched,
}
_DERIVATIVES = {
    "derivative_matches_differences": _derivative_matches_differences,
    "forward_matches_reverse": _forward_matches_reverse,
}
_KINDS = {
    "solver": {
        "solves_and_status_is_true": _solves_and_status_is_true,
        "stops_at_once_at_solution": _stops_at_once_at_solution,
        "cut_off_says_so": _cut_off_says_so,
        "failing_says_so": _failing_says_so,
        **_DERIVATIVES,
    },
    "optimiser": {
        "lowers_the_objective": _lowers_the_objective,
        "chains": _chains,
        "accumulates": _accumulates,
        "state_survives_scan": _state_survives_scan,
    },
    "certificate": {
        "right_side_of_truth": _right_side_of_truth,
        "tightens_with_budget": _tightens_with_budget,
    },
    "function": {
        **_DERIVATIVES,
        "second_order_matches_differences": _second_order_matches_differences,
    },
}


# ---------------------------------------------------------------------- helpers


class _View(eqx.Module):
    """The coordinates z of `x = factor * z[order] + offset`, x like a template."""

    template: Any
    order: jax.Array
    factor: jax.Array
    offset: jax.Array

    @staticmethod
    def make(template, shift=False, scale=False, permutation=False, reflection=False):
        size = _flat(template).size
        signs = np.where(np.arange(size) % 2 == 0, -1.0, 1.0) if reflection else 1.0
        return _View(
            template,
            jnp.asarray(np.roll(np.arange(size), 1 if permutation else 0)),
            jnp.asarray(np.broadcast_to(signs * (8.0 if scale else 1.0), size)),
            jnp.asarray(np.linspace(50.0, 100.0, size) if shift else np.zeros(size)),
        )

    def __call__(self, z):
        flat = self.factor * ravel_pytree(z)[0][self.order] + self.offset
        return ravel_pytree(self.template)[1](flat)

    def inverse(self, x, like=None, linear=False):
        flat = ravel_pytree(x)[0] - (0 if linear else self.offset)
        flat = jnp.zeros_like(flat).at[self.order].set(flat / self.factor)
        return ravel_pytree(self.template if like is None else like)[1](flat)


class _Seen(eqx.Module):
    """A problem's function, seen through a view."""

    function: Callable
    view: _View
    pull: Literal["scalar", "point", "vector"] = eqx.field(static=True)

    def __call__(self, z, *params):
        out = self.function(self.view(z), *params)
        if self.pull == "scalar":
            return out
        return self.view.inverse(out, z, linear=self.pull == "vector")


class _Seeming(Problem):
    """A problem that is no more than its condition, seen through a view."""

    inner: Problem
    view: _View

    def condition(self, z):
        return self.view.inverse(self.inner.condition(self.view(z)), z, linear=True)


_MOTIONS = ("shift", "scale", "permutation", "reflection")


def _moved(problem: Problem, view: _View) -> Problem:
    for kind, name, pull in (
        (Smooth, "objective", "scalar"),
        (FixedPoint, "function", "point"),
        (Root, "function", "vector"),
    ):
        if isinstance(problem, kind):
            seen = _Seen(getattr(problem, name), view, pull)
            return eqx.tree_at(lambda p, n=name: getattr(p, n), problem, seen)
    return _Seeming(problem, view)


@functools.cache
def _counting_class(kind, bench):
    def condition(self, x):
        bench.traces += 1
        return kind.condition(self, x)

    return type(kind.__name__, (kind,), {"condition": condition})


def _counted(problem: Problem, bench) -> Problem:
    """The same problem, of a subclass that counts traces of its condition."""
    kind = _counting_class(type(problem), bench)
    copy = object.__new__(kind)
    for name, value in vars(problem).items():
        object.__setattr__(copy, name, value)
    return copy


def _accept_refusal(bench, function, *args):
    """A `ValueError` or `TypeError`; from a function of ours one in house form."""
    try:
        function(*args)
    except (ValueError, TypeError) as error:
        ours = bench.case.kind in ("certificate", "function")
        clear = re.match(r"[\w.]+: .*`", str(error), re.DOTALL)
        assert clear or not ours, f"not `who: what was required (got what)`: {error}"


def _map(function, tree):
    return jtu.tree_map(
        lambda leaf: function(leaf) if eqx.is_inexact_array(leaf) else leaf, tree
    )


def _cast(tree, dtype):
    def cast(leaf):
        if isinstance(leaf, (float, np.ndarray, np.generic)):
            leaf = jnp.asarray(leaf)
        return leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf

    return jtu.tree_map(cast, tree)


def _fill(tree, value):
    return _map(lambda leaf: jnp.full_like(leaf, value), tree)


def _random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return _map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), tree)


def _inexact(tree):
    return eqx.filter(jtu.tree_map(jnp.asarray, tree), eqx.is_inexact_array)


def _flat(tree):
    leaves = [np.ravel(leaf) for leaf in jtu.tree_leaves(tree) if np.size(leaf)]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def _finite(tree):
    return bool(np.all(np.isfinite(_flat(tree).astype(float))))


def assert_close(got, wanted, rtol):
    """Asserts that two pytrees of numbers are near; NaN is near nothing.

    Args:
        got: A pytree of numbers.
        wanted: A pytree of as many numbers.
        rtol: Bounds the norm of all differences, relative to the norm of all wanted
            numbers where that exceeds one, absolutely where it does not.
    """
    got, wanted = (_flat(t).astype(np.float64) for t in (got, wanted))
    assert got.shape == wanted.shape, f"shapes {got.shape} and {wanted.shape}"
    gap, size = np.linalg.norm(got - wanted), np.linalg.norm(wanted)
    assert gap <= rtol * max(size, 1.0), f"off by {gap} of {size}"
