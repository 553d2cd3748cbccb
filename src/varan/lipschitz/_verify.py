"""Verification: whether any input of a box has an unsafe output.

A case (a box and a polyhedron `A y <= b`) cannot happen if over the box some row of
`A f(x) - b` has a positive lower bound. Boxes where no row has are searched for a
counterexample and then halved, many at a time, until all are proved, an input is
found, or the time is up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ..core import Certificate
from ..core._checks import check_choice, check_finite, check_nonnegative, check_positive
from ._forward import FORWARD_METHODS, ForwardMethod, bounds
from ._graph import as_callable
from ._sets import Box
from ._vnnlib import UnsafeCase

_BATCH = 64
_STARTS = 32
_ASCENTS = 40
# Boxes narrower than this share of the first one are not split further.
_NARROWEST = 2.0**-40


class Verification(NamedTuple):
    """What was found about a property.

    Args:
        status: `"holds"` (proved), `"violated"` (with the input that shows it),
            `"unknown"`.
        counterexample: That input, of the model's input shape; None otherwise.
        output: The model's output there.
        boxes: Boxes that were bounded.
        certificate: How far from unsafe every input is, or how far beyond it the
            counterexample.
    """

    status: Literal["holds", "violated", "unknown"]
    counterexample: np.ndarray | None
    output: np.ndarray | None
    boxes: int
    certificate: Certificate


def verify(
    model: Callable[[Array], Array],
    cases: Sequence[UnsafeCase],
    input_shape: tuple[int, ...] | None = None,
    *,
    timeout: float = 60.0,
    forward: ForwardMethod = "crown",
) -> Verification:
    """Proves that a property holds, or finds an input that violates it.

    Costs one CROWN bound a box; a property of a small box is usually decided at the
    first. Halving suits few inputs (some tens); with many it rarely gets further than
    the first bound.

    Args:
        model: As for `local_lipschitz`: one input without batch axis.
        cases: When the property is violated: from `read_vnnlib` or
            `robustness_property`. Inputs and outputs are flat there.
        input_shape: The model's input shape; by default a vector.
        timeout: Seconds for all cases together, after which the rest is unknown.
        forward: How the network is bounded.

    Returns:
        The verdict, computed in float64 whatever JAX's setting. A counterexample was
        checked by running the model on it.

    Raises:
        ValueError: Cases that do not fit the model, none at all, or a `timeout` that
            is not positive.
        UnsupportedPrimitive: An operation of the model without a rule.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.lipschitz import robustness_property, verify
        >>> net = lambda x: jnp.stack([x[0] + jax.nn.relu(x[1]), -x[0]])
        >>> near = robustness_property(jnp.array([1.0, 0.0]), 0.5, 0, 2)
        >>> verify(net, near).status
        'holds'
        >>> far = robustness_property(jnp.array([1.0, 0.0]), 2.0, 0, 2)
        >>> verify(net, far).status
        'violated'

    Source:
        Zhang, Weng, Chen, Hsieh, Daniel (2018), arXiv:1811.00866, for the bounds;
        Wang, Pei, Whitehouse, Yang, Jana (2018), arXiv:1804.10829, for halving.
    """
    check_choice("verify", "forward", forward, FORWARD_METHODS)
    check_positive("verify", "timeout", timeout)
    if not cases:
        raise ValueError("verify: `cases` must not be empty: nothing would be proved.")
    # A property's numbers are float64; rounding them would prove another property.
    with jax.enable_x64(True):
        _check_cases(model, cases, input_shape)
        return _verify(model, cases, input_shape, timeout, forward)


def _verify(model, cases, input_shape, timeout, forward) -> Verification:
    until, boxes, slack, unknown = time.monotonic() + timeout, 0, math.inf, False
    for done, case in enumerate(cases):
        # What one case leaves of its share goes to the next.
        share = (until - time.monotonic()) / (len(cases) - done)
        found = _Search(model, case, input_shape, forward).run(share)
        boxes += found.boxes
        if found.x is not None:
            shown = _certificate("violated", found.slack)
            return Verification("violated", found.x, found.y, boxes, shown)
        slack, unknown = min(slack, found.slack), unknown or not found.proved
    status = "unknown" if unknown else "holds"
    return Verification(status, None, None, boxes, _certificate(status, slack))


def robustness_property(
    x: Float[Array, ...],
    epsilon: float,
    label: int,
    classes: int,
    *,
    clip: tuple[float, float] | None = None,
) -> list[UnsafeCase]:
    """The property that a class keeps its lead in an l_inf ball, as unsafe cases.

    Args:
        x: The centre.
        epsilon: Radius, at least 0, in the units of `x`.
        label: The class that must lead.
        classes: Number of the model's outputs.
        clip: Smallest and largest value an entry can take.

    Returns:
        One case for each other class: that it leads or draws level.

    Raises:
        ValueError: A negative radius, a label that does not exist, an input that is
            not finite or lies outside `clip`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import robustness_property
        >>> len(robustness_property(jnp.zeros(4), 0.1, 2, 10))
        9
    """
    owner = "robustness_property"
    check_finite(owner, "x", x)
    check_nonnegative(owner, "epsilon", epsilon)
    if label not in range(classes) or classes < 2:
        raise ValueError(
            f"{owner}: `label` must be one of at least two classes "
            f"(got {label} of {classes})."
        )
    centre = np.asarray(x, np.float64).ravel()
    lower, upper = centre - epsilon, centre + epsilon
    if clip is not None:
        if not np.all((clip[0] <= centre) & (centre <= clip[1])):
            raise ValueError(f"{owner}: `x` must lie in `clip` (got {tuple(clip)}).")
        lower, upper = np.maximum(lower, clip[0]), np.minimum(upper, clip[1])
    eye = np.eye(classes)
    return [
        UnsafeCase(
            lower, upper, (eye[label] - eye[j])[None], np.zeros(1), np.zeros(1, bool)
        )
        for j in range(classes)
        if j != label
    ]


class _Found(NamedTuple):
    proved: bool
    slack: float
    boxes: int
    x: np.ndarray | None = None
    y: np.ndarray | None = None


class _Search:
    """Branch and bound over halves of one case's box."""

    def __init__(self, model, case: UnsafeCase, shape, forward):
        self.model, self.case, self.forward = as_callable(model), case, forward
        self.shape = shape or case.lower.shape
        self.A, self.b = jnp.asarray(case.A), jnp.asarray(case.b)
        self.slack, self.boxes = math.inf, 0

    def run(self, seconds: float) -> _Found:
        until = time.monotonic() + seconds
        queue = [(np.float64(self.case.lower), np.float64(self.case.upper))]
        narrowest = _NARROWEST * np.maximum(queue[0][1] - queue[0][0], 1e-300)
        stuck = False
        found = self._attack(*queue[0])
        while queue and found is None:
            if self.boxes and time.monotonic() > until:
                return _Found(False, self.slack, self.boxes)
            batch, queue = queue[-_BATCH:], queue[:-_BATCH]
            lower, upper = (np.stack(side) for side in zip(*batch, strict=True))
            # The first box alone, then always as many: two compilations.
            missing = (1 if self.boxes == 0 else _BATCH) - len(batch)
            filled = [
                np.concatenate([s, s[:1].repeat(missing, 0)]) for s in (lower, upper)
            ]
            gaps, pull = self._bound(*filled)
            best = np.max(gaps[: len(batch)], 1, initial=-np.inf)
            self.boxes += len(batch)
            self.slack = min(
                self.slack, float(np.min(np.where(best > 0, best, np.inf)))
            )
            for k in np.flatnonzero(~(best > 0)):
                found = self._try((lower[k] + upper[k]) / 2)
                if found is not None:
                    break
                width = upper[k] - lower[k]
                if np.all(width <= narrowest):
                    stuck = True
                    continue
                axis = int(
                    np.argmax(width * (pull[k] + 1e-12 * np.max(pull[k]) + 1e-300))
                )
                queue += _halves(lower[k], upper[k], axis)
        if found is not None:
            return _Found(False, self._distance(found[1]), self.boxes, *found)
        return _Found(not stuck, self.slack, self.boxes)

    def _bound(self, lower, upper):
        parts = _bound_boxes(
            self.model, self.A, self.b, lower, upper, self.shape, self.forward
        )
        return [np.asarray(part) for part in parts]

    def _attack(self, lower, upper):
        points = _descend(
            self.model, self.A, self.b, lower, upper, self.shape, jax.random.key(0)
        )
        for point in np.asarray(points):
            found = self._try(point)
            if found is not None:
                return found
        return None

    def _try(self, x):
        """The input and its output in float64, if they are a violation."""
        x = np.clip(np.asarray(x, np.float64), self.case.lower, self.case.upper)
        y = np.asarray(self.model(jnp.asarray(x.reshape(self.shape))), np.float64)
        if not self.case.contains(x, y.ravel()):
            return None
        return x.reshape(self.shape), y

    def _distance(self, y):
        return float(np.max(self.case.A @ y.ravel() - self.case.b, initial=-np.inf))


@eqx.filter_jit
def _bound_boxes(model, A, b, lower, upper, shape, forward):
    """Lower bounds of every row over every box, and how much each input matters."""

    def rows(x):
        return A @ jnp.ravel(model(x)) - b

    def one(lower, upper):
        box = Box(lower.reshape(shape), upper.reshape(shape))
        slopes = jax.jacrev(rows)(box.centre).reshape(len(b), lower.size)
        return bounds(rows, box, method=forward).lower, jnp.sum(jnp.abs(slopes), 0)

    if A.shape[0] == 0:
        return jnp.zeros((len(lower), 0)), jnp.ones_like(lower)
    return jax.vmap(one)(lower, upper)


@eqx.filter_jit
def _descend(model, A, b, lower, upper, shape, key):
    """Points of the box where the largest row is small, by signed steps; best first."""

    def worst(x):
        gaps = A @ jnp.ravel(model(x.reshape(shape))) - b
        return jnp.max(gaps, initial=-jnp.inf)

    def step(carry, share):
        x, best, at = carry
        value, slope = jax.vmap(jax.value_and_grad(worst))(x)
        better = value < best
        at = jnp.where(better[:, None], x, at)
        moved = x - share * (upper - lower)[None] * jnp.sign(slope)
        kept = jnp.clip(moved, lower[None], upper[None])
        return (kept, jnp.where(better, value, best), at), None

    random = jax.random.uniform(key, (_STARTS, lower.size), lower.dtype)
    start = lower[None] + random * (upper - lower)[None]
    start = start.at[0].set((lower + upper) / 2)
    shares = 0.25 * 0.9 ** jnp.arange(_ASCENTS, dtype=lower.dtype)
    best = jnp.full(_STARTS, jnp.inf, lower.dtype)
    (_, best, at), _ = lax.scan(step, (start, best, start), shares)
    return at[jnp.argsort(best)]


def _halves(lower, upper, axis):
    middle = lower[axis] + (upper[axis] - lower[axis]) / 2
    left, right = upper.copy(), lower.copy()
    left[axis] = right[axis] = middle
    return [(lower, left), (right, upper)]


def _check_cases(model, cases, shape) -> None:
    for case in cases:
        same = case.lower.shape == case.upper.shape
        bounded = same and np.all(np.isfinite([case.lower, case.upper]))
        if not bounded or not np.all(case.lower <= case.upper):
            raise ValueError(
                "verify: every case's box must be finite and `lower` at most `upper`. "
                "Bound each input."
            )
        if not (np.all(np.isfinite(case.A)) and np.all(np.isfinite(case.b))):
            raise ValueError("verify: every case's `A` and `b` must be finite.")
    inputs = {case.lower.size for case in cases}
    size = math.prod(shape) if shape else next(iter(inputs))
    if inputs != {size}:
        raise ValueError(
            f"verify: the model has {size} inputs, the property {sorted(inputs)}."
        )
    example = jax.ShapeDtypeStruct(shape or (size,), jnp.result_type(float))
    outputs = math.prod(jax.eval_shape(as_callable(model), example).shape)
    wrong = {case.A.shape[1] for case in cases} - {outputs}
    if wrong:
        raise ValueError(
            f"verify: the model has {outputs} outputs, the property {sorted(wrong)}."
        )


def _certificate(status: str, slack: float) -> Certificate:
    statement = {
        "holds": "max (A f(x) - b) >= value for every x of the property's boxes",
        "violated": "max (A f(x) - b) = value at the counterexample, in float64",
        "unknown": "no positive lower bound of max (A f(x) - b) was found in time",
    }[status]
    return Certificate(
        "distance from unsafe",
        -math.inf if status == "unknown" else slack,
        proof=status != "unknown",
        statement=statement,
    )
