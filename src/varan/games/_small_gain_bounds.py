"""Curvature and couplings of a game's players on a box, proved or sampled.

The operator's Jacobian falls into blocks `J_ij = d v_i / d z_j`. A block's bound is
proved where the Jacobian is constant, which the structure of the traced operator shows,
or, on a box with centre c, by the mean-value form

    ||J_ij(z) - J_ij(c)|| <= K_ij radius

with the user's Lipschitz constants `K` of the blocks. From points alone it is an
estimate: the true couplings may be larger, the true curvatures smaller.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.extend.core import Literal as _Literal
from jax.flatten_util import ravel_pytree

from ..core._checks import check_finite, check_shape
from ._small_gain_weights import check_bounds


class Box(NamedTuple):
    """A box of iterates: its ends and centre as vectors, the players' blocks."""

    lower: np.ndarray
    upper: np.ndarray
    centre: Any  # a pytree like an iterate
    slices: list[slice]


class Bounds(NamedTuple):
    """Of the blocks, in the metric; of the whole Jacobian, with equal weights."""

    curvature: np.ndarray
    coupling: np.ndarray
    whole: tuple[float, float] | None
    jacobian: np.ndarray | None  # where it is constant, in the metric
    proof: bool


def box_of(owner: str, region) -> Box:
    """Reads a pair of corners."""
    if not isinstance(region, tuple) or len(region) != 2:
        raise ValueError(
            f"{owner}: `region` must be a pair of corners (lower, upper), each like an "
            f"iterate (got {type(region).__name__})."
        )
    lower = region[0]
    if not isinstance(lower, tuple) or len(lower) < 2:
        raise ValueError(
            f"{owner}: the corners of `region` must be tuples with one block for each "
            f"of two or more players (got {type(lower).__name__})."
        )
    shapes = [
        (jtu.tree_structure(v), [jnp.shape(a) for a in jtu.tree_leaves(v)])
        for v in region
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{owner}: the corners of `region` must have the same structure and shapes "
            f"(got {shapes[0][1]} and {shapes[1][1]})."
        )
    flat = [np.asarray(ravel_pytree(corner)[0]) for corner in region]
    if not np.all(flat[0] <= flat[1]):
        raise ValueError(
            f"{owner}: `region` must have its lower corner below the upper one (got "
            f"{int(np.sum(~(flat[0] <= flat[1])))} entries that are not)."
        )
    sizes = [sum(int(np.size(a)) for a in jtu.tree_leaves(b)) for b in lower]
    ends = np.cumsum(sizes)
    slices = [slice(int(e - s), int(e)) for s, e in zip(sizes, ends, strict=True)]
    # A half-line has no middle; any of its points serves a constant Jacobian.
    low, high = (np.where(np.isfinite(end), end, 0) for end in flat)
    middle = np.clip((low + high) / 2, *flat)
    vector, unravel = ravel_pytree(lower)
    return Box(flat[0], flat[1], unravel(jnp.asarray(middle, vector.dtype)), slices)


def jacobian_bounds(owner, game, box: Box, bounds, roots, *, variation, samples, key):
    """Bounds by the mean-value form or from points."""
    finite = bool(np.all(np.isfinite(box.upper) & np.isfinite(box.lower)))
    constant = is_affine(game, box.centre)
    radius = 0.0
    points = jtu.tree_map(lambda v: v[None], box.centre)
    if bounds == "interval" and not constant:
        if variation is None or not finite:
            raise ValueError(
                f"{owner}: the game's Jacobian is not constant, so that interval "
                "bounds need a finite `region` and `variation`, Lipschitz constants of "
                f"its blocks (got a {'finite' if finite else 'infinite'} region and "
                f"variation={variation}). Pass them, or (curvature, coupling) as "
                "`bounds`, or bounds='sampled' for an estimate."
            )
        radius = float(np.linalg.norm(box.upper - box.lower)) / 2
    if bounds == "sampled" and not constant:
        if not finite or key is None:
            raise ValueError(
                f"{owner}: bounds='sampled' needs a finite `region` and a `key` (got a "
                f"{'finite' if finite else 'infinite'} region and key={key})."
            )
        points = _draw(box, samples, key)
    J = np.asarray(_jacobians(game, points), np.float64)
    check_finite(owner, "the operator's Jacobian on the region", J)
    J = _in_metric(J, box.slices, roots)
    players = len(box.slices)
    V = np.zeros((players, players))
    if radius:
        V = np.asarray(variation, np.float64)
        check_shape(owner, "variation", V, (players, players))
        check_finite(owner, "variation", V)
        if np.any(V < 0):
            raise ValueError(
                f"{owner}: `variation` must not be negative (got {V.min()})."
            )
        # In the players' metrics a block's norm grows by their condition at most.
        stretch = [np.linalg.norm(R, 2) for R in roots]
        shrink = [np.linalg.norm(np.linalg.inv(R), 2) for R in roots]
        V = V * radius * np.outer(stretch, shrink)
    mu = np.array([np.min(_least(J[:, s, s])) for s in box.slices]) - np.diag(V)
    L = [[np.max(_norms(J[:, r, c])) for c in box.slices] for r in box.slices]
    spread = np.linalg.norm(V, 2)
    whole = float(np.min(_least(J)) - spread), float(np.max(_norms(J)) + spread)
    return Bounds(
        mu,
        np.asarray(L) + V,
        whole,
        J[0] if constant else None,
        constant or bounds == "interval",
    )


def given_bounds(owner, box: Box, bounds) -> Bounds:
    """Bounds that the user promises: curvature and coupling."""
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise ValueError(
            f"{owner}: `bounds` must be 'interval', 'sampled' or a pair of arrays "
            f"(curvature, coupling) (got {bounds!r})."
        )
    mu, L = check_bounds(owner, *bounds)
    if len(mu) != len(box.slices):
        raise ValueError(
            f"{owner}: `bounds` must have one entry a player (got {len(mu)} for "
            f"{len(box.slices)} players)."
        )
    return Bounds(mu, L, None, None, True)


def is_affine(game, z) -> bool:
    """Whether the traced derivative does not read the point: a constant Jacobian.

    `False` proves nothing: the dependence may cancel.
    """
    vector, unravel = ravel_pytree(z)

    def tangent(point, direction):
        def force(v):
            return ravel_pytree(game.apply(unravel(v)))[0]

        return jax.jvp(force, (point,), (direction,))[1]

    traced = jax.make_jaxpr(tangent)(vector, vector)
    return not any(_reached(traced.jaxpr, [True, False]))


def _reached(jaxpr, inputs):
    """Which outputs depend on the marked inputs."""
    marked = {v for v, used in zip(jaxpr.invars, inputs, strict=True) if used}

    def is_marked(variable):
        return not isinstance(variable, _Literal) and variable in marked

    for equation in jaxpr.eqns:
        used = [is_marked(v) for v in equation.invars]
        if not any(used):
            continue
        out = [True] * len(equation.outvars)
        if equation.primitive.name in ("jit", "pjit"):
            out = _reached(equation.params["jaxpr"].jaxpr, used)
        marked.update(v for v, m in zip(equation.outvars, out, strict=True) if m)
    return [is_marked(v) for v in jaxpr.outvars]


def _draw(box, samples, key):
    """The centre and uniform points of the box."""
    vector, unravel = ravel_pytree(box.centre)
    lower, upper = (jnp.asarray(v, vector.dtype) for v in (box.lower, box.upper))
    part = jax.random.uniform(key, (samples, vector.size), vector.dtype)
    points = lower[None, :] + part * (upper - lower)[None, :]
    return jax.vmap(unravel)(jnp.concatenate([vector[None, :], points]))


@eqx.filter_jit
def _jacobians(game, points):
    def dense(z):
        flat, unravel = ravel_pytree(z)
        return jax.jacfwd(lambda v: ravel_pytree(game.apply(unravel(v)))[0])(flat)

    return jax.lax.map(dense, points)


def _in_metric(J, slices, roots):
    """`R_i J_ij R_j^-1` for metrics `P_i = R_i' R_i`."""
    size = J.shape[-1]
    R = np.zeros((size, size))
    for part, root in zip(slices, roots, strict=True):
        R[part, part] = root
    return R[None] @ J @ np.linalg.inv(R)[None]


def _least(J):
    return np.linalg.eigvalsh((J + np.swapaxes(J, 1, 2)) / 2)[:, 0]


def _norms(J):
    return np.linalg.norm(J, 2, axis=(1, 2))
