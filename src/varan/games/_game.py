"""Games, saddle points and variational inequalities: one problem type.

Find `z` with `0 in F(z) + G(z)`: `F` an operator (the players' gradients, stacked), `G`
nothing, the normal cone of a convex set, or any maximal monotone operator with a
resolvent. The condition is the natural map

    z - J(z - F(z)),   J the projection on the set, or the resolvent of G,

zero exactly at a solution, and `F(z)` itself where there is no `G`. Everything that a
solver of this topic needs is part of the problem: a noisy oracle for `F`, the
components of a finite sum, and the constants that a step may depend on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ..core._certificate import Certificate
from ..core._checks import check_nonnegative, check_positive
from ..core._problem import FixedPoint, Problem, as_function
from ..core._trees import floats_as_arrays
from ._geometry import Geometry


class Game(Problem):
    """Find `z` with `0 in F(z) + G(z)`: an equilibrium, a saddle point, a zero.

    Args:
        operator: `F`, a function of `(z, *params)` that returns a pytree like `z`;
            `None` where the mean of `components` is meant (each call then costs all
            of them).
        *params: Pytrees of arrays; derivatives of the solution are taken with respect
            to these and to the arrays of a geometry.
        project: The Euclidean projection on the set that `z` stays in: a function of
            `(z, *params)`, or a Euclidean `Geometry`, which also knows the set's
            support function.
        resolvent: Function of `(z, stepsize, *params)`: the resolvent
            `(I + stepsize G)^-1`, where `G` is more than a set. Not with `project`.
        support: Function of a pytree `d` like `z`: `max <d, u>` over the set; with
            `monotone` it makes the certificate a bound of the gap.
        components: Function of `(i, z, *params)` with `F = mean_i F_i`, `i` an
            integer array from 0 to `count - 1`.
        count: How many components there are.
        sample: Function of `(key, z, *params)`: an unbiased noisy value of `F(z)`.
            Where it is left out, one component drawn uniformly.
        monotone: Promise that `<F(u) - F(v), u - v> >= 0`.
        lipschitz: A promised Lipschitz constant of `F`, positive. Solvers whose theory
            asks for shorter steps end `DIVERGED` at once instead of running on.
        unique: See `varan.Problem`.

    Raises:
        TypeError: If a function is not callable, or there is no operator.
        ValueError: If a promise is out of range, or arguments exclude each other.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.games import Extragradient, Game
        >>> game = Game.from_saddle(lambda x, y: x @ y + x @ x / 2 - x[0])
        >>> start = (jnp.ones(2), jnp.ones(2))
        >>> x, y = solve(game, Extragradient(0.4), start).x
        >>> [[round(float(v), 2) + 0.0 for v in block] for block in (x, y)]
        [[0.0, 0.0], [1.0, 0.0]]

    Source:
        Facchinei and Pang, 2003, "Finite-Dimensional Variational Inequalities and
        Complementarity Problems", section 1.5 (natural map) and 1.5.3 (gap function).
    """

    operator: Callable | None
    params: tuple
    projection: Callable | Geometry | None
    resolving: Callable | None
    support: Callable | None
    parts: Callable | None
    noisy: Callable | None
    lipschitz: Float[Array, ""] | None
    count: int | None = eqx.field(static=True)
    monotone: bool = eqx.field(static=True)
    _unique: bool = eqx.field(static=True)

    def __init__(
        self,
        operator: Callable | None,
        *params: PyTree,
        project: Callable | Geometry | None = None,
        resolvent: Callable | None = None,
        support: Callable | None = None,
        components: Callable | None = None,
        count: int | None = None,
        sample: Callable | None = None,
        monotone: bool = False,
        lipschitz: float | Float[Array, ""] | None = None,
        unique: bool = True,
    ):
        _check(operator, project, resolvent, components, count)
        geometric = isinstance(project, Geometry)
        self.operator = _optional("operator", operator)
        self.params = floats_as_arrays(params)
        self.projection = project if geometric else _optional("project", project)
        self.resolving = _optional("resolvent", resolvent)
        if support is None and isinstance(project, Geometry):
            support = _SupportOf(project)
        self.support = _optional("support", support)
        self.parts = _optional("components", components)
        self.noisy = _optional("sample", sample)
        if lipschitz is not None:
            check_positive("Game", "lipschitz", lipschitz)
            lipschitz = jnp.asarray(lipschitz)
        self.lipschitz = lipschitz
        self.count = count
        self.monotone = monotone
        self._unique = unique

    @staticmethod
    def from_saddle(function: Callable, *params: PyTree, **settings: Any) -> Game:
        """The saddle problem `min_x max_y f(x, y, *params)`; `z` is the pair `(x, y)`.

        Args:
            function: A scalar function of `x`, `y` and the parameters.
            *params: See `Game`.
            **settings: Of `Game`; `monotone=True` promises that `f` is convex in `x`
                and concave in `y`.

        Returns:
            The game with `F = (grad_x f, -grad_y f)`.
        """
        function = as_function("Game.from_saddle", "function", function)
        return Game(_SaddleOperator(function), *params, **settings)

    @staticmethod
    def from_players(
        losses: Sequence[Callable], *params: PyTree, **settings: Any
    ) -> Game:
        """A game between players: `z` is a tuple with one block for each.

        Args:
            losses: A function of `(z, *params)` for each player, which the player
                minimises over the own block, a pytree.
            *params: See `Game`.
            **settings: Of `Game`.

        Returns:
            The game whose operator is each player's gradient in the own block.
        """
        if callable(losses) or not tuple(losses):
            raise ValueError(
                "Game.from_players: `losses` must hold one function a player (got "
                f"{'one function' if callable(losses) else 'none'})."
            )
        losses = tuple(as_function("Game.from_players", "losses", f) for f in losses)
        return Game(_PlayersOperator(losses), *params, **settings)

    def with_noise(self, deviation: float | Float[Array, ""]) -> Game:
        """The same game with an oracle of independent normal noise.

        Args:
            deviation: Standard deviation of every entry, non-negative.

        Returns:
            A game whose `sample` is `F(z)` plus noise.
        """
        check_nonnegative("Game.with_noise", "deviation", deviation)
        noisy = _Noisy(self, jnp.asarray(deviation))
        return eqx.tree_at(lambda g: g.noisy, self, noisy, is_leaf=lambda v: v is None)

    def apply(self, z: PyTree[Array]) -> PyTree[Array]:
        """`F(z)`."""
        if self.operator is not None:
            return _like("operator", self.operator(z, *self.params), z)
        everyone = jnp.arange(self.count, dtype=jnp.int32)
        values = jax.vmap(lambda i: self.component(i, z))(everyone)
        return jtu.tree_map(lambda v: jnp.mean(v, axis=0), values)

    def component(self, index: Int[Array, ""], z: PyTree[Array]) -> PyTree[Array]:
        """`F_i(z)`."""
        if self.parts is None:
            raise TypeError(
                "Game: this needs a finite sum. Pass `components` and `count`."
            )
        return _like("components", self.parts(index, z, *self.params), z)

    def sample(self, key: PRNGKeyArray, z: PyTree[Array]) -> PyTree[Array]:
        """A noisy value of `F(z)`: of `sample`, or one component."""
        if self.noisy is not None:
            return _like("sample", self.noisy(key, z, *self.params), z)
        if self.parts is None or self.count is None:
            raise TypeError(
                "Game: a key was given, but the game has no noisy oracle. Pass "
                "`sample` or `components`, or use `with_noise`."
            )
        index = jax.random.randint(key, (), 0, self.count, jnp.int32)
        return self.component(index, z)

    def backward(
        self, z: PyTree[Array], stepsize: Float[Array, ""] | float = 1.0
    ) -> PyTree[Array]:
        """The resolvent of `stepsize G` at `z`: the projection where `G` is a set."""
        if self.resolving is not None:
            return _like("resolvent", self.resolving(z, stepsize, *self.params), z)
        if self.projection is None:
            return z
        if isinstance(self.projection, Geometry):
            return self.projection.project(z)  # type: ignore[attr-defined]
        return _like("project", self.projection(z, *self.params), z)

    @property
    def cost(self) -> int:
        """What an exact call counts: of a finite sum, all its components."""
        return self.count or 1

    @property
    def constrained(self) -> bool:
        """Whether there is a `G`."""
        return self.projection is not None or self.resolving is not None

    def condition(self, x):
        return self.condition_with(x, self.apply(x))

    def condition_with(self, z: PyTree[Array], force: PyTree[Array]) -> PyTree[Array]:
        """The condition's value at `z`, given `F(z)`."""
        if not self.constrained:
            return force
        moved = self.backward(jtu.tree_map(jnp.subtract, z, force))
        return jtu.tree_map(jnp.subtract, z, moved)

    def certify(self, x, condition, tol):
        if not self.monotone or self.support is None:
            return super().certify(x, condition, tol)
        # The natural map measures how far a point outside of the set is from it; the
        # bound holds for points of the set.
        point = self.backward(x)
        force = self.apply(point)
        inner = sum(jtu.tree_leaves(jtu.tree_map(jnp.vdot, force, point)))
        gap = inner + self.support(jtu.tree_map(jnp.negative, force))
        return Certificate(
            "gap",
            gap,
            proof=True,
            statement="max over u in the set of <F(u), x - u> is at most value, at x "
            "projected on the set (for a saddle function, the duality gap too)",
            details={"residual": self.residual(condition)},
        )

    @property
    def unique(self):
        return self._unique


class AsGame(eqx.Module):
    """Any other problem, seen as a game without `G`: the condition is the operator."""

    problem: Problem
    lipschitz: None = None
    constrained: bool = eqx.field(static=True, default=False)
    cost: int = eqx.field(static=True, default=1)

    def apply(self, z):
        return self._turned(self.problem.condition(z))

    def sample(self, key, z):
        del key, z
        raise TypeError(
            f"varan.games: `problem` must be a Game with a noisy oracle (got "
            f"{type(self.problem).__name__}). Leave `key` out."
        )

    def backward(self, z, stepsize: Any = 1.0):
        del stepsize
        return z

    def condition_with(self, z, force):
        del z
        return self._turned(force)

    def _turned(self, value):
        # The displacement T(z) - z of a nonexpansive map is minus a monotone operator.
        if isinstance(self.problem, FixedPoint):
            return jtu.tree_map(jnp.negative, value)
        return value


def as_game(problem: Problem) -> Game | AsGame:
    """The problem itself where it is a game, else its condition as an operator."""
    return problem if isinstance(problem, Game) else AsGame(problem)


class _SaddleOperator(eqx.Module):
    function: Callable

    def __call__(self, z, *params):
        if not isinstance(z, (tuple, list)) or len(z) != 2:
            raise ValueError(
                "Game.from_saddle: `z` must be a pair (x, y) (got "
                f"{jtu.tree_structure(z)})."
            )
        x, y = z
        d_x, d_y = jax.grad(self.function, argnums=(0, 1))(x, y, *params)
        return type(z)((d_x, jtu.tree_map(jnp.negative, d_y)))


class _PlayersOperator(eqx.Module):
    losses: tuple

    def __call__(self, z, *params):
        if not isinstance(z, (tuple, list)) or len(z) != len(self.losses):
            raise ValueError(
                "Game.from_players: `z` must be a tuple with one block a player (got "
                f"{jtu.tree_structure(z)} for {len(self.losses)} losses)."
            )

        def own(player, loss):
            def of_block(block):
                return loss((*z[:player], block, *z[player + 1 :]), *params)

            return jax.grad(of_block)(z[player])

        return type(z)(own(i, loss) for i, loss in enumerate(self.losses))


class _SupportOf(eqx.Module):
    geometry: Geometry

    def __call__(self, direction):
        return self.geometry.support(direction)


class _Noisy(eqx.Module):
    game: Game
    deviation: Float[Array, ""]

    def __call__(self, key, z, *params):
        del params  # those of the game, which this holds
        force = self.game.apply(z)
        leaves, structure = jtu.tree_flatten(force)
        keys = jax.random.split(key, len(leaves))
        noise = [
            jax.random.normal(k, leaf.shape, leaf.dtype)
            for k, leaf in zip(keys, leaves, strict=True)
        ]
        return jtu.tree_map(
            lambda f, e: f + self.deviation.astype(f.dtype) * e,
            force,
            jtu.tree_unflatten(structure, noise),
        )


def _like(argument, value, z):
    """The value, which must have the iterate's structure and shapes."""
    one, other = jtu.tree_structure(value), jtu.tree_structure(z)
    shapes = [[jnp.shape(leaf) for leaf in jtu.tree_leaves(t)] for t in (value, z)]
    if one != other or shapes[0] != shapes[1]:
        raise ValueError(
            f"Game: `{argument}` must return the structure and shapes of `z` (got "
            f"{one} of {shapes[0]} for {other} of {shapes[1]})."
        )
    return value


def _optional(argument, function):
    return None if function is None else as_function("Game", argument, function)


def _check(operator, project, resolvent, components, count):
    if operator is None and components is None:
        raise TypeError("Game: `operator` must be callable (got None).")
    if project is not None and resolvent is not None:
        raise ValueError(
            "Game: `project` and `resolvent` must not both be given (got both). Pass "
            "the resolvent of their sum."
        )
    if isinstance(project, Geometry) and not hasattr(project, "project"):
        raise TypeError(
            "Game: `project` must be a Euclidean geometry or a function (got "
            f"{type(project).__name__}). Pass a projection, for instance "
            "varan.operators.project_simplex."
        )
    if (components is None) != (count is None):
        raise ValueError("Game: `components` and `count` must be given together.")
    if count is not None and (not isinstance(count, int) or count < 1):
        raise ValueError(f"Game: `count` must be a positive integer (got {count!r}).")
