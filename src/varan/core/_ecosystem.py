"""Solvers of optimistix and optax as varan solvers: certificates and stability at once.

`solve` wraps them by itself; the classes are public for the settings that a bare
solver cannot carry.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import optimistix as optx

from ._problem import FixedPoint, Problem, Smooth, objective_of
from ._solver import Solver, State


def as_solver(solver: Any, problem: Problem) -> Solver:
    """The varan solver of an optimistix solver or an optax transformation."""
    if isinstance(solver, optax.GradientTransformation):
        return FromOptax(solver)
    if isinstance(solver, _OPTIMISTIX):
        _check_fit(solver, problem)
        return FromOptimistix(solver)
    hint = " Instantiate it." if isinstance(solver, type) else ""
    raise TypeError(
        "solve: `solver` must be a varan.Solver, an optimistix minimiser, root finder, "
        "least-squares or fixed-point solver, or an optax transformation "
        f"(got {getattr(solver, '__name__', type(solver).__name__)}).{hint}"
    )


class FromOptax(Solver):
    """An optax transformation as a solver: one gradient a step.

    The problem's condition stands for the gradient. Transformations that need the
    objective (line searches, Polyak steps) get it where the problem has a `value`;
    one that has already computed the next gradient, as `optax.lbfgs` does in its line
    search, is not asked to compute it again.

    Args:
        transformation: Any optax gradient transformation.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from varan import Smooth, solve
        >>> problem = Smooth(lambda x: jnp.sum((x - 1.0) ** 2))
        >>> bool(solve(problem, optax.lbfgs(), jnp.zeros(3)).converged)
        True
    """

    transformation: optax.GradientTransformation = eqx.field(static=True)

    def init(self, problem, start):
        memory = self.transformation.init(start)
        return State(start, problem.condition(start), memory)

    def step(self, problem, state):
        objective = objective_of(problem)
        extra = {}
        if objective is not None:
            extra = {
                "value": objective(state.x),
                "grad": state.condition,
                "value_fn": objective,
            }
        transformation = optax.with_extra_args_support(self.transformation)
        updates, memory = transformation.update(
            state.condition, state.memory, state.x, **extra
        )
        x = optax.apply_updates(state.x, updates)
        # A line search that comes last in the chain has left its gradient at x; one
        # inside, or a condition that is not the gradient, has not.
        is_gradient = type(problem).condition is Smooth.condition
        if objective is not None and is_gradient and _ends_in_line_search(memory):
            _, condition = optax.value_and_grad_from_state(objective)(x, state=memory)
        else:
            condition = problem.condition(x)
        return State(x, condition, memory, evaluations=_evaluations(memory))


class FromOptimistix(Solver):
    """An optimistix solver as a solver: its step, varan's stopping.

    A minimiser gets the problem's `value`, a fixed-point solver the map of a
    `FixedPoint`, a least-squares solver the `residuals` of a `LeastSquares`, and a root
    finder (or a least-squares solver on anything else) the condition. Its own
    tolerances are not consulted: the run stops when the problem's condition is met.
    One evaluation a step for the method and one for the condition.

    Args:
        solver: Any optimistix solver.
        options: The `options` that `optimistix.root_find` and the like would take.

    Example:
        >>> import jax.numpy as jnp, optimistix as optx
        >>> from varan import Root, solve
        >>> from varan.core import FromOptimistix
        >>> bisection = FromOptimistix(
        ...     optx.Bisection(rtol=1e-6, atol=1e-6),
        ...     options={"lower": 0.0, "upper": 2.0},
        ... )
        >>> problem = Root(lambda x: x**2 - 2.0)
        >>> solve(problem, bisection, jnp.ones(()), tol=1e-5).x.round(3)
        Array(1.414, dtype=float32)
    """

    solver: Any
    options: dict[str, Any]

    def __init__(self, solver: Any, options: dict[str, Any] | None = None):
        self.solver = solver
        self.options = {} if options is None else options

    def init(self, problem, start):
        function = self._function(problem)
        struct = eqx.filter_eval_shape(function, start, None)[0]
        memory = self.solver.init(
            function, start, None, self.options, struct, None, frozenset()
        )
        return State(start, problem.condition(start), memory)

    def step(self, problem, state):
        function = self._function(problem)
        x, memory, _ = self.solver.step(
            function, state.x, None, self.options, state.memory, frozenset()
        )
        return State(x, problem.condition(x), memory, evaluations=2)

    def _function(self, problem):
        if isinstance(self.solver, optx.AbstractMinimiser):
            function = problem.value
        elif isinstance(self.solver, optx.AbstractFixedPointSolver):
            function = problem.apply
        elif isinstance(self.solver, optx.AbstractLeastSquaresSolver):
            function = getattr(problem, "residuals", problem.condition)
        else:
            function = problem.condition
        return lambda x, _: (jax.tree_util.tree_map(jnp.asarray, function(x)), None)


_OPTIMISTIX = (
    optx.AbstractMinimiser,
    optx.AbstractRootFinder,
    optx.AbstractLeastSquaresSolver,
    optx.AbstractFixedPointSolver,
)


def _check_fit(solver, problem):
    name, kind = type(solver).__name__, type(problem).__name__
    if isinstance(solver, optx.AbstractMinimiser) and objective_of(problem) is None:
        raise TypeError(
            f"solve: {name} is a minimiser and needs a problem with an objective "
            f"`value`, such as Smooth (got {kind})."
        )
    if isinstance(solver, optx.AbstractFixedPointSolver) and not isinstance(
        problem, FixedPoint
    ):
        raise TypeError(
            f"solve: {name} needs a FixedPoint problem (got {kind}). Use a root "
            "finder, or state the problem as a fixed point."
        )


def _ends_in_line_search(memory) -> bool:
    last = memory[-1] if type(memory) is tuple and memory else memory
    return all(getattr(last, name, None) is not None for name in ("value", "grad"))


def _evaluations(memory):
    info = optax.tree_utils.tree_get(memory, "info")
    return getattr(info, "num_linesearch_steps", 1)
