"""FSAM: the perturbation only on the parameters with most Fisher information.

Every so many steps the diagonal of the empirical Fisher information is estimated, the
squared derivative of each sample's log-likelihood, averaged; the parameters with the
largest entries form the mask of the perturbation until the next estimate. The Fisher
information says to which parameters the prediction is sensitive at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..core import _checks as checks
from ._engine import (
    EngineOptions,
    Rule,
    Schedule,
    check_count,
    check_schedule,
    perturbed,
    scheduled,
    with_engine_options,
)
from ._masks import topk_mask
from ._sam import ascent
from ._vectors import moved, norm_dtype, relative_to_peak


class FisherMaskState(NamedTuple):
    """State of a rule on a Fisher mask.

    Args:
        mask: What is perturbed.
        share: Share of the Fisher information's trace that lies on the mask, exact for
            the estimate that the mask was made of. NaN if there was nothing to rank
            (all zero, or not finite): the mask is then empty.
        due: Step at which the mask is made anew.
        rule_state: The state of the rule.
    """

    mask: PyTree[Bool[Array, "*shape"]]
    share: Float[Array, ""]
    due: Int[Array, ""]
    rule_state: PyTree


@with_engine_options()
def fsam(
    base: optax.GradientTransformation,
    rho: Schedule = 0.05,
    *,
    keep_ratio: float | Float[Array, ""] = 0.1,
    mask_every: int = 100,
    fisher: Literal["per_example", "batch"] = "per_example",
    norm_over: Literal["all", "masked"] = "all",
    maskable: PyTree[bool] | None = None,
    perturb_rest: bool = False,
    **engine: Unpack[EngineOptions],
) -> optax.GradientTransformationExtraArgs:
    """Sharpness-aware minimisation on a Fisher mask (FSAM).

    The ascent of `sam`, kept only where the Fisher information is largest. Two
    gradients of a batch a step. Beside them the Fisher information costs what its
    samples' gradients cost, once in `mask_every` steps; `grad_evals` does not hold it.
    With `axis_name`, average the Fisher information over the axis too, or each device
    has a mask of its own.

    Args:
        base: Any optax transformation; the authors take Adam.
        rho: Radius, not negative, or a schedule.
        keep_ratio: Share of the parameters that is perturbed, in [0, 1].
        mask_every: Steps between two estimates of the Fisher information, at least 1.
        fisher: `"per_example"` asks `update` for `fisher_fn(params)`, the diagonal (see
            `fisher_diagonal`), or `per_example_grad_fn(params)`, gradients of samples'
            log-likelihoods along a leading axis. `"batch"` squares the batch's own
            gradient: free, but the square of a mean and not the mean of squares.
        norm_over: Whose gradient is brought to length `rho`: that of `"all"`
            parameters before it is masked, so that the perturbation is shorter, or
            that of the `"masked"` ones.
        maskable: Which leaves take part in the ranking, a tree of booleans or a prefix
            of one; all when left out.
        perturb_rest: Perturb fully what takes no part, instead of leaving it alone.
        interval, mask, microbatch, axis_name, sync_ascent, measure_gain, seed: As in
            `perturbed`.

    Returns:
        An optax transformation whose `update` is given `grad_fn` and the source of the
        Fisher information; `state.rule_state` is a `FisherMaskState`.

    Raises:
        ValueError: If a setting is out of its range, or `update` lacks a source of the
            Fisher information.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from varan.sharpness import fisher_diagonal, fsam
        >>> x = jnp.array([[1.0, 0.1, 0.0], [2.0, 0.0, 0.1]])
        >>> log_prob = lambda w, x: -(x @ w - 1) ** 2
        >>> grad = jax.grad(lambda w: -jnp.mean(jax.vmap(log_prob, (None, 0))(w, x)))
        >>> method, w = fsam(optax.sgd(0.1), 0.5, keep_ratio=0.34), jnp.zeros(3)
        >>> _, state = method.update(
        ...     grad(w), method.init(w), w, grad_fn=lambda w, i: grad(w),
        ...     fisher_fn=lambda w: fisher_diagonal(log_prob, w, x))
        >>> state.rule_state.mask.tolist(), round(float(state.rule_state.share), 3)
        ([True, False, False], 0.996)

    Source:
        Q. Zhong, L. Ding, L. Shen, P. Mi, J. Liu, B. Du and D. Tao, 2022, "Improving
        Sharpness-Aware Minimization with Fisher Mask for Better Generalization on
        Language Models", arXiv:2210.05497, algorithm 1. Not the Fisher SAM of Kim, Li,
        Hu and Hospedales, whose ball is measured by the Fisher information.

    Differences:
        The authors' code has other choices than their text: `fisher="batch"`, and
        `maskable` without biases, embeddings and batch normalisation, which
        `perturb_rest=True` perturbs fully.
    """
    check_schedule("fsam", "rho", rho)

    def direction(g0, params, state, grad_fn, call):
        e = ascent(call.restrict(g0), scheduled(rho, call.step))
        return grad_fn(moved(params, e)), state, e

    rule = fisher_masked(
        Rule(direction),
        keep_ratio=keep_ratio,
        mask_every=mask_every,
        fisher=fisher,
        norm_over=norm_over,
        maskable=maskable,
        perturb_rest=perturb_rest,
    )
    return perturbed(base, rule, **engine)


def fisher_masked(
    rule: Rule,
    *,
    keep_ratio: float | Float[Array, ""] = 0.1,
    mask_every: int = 100,
    fisher: Literal["per_example", "batch"] = "per_example",
    norm_over: Literal["all", "masked"] = "all",
    maskable: PyTree[bool] | None = None,
    perturb_rest: bool = False,
) -> Rule:
    """Any rule of `perturbed`, with its perturbations on the Fisher mask only.

    Args:
        rule: The rule.
        keep_ratio: As in `fsam`.
        mask_every: As in `fsam`.
        fisher: As in `fsam`.
        norm_over: `"masked"` gives the rule only the mask's part of the gradients that
            it makes perturbations of; `"all"` cuts finished perturbations off.
        maskable: As in `fsam`.
        perturb_rest: As in `fsam`.

    Returns:
        A rule whose state is a `FisherMaskState`.

    Raises:
        ValueError: If a setting is out of its range.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from varan.sharpness import Rule, fisher_masked, perturbed
        >>> ahead = Rule(lambda g, w, s, grad_fn, call: (grad_fn(w + 1), s, None))
        >>> rule = fisher_masked(ahead, keep_ratio=0.5, fisher="batch")
        >>> method, w = perturbed(optax.sgd(1.0), rule), jnp.array([3.0, 1.0])
        >>> updates, _ = method.update(w, method.init(w), w, grad_fn=lambda w, i: w)
        >>> updates.tolist()
        [-4.0, -1.0]

    Source: Q. Zhong, L. Ding, L. Shen, P. Mi, J. Liu, B. Du and D. Tao, 2022,
        arXiv:2210.05497, which combines the mask with other variants, too.
    """
    if not checks.is_traced(keep_ratio) and not 0 <= float(keep_ratio) <= 1:
        raise ValueError(f"fsam: `keep_ratio` must lie in [0, 1] (got {keep_ratio}).")
    mask_every = check_count("fsam", "mask_every", mask_every)
    checks.check_choice("fsam", "fisher", fisher, ("per_example", "batch"))
    checks.check_choice("fsam", "norm_over", norm_over, ("all", "masked"))

    def init(params):
        nothing = jtu.tree_map(lambda leaf: jnp.zeros(leaf.shape, bool), params)
        unknown = jnp.full((), jnp.nan, norm_dtype(params))
        zero = jnp.zeros((), jnp.int32)
        return FisherMaskState(nothing, unknown, zero, rule.init(params))

    def estimate(g0, params, extra):
        scores = _fisher_scores(g0, params, extra, fisher)
        mask = topk_mask(scores, keep_ratio, maskable=maskable)
        everything, kept = _total(scores), _total(_keep(mask, scores))
        fine = (everything > 0) & jnp.isfinite(everything)
        mask = jtu.tree_map(lambda leaf: leaf & fine, mask)
        if perturb_rest and maskable is not None:
            mask = jtu.tree_map(
                lambda part, leaf: jtu.tree_map(lambda m: m | (not part), leaf),
                maskable,
                mask,
            )
        return mask, jnp.where(fine, kept / jnp.where(fine, everything, 1), jnp.nan)

    def direction(g0, params, state, grad_fn, call):
        now = call.step >= state.due
        mask, share = jax.lax.cond(
            now,
            lambda: estimate(g0, params, call.extra),
            lambda: (state.mask, state.share),
        )
        due = jnp.where(now, call.step + mask_every, state.due)

        if norm_over == "masked":
            outer = call.restrict
            call = call._replace(restrict=lambda tree: _keep(mask, outer(tree)))
            d, inner, e = rule.direction(g0, params, state.rule_state, grad_fn, call)
        else:
            # Exactly at the weights off the mask: adding and subtracting would round.
            def gradient(point):
                return grad_fn(jtu.tree_map(jnp.where, mask, point, params))

            d, inner, e = rule.direction(g0, params, state.rule_state, gradient, call)
            e = None if e is None else _keep(mask, e)
        return d, FisherMaskState(mask, share, due, inner), e

    def between(g0, params, state, call):
        d, inner = rule.between(g0, params, state.rule_state, call)
        return d, state._replace(rule_state=inner)

    consumes = (*rule.consumes, "fisher_fn", "per_example_grad_fn")
    return Rule(direction, init, between, consumes)


def fisher_diagonal(
    log_prob: Callable[[PyTree, PyTree], Float[Array, ""]],
    params: PyTree[Array],
    examples: PyTree[Array],
) -> PyTree[Array]:
    """The diagonal of the empirical Fisher information.

    The mean over samples of the squared derivative of `log p(y | x)`, one sample in
    memory at a time: as many gradients as there are samples.

    Args:
        log_prob: `(params, example) -> log-likelihood`, for one sample.
        params: The parameters, all floating.
        examples: Pytree of arrays with one leading axis of samples, not empty.

    Returns:
        A tree like the parameters, in float32 at least.

    Raises:
        ValueError: If there is no sample.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import fisher_diagonal
        >>> log_prob = lambda w, x: -(x @ w) ** 2 / 2
        >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> fisher_diagonal(log_prob, jnp.ones(2), x).tolist()
        [0.5, 8.0]

    Source: Q. Zhong, L. Ding, L. Shen, P. Mi, J. Liu, B. Du and D. Tao, 2022,
        arXiv:2210.05497, section 3.
    """
    for leaf in jtu.tree_leaves(examples):
        checks.check_nonempty("fisher_diagonal", "examples", leaf)
    dtype = norm_dtype(params)

    def add(total, example):
        gradient = jax.grad(log_prob)(params, example)
        return jtu.tree_map(lambda t, g: t + g.astype(dtype) ** 2, total, gradient), 0

    zero = jtu.tree_map(lambda leaf: jnp.zeros(leaf.shape, dtype), params)
    total, _ = jax.lax.scan(add, zero, examples)
    count = jtu.tree_leaves(examples)[0].shape[0]
    return jtu.tree_map(lambda leaf: leaf / count, total)


def _fisher_scores(g0, params, extra, fisher):
    dtype = norm_dtype(params)
    # The unit of the scores does not matter, and squares of the gradients themselves
    # may overflow or underflow.
    if fisher == "batch":
        relative, _ = relative_to_peak(g0)
        return jtu.tree_map(lambda g: g**2, relative)
    if "fisher_fn" in extra:
        scores = extra["fisher_fn"](params)
    elif "per_example_grad_fn" in extra:
        relative, _ = relative_to_peak(extra["per_example_grad_fn"](params))
        scores = jtu.tree_map(lambda g: jnp.mean(g**2, 0), relative)
    else:
        raise ValueError(
            "fsam: `update` needs a source of the Fisher information (got none). Pass "
            "`fisher_fn` or `per_example_grad_fn`, or choose fisher='batch'."
        )
    found, wanted = (
        [jnp.shape(leaf) for leaf in jtu.tree_leaves(tree)] for tree in (scores, params)
    )
    if found != wanted:
        raise ValueError(
            "fsam: the Fisher information must have one entry for each parameter, "
            f"shapes {wanted} (got {found}). Gradients of samples belong into "
            "`per_example_grad_fn`."
        )
    return jtu.tree_map(lambda leaf: leaf.astype(dtype), scores)


def _keep(mask, tree):
    return jtu.tree_map(lambda m, leaf: jnp.where(m, leaf, 0), mask, tree)


def _total(scores):
    return sum(jnp.sum(leaf) for leaf in jtu.tree_leaves(scores))
