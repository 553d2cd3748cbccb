"""Symmetries of the parameters: groups that move the weights and keep the loss.

A network's loss has directions in which it does not change: a ReLU unit's incoming
weights times `s` and its outgoing weights over `s`, any invertible matrix between two
linear layers. A `GroupAction` says how an element of such a group moves the parameters;
`teleport` searches the group for the point of the orbit where the next steps go best.
Elements are pytrees of coordinates that are zero at the identity.

`RescaleReLU`, `GLLinear`, `OrthogonalRadial` and `EllipsoidRotation` keep the loss for
every input; `DataDependentGL` keeps the outputs on one batch, and only where its hidden
layers are at least as wide as the batch is large.

Source: B. Zhao, R. M. Gower, R. Walters and R. Yu (2024), Improving Convergence and
Generalization Using Parameter Symmetries, ICLR 2024, arXiv 2305.13404.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from ..core._checks import is_traced


def linear_layers(params: PyTree) -> list[eqx.nn.Linear]:
    """Every `eqx.nn.Linear` of a model, in the order of its leaves.

    Args:
        params: A model, or its floating arrays in the model's structure.

    Returns:
        The layers; for a chain such as `eqx.nn.MLP` this is the order of the data.

    Example:
        >>> import equinox as eqx, jax
        >>> from varan.sharpness import linear_layers
        >>> net = eqx.nn.MLP(3, 2, 4, depth=1, key=jax.random.key(0))
        >>> [layer.weight.shape for layer in linear_layers(net)]
        [(4, 3), (2, 4)]
    """
    leaves = jtu.tree_leaves(params, is_leaf=lambda x: isinstance(x, eqx.nn.Linear))
    return [leaf for leaf in leaves if isinstance(leaf, eqx.nn.Linear)]


class GroupAction(eqx.Module):
    """How a group moves the parameters; subclass it for other symmetries."""

    @abc.abstractmethod
    def identity(self, params: PyTree) -> PyTree:
        """The coordinates of the identity, zeros; refuses a model that does not fit."""

    @abc.abstractmethod
    def act(self, params: PyTree, element: PyTree, batch: Any) -> PyTree:
        """The moved parameters; `batch` matters to data-dependent actions only."""

    @abc.abstractmethod
    def inverse(self, element: PyTree) -> PyTree:
        """The coordinates of the inverse element."""

    def curve(self, direction: PyTree, t: Float[Array, ""]) -> PyTree:
        """Coordinates of `exp(t M)`, right up to the second order in `t`."""
        return jtu.tree_map(lambda m: t.astype(m.dtype) * m, direction)

    def degenerate(self, params: PyTree, batch: Any) -> Bool[Array, ""]:
        """Whether the action is not defined here (rank-deficient activations)."""
        return jnp.zeros((), bool)


class RescaleReLU(GroupAction):
    """Positive rescaling of every hidden unit; keeps the outputs on all inputs.

    Unit `j` of a hidden layer gets `exp(s_j)` times its incoming weights and bias and
    `exp(-s_j)` times its outgoing weights. Exact where the activation is positively
    homogeneous. Cost: one pass over the weights.

    Args:
        activation: The activation between the layers: `jax.nn.relu`, a leaky ReLU, the
            identity.
        layers: From the parameters to the layers in the order of the data, each with
            `weight` of shape (out, in) and `bias` of shape (out,) or `None`.

    Raises:
        ValueError: If the activation is not positively homogeneous, or (in `identity`)
            the layers do not form a chain of at least two.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from varan.sharpness import RescaleReLU
        >>> net = eqx.nn.MLP(3, 2, 4, depth=1, key=jax.random.key(0))
        >>> moved = RescaleReLU().act(net, [jnp.full(4, 0.7)], None)
        >>> bool(jnp.allclose(moved(jnp.ones(3)), net(jnp.ones(3)), atol=1e-5))
        True

    Source: arXiv 2305.13404.
    """

    activation: Callable = eqx.field(static=True, default=jax.nn.relu)
    layers: Callable[[PyTree], Sequence] = eqx.field(static=True, default=linear_layers)

    def __check_init__(self):
        _check_commutes(
            "RescaleReLU",
            self.activation,
            lambda z: 2.5 * z,
            "positively homogeneous (ReLU, leaky ReLU, identity)",
        )

    def identity(self, params):
        widths = _hidden_widths("RescaleReLU", self.layers(params))
        return [jnp.zeros(n, d) for n, d in widths]

    def act(self, params, element, batch):
        scales = [jnp.exp(s) for s in element]
        return _conjugate(
            self.layers,
            params,
            [lambda w, s=s: s.reshape(-1, *[1] * (w.ndim - 1)) * w for s in scales],
            [lambda w, s=s: w / s[None, :] for s in scales],
        )

    def inverse(self, element):
        return [-s for s in element]


class GLLinear(GroupAction):
    """Any invertible matrix between two linear layers; exact on all inputs.

    `W_m -> g W_m`, `b_m -> g b_m`, `W_{m+1} -> W_{m+1} g^-1`, with `g = I + T`. For
    layers without an activation between them. Cost: one solve of the hidden width.

    Args:
        layers: As for `RescaleReLU`.

    Raises:
        ValueError: In `identity`, if the layers do not form a chain of at least two.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from varan.sharpness import GLLinear
        >>> net = eqx.nn.MLP(3, 2, 4, 1, activation=lambda z: z, key=jax.random.key(0))
        >>> moved = GLLinear().act(net, [0.1 * jnp.ones((4, 4))], None)
        >>> bool(jnp.allclose(moved(jnp.ones(3)), net(jnp.ones(3)), atol=1e-5))
        True

    Source: arXiv 2305.13404.
    """

    layers: Callable[[PyTree], Sequence] = eqx.field(static=True, default=linear_layers)

    def identity(self, params):
        widths = _hidden_widths("GLLinear", self.layers(params))
        return [jnp.zeros((n, n), d) for n, d in widths]

    def act(self, params, element, batch):
        group = [_near_identity(T) for T in element]
        return _conjugate(
            self.layers,
            params,
            [lambda w, g=g: g @ w for g in group],
            [lambda w, g=g: jnp.linalg.solve(g.T, w.T).T for g in group],
        )

    def inverse(self, element):
        return [_inverse_near_identity(T) for T in element]

    def curve(self, direction, t):
        return [_second_order(m, t) for m in direction]


class OrthogonalRadial(GroupAction):
    """Rotations of a hidden layer with a radial activation; exact on all inputs.

    `W_m -> Q W_m`, `b_m -> Q b_m`, `W_{m+1} -> W_{m+1} Q'`, `Q` the Cayley transform of
    the skew part of the coordinates. An activation of a whole vector is radial when it
    only changes its length. Cost: one solve of the hidden width.

    Args:
        activation: Maps the vector of a hidden layer to one of equal shape.
        layers: As for `RescaleReLU`.

    Raises:
        ValueError: If the activation does not commute with rotations, or (in
            `identity`) the layers do not form a chain of at least two.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from varan.sharpness import OrthogonalRadial
        >>> radial = lambda z: z * jnp.tanh(jnp.sum(z**2))
        >>> below, above = jax.random.split(jax.random.key(0))
        >>> net = [eqx.nn.Linear(3, 4, key=below), eqx.nn.Linear(4, 2, key=above)]
        >>> output = lambda net: net[1](radial(net[0](jnp.ones(3))))
        >>> moved = OrthogonalRadial(radial).act(net, [jnp.tri(4)], None)
        >>> bool(jnp.allclose(output(moved), output(net), atol=1e-5))
        True

    Source: arXiv 2305.13404.
    """

    activation: Callable = eqx.field(static=True)
    layers: Callable[[PyTree], Sequence] = eqx.field(static=True, default=linear_layers)

    def __check_init__(self):
        _check_commutes(
            "OrthogonalRadial",
            self.activation,
            lambda z: z - 2 * jnp.mean(z),  # reflects along (1, ..., 1)
            "radial (it may only change a vector's length)",
        )

    def identity(self, params):
        widths = _hidden_widths("OrthogonalRadial", self.layers(params))
        return [jnp.zeros((n, n), d) for n, d in widths]

    def act(self, params, element, batch):
        group = [_cayley(T) for T in element]
        return _conjugate(
            self.layers,
            params,
            [lambda w, q=q: q @ w for q in group],
            [lambda w, q=q: w @ q.T for q in group],
        )

    def inverse(self, element):
        return [-T for T in element]


class EllipsoidRotation(GroupAction):
    """Rotations along the level sets of `(w - center)' A (w - center) / 2`.

    `w -> c + A^(-1/2) Q A^(1/2) (w - c)`, `Q` the Cayley transform of the skew part of
    the coordinates. Cost: one solve of size d; the square roots are taken once.

    Args:
        matrix: `A`, symmetric positive definite, of shape (d, d).
        center: The minimiser, of shape (d,); the origin by default.

    Raises:
        ValueError: If the matrix is not symmetric positive definite.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import EllipsoidRotation
        >>> A, w = jnp.diag(jnp.array([1.0, 9.0])), jnp.array([3.0, 0.0])
        >>> quarter = jnp.array([[0.0, -2.0], [2.0, 0.0]])
        >>> bool(jnp.allclose(EllipsoidRotation(A).act(w, quarter, None),
        ...                   jnp.array([0.0, 1.0]), atol=1e-5))
        True

    Source: arXiv 2305.13404, the example of a quadratic loss.
    """

    root: Float[Array, "d d"]
    inverse_root: Float[Array, "d d"]
    center: Float[Array, " d"]

    def __init__(
        self, matrix: Float[Array, "d d"], center: Float[Array, " d"] | None = None
    ):
        matrix = jnp.asarray(matrix)
        values, vectors = jnp.linalg.eigh(matrix)
        if not is_traced(values):
            symmetric = bool(jnp.allclose(matrix, matrix.T))
            if not (symmetric and bool(jnp.all(values > 0))):
                raise ValueError(
                    "EllipsoidRotation: `matrix` must be symmetric positive definite "
                    f"(got smallest eigenvalue {float(values[0]):.3g}, symmetric: "
                    f"{symmetric})."
                )
        roots = jnp.sqrt(values)
        self.root = (vectors * roots[None, :]) @ vectors.T
        self.inverse_root = (vectors / roots[None, :]) @ vectors.T
        self.center = (
            jnp.zeros(matrix.shape[0], matrix.dtype) if center is None else center
        )

    def identity(self, params):
        return jnp.zeros_like(self.root)

    def act(self, params, element, batch):
        z = self.root @ (params - self.center)
        return self.center + self.inverse_root @ (_cayley(element) @ z)

    def inverse(self, element):
        return -element


class DataDependentGL(GroupAction):
    """Any invertible matrix before an activation; keeps the outputs on one batch.

    `V -> g V` and `U -> U + U (S_0 - S) S^+` with `g = I + T`, `S_0 = s(V h)` and
    `S = s(g V h)` the hidden activations of the batch before and after: the smallest
    change of `U` that reproduces `U S_0`. Exact on the batch where its columns of `S`
    are linearly independent, so only where the layer is at least as wide as the batch
    is large; otherwise the best fit in least squares. Other inputs see another
    function. Layer after layer, each on the activations that the moved ones below it
    give. Cost: a singular value decomposition of the activations of each hidden layer.

    Args:
        activation: The activation between the layers, elementwise.
        layers: As for `RescaleReLU`; hidden layers must have no bias.
        inputs: From the batch to the inputs of the first layer, of shape (n, in).

    Raises:
        ValueError: In `identity`, if a hidden layer has a bias or the layers do not
            form a chain of at least two.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from varan.sharpness import DataDependentGL
        >>> net = eqx.nn.MLP(3, 2, 8, 1, use_bias=False, key=jax.random.key(0))
        >>> x = jax.random.normal(jax.random.key(1), (2, 3))
        >>> element = [0.1 * jax.random.normal(jax.random.key(2), (8, 8))]
        >>> moved = DataDependentGL(jax.nn.relu).act(net, element, (x,))
        >>> bool(jnp.allclose(jax.vmap(moved)(x), jax.vmap(net)(x), atol=1e-4))
        True

    Source: arXiv 2305.13404, the action of `I + T` on a pair `(U, V)`.

    Differences: The paper takes `U S_0 S^+`. Both agree where `S` has full row rank;
        in a layer wider than the batch that one also deletes what `U` does to
        activations that the batch does not have, and moves the parameters even at
        `T = 0`. The hidden activations of the layers above are computed, where the
        released code multiplies those of the start by `I + T` and so skips the
        activation.
    """

    activation: Callable = eqx.field(static=True)
    layers: Callable[[PyTree], Sequence] = eqx.field(static=True, default=linear_layers)
    inputs: Callable[[Any], Array] = eqx.field(static=True, default=itemgetter(0))

    def identity(self, params):
        layers = self.layers(params)
        widths = _hidden_widths("DataDependentGL", layers)
        for number, layer in enumerate(layers[:-1]):
            if layer.bias is not None:
                raise ValueError(
                    "DataDependentGL: hidden layers must have no bias (layer "
                    f"{number} has one). Train it without, or use `RescaleReLU`."
                )
        return [jnp.zeros((n, n), d) for n, d in widths]

    def act(self, params, element, batch):
        weights = [layer.weight for layer in self.layers(params)]
        h = self.inputs(batch)
        for m, T in enumerate(element):
            before = h @ weights[m].T
            weights[m] = weights[m] + T @ weights[m]
            old, new = self.activation(before), self.activation(before + before @ T.T)
            change = _pseudo_inverse(new) @ ((old - new) @ weights[m + 1].T)
            weights[m + 1] = weights[m + 1] + change.T
            h = new
        biases = [layer.bias for layer in self.layers(params)]
        return _replace(self.layers, params, weights, biases)

    def inverse(self, element):
        return [_inverse_near_identity(T) for T in element]

    def curve(self, direction, t):
        return [_second_order(m, t) for m in direction]

    def degenerate(self, params, batch):
        h, found = self.inputs(batch), jnp.zeros((), bool)
        for layer in self.layers(params)[:-1]:
            h = self.activation(h @ layer.weight.T)
            values = jnp.linalg.svd(h, compute_uv=False)
            found |= ~(values[-1] > _rcond(h) * values[0])
        return found


def _hidden_widths(owner, layers):
    """Width and dtype of each hidden layer of a chain."""
    shapes = [layer.weight.shape for layer in layers]
    fits = len(shapes) >= 2 and all(
        above[1] == below[0] for below, above in pairwise(shapes)
    )
    if not fits:
        raise ValueError(
            f"{owner}: `layers` must give two or more layers, each as wide as the next "
            f"one's input (got weights of shapes {shapes})."
        )
    return [(layer.weight.shape[0], layer.weight.dtype) for layer in layers[:-1]]


def _conjugate(layers, params, forwards, backwards):
    """`W_m -> forward(W_m)`, `W_{m+1} -> backward(W_{m+1})` for each hidden layer."""
    found = layers(params)
    weights = [layer.weight for layer in found]
    biases = [layer.bias for layer in found]
    for m, (forward, backward) in enumerate(zip(forwards, backwards, strict=True)):
        weights[m] = forward(weights[m])
        if biases[m] is not None:
            biases[m] = forward(biases[m])
        weights[m + 1] = backward(weights[m + 1])
    return _replace(layers, params, weights, biases)


def _replace(layers, params, weights, biases):
    def where(tree):
        found = layers(tree)
        return [layer.weight for layer in found] + [
            layer.bias for layer in found if layer.bias is not None
        ]

    return eqx.tree_at(where, params, weights + [b for b in biases if b is not None])


def _near_identity(T):
    return jnp.eye(T.shape[0], dtype=T.dtype) + T


def _inverse_near_identity(T):
    # (I + T)^-1 - I without cancellation.
    return -jnp.linalg.solve(_near_identity(T), T)


def _second_order(m, t):
    """`exp(t M) - I` up to the third order."""
    t = t.astype(m.dtype)
    return t * m + t**2 / 2 * (m @ m)


def _cayley(T):
    """A rotation from any square matrix; agrees with `exp` to the second order."""
    skew = (T - T.T) / 4
    eye = jnp.eye(T.shape[0], dtype=T.dtype)
    return jnp.linalg.solve(eye - skew, eye + skew)


def _rcond(matrix):
    return max(matrix.shape) * jnp.finfo(matrix.dtype).eps


def _pseudo_inverse(matrix):
    return jnp.linalg.pinv(matrix, rtol=_rcond(matrix))


def _check_commutes(owner, activation, move, wanted):
    """Refuses an activation that does not commute with a motion of its argument."""
    with jax.ensure_compile_time_eval():
        z = jnp.asarray(np.linspace(-2.0, 1.7, 8), jnp.float32)
        found, expected = activation(move(z)), move(activation(z))
        fits = np.allclose(found, expected, rtol=1e-4, atol=1e-5)
    if not fits:
        name = getattr(activation, "__name__", repr(activation))
        raise ValueError(
            f"{owner}: `activation` must be {wanted}; {name} is not. Use an action "
            "that fits it, such as `DataDependentGL`."
        )
