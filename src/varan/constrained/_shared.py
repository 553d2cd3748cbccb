"""What the solvers of quadratic programs share beside linear algebra."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from ..core import State, Status
from ..core.optimality import KKTPoint
from ..problems import Quadratic


def as_quadratic(solver, problem, refused=(), *, operators=False) -> Quadratic:
    """The problem, unless the solver is not made for its kind, fields or operators."""
    name = type(solver).__name__
    if not isinstance(problem, Quadratic):
        raise TypeError(
            f"{name}: the problem must be a Quadratic (got {type(problem).__name__})."
        )
    for field in refused:
        if getattr(problem, field) is not None:
            raise TypeError(
                f"{name}: the problem must not have `{field}` (got one). Use OSQP."
            )
    if not operators and problem.matrix_free:
        raise TypeError(
            f"{name}: the problem's matrices must be arrays (got an operator). Use "
            "OSQP, or operator.as_matrix()."
        )
    return problem


def state_of(problem, scaled, point, condition, proof, memory, *, evaluations):
    """The state at `point`; where there is a proof, the proof in its place."""
    status, ray, weights = proof
    empty, falls = status == Status.INFEASIBLE, status == Status.UNBOUNDED
    weights = scaled.from_scaled(problem, jnp.zeros_like(ray), weights)
    proven = KKTPoint(
        jnp.where(falls, _unit(scaled.columns * ray), point.x),
        *choose(empty, _unit(weights[1:]), point[1:]),
    )
    # The condition of the proof is not of interest, and must not stop the run.
    condition = jtu.tree_map(
        lambda c: jnp.where(empty | falls, jnp.ones_like(c), c), condition
    )
    return State(proven, condition, memory, evaluations=evaluations, status=status)


def choose(flag, new, old):
    """Leaf by leaf the new one where the flag holds."""
    return jtu.tree_map(lambda n, o: jnp.where(flag, n, o), new, old)


def _unit(tree):
    leaves = jtu.tree_leaves(tree)
    size = jnp.max(jnp.stack([jnp.max(jnp.abs(v)) for v in leaves])) if leaves else 1
    size = jnp.where(size > 0, size, 1)
    return jax.tree_util.tree_map(lambda v: v / size, tree)
