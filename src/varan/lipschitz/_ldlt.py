"""Residual blocks that are Lipschitz by construction: a factorised matrix inequality.

A block `y = A x + B w_n + b`, `w_0 = x`, `w_i = s(C_i w_{i-1} + b_i)`, whose activation
has slopes in `[m, M]`, is L-Lipschitz if for positive diagonal multipliers `Lam_i` a
cyclic block-tridiagonal matrix over `(x, w_1, ..., w_n)` is positive semidefinite. Its
block LDL' factorisation, the output eliminated last, has positive pivots exactly where
the matrix is positive definite, and each pivot's condition says that one matrix is a
contraction. Free matrices give the contractions, so plain gradient descent moves
through all networks that the inequality admits, and through no other.

Take it where the constant has to hold end to end; one matrix inequality over many
layers is far tighter than the product of their norms, which blocks in a row multiply
again. Costs a few Cholesky factorisations a layer, cubic in its width, once a batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, PRNGKeyArray

from ..core import Certificate
from ..core._checks import check_finite, check_positive, is_traced

Slopes = tuple[float, float]

# Where an activation's slopes are sampled: chords of exactly representable length.
_REACH, _SPACING, _SLOPE_TOLERANCE = 16.0, 2.0**-6, 1e-3
# Singular values of the contractions at the start: 1/sqrt(2) makes hidden layers
# orthogonal, and the output's leave one per cent of the constant.
_HIDDEN_SHIFT, _OUTPUT_SHIFT = 1.0, 0.02


class ResidualBlock(eqx.Module):
    """`y = A x + B w_n + b`, `w_0 = x`, `w_i = s(C_i w_{i-1} + b_i)`, written out.

    What `LDLTBlock.explicit` returns: take it to evaluate a trained block many times.
    Any residual network of this form can be certified by multipliers of one's own.

    Args:
        skip: `A`, zero for a feed-forward block.
        hidden: `C_1 ... C_n`.
        output: `B`.
        biases: `b_1 ... b_n`.
        bias: `b`.
        multipliers: The diagonals of `Lam_1 ... Lam_n`, positive.
        lipschitz: The constant that the multipliers are meant to prove.
        activation: Acts entry by entry.
        slopes: `(m, M)` of the activation.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.lipschitz import ResidualBlock, certify
        >>> one = jnp.eye(2)
        >>> block = ResidualBlock(one, (one,), -one, (jnp.zeros(2),), jnp.zeros(2),
        ...     (jnp.ones(2),), 1.0, jax.nn.relu, (0.0, 1.0))  # min(x, 0)
        >>> round(float(certify(block).value), 3)
        1.0
    """

    skip: Float[Array, "out in"]
    hidden: tuple[Float[Array, "width before"], ...]
    output: Float[Array, "out width"]
    biases: tuple[Float[Array, " width"], ...]
    bias: Float[Array, " out"]
    multipliers: tuple[Float[Array, " width"], ...]
    lipschitz: float = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)
    slopes: Slopes = eqx.field(static=True)

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        """The output for one input."""
        w = x
        for matrix, bias in zip(self.hidden, self.biases, strict=True):
            w = self.activation(matrix @ w + bias)
        return self.skip @ x + self.output @ w + self.bias


class LDLTBlock(eqx.Module):
    """A residual or feed-forward block whose Lipschitz constant (l2) is `lipschitz`.

    Holds free matrices; the weights are computed from them at every call, once for a
    batch under `vmap`, by some Cholesky factorisations and triangular solves: about
    `4 (width^3 + width^2 before)` operations a hidden layer, and for a residual block
    `in_size^3` more. Every block for which the matrix inequality is strict is reached.
    Over many blocks use `jax.lax.map`: on a processor of few cores, batched
    factorisations that run side by side can wait for each other's threads for ever.

    Args:
        in_size: Entries of the input.
        out_size: Entries of the output.
        widths: Of the hidden layers, at least one.
        lipschitz: The constant, positive.
        activation: Acts entry by entry.
        slopes: Least and greatest slope `(m, M)` of the activation: `(0, 1)` for ReLU,
            tanh, sigmoid, softplus and leaky ReLU; `(-0.13, 1.13)` for GELU.
        residual: Whether the input reaches the output by a matrix of its own.
        key: Random key of the free matrices, orthogonal at the start.

    Raises:
        ValueError: A size below 1, no width, a constant that is not positive and
            finite, slopes out of order, or an activation seen to leave them.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.lipschitz import LDLTBlock, certify
        >>> block = LDLTBlock(4, 3, (8, 8), lipschitz=2.0, key=jax.random.key(0))
        >>> jax.vmap(block)(jnp.ones((5, 4))).shape
        (5, 3)
        >>> found = certify(block)
        >>> found.proof, bool(found.value < 2.001)
        (True, True)

    Source:
        Juston, Sreenivas, Nottage and Soylemezoglu, 2025, "LDLT L-Lipschitz Network:
        Generalized Deep End-To-End Lipschitz Network Construction", arXiv:2512.05915.

    Differences: The output is eliminated after the hidden layers, which takes any
        slopes and diagonal multipliers and keeps the whole class. Order of factors
        and learnt shifts are ours. Dense layers only.
    """

    factors: tuple[_Contraction, ...]
    last: _Contraction
    log_multipliers: tuple[Float[Array, " width"], ...]
    biases: tuple[Float[Array, " width"], ...]
    bias: Float[Array, " out"]
    in_size: int = eqx.field(static=True)
    lipschitz: float = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)
    slopes: Slopes = eqx.field(static=True)
    residual: bool = eqx.field(static=True)

    def __init__(
        self,
        in_size: int,
        out_size: int,
        widths: Sequence[int],
        *,
        lipschitz: float = 1.0,
        activation: Callable[[Array], Array] = jax.nn.relu,
        slopes: Slopes = (0.0, 1.0),
        residual: bool = True,
        key: PRNGKeyArray,
    ):
        if not widths or min(in_size, out_size, *widths) < 1:
            raise ValueError(
                "LDLTBlock: `in_size`, `out_size` and at least one of `widths` must be "
                f"positive (got {in_size}, {out_size}, {tuple(widths)})."
            )
        check_positive("LDLTBlock", "lipschitz", lipschitz)
        check_slopes("LDLTBlock", activation, slopes)
        *keys, final = jax.random.split(key, len(widths) + 1)
        sizes = (in_size, *widths)
        self.factors = tuple(
            _Contraction(after, before, _HIDDEN_SHIFT, k)
            for before, after, k in zip(sizes, widths, keys, strict=False)
        )
        seen = widths[-1] + (in_size if residual else 0)
        self.last = _Contraction(out_size, seen, _OUTPUT_SHIFT, final)
        self.log_multipliers = tuple(jnp.zeros(w) for w in widths)
        self.biases = tuple(jnp.zeros(w) for w in widths)
        self.bias = jnp.zeros(out_size)
        self.in_size = in_size
        self.lipschitz = float(lipschitz)
        self.activation = activation
        self.slopes = (float(slopes[0]), float(slopes[1]))
        self.residual = residual

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        """The output for one input."""
        return self.explicit()(x)

    def explicit(self) -> ResidualBlock:
        """The block with its matrices computed from the free ones.

        With `D_i = F_i F_i'` the pivots, `K_i` the contractions and `X_i' X_i` the
        inverse of `D_i` between the multipliers' roots: `C_i = sqrt(2) / (M - m)
        Lam_i^(-1/2) K_i F_{i-1}'`, `F_i = Lam_i^(1/2) X_i^(-1)`, `F_0 = L I`. What the
        skip `A` spends is `A Q A'`, and the last contraction is `[A Q^(1/2), K]`, from
        which `B = (K - A G_n) F_n'`.
        """
        low, high = self.slopes
        width, total = high - low, high + low
        dtype = self.bias.dtype
        through = _Passage(None, jnp.asarray(self.lipschitz, dtype), True)
        carried = jnp.eye(self.in_size, dtype=dtype) / self.lipschitz
        spent = jnp.zeros_like(carried)
        hidden = []
        for factor, log in zip(self.factors, self.log_multipliers, strict=True):
            root = jnp.exp(log / 2)
            lower, shift = factor.cholesky()
            free = factor.free
            contraction = solve_triangular(lower, free, lower=True)
            matrix = through.transposed_after(contraction)
            hidden.append(math.sqrt(2) / width * matrix / root[:, None])
            inverse, is_lower = _inverse_root(lower, shift, self.slopes)
            if self.residual:
                spent = spent + _spent(carried, free, lower, shift, self.slopes)
                scale = total / (math.sqrt(2) * width * shift)
                after = solve_triangular(
                    inverse, lower.T @ free, lower=is_lower, trans="T"
                )
                carried = scale * carried @ after.T
            through = _Passage(inverse, root, is_lower)
        last = self.last.matrix()
        if self.residual:
            first, last = last[:, : self.in_size], last[:, self.in_size :]
            root = jnp.linalg.cholesky(_symmetric(spent))
            skip = solve_triangular(root, first.T, lower=True, trans="T").T
            last = last - skip @ carried
        else:
            skip = jnp.zeros((len(self.bias), self.in_size), dtype)
        return ResidualBlock(
            skip,
            tuple(hidden),
            through.transposed_after(last),
            self.biases,
            self.bias,
            tuple(jnp.exp(log) for log in self.log_multipliers),
            self.lipschitz,
            self.activation,
            self.slopes,
        )


class _Contraction(eqx.Module):
    """`K = T^{-1} V` with `T T' = V V' + a I`: every strict contraction, from a free V.

    The shift `a` is learnt; it only scales V, but spares descent to make V large.
    """

    free: Float[Array, "rows columns"]
    log_shift: Float[Array, ""]

    def __init__(self, rows, columns, shift, key):
        make = jax.nn.initializers.orthogonal()
        self.free = make(key, (rows, columns), jnp.result_type(float))
        self.log_shift = jnp.asarray(math.log(shift), self.free.dtype)

    def cholesky(self):
        """`T`, and the shift with what keeps the factorisation from breaking down."""
        gram = self.free @ self.free.T
        eps = jnp.asarray(jnp.finfo(gram.dtype).eps, gram.dtype)
        shift = jnp.exp(self.log_shift) + 4 * eps * (jnp.trace(gram) + 1)
        eye = jnp.eye(len(gram), dtype=gram.dtype)
        return jnp.linalg.cholesky(gram + shift * eye), shift

    def matrix(self):
        lower, _ = self.cholesky()
        return solve_triangular(lower, self.free, lower=True)


class _Passage(NamedTuple):
    """A pivot's factor `F = diag(root) X^{-1}`, X triangular; absent at the input."""

    inverse: Array | None
    root: Array
    lower: bool

    def transposed_after(self, matrix):
        """`matrix F'`."""
        if self.inverse is not None:
            matrix = solve_triangular(self.inverse, matrix.T, lower=self.lower).T
        return matrix * jnp.broadcast_to(self.root, matrix.shape[1:])[None]


def _inverse_root(lower, shift, slopes):
    """`X` with `X' X = ((m + M)^2 T' T / 2a - 2 m M I) / (M - m)^2`."""
    m, high = slopes
    if m * high == 0:
        return lower / jnp.sqrt(2 * shift), True
    inner = (high + m) ** 2 / (2 * shift) * lower.T @ lower
    inner = inner - 2 * m * high * jnp.eye(len(lower), dtype=lower.dtype)
    return jnp.linalg.cholesky(_symmetric(inner) / (high - m) ** 2).T, False


def _spent(carried, free, lower, shift, slopes):
    """What the skip spends at one pivot: `G (I + q K' K)^{-1} G'`."""
    m, high = slopes
    mass = carried @ carried.T
    if m * high == 0:
        return mass
    q = 4 * m * high / (high - m) ** 2
    eye = jnp.eye(len(lower), dtype=lower.dtype)
    inner = (1 + q) * (lower @ lower.T - shift * eye) + shift * eye
    root = jnp.linalg.cholesky(_symmetric(inner))
    half = solve_triangular(root, free @ carried.T, lower=True)
    return mass - q * half.T @ half


def _symmetric(matrix):
    return (matrix + matrix.T) / 2


def lmi(block: LDLTBlock | ResidualBlock) -> Float[np.ndarray, "size size"]:
    """The matrix whose positive semidefiniteness proves a block's Lipschitz constant.

    In double precision whatever the block's, outside of jit. Over `(x, w_1, ..., w_n)`:
    `L^2 I - A'A` first, then `2 Lam_i`, the last less `B'B`; neighbours
    `-(m + M) Lam_i C_i`; the corner `-A'B`; and `2 m M C_i' Lam_i C_i` on the
    diagonal before layer i.

    Args:
        block: A block, or any written out with multipliers to prove it by.

    Returns:
        The symmetric matrix.

    Raises:
        ValueError: If called under a transformation, or with entries that are not
            finite.

    Example:
        >>> import jax, numpy as np
        >>> from varan.lipschitz import LDLTBlock, lmi
        >>> matrix = lmi(LDLTBlock(2, 2, (3,), key=jax.random.key(0)))
        >>> matrix.shape, bool(np.linalg.eigvalsh(matrix)[0] > -1e-6)
        ((5, 5), True)

    Source:
        Juston et al., 2025, arXiv:2512.05915; the quadratic constraint of slopes:
        Fazlyab, Robey, Hassani, Morari and Pappas, 2019, arXiv:1906.04893.
    """
    explicit = _in_double("lmi", block)
    return _inequality(explicit, explicit.lipschitz**2)


def certify(block: LDLTBlock | ResidualBlock) -> Certificate:
    """The least Lipschitz constant that a block's own multipliers prove.

    Solves the matrix inequality for the constant in double precision, whatever the
    block was trained in, then widens it until the least eigenvalue exceeds what
    rounding can feign. It never trusts the construction.

    Args:
        block: As in `lmi`.

    Returns:
        A proof whose value bounds `|f(x) - f(y)| / |x - y|` (l2) for the weights as
        they are rounded, up to the rounding of evaluating `f`; infinite where the
        multipliers prove nothing. `details`: `lipschitz`, the constant that was built
        in, and `min_eigenvalue`, that of `lmi(block)`.

    Raises:
        ValueError: If called under a transformation, or with entries that are not
            finite.

    Example:
        >>> import jax
        >>> from varan.lipschitz import LDLTBlock, certify
        >>> block = LDLTBlock(2, 2, (3,), lipschitz=0.5, key=jax.random.key(0))
        >>> print(certify(block).proof, bool(certify(block).value <= 0.5001))
        True True

    Source:
        Juston et al., 2025, arXiv:2512.05915.
    """
    explicit = _in_double("certify", block)
    at_zero = _inequality(explicit, 0.0)
    built_in = _inequality(explicit, explicit.lipschitz**2)
    return Certificate(
        "Lipschitz bound",
        _least_constant(at_zero, explicit.skip.shape[1]),
        proof=True,
        statement="|f(x) - f(y)| <= value |x - y| for all x and y, in the l2 norm",
        details={
            "lipschitz": jnp.asarray(explicit.lipschitz),
            "min_eigenvalue": jnp.asarray(np.linalg.eigvalsh(built_in)[0]),
        },
    )


def _in_double(owner, block) -> ResidualBlock:
    """The explicit block with double-precision NumPy arrays."""
    if any(is_traced(leaf) for leaf in jtu.tree_leaves(block)):
        raise ValueError(
            f"{owner}: `block` must hold numbers (got tracers). Call it outside of jit "
            "and vmap."
        )
    explicit = _explicit(block) if isinstance(block, LDLTBlock) else block
    for leaf in jtu.tree_leaves(explicit):
        check_finite(owner, "block", leaf)
    return jtu.tree_map(lambda leaf: np.asarray(leaf, np.float64), explicit)


_explicit = eqx.filter_jit(LDLTBlock.explicit)


def _inequality(explicit: ResidualBlock, square: float) -> np.ndarray:
    low, high = explicit.slopes
    sizes = [explicit.skip.shape[1], *(len(c) for c in explicit.hidden)]
    ends = np.cumsum([0, *sizes])
    parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
    matrix = np.zeros((ends[-1], ends[-1]))
    matrix[parts[0], parts[0]] = square * np.eye(sizes[0])
    layers = zip(explicit.hidden, explicit.multipliers, parts, parts[1:], strict=False)
    for c, lam, before, after in layers:
        weighted = lam[:, None] * c
        matrix[before, before] += 2 * low * high * c.T @ weighted
        matrix[after, before] = -(low + high) * weighted
        matrix[before, after] = matrix[after, before].T
        matrix[after, after] = 2 * np.diag(lam)
    both = np.zeros((len(explicit.output), ends[-1]))
    both[:, parts[0]] = explicit.skip
    both[:, parts[-1]] += explicit.output
    matrix -= both.T @ both
    return (matrix + matrix.T) / 2


def _least_constant(matrix: np.ndarray, inputs: int) -> float:
    """The least L for which L^2 on the inputs' diagonal makes a matrix definite."""
    diagonal = np.diag(matrix)[inputs:]
    if np.min(diagonal) <= 0:
        return math.inf
    # The multipliers' sizes are taken out, which changes no sign.
    scale = np.concatenate([np.ones(inputs), 1 / np.sqrt(diagonal)])
    matrix = scale[:, None] * matrix * scale[None]
    # What assembling and factorising err by, in norm.
    rounding = 8 * len(matrix) * np.finfo(np.float64).eps
    inner, cross = matrix[inputs:, inputs:], matrix[inputs:, :inputs]
    if np.linalg.eigvalsh(inner)[0] <= rounding * np.linalg.norm(inner):
        return math.inf
    across = np.linalg.solve(inner, cross)
    schur = cross.T @ across - matrix[:inputs, :inputs]
    square = max(np.linalg.eigvalsh((schur + schur.T) / 2)[-1], 0.0)
    widening = 2 * rounding * (1 + np.linalg.norm(across) ** 2)
    for _ in range(64):
        candidate = square + widening * (np.linalg.norm(matrix) + square)
        shifted = matrix.copy()
        shifted[range(inputs), range(inputs)] += candidate
        if np.linalg.eigvalsh(shifted)[0] > rounding * np.linalg.norm(shifted):
            # Rounded up, also in the precision that the certificate keeps.
            return math.sqrt(candidate) * (1 + 2.0**-22)
        widening *= 2
    return math.inf


def check_slopes(owner: str, activation: Callable, slopes: Slopes) -> None:
    """Refuses slopes out of order, and an activation that is seen to leave them."""
    low, high = slopes
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"{owner}: `slopes` must be finite, the least before the greatest (got "
            f"{tuple(slopes)})."
        )
    with jax.ensure_compile_time_eval():
        values = activation(jnp.arange(-_REACH, _REACH + _SPACING, _SPACING))
    if is_traced(values):  # a custom derivative under vmap
        return
    chords = np.diff(np.asarray(values, np.float64)) / _SPACING
    seen = float(chords.min()), float(chords.max())
    if not (seen[0] >= low - _SLOPE_TOLERANCE and seen[1] <= high + _SLOPE_TOLERANCE):
        raise ValueError(
            f"{owner}: `activation` must have slopes in [{low:g}, {high:g}] (saw "
            f"{seen[0]:.3f} to {seen[1]:.3f}). Give its least and greatest slope as "
            "`slopes=(m, M)`."
        )
