"""The largest Hessian eigenvalues of a small network: ours, matfree and PyHessian.

A perceptron on MNIST-1D after 100 steps of Adam, its loss over all samples. The answer
is right when every eigenvalue is within 0.1 % of SciPy's (ARPACK, to its last digits).
Ours and matfree run Lanczos with full reorthogonalisation in JAX, PyHessian power
iteration with deflation in PyTorch. Ours stops by its residual; matfree gets the fewest
products, in steps of five, and PyHessian the loosest power of ten as tolerance, that
are right on all instances. The same weights, samples and precision (float32) for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import LinearOperator, eigsh

from varan.claims import Contestant, Heat
from varan.data import mnist1d
from varan.sharpness import LogitLoss, hessian_top

TOLERANCE = 1e-3
# A residual of 1 % leaves an error of 0.01 % or less: it enters squared.
OURS, PRODUCTS, PYHESSIAN = 1e-2, {1: 10, 5: 25}, {1: 1e-5, 5: 1e-5}
_LAYERS = 3


def heats(settings: Mapping[str, Any]) -> Iterator[Heat]:
    """One heat for each network and number of eigenvalues."""
    for width, samples, k in settings["cases"]:
        instance = _Instance(width, samples, k)
        yield Heat(
            name=f"{k} of {instance.size} eigenvalues, {samples} samples",
            contestants=[
                Contestant("ours", partial(_ours, instance)),
                Contestant(
                    "ours, no reorthogonalisation", partial(_ours, instance, False)
                )
                if k == 1
                else Contestant(
                    "ours, LOBPCG", partial(_ours, instance, True, "lobpcg")
                ),
                Contestant(
                    "matfree",
                    partial(_matfree, instance),
                    "matfree",
                    "pip install matfree",
                ),
                Contestant(
                    "PyHessian",
                    partial(_pyhessian, instance),
                    "pyhessian",
                    "pip install pyhessian",
                ),
            ],
            error=instance.error,
            tolerance=TOLERANCE,
            measure="largest relative error of an eigenvalue",
            notes=["Each call prepares its products anew, as for new weights."],
        )


class _Instance:
    """A trained perceptron 40-width-width-10, and its samples."""

    def __init__(self, width: int, samples: int, k: int):
        self.sizes, self.samples, self.k = (40, width, width, 10), samples, k

    @property
    def size(self) -> int:
        pairs = zip(self.sizes[:-1], self.sizes[1:], strict=True)
        return sum(a * b + b for a, b in pairs)

    @cache  # noqa: B019 (an instance lives as long as its race)
    def data(self):
        x, y = mnist1d(jax.random.key(0), self.samples)
        return x.astype(jnp.float32), y

    @cache  # noqa: B019
    def weights(self):
        random = np.random.default_rng(0)
        params = {}
        for i, (a, b) in enumerate(zip(self.sizes[:-1], self.sizes[1:], strict=True)):
            weight = random.standard_normal((a, b)) * np.sqrt(2 / a)
            params[f"w{i}"] = jnp.asarray(weight, jnp.float32)
            params[f"b{i}"] = jnp.zeros(b, jnp.float32)
        return _trained(params, self.data())

    @cache  # noqa: B019
    def exact(self) -> np.ndarray:
        """The eigenvalues, largest first, by ARPACK."""
        vector, unravel = ravel_pytree(self.weights())
        gradient = jax.grad(lambda v: LOSS(unravel(v), self.data()))
        product = jax.jit(lambda v: jax.jvp(gradient, (vector,), (v,))[1])
        n = vector.size
        operator = LinearOperator(
            (n, n), lambda v: np.asarray(product(v.ravel())), dtype=np.float32
        )
        values = eigsh(operator, self.k, which="LA", return_eigenvectors=False)
        return np.sort(values)[::-1]

    def error(self, answer) -> float:
        exact = self.exact()
        return float(np.max(np.abs(np.asarray(answer, float) / exact - 1)))


def _logits(params, x):
    for i in range(_LAYERS):
        x = x @ params[f"w{i}"] + params[f"b{i}"][None, :]
        x = jax.nn.relu(x) if i < _LAYERS - 1 else x
    return x


LOSS = LogitLoss(_logits)


@jax.jit
def _trained(params, data):
    descent = optax.adam(3e-3)

    def step(carry, _):
        params, state = carry
        updates, state = descent.update(jax.grad(LOSS)(params, data), state)
        return (optax.apply_updates(params, updates), state), None

    start = (params, descent.init(params))
    return jax.lax.scan(step, start, None, length=100)[0][0]


def _ours(instance, reorth=True, method="lanczos"):
    params, data, key = instance.weights(), instance.data(), jax.random.key(0)
    tol = OURS if method == "lanczos" else OURS / 10

    def run():
        return hessian_top(
            LOSS, params, data, k=instance.k, tol=tol, reorth=reorth, method=method,
            key=key,
        ).values  # fmt: skip

    return run


def _matfree(instance):
    from matfree import decomp, eig

    params, data = instance.weights(), instance.data()
    vector, unravel = ravel_pytree(params)
    partial_eigh = eig.eigh_partial(decomp.tridiag_sym(PRODUCTS[instance.k]))

    @jax.jit
    def run(vector, data, start):
        gradient = jax.grad(lambda v: LOSS(unravel(v), data))
        product = jax.linearize(gradient, vector)[1]
        return partial_eigh(product, start)[0][::-1][: instance.k]

    start = jax.random.normal(jax.random.key(0), vector.shape, vector.dtype)
    return partial(run, vector, data, start)


def _pyhessian(instance):
    import torch
    from pyhessian import hessian

    torch.manual_seed(0)
    layers = []
    for i, (a, b) in enumerate(
        zip(instance.sizes[:-1], instance.sizes[1:], strict=True)
    ):
        linear = torch.nn.Linear(a, b)
        with torch.no_grad():
            weight = np.array(instance.weights()[f"w{i}"].T)
            linear.weight.copy_(torch.from_numpy(weight))
            linear.bias.copy_(torch.from_numpy(np.array(instance.weights()[f"b{i}"])))
        layers += [linear, torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    x, y = (torch.from_numpy(np.array(part)) for part in instance.data())
    criterion, k = torch.nn.CrossEntropyLoss(), instance.k

    def run():
        operator = hessian(model, criterion, data=(x, y.long()), cuda=False)
        values, _ = operator.eigenvalues(maxIter=1000, tol=PYHESSIAN[k], top_n=k)
        return values

    return run
