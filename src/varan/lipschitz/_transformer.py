"""A transformer whose Lipschitz constant is known, and its bound from the weights.

No normalisation layer: the norms of the matrices do its work. With every matrix at RMS
norm one and embeddings of RMS at most one, the whole map from embedded tokens to logits
is 1-Lipschitz (a little better, since the tokens shrink), in the largest RMS over the
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..core import Certificate
from ..core._checks import check_finite, check_nonnegative, is_traced

# The steepest slope of GELU, at the root of 2: cdf(x) + x pdf(x) there. About 1.1289.
_GELU_SLOPE = 0.5 * (1 + math.erf(1.0)) + math.exp(-1.0) / math.sqrt(math.pi)
_MATRICES = ("query", "key", "value", "out", "up", "down")


class LipschitzTransformer(eqx.Module):
    """A causal transformer without layer norm, made to be trained under norm caps.

    Residual branches are mixed in, `x <- (1 - c) x + c branch(x)` with
    `c = 1 / (2 blocks)`; attention scores are divided by the head's size and its
    output by 3; GELU is divided by its steepest slope; positions enter by rotation;
    no map has a bias. The matrices start orthogonal with RMS norm one, those of a head
    each for itself, so that the network starts 1-Lipschitz. Train the matrices by
    `rms_muon` and `spectral_cap`, the embedding with `rms_cap` last; `lipschitz_bound`
    says what came of it.

    Args:
        words: Size of the vocabulary.
        blocks: Pairs of attention and perceptron.
        heads: Heads of attention.
        width: Entries of a token; a multiple of twice `heads`.
        expansion: Hidden entries of the perceptron over `width`.
        key: Random key of the weights.

    Raises:
        ValueError: If a size is below 1, or `width` is no multiple of twice `heads`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.lipschitz import LipschitzTransformer, lipschitz_bound
        >>> model = LipschitzTransformer(
        ...     7, blocks=2, heads=2, width=8, key=jax.random.key(0))
        >>> model(jnp.array([1, 5, 2])).shape
        (3, 7)
        >>> round(float(lipschitz_bound(model).value), 3)
        0.943

    Source: L. Newhouse, R. P. Hess, F. Cesista, A. Zahorodnii, J. Bernstein and
        P. Isola, 2025, "Training Transformers with Enforced Lipschitz Constants",
        arXiv:2507.13338, section 4.

    Differences: The norms of queries, keys and values are those of each head's matrix:
        a head of a whole matrix of norm one may have norm `sqrt(heads)`. GELU's slope
        is exact to rounding, not 1.1289.
    """

    embedding: Float[Array, "words width"]
    query: Float[Array, "blocks heads size width"]
    key: Float[Array, "blocks heads size width"]
    value: Float[Array, "blocks heads size width"]
    out: Float[Array, "blocks width width"]
    up: Float[Array, "blocks hidden width"]
    down: Float[Array, "blocks width hidden"]
    head: Float[Array, "words width"]

    def __init__(
        self,
        words: int,
        *,
        blocks: int = 3,
        heads: int = 4,
        width: int = 256,
        expansion: int = 4,
        key: PRNGKeyArray,
    ):
        if min(words, blocks, heads, width, expansion) < 1 or width % (2 * heads):
            raise ValueError(
                "LipschitzTransformer: sizes must be at least 1 and `width` a multiple "
                f"of twice `heads` (got words {words}, blocks {blocks}, heads {heads}, "
                f"width {width}, expansion {expansion})."
            )
        size, hidden = width // heads, expansion * width
        shapes = [
            (words, width),
            *[(blocks, heads, size, width)] * 3,
            (blocks, width, width),
            (blocks, hidden, width),
            (blocks, width, hidden),
            (words, width),
        ]
        # One draw for all: what compiles is the generator.
        sizes = [math.prod(shape) for shape in shapes]
        normal = jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes[:-1]))
        table, *rest = (
            part.reshape(shape) for part, shape in zip(normal, shapes, strict=True)
        )
        self.embedding = table / jnp.sqrt(jnp.mean(table**2, -1, keepdims=True))
        self.query, self.key, self.value, self.out, self.up, self.down, self.head = map(
            orthogonal, rest
        )

    def __call__(self, tokens: Int[Array, " time"]) -> Float[Array, "time words"]:
        """The logits of the next token, at every place of one sequence."""
        return self.logits(self.embedding[tokens])

    def logits(
        self, embedded: Float[Array, "time width"]
    ) -> Float[Array, "time words"]:
        """The same from embedded tokens: the map that `lipschitz_bound` bounds."""
        share = 1 / (2 * len(self.out))

        def block(x, weights):
            query, key, value, out, up, down = weights
            x = (1 - share) * x + share * _attention(x, query, key, value, out)
            hidden = jax.nn.gelu(x @ up.T, approximate=False) / _GELU_SLOPE
            return (1 - share) * x + share * (hidden @ down.T), None

        weights = tuple(getattr(self, name) for name in _MATRICES)
        return jax.lax.scan(block, embedded, weights)[0] @ self.head.T

    def capped_bound(self, w_max: float, *, radius: float = 1.0) -> float:
        """What caps alone promise: the bound if every matrix had RMS norm `w_max`.

        Args:
            w_max: Norm of every matrix.
            radius: Largest RMS of an embedded token.

        Returns:
            The bound that `lipschitz_bound` would then give.
        """
        norms = {
            name: np.full(getattr(self, name).shape[:-2], w_max) for name in _MATRICES
        }
        return math.exp(_log_steepness_of_blocks(norms, radius)[0]) * w_max


def lipschitz_bound(
    model: LipschitzTransformer | eqx.nn.MLP | eqx.nn.Linear | eqx.nn.Sequential,
    *,
    radius: float | None = None,
) -> Certificate:
    """How steep a network is, at most, from the exact norms of its weights.

    Distances are root mean squares: of an input vector and an output vector, and for a
    transformer the largest one over the tokens. Perceptrons: the product of the RMS
    norms and the slopes of the activations. Transformers, over all embedded tokens of
    RMS at most `radius`: along the network a Lipschitz constant and the largest RMS r
    are carried; attention multiplies the first by

        `w_out / 3 * w_value (1 + 2 w_query w_key r^2)`,

    the value's part by convexity, the scores' part since a probability's covariance of
    two numbers is at most the product of their largest sizes; heads enter by their
    quadratic mean. Singular values are taken in float64, so this runs outside `jit`.

    Args:
        model: A transformer, or a perceptron with a known activation (relu, tanh,
            sigmoid, softplus, gelu, identity), or linear layers and activations
            (`equinox.nn.Lambda`) in sequence.
        radius: Transformers only: the largest RMS of an embedded token; by default
            that of the embedding table.

    Returns:
        A proof: outward by the rounding of the decomposition and of the product.
        `details["log10"]` is its logarithm, where the bound itself overflows.

    Raises:
        ValueError: If a weight or `radius` is not finite or `radius` is negative.
        TypeError: A layer that is not known, among them layer normalisation, which
            has no finite constant, or a call under `jit`.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from varan.lipschitz import lipschitz_bound
        >>> layer = eqx.nn.Linear(2, 2, key=jax.random.key(0))
        >>> layer = eqx.tree_at(lambda l: l.weight, layer, 3.0 * jnp.eye(2))
        >>> round(float(lipschitz_bound(layer).value), 3)
        3.0

    Source: Newhouse et al., 2025, arXiv:2507.13338, section 5, sharpened: the norms
        are measured, and the radius is carried along.
    """
    arrays = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    if any(is_traced(array) for array in arrays):
        raise TypeError(
            "lipschitz_bound: the weights must be concrete (got traced ones). Call it "
            "outside `jit`."
        )
    for array in arrays:
        check_finite("lipschitz_bound", "model", array)
    if isinstance(model, LipschitzTransformer):
        return _transformer_certificate(model, radius)
    if radius is not None:
        raise ValueError(
            "lipschitz_bound: `radius` is for transformers only, a perceptron's bound "
            f"holds everywhere (got {radius})."
        )
    log = _log_steepness(model)
    return _certificate(log, "|f(x) - f(y)| <= value |x - y| for all x, y, in RMS", {})


def _transformer_certificate(model, radius):
    if radius is None:
        table = np.asarray(model.embedding, np.float64)
        radius = float(np.sqrt(np.mean(table**2, -1)).max()) * (1 + 1e-12)
    check_nonnegative("lipschitz_bound", "radius", radius)
    norms = {name: _rms_norms(getattr(model, name)) for name in _MATRICES}
    with np.errstate(over="ignore"):
        log, reached = _log_steepness_of_blocks(norms, radius)
    return _certificate(
        log + _log(_rms_norms(model.head)),
        "max_t |f(X)_t - f(Y)_t| <= value max_t |X_t - Y_t| in RMS, for all embedded "
        "X, Y with every |X_t|, |Y_t| <= radius",
        {"radius": radius, "last_radius": reached},
    )


def _log_steepness_of_blocks(norms, radius):
    """Logarithm of the blocks' Lipschitz constant, and the radius after them."""
    log = 0.0
    share = 1 / (2 * len(norms["out"]))
    for query, key, value, out, up, down in zip(
        *(norms[name] for name in _MATRICES), strict=True
    ):
        heads = value * (1 + 2 * query * key * radius**2)
        attention = out / 3 * np.sqrt(np.mean(heads**2))
        branch = out / 3 * np.sqrt(np.mean(value**2)) * radius
        first = 1 - share + share * attention
        radius = (1 - share) * radius + share * branch
        second = 1 - share + share * up * down
        # |gelu(x)| <= |x|, and it is divided by its slope.
        radius = (1 - share) * radius + share * up * down * radius / _GELU_SLOPE
        log += _log(first) + _log(second)
    return log, radius


def _log(value):
    return math.log(value) if value else -math.inf


def _log_steepness(layer):
    """Logarithm of the RMS Lipschitz constant of a layer or of layers in sequence."""
    if isinstance(layer, eqx.nn.Linear):
        return _log(_rms_norms(layer.weight))
    if isinstance(layer, eqx.nn.Sequential):
        return sum(_log_steepness(one) for one in layer.layers)
    if isinstance(layer, eqx.nn.Lambda):
        return math.log(_slope(layer.fn))
    if isinstance(layer, eqx.nn.MLP):
        hidden = len(layer.layers) - 1
        curves = hidden * math.log(_slope(layer.activation))
        curves += math.log(_slope(layer.final_activation))
        return curves + sum(_log_steepness(one) for one in layer.layers)
    advice = ""
    if isinstance(layer, eqx.nn.LayerNorm | eqx.nn.RMSNorm | eqx.nn.GroupNorm):
        advice = " It has no finite Lipschitz constant at 0: leave it out and cap the"
        advice += " norms of the weights instead (`spectral_cap`)."
    raise TypeError(
        "lipschitz_bound: `model` must consist of linear layers and known activations "
        f"(got {type(layer).__name__}).{advice}"
    )


def _slope(activation: Callable) -> float:
    """The steepest slope of an activation."""
    slopes = {
        jax.nn.relu: 1.0,
        jnp.tanh: 1.0,
        jax.nn.tanh: 1.0,
        jax.nn.softplus: 1.0,
        jax.nn.sigmoid: 0.25,
        # The tanh form is JAX's default; a little steeper than the exact one.
        jax.nn.gelu: 1.13,
    }
    if activation in slopes:
        return slopes[activation]
    # The identity has many names, and one trace: no operation.
    if not jax.make_jaxpr(activation)(0.0).eqns:
        return 1.0
    raise TypeError(
        "lipschitz_bound: activations must be relu, tanh, sigmoid, softplus, gelu or "
        f"the identity (got {activation})."
    )


def _certificate(log, statement, details):
    # Outward by what a few hundred float64 operations can lose.
    log = log + 1e-12 * (1 + abs(log)) if math.isfinite(log) else log
    with np.errstate(over="ignore"):
        value = np.exp(np.float64(log))
    return Certificate(
        "Lipschitz bound",
        round_up(value),
        proof=True,
        statement=statement,
        details={
            name: jnp.asarray(number)
            for name, number in {**details, "log10": log / math.log(10)}.items()
        },
    )


def round_up(value: float) -> np.floating:
    """A float64 number in the precision at hand, never lower."""
    if jnp.result_type(float) != jnp.float32:
        return np.float64(value)
    with np.errstate(over="ignore"):
        return np.nextafter(np.float32(value), np.float32(np.inf))


def _rms_norms(stack):
    """The RMS norm of each matrix of a stack, outward by the rounding in float64."""
    stack = np.asarray(stack, np.float64)
    out, into = stack.shape[-2:]
    eps = np.finfo(np.float64).eps
    return (
        np.linalg.norm(stack, 2, axis=(-2, -1))
        * (1 + 4 * (out + into) * eps)
        * (into / out) ** 0.5
    )


def orthogonal(
    normal: Float[Array, "*stack out into"],
) -> Float[Array, "*stack out into"]:
    """Uniformly random orthogonal matrices of RMS norm one, from normal ones."""
    out, into = normal.shape[-2:]
    tall = normal if out >= into else jnp.swapaxes(normal, -1, -2)
    matrix, triangle = jnp.linalg.qr(tall)
    diagonal = jnp.diagonal(triangle, axis1=-2, axis2=-1)
    # The sign that the decomposition chooses is not uniform.
    matrix = matrix * jnp.where(diagonal < 0, -1, 1).astype(matrix.dtype)[..., None, :]
    matrix = matrix if out >= into else jnp.swapaxes(matrix, -1, -2)
    return matrix * (out / into) ** 0.5


def _attention(x, query, key, value, out):
    """Causal attention: scores over the head's size, output over 3."""
    queries, keys, values = (
        jnp.einsum("hsw,tw->hts", matrix, x) for matrix in (query, key, value)
    )
    scores = jnp.einsum("hts,hus->htu", _rotate(queries), _rotate(keys))
    scores = scores / query.shape[1]
    later = jnp.arange(len(x))[:, None] < jnp.arange(len(x))[None, :]
    # A finite floor: the diagonal always stands, so nothing overflows.
    scores = jnp.where(later, jnp.finfo(x.dtype).min, scores)
    mixed = jax.nn.softmax(scores, -1) @ values
    joined = jnp.moveaxis(mixed, 0, 1).reshape(len(x), -1)
    return joined @ out.T / 3


def _rotate(x):
    """Rotates pairs of entries by angles that grow with the place; keeps lengths."""
    half = x.shape[-1] // 2
    speeds = 10000.0 ** (-jnp.arange(half, dtype=x.dtype) / half)
    angles = jnp.arange(x.shape[-2], dtype=x.dtype)[:, None] * speeds[None, :]
    cosine, sine = jnp.cos(angles)[None], jnp.sin(angles)[None]
    one, two = x[..., :half], x[..., half:]
    return jnp.concatenate([one * cosine - two * sine, one * sine + two * cosine], -1)
