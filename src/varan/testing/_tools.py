"""What benches and checks share: moved and counted problems, casts, comparisons."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.flatten_util import ravel_pytree

from ..core import FixedPoint, Problem, Root, Smooth
from ..problems import Composite, SetConstrained


def difference(function, point, direction, step=1e-3):
    """Fourth-order central difference of a function along a direction.

    Its error is about `step**4` plus the function's noise divided by `step`: 1e-9 to
    1e-12 for functions of unit scale in float64.

    Args:
        function: Maps a pytree of floating arrays to a pytree of arrays.
        point: Where.
        direction: A pytree like `point`.
        step: Length of the step along the direction.

    Returns:
        The derivative, all leaves of the output in one NumPy vector.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.testing import difference
        >>> difference(lambda x: x**2, jnp.float32(1), jnp.float32(1), 0.1).round(2)
        array([2.], dtype=float32)
    """

    def at(t):
        shifted = jtu.tree_map(lambda p, d: p + t * step * d, point, direction)
        return flatten(function(shifted))

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


class View(eqx.Module):
    """The coordinates z of `x = factor * z[order] + offset`, x like a template."""

    template: Any
    order: jax.Array
    factor: jax.Array
    offset: jax.Array

    @staticmethod
    def make(template, shift=False, scale=False, permutation=False, reflection=False):
        size = flatten(template).size
        signs = np.where(np.arange(size) % 2 == 0, -1.0, 1.0) if reflection else 1.0
        return View(
            template,
            jnp.asarray(np.roll(np.arange(size), 1 if permutation else 0)),
            jnp.asarray(np.broadcast_to(signs * (8.0 if scale else 1.0), size)),
            jnp.asarray(np.linspace(50.0, 100.0, size) if shift else np.zeros(size)),
        )

    def __call__(self, z):
        flat = self.factor * ravel_pytree(z)[0][self.order] + self.offset
        return ravel_pytree(self.template)[1](flat)

    def inverse(self, x, like=None, linear=False):
        flat = ravel_pytree(x)[0] - (0 if linear else self.offset)
        flat = jnp.zeros_like(flat).at[self.order].set(flat / self.factor)
        return ravel_pytree(self.template if like is None else like)[1](flat)


class _Seen(eqx.Module):
    """A problem's function, seen through a view."""

    function: Callable
    view: View
    pull: Literal["scalar", "point", "vector"] = eqx.field(static=True)

    def __call__(self, z, *params):
        out = self.function(self.view(z), *params)
        if self.pull == "scalar":
            return out
        return self.view.inverse(out, z, linear=self.pull == "vector")


class _Seeming(Problem):
    """A problem that is no more than its condition, seen through a view."""

    inner: Problem
    view: View

    def condition(self, z):
        return self.view.inverse(self.inner.condition(self.view(z)), z, linear=True)


MOTIONS = ("shift", "scale", "permutation", "reflection")


# The functions that a problem is made of, and what they return. A proximal operator
# moves likewise under motions that keep distances.
_PULLS: dict[type[Problem], dict[str, Any]] = {
    Smooth: {"objective": "scalar"},
    FixedPoint: {"function": "point"},
    Root: {"function": "vector"},
    Composite: {"objective": "scalar", "proximal": "point", "nonsmooth": "scalar"},
    SetConstrained: {"objective": "scalar", "projection": "point"},
}


def moved(problem: Problem, view: View) -> Problem:
    pulls = next((p for kind, p in _PULLS.items() if isinstance(problem, kind)), None)
    if pulls is None:
        return _Seeming(problem, view)
    for name, pull in pulls.items():
        function = getattr(problem, name)
        if function is not None:
            seen = _Seen(function, view, pull)
            problem = eqx.tree_at(lambda p, n=name: getattr(p, n), problem, seen)
    return problem


# Traces of the conditions of counted problems, by the problems' class.
TRACES: collections.Counter[type] = collections.Counter()


@functools.cache
def _counting_class(kind):
    # One class for all cases: equal solvers of equal problems compile together.
    def condition(self, x):
        TRACES[kind] += 1
        return kind.condition(self, x)

    return type(kind.__name__, (kind,), {"condition": condition})


def counted(problem: Problem) -> Problem:
    """The same problem, of a subclass that counts traces of its condition."""
    kind = _counting_class(type(problem))
    copy = object.__new__(kind)
    for name, value in vars(problem).items():
        object.__setattr__(copy, name, value)
    return copy


def tree_floats(function, tree):
    return jtu.tree_map(
        lambda leaf: function(leaf) if eqx.is_inexact_array(leaf) else leaf, tree
    )


def cast(tree, dtype):
    def cast(leaf):
        if isinstance(leaf, (float, np.ndarray, np.generic)):
            leaf = jnp.asarray(leaf)
        return leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf

    return jtu.tree_map(cast, tree)


def fill(tree, value):
    return tree_floats(lambda leaf: jnp.full_like(leaf, value), tree)


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return tree_floats(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), tree
    )


def inexact(tree):
    return eqx.filter(jtu.tree_map(jnp.asarray, tree), eqx.is_inexact_array)


def flatten(tree):
    leaves = [np.ravel(leaf) for leaf in jtu.tree_leaves(tree) if np.size(leaf)]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def finite(tree):
    return bool(np.all(np.isfinite(flatten(tree).astype(float))))


def assert_close(got, wanted, rtol):
    """Asserts that two pytrees of numbers are near; NaN is near nothing.

    Args:
        got: A pytree of numbers.
        wanted: A pytree of as many numbers.
        rtol: Bounds the norm of all differences, relative to the norm of all wanted
            numbers where that exceeds one, absolutely where it does not.
    """
    got, wanted = (flatten(t).astype(np.float64) for t in (got, wanted))
    assert got.shape == wanted.shape, f"shapes {got.shape} and {wanted.shape}"
    gap, size = np.linalg.norm(got - wanted), np.linalg.norm(wanted)
    assert gap <= rtol * max(size, 1.0), f"off by {gap} of {size}"
