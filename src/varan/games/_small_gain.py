"""Small-gain certificates: steps that contract games which are not monotone.

A game whose players couple unevenly is often not monotone in Euclid's norm and still
converges. Weighing player i's block with `w_i` can restore monotonicity: from bounds of
each player's own curvature and of the couplings on a region follow the best weights,
the modulus `alpha` and Lipschitz constant `beta` in the weighted norm, and with them

    flow    z' = -v(z)          distances shrink like exp(-alpha t)
    Euler   h < 2 alpha/beta^2  by sqrt(1 - 2 alpha h + beta^2 h^2) a step
    RK4     by the norm of its polynomial in h J where J is constant, else by the
            Euler factor plus (h beta)^2 / 2 + (h beta)^3 / 4 + (h beta)^4 / 24

for every two points whose path stays in the region. Norms of couplings do not see that
skew couplings cancel (a zero-sum game): the margin with equal weights, taken of the
whole Jacobian, is compared, and the better one reported.

Source: V. Sharma (2025), Small-Gain Nash: Certified Contraction to Nash Equilibria in
Differentiable Games, arXiv 2512.06791. RK4's factors are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..core._certificate import Certificate, format_number
from ..core._checks import check_choice, check_positive, is_traced
from ._game import Game
from ._small_gain_bounds import Bounds, box_of, given_bounds, jacobian_bounds
from ._small_gain_weights import (
    Matrix,
    Objective,
    Vector,
    small_gain_band,
    small_gain_margin,
    small_gain_weights,
)

Method = Literal["euler", "rk4"]
_METHODS = ("euler", "rk4")


class SmallGainCertificate(eqx.Module):
    """In which norm, how fast and for which steps a game contracts on a box.

    Args:
        weights: `w_i` of the players' blocks.
        margin: `alpha`: the operator is strongly monotone with it in the weighted norm;
            nothing is certified unless it is positive.
        lipschitz: `beta`, the Lipschitz constant in the same norm.
        euler_stepsize: Projected Euler steps below this contract; zero where none.
        rk4_stepsize: Runge-Kutta steps below this contract, without projection.
        geometry: `"small gain"`, or `"unweighted"` where equal weights and the whole
            Jacobian certify more (without metrics: Euclid's norm).
        curvature: The bounds `mu_i` that were used.
        coupling: The bounds `L_ij` that were used.
        band: For two players the ratios `w_1 / w_2` that certify; `None` where there
            are none, or more players.
        unweighted_margin: `alpha` with equal weights.
        certificate: The factor of the best Euler step, infinite where nothing is
            certified, and whether that is a proof or an estimate.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import quadratic_game, small_gain_certificate
        >>> one, zero = jnp.ones((1, 1)), jnp.zeros(1)
        >>> game = quadratic_game([[one, 2 * one], [-one / 8, one]], [zero, zero])
        >>> found = small_gain_certificate(game, ((-one[0],) * 2, (one[0],) * 2))
        >>> point = (jnp.full(1, 0.1), jnp.zeros(1))
        >>> true, bound = found.norm(point), found.distance(point)
        >>> bool(bound.met), bool(true <= bound.value)
        (True, True)
        >>> round(found.factor(0.2), 3)
        0.943
    """

    weights: Float[Array, " n"]
    margin: Float[Array, ""]
    lipschitz: Float[Array, ""]
    euler_stepsize: Float[Array, ""]
    rk4_stepsize: Float[Array, ""]
    geometry: Literal["small gain", "unweighted"] = eqx.field(static=True)
    curvature: Float[Array, " n"]
    coupling: Float[Array, "n n"]
    band: tuple[float, float] | None = eqx.field(static=True)
    unweighted_margin: Float[Array, ""]
    certificate: Certificate
    _game: Game
    _roots: tuple
    _lower: Array
    _upper: Array
    _jacobian: Array | None  # in the weighted norm, where it is constant

    def __str__(self) -> str:
        if is_traced(self.margin):
            return "SmallGainCertificate(traced)"
        numbers = (
            ("margin", self.margin),
            ("unweighted margin", self.unweighted_margin),
            ("Euler stepsize", self.euler_stepsize),
            ("RK4 stepsize", self.rk4_stepsize),
        )
        shown = [f"  {name:<18} {format_number(value)}" for name, value in numbers]
        weights = ", ".join(format_number(weight) for weight in self.weights)
        return "\n".join(
            [
                f"SmallGainCertificate: {self.geometry}",
                *shown,
                f"  {'weights':<18} {weights}",
                f"  {'certificate':<18} {self.certificate}",
            ]
        )

    __repr__ = __str__

    def norm(self, difference: PyTree[Array]) -> Float[Array, ""]:
        """The weighted norm in which steps contract, of a pytree like an iterate."""
        blocks = [ravel_pytree(block)[0] for block in difference]
        parts = [
            w * jnp.sum((R @ b) ** 2)
            for w, R, b in zip(self.weights, self._roots, blocks, strict=True)
        ]
        return jnp.sqrt(sum(parts[1:], parts[0]))

    def factor(self, stepsize: float, method: Method = "euler") -> float:
        """What a step multiplies distances with, at most.

        Args:
            stepsize: Positive.
            method: `"euler"` or `"rk4"`.

        Returns:
            The factor; one or more says nothing.
        """
        check_positive("SmallGainCertificate.factor", "stepsize", stepsize)
        check_choice("SmallGainCertificate.factor", "method", method, _METHODS)
        alpha, beta = float(self.margin), float(self.lipschitz)
        if method == "euler":
            return _euler_factor(alpha, beta, stepsize)
        return _rk4_factor(alpha, beta, self._jacobian, stepsize)

    def verify(
        self, trajectory: PyTree[Array], stepsize: float, method: Method = "euler"
    ) -> Certificate:
        """Whether a run of constant steps contracts as certified, inside the box.

        Needs no equilibrium: a contraction also shrinks the distance from each iterate
        to the next.

        Args:
            trajectory: Successive iterates: a pytree like an iterate with a leading
                axis, three of them at least.
            stepsize: The step that was taken.
            method: `"euler"` or `"rk4"`.

        Returns:
            An observation, met where every ratio of successive displacements is at most
            the factor, up to rounding, and every point lies in the region. The value is
            infinite or NaN for a run that left the region or blew up. `details` hold
            the factor and the part of the points outside.

        Raises:
            ValueError: If the trajectory is too short or the step not positive.
        """
        factor = self.factor(stepsize, method)
        points = jax.vmap(lambda z: ravel_pytree(z)[0])(trajectory)
        if len(points) < 3:
            raise ValueError(
                "SmallGainCertificate.verify: `trajectory` must have three points or "
                f"more (got {len(points)})."
            )
        moved = jax.tree_util.tree_map(lambda v: jnp.diff(v, axis=0), trajectory)
        lengths = jax.vmap(self.norm)(moved)
        eps = float(np.finfo(points.dtype).eps)
        # A displacement is known up to the rounding of the points that it separates.
        blur = 100 * eps * jnp.max(jax.vmap(self.norm)(trajectory))
        ratio = jnp.max(
            (lengths[1:] - blur) / lengths[:-1],
            initial=0.0,
            where=(~(lengths[:-1] <= blur)),
        )
        inside = (points >= self._lower[None, :]) & (points <= self._upper[None, :])
        outside = jnp.mean(~jnp.all(inside, axis=1), dtype=points.dtype)
        return Certificate(
            "contraction of a run",
            jnp.where(outside > 0, jnp.inf, ratio),
            tol=jnp.asarray(factor * (1 + 100 * eps), points.dtype),
            proof=False,
            statement="no displacement of the run was longer than value times the one "
            "before, and no point outside of the region",
            details={"factor": jnp.asarray(factor), "outside": outside},
        )

    def distance(self, z: PyTree[Array]) -> Certificate:
        """How far the equilibrium is from a point, in the weighted norm.

        Euler with `margin / lipschitz^2` maps the ball of this radius about `z` into
        itself as long as the ball lies in the region: an equilibrium exists there, only
        one, and steps from `z` never leave the ball.

        Args:
            z: A point of the region.

        Returns:
            A certificate, met where the ball lies in the region; infinite where nothing
            is certified. A proof where the constants are.
        """
        alpha, beta = float(self.margin), float(self.lipschitz)
        value = jnp.full_like(self.margin, jnp.inf)
        if alpha > 0:
            h = alpha / beta**2
            force = self._game.apply(z)
            shifted = jax.tree_util.tree_map(lambda p, f: p - h * f, z, force)
            step = jax.tree_util.tree_map(
                jnp.subtract, z, self._game.backward(shifted, h)
            )
            value = self.norm(step) / (1 - _euler_factor(alpha, beta, h))
        return Certificate(
            "distance to the equilibrium",
            value,
            tol=self.room(z),
            proof=self.certificate.proof,
            statement="the region's only equilibrium is within value of the point, in "
            "the weighted norm, as long as that is at most tol",
        )

    def room(self, z: PyTree[Array]) -> Float[Array, ""]:
        """The radius, in the weighted norm, of the largest ball about `z` in the box.

        About the equilibrium: certified runs from within never leave it.
        """
        point = ravel_pytree(z)[0]
        spread = [
            jnp.sqrt(jnp.sum(jnp.linalg.inv(R) ** 2, axis=1) / w)
            for w, R in zip(self.weights, self._roots, strict=True)
        ]
        gap = jnp.minimum(point - self._lower, self._upper - point)
        return jnp.maximum(jnp.min(gap / jnp.concatenate(spread)), 0)


def small_gain_certificate(
    game: Game,
    region: tuple[PyTree[Array], PyTree[Array]],
    *,
    bounds: Literal["interval", "sampled"] | tuple[Vector, Matrix] = "interval",
    variation: Matrix | None = None,
    metrics: Sequence[Float[Array, "d d"]] | None = None,
    objective: Objective = "margin",
    samples: int = 256,
    key: PRNGKeyArray | None = None,
) -> SmallGainCertificate:
    """Certifies that steps on a game contract on a box, and in which norm.

    Dense Jacobians (one, or one a sample), then eigenvalues of matrices with a row a
    player. Done once, in NumPy and double precision, not under jit.

    Args:
        game: Its iterates are tuples with one block a player.
        region: The box's lower and upper corner, each like an iterate. Infinite ends
            are allowed where the Jacobian is constant or `bounds` are arrays.
        bounds: `"interval"`: proved, from a constant Jacobian (which the operator's
            structure must show) or by the mean-value form with `variation`.
            `"sampled"`: an estimate from the Jacobian at the centre and `samples`
            uniform points. Or a pair `(curvature, coupling)`, promised by the user, of
            shapes (n,) and (n, n): `mu_i` at most the least eigenvalue of block i's
            symmetric part, `L_ij` at least the norm of `d v_i / d z_j`, own blocks too.
        variation: Lipschitz constants on the region, in Euclid's norm, of the
            Jacobian's blocks, shape (n, n).
        metrics: A symmetric positive definite matrix for each player's raveled block,
            such as a Fisher information: norms and curvature of the block are taken in
            it (given bounds already are). A projection must then be the one in this
            metric. By default the identity.
        objective: What the weights maximise: the `"margin"`, or the longest Euler
            `"stepsize"`.
        samples: How many points, positive.
        key: Draws them.

    Returns:
        A `SmallGainCertificate`; where no weights certify, its certificate is not met
        and the steps are zero.

    Raises:
        TypeError: If `game` is not a `Game`.
        ValueError: If the region, bounds or metrics do not fit, or the Jacobian is not
            constant and nothing bounds its variation.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import quadratic_game, small_gain_certificate
        >>> one = jnp.ones((1, 1))
        >>> blocks = [[one, 10 * one], [0.05 * one, one]]
        >>> game = quadratic_game(blocks, [jnp.ones(1)] * 2)
        >>> everywhere = ((jnp.full(1, -jnp.inf),) * 2, (jnp.full(1, jnp.inf),) * 2)
        >>> found = small_gain_certificate(game, everywhere)
        >>> round(float(found.margin), 4), round(float(found.unweighted_margin), 3)
        (0.2929, -4.025)
        >>> found.certificate.proof, round(float(found.euler_stepsize), 3)
        (True, 0.201)

    Source:
        Sharma, 2025 (arXiv 2512.06791).

    Differences:
        The weights come in closed form; equal weights are compared; RK4's step is exact
        for a constant Jacobian and follows from our own bound else.
    """
    owner = "small_gain_certificate"
    if not isinstance(game, Game):
        raise TypeError(f"{owner}: `game` must be a Game (got {type(game).__name__}).")
    check_choice(owner, "objective", objective, ("margin", "stepsize"))
    check_positive(owner, "samples", samples)
    box = box_of(owner, region)
    roots = _roots(owner, metrics, box.slices)
    if isinstance(bounds, str):
        check_choice(owner, "bounds", bounds, ("interval", "sampled"))
        known = jacobian_bounds(
            owner,
            game,
            box,
            bounds,
            roots,
            variation=variation,
            samples=samples,
            key=key,
        )
    else:
        known = given_bounds(owner, box, bounds)
    w, alpha, beta, geometry, equal = _best(known, objective)
    J = known.jacobian
    if J is not None:
        scale = np.concatenate(
            [
                np.full(s.stop - s.start, np.sqrt(v))
                for s, v in zip(box.slices, w, strict=True)
            ]
        )
        J = scale[:, None] * J / scale[None, :]
    band = small_gain_band(known.curvature, known.coupling) if len(w) == 2 else None
    dtype = jnp.result_type(*jax.tree_util.tree_leaves(region[0]))
    array = lambda v: jnp.asarray(v, dtype)  # noqa: E731
    return SmallGainCertificate(
        weights=array(w),
        margin=array(alpha),
        lipschitz=array(beta),
        euler_stepsize=array(2 * alpha / beta**2 if alpha > 0 else 0.0),
        rk4_stepsize=array(_rk4_stepsize(alpha, beta, J)),
        geometry=geometry,
        curvature=array(known.curvature),
        coupling=array(known.coupling),
        band=band,
        unweighted_margin=array(equal),
        certificate=_summary(alpha, beta, known.proof, dtype),
        _game=game,
        _roots=tuple(array(R) for R in roots),
        _lower=array(box.lower),
        _upper=array(box.upper),
        _jacobian=None if J is None else array(J),
    )


def _best(known: Bounds, objective):
    """The weighted geometry or the unweighted one, whichever certifies more."""
    mu, L = known.curvature, known.coupling
    w = small_gain_weights(mu, L, objective)
    weighted = small_gain_margin(mu, L, w)
    ones = np.ones(len(mu))
    equal = small_gain_margin(mu, L, ones) if known.whole is None else known.whole

    def merit(constants):
        alpha, beta = constants
        return alpha if objective == "margin" or alpha <= 0 else alpha / beta**2

    if merit(equal) > merit(weighted):
        return ones, *equal, "unweighted", equal[0]
    return w, *weighted, "small gain", equal[0]


def _summary(alpha, beta, proof, dtype):
    value = _euler_factor(alpha, beta, alpha / beta**2) if alpha > 0 else math.inf
    return Certificate(
        "contraction factor",
        jnp.asarray(value, dtype),
        proof=proof,
        statement="Euler steps of margin / lipschitz^2 multiply the distance of two "
        "points in the weighted norm by at most value while they stay in the region",
        details={
            "margin": jnp.asarray(alpha, dtype),
            "lipschitz": jnp.asarray(beta, dtype),
        },
    )


def _roots(owner, metrics, slices):
    """Upper triangular `R_i` with `P_i = R_i' R_i`."""
    sizes = [s.stop - s.start for s in slices]
    if metrics is None:
        return [np.eye(n) for n in sizes]
    metrics = [np.asarray(P, np.float64) for P in metrics]
    if [P.shape for P in metrics] != [(n, n) for n in sizes]:
        raise ValueError(
            f"{owner}: `metrics` must have one matrix a player, of shapes "
            f"{[(n, n) for n in sizes]} (got {[P.shape for P in metrics]})."
        )
    for P in metrics:
        symmetric = np.allclose(P, P.T, rtol=1e-5, atol=0)
        if not symmetric or not np.linalg.eigvalsh((P + P.T) / 2)[0] > 0:
            raise ValueError(
                f"{owner}: `metrics` must be symmetric positive definite (got least "
                f"eigenvalue {np.linalg.eigvalsh((P + P.T) / 2)[0]:.3g})."
            )
    return [np.linalg.cholesky((P + P.T) / 2).T for P in metrics]


def _euler_factor(alpha, beta, h):
    return math.sqrt(max(1 - 2 * alpha * h + (beta * h) ** 2, 0.0))


def _rk4_factor(alpha, beta, J, h):
    if J is None:
        # The stages differ from the first by (h beta)^2 / 2 and higher; with 1/4, not
        # the 1/6 that the sum needs, all of them stay in a ball about the equilibrium.
        b = beta * h
        return _euler_factor(alpha, beta, h) + b**2 / 2 + b**3 / 4 + b**4 / 24
    A = -h * np.asarray(J, np.float64)
    eye = np.eye(len(A))
    R = eye + A @ (eye + A / 2 @ (eye + A / 3 @ (eye + A / 4)))
    return float(np.linalg.norm(R, 2))


def _rk4_stepsize(alpha, beta, J):
    """The first step at which the factor reaches one."""
    if alpha <= 0:
        return 0.0
    # Beyond 4 over the spectral radius the polynomial exceeds one for certain.
    far = 2 * alpha / beta**2
    if J is not None:
        far = 4 / np.max(np.abs(np.linalg.eigvals(J)))
    grid = far * np.arange(1, 401) / 400
    beyond = [h for h in grid if _rk4_factor(alpha, beta, J, h) >= 1]
    high = beyond[0]
    low = high - far / 400
    for _ in range(60):
        middle = (low + high) / 2
        if _rk4_factor(alpha, beta, J, middle) < 1:
            low = middle
        else:
            high = middle
    return low
