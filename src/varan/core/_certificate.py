"""What is known about an answer: a number, and whether it is a proof or an estimate."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ._checks import is_traced


class Certificate(eqx.Module):
    """What was measured at an answer, and what it says.

    `proof=True` means that `statement` follows from the data by a theorem, up to the
    rounding of the few operations that evaluated it; anything sampled, iterated or
    extrapolated is an estimate. A certificate says nothing beyond its statement.

    Args:
        kind: What was measured: `"residual"`, `"duality gap"`, `"marginal error"`,
            `"Lipschitz bound"`, ...
        value: The measured number (a scalar; one for each lane under `vmap`).
        tol: The tolerance it must not exceed; `None` for a certificate that is a
            bound and has no target.
        proof: Whether `statement` is proved or estimated.
        statement: What holds, in words, with `value` for the number.
        details: Further named numbers that support the statement.

    Example:
        >>> from varan import Certificate
        >>> Certificate("duality gap", 1e-9, tol=1e-6, proof=True,
        ...             statement="f(x) - min f <= value").met
        Array(True, dtype=bool)
    """

    kind: str = eqx.field(static=True)
    value: Float[Array, ""]
    tol: Float[Array, ""] | None
    proof: bool = eqx.field(static=True)
    statement: str = eqx.field(static=True)
    details: dict[str, Array]

    def __init__(
        self,
        kind: str,
        value,
        *,
        tol=None,
        proof: bool,
        statement: str,
        details: dict[str, Array] | None = None,
    ):
        self.kind = kind
        # Of a definite dtype: a weakly typed float would change the types downstream.
        self.value = jnp.asarray(value, jnp.result_type(value))
        self.tol = None if tol is None else jnp.asarray(tol, jnp.result_type(tol))
        self.proof = proof
        self.statement = statement
        self.details = {} if details is None else details

    @property
    def met(self) -> Bool[Array, ""]:
        """Whether `value <= tol`; without a tolerance, whether `value` is finite.

        NaN never meets a tolerance.
        """
        if self.tol is None:
            return jnp.isfinite(self.value)
        return self.value <= self.tol

    def __str__(self) -> str:
        word = "proof" if self.proof else "estimate"
        value = format_number(self.value)
        if self.tol is None:
            return f"{self.kind} {value} ({word}): {self.statement}"
        verdict = format_flag(self.met, "met", "not met")
        return f"{self.kind} {value}, {verdict} ({word}): {self.statement}"


def format_number(value) -> str:
    """A scalar as a short number; an array of lanes as its range."""
    if is_traced(value):
        return "(traced)"
    array = np.asarray(value)
    if array.size == 0:
        return "(no lanes)"
    if np.min(array) == np.max(array):
        first = array.flat[0].item()
        return str(first) if isinstance(first, int) else f"{first:.3g}"
    if np.issubdtype(array.dtype, np.integer):
        return f"{np.min(array)} .. {np.max(array)} over {array.size} lanes"
    if array.ndim == 0:
        return f"{array.item():.3g}"
    return f"{np.min(array):.3g} .. {np.max(array):.3g} over {array.size} lanes"


def format_flag(value, yes: str, no: str) -> str:
    """A boolean in words; an array of lanes as a count."""
    if is_traced(value):
        return f"{yes}/{no} (traced)"
    array = np.asarray(value)
    if array.ndim == 0:
        return yes if array else no
    if array.all():
        return yes
    return f"{yes} in {int(array.sum())} of {array.size} lanes"
