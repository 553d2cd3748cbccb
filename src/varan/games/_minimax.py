"""Which stationary points of a saddle function are local minimax points.

At a stationary point of `f(x, y)`, with `A = f_xx`, `B = f_yy`, `C = f_xy`, the refined
second-order necessary condition of a local minimax point is

    B <= 0   and   U'(A - C B^+ C') U >= 0,

`U` spanning the `v` with `C'v` in the range of `B`. It allows a singular `B`. With the
first player slowed down by `tau`, the operator's eigenvalues there are those of `-B`,
those of the restricted Schur complement over `tau`, and, for each singular value
`s > 0` of the coupling into the null space of `B`, a pair
`iota / tau +- i s / sqrt(tau)`. The hemicurvature `iota` decides: extragradient is
stable where `2 iota + eta s^2 > 0`, descent-ascent only where `2 iota - eta s^2 > 0`.

Source: J. Chae, K. Kim and D. Kim (2024), Two-timescale Extragradient for Finding Local
Minimax Points, ICLR 2024, arXiv 2305.16242.
"""

from __future__ import annotations

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ..core._certificate import Certificate
from ..core._checks import check_choice, check_finite, check_positive
from ._game import Game
from ._moves import check_timescale

Kind = Literal["strict local minimax", "necessary condition holds", "not minimax"]
Method = Literal["extragradient", "descent_ascent"]


class MinimaxPoint(eqx.Module):
    """What the second derivatives say about a stationary point.

    Args:
        kind: `"strict local minimax"` (`B < 0` and positive Schur complement: proved up
            to the cut-off), `"necessary condition holds"`, or `"not minimax"` (the
            condition is violated strictly).
        response: Eigenvalues of `B`, increasing.
        schur: Eigenvalues of the restricted Schur complement, increasing; empty where
            `U` is.
        coupling: The singular values `s > 0` into the null space of `B`.
        hemicurvature: `iota` of each of them.
        cutoff: What counted as zero; it decides the rank of `B`, and so `U`.
        certificate: The violation of the condition, and the residual.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import Game, classify_minimax
        >>> game = Game.from_saddle(lambda x, y: x * x + x * y - y * y)
        >>> classify_minimax(game, (jnp.zeros(()),) * 2).kind
        'strict local minimax'
    """

    kind: Kind = eqx.field(static=True)
    response: Float[Array, " m"]
    schur: Float[Array, " k"]
    coupling: Float[Array, " j"]
    hemicurvature: Float[Array, " j"]
    cutoff: Float[Array, ""]
    certificate: Certificate

    def stable(
        self, stepsize: float, method: Method = "extragradient"
    ) -> tuple[bool, float]:
        """Whether a method stays at the point for every timescale that is large enough.

        Args:
            stepsize: `eta`, below the reciprocal of the operator's Lipschitz constant.
            method: `"extragradient"` or `"descent_ascent"`.

        Returns:
            The prediction, and the margin of the condition that decides it; a margin of
            order `1 / tau` leaves the question open at `tau`.
        """
        check_positive("MinimaxPoint.stable", "stepsize", stepsize)
        check_choice(
            "MinimaxPoint.stable", "method", method, ("extragradient", "descent_ascent")
        )
        sign = 1 if method == "extragradient" else -1
        iota, s = np.asarray(self.hemicurvature), np.asarray(self.coupling)
        response = np.asarray(self.response)
        null = np.abs(response) <= float(self.cutoff)
        # A direction of y that neither curvature nor coupling reaches is open.
        open_ = np.zeros(int(null.sum()) - s.size)
        pairs = 2 * iota + sign * stepsize * s**2
        margins = np.concatenate(
            [-response[~null], np.asarray(self.schur), pairs, open_]
        )
        margin = float(np.min(margins, initial=np.inf))
        return margin > 0, abs(margin)


def classify_minimax(
    game: Game, z: tuple[PyTree[Array], PyTree[Array]], *, cutoff: float | None = None
) -> MinimaxPoint:
    """Decides the refined second-order condition at a stationary point.

    One dense Jacobian, and decompositions of its blocks in NumPy; not under jit, since
    the ranks decide shapes.

    Args:
        game: Of `Game.from_saddle`: its operator is `(grad_x f, -grad_y f)`.
        z: The pair `(x, y)`.
        cutoff: Eigenvalues and singular values up to this count as zero, positive. By
            default `1e-6` in float64 (`1e-3` in float32) times the Jacobian's norm:
            the limit of an iteration is never exact.

    Returns:
        A `MinimaxPoint`.

    Raises:
        ValueError: If `z` is not a pair, `f` is not twice differentiable there, or the
            operator is not that of a saddle function.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import classify_minimax, degenerate_minimax
        >>> point = classify_minimax(degenerate_minimax(), (jnp.zeros(()),) * 2)
        >>> point.kind, round(float(point.hemicurvature[0]), 3)
        ('necessary condition holds', -0.05)
        >>> [point.stable(eta)[0] for eta in (0.05, 0.3)]
        [False, True]

    Source:
        Chae, Kim and Kim, 2024 (arXiv 2305.16242), the refined second-order condition
        and the stability of extragradient at its points.

    Differences:
        Hemicurvatures are taken for simple singular values; equal ones are split along
        the eigenvectors of the Schur complement, which is exact too.
    """
    A, B, C = _blocks("classify_minimax", game, z)
    size = np.linalg.norm(np.block([[A, C], [C.T, B]]), 2)
    if cutoff is None:
        cutoff = (1e-6 if A.dtype == np.float64 else 1e-3) * float(size)
    else:
        check_positive("classify_minimax", "cutoff", cutoff)
    response, V = np.linalg.eigh(B)
    null = np.abs(response) <= cutoff
    inverse = np.where(null, 0, 1 / np.where(null, 1, response))
    S = A - C @ (V * inverse[None, :]) @ V.T @ C.T
    left, s, _ = np.linalg.svd(C @ V[:, null])
    rank = int(np.sum(s > cutoff))
    U, coupled, s = left[:, rank:], left[:, :rank], s[:rank]
    schur = np.linalg.eigvalsh(U.T @ S @ U)
    iota = _hemicurvatures(coupled.T @ S @ coupled / 2, s, cutoff)
    violation = max(
        float(np.max(response, initial=-np.inf)), -float(np.min(schur, initial=np.inf))
    )
    if violation > cutoff:
        kind = "not minimax"
    elif not null.any() and np.min(schur, initial=np.inf) > cutoff:
        kind = "strict local minimax"
    else:
        kind = "necessary condition holds"
    certificate = Certificate(
        "refined second-order condition",
        jnp.asarray(violation, A.dtype),
        tol=cutoff,
        proof=False,
        statement="the largest eigenvalue of B and of minus the restricted Schur "
        "complement is value, with what is below tol taken as zero",
        details={"residual": game.residual(game.condition(z))},
    )
    return MinimaxPoint(
        kind,
        jnp.asarray(response),
        jnp.asarray(schur),
        jnp.asarray(s),
        jnp.asarray(iota),
        jnp.asarray(cutoff, A.dtype),
        certificate,
    )


def stability_radius(
    game: Game,
    z: tuple[PyTree[Array], PyTree[Array]],
    stepsize: float,
    timescale: float = 1.0,
    method: Method = "extragradient",
) -> float:
    """Spectral radius of one step of a method at a stationary point.

    Below one the point attracts its neighbourhood, above one almost every start avoids
    it.

    Args:
        game: A game on pairs.
        z: The stationary point `(x, y)`.
        stepsize: `eta`, positive.
        timescale: `tau >= 1`, of the first player.
        method: `"extragradient"` or `"descent_ascent"`.

    Returns:
        The radius.

    Raises:
        ValueError: If a setting is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import degenerate_minimax, stability_radius
        >>> game, zero = degenerate_minimax(), (jnp.zeros(()),) * 2
        >>> [stability_radius(game, zero, 0.3, 10.0, m) < 1
        ...  for m in ("extragradient", "descent_ascent")]
        [True, False]

    Source:
        Chae, Kim and Kim, 2024 (arXiv 2305.16242).
    """
    check_positive("stability_radius", "stepsize", stepsize)
    check_timescale("stability_radius", timescale)
    check_choice(
        "stability_radius", "method", method, ("extragradient", "descent_ascent")
    )
    J, first = _jacobian("stability_radius", game, z)
    scaled = np.where((np.arange(len(J)) < first)[:, None], J / timescale, J)
    values = stepsize * np.linalg.eigvals(scaled.astype(np.float64))
    ahead = values**2 if method == "extragradient" else 0
    return float(np.max(np.abs(1 - values + ahead)))


def _hemicurvatures(compressed, s, cutoff):
    """The diagonal; within equal singular values the eigenvalues of the block."""
    iota, begin = np.diag(compressed).copy(), 0
    for end in range(1, len(s) + 1):
        if end == len(s) or s[begin] - s[end] > cutoff:
            block = slice(begin, end)
            iota[block] = np.linalg.eigvalsh(compressed[block, block])
            begin = end
    return iota


def _blocks(owner, game, z):
    J, first = _jacobian(owner, game, z)
    A, C, D, B = (
        J[:first, :first],
        J[:first, first:],
        J[first:, :first],
        -J[first:, first:],
    )
    gap = max(np.abs(C + D.T).max(), np.abs(A - A.T).max(), np.abs(B - B.T).max())
    if gap > 1e3 * np.finfo(J.dtype).eps * (1 + np.abs(J).max()):
        raise ValueError(
            f"{owner}: `game` must be a saddle problem, with a Jacobian that is "
            f"symmetric up to the second player's sign (got a gap of {gap:.2g}). Use "
            "Game.from_saddle."
        )
    return A, B, C


def _jacobian(owner, game: Any, z):
    if not isinstance(z, tuple) or len(z) != 2:
        raise ValueError(
            f"{owner}: `z` must be a pair (x, y) (got {type(z).__name__})."
        )
    J = np.asarray(_dense(game, z))
    check_finite(owner, "the second derivatives at z", J)
    return J, sum(np.size(leaf) for leaf in jax.tree.leaves(z[0]))


@eqx.filter_jit
def _dense(game, z):
    flat, unravel = ravel_pytree(z)
    return jax.jacfwd(lambda v: ravel_pytree(game.apply(unravel(v)))[0])(flat)
