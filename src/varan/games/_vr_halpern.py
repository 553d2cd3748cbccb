"""Variance-reduced Halpern iteration for finite sums.

`0 in F(u) + G(u)` with `F = mean_i F_i`. Halpern's anchor makes the residual at the
last iterate fall like `1 / k`; variance reduction pays for a step with about `sqrt(n)`
components instead of all `n`. Two versions:

cocoercive    u <- lam_k u_0 + (1 - lam_k) J(u - a V), lam_k = 2 / (k + 4), where `V` is
              the full `F(u)` with probability `p_k`, else `V` plus the mean of
              `F_i(u) - F_i(u_before)` over `ceil(sqrt n)` components (the same at both
              points).
Lipschitz     u <- lam_k u_0 + (1 - lam_k) R(u), lam_k = 1 / (k + 2), `R` an approximate
              resolvent of `eta (F + G)`, `eta = sqrt(n) / L`, by forward-reflected-
              backward steps with a snapshot:
              z <- J(zb - t [F(w) + F_i(z) - F_i(w_before)]), zb = (1 - p) z + p w.

The first reports only points with a full pass, the second only snapshots: residuals are
exact, and `solve` never stops on an estimate. Evaluations count components.

Source: X. Cai, A. Alacaoglu and J. Diakonikolas (2024), Variance Reduced Halpern
Iteration for Finite-Sum Monotone Inclusions, ICLR 2024, arXiv 2310.02987.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ..core._checks import check_choice, check_positive
from ..core._solution import Solution
from ..core._solve import solve
from ..core._solver import Solver, State
from ..core._status import Status
from ..core._trees import tree_norm, tree_square
from ._game import Game
from ._halpern import anchored
from ._moves import forward

# Inner iterations contract by about 1 - 1 / (2 n) each, for three calls: ten times what
# double precision could ask for.
_MOST_CALLS = 2000


class _Memory(eqx.Module):
    anchor: PyTree[Array]
    point: PyTree[Array]
    force: PyTree[Array]  # F at the reported point
    scale: Float[Array, ""]  # of the inner errors, for the Lipschitz version
    count: Int[Array, ""]
    key: PRNGKeyArray


class VarianceReducedHalpern(Solver):
    """Halpern with a recursive estimator, for cocoercive finite sums.

    Needs `E ||F_i(u) - F_i(v)||^2 <= L <F(u) - F(v), u - v>`. The residual falls below
    `eps` after about `n + sqrt(n) L / eps` component calls, against `n L / eps` of
    `Halpern`. A step of `solve` goes from one full pass to the next.

    Args:
        lipschitz: The average `L` above (not that of `F`, which may be smaller),
            positive.
        key: Draws the components and the full passes.
        batch: Components of one estimate; `ceil(sqrt(n))` by default.

    Raises:
        TypeError: If the problem is not a game with components.
        ValueError: If a setting is not positive, or there is one component only.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.games import Game, VarianceReducedHalpern
        >>> shifts = jnp.linspace(-1.0, 3.0, 100)
        >>> game = Game(None, shifts, components=lambda i, u, b: u - b[i], count=100)
        >>> method = VarianceReducedHalpern(1.0, jax.random.key(0))
        >>> end = solve(game, method, jnp.zeros(2), tol=0.05)
        >>> bool(end.converged), bool(jnp.all(jnp.abs(end.x - 1.0) < 0.05))
        (True, True)

    Source:
        Cai, Alacaoglu and Diakonikolas, 2024 (arXiv 2310.02987), algorithm 1.

    Differences:
        `p_k = 4 / (min(k, sqrt n) + 4)`, of the order that the variance recursion
        needs.
    """

    lipschitz: float | Float[Array, ""]
    key: PRNGKeyArray
    batch: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_positive("VarianceReducedHalpern", "lipschitz", self.lipschitz)
        if self.batch is not None:
            check_positive("VarianceReducedHalpern", "batch", self.batch)

    def init(self, problem, start):
        game = _finite_sum("VarianceReducedHalpern", problem)
        return _begin(game, start, self.key)

    def step(self, problem, state):
        game: Any = problem
        memory = state.memory
        n = game.count
        batch = math.ceil(math.sqrt(n)) if self.batch is None else self.batch
        dtype = jnp.result_type(*jtu.tree_leaves(state.x))
        size = 1 / (4 * jnp.asarray(self.lipschitz, dtype))

        def move(u, estimate, count):
            stepped = game.backward(forward(u, size, estimate), size)
            weight = 2 / (count.astype(dtype) + 4)
            return anchored(memory.anchor, stepped, weight), count + 1

        def proceed(carry):
            return ~carry[-1]

        def advance(carry):
            u, estimate, count, key, calls, _ = carry
            key, draw, coin = jax.random.split(key, 3)
            new, count = move(u, estimate, count)
            due = jnp.minimum(count.astype(dtype), math.sqrt(n)) + 4
            full = jax.random.uniform(coin, (), dtype) < 4 / due
            # The difference is wasted once, where a full pass follows.
            change = _mean_change(game, draw, batch, new, u)
            estimate = jtu.tree_map(jnp.add, estimate, change)
            calls = calls + jnp.where(full, 0, 2 * batch).astype(jnp.int32)
            return new, estimate, count, key, calls, full

        zero = jnp.zeros((), jnp.int32)
        carry = (state.x, memory.force, memory.count, memory.key, zero)
        carry = jax.lax.while_loop(proceed, advance, (*carry, jnp.asarray(False)))
        u, _, count, key, calls, _ = carry
        force = game.apply(u)
        memory = _Memory(memory.anchor, u, force, memory.scale, count, key)
        condition = game.condition_with(u, force)
        return State(u, condition, memory, evaluations=calls + n)


class _Inner(eqx.Module):
    z: PyTree[Array]
    w: PyTree[Array]
    w_before: PyTree[Array]
    force: PyTree[Array]  # F(w)
    error: Float[Array, ""]  # a bound of the distance of w to the resolvent
    key: PRNGKeyArray
    calls: Int[Array, ""]


class InexactHalpern(Solver):
    """Halpern on approximate resolvents, for monotone Lipschitz finite sums.

    Needs `E ||F_i(u) - F_i(v)||^2 <= L^2 ||u - v||^2` and a monotone `F`. The residual
    falls below `eps` after about `n + sqrt(n) L / eps` component calls, up to
    logarithms: near-optimal. A step of `solve` is one approximate resolvent.

    Args:
        lipschitz: The average `L` above, positive.
        key: Draws the components and the snapshots.

    Raises:
        TypeError: If the problem is not a game with components.
        ValueError: If `lipschitz` is not positive, or there is one component only.
            Where inner iterations do not contract (`F` is not monotone, or `lipschitz`
            too small) the run ends `STALLED`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.games import Game, InexactHalpern
        >>> turn = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
        >>> game = Game(None, jnp.linspace(0.5, 1.5, 16), count=16,
        ...             components=lambda i, u, s: s[i] * (turn @ u))
        >>> end = solve(game, InexactHalpern(1.1, jax.random.key(0)), jnp.ones(2),
        ...             tol=0.02)
        >>> bool(end.converged)
        True

    Source:
        Cai, Alacaoglu and Diakonikolas, 2024 (arXiv 2310.02987), algorithm 2; the inner
        method: Alacaoglu and Malitsky, 2022 (arXiv 2102.08352).

    Differences:
        The inner step is `sqrt(p (1 - p)) / (2 L')` with `L' = L + 1 / eta` and
        `p = 1 / n`, which the averaged point `zb` permits: cross terms are bounded by
        `p ||z - w||^2 / 4`. Inner iterations end at a snapshot whose distance to the
        resolvent is proved to be at most a quarter of the first move over `(k + 1)^2`,
        which costs the rate a logarithm, instead of after a number fixed beforehand.
    """

    lipschitz: float | Float[Array, ""]
    key: PRNGKeyArray

    def __check_init__(self):
        check_positive("InexactHalpern", "lipschitz", self.lipschitz)

    def init(self, problem, start):
        return _begin(_finite_sum("InexactHalpern", problem), start, self.key)

    def step(self, problem, state):
        game: Any = problem
        memory = state.memory
        dtype = jnp.result_type(*jtu.tree_leaves(state.x))
        L = jnp.asarray(self.lipschitz, dtype)
        eta = math.sqrt(game.count) / L
        count = memory.count.astype(dtype)
        inner, proved = _resolvent(game, memory, state.x, L, eta, 1 / (count + 1) ** 2)
        moved = tree_norm(jtu.tree_map(jnp.subtract, inner.w, memory.point))
        scale = jnp.where(memory.count == 0, moved / 4, memory.scale)
        u = anchored(memory.anchor, inner.w, 1 / (count + 2))
        memory = _Memory(
            memory.anchor, u, inner.force, scale, memory.count + 1, inner.key
        )
        condition = game.condition_with(inner.w, inner.force)
        calls: Any = inner.calls
        status: Any = jnp.where(proved, Status.RUNNING, Status.STALLED)
        return State(inner.w, condition, memory, evaluations=calls, status=status)


def _resolvent(game, memory, known, L, eta, share):
    """Approximates `(I + eta (F + G))^-1` at `memory.point`, from where `F` is known.

    The system `F(y) + (y - u) / eta + G(y)` is strongly monotone: modulus `1 / eta`.
    """
    n, u = game.count, memory.point
    p = 1 / n
    outer = L + 1 / eta
    size = math.sqrt(p * (1 - p)) / (2 * outer)
    first = memory.count == 0

    def error_at(w, force):
        if not game.constrained:  # modulus times the residual
            return tree_norm(jtu.tree_map(lambda a, f, b: a + eta * f - b, w, force, u))
        t = 1 / outer
        total = jtu.tree_map(lambda a, f, b: f + (a - b) / eta, w, force, u)
        moved = game.backward(forward(w, t, total), t)
        return 2 * eta * outer * tree_norm(jtu.tree_map(jnp.subtract, w, moved))

    def excess(inner):
        """How far the proved error is above what this step asks for."""
        moved = tree_norm(jtu.tree_map(jnp.subtract, inner.w, u))
        limit = jnp.where(first, moved / 4, memory.scale * share)
        # Rounding bounds what can be proved.
        eps = float(jnp.finfo(limit.dtype).eps)
        floor = 100 * eps * (1 + tree_norm(inner.w))
        return inner.error - jnp.maximum(limit, floor)

    def proceed(inner):
        return (excess(inner) > 0) & (inner.calls < _MOST_CALLS * n)

    def advance(inner):
        key, draw, coin = jax.random.split(inner.key, 3)
        i = jax.random.randint(draw, (), 0, n, jnp.int32)
        one, two = game.component(i, inner.z), game.component(i, inner.w_before)

        def next_point(z, w, before, force, a, b, center):
            averaged = (1 - p) * z + p * w
            # The part (. - u) / eta of every component is exact.
            shift = (w - center) / eta + (z - before) / eta
            return averaged - size * (force + a - b + shift)

        target = jtu.tree_map(
            next_point, inner.z, inner.w, inner.w_before, inner.force, one, two, u
        )
        z = game.backward(target, size)
        refresh = jax.random.uniform(coin, (), size.dtype) < p
        moved = _Inner(
            z, inner.w, inner.w, inner.force, inner.error, key, inner.calls + 2
        )

        def snapshot(moved):
            force = game.apply(moved.z)
            error = error_at(moved.z, force)
            calls = moved.calls + n
            return _Inner(moved.z, moved.z, inner.w, force, error, key, calls)

        return jax.lax.cond(refresh, snapshot, lambda moved: moved, moved)

    zero = jnp.zeros((), jnp.int32)
    error = error_at(known, memory.force)
    start = _Inner(known, known, known, memory.force, error, memory.key, zero)
    inner = jax.lax.while_loop(proceed, advance, start)
    return inner, excess(inner) <= 0


class VarianceReducedExtragradient(Solver):
    """Extragradient with snapshots (loopless SVRG), for monotone finite sums.

    `half = J(zb - a F(w))`, `z <- J(zb - a [F(w) + F_S(half) - F_S(w)])`,
    `zb = (1 - p) z + p w`, and `w <- z` with probability `p = batch / n`. Guarantees
    the gap of averages after `n + sqrt(n) L / eps` component calls, but no rate for the
    last residual. A step of `solve` goes from one snapshot to the next.

    Args:
        lipschitz: Average `L` with `E ||F_i(u) - F_i(v)||^2 <= L^2 ||u - v||^2`,
            positive.
        key: Draws the components and the snapshots.
        batch: Components of one estimate; `ceil(sqrt(n))` by default.

    Raises:
        TypeError: If the problem is not a game with components.
        ValueError: If a setting is not positive, or there is one component only.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.games import Game, VarianceReducedExtragradient
        >>> turn = jnp.array([[0.2, 1.0], [-1.0, 0.2]])
        >>> game = Game(None, jnp.linspace(0.5, 1.5, 16), count=16,
        ...             components=lambda i, u, s: s[i] * (turn @ u))
        >>> method = VarianceReducedExtragradient(1.2, jax.random.key(0))
        >>> bool(solve(game, method, jnp.ones(2), tol=1e-3).converged)
        True

    Source:
        Alacaoglu and Malitsky, 2022 (arXiv 2102.08352), algorithm 1.
    """

    lipschitz: float | Float[Array, ""]
    key: PRNGKeyArray
    batch: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_positive("VarianceReducedExtragradient", "lipschitz", self.lipschitz)
        if self.batch is not None:
            check_positive("VarianceReducedExtragradient", "batch", self.batch)

    def init(self, problem, start):
        game = _finite_sum("VarianceReducedExtragradient", problem)
        return _begin(game, start, self.key)

    def step(self, problem, state):
        game: Any = problem
        memory, w = state.memory, state.x
        n = game.count
        batch = math.ceil(math.sqrt(n)) if self.batch is None else self.batch
        p = min(batch / n, 0.5)
        dtype = jnp.result_type(*jtu.tree_leaves(w))
        size = 0.99 * math.sqrt(p) / jnp.asarray(self.lipschitz, dtype)

        def advance(carry):
            z, key, calls, _ = carry
            key, draw, coin = jax.random.split(key, 3)
            averaged = anchored(w, z, p)
            half = game.backward(forward(averaged, size, memory.force), size)
            change = _mean_change(game, draw, batch, half, w)
            force = jtu.tree_map(jnp.add, memory.force, change)
            z = game.backward(forward(averaged, size, force), size)
            refresh = jax.random.uniform(coin, (), dtype) < p
            return z, key, calls + 2 * batch, refresh

        zero = jnp.zeros((), jnp.int32)
        carry = (memory.point, memory.key, zero, jnp.asarray(False))
        z, key, calls, _ = jax.lax.while_loop(lambda c: ~c[-1], advance, carry)
        force = game.apply(z)
        memory = _Memory(memory.anchor, z, force, memory.scale, memory.count + 1, key)
        return State(z, game.condition_with(z, force), memory, evaluations=calls + n)


def vr_halpern(
    game: Game,
    start: PyTree[Array],
    key: PRNGKeyArray,
    *,
    lipschitz: float,
    tol: float,
    variant: Literal["cocoercive", "lipschitz"] = "cocoercive",
    max_evaluations: int = 2_000_000_000,
) -> Solution:
    """Solves a finite-sum inclusion by variance-reduced Halpern iteration.

    For `"cocoercive"` the promise is probed at a random pair of points first.

    Args:
        game: With `components` and `count`.
        start: The start, which is also the anchor.
        key: Draws all that is random.
        lipschitz: See `VarianceReducedHalpern` and `InexactHalpern`.
        tol: Of the residual.
        variant: `"cocoercive"` or `"lipschitz"`.
        max_evaluations: Component calls.

    Returns:
        A `Solution` whose residual and certificate are exact.

    Raises:
        TypeError: If the game has no components.
        ValueError: If a setting is out of range, or the probe contradicts the promise;
            the message holds the measured ratio.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.games import Game, vr_halpern
        >>> shifts = jnp.linspace(-1.0, 3.0, 100)
        >>> game = Game(None, shifts, components=lambda i, u, b: u - b[i], count=100)
        >>> end = vr_halpern(game, jnp.zeros(2), jax.random.key(0), lipschitz=1.0,
        ...                  tol=0.05)
        >>> bool(end.converged)
        True

    Source:
        Cai, Alacaoglu and Diakonikolas, 2024 (arXiv 2310.02987).
    """
    check_choice("vr_halpern", "variant", variant, ("cocoercive", "lipschitz"))
    check_positive("vr_halpern", "lipschitz", lipschitz)
    _finite_sum("vr_halpern", game)
    key, probe = jax.random.split(key)
    method: Solver = InexactHalpern(lipschitz, key)
    if variant == "cocoercive":
        _probe(game, start, probe, lipschitz)
        method = VarianceReducedHalpern(lipschitz, key)
    return solve(
        game,
        method,
        start,
        tol=tol,
        max_steps=20_000,
        max_evaluations=max_evaluations,
        differentiate="implicit",
    )


def _probe(game, start, key, lipschitz):
    """Compares both sides of average cocoercivity at a random pair of points."""
    ratio = float(_cocoercivity(game, start, key))
    # Sampled components vary: only a clear contradiction is one.
    if not 0 < ratio <= 1.5 * float(lipschitz):
        raise ValueError(
            "vr_halpern: with variant='cocoercive' the mean of ||F_i(u) - F_i(v)||^2 "
            f"must be at most L <F(u) - F(v), u - v> (got a ratio of {ratio:.3g} for L "
            f"= {float(lipschitz):.3g}). Use variant='lipschitz', or a larger L."
        )


@eqx.filter_jit
def _cocoercivity(game, start, key):
    """The mean square change of the components over the mean's product."""
    far, draw = jax.random.split(key)
    flat, unravel = ravel_pytree(start)
    other = unravel(flat + jax.random.normal(far, flat.shape, flat.dtype))
    number = min(game.count, 1024)
    index = jax.random.choice(draw, game.count, (number,), replace=False)
    squares = jax.vmap(lambda i: tree_square(_change(game, i, other, start)))(
        index.astype(jnp.int32)
    )
    change = jtu.tree_map(jnp.subtract, game.apply(other), game.apply(start))
    gap = jtu.tree_map(jnp.subtract, other, start)
    inner = sum(jtu.tree_leaves(jtu.tree_map(jnp.vdot, change, gap)))
    return jnp.mean(squares) / inner


def _finite_sum(owner, problem) -> Game:
    if not isinstance(problem, Game) or problem.parts is None:
        raise TypeError(
            f"{owner}: the problem must be a Game with `components` (got "
            f"{type(problem).__name__}). Use Halpern or Extragradient."
        )
    if problem.count == 1:
        raise ValueError(
            f"{owner}: `count` must be at least 2 (got 1). Use Halpern, or "
            "Extragradient."
        )
    return problem


def _begin(game, start, key):
    force = game.apply(start)
    zero = jnp.zeros((), jnp.result_type(*jtu.tree_leaves(start)))
    memory = _Memory(start, start, force, zero, jnp.zeros((), jnp.int32), key)
    condition = game.condition_with(start, force)
    return State(start, condition, memory, evaluations=game.count)


def _change(game, index, new, old):
    return jtu.tree_map(
        jnp.subtract, game.component(index, new), game.component(index, old)
    )


def _mean_change(game, key, batch, new, old):
    """The mean change of a batch, drawn with replacement: the same at both points."""
    index = jax.random.randint(key, (batch,), 0, game.count, jnp.int32)
    changes = jax.vmap(lambda i: _change(game, i, new, old))(index)
    return jtu.tree_map(lambda v: jnp.mean(v, axis=0), changes)
