"""SAM on a Fisher mask: what is perturbed, by how much, and when the mask changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.sharpness import (
    Rule,
    fisher_diagonal,
    fisher_masked,
    fsam,
    perturbed,
    sam,
)

KEYS = jax.random.split(jax.random.key(0), 3)
X = jax.random.normal(KEYS[0], (6, 4)) * jnp.array([[3.0, 1.0, 0.3, 0.1]])
Y = jax.random.normal(KEYS[1], (6,))
W = {"a": jnp.array([0.5, -1.0]), "b": jnp.array([2.0, 1.0])}


def log_prob(w, example):
    x, y = example
    return -((x @ jnp.concatenate([w["a"], w["b"]]) - y) ** 2) / 2


def loss(w):
    return -jnp.mean(jax.vmap(log_prob, (None, 0))(w, (X, Y)))


def per_example(w):
    return jax.vmap(jax.grad(log_prob), (None, 0))(w, (X, Y))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def step(method, **extra):
    """The perturbation of one step, and the state after it."""
    seen = []

    def grad_fn(w, i):
        seen.append(flat(w) - flat(W))
        return jax.grad(loss)(w)

    _, state = method.update(
        jax.grad(loss)(W), method.init(W), W, grad_fn=grad_fn, **extra
    )
    return seen[0], state


G = flat(jax.grad(loss)(W))
FISHER = np.mean(
    [flat(jax.grad(log_prob)(W, (x, y))) ** 2 for x, y in zip(X, Y, strict=True)], 0
)


def test_diagonal_is_the_mean_square_over_samples():
    found = fisher_diagonal(log_prob, W, (X, Y))
    np.testing.assert_allclose(flat(found), FISHER, rtol=1e-12)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), W)
    batch = (X.astype(jnp.float16), Y.astype(jnp.float16))
    assert fisher_diagonal(log_prob, half, batch)["a"].dtype == jnp.float32
    with pytest.raises(ValueError, match="`examples` must not be empty"):
        fisher_diagonal(log_prob, W, (X[:0], Y[:0]))


def test_step_on_the_largest_half():
    """e = rho m g / |g|, with m the largest half of the mean squares."""
    largest = np.sort(FISHER)[2] <= FISHER
    share = FISHER[largest].sum() / FISHER.sum()
    method = fsam(optax.sgd(0.1), 0.3, keep_ratio=0.5)
    e, state = step(method, per_example_grad_fn=per_example)
    np.testing.assert_allclose(e, 0.3 * largest * G / np.linalg.norm(G), rtol=1e-9)
    assert not np.any(e[~largest])
    np.testing.assert_array_equal(flat(state.rule_state.mask), largest)
    np.testing.assert_allclose(state.rule_state.share, share, rtol=1e-12)
    np.testing.assert_allclose(state.info.ascent_norm, np.linalg.norm(e), rtol=1e-9)
    # The predicted rise, over that of the unmasked ascent, is the square of |e| / rho.
    ratio = state.info.first_order_gain / (0.3 * np.linalg.norm(G))
    np.testing.assert_allclose(ratio, (np.linalg.norm(e) / 0.3) ** 2, rtol=1e-9)


def test_norm_over_the_mask_has_the_whole_radius():
    method = fsam(optax.sgd(0.1), 0.3, keep_ratio=0.5, norm_over="masked")
    e, _ = step(method, fisher_fn=lambda w: fisher_diagonal(log_prob, w, (X, Y)))
    masked = (np.sort(FISHER)[2] <= FISHER) * G
    np.testing.assert_allclose(e, 0.3 * masked / np.linalg.norm(masked), rtol=1e-9)


def test_everything_is_sam_and_nothing_is_the_base():
    whole, _ = step(fsam(optax.sgd(0.1), 0.3, keep_ratio=1.0, fisher="batch"))
    as_sam, _ = step(sam(optax.sgd(0.1), 0.3))
    np.testing.assert_array_equal(whole, as_sam)
    none, _ = step(fsam(optax.sgd(0.1), 0.3, keep_ratio=0.0, fisher="batch"))
    np.testing.assert_array_equal(none, 0.0)


def test_square_of_the_batch_gradient():
    _, state = step(fsam(optax.sgd(0.1), 0.3, keep_ratio=0.25, fisher="batch"))
    np.testing.assert_array_equal(
        flat(state.rule_state.mask), np.arange(4) == np.argmax(np.abs(G))
    )


def test_what_takes_no_part_is_left_alone_or_perturbed_fully():
    settings = {
        "keep_ratio": 0.5,
        "fisher": "batch",
        "maskable": {"a": True, "b": False},
    }
    best = np.abs(G) == np.max(np.abs(G[:2]))
    e, state = step(fsam(optax.sgd(0.1), 0.3, **settings))
    np.testing.assert_array_equal(e != 0, best)
    np.testing.assert_allclose(
        state.rule_state.share, np.sum((best * G) ** 2) / np.sum(G**2), rtol=1e-9
    )
    e, _ = step(fsam(optax.sgd(0.1), 0.3, perturb_rest=True, **settings))
    np.testing.assert_array_equal(e != 0, best | (np.arange(4) >= 2))


def test_mask_stays_between_estimates():
    """With an interval too, which skips steps at which a mask would be due."""
    method = fsam(optax.sgd(0.0), 0.3, keep_ratio=0.25, mask_every=3, interval=2)

    @jax.jit
    def run(w):
        def one(state, scores):
            _, state = method.update(
                jax.grad(loss)(w),
                state,
                w,
                grad_fn=lambda w, i: jax.grad(loss)(w),
                fisher_fn=lambda w: {"a": scores[:2], "b": scores[2:]},
            )
            kept = state.rule_state.mask
            return state, jnp.concatenate([kept["a"], kept["b"]])

        return jax.lax.scan(one, method.init(w), jnp.eye(4)[jnp.arange(8) % 3])

    _, masks = run(W)
    np.testing.assert_array_equal(np.argmax(masks, 1), [0, 0, 0, 0, 1, 1, 1, 1])
    assert np.all(np.sum(masks, 1) == 1)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_without_information_it_is_the_base_and_says_so(bad):
    method = fsam(optax.sgd(0.1), 0.3, keep_ratio=0.5)
    e, state = step(method, fisher_fn=lambda w: jax.tree.map(lambda p: bad * p, w))
    np.testing.assert_array_equal(e, 0.0)
    assert np.isnan(state.rule_state.share)


def test_mask_on_another_rule():
    """Two perturbations of one step are both masked."""

    def twice(g0, w, state, grad_fn, call):
        first = grad_fn(jax.tree.map(jnp.add, w, g0))
        last = grad_fn(jax.tree.map(jnp.add, w, first))
        return last, state, None

    seen = []

    def grad_fn(w, i):
        seen.append(flat(w) - flat(W))
        return jax.grad(loss)(w)

    rule = fisher_masked(Rule(twice), keep_ratio=0.25, fisher="batch")
    method = perturbed(optax.sgd(0.1), rule)
    method.update(jax.grad(loss)(W), method.init(W), W, grad_fn=grad_fn)
    top = np.argmax(np.abs(G))
    assert len(seen) == 2
    for e in seen:
        np.testing.assert_array_equal(np.flatnonzero(e), [top])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": -1.0}, "`rho` must not be negative"),
        ({"keep_ratio": 1.5}, r"`keep_ratio` must lie in \[0, 1\]"),
        ({"keep_ratio": np.nan}, r"`keep_ratio` must lie in \[0, 1\]"),
        ({"mask_every": 0}, "`mask_every` must be at least 1"),
        ({"fisher": "exact"}, "`fisher` must be one of"),
        ({"norm_over": "half"}, "`norm_over` must be one of"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        fsam(optax.sgd(0.1), **settings)


def test_bad_sources():
    method = fsam(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"needs a source .*fisher='batch'"):
        step(method)
    with pytest.raises(ValueError, match="one entry for each parameter"):
        step(method, fisher_fn=per_example)
