"""A network that is convex in its input, and its gradient map."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ..core._checks import check_nonnegative


class _ConvexLayer(eqx.Module):
    """`softplus(raw) z + skip(x)`: convex in `x` where `z` is."""

    raw: Float[Array, "outputs inputs"]
    skip: eqx.nn.Linear

    def __init__(self, inputs, outputs, size, key):
        one, two = jax.random.split(key)
        # Weights around 1 / inputs: the scale of `z` passes through.
        around = float(np.log(np.expm1(1 / inputs)))
        self.raw = around + 0.1 * jax.random.normal(one, (outputs, inputs))
        self.skip = eqx.nn.Linear(size, outputs, key=two)

    def __call__(self, z, x):
        return jax.nn.softplus(self.raw) @ z + self.skip(x)


class InputConvex(eqx.Module):
    """A scalar function `f` of a vector, convex by construction, and smooth.

    Layers `z <- softplus(softplus(W) z + A x + b)`: nonnegative weights on what is
    convex already, free weights on the input, an activation that is convex and
    increasing. Whatever the parameters are, `f` is convex, and `gradient` is a
    monotone map: by Brenier's theorem the form of an optimal transport map.

    Args:
        size: Entries of the input, at least 1.
        widths: Entries of each hidden layer, at least one layer.
        strong: `strong / 2 |x|^2` is added, so that `f` is strongly convex with that
            constant; not negative.
        key: Random key of the weights.

    Raises:
        ValueError: If a size is below 1 or `strong` is negative.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.nets import InputConvex
        >>> f = InputConvex(2, key=jax.random.key(0))
        >>> x, y = jnp.array([1.0, -2.0]), jnp.array([3.0, 0.5])
        >>> bool(f((x + y) / 2) <= (f(x) + f(y)) / 2), f.gradient(x).shape
        (True, (2,))

    Source: B. Amos, L. Xu, J. Z. Kolter, 2017, "Input convex neural networks",
        arXiv:1609.07152, proposition 1 (fully input convex).
    """

    first: eqx.nn.Linear
    layers: tuple[_ConvexLayer, ...]
    strong: float

    def __init__(
        self,
        size: int,
        widths: Sequence[int] = (64, 64),
        *,
        strong: float = 0.0,
        key: PRNGKeyArray,
    ):
        if not widths or min(size, *widths) < 1:
            raise ValueError(
                "InputConvex: `size` and at least one of `widths` must be positive "
                f"(got {size}, {tuple(widths)})."
            )
        check_nonnegative("InputConvex", "strong", strong)
        one, *keys = jax.random.split(key, len(widths) + 1)
        self.first = eqx.nn.Linear(size, widths[0], key=one)
        self.layers = tuple(
            _ConvexLayer(a, b, size, key)
            for a, b, key in zip(widths, (*widths[1:], 1), keys, strict=True)
        )
        self.strong = strong

    def __call__(self, x: Float[Array, " size"]) -> Float[Array, ""]:
        """The value at one point."""
        z = jax.nn.softplus(self.first(x))
        for layer in self.layers[:-1]:
            z = jax.nn.softplus(layer(z, x))
        return self.layers[-1](z, x)[0] + self.strong / 2 * jnp.sum(x * x)

    def gradient(self, x: Float[Array, " size"]) -> Float[Array, " size"]:
        """The gradient at one point, a monotone map."""
        return jax.grad(lambda point: self(point))(x)
