"""The checks: each takes a bench and asserts one promise of its method."""

from __future__ import annotations

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from ..core import Status
from ..core._solve import _as_solver
from ._tools import (
    View,
    assert_close,
    cast,
    counted,
    difference,
    fill,
    finite,
    flatten,
    inexact,
    moved,
    random_like,
    tree_floats,
)

_SETTINGS = (
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_debug_nans",
    "jax_default_matmul_precision",
    "jax_disable_jit",
)


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
            method, problem = bench.method, cast(bench.instances[0], dtype)
            start = cast(bench.start, dtype)
            if bench.case.kind == "solver":
                end = bench.solve(problem, start, tol=None)
                out = end.x, end.residual
            else:
                state = method.init(start)
                out = bench.update(method, problem, state, start)[0]
        else:
            out = bench.compiled(cast(bench.instances[0], dtype))
        got = {leaf.dtype for leaf in jtu.tree_leaves(inexact(out))}
        assert got == {np.dtype(dtype)}, f"{np.dtype(dtype)} gave {got}"


def _pytrees(bench):
    assert_close(*bench.other_structure(), 1e-6)


def _vmap_equals_loop(bench):
    lanes = bench.instances
    if bench.case.kind == "solver":
        lanes = [*lanes, fill(lanes[0], np.nan)]
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
        if finite(alone):
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


def key_decides(bench):
    first, again, other = (flatten(bench.key_run(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again, True), "one key, two answers"
    assert not np.array_equal(first, other, True), "the key is not used"


# -------------------------------------------------------------- solver's checks


def _solves_and_status_is_true(bench):
    for problem in bench.instances:
        end = bench.solve(problem)
        assert end.converged, Status(int(end.status)).advice
        residual = problem.residual(problem.condition(end.x))
        # Rounding of a recomputed condition, relative to the answer's size.
        slack = 1e3 * np.finfo(np.float64).eps * (1 + np.linalg.norm(flatten(end.x)))
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
        problem = counted(cast(bench.case.unsolvable, jnp.float64))
        assert not bench.solve(problem).converged, "solved what has no solution"


def bounds_hold(bench):
    lower, upper = (jnp.asarray(b) for b in bench.case.bounds)
    problem = bench.instances[0]
    solver = _as_solver(bench.method, problem)
    step = eqx.filter_jit(lambda p, state: solver.step(p, state))
    state = solver.init(problem, bench.start)
    for _ in range(20):
        for x in jtu.tree_leaves(state.x):
            assert jnp.all((lower <= x) & (x <= upper)), f"left its bounds: {x}"
        state = step(problem, state)


def moves_likewise(motion, bench):
    view = View.make(bench.start, **{motion: True})
    for problem in bench.instances:
        end = bench.solve(moved(problem, view), view.inverse(bench.start))
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
        weight = random_like(value, 1)
        tangent, pulled = bench.derivative(floating, rest, direction, weight)
        forward = np.vdot(flatten(tangent), flatten(weight))
        reverse = np.vdot(flatten(direction), flatten(pulled))
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
        weight = random_like(bench.smooth(floating, rest), 1)
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
        zeros[number] = random_like(leaf, number + 2)
        direction = bench.case.project(jtu.tree_unflatten(structure, zeros))
        yield floating, rest, direction


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
    assert_close(half, tree_floats(lambda u: 0.5 * u, whole), 1e-10)


def _accumulates(bench):
    import optax

    problem, start = bench.instances[0], bench.start
    pair = optax.MultiSteps(bench.method, 2).gradient_transformation()
    none, state = bench.update(pair, problem, pair.init(start), start)
    assert not np.any(flatten(none)), "moved before the accumulation was full"
    both, _ = bench.update(pair, problem, state, start)
    whole, _ = bench.update(bench.method, problem, bench.method.init(start), start)
    assert_close(both, whole, 1e-10)


def _state_survives_scan(bench):
    """Structure, shapes and dtypes of the state never change (float32, float64)."""
    for dtype in (jnp.float32, jnp.float64):
        problem, start = (cast(t, dtype) for t in (bench.instances[0], bench.start))
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
                value = float(bench.certify(cast(instance, dtype), budget).value)
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


ALL = {
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
KINDS = {
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


def _accept_refusal(bench, function, *args):
    """A `ValueError` or `TypeError`; from a function of ours one in house form."""
    try:
        function(*args)
    except (ValueError, TypeError) as error:
        ours = bench.case.kind in ("certificate", "function")
        clear = re.match(r"[\w.]+: .*`", str(error), re.DOTALL)
        assert clear or not ours, f"not `who: what was required (got what)`: {error}"
