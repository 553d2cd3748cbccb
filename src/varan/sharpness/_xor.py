"""Flattest two-layer networks on the exclusive or: one knows the rule, one the data.

Inputs are uniform on {-1, 1}^d, the label is x_1 x_2, and a network is
f(x) = sum_i a_i relu(w_i x + b_i). Where the mean squared error is zero, the trace of
its Hessian is twice the mean of |grad f(x)|^2 over the sample. With D = d + 1 (without
biases D = d) and h_i the hidden units, by the inequality of the means

    |grad f|^2 = sum_i h_i^2 + D a_i^2 [h_i > 0] >= 2 sqrt(D) sum_i |a_i| h_i
               >= 2 sqrt(D) |f|,

so no interpolator has a trace below 4 sqrt(D). With biases a network attains this that
is zero on every input it has not seen; the network that computes the rule attains it,
too. Flatness alone does not tell them apart. With the hidden vector normalised the
bound is 2, and again both attain it.

Source: Wen, Li, Ma, 2023 (arXiv 2307.11007).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..core import Certificate
from ..core import _checks as checks

Variant = Literal["plain", "bias", "layernorm"]
_VARIANTS = ("plain", "bias", "layernorm")


class TwoLayer(eqx.Module):
    """f(x) = a relu(W x + b), the network of the theory; one number a sample.

    Args:
        d: Inputs.
        width: Hidden units.
        variant: `"plain"` without biases, `"bias"` with them, `"layernorm"` with biases
            and the hidden vector divided by its norm.
        epsilon: With `"layernorm"`, the least norm that is divided by, small.
        key: Random key: W of variance 1 / d, a of variance 1 / width, b zero.

    Raises:
        ValueError: On sizes below one, another variant, or `epsilon <= 0`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.sharpness import TwoLayer
        >>> net = TwoLayer(4, 8, key=jax.random.key(0))
        >>> net(jnp.ones(4)).shape
        ()

    Source:
        Wen, Li and Ma, 2023, arXiv:2307.11007.
    """

    weight: Float[Array, "m d"]
    bias: Float[Array, " m"] | None
    head: Float[Array, " m"]
    variant: Variant = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)

    def __init__(
        self,
        d: int,
        width: int,
        variant: Variant = "bias",
        *,
        epsilon: float = 1e-6,
        key: PRNGKeyArray,
    ):
        for name, value in (("d", d), ("width", width)):
            if value < 1:
                raise ValueError(
                    f"TwoLayer: `{name}` must be at least 1 (got {value})."
                )
        checks.check_choice("TwoLayer", "variant", variant, _VARIANTS)
        checks.check_positive("TwoLayer", "epsilon", epsilon)
        first, second = jax.random.split(key)
        self.weight = jax.random.normal(first, (width, d)) / np.sqrt(d)
        self.bias = None if variant == "plain" else jnp.zeros(width)
        self.head = jax.random.normal(second, (width,)) / np.sqrt(width)
        self.variant, self.epsilon = variant, epsilon

    def __call__(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """The output for one input."""
        before = self.weight @ x
        hidden = jax.nn.relu(before if self.bias is None else before + self.bias)
        out = jnp.sum(self.head * hidden)
        if self.variant != "layernorm":
            return out
        square = jnp.sum(hidden**2)
        # The square root only of what is divided by: none of zero is differentiated.
        return out / jnp.sqrt(jnp.maximum(square, self.epsilon**2))


def make_xor(
    d: int, n: int, *, key: PRNGKeyArray
) -> tuple[Float[Array, "n d"], Float[Array, " n"]]:
    """Inputs uniform on {-1, 1}^d, with the product of the first two as the label.

    Args:
        d: Dimension, at least 2.
        n: Samples, at least 1.
        key: Random key.

    Returns:
        Inputs and labels, of entries -1 and 1.

    Raises:
        ValueError: If `d` is below 2 or `n` below 1.

    Example:
        >>> import jax
        >>> from varan.sharpness import make_xor
        >>> x, y = make_xor(30, 100, key=jax.random.key(0))
        >>> bool((y == x[:, 0] * x[:, 1]).all())
        True

    Source:
        Wen, Li and Ma, 2023, arXiv:2307.11007.
    """
    _check_dimension("make_xor", d)
    if n < 1:
        raise ValueError(f"make_xor: `n` must be at least 1 (got {n}).")
    x = jax.random.rademacher(key, (n, d)).astype(jnp.result_type(float))
    return x, x[:, 0] * x[:, 1]


def trace_lower_bound(d: int, variant: Variant = "bias") -> float:
    """The least trace of the Hessian that an interpolator of labels +-1 can have.

    Of the mean squared error, without a factor one half, for inputs of entries +-1:
    4 sqrt(d) without biases, 4 sqrt(d + 1) with them. With normalised hidden units it
    is 2, since the derivative in the head is then a unit vector (shorter hidden vectors
    than `epsilon` are sharper still); it is attained where each sample has one active
    unit, for which nothing depends on the first layer.

    Args:
        d: Dimension of the inputs, at least 2.
        variant: Of the network, as in `TwoLayer`.

    Returns:
        The bound.

    Raises:
        ValueError: On `d` below 2 or another variant.

    Example:
        >>> from varan.sharpness import trace_lower_bound
        >>> round(trace_lower_bound(30), 6)
        22.271057

    Source:
        Wen, Li and Ma, 2023, arXiv:2307.11007.
    """
    _check_dimension("trace_lower_bound", d)
    checks.check_choice("trace_lower_bound", "variant", variant, _VARIANTS)
    if variant == "layernorm":
        return 2.0
    return 4 * float(np.sqrt(d + (variant == "bias")))


def interpolation_trace(
    net: Callable[[Float[Array, " d"]], Float[Array, ""]], inputs: Float[Array, "n d"]
) -> Float[Array, ""]:
    """Twice the mean of |grad f(x)|^2: the Hessian's trace wherever the error is zero.

    Exact for the mean squared error (without one half) of any network that fits its
    labels; elsewhere the trace of the Gauss-Newton part. n gradients.

    Args:
        net: A pytree that maps one input to one number.
        inputs: The sample.

    Returns:
        The trace.

    Raises:
        ValueError: If there is no input.

    Example:
        >>> from varan.sharpness import flattest_generalizer, interpolation_trace
        >>> from varan.sharpness import make_xor, trace_lower_bound
        >>> import jax
        >>> x, y = make_xor(8, 20, key=jax.random.key(0))
        >>> trace = interpolation_trace(flattest_generalizer(8), x)
        >>> round(float(trace) / trace_lower_bound(8), 4)
        1.0

    Source:
        Wen, Li and Ma, 2023, arXiv:2307.11007.
    """
    checks.check_nonempty("interpolation_trace", "inputs", inputs)

    def square(x):
        gradient = eqx.filter_grad(lambda net: net(x))(net)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient))

    return 2 * jnp.mean(jax.vmap(square)(inputs))


def flatness_certificate(
    net: TwoLayer,
    inputs: Float[Array, "n d"],
    labels: Float[Array, " n"],
    *,
    tol: float = 1e-6,
) -> Certificate:
    """How far a network is from the flattest that fit the sample.

    Args:
        net: The network.
        inputs: The sample, of entries -1 and 1.
        labels: Their labels, -1 or 1.
        tol: Largest error that counts as fitting a label.

    Returns:
        A certificate whose value is trace / bound: 1 is the flattest. Infinite where
        the network does not fit its labels, for the bound is about those that do.

    Raises:
        ValueError: On inputs or labels of other values, or an empty sample.

    Example:
        >>> import jax
        >>> from varan.sharpness import flatness_certificate, flattest_memorizer
        >>> from varan.sharpness import make_xor
        >>> x, y = make_xor(8, 5, key=jax.random.key(0))
        >>> round(float(flatness_certificate(flattest_memorizer(x, y), x, y).value), 4)
        1.0

    Source:
        Wen, Li and Ma, 2023, arXiv:2307.11007.
    """
    _check_sample("flatness_certificate", inputs, labels)
    trace = interpolation_trace(net, inputs)
    bound = trace_lower_bound(inputs.shape[1], net.variant)
    error = jnp.max(jnp.abs(jax.vmap(net)(inputs) - labels))
    return Certificate(
        "flatness",
        jnp.where(error <= tol, trace / bound, jnp.inf),
        proof=True,
        statement="the Hessian's trace is at most value times that of any interpolator",
        details={"trace": trace, "bound": jnp.asarray(bound), "error": error},
    )


def flattest_memorizer(
    inputs: Float[Array, "n d"],
    labels: Float[Array, " n"],
    *,
    variant: Literal["bias", "layernorm"] = "bias",
) -> TwoLayer:
    """A flattest interpolator that is zero on every input outside the sample.

    One hidden unit a sample, which no other vertex of the cube activates:
    w = r x_i, b = -r (d - 1), a = y_i / r with r^2 = sqrt(d + 1); with normalised units
    a = y_i. Without biases there is none.

    Args:
        inputs: The sample, of entries -1 and 1.
        labels: Their labels, -1 or 1.
        variant: Of the network, as in `TwoLayer`.

    Returns:
        The network; samples that occur twice get one unit.

    Raises:
        ValueError: On inputs or labels of other values, another variant, or equal
            inputs with different labels, which no network fits.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import flattest_memorizer
        >>> x = jnp.array([[1.0, 1.0, 1.0], [-1.0, 1.0, 1.0]])
        >>> net = flattest_memorizer(x, jnp.array([1.0, -1.0]))
        >>> round(float(net(x[0])), 4), float(net(-x[0]))
        (1.0, 0.0)

    Source:
        Wen, Li and Ma, 2023, arXiv:2307.11007.
    """
    owner = "flattest_memorizer"
    checks.check_choice(owner, "variant", variant, _VARIANTS[1:])
    _check_sample(owner, inputs, labels)
    if checks.is_traced(inputs) or checks.is_traced(labels):
        raise TypeError(f"{owner}: the sample must be concrete. Call it outside jit.")
    rows = np.asarray(inputs)
    known, where, counts = np.unique(
        rows, axis=0, return_inverse=True, return_counts=True
    )
    means = np.bincount(where.ravel(), np.asarray(labels)) / counts
    clashes = int(np.sum(np.abs(means) != 1))
    if clashes:
        raise ValueError(
            f"{owner}: equal rows of `inputs` must have equal labels (got {clashes} "
            "with both): no network fits them."
        )
    scale = (rows.shape[1] + 1) ** 0.25
    return _network(
        variant,
        scale * known,
        np.full(len(known), -scale * (rows.shape[1] - 1)),
        means if variant == "layernorm" else means / scale,
        inputs.dtype,
    )


def flattest_generalizer(d: int, *, variant: Variant = "bias") -> TwoLayer:
    """A flattest interpolator of every sample, for it computes the rule.

    Four hidden units with first weights c (+-1, +-1, 0, ..., 0) and heads
    +-1 / (2 c), 4 c^2 the root of d, or of d + 1 with biases, which are zero; with
    normalised units the heads are +-1.

    Args:
        d: Dimension of the inputs, at least 2.
        variant: Of the network, as in `TwoLayer`.

    Returns:
        The network.

    Raises:
        ValueError: If `d` is below 2, or on another variant.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import flattest_generalizer
        >>> net = flattest_generalizer(5)
        >>> round(float(net(jnp.array([-1.0, 1.0, 1.0, 1.0, -1.0]))), 4)
        -1.0

    Source:
        Wen, Li and Ma, 2023, arXiv:2307.11007.
    """
    _check_dimension("flattest_generalizer", d)
    checks.check_choice("flattest_generalizer", "variant", variant, _VARIANTS)
    signs = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
    size = (d + (variant != "plain")) ** 0.25 / 2
    weight = np.zeros((4, d))
    weight[:, :2] = size * signs
    head = np.prod(signs, axis=1) / (1 if variant == "layernorm" else 2 * size)
    return _network(variant, weight, np.zeros(4), head, jnp.result_type(float))


def label_noise(loss: Callable[..., Float[Array, ""]], sigma: float) -> Callable:
    """A loss on labels that are moved by plus or minus `sigma`, afresh in each call.

    Gradient descent on it drifts along the interpolators towards smaller traces.

    Args:
        loss: `(params, (x, y)) -> scalar`, y an array of labels.
        sigma: Size of the moves, not negative.

    Returns:
        `(params, (x, y), key) -> scalar`; `varan.train` gives such a loss its keys.

    Raises:
        ValueError: If `sigma` is negative.
        TypeError: If `loss` takes no batch.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.sharpness import label_noise
        >>> loss = lambda w, batch: jnp.mean((w * batch[0] - batch[1]) ** 2)
        >>> noisy = label_noise(loss, 0.5)
        >>> batch = jnp.ones(3), jnp.ones(3)
        >>> round(float(noisy(1.0, batch, jax.random.key(0))), 4)
        0.25

    Source:
        Label-noise SGD as in Wen, Li and Ma, 2023, arXiv:2307.11007.
    """
    checks.check_nonnegative("label_noise", "sigma", sigma)
    if len(inspect.signature(loss).parameters) < 2:
        raise TypeError(
            "label_noise: `loss` must be a function of parameters and a batch (x, y)."
        )

    def noisy(params: PyTree, batch, key: PRNGKeyArray) -> Float[Array, ""]:
        x, y = batch
        moves = jax.random.rademacher(key, jnp.shape(y)).astype(y.dtype)
        return loss(params, (x, y + sigma * moves))

    return noisy


def _network(variant, weight, bias, head, dtype):
    net = TwoLayer(weight.shape[1], len(head), variant, key=jax.random.key(0))
    parts = [weight, head] if variant == "plain" else [weight, head, bias]
    return eqx.tree_at(
        lambda net: [net.weight, net.head, net.bias][: len(parts)],
        net,
        [jnp.asarray(part, dtype) for part in parts],
    )


def _check_dimension(owner, d):
    if d < 2:
        raise ValueError(
            f"{owner}: `d` must be at least 2 (got {d}): the label is x_1 x_2."
        )


def _check_sample(owner, inputs, labels):
    checks.check_nonempty(owner, "inputs", inputs)
    checks.check_shape(owner, "inputs", inputs, (None, None))
    checks.check_shape(owner, "labels", labels, (inputs.shape[0],))
    _check_dimension(owner, inputs.shape[1])
    for name, array in (("inputs", inputs), ("labels", labels)):
        if not checks.is_traced(array) and np.any(np.abs(np.asarray(array)) != 1):
            raise ValueError(
                f"{owner}: `{name}` must be -1 or 1 in every entry. Make them with "
                "`make_xor`."
            )
