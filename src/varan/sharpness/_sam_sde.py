"""Stochastic differential equations that follow SAM, and what they predict.

With stepsize eta, radius rho and the gradient g of a random batch, all three variants
step by -eta g(x + rho g(x) / r), where r is 1 (unnormalised), |g(x)| (SAM) or the norm
of the full gradient (DNSAM: only the direction is noisy). Expanded to first order in
rho a step is -eta v with

    v = g + rho H g / r,     dX = -E[v] dt + sqrt(eta Cov[v]) dW,

H the batch's Hessian. For rho of the order of sqrt(eta), expectations of this process
are within O(eta) of the algorithm's over a fixed time. The drift is minus the gradient
of an implicit loss: f + rho E|g|^2 / 2, f + rho E|g|, and, where all batches share one
Hessian, f + rho |grad f|. One evaluation of drift or covariance costs two gradients and
a Hessian-vector product of every batch.

Source: Compagnoni, Biggio, Orvieto, Proske, Kersting, Lucchi, 2023 (arXiv 2301.08203).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, Unpack

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from ..core import _checks as checks
from ._engine import (
    EngineOptions,
    Rule,
    Schedule,
    check_like,
    check_schedule,
    perturbed,
    scheduled,
    with_engine_options,
)
from ._vectors import moved, norm, scaled

Variant = Literal["usam", "sam", "dnsam"]
_VARIANTS = ("usam", "sam", "dnsam")
# rho = O(sqrt(eta)) is a statement about a limit; this is where a pair is suspicious.
_LARGEST_RATIO = 3.0


class SamSDE(eqx.Module):
    """The diffusion that follows SAM on a finite population of batches.

    Args:
        loss: Loss of one batch, `(x, batch) -> scalar`.
        batches: Pytree of arrays with a leading axis of n equally likely batches.
        stepsize: The algorithm's stepsize.
        rho: The algorithm's radius.
        variant: Which algorithm: `"usam"`, `"sam"` or `"dnsam"`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import SamSDE
        >>> noise = jnp.array([-1.0, 1.0])
        >>> loss = lambda x, z: jnp.sum(x**2) + z * x[0]
        >>> sde = SamSDE(loss, noise, stepsize=0.01, rho=0.1, variant="usam")
        >>> x = jnp.array([3.0])
        >>> round(float(sde.drift(x)[0]), 4), round(float(sde.covariance(x)[0, 0]), 4)
        (-7.2, 1.44)
    """

    loss: Callable[[Array, PyTree], Float[Array, ""]] = eqx.field(static=True)
    batches: PyTree[Array]
    stepsize: Float[Array, ""] | float
    rho: Float[Array, ""] | float
    variant: Variant = eqx.field(static=True)

    def mean_loss(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """f, the mean over the batches."""
        return jnp.mean(jax.vmap(self.loss, (None, 0))(x, self.batches))

    def implicit_loss(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """What the drift descends; for DNSAM only if all batches share one Hessian."""
        gradients = jax.vmap(jax.grad(self.loss), (None, 0))(x, self.batches)
        if self.variant == "usam":
            penalty = jnp.mean(jnp.sum(gradients**2, axis=1)) / 2
        elif self.variant == "sam":
            penalty = jnp.mean(jax.vmap(norm)(gradients))
        else:
            penalty = norm(jnp.mean(gradients, axis=0))
        return self.mean_loss(x) + self.rho * penalty

    def directions(self, x: Float[Array, " d"]) -> Float[Array, "n d"]:
        """v of each batch: its step over -eta, to first order in rho."""

        def both(batch):
            gradient = jax.grad(self.loss)
            g = gradient(x, batch)
            return g, jax.jvp(lambda y: gradient(y, batch), (x,), (g,))[1]

        g, hg = jax.vmap(both)(self.batches)
        if self.variant == "usam":
            return g + self.rho * hg
        if self.variant == "sam":
            size = jax.vmap(norm)(g)[:, None]
        else:
            size = norm(jnp.mean(g, axis=0))
        # Where the gradient is zero the algorithm perturbs by nothing.
        nonzero = size > 0
        return g + jnp.where(nonzero, self.rho * hg / jnp.where(nonzero, size, 1), 0)

    def drift(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """-E[v]."""
        return -jnp.mean(self.directions(x), axis=0)

    def covariance(self, x: Float[Array, " d"]) -> Float[Array, "d d"]:
        """Cov[v]; the noise's, per unit of time, is `stepsize` times it."""
        v = self.directions(x)
        centred = v - jnp.mean(v, axis=0, keepdims=True)
        return centred.T @ centred / len(centred)

    def diffusion(self, x: Float[Array, " d"]) -> lx.AbstractLinearOperator:
        """The symmetric square root of `stepsize` times the covariance."""
        values, vectors = jnp.linalg.eigh(self.stepsize * self.covariance(x))
        # Below zero they are rounding.
        root = jnp.sqrt(jnp.maximum(values, 0))
        matrix = (vectors * root[None, :]) @ vectors.T
        return lx.MatrixLinearOperator(matrix, lx.positive_semidefinite_tag)

    def terms(self, brownian=None):
        """Terms for `diffrax.diffeqsolve` (Ito: use `diffrax.Euler`).

        Args:
            brownian: A diffrax Brownian path of shape (d,); None for the ODE, the
                full-batch limit's drift alone.

        Returns:
            A diffrax term.
        """
        import diffrax

        drift = diffrax.ODETerm(lambda t, x, args: self.drift(x))
        if brownian is None:
            return drift
        noise = diffrax.ControlTerm(lambda t, x, args: self.diffusion(x), brownian)
        return diffrax.MultiTerm(drift, noise)


def sam_sde(
    loss: Callable[[Array, PyTree], Float[Array, ""]],
    batches: PyTree[Array],
    stepsize: float | Float[Array, ""],
    rho: float | Float[Array, ""],
    *,
    variant: Variant = "sam",
) -> SamSDE:
    """The stochastic differential equation that follows SAM, USAM or DNSAM.

    Expectations under it are within O(stepsize) of the algorithm's over a fixed time,
    for `rho` of the order of `sqrt(stepsize)`. Drift and covariance are exact for the
    given population of batches: one sample each, listed minibatches, or atoms of an
    additive noise.

    Args:
        loss: Loss of one batch, `(x, batch) -> scalar`, twice differentiable in the
            vector x.
        batches: Pytree of arrays with a leading axis of n equally likely batches.
        stepsize: Stepsize eta of the algorithm, positive.
        rho: Its radius, not negative: in units of length for `"sam"` and `"dnsam"`, of
            length by gradient for `"usam"`.
        variant: `"sam"` divides by the batch's gradient norm, `"dnsam"` by the full
            gradient's, `"usam"` by nothing.

    Returns:
        Drift, covariance, diffusion, implicit loss, and terms for diffrax.

    Raises:
        ValueError: On a stepsize that is not positive, a negative `rho`, an unknown
            variant, or batches that are empty or of different lengths. A `rho` beyond
            three times `sqrt(stepsize)` is warned of.

    Example:
        >>> import diffrax, jax, jax.numpy as jnp
        >>> from varan.sharpness import sam_sde
        >>> rows = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
        >>> loss = lambda x, a: (a @ x - 1) ** 2 / 2
        >>> sde = sam_sde(loss, rows, 0.01, 0.05)
        >>> path = diffrax.VirtualBrownianTree(
        ...     0, 1, tol=1e-3, shape=(2,), key=jax.random.key(0))
        >>> solution = diffrax.diffeqsolve(
        ...     sde.terms(path), diffrax.Euler(), 0, 1, 0.05, jnp.array([3.0, -2.0]))
        >>> bool(sde.mean_loss(solution.ys[-1]) < sde.mean_loss(jnp.array([3.0, -2.0])))
        True

    Source:
        Compagnoni, Biggio, Orvieto, Proske, Kersting, Lucchi, 2023, "An SDE for
        Modeling SAM: Theory and Insights", arXiv:2301.08203, theorems for USAM, SAM and
        DNSAM.

    Differences:
        The covariance has its term of second order in rho, so that it is positive
        semidefinite without projection; the order of the approximation is the same,
        and with additive noise it is the (I + rho H) S (I + rho H) of the source's
        corollary. The drift of DNSAM is the mean of the expanded step, which is minus
        the gradient of f + rho |grad f| only if all batches share one Hessian.
    """
    owner = "sam_sde"
    checks.check_choice(owner, "variant", variant, _VARIANTS)
    checks.check_positive(owner, "stepsize", stepsize)
    checks.check_nonnegative(owner, "rho", rho)
    lengths = {np.shape(leaf)[:1] for leaf in jtu.tree_leaves(batches)}
    if len(lengths) != 1 or lengths <= {(), (0,)}:
        raise ValueError(
            f"{owner}: the arrays of `batches` must have one leading axis of batches, "
            f"not empty (got leading axes {sorted(lengths)})."
        )
    if not checks.is_traced(stepsize) and not checks.is_traced(rho):
        ratio = float(rho) / float(np.sqrt(stepsize))
        if ratio > _LARGEST_RATIO:
            warnings.warn(
                f"{owner}: `rho` should be of the order of sqrt(stepsize) (got "
                f"{ratio:.3g} times it): the expansion in `rho` is then no guide.",
                stacklevel=2,
            )
    return SamSDE(loss, batches, stepsize, rho, variant)


def stationary_variance(
    curvature: Float[Array | np.ndarray, " *shape"] | float,
    noise: Float[Array | np.ndarray, " *shape"] | float,
    stepsize: float | Float[Array, ""],
    rho: float | Float[Array, ""],
    *,
    model: Literal["iterates", "sde"] = "iterates",
) -> Float[Array, " *shape"]:
    """Where unnormalised SAM settles around a quadratic minimum, along an eigenvector.

    With additive gradient noise of variance s^2 and curvature l, the iterates have the
    stationary variance eta s^2 (1 + rho l) / (l (2 - eta l (1 + rho l))), exactly; the
    SDE's is its limit eta s^2 (1 + rho l) / (2 l). SAM spreads more than SGD, and most
    where it is sharp.

    Args:
        curvature: Eigenvalue l of the Hessian, positive.
        noise: Standard deviation s of the gradient's noise along it, not negative.
        stepsize: Stepsize eta, positive.
        rho: Radius of unnormalised SAM, not negative; zero for SGD.
        model: Of the iterates themselves or of the SDE.

    Returns:
        The variance, in the common shape of the arguments. NaN, under jit, where the
        iterates are unstable.

    Raises:
        ValueError: On values out of range, or, for the iterates,
            `stepsize * l * (1 + rho * l) >= 2`, where no stationary law exists.

    Example:
        >>> from varan.sharpness import stationary_variance
        >>> round(float(stationary_variance(2.0, 0.3, 0.01, 0.1, model="sde")), 6)
        0.00027

    Source:
        Compagnoni et al., 2023, arXiv:2301.08203, for the SDE's law.

    Differences:
        The exact law of the iterates is beyond the source.
    """
    owner = "stationary_variance"
    checks.check_choice(owner, "model", model, ("iterates", "sde"))
    checks.check_positive(owner, "curvature", curvature)
    checks.check_nonnegative(owner, "noise", noise)
    checks.check_positive(owner, "stepsize", stepsize)
    checks.check_nonnegative(owner, "rho", rho)
    curvature, noise = jnp.asarray(curvature), jnp.asarray(noise)
    rate = stepsize * curvature * (1 + rho * curvature)
    power = stepsize * noise**2 * (1 + rho * curvature)
    if model == "sde":
        return power / (2 * curvature)
    if not checks.is_traced(rate) and not bool(np.all(np.asarray(rate) < 2)):
        raise ValueError(
            f"{owner}: stepsize * l * (1 + rho * l) must be below 2 (got "
            f"{float(jnp.max(rate)):.4g}): beyond, the iterates diverge. Lower "
            "`stepsize` or `rho`."
        )
    return jnp.where(rate < 2, power / (curvature * (2 - rate)), jnp.nan)


@with_engine_options()
def dnsam(
    base: optax.GradientTransformation,
    rho: Schedule = 0.05,
    **engine: Unpack[EngineOptions],
) -> optax.GradientTransformationExtraArgs:
    """SAM with a deterministic length: the ascent is divided by the full gradient's.

    Between SAM and unnormalised SAM, made to be analysed: the perturbation is
    rho g / |grad f|, its direction the batch's and its unit the whole data's. A step
    costs two gradients of the batch and one of all data; `grad_evals` counts the
    batch's alone.

    Args:
        base: Any optax transformation.
        rho: Radius, not negative, or a schedule.
        interval, mask, microbatch, axis_name, sync_ascent, measure_gain, seed: As in
            `perturbed`.

    Returns:
        An optax transformation whose `update` is given `grad_fn` and
        `full_grad_fn(params)`, the gradient over all data.

    Raises:
        ValueError: If `rho` is negative, or `update` lacks `full_grad_fn`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from varan.sharpness import dnsam
        >>> method, w = dnsam(optax.sgd(1.0), 0.5), jnp.asarray(2.0)
        >>> update, _ = method.update(w + 2.0, method.init(w), w,
        ...     grad_fn=lambda w, i: w + 2.0, full_grad_fn=lambda w: w)
        >>> float(update)
        -5.0

    Source:
        Compagnoni et al., 2023, arXiv:2301.08203.

    Differences:
        Where the full gradient is zero, nothing is perturbed.
    """
    check_schedule("dnsam", "rho", rho)

    def direction(g0, params, state, grad_fn, call):
        full = call.restrict(_full_gradient(call.extra, params))
        size = norm(full)
        nonzero = size != 0  # Not `> 0`: NaN must show.
        factor = scheduled(rho, call.step) / jnp.where(nonzero, size, 1)
        e = scaled(call.restrict(g0), jnp.where(nonzero, factor, 0))
        return grad_fn(moved(params, e)), state, e

    rule = Rule(direction, consumes=("full_grad_fn",))
    return perturbed(base, rule, **engine)


def _full_gradient(extra: dict[str, Any], params):
    full_grad_fn = extra.get("full_grad_fn")
    if full_grad_fn is None:
        raise ValueError(
            "dnsam: `update` needs `full_grad_fn`, a function params -> gradient over "
            "all data, whose norm is the unit of the ascent. `sam` needs none."
        )
    full = full_grad_fn(params)
    check_like("dnsam", "full_grad_fn", full, params)
    return full
