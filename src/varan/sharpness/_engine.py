"""The engine: a base optimiser that is given another gradient than that of the weights.

A rule says where else to take gradients of the batch and what direction to make of
them. The engine does what all rules share: it counts evaluations, keeps the weights
that the training loop sees unperturbed, restricts perturbations to a mask, gives chunks
of a batch their own, averages over devices, and records what the perturbation did.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ..core import _checks as checks
from ._vectors import change, cosine, inner, moved, norm, norm_dtype

Mask = PyTree | Callable[[PyTree], PyTree]
Schedule = float | Float[Array, ""] | Callable[[Int[Array, ""]], Float[Array, ""]]


class Call(NamedTuple):
    """What a rule is told besides gradients.

    Args:
        step: Steps of the base optimiser so far; schedules are functions of it.
        key: Random key of this step.
        restrict: Sets a tree like the parameters to zero off the mask.
        hvp: `(params, vector) -> (gradient, Hessian times vector)`; counts as two
            evaluations, by the call that is traced, as `grad_fn` does (see `Rule`).
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
            added to the weights (for the diagnostics), or None. Calls of `grad_fn` are
            counted where they are traced: one inside `jax.lax.scan`, `jax.lax.cond`,
            `jax.lax.while_loop` or `jax.vmap` counts by its traces, mostly one, however
            often it runs. Loop in Python, or keep a count of your own in the state.
        init: `params -> state`.
        between: `(g0, params, state, call) -> (d, state)`, for the steps that
            `interval` leaves out.
        consumes: Names of the extra arguments that are the rule's alone: the base
            optimiser does not get them, which may refuse what it does not know.

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
    consumes: tuple[str, ...] = ()


class Diagnostics(NamedTuple):
    """What the last perturbation did; NaN where nothing was measured.

    The perturbation e is the one that was made, after the rounding of the weights.

    Args:
        ascent_norm: Norm of e.
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
    no care. Clipping and weight decay of the direction belong into `base`, as do
    `optax.MultiSteps`, `optax.masked` and `optax.multi_transform`; another rule does
    not. Under `optax.chain` what stands before changes only the gradient that the
    perturbation is made of. Under `optax.inject_hyperparams` name functions that are no
    schedules, and counts that you give, in its `static_args`.

    An auxiliary output of `f` (`(gradient, aux)`) is dropped: statistics of
    normalisation layers are those of the caller's own evaluation, at the weights.

    Perturbed weights have the parameters' dtypes. In half precision a small radius
    rounds away, wholly or in part (in bfloat16 what is below a 256th of a weight);
    `state.info.ascent_norm` is the norm of what is left of it.

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
            its own perturbation. For `jax.pmap`, `jax.vmap` and
            `jax.shard_map(..., check_vma=False)`: where `jax.shard_map` keeps track of
            what varies, gradients of replicated parameters are sums over all devices.
        sync_ascent: Whether to average the gradient too, so that all devices have the
            same perturbation.
        measure_gain: Whether to record how much the loss rose at w + e: one or two
            evaluations of `value_fn(params)`, which `update` must be given.
        seed: From which the random keys of rules that want one derive.

    Returns:
        An optax transformation with extra arguments; its state is a `PerturbedState`.

    Raises:
        ValueError: If `interval` or `microbatch` is no whole number of at least 1, the
            parameters are not all real floating arrays, `base` has a rule of its own,
            `update` lacks `params`, `grad_fn` or `value_fn`, or what these return, or
            the mask, does not fit the parameters.

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
    interval = check_count("perturbed", "interval", interval)
    if microbatch is not None:
        microbatch = check_count("perturbed", "microbatch", microbatch)
    base = optax.with_extra_args_support(base)

    def init(params):
        _check_params(params)
        zero, base_state = jnp.zeros((), jnp.int32), base.init(params)
        _refuse_nesting(base_state)
        return PerturbedState(
            zero, zero, base_state, rule.init(params), _nothing(params)
        )

    def update(updates, state, params=None, *, grad_fn=None, **extra):
        _check_call(params, grad_fn, extra.get("value_fn"), measure_gain)
        _check_params(params)
        _check_gradient(updates, params, grad_fn, microbatch)
        _check_axes(axis_name, params)
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
        passed = {name: extra[name] for name in extra if name not in rule.consumes}
        step, base_state = base.update(
            _average(d, axis_name), state.base_state, params, **passed
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
        `grad_fn(params, i, chunk=None)`; the number i changes nothing. Its attribute
        `chunks` is `microbatch`, which `perturbed` compares with its own.

    Raises:
        ValueError: If the batch is empty or does not divide into that many chunks, or
            a chunk is asked for without `microbatch`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import grad_fn_from
        >>> loss = lambda w, x: jnp.mean(w * x)
        >>> grad_fn = grad_fn_from(loss, jnp.arange(4.0), microbatch=2)
        >>> float(grad_fn(jnp.asarray(1.0), 1, 0)), float(grad_fn(jnp.asarray(1.0), 1))
        (0.5, 1.5)
    """
    sizes = _batch_sizes(batch)
    if microbatch is not None:
        microbatch = check_count("grad_fn_from", "microbatch", microbatch)
        _check_chunks(sizes, microbatch)
    gradient = jax.grad(loss_fn)

    def grad_fn(params, i=0, chunk=None):
        del i
        part = batch
        if chunk is not None:
            if microbatch is None:
                raise ValueError(
                    "grad_fn_from: `microbatch` must be given to take the gradient of "
                    "one chunk (got None). Pass the number that `perturbed` has."
                )
            part = jtu.tree_map(
                lambda leaf: leaf.reshape(microbatch, -1, *leaf.shape[1:])[chunk], batch
            )
        return gradient(params, part) if key is None else gradient(params, part, key)

    grad_fn.chunks = microbatch
    return grad_fn


def with_engine_options(**defaults: int) -> Callable[[Callable], Callable]:
    """Spells out, in a method's signature, the options that it hands to `perturbed`.

    `optax.inject_hyperparams` reads signatures. It would trace all numbers in them:
    counts decide what is compiled, so those are shown as what it leaves alone.

    Args:
        **defaults: Those that are not `perturbed`'s own.
    """
    options = {
        name: option.replace(default=defaults.get(name, option.default))
        for name, option in inspect.signature(perturbed).parameters.items()
        if name in EngineOptions.__annotations__
    }

    def spell_out(method):
        own = dict(inspect.signature(method).parameters)
        del own["engine"]
        shown = [_with_plain_count(one) for one in (own | options).values()]
        method.__signature__ = inspect.signature(method).replace(parameters=shown)
        return method

    return spell_out


class _Count(np.int64):
    """An integer that is no `int`, and looks like one in signatures."""

    def __repr__(self):
        return str(int(self))


def _with_plain_count(parameter):
    whole = type(parameter.default) is int
    return parameter.replace(default=_Count(parameter.default)) if whole else parameter


def scheduled(value: Schedule, step: Int[Array, ""]) -> Float[Array, ""] | float:
    """A number, or a schedule's value at a step."""
    return value(step) if callable(value) else value


def check_schedule(owner: str, name: str, value: Schedule, *, positive=False) -> None:
    """Refuses a number out of range, and several; a schedule is taken at its word."""
    if callable(value):
        return
    check = checks.check_positive if positive else checks.check_nonnegative
    check(owner, name, value)
    if np.ndim(value) != 0:
        raise ValueError(
            f"{owner}: `{name}` must be one number, or a schedule (got shape "
            f"{np.shape(value)})."
        )


def check_count(owner: str, name: str, value: int, *, least: int = 1) -> int:
    """A whole number as an `int`; refuses others, and tracers."""
    try:
        count = operator.index(value)
    except TypeError as error:  # those of tracers are such, too
        raise ValueError(
            f"{owner}: `{name}` must be a whole number (got {value}). For "
            "`optax.inject_hyperparams` name it in `static_args`."
        ) from error
    if count < least:
        bound = f"be at least {least}" if least else "not be negative"
        raise ValueError(f"{owner}: `{name}` must {bound} (got {count}).")
    return count


def check_like(owner: str, name: str, tree: PyTree, params: PyTree[Array]) -> None:
    """Refuses what has not the parameters' structure and shapes."""
    if not _is_like(tree, params):
        raise ValueError(
            f"{owner}: `{name}` must return arrays of the parameters' structure and "
            f"shapes (got {_layout(tree, params)})."
        )


def check_booleans(owner: str, name: str, mask: PyTree) -> None:
    """Refuses masks of numbers: one of 0.5 would be taken as True."""
    for leaf in jtu.tree_leaves(mask):
        if not isinstance(leaf, bool) and getattr(leaf, "dtype", None) != np.bool_:
            raise ValueError(
                f"{owner}: `{name}` must hold booleans or boolean arrays (got "
                f"{_kind(leaf)}). Compare numbers with a threshold."
            )


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
    if _is_like(result, params):
        return result
    pair = isinstance(result, tuple) and len(result) == 2
    if pair and _is_like(result[0], params):
        return result[0]
    raise ValueError(
        "perturbed: `grad_fn` must return a gradient of the parameters' structure and "
        f"shapes, or a pair of it and anything (got {_layout(result, params)}). Of "
        "`jax.value_and_grad` return the second output alone."
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
    chosen = _spread(mask(params) if is_function(mask) else mask, params)

    def kept(here, leaf):
        if isinstance(here, bool):
            return leaf if here else jnp.zeros_like(leaf)
        return jnp.where(here, leaf, 0)

    return lambda tree: jtu.tree_map(kept, chosen, tree)


def _spread(mask, params):
    """A mask for each parameter, of a tree of masks or of a prefix of one."""
    check_booleans("perturbed", "mask", mask)
    try:
        chosen = jtu.tree_map(
            lambda here, part: jtu.tree_map(lambda _: here, part), mask, params
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            "perturbed: `mask` must have the structure of the parameters or be a "
            f"prefix of it (got {jtu.tree_structure(mask)})."
        ) from error
    masks, leaves = jtu.tree_leaves(chosen), jtu.tree_leaves(params)
    for here, leaf in zip(masks, leaves, strict=True):
        if not _broadcasts(np.shape(here), leaf.shape):
            raise ValueError(
                "perturbed: the arrays of `mask` must have the shapes of the "
                f"parameters (got {np.shape(here)} for {leaf.shape})."
            )
    return chosen


def _broadcasts(shape, wanted):
    if not shape:
        return True
    fits = (here in (1, there) for here, there in zip(shape, wanted, strict=False))
    return len(shape) == len(wanted) and all(fits)


def _diagnose(g0, d, e, params, value_fn, value):
    info = _nothing(params)._replace(cosine=cosine(g0, d))
    if e is None:
        return info
    made = change(params, e)
    info = info._replace(ascent_norm=norm(made), first_order_gain=inner(g0, made))
    if value_fn is None:
        return info
    here = _one_number("value_fn", value_fn(params)) if value is None else value
    there = _one_number("value_fn", value_fn(moved(params, e)))
    gain = there - _one_number("value", here)
    return info._replace(actual_gain=jnp.asarray(gain, info.cosine.dtype))


def _one_number(name, value):
    if not jtu.all_leaves([value]) or np.shape(value) != ():
        raise ValueError(
            f"perturbed: `{name}` must be one number, for `measure_gain` (got "
            f"{_layout(value, 0.0)})."
        )
    return value


def _nothing(params):
    unknown = jnp.full((), jnp.nan, norm_dtype(params))
    return Diagnostics(unknown, unknown, unknown, unknown)


def _is_like(tree, params):
    """Whether it has the structure and the shapes of the parameters."""
    if jtu.tree_structure(tree) != jtu.tree_structure(params):
        return False
    pairs = zip(jtu.tree_leaves(tree), jtu.tree_leaves(params), strict=True)
    return all(np.shape(leaf) == np.shape(wanted) for leaf, wanted in pairs)


def _layout(tree, params):
    """In what a tree differs from the parameters: its structure, or a shape."""
    structure = jtu.tree_structure(tree)
    if structure != jtu.tree_structure(params):
        return structure
    wanted = jtu.tree_leaves(params)
    for (path, leaf), like in zip(jtu.tree_leaves_with_path(tree), wanted, strict=True):
        if np.shape(leaf) != np.shape(like):
            return f"shape {np.shape(leaf)} for {np.shape(like)}{_at(path)}"
    raise AssertionError("only for trees that differ")


def _at(path):
    return f" at {jtu.keystr(path)}" if path else ""


def _kind(leaf):
    return getattr(leaf, "dtype", type(leaf).__name__)


def _check_params(params):
    leaves = jtu.tree_leaves_with_path(params, is_leaf=_is_masked_out)
    if not leaves:
        raise ValueError(
            "perturbed: the parameters must hold floating arrays (got none)."
        )
    for path, leaf in leaves:
        if _is_masked_out(leaf):
            raise ValueError(
                "perturbed: the parameters must be there in full (got a "
                f"`MaskedNode`{_at(path)}). Give the rule its own `mask`, and put "
                "`optax.masked` or `optax.multi_transform` into `base`."
            )
        if not jnp.issubdtype(getattr(leaf, "dtype", np.bool_), jnp.floating):
            raise ValueError(
                "perturbed: the parameters must be real floating arrays (got "
                f"{_kind(leaf)}{_at(path)}). `eqx.filter` or `eqx.partition` with "
                "`eqx.is_inexact_array` leaves integers, keys and functions out."
            )


def _is_masked_out(node):
    return isinstance(node, optax.MaskedNode)


def _refuse_nesting(base_state):
    found = jtu.tree_leaves(base_state, is_leaf=_is_perturbed_state)
    if any(map(_is_perturbed_state, found)):
        raise ValueError(
            "perturbed: `base` must have no rule of its own (got one in it). Rules "
            "cannot be nested; write one `Rule` that does both."
        )


def _is_perturbed_state(node):
    return isinstance(node, PerturbedState)


def _check_gradient(updates, params, grad_fn, microbatch):
    if microbatch is None:
        if not _is_like(updates, params):
            raise ValueError(
                "perturbed: `updates` must be the gradient at `params`, of their "
                f"structure and shapes (got {_layout(updates, params)}). It may be "
                "None with `microbatch` only."
            )
        return
    chunks = getattr(grad_fn, "chunks", microbatch)
    if chunks != microbatch:
        raise ValueError(
            "perturbed: `microbatch` must be that of `grad_fn_from` (got "
            f"{microbatch}, and {chunks} there)."
        )


def _check_axes(axis_name, params):
    """Refuses gradients that are sums over the axis already."""
    names = () if axis_name is None else axis_name
    for name in (names,) if isinstance(names, str) else names:
        # An index varies along its axis exactly where JAX keeps track of that.
        tracked = name in _varying(jax.lax.axis_index(name))
        leaves = jtu.tree_leaves(params)
        if tracked and not all(name in _varying(leaf) for leaf in leaves):
            raise ValueError(
                f"perturbed: `axis_name` must be an axis of `jax.pmap` or of "
                f"`jax.shard_map` with check_vma=False (got {name!r}, along which JAX "
                "sums gradients of replicated parameters itself)."
            )


def _varying(array):
    """Axes along which JAX knows an array to differ between devices."""
    kind = jax.typeof(array)
    # The name of older versions first.
    held = getattr(kind, "vma", None) or getattr(kind, "manual_axis_type", None)
    return getattr(held, "varying", held) or frozenset()


def _batch_sizes(batch):
    """The leading axes of a batch's arrays, none of them empty."""
    sizes = {np.shape(leaf)[:1] for leaf in jtu.tree_leaves(batch)}
    if (0,) in sizes:
        raise ValueError(
            "grad_fn_from: `batch` must not be empty (got an array of 0 samples)."
        )
    return sizes


def _check_chunks(sizes, microbatch):
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "grad_fn_from: the arrays of `batch` must have one leading axis of samples "
            f"(got leading axes {sorted(sizes)})."
        )
    ((size,),) = sizes
    if size % microbatch:
        raise ValueError(
            "grad_fn_from: `microbatch` must divide the batch of "
            f"{size} samples (got {microbatch})."
        )


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
