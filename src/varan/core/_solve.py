"""The one loop: every solver on every problem, stopped by the problem's condition."""

from __future__ import annotations

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ._captures import capture_key
from ._checks import check_choice, check_positive, is_traced
from ._implicit import implicit_root
from ._problem import Problem
from ._solution import Solution, Trace
from ._solver import Solver, State
from ._status import Status
from ._trees import floats_as_arrays, stop_gradient, tree_square

# A run has stalled when this many steps in a row improve nothing and all stay within
# as many roundings of one point: then not even one unit in the last place is gained a
# step. Slow progress, a line search at work and a wandering method all escape it.
_PATIENCE = 100
_MARGIN = 0.999


def solve(
    problem: Problem,
    solver: Any,
    start: PyTree[Array],
    *,
    tol: float | Float[Array, ""] | None = None,
    max_steps: int = 1000,
    max_evaluations: int | None = None,
    differentiate: Literal["implicit", "unroll", "none"] = "implicit",
) -> Solution:
    """Runs a solver on a problem until the problem's condition is met.

    One compiled loop; calls with other values and the same shapes do not compile
    again. `jit`, `vmap`, `grad` and `jvp` of it work with respect to every array in
    the problem.

    Args:
        problem: States its own optimality condition.
        solver: A `varan.Solver`; or an optimistix minimiser, root finder,
            least-squares solver or fixed-point solver; or an optax transformation.
        start: First iterate, a pytree of floating arrays; the answer has its
            structure and dtype.
        tol: The run has converged when the problem's residual is at most this; an
            absolute number in the condition's units. Default: the square root of
            the dtype's rounding unit (1.5e-8 in float64, 3.5e-4 in float32).
        max_steps: Steps after which the run stops unconverged.
        max_evaluations: Evaluations of the condition after which the run stops
            unconverged (no step begins beyond it); default: no limit.
        differentiate: `"implicit"`: by the implicit function theorem at the answer,
            in forward and reverse mode, whatever the solver did (the derivative with
            respect to the start and the solver's settings is zero); where the run did
            not converge the derivative is NaN. `"unroll"`: through the iterations,
            with checkpoints, in reverse mode. `"none"`: differentiation is an error.

    Returns:
        A `Solution`. Read its `status`: `CONVERGED`, `STEP_LIMIT`, `STALLED` (the
        iterates stopped moving above `tol`, as when `tol` is below what the dtype
        can reach), `DIVERGED` (NaN or infinity; `x` is the last finite iterate), or
        `INFEASIBLE` or `UNBOUNDED` (proved by the solver).

    Raises:
        NotImplementedError: Inside `jax.shard_map` with `check_vma=True`.
        TypeError: If `problem` or `solver` is of no known kind, or `start` is not
            floating.
        ValueError: If `start` is empty, a limit or `tol` is not positive, or the
            condition has another number of entries than `start`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan import Newton, Smooth, solve
        >>> def ridge(lam):
        ...     loss = lambda w, lam: jnp.sum((w - 2.0) ** 2) + lam * w @ w
        ...     return solve(Smooth(loss, lam), Newton(), jnp.zeros(2)).x
        >>> ridge(1.0).round(3), jax.jacobian(ridge)(1.0).round(3)
        (Array([1., 1.], dtype=float32), Array([-0.5, -0.5], dtype=float32))
    """
    _check_arguments(problem, max_steps, max_evaluations, differentiate)
    _check_shards(problem)
    start = _as_start(start)
    dtype = jnp.result_type(*jtu.tree_leaves(start))
    if tol is None:
        tol = float(np.sqrt(jnp.finfo(dtype).eps))
    check_positive("solve", "tol", tol)
    limit = np.iinfo(np.int32).max if max_evaluations is None else max_evaluations
    problem, solver = floats_as_arrays(problem), _as_solver(solver, problem)
    return _solve(
        problem,
        solver,
        start,
        jnp.asarray(tol, jnp.finfo(dtype).dtype),
        int(max_steps),
        jnp.asarray(limit, jnp.int32),
        differentiate,
        capture_key(problem, solver),
    )


class _Carry(eqx.Module):
    state: State
    x: PyTree[Array]
    status: Int[Array, ""]
    steps: Int[Array, ""]
    evaluations: Int[Array, ""]
    best: Float[Array, ""]
    scale: Float[Array, ""]
    anchor: PyTree[Array]
    quiet: Int[Array, ""]
    trace: Trace


@eqx.filter_jit
def _solve(
    problem, solver, start, tol, max_steps, max_evaluations, differentiate, captures
):
    del captures  # part of the key under which this is compiled, nothing else

    def run(start):
        # The loop aims a little below the tolerance: the last evaluation is compiled
        # apart, and its rounding must not fall on the other side.
        aim = _MARGIN * tol
        end = _iterate(
            problem, solver, start, aim, max_steps, max_evaluations, differentiate
        )
        return end.x, end.status, end.steps, end.evaluations, end.trace

    if differentiate == "unroll":
        x, status, steps, evaluations, trace = run(start)
    else:
        # Every array that the run reads, closed over or not, becomes a constant of
        # the converted function and loses its tangent there: nothing is
        # differentiated through the loop.
        frozen = stop_gradient(eqx.filter_closure_convert(run, start))
        x, status, steps, evaluations, trace = frozen(stop_gradient(start))
    # The certificate is of x, whoever found it: the condition is evaluated once more,
    # and a solver that reported another one has not converged.
    # NaN in x may leave no trace in it (a maximum with zero swallows NaN).
    fine = jnp.isfinite(tree_square(x))
    condition = jtu.tree_map(
        lambda c: jnp.where(fine, c, jnp.nan), problem.condition(x)
    )
    residual = problem.residual(condition)
    wrong = (status == Status.CONVERGED) & ~(residual <= tol)
    status = jnp.where(wrong, jnp.asarray(Status.STALLED, jnp.int32), status)
    if differentiate != "unroll":
        x = _attach(problem, x, status, differentiate)
    return Solution(
        x=x,
        status=status,
        steps=steps,
        evaluations=evaluations,
        residual=residual,
        trace=trace,
        certificate=problem.certify(x, condition, tol),
        problem=problem,
        tol=tol,
    )


def _iterate(problem, solver, start, tol, max_steps, max_evaluations, differentiate):
    state = solver.init(problem, start)
    _check_state(solver, state, state)
    _check_condition(state.condition, start)
    residual = problem.residual(state.condition)
    trace = Trace(
        jnp.full(max_steps + 1, jnp.nan, residual.dtype).at[0].set(residual),
        jnp.zeros(max_steps + 1, jnp.int32).at[0].set(state.evaluations),
    )
    status = _last_that_holds(
        (state.evaluations >= max_evaluations, Status.STEP_LIMIT),
        (state.status != Status.RUNNING, state.status),
        (residual <= tol, Status.CONVERGED),
        (~jnp.isfinite(residual + tree_square(state.x)), Status.DIVERGED),
    )
    carry = _Carry(
        state=state,
        x=state.x,
        status=status,
        steps=jnp.zeros((), jnp.int32),
        evaluations=state.evaluations,
        best=residual,
        scale=tree_square(state.x),
        anchor=state.x,
        quiet=jnp.zeros((), jnp.int32),
        trace=trace,
    )

    def proceed(carry):
        return carry.status == Status.RUNNING

    def advance(carry):
        state = solver.step(problem, carry.state)
        _check_state(solver, state, carry.state)
        return _record(problem, carry, state, tol, max_steps, max_evaluations)

    return _while(proceed, advance, carry, max_steps, differentiate == "unroll")


def _while(proceed, advance, carry, max_steps, unroll):
    # A solver's memory may hold functions beside its arrays; those stay as they were.
    dynamic, static = eqx.partition(carry, eqx.is_array)

    def test(dynamic):
        return proceed(eqx.combine(dynamic, static))

    def body(dynamic):
        return eqx.filter(advance(eqx.combine(dynamic, static)), eqx.is_array)

    if unroll:
        from equinox.internal import while_loop

        dynamic = while_loop(
            test, body, dynamic, max_steps=max_steps, kind="checkpointed"
        )
    else:
        dynamic = jax.lax.while_loop(test, body, dynamic)
    return eqx.combine(dynamic, static)


def _record(problem, carry, state, tol, max_steps, max_evaluations) -> _Carry:
    """Decides the status, once; everybody else reads it."""
    residual = problem.residual(state.condition)
    scale = jnp.maximum(carry.scale, tree_square(state.x))
    # NaN in x may leave no trace in the residual (a maximum with zero swallows it).
    finite = jnp.isfinite(residual) & ~jnp.isnan(scale)
    steps = carry.steps + 1
    evaluations = carry.evaluations + state.evaluations
    anchor, quiet = _quiet(carry, state, residual, scale)
    limited = (steps >= max_steps) | (evaluations >= max_evaluations)
    status = _last_that_holds(
        (limited, Status.STEP_LIMIT),
        (quiet >= _PATIENCE, Status.STALLED),
        (state.status != Status.RUNNING, state.status),
        (residual <= tol, Status.CONVERGED),
        (~finite, Status.DIVERGED),
    )

    def write(buffer, entry):
        # A plain slice update: compiles faster than the scatter of `.at[].set`.
        entry = jax.lax.stop_gradient(entry)
        return jax.lax.dynamic_update_index_in_dim(buffer, entry, steps, 0)

    trace = Trace(
        write(carry.trace.residual, residual),
        write(carry.trace.evaluations, evaluations),
    )
    return _Carry(
        state=state,
        x=jtu.tree_map(lambda n, o: jnp.where(finite, n, o), state.x, carry.x),
        status=status,
        steps=steps,
        evaluations=evaluations,
        best=jnp.minimum(carry.best, residual),
        scale=scale,
        anchor=anchor,
        quiet=quiet,
        trace=trace,
    )


def _last_that_holds(*cases):
    status = jnp.asarray(Status.RUNNING, jnp.int32)
    for holds, name in cases:
        status = jnp.where(holds, jnp.asarray(name, jnp.int32), status)
    return status


def _quiet(carry: _Carry, state: State, residual, scale):
    """Counts consecutive steps that neither improve nor leave one point's vicinity."""
    radius = (_PATIENCE * np.finfo(residual.dtype).eps) ** 2
    gone = jtu.tree_map(jnp.subtract, state.x, carry.anchor)
    still = (residual >= carry.best) & (tree_square(gone) <= float(radius) * scale)
    anchor = jtu.tree_map(
        lambda new, old: jnp.where(still, old, new), state.x, carry.anchor
    )
    return anchor, jnp.where(still, carry.quiet + 1, 0).astype(jnp.int32)


def _attach(problem, x, status, differentiate):
    if differentiate == "none":
        return _refuse_derivative(x, eqx.filter_closure_convert(problem.condition, x))
    return implicit_root(
        problem.condition,
        x,
        tags=problem.jacobian_tags,
        unique=problem.unique,
        reliable=status == Status.CONVERGED,
    )


@eqx.filter_custom_jvp
def _refuse_derivative(x, closed):
    return x


@_refuse_derivative.def_jvp
def _refuse_derivative_jvp(primals, tangents):
    if not jtu.tree_leaves(tangents):
        return primals[0], jtu.tree_map(lambda _: None, primals[0])
    raise ValueError(
        "solve: a solution with differentiate='none' cannot be differentiated. "
        "Use differentiate='implicit' or 'unroll', or pass the problem's data through "
        "jax.lax.stop_gradient."
    )


def _as_solver(solver: Any, problem: Problem) -> Solver:
    if isinstance(solver, Solver):
        return floats_as_arrays(solver)
    # Imported here: optax and optimistix cost half a second to who does not use them.
    from ._ecosystem import as_solver

    return as_solver(solver, problem)


def _as_start(start):
    leaves, structure = jtu.tree_flatten(start)
    if not leaves or any(np.size(leaf) == 0 for leaf in leaves):
        raise ValueError(
            "solve: `start` must not be empty (got "
            f"{[np.shape(leaf) for leaf in leaves]})."
        )
    # jnp.array would copy; asarray of a Python float is weakly typed, which would
    # compile again when the loop's first output is strong.
    leaves = [
        jnp.asarray(leaf, jnp.result_type(leaf)) if not is_traced(leaf) else leaf
        for leaf in leaves
    ]
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"solve: `start` must hold floating arrays (got {leaf.dtype}). "
                "Convert it, for instance with jnp.asarray(start, float)."
            )
    return jtu.tree_unflatten(structure, leaves)


def _check_shards(problem):
    """Refuses typed manual axes: there a gradient is summed over shards unasked.

    Each shard would solve the sum of all shards' problems and call it converged.
    """
    for leaf in filter(eqx.is_array, jtu.tree_leaves(problem)):
        kind = getattr(jax.typeof(leaf), "manual_axis_type", None)
        if kind is not None and kind.varying:
            raise NotImplementedError(
                "solve: inside jax.shard_map the shards' problems would be mixed "
                f"(got a problem that varies over {sorted(kind.varying)}). Pass "
                "check_vma=False to jax.shard_map."
            )


def _check_arguments(problem, max_steps, max_evaluations, differentiate):
    if not isinstance(problem, Problem):
        raise TypeError(
            f"solve: `problem` must be a varan.Problem (got {type(problem).__name__}). "
            "Wrap a function as Smooth, Root or FixedPoint."
        )
    for name, limit in (("max_steps", max_steps), ("max_evaluations", max_evaluations)):
        if limit is not None and (
            not isinstance(limit, (int, np.integer)) or limit < 1
        ):
            raise ValueError(
                f"solve: `{name}` must be a positive integer (got {limit!r})."
            )
    check_choice(
        "solve", "differentiate", differentiate, ("implicit", "unroll", "none")
    )


def _check_state(solver, state, before):
    name = type(solver).__name__
    if not isinstance(state, State):
        raise TypeError(
            f"{name}: `init` and `step` must return a varan.State "
            f"(got {type(state).__name__})."
        )
    new, old = (jtu.tree_flatten(s.memory) for s in (state, before))
    kinds = [[eqx.is_array(leaf) for leaf in leaves] for leaves, _ in (new, old)]
    # A Python number is a constant of the compiled loop: a counter would never count.
    frozen = any(
        isinstance(b, (bool, int, float)) and a != b
        for a, b in zip(new[0], old[0], strict=False)
        if not eqx.is_array(a)
    )
    if new[1] != old[1] or kinds[0] != kinds[1] or frozen:
        raise TypeError(
            f"{name}: `step` must return a memory of the same arrays as it was given "
            f"(got {state.memory} after {before.memory}). Begin with arrays, for "
            "instance jnp.array(0) for a counter."
        )


def _check_condition(condition, start):
    rows = sum(np.size(leaf) for leaf in jtu.tree_leaves(condition))
    columns = sum(np.size(leaf) for leaf in jtu.tree_leaves(start))
    if rows != columns:
        raise ValueError(
            "solve: the problem's condition must have as many entries as the start "
            f"(got {rows} for {columns})."
        )
    kinds = [jnp.result_type(*jtu.tree_leaves(tree)) for tree in (condition, start)]
    if kinds[0] != kinds[1]:
        raise TypeError(
            "solve: the start and the problem's condition must have one dtype (got "
            f"{kinds[1]} and {kinds[0]}). Convert the start or the data."
        )
