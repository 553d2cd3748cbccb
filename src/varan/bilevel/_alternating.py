"""What all solvers share that move `x`, `y` and the adjoint in turn.

They differ in how they come by the adjoint `w`, near `-(hess_yy f)^-1 grad_y F`, and in
how often each variable moves. The pieces of a step stand here once: the lower step, the
adjoint equation's residual, the direction for `x` and the upper step. A solver of the
family is a rule `advance` that puts them together, and it counts every call of an
oracle: on `varan.solve` as `evaluations`, by kind in `Iterate.oracles`.

A stochastic rule draws from the problem (`BilevelProblem.draw`); the condition that
`solve` measures is always the full one, and measuring it is not counted.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from ..core._solver import Solver, State
from ..core._trees import floats_as_arrays
from ._problem import BilevelPoint, BilevelProblem, check_bilevel


class Oracles(eqx.Module):
    """Calls of oracles, by kind; each costs about as much as a few function values.

    Args:
        upper: Gradients of `F`, in `x` and `y` at once or in one of them.
        lower: Gradients of `f`, likewise.
        hessian: Products of `hess_yy f` with a vector.
        cross: Products of the mixed derivative `grad_xy f` with a vector.
    """

    upper: Int[Array, ""]
    lower: Int[Array, ""]
    hessian: Int[Array, ""]
    cross: Int[Array, ""]

    def __init__(
        self, upper: Any = 0, lower: Any = 0, hessian: Any = 0, cross: Any = 0
    ):
        self.upper, self.lower, self.hessian, self.cross = (
            jnp.asarray(v, jnp.int32) for v in (upper, lower, hessian, cross)
        )

    @property
    def total(self) -> Int[Array, ""]:
        """All calls together."""
        return self.upper + self.lower + self.hessian + self.cross


class Iterate(eqx.Module):
    """Where a solver of the family stands.

    Args:
        x: Upper variables.
        y: Lower variables.
        adjoint: The current `w`.
        extra: What the method keeps besides.
        key: For the draws that follow.
        count: Rounds done.
        oracles: Calls of oracles up to here.
    """

    x: PyTree[Array]
    y: PyTree[Array]
    adjoint: PyTree[Array]
    extra: Any
    key: PRNGKeyArray
    count: Int[Array, ""]
    oracles: Oracles


class AbstractAlternating(Solver):
    """A solver that is a rule from one `Iterate` to the next.

    Subclasses have a field `key` and write `advance`; `extra` when they keep something
    besides, `refine` when something happens before the first round, `check` when they
    honour sets or constraints of the lower level.
    """

    key: eqx.AbstractVar[PRNGKeyArray | None]

    @abc.abstractmethod
    def advance(self, problem: BilevelProblem, iterate: Iterate) -> Iterate:
        """One round: the paper's algorithm box, without measuring anything."""

    def extra(self, problem: BilevelProblem, start: BilevelPoint) -> Any:
        """What the method keeps besides, at the start."""

    def refine(self, problem: BilevelProblem, iterate: Iterate) -> Iterate:
        """What happens once, before the first round."""
        return iterate

    def check(self, problem: BilevelProblem) -> None:
        """Refuses a problem outside the method's assumptions."""
        check_plain(type(self).__name__, problem)

    def begin(self, problem: BilevelProblem, start: BilevelPoint) -> Iterate:
        """The iterate before the first round."""
        check_bilevel(type(self).__name__, problem, start)
        self.check(problem)
        if self.key is None and problem.sample is not None:
            raise ValueError(
                f"{type(self).__name__}: a problem with `sample` needs `key`, from "
                "which its draws are made. Pass key=jax.random.key(0) or another."
            )
        key = jax.random.key(0) if self.key is None else self.key
        # Copies: parts of the iterate must not alias what the loop overwrites.
        x, y, adjoint = jtu.tree_map(jnp.copy, (start.x, start.y, start.adjoint))
        first = Iterate(
            x, y, adjoint, self.extra(problem, start), key, jnp.array(0), Oracles()
        )
        return self.refine(problem, first)

    def point(self, problem: BilevelProblem, iterate: Iterate) -> BilevelPoint:
        """The iterate as a candidate answer."""
        return BilevelPoint(iterate.x, iterate.y, iterate.adjoint)

    def init(self, problem: BilevelProblem, start: BilevelPoint) -> State:
        iterate = self.begin(problem, start)
        point = self.point(problem, iterate)
        spent = 1 + iterate.oracles.total
        return State(point, problem.condition(point), iterate, evaluations=spent)

    def step(self, problem: BilevelProblem, state: State) -> State:
        iterate = self.advance(problem, state.memory)
        point = self.point(problem, iterate)
        spent = iterate.oracles.total - state.memory.oracles.total
        return State(point, problem.condition(point), iterate, evaluations=spent)


def trajectory(
    problem: BilevelProblem,
    solver: Any,
    start: BilevelPoint,
    observe: Callable[[BilevelProblem, Any], PyTree[Array]],
    *,
    steps: int,
    every: int = 1,
) -> tuple[Any, PyTree[Array]]:
    """Runs a solver for a number of rounds and looks at it now and then.

    Unlike `varan.solve` it neither measures the condition nor stops: for long runs on
    data, where one full condition costs more than many rounds on minibatches. One
    compiled loop; `jax.vmap` over settings or keys works.

    Args:
        problem: The problem.
        solver: A solver with `begin` and `advance`; all of this topic but `AiPOD`.
        start: The first point.
        observe: Function of the problem and the solver's iterate (an `Iterate` with
            `x`, `y` and `oracles`), whose values are returned. Functions defined at
            module level are compiled once.
        steps: Rounds.
        every: Rounds between observations; what does not fill a last interval is left
            out.

    Returns:
        The last iterate, and the observations stacked along a first axis of length
        `steps // every`.

    Raises:
        ValueError: if `every` does not lie in 1 .. `steps`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.bilevel import SOBA, BilevelProblem, trajectory
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 1) ** 2 / 2, lambda x, y: (y - 2 * x) ** 2 / 2
        ... )
        >>> start = problem.point(jnp.array(0.0), jnp.array(0.0))
        >>> last, seen = trajectory(
        ...     problem, SOBA(0.1, 0.5, 0.5), start, lambda problem, iterate: iterate.x,
        ...     steps=400, every=100,
        ... )
        >>> seen.shape, round(float(last.x), 3), int(last.oracles.hessian)
        ((4,), 0.5, 400)
    """
    if not 1 <= every <= steps:
        raise ValueError(
            f"trajectory: `every` must lie in 1 .. {steps}, the steps (got {every})."
        )
    return _trajectory(problem, floats_as_arrays(solver), start, observe, steps, every)


@eqx.filter_jit
def _trajectory(problem, solver, start, observe, steps, every):
    def some(iterate, _):
        iterate = jax.lax.fori_loop(
            0, every, lambda _, at: solver.advance(problem, at), iterate
        )
        return iterate, observe(problem, iterate)

    first = solver.begin(problem, start)
    dynamic, static = eqx.partition(first, eqx.is_array)

    def body(dynamic, _):
        iterate, seen = some(eqx.combine(dynamic, static), None)
        return eqx.filter(iterate, eqx.is_array), seen

    dynamic, seen = jax.lax.scan(body, dynamic, None, length=steps // every)
    return eqx.combine(dynamic, static), seen


def check_plain(owner: str, problem: BilevelProblem) -> None:
    """Refuses constraints and sets of the lower level."""
    if problem.constrained or problem.project_y is not None:
        raise ValueError(
            f"{owner}: needs a lower level without constraints and without "
            "`project_y`. Use Penalty for sets, LVHBA or AiPOD for constraints."
        )


def descend(tree: PyTree, direction: PyTree, stepsize: Any) -> PyTree:
    """`tree - stepsize * direction`, in the tree's dtype."""
    return jtu.tree_map(
        lambda v, d: v - jnp.asarray(stepsize, v.dtype) * d, tree, direction
    )


def dot(a: PyTree, b: PyTree) -> Any:
    """Inner product of two pytrees."""
    return sum(jtu.tree_leaves(jtu.tree_map(jnp.vdot, a, b)))


def upper_gradients(problem, x, y):
    """`grad_x F` and `grad_y F`."""
    return jax.grad(problem.upper_value, argnums=(0, 1))(x, y)


def lower_gradient(problem, x, y):
    """`grad_y f`."""
    return jax.grad(problem.lower_value, argnums=1)(x, y)


def hessian_product(problem, x, y, vector):
    """`hess_yy f` times a vector."""
    return jax.jvp(lambda v: lower_gradient(problem, x, v), (y,), (vector,))[1]


def adjoint_residual(problem, x, y, adjoint, force):
    """`hess_yy f w + grad_y F`: zero exactly for the right adjoint."""
    product = hessian_product(problem, x, y, adjoint)
    return jtu.tree_map(jnp.add, product, force)


def cross_product(problem, x, y, vector):
    """The derivative in `x` of `grad_y f . vector`."""
    return jax.grad(lambda x: dot(vector, lower_gradient(problem, x, y)))(x)


def upper_direction(problem, x, y, adjoint, slope):
    """`grad_x F + (grad_xy f)' w`: the hypergradient, for the right adjoint."""
    return jtu.tree_map(jnp.add, slope, cross_product(problem, x, y, adjoint))


def lower_step(problem, x, y, stepsize):
    """A (projected) gradient step on the lower level."""
    y = descend(y, lower_gradient(problem, x, y), stepsize)
    return y if problem.project_y is None else problem.project_y(y)


def lower_steps(problem, x, y, stepsize, key, number):
    """Several lower steps, a fresh draw for each."""

    def one(y, key):
        return lower_step(problem.draw(key), x, y, stepsize), None

    return jax.lax.scan(one, y, jax.random.split(key, number))[0]


def upper_step(problem, x, direction, stepsize):
    """A (projected) step on the upper variables."""
    x = descend(x, direction, stepsize)
    return x if problem.project_x is None else problem.project_x(x)


def conjugate_gradients(product, right, start, tol, max_steps: int):
    """Solves `product(w) = right` for a positive definite product.

    Stops at a residual of Euclidean norm `tol`. Returns the answer, the residual's norm
    by recurrence, and the number of products spent, that of the start included.
    """
    square = lambda tree: dot(tree, tree)  # noqa: E731
    residual = jtu.tree_map(jnp.subtract, right, product(start))
    carry = (start, residual, residual, square(residual), jnp.array(1))

    def go(carry):
        return (carry[3] > tol**2) & (carry[4] <= max_steps)

    def step(carry):
        w, r, p, rr, count = carry
        image = product(p)
        size = rr / dot(p, image)
        w, r = descend(w, p, -size), descend(r, image, size)
        new = square(r)
        p = descend(r, p, -new / rr)
        return w, r, p, new, count + 1

    w, _, _, rr, count = jax.lax.while_loop(go, step, carry)
    return w, jnp.sqrt(rr), count


def advanced(iterate: Iterate, key, cost: Oracles, **changes) -> Iterate:
    """The next iterate: parts changed, one round and its cost on."""
    oracles = jtu.tree_map(jnp.add, iterate.oracles, cost)
    parts = {name: getattr(iterate, name) for name in ("x", "y", "adjoint", "extra")}
    return Iterate(
        **{**parts, **changes}, key=key, count=iterate.count + 1, oracles=oracles
    )
