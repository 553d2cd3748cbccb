"""What certified bounds bring back."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..core import Certificate


class Certified(eqx.Module):
    """A result whose field `certificate` says it in a sentence."""

    @property
    def kind(self) -> str:
        """`"proof"` or `"estimate"`."""
        return "proof" if self.certificate.proof else "estimate"

    def __str__(self) -> str:
        return str(self.certificate)


class LipschitzResult(Certified):
    """A local Lipschitz constant between two numbers that hold.

    Args:
        bound: Upper bound of the constant over all rows.
        per_row: Upper bound of each row's dual norm (l1 for `"linf"`, l2 for `"l2"`).
        jac_lower: Lower bounds of the Jacobian's entries, (rows, *input shape).
        jac_upper: Upper bounds.
        attained: The largest value found at a point: a lower bound of the constant. 0
            at points on a kink of an activation, where what is computed need not be a
            derivative.
        attained_at: That point.
        domains: Number of branches bounded; 1 for each row without branch and bound.
        certificate: The statement that `bound` proves.
    """

    bound: Float[Array, ""]
    per_row: Float[Array, " rows"]
    jac_lower: Float[Array, "rows ..."]
    jac_upper: Float[Array, "rows ..."]
    attained: Float[Array, ""]
    attained_at: Float[Array, ...]
    domains: Int[Array, ""]
    certificate: Certificate

    @property
    def gap(self) -> Float[Array, ""]:
        """How far the bound may lie above the constant: `bound - attained`."""
        return self.bound - self.attained


def certify_bound(bound, per_row, attained, norm: str, unbounded: bool) -> Certificate:
    """The certificate of a Lipschitz bound."""
    where = "all inputs (the box has infinite sides)" if unbounded else "the box"
    measure = {"linf": "inf", "l2": "2"}[norm]
    return Certificate(
        "Lipschitz bound",
        bound,
        proof=True,
        statement=f"|C (f(x) - f(y))|_{measure} <= value |x - y|_{measure} "
        f"for x, y in {where}; rounding is covered outward",
        details={"attained": jnp.asarray(attained), "per_row": per_row},
    )
