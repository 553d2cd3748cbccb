"""The laws of the engine, over every rule of the topic in one contract.

A rule is a line in `RULES`: a function of a base optimiser and the engine's options,
the evaluations one step takes, and what switches it off.
"""

from dataclasses import dataclass, field
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.sharpness import (
    amp,
    asam,
    dnsam,
    fad,
    fsam,
    gam,
    gr,
    gsam,
    looksam,
    sam,
    tram,
    usam,
    wasam,
)

RATE = 0.05


@dataclass(frozen=True)
class RuleCase:
    """One rule for the contract.

    Args:
        make: `(base, **options) -> transformation`.
        evaluations: Gradients of one step, the caller's included.
        off: Keyword arguments with which the rule is the base optimiser alone, or None.
        normalised: Whether the perturbation is the same for a multiple of the loss.
        extra: Further arguments of `update`, made by a function of the loss.
    """

    make: object
    evaluations: int
    off: dict | None
    normalised: bool = True
    extra: object = field(default=lambda loss: {})


# Rules of gradient regularisation have no default strength.
GAMMA, OFF = {"gamma": 0.2}, {"gamma": 0.0}

RULES = {
    "sam": RuleCase(sam, 2, {"rho": 0.0}),
    "sam, p = inf": RuleCase(partial(sam, p=np.inf), 2, {"rho": 0.0}),
    "sam, two ascents": RuleCase(partial(sam, ascent_steps=2), 3, {"rho": 0.0}),
    "asam": RuleCase(asam, 2, {"rho": 0.0}),
    "dnsam": RuleCase(
        dnsam, 2, {"rho": 0.0}, extra=lambda loss: {"full_grad_fn": jax.grad(loss)}
    ),
    "usam": RuleCase(usam, 2, {"rho": 0.0}, normalised=False),
    "gr, forward": RuleCase(partial(gr, eps=0.1, **GAMMA), 2, OFF, normalised=False),
    "gr, exact": RuleCase(partial(gr, scheme="exact", **GAMMA), 3, OFF),
    "amp": RuleCase(partial(amp, inner_lr=0.01), 2, {"eps": 0.0}, normalised=False),
    "amp, leaf, two ascents": RuleCase(
        partial(amp, ball="leaf", inner_iter=2), 3, {"inner_lr": 0.0}, normalised=False
    ),
    "gam": RuleCase(gam, 4, None),
    "gam, hvp": RuleCase(partial(gam, mode="hvp"), 6, {"alpha": 0.0}),
    "fad": RuleCase(fad, 4, {"alpha": 0.0}),
    "looksam": RuleCase(partial(looksam, interval=1), 2, {"rho": 0.0}),
    "gsam": RuleCase(gsam, 2, {"rho": 0.0, "alpha": 0.0}),
    "wasam": RuleCase(wasam, 2, {"rho": 0.0}),
    "sam, masked": RuleCase(
        partial(sam, mask={"kernel": False, "shift": True}), 2, {"rho": 0.0}
    ),
    "fsam": RuleCase(partial(fsam, fisher="batch", keep_ratio=0.4), 2, {"rho": 0.0}),
    "tram": RuleCase(
        partial(tram, distance="input"),
        2,
        {"scale": 0.0},
        extra=lambda loss: {"logits_fn": lambda p, noise: noise(p["kernel"])},
    ),
}


def start(dtype=jnp.float64):
    weights = jax.random.split(jax.random.key(0), 2)
    return {
        "kernel": jax.random.normal(weights[0], (3, 2), dtype),
        "shift": jax.random.normal(weights[1], (2,), dtype),
    }


@pytest.fixture(scope="module")
def batch():
    keys = jax.random.split(jax.random.key(1), 2)
    return jax.random.normal(keys[0], (8, 3)), jax.random.normal(keys[1], (8, 2))


def loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(x.astype(params["kernel"].dtype) @ params["kernel"])
    return jnp.mean((hidden + params["shift"][None] - y.astype(hidden.dtype)) ** 2)


def trained(method, batch, steps=3, dtype=jnp.float64, extra=None, calls=None):
    """Weights and state after some steps, as a function of start and loss scale."""

    def one(carry, scale):
        params, state = carry
        value = lambda p: (scale * loss(p, batch)).astype(dtype)  # noqa: E731

        def grad_fn(params, i):
            if calls is not None:
                jax.debug.callback(lambda: calls.append(i))
            return jax.grad(value)(params)

        more = {} if extra is None else extra(value)
        updates, state = method.update(
            jax.grad(value)(params), state, params, grad_fn=grad_fn, **more
        )
        return (optax.apply_updates(params, updates), state), state.info

    def run(params, scale):
        scales = jnp.full(steps, scale, dtype)
        (params, state), info = jax.lax.scan(one, (params, method.init(params)), scales)
        return params, state, info

    return run


@pytest.fixture(scope="module")
def plainly(batch):
    """Weights after steps of a base optimiser alone, from given weights."""

    @cache
    def step(base):
        def one(params, state, batch):
            updates, state = base.update(jax.grad(loss)(params, batch), state, params)
            return optax.apply_updates(params, updates), state

        return jax.jit(one)

    def run(base, steps, params):
        state = base.init(params)
        for _ in range(steps):
            params, state = step(base)(params, state, batch)
        return params

    return run


def close(left, right, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        left,
        right,
    )


@pytest.fixture(scope="module", params=list(RULES))
def case(request):
    return RULES[request.param]


@pytest.fixture(scope="module")
def counted(case, batch):
    """Three steps around gradient descent, and the further gradients they made."""
    calls = []
    run = trained(case.make(optax.sgd(RATE)), batch, extra=case.extra, calls=calls)
    result = jax.block_until_ready(jax.jit(run)(start(), 1.0))
    jax.effects_barrier()
    return *result, calls


@pytest.fixture(scope="module")
def lanes(case, batch):
    """The same by vmap: from the start, with ten times the loss, from elsewhere."""
    run = trained(case.make(optax.sgd(RATE)), batch, extra=case.extra)
    starts = jax.tree.map(lambda p: jnp.stack([p, p, 2 * p]), start())
    return jax.jit(jax.vmap(run))(starts, jnp.array([1.0, 10.0, 1.0]))


def test_evaluations_are_those_made(case, counted):
    _, state, _, calls = counted
    assert int(state.step) == 3
    assert int(state.grad_evals) == 3 * case.evaluations
    # A Hessian-vector product calls the function once and counts as two.
    further = 3 * (case.evaluations - 1)
    assert further / 2 <= len(calls) <= further


def test_seeds_by_vmap(counted, lanes):
    close(jax.tree.map(lambda leaf: leaf[0], lanes[0]), counted[0], 1e-9)


def test_scale_of_the_loss_leaves_the_perturbation(case, lanes):
    once, tenfold, _ = lanes[2].ascent_norm[:, 0]
    if np.isnan(once):
        pytest.skip("this rule's perturbation is not of the weights")
    assert np.isclose(once, tenfold, rtol=1e-9) == case.normalised


def test_switched_off_it_is_the_base(case, batch, plainly):
    if case.off is None:
        pytest.skip("this rule has no such setting")
    base = optax.sgd(RATE, momentum=0.9)
    run = trained(case.make(base, **case.off), batch, extra=case.extra)
    found, expected = jax.jit(run)(start(), 1.0)[0], plainly(base, 3, start())
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_zero_gradient_gives_finite_direction(case):
    method, params = case.make(optax.sgd(RATE)), start()
    zero = jax.tree.map(jnp.zeros_like, params)
    nothing = lambda p: 0.0 * jnp.sum(p["kernel"])  # noqa: E731
    updates, _ = method.update(
        zero,
        method.init(params),
        params,
        grad_fn=lambda p, i: zero,
        **case.extra(nothing),
    )
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0.0), updates)


def test_half_precision_and_steps_between(case, batch):
    """Norms of bfloat16 weights are float32; an interval skips steps."""
    method = case.make(optax.sgd(RATE), interval=2)
    half = trained(method, batch, 2, jnp.bfloat16, extra=case.extra)
    params, state, info = jax.jit(half)(start(jnp.bfloat16), 1.0)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert info.cosine.dtype == jnp.float32
    assert np.isfinite(info.cosine[0]) and np.isnan(info.cosine[1])
    assert int(state.grad_evals) == case.evaluations + 1


def test_extreme_gradients_are_perturbed_alike(case, batch):
    """In float32 the squares of these gradients underflow, or overflow."""
    if not case.normalised:
        pytest.skip("this rule's perturbation depends on the loss's scale")
    run = trained(case.make(optax.sgd(RATE)), batch, 1, jnp.float32, extra=case.extra)
    scales = jnp.array([1.0, 1e-20, 1e19], jnp.float32)
    _, _, info = jax.jit(jax.vmap(run, (None, 0)))(start(jnp.float32), scales)
    ordinary, *extreme = info.ascent_norm[:, 0]
    if np.isnan(ordinary):
        pytest.skip("this rule's perturbation is not of the weights")
    np.testing.assert_allclose(extreme, [ordinary] * 2, rtol=1e-3)
    np.testing.assert_allclose(info.cosine[1:, 0], [info.cosine[0, 0]] * 2, rtol=0.01)


def test_hyperparameters_by_optax(case, batch):
    """Its wrapper reads signatures, and traces the numbers that it finds there."""
    given = getattr(case.make, "keywords", {})
    injected = optax.inject_hyperparams(case.make, static_args=tuple(given))
    value, params = partial(loss, batch=batch), start()

    @partial(jax.jit, static_argnums=0)
    def step(method, params):
        g = jax.grad(value)
        more = {"grad_fn": lambda p, i: g(p), **case.extra(value)}
        return method.update(g(params), method.init(params), params, **more)[0]

    found = step(injected(base=optax.sgd(RATE)), params)
    close(found, step(case.make(optax.sgd(RATE)), params), 1e-12)
