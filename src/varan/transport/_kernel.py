"""The Gibbs kernel in two domains, and the sweep that every Sinkhorn form shares.

A kernel holds the potentials it was built at, so that an iterate is a small
correction `(phi, psi)` in units of epsilon: `f = f0 + epsilon phi`, and `g` likewise.
Its two methods give `log(P 1) - phi` and `log(P' 1) - psi`, all that Sinkhorn's
method reads.

`Scaling` keeps `K = exp((f0 + g0 - C) / epsilon)`: a half-sweep is one read of the
matrix, and corrections that grow are absorbed into a new kernel. `Logarithmic` keeps
`(f0 + g0 - C) / epsilon`: a half-sweep is a pass of exponentials, ten times dearer, and
nothing can under- or overflow.
"""

from __future__ import annotations

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core._control import when


class Kernel(eqx.Module):
    """A kernel and the potentials that it was built at."""

    matrix: eqx.AbstractVar[Float[Array, "m n"]]
    f: eqx.AbstractVar[Float[Array, " m"]]
    g: eqx.AbstractVar[Float[Array, " n"]]

    @abc.abstractmethod
    def rows(self, psi: Float[Array, " n"]) -> Float[Array, " m"]:
        """`log(K exp(psi))`."""

    @abc.abstractmethod
    def columns(self, phi: Float[Array, " m"]) -> Float[Array, " n"]:
        """`log(K' exp(phi))`."""

    def potentials(self, problem, phi, psi):
        """The potentials of a correction, in the canonical gauge."""
        return problem.gauge(
            (self.f + problem.epsilon * phi, self.g + problem.epsilon * psi)
        )


class Scaling(Kernel):
    """The kernel itself."""

    matrix: Float[Array, "m n"]
    f: Float[Array, " m"]
    g: Float[Array, " n"]

    def rows(self, psi):
        return jnp.log(self.matrix @ jnp.exp(psi))

    def columns(self, phi):
        return jnp.log(jnp.exp(phi) @ self.matrix)


class Logarithmic(Kernel):
    """The logarithm of the kernel."""

    matrix: Float[Array, "m n"]
    f: Float[Array, " m"]
    g: Float[Array, " n"]

    def rows(self, psi):
        return jax.nn.logsumexp(self.matrix + psi[None, :], axis=1)

    def columns(self, phi):
        return jax.nn.logsumexp(self.matrix + phi[:, None], axis=0)


class Corrections(eqx.Module):
    """An iterate: corrections, and the log marginals that came with them for free.

    `rows` is `log(P 1) - phi` at `psi`, `columns` is `log(P' 1) - psi` at `phi`.
    """

    phi: Float[Array, " m"]
    psi: Float[Array, " n"]
    rows: Float[Array, " m"]
    columns: Float[Array, " n"]

    def condition(self, problem):
        """The marginal errors."""
        return (
            jnp.exp(self.phi + self.rows) - problem.a,
            jnp.exp(self.psi + self.columns) - problem.b,
        )


def sweep(kernel: Kernel, log_a, log_b, at: Corrections, relaxation=1.0) -> Corrections:
    """One row update, then one column update: two reads of the matrix.

    With `relaxation` 1 it is Sinkhorn's; above 1 each update goes further.
    """
    phi = _towards(at.phi, log_a - at.rows, relaxation)
    columns = kernel.columns(phi)
    psi = _towards(at.psi, log_b - columns, relaxation)
    return Corrections(phi, psi, kernel.rows(psi), columns)


def _towards(old, new, relaxation):
    if isinstance(relaxation, float) and relaxation == 1.0:
        return new
    return old + relaxation * (new - old)


def tight_scaling(problem, f, g, epsilon) -> Scaling:
    """The kernel at `(f, g)`, with `f` moved so that each row's largest entry is 1.

    Rows can then not underflow as a whole. The first row update does not read `f`, so
    Sinkhorn's iterates do not change.
    """
    exponent = (f[:, None] + g[None, :] - problem.cost) / epsilon
    top = jnp.max(exponent, axis=1)
    return Scaling(jnp.exp(exponent - top[:, None]), f - epsilon * top, g)


def refresh(problem, kernel: Scaling, at: Corrections) -> tuple[Scaling, Corrections]:
    """Absorbs corrections that grow large into a new kernel.

    `exp` of them must stay representable, and so must the entries that they multiply.
    """
    size = jnp.maximum(jnp.max(jnp.abs(at.phi)), jnp.max(jnp.abs(at.psi)))

    def absorb(_):
        f = kernel.f + problem.epsilon * at.phi
        g = kernel.g + problem.epsilon * at.psi
        exponent = (f[:, None] + g[None, :] - problem.cost) / problem.epsilon
        new = Scaling(jnp.exp(exponent), f, g)
        zero = Corrections(
            jnp.zeros_like(f), jnp.zeros_like(g), at.phi + at.rows, at.psi + at.columns
        )
        return new, zero

    return when(size > absorb_limit(size.dtype), absorb, (kernel, at))


def absorb_limit(dtype) -> float:
    """Corrections below this cannot overflow, nor lift what had underflowed."""
    return float(np.log(np.finfo(dtype).max)) / 4


def open_scaling(problem, start) -> tuple[tuple, Scaling, Corrections]:
    """The marginal errors at `start`, and a scaling kernel one plain sweep later.

    Safe from any start: the sweep's row half is done before the kernel is built, and
    the kernel is built with every column's largest entry 1, so that neither a row nor a
    column of a far start underflows as a whole.
    """
    f, g = start
    log_a, log_b = jnp.log(problem.a), jnp.log(problem.b)
    tight = tight_scaling(problem, f, g, problem.epsilon)
    top = (f - tight.f) / problem.epsilon
    rows = tight.rows(jnp.zeros_like(g))
    # A start too large for `exp` is far, not diverged: its error stays finite.
    most = float(np.log(np.finfo(f.dtype).max)) / 2
    columns = tight.columns(jnp.minimum(top, most))
    condition = (
        jnp.exp(jnp.minimum(top + rows, most)) - problem.a,
        jnp.exp(jnp.minimum(columns, most)) - problem.b,
    )
    f = tight.f + problem.epsilon * (log_a - rows)
    exponent = (f[:, None] + g[None, :] - problem.cost) / problem.epsilon
    top = jnp.max(exponent, axis=0)
    kernel = Scaling(jnp.exp(exponent - top[None, :]), f, g - problem.epsilon * top)
    zero = jnp.zeros_like(f)
    at = Corrections(zero, jnp.zeros_like(g), log_a, kernel.columns(zero))
    return condition, kernel, sweep(kernel, log_a, log_b, at)


def open_logarithmic(problem, start) -> tuple[tuple, Logarithmic, Corrections]:
    """The marginal errors at `start`, and a log-domain kernel one plain sweep later."""
    f, g = start
    log_a, log_b = jnp.log(problem.a), jnp.log(problem.b)
    exponent = (f[:, None] + g[None, :] - problem.cost) / problem.epsilon
    kernel = Logarithmic(exponent, f, g)
    phi, psi = jnp.zeros_like(f), jnp.zeros_like(g)
    at = Corrections(phi, psi, kernel.rows(psi), kernel.columns(phi))
    return at.condition(problem), kernel, sweep(kernel, log_a, log_b, at)
