"""Teleportation: along a symmetry of the loss to where the next steps go better.

Parameters with the same loss form orbits under the symmetries of the model. A
teleportation climbs within the orbit, by gradient ascent on the coordinates of the
group element, to a point with a larger gradient (the next steps of any optimiser gain
more) or with another sharpness or curvature (another generalisation), and hands the
point back to the optimiser. At a quadratic's point of largest gradient within the level
set the gradient is Newton's direction.

Use an action that is exact for all inputs where the model has one. With the
data-dependent one the moved network agrees on the batch alone; what it does elsewhere
is not protected by the check.

Source: B. Zhao, R. M. Gower, R. Walters and R. Yu (2024), Improving Convergence and
Generalization Using Parameter Symmetries, ICLR 2024, arXiv 2305.13404.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..core._certificate import Certificate
from ..core._checks import check_finite, check_nonnegative, check_positive, is_traced
from ._group_actions import GroupAction
from ._teleport_objectives import GradNorm, TeleportObjective
from ._vectors import inner, minus, moved, scaled

# A trial must keep this share of the rise that the derivative promises ...
_ARMIJO = 0.5
# ... and gets at most so many halvings of the stepsize.
_HALVINGS = 20
# The largest norm of the group's coordinates in one step. They are a chart around the
# identity (I + T is invertible below 1), and orbits of non-compact groups have no
# steepest point: without a bound one long step can end anywhere.
_REACH = 0.5


class TeleportReport(eqx.Module):
    """What a teleportation did.

    Args:
        before, after: The objective.
        loss_before, loss_after: The loss on the teleport batch.
        tol: How far the loss was allowed to move.
        steps: Accepted ascent steps.
        evaluations: Gradients of the teleport batch, or losses of it; a Hessian-vector
            product counts as two.
        capped: Whether the objective had reached the cap, so that the ascent ended.
        degenerate: Whether the action was not defined at the start (rank-deficient
            activations); the parameters are then unchanged.
    """

    before: Float[Array, ""]
    after: Float[Array, ""]
    loss_before: Float[Array, ""]
    loss_after: Float[Array, ""]
    tol: Float[Array, ""]
    steps: Int[Array, ""]
    evaluations: Int[Array, ""]
    capped: Bool[Array, ""]
    degenerate: Bool[Array, ""]

    @property
    def certificate(self) -> Certificate:
        """How far the loss moved on the teleport batch, where it was evaluated."""
        return Certificate(
            "invariance defect",
            jnp.abs(self.loss_after - self.loss_before),
            tol=self.tol,
            proof=True,
            statement="|L(g . w) - L(w)| = value on the teleport batch",
        )


class _Ascent(NamedTuple):
    params: PyTree
    value: Float[Array, ""]
    loss: Float[Array, ""]
    stepsize: Float[Array, ""]
    steps: Int[Array, ""]
    trials: Int[Array, ""]
    rounds: Int[Array, ""]
    stuck: Bool[Array, ""]


def teleport(
    loss_fn: Callable[[PyTree, Any], Float[Array, ""]],
    params: PyTree,
    batch: Any,
    action: GroupAction,
    objective: TeleportObjective | None = None,
    *,
    steps: int = 10,
    lr: Float[Array, ""] | float = 1e-2,
    maximise: bool = True,
    cap: Float[Array, ""] | float | None = None,
    tol: Float[Array, ""] | float = 1e-3,
) -> tuple[PyTree, TeleportReport]:
    """Moves the parameters along their orbit to raise (or lower) an objective.

    Each step starts at the identity, takes the gradient of the objective with respect
    to the group element, and tries `lr` along it, at most a norm of 1/2; the stepsize
    is halved until the objective gains half of what its derivative promises and the
    loss has moved by at most `tol max(1, |loss|)` since the start. It is kept from step
    to step. So the objective never decreases (beyond rounding) and the loss stays.
    Along rescalings and invertible matrices the gradient has no largest value: few
    steps or a `cap` keep it in the range that the optimiser's learning rate can bear.

    Cost: for each step one gradient of the objective (with `GradNorm` two gradients of
    the loss) and for each trial one value and one loss.

    Args:
        loss_fn: `(params, batch) -> scalar`.
        params: The parameters, a pytree of floating arrays; a whole Equinox model is
            passed as `eqx.filter(model, eqx.is_inexact_array)`.
        batch: The teleport batch.
        action: The group.
        objective: What to raise; `GradNorm()` by default.
        steps: Ascent steps, at least 0 (10 in the released code).
        lr: Stepsize on the group's coordinates, not negative; 0 moves nothing.
        maximise: Whether to raise the objective; otherwise it is lowered.
        cap: The ascent ends once the objective has passed this (above it when
            raising, below it when lowering); None for no end.
        tol: How far the loss on the batch may move, relative to `max(1, |loss|)`.

    Returns:
        The moved parameters and a `TeleportReport`. They are the given ones, and the
        report says so, where the objective has passed the cap already (`capped`), the
        activations are rank-deficient (`degenerate`) or no trial succeeds (0 steps).

    Raises:
        ValueError: If the action does not fit the model, the loss or the objective is
            not finite at the start (concrete values), or a setting is out of its
            range. Under jit a start that is not finite comes back unmoved.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import EllipsoidRotation, teleport
        >>> A = jnp.diag(jnp.array([1.0, 4.0]))
        >>> loss = lambda w, batch: w @ A @ w / 2
        >>> start, action = jnp.array([2.0, 0.1]), EllipsoidRotation(A)
        >>> w, report = teleport(loss, start, None, action, lr=0.1)
        >>> bool(report.certificate.value < 1e-5)
        True
        >>> bool(abs(w[0]) < 0.05), round(float(abs(w[1])), 2)  # the steepest point
        (True, 1.0)

    Source: arXiv 2305.13404, algorithm 1 (teleportation), objectives of equations 4
        and 5.

    Differences: The released code takes fixed steps, without looking at the objective
        or the loss, has a cap of 100 on the squared gradient norm, and rescales the
        hidden activations instead of computing them.
    """
    objective = GradNorm() if objective is None else objective
    check_nonnegative("teleport", "lr", lr)
    check_nonnegative("teleport", "tol", tol)
    if not is_traced(steps) and steps < 0:
        raise ValueError(f"teleport: `steps` must be at least 0 (got {steps}).")
    action.identity(params)  # refuses a model that does not fit
    # As arrays: new values compile nothing.
    cap = jnp.inf if maximise and cap is None else -jnp.inf if cap is None else cap
    numbers = [jnp.asarray(number) for number in (steps, lr, cap, tol)]
    moved_params, report = _teleport(
        loss_fn, params, batch, action, objective, maximise, *numbers
    )
    check_finite("teleport", "loss at the start", report.loss_before)
    check_finite("teleport", "objective at the start", report.before)
    return moved_params, report


@eqx.filter_jit
def _teleport(
    loss_fn, params, batch, action, objective, maximise, steps, lr, cap, tol
) -> tuple[PyTree, TeleportReport]:
    loss0 = loss_fn(params, batch)
    value0 = objective(loss_fn, params, batch)
    dtype = value0.dtype
    sign = 1 if maximise else -1
    limit = sign * cap.astype(dtype)
    allowed = tol.astype(loss0.dtype) * jnp.maximum(1, jnp.abs(loss0))
    degenerate = action.degenerate(params, batch)

    def score(element, params):
        return sign * objective(loss_fn, action.act(params, element, batch), batch)

    def one_step(now: _Ascent) -> _Ascent:
        identity = action.identity(now.params)
        slope = jax.grad(score)(identity, now.params)
        promise = inner(slope, slope).astype(dtype)
        # What rounding alone can take away from a value that should not fall.
        slack = 8 * jnp.finfo(dtype).eps * jnp.abs(now.value)

        def trial(carry):
            stepsize, trials, *_ = carry
            element = scaled(slope, stepsize)
            params = action.act(now.params, element, batch)
            value = sign * objective(loss_fn, params, batch)
            loss = loss_fn(params, batch)
            gains = value >= now.value + _ARMIJO * stepsize * promise - slack
            good = gains & (jnp.abs(loss - loss0) <= allowed) & jnp.isfinite(value)
            stepsize = jnp.where(good, stepsize, stepsize / 2)
            return stepsize, trials + 1, good, params, value, loss

        def unfinished(carry):
            return ~carry[2] & (carry[1] <= _HALVINGS)

        longest = _REACH / jnp.maximum(jnp.sqrt(promise), jnp.finfo(dtype).tiny)
        first = jnp.minimum(now.stepsize, longest)
        start = (first, jnp.zeros((), jnp.int32), jnp.zeros((), bool))
        start = (*start, now.params, now.value, now.loss)
        stepsize, trials, good, params, value, loss = jax.lax.while_loop(
            unfinished, trial, start
        )

        def kept(new, old):
            return jtu.tree_map(lambda a, b: jnp.where(good, a, b), new, old)

        return _Ascent(
            kept(params, now.params),
            kept(value, now.value),
            kept(loss, now.loss),
            # Shorter from now on where it had to be halved, not where it was long.
            jnp.where(stepsize < first, stepsize, now.stepsize),
            now.steps + good.astype(jnp.int32),
            now.trials + trials,
            now.rounds + 1,
            ~good,
        )

    def goes_on(now: _Ascent):
        return (now.rounds < steps) & ~now.stuck & (now.value < limit)

    zero = jnp.zeros((), jnp.int32)
    finite = jnp.isfinite(loss0) & jnp.isfinite(value0)
    start = _Ascent(
        params,
        sign * value0,
        loss0,
        lr.astype(dtype),
        zero,
        zero,
        zero,
        degenerate | ~finite,
    )
    end = jax.lax.while_loop(goes_on, one_step, start)
    value_cost, gradient_cost = objective.costs()
    # The start has one value, each round one derivative, each trial one value.
    evaluations = value_cost * (1 + end.trials) + gradient_cost * end.rounds
    report = TeleportReport(
        value0,
        sign * end.value,
        loss0,
        end.loss,
        allowed,
        end.steps,
        evaluations,
        end.value >= limit,
        degenerate,
    )
    return end.params, report


class TeleportState(NamedTuple):
    """State of an optimiser that teleports.

    Args:
        step: Steps of the base optimiser.
        base_state: Its state.
        evaluations: Gradients of teleport batches so far, plus one of the training
            batch for each teleportation (the one at the new place).
        teleports: Teleportations that moved the parameters.
    """

    step: Int[Array, ""]
    base_state: PyTree
    evaluations: Int[Array, ""]
    teleports: Int[Array, ""]


def with_teleport(
    base: optax.GradientTransformation,
    action: GroupAction,
    objective: TeleportObjective | None = None,
    *,
    at_steps: Sequence[int] | Int[Array, " k"] | None = None,
    every: int | None = None,
    reset: Bool[Array, ""] | bool = False,
    steps: int = 10,
    lr: Float[Array, ""] | float = 1e-2,
    maximise: bool = True,
    cap: Float[Array, ""] | float | None = None,
    tol: Float[Array, ""] | float = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """An optimiser that teleports the parameters before some of its steps.

    `update(g, state, params, grad_fn=f, loss_fn_batch=(loss_fn, batch))`: on the
    chosen steps the parameters are teleported on that batch, the gradient of the
    training batch is taken again there (`f(params, 1)`), and the base optimiser steps
    from there; the returned update is both moves together. On all other steps it is the
    base optimiser, bit for bit. Cost: that of `teleport` on the chosen steps.

    Args:
        base: Any optax transformation.
        action: The group.
        objective: As for `teleport`.
        at_steps: The steps that begin with a teleportation, counted from 0.
        every: Or each so manieth step, not the first; at least 1. Give one of both.
        reset: Whether a teleportation forgets the base optimiser's state, as in the
            released code. By default it is kept, though momenta and accumulated squares
            belong to the old place: a reset alone changes adaptive optimisers, so that
            a gain may not come from the symmetry.
        steps, lr, maximise, cap, tol: As for `teleport`.

    Returns:
        An optax transformation with extra arguments; its state is a `TeleportState`.

    Raises:
        ValueError: If not one of `at_steps` and `every` is given, or `update` lacks
            `params`, `grad_fn` or `loss_fn_batch`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from varan.sharpness import EllipsoidRotation, with_teleport
        >>> A = jnp.diag(jnp.array([1.0, 4.0]))
        >>> loss = lambda w, batch: w @ A @ w / 2
        >>> method = with_teleport(
        ...     optax.sgd(0.25), EllipsoidRotation(A), at_steps=[0], steps=20, lr=0.1)
        >>> w = jnp.array([2.0, 0.1])
        >>> state = method.init(w)
        >>> update, state = method.update(
        ...     jax.grad(loss)(w, None), state, w, loss_fn_batch=(loss, None),
        ...     grad_fn=lambda w, i: jax.grad(loss)(w, None))
        >>> bool(loss(w + update, None) < 1e-3 * loss(w, None)), int(state.teleports)
        (True, 1)

    Source: arXiv 2305.13404, algorithm 1.
    """
    if (at_steps is None) == (every is None):
        raise ValueError(
            "with_teleport: give one of `at_steps` and `every` (got "
            f"{'none' if every is None else 'both'})."
        )
    if every is not None:
        check_positive("with_teleport", "every", every)
    base = optax.with_extra_args_support(base)

    def init(params):
        zero = jnp.zeros((), jnp.int32)
        return TeleportState(zero, base.init(params), zero, zero)

    def due(step):
        if every is not None:
            return (step > 0) & (step % every == 0)
        return jnp.any(step == jnp.asarray(at_steps, step.dtype))

    def update(
        updates, state, params=None, *, grad_fn=None, loss_fn_batch=None, **extra
    ):
        if params is None or grad_fn is None or loss_fn_batch is None:
            raise ValueError(
                "with_teleport: `update` needs `params`, `grad_fn` and `loss_fn_batch` "
                f"(got {params is not None}, {grad_fn is not None} and "
                f"{loss_fn_batch is not None}): the function (params, i) -> gradient "
                "of the training batch, and the loss with the batch to teleport on."
            )
        loss_fn, batch = loss_fn_batch

        def jump(base_state):
            new, report = teleport(
                loss_fn,
                params,
                batch,
                action,
                objective,
                steps=steps,
                lr=lr,
                maximise=maximise,
                cap=cap,
                tol=tol,
            )
            fresh = jtu.tree_map(
                lambda kept, first: jnp.where(reset, first, kept),
                base_state,
                base.init(params),
            )
            step, fresh = base.update(
                grad_fn(new, 1), fresh, new, grad_fn=grad_fn, **extra
            )
            step = moved(minus(new, params), step)
            return (
                step,
                fresh,
                report.evaluations + 1,
                (report.steps > 0).astype(jnp.int32),
            )

        def stay(base_state):
            zero = jnp.zeros((), jnp.int32)
            step, base_state = base.update(
                updates, base_state, params, grad_fn=grad_fn, **extra
            )
            return step, base_state, zero, zero

        step, base_state, evaluations, teleports = jax.lax.cond(
            due(state.step), jump, stay, state.base_state
        )
        return step, TeleportState(
            state.step + 1,
            base_state,
            state.evaluations + evaluations,
            state.teleports + teleports,
        )

    return optax.GradientTransformationExtraArgs(init, update)
