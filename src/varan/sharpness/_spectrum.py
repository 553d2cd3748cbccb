"""All eigenvalues of the Hessian at once: their sum and their density.

Both need products with random vectors only. The trace has three estimators of growing
cleverness; for small networks it is exact. The density is stochastic Lanczos
quadrature: each probe's Ritz values carry the weight of their first components.
"""

from __future__ import annotations

import math
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..core._checks import check_choice, check_positive
from . import _lanczos
from ._hessian import LossFn
from ._objective import (
    MeasureResult,
    check_counts,
    checked,
    objective,
    refuse_undefined,
    t_half_width,
)

# Up to so many parameters "auto" takes the trace exactly.
_EXACT_SIZE = 2000
# Products that run together: matrix products instead of matrix times vector.
_TOGETHER = 16


def hessian_trace(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    *,
    n_probes: int = 30,
    estimator: Literal["auto", "exact", "hutchinson", "hutchpp", "xtrace"] = "auto",
    mask: PyTree | None = None,
    key: PRNGKeyArray,
) -> MeasureResult:
    """The trace of the loss's Hessian, the sum of all curvatures.

    - `"exact"`: one product a parameter. `"auto"` takes it up to 2000 parameters and
      `"hutchpp"` beyond.
    - `"hutchinson"`: the mean of `z' H z` over random signs z; deviation about
      `sqrt(2 / n_probes) ||H||_F`.
    - `"hutchpp"`: a third of the products finds the dominant eigenspace, a third its
      trace exactly, and Hutchinson takes the rest: far better where few eigenvalues
      dominate, as in trained networks.
    - `"xtrace"`: half of the products each, every probe used for both purposes by
      leaving it out; usually the best of the three.

    Args:
        loss_fn: `(params, batch) -> scalar`. The same function object does not compile
            again.
        params: Any pytree; its floating arrays are the variables.
        batch: What the loss is evaluated on.
        n_probes: Products with the Hessian in all; a multiple of what the estimator
            divides them by is used. At least 2 (`"hutchinson"`), 6 (`"hutchpp"`), 4
            (`"xtrace"`), and at most 3 or 2 times the parameters for the last two.
        estimator: See above.
        mask: A tree of booleans (or boolean arrays) like the parameters, or a prefix
            of it, or a function from the parameters to one: the trace over the
            parameters where it is true. Not with `"xtrace"`.
        key: Random key of the probes.

    Returns:
        The trace, `"exact"` or an unbiased `"estimate"` with a 95 % interval from
        Student's t over the probes (for `"xtrace"`, whose samples share probes,
        approximate). Samples that all agree give an interval of width zero: with a
        few probes this can be chance, and says nothing. NaN, under jit, for a loss or
        gradient that is not finite.

    Raises:
        ValueError: If a setting is out of range, parameters have no floating arrays,
            the batch is empty, the loss is no scalar, the mask does not fit or selects
            nothing, or (outside of jit) the loss or its gradient is not finite.
        TypeError: If `n_probes` is no integer, or the mask not boolean.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.sharpness import hessian_trace
        >>> loss = lambda w, b: w[0] ** 2 - 3 * w[1] ** 2 + w[2] ** 2 / 2
        >>> trace = hessian_trace(loss, jnp.ones(3), None, key=jax.random.key(0))
        >>> round(float(trace.value), 3), trace.kind
        (-3.0, 'exact')

    Source: R. A. Meyer, C. Musco, C. Musco, D. P. Woodruff, 2021, "Hutch++: optimal
        stochastic trace estimation", arXiv:2010.09649, algorithm 1; E. N. Epperly,
        J. A. Tropp, R. J. Webber, 2024, "XTrace: making the most of every sample in
        stochastic trace estimation", arXiv:2301.07825, section 2.1.
    """
    names = ("auto", "exact", *_ESTIMATORS)
    check_choice("hessian_trace", "estimator", estimator, names)
    check_counts("hessian_trace", n_probes=n_probes)
    params, mask = checked("hessian_trace", params, batch, mask)
    size = sum(
        p.size for p in jtu.tree_leaves(eqx.filter(params, eqx.is_inexact_array))
    )
    if estimator == "auto":
        estimator = "exact" if size <= _EXACT_SIZE else "hutchpp"
    if estimator != "exact":
        share = _SHARES[estimator]
        if not 2 <= n_probes // share <= (size if share > 1 else n_probes):
            raise ValueError(
                f"hessian_trace: `n_probes` must be at least {2 * share} for "
                f"{estimator!r}, and at most {share} times the {size} parameters "
                f'unless for "hutchinson" (got {n_probes}).'
            )
        if estimator == "xtrace" and mask is not None:
            raise ValueError(
                'hessian_trace: `mask` does not go with "xtrace" (got both), which '
                'needs probes of one length. Use "hutchpp".'
            )
    found = _trace(loss_fn, params, batch, mask, key, (estimator, n_probes))
    refuse_undefined("hessian_trace", found.value, loss_fn, params, batch, mask)
    return found


@eqx.filter_jit
def _trace(loss_fn, params, batch, mask, key, settings):
    estimator, n_probes = settings
    flat = objective("hessian_trace", loss_fn, params, batch, mask)
    size = flat.point.size
    products = _products(flat.hessian())
    if estimator == "exact":
        value = _exact(flat.hessian(), size, flat.point.dtype)
        return MeasureResult(value, "exact", None, 2 * size)
    number = n_probes // _SHARES[estimator]
    samples = _ESTIMATORS[estimator](products, flat.selected, number, key)
    cost = 2 * number * _SHARES[estimator]
    half = t_half_width(samples)
    return MeasureResult(jnp.mean(samples), "estimate", None, cost, half)


def _products(product):
    """Row by row, some together."""

    def apply(rows):
        return jax.lax.map(product, rows, batch_size=min(_TOGETHER, rows.shape[0]))

    return apply


def _exact(product, size, dtype):
    def entry(index):
        unit = (jnp.arange(size) == index).astype(dtype)
        return product(unit)[index]

    indices = jnp.arange(size)
    return jnp.sum(jax.lax.map(entry, indices, batch_size=min(_TOGETHER, size)))


def _signs(key, selected, number):
    shape = (number, selected.size)
    return selected[None, :] * jax.random.rademacher(key, shape, selected.dtype)


def _hutchinson(products, selected, number, key):
    probes = _signs(key, selected, number)
    return jnp.sum(probes * products(probes), 1)


def _hutchpp(products, selected, number, key):
    one, two = jax.random.split(key)
    sketch = products(_signs(one, selected, number))
    # A sketch of zeros would give any basis, also off the mask.
    Q = jnp.linalg.qr(sketch.T)[0].T * selected[None, :]
    exact = jnp.sum(Q * products(Q))
    probes = _signs(two, selected, number)
    rest = probes - (probes @ Q.T) @ Q
    return exact + jnp.sum(rest * products(rest), 1)


def _xtrace(products, selected, number, key):
    n = selected.size
    probes = jax.random.normal(key, (number, n), selected.dtype).T
    probes = probes * (math.sqrt(n) / jnp.linalg.norm(probes, axis=0))[None, :]
    Q, R = jnp.linalg.qr(products(probes.T).T)
    Z = products(Q.T).T
    H, W, T = Q.T @ Z, Q.T @ probes, Z.T @ probes
    # Column i of S is orthogonal to all columns of R but the i-th: Q without it is
    # the basis that the other probes span. Of a sketch without full rank R is made
    # invertible within rounding.
    pivots = jnp.diag(R)
    largest = jnp.max(jnp.abs(pivots))
    least = np.finfo(R.dtype).eps * jnp.where(largest > 0, largest, 1)
    R = R + jnp.diag(jnp.where(jnp.abs(pivots) < least, least, 0))
    S = jax.scipy.linalg.solve_triangular(R, jnp.eye(number, dtype=R.dtype)).T
    S = S / jnp.linalg.norm(S, axis=0)[None, :]

    def leave_out(s, w, r, t):
        u = w - s * (s @ w)
        inner = w @ r - t @ u - u @ r + u @ (H @ u)
        # The part outside the basis points anywhere: made as long as it is on average.
        scale = (n - number + 1) / jnp.maximum(n - u @ u, 1)
        return jnp.trace(H) - s @ H @ s + scale * inner

    return jax.vmap(leave_out, 1)(S, W, R, T)


_ESTIMATORS = {"hutchinson": _hutchinson, "hutchpp": _hutchpp, "xtrace": _xtrace}
# Products that each of the estimator's samples stands for.
_SHARES = {"hutchinson": 1, "hutchpp": 3, "xtrace": 2}


class SpectralDensity(eqx.Module):
    """A quadrature of the Hessian's spectrum: values and their shares.

    Args:
        nodes: Ritz values of each probe.
        weights: Shares of the spectrum, not negative; each probe's sum is 1.
        size: Parameters, so that `size` times a mean over the spectrum is a trace.
        n_hvp: Products with the Hessian.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.sharpness import spectral_density
        >>> loss = lambda w, b: jnp.sum(jnp.array([1.0, 2.0, 6.0]) * w**2) / 2
        >>> spectrum = spectral_density(loss, jnp.ones(3), None, key=jax.random.key(0))
        >>> bool(jnp.all(spectrum.density(jnp.array([1.0, 4.0]), 0.1) >= 0))
        True
    """

    nodes: Float[Array, "probes steps"]
    weights: Float[Array, "probes steps"]
    size: Float[Array, ""]
    n_hvp: int = eqx.field(static=True)

    def density(
        self, grid: Float[Array, " points"], width: Float[Array, ""] | float
    ) -> Float[Array, " points"]:
        """The density, each node drawn as a normal curve of the given deviation."""
        check_positive("SpectralDensity.density", "width", width)
        nodes, weights = self.nodes.ravel(), self.weights.ravel()
        grid, width = (jnp.asarray(v, nodes.dtype) for v in (grid, width))
        away = (grid[:, None] - nodes[None, :]) / width
        curves = jnp.exp(-(away**2) / 2) / (width * math.sqrt(2 * math.pi))
        return curves @ weights / self.nodes.shape[0]

    def mean(self, function=lambda value: value) -> MeasureResult:
        """The mean of a function over the spectrum, an estimate with an interval."""
        samples = jnp.sum(self.weights * function(self.nodes), 1)
        half = t_half_width(samples) if samples.shape[0] > 1 else None
        return MeasureResult(jnp.mean(samples), "estimate", None, 2 * self.n_hvp, half)


def spectral_density(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    *,
    n_probes: int = 4,
    steps: int = 64,
    mask: PyTree | None = None,
    key: PRNGKeyArray,
) -> SpectralDensity:
    """The density of the Hessian's eigenvalues by stochastic Lanczos quadrature.

    `n_probes * steps` products, and `steps` vectors of memory. Each probe's quadrature
    is exact for polynomials of degree `2 steps - 1` in the probe's own measure; the
    extreme nodes lie within the spectrum.

    Args:
        loss_fn: `(params, batch) -> scalar`. The same function object does not compile
            again.
        params: Any pytree; its floating arrays are the variables.
        batch: What the loss is evaluated on.
        n_probes: Random vectors, at least 1.
        steps: Lanczos steps, at least 1; more than the parameters are not done.
        mask: As in `hessian_top`.
        key: Random key of the probes.

    Returns:
        Nodes and weights, with `density(grid, width)` and `mean(function)`. NaN, under
        jit, for a loss or gradient that is not finite.

    Raises:
        ValueError: As `hessian_trace` does.
        TypeError: If a count is no integer, or the mask not boolean.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.sharpness import spectral_density
        >>> loss = lambda w, b: jnp.sum(jnp.array([1.0, 2.0, 6.0]) * w**2) / 2
        >>> spectrum = spectral_density(loss, jnp.ones(3), None, key=jax.random.key(0))
        >>> [round(float(v), 3) for v in jnp.sort(spectrum.nodes[0])]
        [1.0, 2.0, 6.0]

    Source: B. Ghorbani, S. Krishnan, Y. Xiao, 2019, "An investigation into neural net
        optimization via Hessian eigenvalue density", arXiv:1901.10159, section 2.
    """
    check_counts("spectral_density", n_probes=n_probes, steps=steps)
    if n_probes < 1 or steps < 1:
        raise ValueError(
            "spectral_density: `n_probes` and `steps` must be at least 1 (got "
            f"{n_probes} and {steps})."
        )
    params, mask = checked("spectral_density", params, batch, mask)
    found = _density(loss_fn, params, batch, mask, key, (n_probes, steps))
    refuse_undefined("spectral_density", found.nodes, loss_fn, params, batch, mask)
    return found


@eqx.filter_jit
def _density(loss_fn, params, batch, mask, key, settings):
    n_probes, steps = settings
    flat = objective("spectral_density", loss_fn, params, batch, mask)
    product = flat.hessian()
    steps = min(steps, flat.point.size)

    def probe(key):
        space = jax.lax.fori_loop(
            0,
            steps,
            lambda _, space: _lanczos.advance(product, space),
            _lanczos.begin(key, flat.selected, steps),
        )
        nodes, S = space.ritz()
        # Of steps beyond the end of a masked space the weight is zero, the value not.
        return jnp.where(S[0] == 0, nodes[-1], nodes), S[0] ** 2

    nodes, weights = jax.lax.map(probe, jax.random.split(key, n_probes))
    return SpectralDensity(nodes, weights, jnp.sum(flat.selected), n_probes * steps)
