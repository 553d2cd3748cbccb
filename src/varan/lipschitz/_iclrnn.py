"""Recurrent networks that are convex in their input and Lipschitz, by their weights.

Weights that are not negative and activations that are convex and increasing make every
output a convex function of the inputs of all steps; spectral norms of one make it
Lipschitz with a constant that grows with the length alone. Models for predictive
control: the cost has one minimum, and noise is not amplified.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from ..core import Certificate
from ..core._checks import check_finite, check_positive, is_traced
from ._norms import spectral_norm_bound
from ._spectral_cap import _on_matrices
from ._transformer import orthogonal, round_up

# Convex, nondecreasing, with slopes of at most one.
_ACTIVATIONS = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "softplus": jax.nn.softplus,
}


class ICLRNN(eqx.Module):
    """An input convex Lipschitz recurrent network, and its two halves.

    Each layer is `h_t = relu(U x_t + V h_(t-1) + b)` from `h = 0`; the outputs are
    `relu(W h_t + c)` at every step. With `convex`, U, V and W have no negative entry
    and the network reads `[x, -x]`, so that it may fall as well as rise in x: every
    output is convex in the inputs of all steps. With `lipschitz`, U, V and W have
    spectral norm one. Biases are free. Either alone is one of the relatives that the
    paper compares with: `lipschitz=False` the input convex network, `convex=False` the
    Lipschitz one, which reads x itself and has a linear output.

    The invariants hold from the start and are kept in training by `project` after each
    step, or by `nonnegative_spectral` as the last link of the optimiser.

    Args:
        inputs: Entries of an input, at least 1.
        outputs: Entries of an output, at least 1; of a convex network never negative,
            so scale the targets to be so.
        hidden: Entries of a layer's state.
        layers: Recurrent layers.
        convex: Whether the weights are kept from being negative.
        lipschitz: Whether their norms are kept at one.
        activation: `"relu"`, `"leaky_relu"` or `"softplus"`, of the hidden states.
        key: Random key of the weights.

    Raises:
        ValueError: If a size is below 1, or the activation is not known to be convex
            and nondecreasing (tanh and sigmoid are not).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.lipschitz import ICLRNN
        >>> rnn = ICLRNN(2, 1, hidden=8, key=jax.random.key(0))
        >>> x, y = jax.random.normal(jax.random.key(1), (2, 5, 2))
        >>> bool(jnp.all(rnn((x + y) / 2) <= (rnn(x) + rnn(y)) / 2 + 1e-6))
        True
        >>> certificate = rnn.certify(5)
        >>> certificate.proof, bool(certificate.value < 2**0.5 * 5**2)
        (True, True)

    Source: Z. Wang and Z. Wu, 2024, "Input Convex Lipschitz RNN: A Fast and Robust
        Approach for Engineering Tasks", arXiv:2401.07494, section 4.

    Differences: Norms are divided by a proved upper bound instead of power iteration's
        estimate. The readout starts normal, not uniform, of Glorot's size. The convex
        relative has the same cell, without the further products of the input convex
        network it is named after, and the Lipschitz relative the same cell with
        spectral norms, not the skew-symmetric one.
    """

    kernels: tuple[Float[Array, "hidden inputs"], ...]
    recurrents: tuple[Float[Array, "hidden hidden"], ...]
    biases: tuple[Float[Array, " hidden"], ...]
    readout: Float[Array, "outputs hidden"]
    readout_bias: Float[Array, " outputs"]
    convex: bool = eqx.field(static=True)
    lipschitz: bool = eqx.field(static=True)
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        hidden: int = 64,
        layers: int = 2,
        convex: bool = True,
        lipschitz: bool = True,
        activation: Literal["relu", "leaky_relu", "softplus"] = "relu",
        key: PRNGKeyArray,
    ):
        if min(inputs, outputs, hidden, layers) < 1:
            raise ValueError(
                "ICLRNN: `inputs`, `outputs`, `hidden` and `layers` must be at least 1 "
                f"(got {inputs}, {outputs}, {hidden}, {layers})."
            )
        if activation not in _ACTIVATIONS:
            raise ValueError(
                "ICLRNN: `activation` must be convex and nondecreasing, one of "
                f"{', '.join(map(repr, _ACTIVATIONS))} (got {activation!r})."
            )
        self.convex, self.lipschitz, self.activation = convex, lipschitz, activation
        shapes = [(hidden, 2 * inputs if convex else inputs)]
        shapes += [(hidden, hidden)] * (2 * layers - 1) + [(outputs, hidden)]
        # One draw for all: what compiles is the generator.
        sizes = [math.prod(shape) for shape in shapes]
        normal = jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes[:-1]))
        drawn = [
            part.reshape(shape) for part, shape in zip(normal, shapes, strict=True)
        ]
        kernels = [0.01 * matrix for matrix in drawn[:layers]]
        recurrents = [0.1 * orthogonal(matrix) for matrix in drawn[layers:-1]]
        readout = math.sqrt(2 / (hidden + outputs)) * drawn[-1]
        self.kernels = tuple(map(self._projected, kernels))
        self.recurrents = tuple(map(self._projected, recurrents))
        self.readout = self._projected(readout)
        self.biases = tuple(jnp.zeros(hidden) for _ in range(layers))
        self.readout_bias = jnp.zeros(outputs)

    def __call__(self, x: Float[Array, "time inputs"]) -> Float[Array, "time outputs"]:
        """The outputs at every step of one sequence."""
        return self.expanded(jnp.concatenate([x, -x], 1) if self.convex else x)

    def expanded(self, x: Float[Array, "time inputs"]) -> Float[Array, "time outputs"]:
        """The same from `[x, -x]`: with `convex`, nondecreasing in every entry."""
        activation = _ACTIVATIONS[self.activation]
        for kernel, recurrent, bias in zip(
            self.kernels, self.recurrents, self.biases, strict=True
        ):

            def step(state, drive, recurrent=recurrent):
                state = activation(drive + recurrent @ state)
                return state, state

            _, x = jax.lax.scan(step, jnp.zeros_like(bias), x @ kernel.T + bias[None])
        out = x @ self.readout.T + self.readout_bias[None]
        return jax.nn.relu(out) if self.convex else out

    def project(self) -> ICLRNN:
        """The network with its weights clipped at zero, then divided by their norms.

        In this order: clipping changes norms, dividing changes no sign.
        """

        def weights(model):
            return (*model.kernels, *model.recurrents, model.readout)

        return eqx.tree_at(weights, self, tuple(map(self._projected, weights(self))))

    def _projected(self, matrix):
        return _project(matrix, self.convex, self.lipschitz)

    def certify(self, horizon: int) -> Certificate:
        """How much an input sequence can move the outputs, at most, and convexity.

        Layer by layer the sizes of a step's change bound those of all later ones,
        `|dh_t| <= sum_k |V|^(t-k) |U| |dx_k|`; the product of these triangular matrices
        is taken, so that the constant of two layers is less than the product of
        theirs. With unit norms one layer's last state moves by at most `sqrt(horizon)`
        and all its states by less than `horizon` times the input, in Frobenius norms;
        reading `[x, -x]` costs at most `sqrt(2)`.

        Args:
            horizon: Steps of the sequence, at least 1.

        Returns:
            A proof for the map from a sequence to all outputs. `details["last"]` is
            the constant of the last output alone; with `convex` the statement says
            that every output is convex. Norms of nonnegative matrices are bounded by
            Collatz-Wielandt quotients.

        Raises:
            ValueError: If `horizon` is below 1, a weight is not finite, or one of a
                convex network is negative.
            TypeError: Under `jit`.
        """
        weights = (*self.kernels, *self.recurrents, self.readout)
        self._check(horizon, weights)
        norms = [_norm(matrix, self.convex) for matrix in weights]
        layers = len(self.kernels)
        if self.convex:
            rise, fall = jnp.split(self.kernels[0], 2, axis=1)
            norms[0] = min(math.sqrt(2) * norms[0], _norm(rise - fall, False))
        later = np.subtract.outer(np.arange(horizon), np.arange(horizon))
        through = np.eye(horizon)
        with np.errstate(over="ignore", invalid="ignore"):
            for kernel, recurrent in zip(norms[:layers], norms[layers:-1], strict=True):
                decay = np.where(later >= 0, recurrent ** np.maximum(later, 0.0), 0.0)
                through = kernel * decay @ through
            through = norms[-1] * through
        # Outward by the float64 rounding of some products of this size.
        slack = 1 + 8 * (horizon + 2) * (layers + 2) * np.finfo(np.float64).eps
        finite = bool(np.all(np.isfinite(through)))
        every = float(np.linalg.norm(through, 2)) * slack if finite else math.inf
        last = float(np.linalg.norm(through[-1])) * slack if finite else math.inf
        statement = "|f(X) - f(Y)| <= value |X - Y| for sequences X, Y of `horizon` "
        statement += "steps, in Frobenius norms"
        if self.convex:
            statement += "; every output is convex in the whole sequence"
        return Certificate(
            "Lipschitz bound",
            round_up(every),
            proof=True,
            statement=statement,
            details={"last": jnp.asarray(round_up(last))},
        )

    def _check(self, horizon, weights):
        if horizon < 1:
            raise ValueError(
                f"ICLRNN.certify: `horizon` must be at least 1 (got {horizon})."
            )
        if any(map(is_traced, weights)):
            raise TypeError(
                "ICLRNN.certify: the weights must be concrete (got traced ones). Call "
                "it outside `jit`."
            )
        for matrix in weights:
            check_finite("ICLRNN.certify", "weights", matrix)
        if self.convex and any(np.min(np.asarray(m)) < 0 for m in weights):
            raise ValueError(
                "ICLRNN.certify: the weights of a convex network must not be negative "
                f"(got {min(float(jnp.min(m)) for m in weights):.3g}). Call `project`."
            )


def nonnegative_spectral(norm: float = 1.0) -> optax.GradientTransformation:
    """Keeps matrices free of negative entries and at a spectral norm: the last link.

    After each step a matrix is clipped at zero, then divided by a proved bound of its
    norm (a Collatz-Wielandt quotient) and multiplied by `norm`. In this order both
    hold. Vectors pass; matrices that must stay free are kept out by `optax.masked`.

    Args:
        norm: The spectral norm, positive; a matrix that is zero stays so.

    Returns:
        An optax transformation without state; `update` needs the parameters.

    Raises:
        ValueError: If `norm` is not positive or `update` is called without parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import nonnegative_spectral
        >>> weight, last = jnp.array([[2.0, -1.0], [0.0, 2.0]]), nonnegative_spectral()
        >>> change, _ = last.update(0 * weight, last.init(weight), weight)
        >>> (weight + change).round(3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    Source: Z. Wang and Z. Wu, 2024, arXiv:2401.07494, algorithm 1.
    """
    check_positive("nonnegative_spectral", "norm", norm)

    def projected(matrix, update):
        return norm * _project(matrix + update, True, True)

    return _on_matrices("nonnegative_spectral", projected)


def _project(matrix, convex, lipschitz):
    if convex:
        matrix = jnp.maximum(matrix, 0)
    if lipschitz:
        one = partial(spectral_norm_bound, method="collatz" if convex else "gram")
        size = jnp.vectorize(one, signature="(r,c)->()")(matrix)[..., None, None]
        matrix = matrix / jnp.where(size > 0, size, 1)
    return matrix


def _norm(matrix, nonnegative):
    return float(_compiled_bound(matrix, method="collatz" if nonnegative else "svd"))


_compiled_bound = jax.jit(spectral_norm_bound, static_argnames="method")
