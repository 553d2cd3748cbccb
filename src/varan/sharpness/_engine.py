"""The engine: a base optimiser that is given another gradient than that of the weights.

A rule says where else to take gradients of the batch and what direction to make of
them. The engine does what all rules share: it counts evaluations, keeps the weights
that the training loop sees unperturbed, restricts perturbations to a mask, gives chunks
of a batch their own, averages over devices, and records what the perturbation did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ..core import _checks as checks
from ._vectors import inner, moved, norm, norm_dtype

Mask = PyTree | Callable[[PyTree], PyTree]
Schedule = float | Float[Array, ""] | Callable[[Int[Array, ""]], Float[Array, ""]]


class Call(NamedTuple):
    """What a rule is told besides gradients.

    Args:
        step: Steps of the base optimiser so far; schedules are functions of it.
        key: Random key of this step.
        restrict: Sets a tree like the parameters to zero off the mask.
        hvp: `(params, vector) -> (gradient, Hessian times vector)`; counts as two
            evaluations.
        extra: The caller's extra arguments.
    """

    step: Int[Array, ""]
    key: PRNGKeyArray
    restrict: Callable[[PyTree], PyTree]
    hvp: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    extra: Mapping[str, Any]


def no_state(params: PyTree) -> tuple[()]:
    """The state of a rule that has none."""
    del params
    return ()


def plain(g0: PyTree, params: PyTree, state: PyTree, call: Call) -> tuple:
    """What is done on the steps between: the gradient as it is."""
    del params, call
    return g0, state


class Rule(NamedTuple):
    """Where to take gradients, and the direction to make of them.

    Args:
        direction: `(g0, params, state, grad_fn, call) -> (d, state, perturbation)`.
            `g0` is the gradient at `params`; each `grad_fn(point)` is one more of the
            same batch; `d` goes to the base optimiser; the perturbation is what was
            added to the weights (for the diagnostics), or None.
        init: `params -> state`.
        between: `(g0, params, state, call) -> (d, state)`, for the steps that
            `interval` leaves out.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from varan.sharpness import Rule, perturbed
        >>> ahead = Rule(lambda g0, w, s, grad_fn, call: (grad_fn(w + 1.0), s, None))
        >>> method = perturbed(optax.sgd(0.5), ahead)
        >>> w = jnp.asarray(2.0)
        >>> grad_fn = lambda w, i: w
        >>> update, state = method.update(w, method.init(w), w, grad_fn=grad_fn)
        >>> float(update), int(state.grad_evals)
        (-1.5, 2)
    """

    direction: Callable[..., tuple[PyTree, PyTree, PyTree | None]]
    init: Callable[[PyTree], PyTree] = no_state
    between: Callable[..., tuple[PyTree, PyTree]] = plain


class Diagnostics(NamedTuple):
    """What the last perturbation did; NaN where nothing was measured.

    Args:
        ascent_norm: Norm of the perturbation e.
        cosine: Cosine of the angle between the gradient and the direction used.
        first_order_gain: Inner product of gradient and e, the predicted rise.
        actual_gain: Loss at w + e minus loss at w, with `measure_gain`.
    """

    ascent_norm: Float[Array, ""]
    cosine: Float[Array, ""]
    first_order_gain: Float[Array, ""]
    actual_gain: Float[Array, ""]


class PerturbedState(NamedTuple):
    """State of a perturbed optimiser.

    Args:
        step: Steps of the base optimiser.
        grad_evals: Gradients of one batch so far, the caller's included; a
            Hessian-vector product counts as two.
        base_state: The base optimiser's state.
        rule_state: The rule's own.
        info: What the last perturbation did.
    """

    step: Int[Array, ""]
    grad_evals: Int[Array, ""]
    base_state: PyTree
    rule_state: PyTree
    info: Diagnostics


class EngineOptions(TypedDict, total=False):
    """The options of `perturbed`, which every method made with it takes."""

    interval: int
    mask: Mask | None
    microbatch: int | None
    axis_name: str | tuple[str, ...] | None
    sync_ascent: bool
    measure_gain: bool
    seed: int


def perturbed(
    base: optax.GradientTransformation,
    rule: Rule,
    *,
    interval: int = 1,
    mask: Mask | None = None,
    microbatch: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    sync_ascent: bool = False,
    measure_gain: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """A base optimiser whose gradient a rule replaces.

    `update(g, state, params, grad_fn=f)` takes the gradient of the batch at `params`
    and `f(params, i)`, the i-th further gradient of the same batch (i = 1, 2, ...), as
    optax's own sharpness-aware wrapper does in opaque mode; `varan.train` offers it by
    itself. All other extra arguments reach the base optimiser. The weights that the
    loop sees are never the perturbed ones: checkpoints, averages and evaluations need
    no care. Clipping and weight decay of the direction belong into `base`, as does
    `optax.MultiSteps`. Under `optax.chain` what stands before changes only the
    gradient that the perturbation is made of.

    An auxiliary output of `f` (`(gradient, aux)`) is dropped: statistics of
    normalisation layers are those of the caller's own evaluation, at the weights.

    Args:
        base: Any optax transformation.
        rule: Where to take gradients and what to make of them.
        interval: The rule runs on each so manieth step, from the first; the others
            use what the rule has for them, by default the plain gradient.
        mask: Which parameters are perturbed: a tree of booleans or boolean arrays like
            the parameters (or a prefix of it), or a function of them that makes one.
            The direction has all entries all the same.
        microbatch: Number of chunks, each with its own perturbation, whose directions
            are averaged ("m-sharpness"). `f(params, i, chunk)` is then the gradient of
            one chunk, also for i = 0; pass None as the gradient, it is not needed.
            A rule's state is the one after the last chunk.
        axis_name: Named axis or axes to average the direction over; each device has
            its own perturbation.
        sync_ascent: Whether to average the gradient too, so that all devices have the
            same perturbation.
        measure_gain: Whether to record how much the loss rose at w + e: one or two
            evaluations of `value_fn(params)`, which `update` must be given.
        seed: From which the random keys of rules that want one derive.

    Returns:
        An optax transformation with extra arguments; its state is a `PerturbedState`.

    Raises:
        ValueError: If `interval` or `microbatch` is below 1, the parameters have no
            floating array, or `update` lacks `params`, `grad_fn` or `value_fn`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from varan.sharpness import Rule, perturbed
        >>> loss = lambda w: jnp.sum(w**4)
        >>> def rule(g0, w, state, grad_fn, call):
        ...     e = 0.1 * g0
        ...     return grad_fn(w + e), state, e
        >>> method = perturbed(optax.sgd(0.1), Rule(rule))
        >>> w = jnp.ones(2)
        >>> state = method.init(w)
        >>> updates, state = method.update(
        ...     jax.grad(loss)(w), state, w, grad_fn=lambda w, i: jax.grad(loss)(w))
        >>> bool(jnp.allclose(updates, -0.4 * 1.4**3))
        True

    Source:
        Foret, Kleiner, Mobahi and Neyshabur, 2021 (arXiv 2010.01412), for the scheme.

    Differences:
        With microbatches a state-keeping rule sees the chunks one after another.
    """
    for name, value in (("interval", interval), ("microbatch", microbatch)):
        if value is not None and value < 1:
            raise ValueError(f"perturbed: `{name}` must be at least 1 (got {value}).")
    base = optax.with_extra_args_support(base)

    def init(params):
        if not jtu.tree_leaves(params):
            raise ValueError(
                "perturbed: the parameters must hold floating arrays (got none)."
            )
        zero = jnp.zeros((), jnp.int32)
        return PerturbedState(
            zero, zero, base.init(params), rule.init(params), _nothing(params)
        )

    def update(updates, state, params=None, *, grad_fn=None, **extra):
        _check_call(params, grad_fn, extra.get("value_fn"), measure_gain)
        gradients = _Gradients(grad_fn, params)
        restrict = _restriction(mask, params)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        value_fn = extra["value_fn"] if measure_gain else None

        def direction(g0, rule_state, gradients, key):
            call = Call(state.step, key, restrict, gradients.hvp, extra)
            d, rule_state, e = rule.direction(g0, params, rule_state, gradients, call)
            info = _diagnose(g0, d, e, params, value_fn, extra.get("value"))
            return d, rule_state, info

        def active(rule_state):
            if microbatch is None:
                g0 = _average(updates, axis_name if sync_ascent else None)
                return direction(g0, rule_state, gradients, key)

            def one_chunk(rule_state, chunk):
                part, here = gradients.of(chunk), jax.random.fold_in(key, chunk)
                g0 = part.evaluate(params, 0)
                d, rule_state, info = direction(g0, rule_state, part, here)
                return rule_state, (d, info)

            rule_state, (d, info) = _over_chunks(one_chunk, rule_state, microbatch)
            return d, rule_state, info

        def between(rule_state):
            g0 = updates
            if microbatch is not None:
                one_chunk = lambda s, c: (s, gradients.of(c).evaluate(params, 0))  # noqa: E731
                _, g0 = _over_chunks(one_chunk, (), microbatch)
            call = Call(state.step, key, restrict, gradients.hvp, extra)
            d, rule_state = rule.between(g0, params, rule_state, call)
            return d, rule_state, _nothing(params)

        counted = {}
        active, between = (_counting(counted, f, gradients) for f in (active, between))
        if interval == 1:
            d, rule_state, info = active(state.rule_state)
            evaluations = counted["active"]
        else:
            now = state.step % interval == 0
            d, rule_state, info = jax.lax.cond(now, active, between, state.rule_state)
            evaluations = jnp.where(now, counted["active"], counted["between"])
        # Without `grad_fn`: a line search refuses arguments that it does not know.
        step, base_state = base.update(
            _average(d, axis_name), state.base_state, params, **extra
        )
        evaluations = evaluations + int(updates is not None)
        return step, PerturbedState(
            state.step + 1, state.grad_evals + evaluations, base_state, rule_state, info
        )

    return optax.GradientTransformationExtraArgs(init, update)


def grad_fn_from(
    loss_fn: Callable[..., Float[Array, ""]],
    batch: PyTree[Array],
    key: PRNGKeyArray | None = None,
    *,
    microbatch: int | None = None,
) -> Callable[..., PyTree]:
    """The further gradients that `perturbed` asks for, all of one batch.

    Args:
        loss_fn: `(params, batch) -> scalar`, or `(params, batch, key)` with a key.
        batch: Pytree of arrays with one leading axis of samples.
        key: Random key of the step (dropout), the same for every evaluation.
        microbatch: Number of chunks, as given to `perturbed`.

    Returns:
        `grad_fn(params, i, chunk=None)`; the number i changes nothing.

    Raises:
        ValueError: If the batch does not divide into that many chunks.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import grad_fn_from
        >>> loss = lambda w, x: jnp.mean(w * x)
        >>> grad_fn = grad_fn_from(loss, jnp.arange(4.0), microbatch=2)
        >>> float(grad_fn(jnp.asarray(1.0), 1, 0)), float(grad_fn(jnp.asarray(1.0), 1))
        (0.5, 1.5)
    """
    if microbatch is not None:
        for size in {leaf.shape[0] for leaf in jtu.tree_leaves(batch)}:
            if microbatch < 1 or size % microbatch:
                raise ValueError(
                    "grad_fn_from: `microbatch` must divide the batch of "
                    f"{size} samples (got {microbatch})."
                )
    gradient = jax.grad(loss_fn)

    def grad_fn(params, i=0, chunk=None):
        del i
        part = batch
        if chunk is not None:
            part = jtu.tree_map(
                lambda leaf: leaf.reshape(microbatch, -1, *leaf.shape[1:])[chunk], batch
            )
        return gradient(params, part) if key is None else gradient(params, part, key)

    return grad_fn


def scheduled(value: Schedule, step: Int[Array, ""]) -> Float[Array, ""] | float:
    """A number, or a schedule's value at a step."""
    return value(step) if callable(value) else value


def check_schedule(owner: str, name: str, value: Schedule) -> None:
    """Refuses a negative number; a schedule is taken at its word."""
    if not callable(value):
        checks.check_nonnegative(owner, name, value)


def is_function(mask: Mask) -> bool:
    """Whether a mask is a function: a model of booleans can be called, too."""
    leaves = [leaf for leaf in jtu.tree_leaves(mask) if leaf is not mask]
    booleans = [jnp.result_type(leaf) == jnp.bool_ for leaf in leaves]
    return callable(mask) and not (booleans and all(booleans))


class _Gradients:
    """The caller's gradients, numbered, and counted while they are traced."""

    def __init__(self, grad_fn, params, ledger=None, chunk=None):
        self.grad_fn, self.params, self.number = grad_fn, params, 0
        self.ledger = {"evaluations": 0} if ledger is None else ledger
        self.chunk = chunk

    def __call__(self, point):
        self.number += 1
        return self.evaluate(point, self.number)

    def evaluate(self, point, number):
        self.ledger["evaluations"] += 1
        where = () if self.chunk is None else (self.chunk,)
        return _gradient_alone(self.grad_fn(point, number, *where), self.params)

    def hvp(self, point, vector):
        self.ledger["evaluations"] += 1  # and one more for the gradient beside it
        return jax.jvp(self, (point,), (vector,))

    def of(self, chunk):
        return _Gradients(self.grad_fn, self.params, self.ledger, chunk)


def _counting(counted, branch, gradients):
    """A branch that notes the evaluations in it, however often it is traced."""

    def run(rule_state):
        gradients.ledger["evaluations"], gradients.number = 0, 0
        result = branch(rule_state)
        counted[branch.__name__] = gradients.ledger["evaluations"]
        return result

    return run


def _gradient_alone(result, params):
    """The gradient of a `grad_fn` that may return an auxiliary output beside it."""
    structure = jtu.tree_structure(params)
    if jtu.tree_structure(result) == structure:
        return result
    pair = isinstance(result, tuple) and len(result) == 2
    if pair and jtu.tree_structure(result[0]) == structure:
        return result[0]
    raise ValueError(
        "perturbed: `grad_fn` must return a gradient of the parameters' structure, or "
        f"a pair of it and anything (got {jtu.tree_structure(result)})."
    )


def _over_chunks(one_chunk, rule_state, chunks):
    """Means over the chunks, one in memory at a time."""
    rule_state, stacked = jax.lax.scan(
        one_chunk, rule_state, jnp.arange(chunks, dtype=jnp.int32)
    )
    return rule_state, jtu.tree_map(lambda leaf: jnp.mean(leaf, 0), stacked)


def _average(tree, axis_name):
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def _restriction(mask, params):
    if mask is None:
        return lambda tree: tree
    chosen = mask(params) if is_function(mask) else mask

    def kept(here, part):
        if isinstance(here, bool):
            return part if here else jtu.tree_map(jnp.zeros_like, part)
        return jtu.tree_map(lambda leaf: jnp.where(here, leaf, 0), part)

    def restrict(tree):
        try:
            return jtu.tree_map(kept, chosen, tree)
        except (ValueError, TypeError) as error:
            raise ValueError(
                "perturbed: `mask` must have the structure of the parameters or be a "
                f"prefix of it (got {jtu.tree_structure(chosen)})."
            ) from error

    return restrict


def _diagnose(g0, d, e, params, value_fn, value):
    lengths = norm(g0) * norm(d)
    nonzero = lengths != 0
    cosine = jnp.where(nonzero, inner(g0, d) / jnp.where(nonzero, lengths, 1), 1)
    info = _nothing(params)._replace(cosine=cosine)
    if e is None:
        return info
    info = info._replace(ascent_norm=norm(e), first_order_gain=inner(g0, e))
    if value_fn is None:
        return info
    here = value_fn(params) if value is None else value
    gain = jnp.asarray(value_fn(moved(params, e)) - here, cosine.dtype)
    return info._replace(actual_gain=gain)


def _nothing(params):
    unknown = jnp.full((), jnp.nan, norm_dtype(params))
    return Diagnostics(unknown, unknown, unknown, unknown)


def _check_call(params, grad_fn, value_fn, measure_gain):
    if params is None:
        raise ValueError("perturbed: `update` needs `params`, the weights.")
    if grad_fn is None:
        raise ValueError(
            "perturbed: `update` needs `grad_fn`, a function (params, i) -> gradient "
            "of the same batch. `grad_fn_from(loss_fn, batch)` makes one."
        )
    if measure_gain and value_fn is None:
        raise ValueError(
            "perturbed: `measure_gain` needs `value_fn`, a function params -> loss of "
            "the same batch, among `update`'s arguments."
        )
