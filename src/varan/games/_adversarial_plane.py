"""Adversarial classification in the plane: how optimal decision boundaries move.

Class 1 has density `rho1` and the share `w1 = 1 - w0`, class 0 `rho0` and `w0`. Let `n`
be a boundary's unit normal towards class 1 and `k = div n` its curvature. An adversary
that moves points by up to `eps` pushes class 0 in from the parallel curve `x - eps n`
and class 1 from `x + eps n`, whose lengths are `1 - eps k` and `1 + eps k` times the
boundary's. The first variation of the risk, for a move `v` along `n`, is

    F = w1 rho1(x + eps n) (1 + eps k) - w0 rho0(x - eps n) (1 - eps k).

Boundaries with `F = 0` for every `eps` obey `dF/deps = 0`. As a boundary that moves by
`v` turns by `-v_s` and gains the curvature `-v_ss - k^2 v`, that is for every `eps` an
equation in the arc length `s` for the normal velocity,

    -eps (g v_s)_s + (F_n - eps k^2 g) v = -F_eps,   g = w1 rho1 + w0 rho0,

with `F_n` the change of `F` where boundary, normal and curvature are carried along and
`F_eps` the one where only `eps` grows. The operator is the second variation of the
risk: where it is positive definite the boundary is a local minimiser. At `eps = 0`
nothing is to be solved: `-F_eps / F_n` is a velocity of the mean curvature type.

Source: N. Garcia Trillos and R. Murray (2022), Adversarial Classification: Necessary
conditions and geometric flows, JMLR 23, arXiv 2011.10797.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..core._certificate import Certificate
from ..core._checks import check_finite, check_positive, check_shape
from ._adversarial_densities import check_share, warn_unless_normalised

# Newton's method doubles the digits; far starts need the first few steps.
NEWTON_STEPS = 20

PlaneDensity = Callable[[Float[Array, "2"]], Float[Array, ""]]


class PlaneClassifier(eqx.Module):
    """Labels in the plane that change across each of some closed polygons.

    Args:
        curves: Corners in order, shape (curves, points, 2); polygons do not intersect.
        outside: The label 0 or 1 far away.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import PlaneClassifier
        >>> square = jnp.array([[[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]]])
        >>> classifier = PlaneClassifier(square, outside=1)
        >>> points = jnp.array([[0.0, 0.5], [3.0, 0.0]])
        >>> [int(v) for v in classifier.label(points)]
        [0, 1]
        >>> [float(v) for v in classifier.distances(points, jnp.array([0, 0]))]
        [0.5, 0.0]
    """

    curves: Float[Array, "curves points 2"]
    outside: int = eqx.field(static=True, default=0)

    def label(self, X: Float[Array, "n 2"]) -> Int[Array, " n"]:
        """The label of each point: that of far away after an even number of curves."""
        start, end = self.curves, jnp.roll(self.curves, -1, axis=1)

        def crossings(x):
            above, next_above = start[..., 1] > x[1], end[..., 1] > x[1]
            run, rise = (end - start)[..., 0], (end - start)[..., 1]
            part = (x[1] - start[..., 1]) / jnp.where(rise == 0, 1, rise)
            right = x[0] < start[..., 0] + part * run
            return jnp.sum((above != next_above) & right)

        return (jax.vmap(crossings)(X) + self.outside) % 2

    def distances(
        self, X: Float[Array, "n 2"], y: Int[Array, " n"] | Bool[Array, " n"]
    ) -> Float[Array, " n"]:
        """How far each point must be moved until it is misclassified; zero if it is."""
        start, side = self.curves, jnp.roll(self.curves, -1, axis=1) - self.curves
        length = jnp.sum(side**2, axis=-1)

        def nearest(x):
            away = x[None, None] - start
            part = jnp.sum(away * side, axis=-1) / jnp.where(length == 0, 1, length)
            miss = away - jnp.clip(part, 0, 1)[..., None] * side
            return jnp.sqrt(jnp.min(jnp.sum(miss**2, axis=-1), initial=jnp.inf))

        return jnp.where(self.label(X) == y, jax.vmap(nearest)(X), 0)


class PlaneFlow(eqx.Module):
    """Decision boundaries in the plane over the adversary's strength.

    Args:
        epsilons: Shape (times,), from zero.
        curves: Shape (times, curves, points, 2); NaN from where the flow ends.
        outside: The label far away.
        reached: The last of `epsilons` at which the flow is valid.
        certificate: The largest violation of the first-order conditions, as a part of
            the densities there: necessary for optimality, no proof of it.
    """

    epsilons: Float[Array, " times"]
    curves: Float[Array, "times curves points 2"]
    outside: int = eqx.field(static=True)
    reached: Float[Array, ""]
    certificate: Certificate


def levelset_flow(
    density0: PlaneDensity,
    density1: PlaneDensity,
    share0: float,
    curves: Float[Array, "curves points 2"],
    epsilon_max: float,
    *,
    times: int = 17,
) -> PlaneFlow:
    """Moves the level set `w0 rho0 = w1 rho1` in the plane with the adversary.

    The curves are drawn onto the level set along the gradient, then moved along their
    normals by diffrax's adaptive Tsit5. Derivatives along them are trigonometric, so
    smooth curves need few points; a step factors one matrix of that size a curve. The
    flow ends where a ball of radius `eps` beside a boundary meets another piece of
    boundary (its reach, which holds curvature and collisions), or where the second
    variation is no longer positive definite.

    Args:
        density0: `rho0`, a twice differentiable JAX function of a point of shape (2,),
            positive at the curves.
        density1: `rho1`.
        share0: `w0`, in (0, 1).
        curves: Closed curves near the level set, not crossing each other, shape
            (curves, points, 2), with at least 5 points each in even order around.
        epsilon_max: Where the flow ends at the latest, positive.
        times: How many values of `eps` are returned, evenly from zero.

    Returns:
        A `PlaneFlow`. Its curves are local minimisers of the adversarial risk; that
        they are global is known only from a bound, see `adversarial_duality_gap`.

    Raises:
        ValueError: If a number is out of range or a shape is not as required.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.games import levelset_flow
        >>> def gaussian(sd):
        ...     return lambda x: jnp.exp(-x @ x / (2 * sd**2)) / (2 * jnp.pi * sd**2)
        >>> angle = jnp.arange(9) * 2 * jnp.pi / 9
        >>> circle = 1.8 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)[None]
        >>> classes = gaussian(1.0), gaussian(2.0)
        >>> flow = levelset_flow(*classes, 0.5, circle, 0.2, times=3)
        >>> radii = jnp.linalg.norm(flow.curves[:, 0, 0], axis=1)
        >>> [round(float(r), 3) for r in radii], flow.outside
        ([1.923, 2.024, 2.141], 1)

    Source:
        Garcia Trillos and Murray, 2022 (arXiv 2011.10797), the geometric flow in higher
        dimension.

    Differences:
        Curves stand for the level-set function: the flow is not valid past a change of
        topology, which is all that the function would add. Differentiating `F = 0`
        makes the velocity the solution of a linear equation along each curve.
    """
    owner = "levelset_flow"
    check_share(owner, share0)
    check_positive(owner, "epsilon_max", epsilon_max)
    check_shape(owner, "curves", curves, (None, None, 2))
    check_finite(owner, "curves", curves)
    if curves.shape[0] == 0 or curves.shape[1] < 5:
        raise ValueError(
            f"{owner}: `curves` must hold curves of at least 5 points (got shape "
            f"{curves.shape})."
        )
    start = jnp.asarray(curves)
    if not jnp.issubdtype(start.dtype, jnp.floating):
        start = start.astype(float)
    for name, density in (("density0", density0), ("density1", density1)):
        warn_unless_normalised(owner, name, density, start.reshape(-1, 2))
    epsilons = jnp.linspace(0, epsilon_max, times, dtype=start.dtype)
    share = jnp.asarray(share0, start.dtype)
    found, violation, outside = _integrate(density0, density1, share, start, epsilons)
    if not bool(jnp.all(jnp.isfinite(found[0]))):
        raise ValueError(
            f"{owner}: `curves` must lie near the level set w0 rho0 = w1 rho1 (got "
            f"curves that are not drawn onto it as simple curves with one class on "
            f"either side). Start closer or with more points."
        )
    valid = jnp.cumprod(jnp.all(jnp.isfinite(found), axis=(1, 2, 3)).astype(int)) > 0
    return PlaneFlow(
        epsilons,
        jnp.where(valid[:, None, None, None], found, jnp.nan),
        int(outside),
        jnp.max(jnp.where(valid, epsilons, 0)),
        Certificate(
            "first-order condition",
            jnp.max(jnp.where(valid, violation, 0)),
            proof=False,
            statement="densities weighted by shares and lengths differ by at most "
            "value of their sum across every boundary",
        ),
    )


@eqx.filter_jit
def _integrate(density0, density1, share0, start, epsilons):
    def log_ratio(x):
        return jnp.log((1 - share0) * density1(x)) - jnp.log(share0 * density0(x))

    start = _onto_zeros(log_ratio, start)
    rise = jax.vmap(jax.vmap(jax.grad(log_ratio)))(start)
    terms = _Terms(density0, density1, share0, start, rise)

    def valid(x, eps):
        normals = terms.over_curves(terms.frame, x)[2]
        matrices = terms.over_curves(terms.variation, x, eps)[0]
        definite = jnp.all(jnp.isfinite(jnp.linalg.cholesky(matrices)))
        return definite & (_reach(x, normals) > eps)

    def velocity(eps, x, args):
        del args
        return terms.over_curves(terms.velocity, x, eps)

    def ended(t, y, args, **rest):
        del args, rest
        return ~valid(y, t)

    eps = float(np.finfo(start.dtype).eps)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(velocity),
        diffrax.Tsit5(),
        epsilons[0],
        epsilons[-1],
        None,
        start,
        saveat=diffrax.SaveAt(ts=epsilons),
        stepsize_controller=diffrax.PIDController(rtol=eps**0.75, atol=eps**0.75),
        event=diffrax.Event(ended),
        max_steps=4096,
        throw=False,
    )
    path: Any = solution.ys
    good = jax.vmap(valid)(path, epsilons)
    low, high = jax.vmap(lambda x, e: terms.over_curves(terms.sides, x, e))(
        path, epsilons
    )
    violation = jnp.max(jnp.abs(high - low) / (high + low), axis=(1, 2))
    # Right of the rightmost point everything is far away.
    rightmost = jnp.argmax(start.reshape(-1, 2)[:, 0])
    outside = rise.reshape(-1, 2)[rightmost, 0] > 0
    return jnp.where(good[:, None, None, None], path, jnp.nan), violation, outside


class _Terms:
    """The first and second variation of the risk along closed curves."""

    def __init__(self, density0, density1, share0, start, rise):
        self.derivative = jnp.asarray(_fourier_derivative(start.shape[1]), start.dtype)
        self.rho0 = jax.vmap(jax.value_and_grad(lambda x: share0 * density0(x)))
        self.rho1 = jax.vmap(jax.value_and_grad(lambda x: (1 - share0) * density1(x)))
        # Towards class 1, whichever way around a curve is given.
        self.side = jnp.ones(len(start), start.dtype)
        across = self.over_curves(self.frame, start)[2]
        self.side = jnp.sign(jnp.sum(across * rise, axis=(1, 2)))

    def over_curves(self, function, x, *eps):
        return jax.vmap(lambda curve, side: function(curve, side, *eps))(x, self.side)

    def frame(self, x, side):
        """Speed, tangent, normal towards class 1, and its divergence."""
        velocity = self.derivative @ x
        speed = jnp.linalg.norm(velocity, axis=1)
        tangent = velocity / speed[:, None]
        normal = side * jnp.stack([tangent[:, 1], -tangent[:, 0]], axis=1)
        curvature = jnp.sum((self.derivative @ normal) * tangent, axis=1) / speed
        return speed, tangent, normal, curvature

    def sides(self, x, side, eps):
        """The two terms of F: what each class loses by a move of the boundary."""
        _, _, n, k = self.frame(x, side)
        low, high = self.rho0(x - eps * n)[0], self.rho1(x + eps * n)[0]
        return low * (1 - eps * k), high * (1 + eps * k)

    def variation(self, x, side, eps):
        """The symmetric matrix of the second variation, F_eps and the normal."""
        speed, _, n, k = self.frame(x, side)
        rho0, slope0 = self.rho0(x - eps * n)
        rho1, slope1 = self.rho1(x + eps * n)
        low = jnp.sum(slope0 * n, axis=1) * (1 - eps * k)
        high = jnp.sum(slope1 * n, axis=1) * (1 + eps * k)
        both, D = rho0 + rho1, self.derivative
        stiff = D.T @ ((eps * both / speed)[:, None] * D)
        matrix = stiff + jnp.diag((high - low - eps * k**2 * both) * speed)
        return matrix, (high + low + both * k) * speed, n

    def velocity(self, x, side, eps):
        matrix, growth, n = self.variation(x, side, eps)
        return -jnp.linalg.solve(matrix, growth)[:, None] * n


def _onto_zeros(function, curves):
    """Newton's method along the gradient at every point."""
    both = jax.vmap(jax.vmap(jax.value_and_grad(function)))

    def step(_, x):
        value, slope = both(x)
        return x - (value / jnp.sum(slope**2, axis=-1))[..., None] * slope

    return jax.lax.fori_loop(0, NEWTON_STEPS, step, curves)


def _reach(curves, normals):
    """The largest radius with which balls fit beside the curves everywhere."""
    x, n = curves.reshape(-1, 2), normals.reshape(-1, 2)
    apart = x[None, :, :] - x[:, None, :]
    across = jnp.abs(jnp.sum(apart * n[:, None, :], axis=-1))
    radius = jnp.sum(apart**2, axis=-1) / jnp.where(across > 0, 2 * across, 1)
    return jnp.min(jnp.where(across > 0, radius, jnp.inf))


def _fourier_derivative(points):
    """The matrix that differentiates trigonometric polynomials on an even grid."""
    shift = np.arange(points)[:, None] - np.arange(points)[None, :]
    angle = np.where(shift == 0, 1.0, shift) * np.pi / points
    inverse = 1 / np.sin(angle) if points % 2 else 1 / np.tan(angle)
    return np.where(shift == 0, 0.0, 0.5 * (-1.0) ** shift * inverse)
