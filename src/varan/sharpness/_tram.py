"""TRAM: an adversarial neighbourhood as large as the prediction has moved.

Adaptive sharpness-aware minimisation without a radius to choose: it is, at each step,
the Kullback-Leibler distance between what the network predicts and what another one
does: the network a step ago, the one that training began from, their running mean, or
itself on noisy inputs. Where predictions drift fast the method asks for flatness in a
large neighbourhood, where they hold still it leaves the optimiser alone. Meant for
fine-tuning that shall keep what was learned before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..core import _checks as checks
from ._engine import (
    EngineOptions,
    Rule,
    Schedule,
    check_like,
    check_schedule,
    perturbed,
    scheduled,
    with_engine_options,
)
from ._masks import elementwise_scale
from ._sam import ascent
from ._vectors import moved, norm_dtype

Noise = Callable[[Array], Array]


class TRAMState(NamedTuple):
    """State of the rule.

    Args:
        anchor: The weights whose predictions the next step compares with; `()` where
            none are needed.
        distance: The last step's distance, in nats, not negative: the radius before
            `scale` and `max_radius`.
    """

    anchor: PyTree
    distance: Float[Array, ""]


@with_engine_options()
def tram(
    base: optax.GradientTransformation,
    distance: Literal["prev", "init", "ema", "input"] = "prev",
    *,
    sigma: float = 0.1,
    scale: Schedule = 1.0,
    max_radius: float | None = None,
    adaptive: bool = True,
    decay: float = 0.999,
    **engine: Unpack[EngineOptions],
) -> optax.GradientTransformationExtraArgs:
    """Trust region aware minimisation (TRAM) around any optax optimiser.

    The ascent is d w^2 g / |w g|, elementwise, with d the mean over the batch of
    KL(p || q). Two gradients and two forward passes a step (`grad_evals` holds the
    gradients).

    Args:
        base: Any optax transformation; the authors take Adam.
        distance: p and q: predictions of the weights a step ago and of the present
            ones (`"prev"`); of the first weights and the present ones (`"init"`); of
            the running mean of all and the present ones (`"ema"`); of the present
            weights on noisy and on clean inputs (`"input"`).
        sigma: Deviation of the noise, positive, in units of what it is added to.
        scale: Factor of the distance, not negative, or a schedule; the paper has 1.
        max_radius: Largest radius, or None.
        adaptive: Whether the radius is relative to each weight, as in the paper.
        decay: Of the running mean, in [0, 1).
        interval, mask, microbatch, axis_name, sync_ascent, measure_gain, seed: As in
            `perturbed`; `microbatch` must be left out.

    Returns:
        An optax transformation whose `update` is given `grad_fn` and
        `logits_fn(params, noise)`, the batch's logits: classes along the last axis,
        samples along all others. It applies `noise`, a function, to the inputs or
        their embeddings: `lambda params, noise: model(params, noise(x))`.
        `state.rule_state` is a `TRAMState`.

    Raises:
        ValueError: If a setting is out of its range, `microbatch` is given, `update`
            lacks `logits_fn`, or the logits have fewer than two classes.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from varan.sharpness import tram
        >>> x = jnp.array([[1.0, 2.0], [0.5, -1.0]])
        >>> loss = lambda w: -jax.nn.log_softmax(x @ w)[:, 0].mean()
        >>> grad, logits = jax.grad(loss), lambda w, noise: noise(x) @ w
        >>> method, w = tram(optax.sgd(0.5), "init"), jnp.ones((2, 2))
        >>> state = method.init(w)
        >>> for _ in range(2):
        ...     updates, state = method.update(
        ...         grad(w), state, w, grad_fn=lambda w, i: grad(w), logits_fn=logits)
        ...     w = optax.apply_updates(w, updates)
        ...     print(round(float(state.rule_state.distance), 4))
        0.0
        0.0466

    Source:
        T. Sherborne, N. Saphra, P. Dasigi and H. Peng, 2024, "TRAM: Bridging Trust
        Regions and Sharpness Aware Minimization", arXiv:2310.03646, equation 7.

    Differences:
        The released code adds d w^2 / |w g|, without the gradient; this is the paper's.
        `"ema"` takes the teacher of their baseline MESA as the trust region's centre.
        The first step of `"prev"`, `"init"` and `"ema"` is the base optimiser's.
    """
    choices = ("prev", "init", "ema", "input")
    checks.check_choice("tram", "distance", distance, choices)
    checks.check_positive("tram", "sigma", sigma)
    check_schedule("tram", "scale", scale)
    if max_radius is not None:
        checks.check_positive("tram", "max_radius", max_radius)
    if not checks.is_traced(decay) and not 0 <= decay < 1:
        raise ValueError(f"tram: `decay` must lie in [0, 1) (got {decay}).")
    _refuse_chunks("tram", engine)

    def init(params):
        anchor = () if distance == "input" else params
        if distance == "ema":
            # In half precision a mean of so many steps would stand still.
            dtype = norm_dtype(params)
            anchor = jtu.tree_map(lambda leaf: leaf.astype(dtype), params)
        return TRAMState(anchor, jnp.zeros((), norm_dtype(params)))

    def follow(anchor, params):
        if distance == "prev":
            return params
        if distance == "ema":
            return jtu.tree_map(
                lambda a, p: decay * a + (1 - decay) * p.astype(a.dtype), anchor, params
            )
        return anchor

    def direction(g0, params, state, grad_fn, call):
        logits_fn = _given(call.extra, "tram", "logits_fn")
        here = logits_fn(params, _nothing)
        if distance == "input":
            other = logits_fn(params, _Noise(call.key, sigma))
        else:
            anchor = jtu.tree_map(lambda a, p: a.astype(p.dtype), state.anchor, params)
            other = logits_fn(anchor, _nothing)
        found = _divergence(other, here).astype(state.distance.dtype)
        radius = scheduled(scale, call.step) * found
        if max_radius is not None:
            radius = jnp.minimum(radius, max_radius)
        sizes = elementwise_scale(params, shifts=True) if adaptive else None
        e = ascent(call.restrict(g0), radius, sizes=sizes)
        state = TRAMState(follow(state.anchor, params), found)
        return grad_fn(moved(params, e)), state, e

    def between(g0, params, state, call):
        del call
        return g0, state._replace(anchor=follow(state.anchor, params))

    rule = Rule(direction, init, between, consumes=("logits_fn",))
    return perturbed(base, rule, **engine)


@with_engine_options()
def tram_fisher(
    base: optax.GradientTransformation,
    rho: Schedule = 0.1,
    *,
    sigma: float = 0.1,
    eta: float = 0.1,
    **engine: Unpack[EngineOptions],
) -> optax.GradientTransformationExtraArgs:
    """TRAM's Fisher variant: a ball measured by the Fisher information at noisy inputs.

    The ascent is rho F^-1 g / sqrt(g F^-1 g), with F = 1 + eta h^2 elementwise and h
    the batch's gradient at inputs with noise. Three gradients a step, of which
    `grad_evals` holds the two of the clean batch.

    Args:
        base: Any optax transformation.
        rho: Radius, not negative, or a schedule.
        sigma: Deviation of the noise, positive.
        eta: Weight of the Fisher information against the Euclidean ball, not negative.
        interval, mask, microbatch, axis_name, sync_ascent, measure_gain, seed: As in
            `perturbed`; `microbatch` must be left out.

    Returns:
        An optax transformation whose `update` is given `grad_fn` and
        `noisy_grad_fn(params, noise)`, the gradient of the batch's log-likelihood (or
        loss) at inputs that `noise`, a function, was applied to.

    Raises:
        ValueError: If a setting is out of its range, `microbatch` is given, or
            `update` lacks `noisy_grad_fn`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from varan.sharpness import tram_fisher
        >>> x, w = jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])
        >>> grad = jax.grad(lambda w, x: (x @ w) ** 2 / 2)
        >>> method = tram_fisher(optax.sgd(1.0), 0.2, eta=0.0)
        >>> updates, state = method.update(
        ...     grad(w, x), method.init(w), w, grad_fn=lambda w, i: grad(w, x),
        ...     noisy_grad_fn=lambda w, noise: grad(w, noise(x)))
        >>> round(float(state.info.ascent_norm), 3)
        0.2

    Source:
        T. Sherborne, N. Saphra, P. Dasigi and H. Peng, 2024, arXiv:2310.03646,
        section 4 (TRAM-Fisher), on the ball of Kim, Li, Hu and Hospedales, 2022,
        arXiv:2206.04920.
    """
    check_schedule("tram_fisher", "rho", rho)
    checks.check_positive("tram_fisher", "sigma", sigma)
    checks.check_nonnegative("tram_fisher", "eta", eta)
    _refuse_chunks("tram_fisher", engine)

    def direction(g0, params, state, grad_fn, call):
        noisy_grad_fn = _given(call.extra, "tram_fisher", "noisy_grad_fn")
        noisy = noisy_grad_fn(params, _Noise(call.key, sigma))
        check_like("tram_fisher", "noisy_grad_fn", noisy, params)
        # 1 / sqrt(F), whose ball is that of F. Not by h^2, which may overflow.
        root = jnp.sqrt(eta)
        sizes = jtu.tree_map(
            lambda h: 1 / jnp.hypot(jnp.ones_like(h), root.astype(h.dtype) * h), noisy
        )
        e = ascent(call.restrict(g0), scheduled(rho, call.step), sizes=sizes)
        return grad_fn(moved(params, e)), state, e

    rule = Rule(direction, consumes=("noisy_grad_fn",))
    return perturbed(base, rule, **engine)


class _Noise:
    """Adds normal noise, different in each array that it is applied to."""

    def __init__(self, key: PRNGKeyArray, sigma: float):
        self.key, self.sigma, self.calls = key, sigma, 0

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        self.calls += 1
        key = jax.random.fold_in(self.key, self.calls)
        return x + self.sigma * jax.random.normal(key, x.shape, x.dtype)


def _nothing(x):
    return x


def _divergence(p, q):
    """Mean over samples of KL(p || q), of logits, in float32 at least."""
    if p.shape != q.shape or p.ndim < 1 or p.shape[-1] < 2:
        raise ValueError(
            "tram: `logits_fn` must return logits of one shape, with two or more "
            f"classes along the last axis (got {p.shape} and {q.shape}). Of one logit "
            "z make two, 0 and z."
        )
    dtype = norm_dtype((p, q))
    p, q = (jax.nn.log_softmax(z.astype(dtype)) for z in (p, q))
    # Round-off may make it negative, which would turn the ascent round.
    return jnp.maximum(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1)), 0)


def _given(extra: Any, owner: str, name: str):
    if name not in extra:
        raise ValueError(
            f"{owner}: `update` needs `{name}`, a function (params, noise) of the same "
            "batch."
        )
    return extra[name]


def _refuse_chunks(owner, engine):
    if engine.get("microbatch") is not None:
        raise ValueError(
            f"{owner}: `microbatch` must be left out (got {engine['microbatch']}): "
            "what `update` is given belongs to the whole batch."
        )
