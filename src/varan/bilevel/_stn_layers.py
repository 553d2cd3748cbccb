"""Layers whose weights respond to hyperparameters.

A layer's optimal weights depend on the hyperparameters `h` that it is trained under.
To first order a shift of `h` moves them along a few directions; for a linear network
with an L2-regularised Jacobian the exact response gates each hidden unit by a number
that depends on `h`. So the response is modelled as two layers, one of them gated row
by row:

    out = s (W x + b) + (V_w h) o (U x) + (V_b h) o c

which costs two layers' memory and time, not one for each hyperparameter.
"""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..core._checks import check_shape

# Small enough that the response is flat at first.
_GATE = 0.01


class HyperLinear(eqx.Module):
    """A linear layer that responds to hyperparameters.

    Two matrix products a call.

    Args:
        inputs: Entries of the input.
        outputs: Entries of the output.
        hyperparameters: Entries of `h`, at least 1.
        key: Random key of the weights.

    Raises:
        ValueError: If `hyperparameters` is below 1, or `h` has another length.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.bilevel import HyperLinear
        >>> layer = HyperLinear(3, 2, 1, key=jax.random.key(0))
        >>> x, h = jnp.ones(3), jnp.array([0.5])
        >>> bool(jnp.allclose(layer(x, h), layer.response(h)(x)))
        True

    Source: M. MacKay, P. Vicol, J. Lorraine, D. Duvenaud, R. Grosse, 2019,
        "Self-tuning networks", arXiv:1903.03088, equation 9; the scale `s` and the
        starting values are those of the authors' code.
    """

    base: eqx.nn.Linear
    gated: eqx.nn.Linear
    gates: Float[Array, "2 outputs hyperparameters"]
    scale: Float[Array, ""]

    def __init__(
        self, inputs: int, outputs: int, hyperparameters: int, *, key: PRNGKeyArray
    ):
        one, two, three = jax.random.split(key, 3)
        self.base = eqx.nn.Linear(inputs, outputs, key=one)
        self.gated = eqx.nn.Linear(inputs, outputs, key=two)
        self.gates = _draw_gates("HyperLinear", three, outputs, hyperparameters)
        self.scale = jnp.ones((), self.gates.dtype)

    def __call__(
        self, x: Float[Array, " inputs"], h: Float[Array, " hyperparameters"]
    ) -> Float[Array, " outputs"]:
        """The output at unconstrained hyperparameters `h`."""
        weight, bias = _gate(self, h)
        assert self.gated.bias is not None
        return (
            self.scale * self.base(x)
            + weight * (self.gated.weight @ x)
            + bias * self.gated.bias
        )

    def response(self, h: Float[Array, " hyperparameters"]) -> eqx.nn.Linear:
        """The plain layer that this one is at `h`."""
        weight, bias = _gate(self, h)
        return _combine(self, weight[:, None], bias)


class HyperConv(eqx.Module):
    """A convolution that responds to hyperparameters, channel by channel.

    Two convolutions a call.

    Args:
        dimensions: Spatial dimensions, 1 to 3.
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        kernel: Side of the filters.
        hyperparameters: Entries of `h`, at least 1.
        stride: Steps between outputs.
        padding: Zeros around the input.
        key: Random key of the weights.

    Raises:
        ValueError: If `hyperparameters` is below 1, or `h` has another length.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.bilevel import HyperConv
        >>> layer = HyperConv(2, 1, 4, 3, 2, padding=1, key=jax.random.key(0))
        >>> layer(jnp.ones((1, 8, 8)), jnp.zeros(2)).shape
        (4, 8, 8)

    Source: M. MacKay, P. Vicol, J. Lorraine, D. Duvenaud, R. Grosse, 2019,
        "Self-tuning networks", arXiv:1903.03088, section 3.2.
    """

    base: eqx.nn.Conv
    gated: eqx.nn.Conv
    gates: Float[Array, "2 channels_out hyperparameters"]
    scale: Float[Array, ""]

    def __init__(
        self,
        dimensions: int,
        channels_in: int,
        channels_out: int,
        kernel: int,
        hyperparameters: int,
        *,
        stride: int = 1,
        padding: int = 0,
        key: PRNGKeyArray,
    ):
        one, two, three = jax.random.split(key, 3)
        sizes = (dimensions, channels_in, channels_out, kernel, stride, padding)
        self.base = eqx.nn.Conv(*sizes, key=one)
        self.gated = eqx.nn.Conv(*sizes, key=two)
        self.gates = _draw_gates("HyperConv", three, channels_out, hyperparameters)
        self.scale = jnp.ones((), self.gates.dtype)

    def __call__(
        self, x: Float[Array, "channels_in ..."], h: Float[Array, " hyperparameters"]
    ) -> Float[Array, "channels_out ..."]:
        """The output at unconstrained hyperparameters `h`."""
        # One convolution with the weights at `h` would be cheaper for one `h`, but
        # every sample of a batch has its own.
        weight, bias = _gate(self, h)
        constant = self.gated.bias
        assert constant is not None
        spatial = (-1,) + (1,) * (x.ndim - 1)
        return self.scale * self.base(x) + (
            weight.reshape(spatial) * (self.gated(x) - constant)
            + bias.reshape(spatial) * constant
        )

    def response(self, h: Float[Array, " hyperparameters"]) -> eqx.nn.Conv:
        """The plain layer that this one is at `h`."""
        weight, bias = _gate(self, h)
        spatial = (-1,) + (1,) * (self.base.weight.ndim - 1)
        return _combine(self, weight.reshape(spatial), bias.reshape(spatial[:-1]))


class FixedLayer(eqx.Module):
    """A plain layer in the place of one that responds; `respond` makes them.

    Args:
        layer: The plain layer.
    """

    layer: eqx.nn.Linear | eqx.nn.Conv

    def __call__(self, x: Array, h: Array | None = None) -> Array:
        """The plain layer's output, whatever `h` is."""
        del h
        return self.layer(x)


def respond(model: PyTree, h: Float[Array, " hyperparameters"]) -> PyTree:
    """The plain network that a model of responding layers is at `h`.

    Args:
        model: Any pytree with `HyperLinear` and `HyperConv` layers.
        h: Unconstrained hyperparameters.

    Returns:
        The model with a `FixedLayer` for each of them: it is called as before, ignores
        its `h`, and has no more parameters than a plain network.

    Raises:
        ValueError: If the model has no such layer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.bilevel import HyperLinear, respond
        >>> layer, h = HyperLinear(3, 2, 1, key=jax.random.key(0)), jnp.array([0.5])
        >>> plain = respond({"layer": layer}, h)["layer"]
        >>> bool(jnp.allclose(plain(jnp.ones(3)), layer(jnp.ones(3), h)))
        True
    """
    if not responding_layers(model):
        raise ValueError(
            "respond: `model` must hold layers that respond to hyperparameters (got "
            "none). Build it with HyperLinear or HyperConv."
        )
    return jtu.tree_map(
        lambda node: FixedLayer(node.response(h)) if _responds(node) else node,
        model,
        is_leaf=_responds,
    )


def responding_layers(model: PyTree) -> Sequence[HyperLinear | HyperConv]:
    """The layers of a model that respond to hyperparameters."""
    return [n for n in jtu.tree_leaves(model, is_leaf=_responds) if _responds(n)]


def _responds(node):
    return isinstance(node, HyperLinear | HyperConv)


def _draw_gates(owner, key, outputs, hyperparameters):
    if hyperparameters < 1:
        raise ValueError(
            f"{owner}: `hyperparameters` must be at least 1 (got {hyperparameters})."
        )
    return _GATE * jax.random.normal(key, (2, outputs, hyperparameters))


def _gate(layer, h):
    check_shape(type(layer).__name__, "h", h, layer.gates.shape[-1:])
    weight, bias = layer.gates @ h
    return weight, bias


def _combine(layer, weight, bias):
    return eqx.tree_at(
        lambda plain: (plain.weight, plain.bias),
        layer.base,
        (
            layer.scale * layer.base.weight + weight * layer.gated.weight,
            layer.scale * layer.base.bias + bias * layer.gated.bias,
        ),
    )
