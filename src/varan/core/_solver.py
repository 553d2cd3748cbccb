"""The two things that every solver has: a first state and a step."""

from __future__ import annotations

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from ._problem import Problem
from ._status import Status


class State(eqx.Module):
    """What a solver hands to the loop after each step.

    Args:
        x: The iterate, a pytree of arrays with the structure of the start.
        condition: The problem's optimality condition at `x`. The loop stops on its
            norm and does not evaluate it again, so a step that has computed it
            anyway passes it on for free.
        memory: Whatever else the next step reads, a pytree of arrays whose structure
            does not change (a counter begins as `jnp.array(0)`, not as `0`).
        evaluations: How many times the step that made this state evaluated the
            condition (or something as costly, such as a gradient).
        status: `Status.RUNNING`, or the reason why the solver must stop here
            (`DIVERGED`, `STALLED`, `INFEASIBLE`, `UNBOUNDED`).
    """

    x: PyTree[Array]
    condition: PyTree[Array]
    memory: Any
    evaluations: Int[Array, ""]
    status: Int[Array, ""]

    def __init__(
        self, x, condition, memory=None, *, evaluations=1, status=Status.RUNNING
    ):
        self.x = x
        self.condition = condition
        self.memory = memory
        self.evaluations = jnp.asarray(evaluations, jnp.int32)
        self.status = jnp.asarray(status, jnp.int32)


class Solver(eqx.Module):
    """Turns a problem into a sequence of states; knows nothing of stopping.

    Subclass it, and write `init` and `step` as pure JAX functions. Everything else
    (the loop, stopping, the trace, derivatives, certificates, stability) is done by
    `solve` for every solver alike.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import Problem, Smooth, Solver, State, solve
        >>> class Descent(Solver):
        ...     stepsize: float
        ...     def init(self, problem, start):
        ...         return State(start, problem.condition(start))
        ...     def step(self, problem, state):
        ...         x = state.x - self.stepsize * state.condition
        ...         return State(x, problem.condition(x))
        >>> problem = Smooth(lambda x, c: jnp.sum((x - c) ** 2), jnp.ones(2))
        >>> bool(solve(problem, Descent(0.4), jnp.zeros(2)).converged)
        True
    """

    @abc.abstractmethod
    def init(self, problem: Problem, start: PyTree[Array]) -> State:
        """The state at `start`."""

    @abc.abstractmethod
    def step(self, problem: Problem, state: State) -> State:
        """The next state."""
