"""The engine in other people's loops, and its own options."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.sharpness import Rule, grad_fn_from, norm_params, perturbed, sam
from varan.train import start_training, train_epochs

H = jnp.array([[3.0, 1.0], [1.0, 2.0]])


def quadratic(w, x):
    return w @ H @ w / 2 + jnp.mean(x @ w)


@pytest.fixture(scope="module")
def setting():
    w = jnp.array([1.0, -2.0])
    x = jax.random.normal(jax.random.key(0), (8, 2))
    return w, x, jax.grad(quadratic)(w, x)


def step(method, w, x, g0, state=None, **extra):
    state = method.init(w) if state is None else state
    microbatch = extra.pop("microbatch", None)
    grad_fn = grad_fn_from(quadratic, x, microbatch=microbatch)
    return method.update(g0, state, w, grad_fn=grad_fn, **extra)


def unit(v):
    return v / jnp.linalg.norm(v)


class TestOptions:
    def test_mask_perturbs_only_there(self, setting):
        w, x, g0 = setting
        mask = jnp.array([True, False])
        updates, state = step(sam(optax.sgd(1.0), 0.1, mask=mask), w, x, g0)
        moved = w.at[0].add(0.1 * jnp.sign(g0[0]))
        np.testing.assert_allclose(updates, -jax.grad(quadratic)(moved, x), rtol=1e-12)
        np.testing.assert_allclose(state.info.ascent_norm, 0.1, rtol=1e-12)

    @pytest.mark.parametrize("mask, same_as", [(True, 0.1), (False, 0.0)])
    def test_mask_of_all_or_nothing(self, setting, mask, same_as):
        w, x, g0 = setting
        updates, _ = step(sam(optax.sgd(1.0), 0.1, mask=lambda _: mask), w, x, g0)
        expected, _ = step(sam(optax.sgd(1.0), same_as), w, x, g0)
        np.testing.assert_array_equal(updates, expected)

    def test_mask_that_is_a_model_of_booleans(self):
        """`norm_params(model)` is a callable Equinox module, and no function."""
        model = eqx.nn.Sequential([eqx.nn.LayerNorm(2), eqx.nn.LayerNorm(2)])
        params = eqx.filter(model, eqx.is_inexact_array)
        slope = lambda p, i=0: jax.tree.map(jnp.ones_like, p)  # noqa: E731
        method = sam(optax.sgd(1.0), 0.1, mask=norm_params(params))
        _, state = method.update(
            slope(params), method.init(params), params, grad_fn=slope
        )
        np.testing.assert_allclose(state.info.ascent_norm, 0.1, rtol=1e-6)

    def test_mask_of_another_structure_is_refused(self, setting):
        w, x, g0 = setting
        with pytest.raises(ValueError, match="`mask` must have the structure"):
            step(sam(optax.sgd(1.0), mask={"a": True}), w, x, g0)

    def test_each_chunk_has_its_own_perturbation(self, setting):
        w, x, _ = setting
        method = sam(optax.sgd(1.0), 0.1, microbatch=2)
        updates, state = step(method, w, x, None, microbatch=2)
        slope = jax.grad(quadratic)
        halves = [
            slope(w + 0.1 * unit(slope(w, part)), part) for part in (x[:4], x[4:])
        ]
        np.testing.assert_allclose(updates, -(halves[0] + halves[1]) / 2, rtol=1e-12)
        assert int(state.grad_evals) == 2

    def test_one_chunk_is_the_whole_batch(self, setting):
        w, x, g0 = setting
        chunked, _ = step(sam(optax.sgd(1.0), microbatch=1), w, x, None, microbatch=1)
        whole, _ = step(sam(optax.sgd(1.0)), w, x, g0)
        np.testing.assert_allclose(chunked, whole, rtol=1e-12)

    def test_chunks_on_a_step_between_are_averaged(self, setting):
        w, x, g0 = setting
        method = sam(optax.sgd(1.0), microbatch=4, interval=2)
        state = method.init(w)._replace(step=jnp.asarray(1, jnp.int32))
        updates, state = step(method, w, x, None, state, microbatch=4)
        np.testing.assert_allclose(updates, -g0, rtol=1e-12)
        assert int(state.grad_evals) == 1

    def test_schedule_counts_outer_steps(self, setting):
        w, x, g0 = setting
        radii = jnp.array([0.1, 0.2, 0.3])
        method = sam(optax.sgd(0.0), lambda step: radii[step])
        state, norms = method.init(w), []
        for _ in range(3):
            _, state = step(method, w, x, g0, state)
            norms.append(float(state.info.ascent_norm))
        np.testing.assert_allclose(norms, [0.1, 0.2, 0.3], rtol=1e-6)

    def test_gain_is_that_of_the_loss(self, setting):
        w, x, g0 = setting
        method = sam(optax.sgd(1.0), 0.1, measure_gain=True)
        _, state = step(method, w, x, g0, value_fn=lambda w: quadratic(w, x))
        e = 0.1 * unit(g0)
        rise = quadratic(w + e, x) - quadratic(w, x)
        np.testing.assert_allclose(state.info.actual_gain, rise, rtol=1e-10)
        np.testing.assert_allclose(state.info.first_order_gain, g0 @ e, rtol=1e-12)

    def test_auxiliary_output_is_dropped(self, setting):
        w, x, g0 = setting
        grad_fn = grad_fn_from(quadratic, x)
        method = sam(optax.sgd(1.0))
        with_aux = lambda w, i: (grad_fn(w, i), {"statistics": i})  # noqa: E731
        found, _ = method.update(g0, method.init(w), w, grad_fn=with_aux)
        np.testing.assert_array_equal(found, step(method, w, x, g0)[0])

    def test_named_axis(self, setting):
        """Each device its own ascent, or all the same one."""
        w, x, _ = setting
        slope = jax.grad(quadratic)

        def devices(**options):
            method = sam(optax.sgd(1.0), 0.1, axis_name="d", **options)
            one = lambda part: step(method, w, part, slope(w, part))[0]  # noqa: E731
            return jax.jit(jax.vmap(one, axis_name="d"))(x.reshape(2, 4, 2))

        own = [slope(w + 0.1 * unit(slope(w, p)), p) for p in (x[:4], x[4:])]
        np.testing.assert_allclose(devices()[0], -(own[0] + own[1]) / 2, rtol=1e-12)
        shared = slope(w + 0.1 * unit(slope(w, x)), x)
        np.testing.assert_allclose(devices(sync_ascent=True)[1], -shared, rtol=1e-12)

    def test_curvature_counts_as_two(self, setting):
        w, x, g0 = setting

        def curved(g0, params, state, grad_fn, call):
            gradient, product = call.hvp(params, g0)
            return gradient + product, state, None

        updates, state = step(perturbed(optax.sgd(1.0), Rule(curved)), w, x, g0)
        np.testing.assert_allclose(updates, -(g0 + H @ g0), rtol=1e-12)
        assert int(state.grad_evals) == 3


class TestOtherLoops:
    def test_chain_clips_what_the_ascent_is_made_of(self, setting):
        w, x, g0 = setting
        method = optax.chain(optax.clip(0.1), sam(optax.sgd(1.0), 0.5))
        updates, _ = step(method, w, x, g0)
        e = 0.5 * unit(jnp.clip(g0, -0.1, 0.1))
        np.testing.assert_allclose(updates, -jax.grad(quadratic)(w + e, x), rtol=1e-12)

    def test_multi_steps_inside(self, setting):
        """Two half batches, one step of the mean of their directions."""
        w, x, _ = setting
        method = sam(optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation(), 0.1)
        state, total = method.init(w), jnp.zeros(2)
        for part in (x[:4], x[4:]):
            g0 = jax.grad(quadratic)(w, part)
            with jax.numpy_dtype_promotion("standard"):  # optax's own counters
                updates, state = step(method, w, part, g0, state)
            total = total + updates
        chunks, _ = step(
            sam(optax.sgd(1.0), 0.1, microbatch=2), w, x, None, microbatch=2
        )
        np.testing.assert_allclose(total, chunks, rtol=1e-6)  # its mean is in float32

    def test_line_search_as_base_gets_its_arguments(self, setting):
        w, x, g0 = setting
        value_fn = lambda w: quadratic(w, x)  # noqa: E731
        base = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20))
        updates, _ = step(
            sam(base, 0.01), w, x, g0, value=value_fn(w), grad=g0, value_fn=value_fn
        )
        assert value_fn(w + updates) < value_fn(w)

    def test_base_with_a_mask(self, setting):
        w, x, g0 = setting
        decay = optax.add_decayed_weights(0.1, mask={"a": True, "b": False})
        method = sam(optax.chain(decay, optax.sgd(1.0)), 0.0)
        tree = {"a": w, "b": w}
        slope = lambda p, i=0: {k: jax.grad(quadratic)(v, x) for k, v in p.items()}  # noqa: E731
        updates, _ = method.update(slope(tree), method.init(tree), tree, grad_fn=slope)
        np.testing.assert_allclose(updates["a"], -(g0 + 0.1 * w), rtol=1e-12)
        np.testing.assert_allclose(updates["b"], -g0, rtol=1e-12)

    def test_radius_by_inject_hyperparams(self, setting):
        w, x, g0 = setting
        make = optax.inject_hyperparams(lambda rho: sam(optax.sgd(1.0), rho))
        method = make(rho=0.1)
        updates, _ = step(method, w, x, g0)
        expected, _ = step(sam(optax.sgd(1.0), 0.1), w, x, g0)
        np.testing.assert_allclose(updates, expected, rtol=1e-6)

    def test_equinox_model_in_the_training_loop(self):
        model = eqx.nn.MLP(2, "scalar", 4, 1, key=jax.random.key(0))
        x = jax.random.normal(jax.random.key(1), (16, 2))
        loss = lambda m, batch: jnp.mean((jax.vmap(m)(batch) - batch[:, 0]) ** 2)  # noqa: E731
        method = sam(optax.sgd(0.1), 0.05)
        state = start_training(model, method, key=jax.random.key(2))
        state, losses = train_epochs(state, loss, x, method, epochs=20, batch_size=8)
        assert losses[-1] < losses[0] / 2
        assert int(state.opt_state.grad_evals) == 2 * 2 * 20

    def test_one_step_is_that_of_optax(self, setting):
        w, x, g0 = setting
        adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
        peer = optax.contrib.sam(optax.sgd(0.3), adversary, opaque_mode=True)
        grad_fn = grad_fn_from(quadratic, x)
        expected, _ = peer.update(g0, peer.init(w), w, grad_fn=grad_fn)
        found, _ = step(sam(optax.sgd(0.3), 0.1), w, x, g0)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


class TestBadInput:
    @pytest.mark.parametrize("options", [{"interval": 0}, {"microbatch": 0}])
    def test_counts_below_one(self, options):
        with pytest.raises(ValueError, match="must be at least 1"):
            sam(optax.sgd(0.1), **options)

    def test_no_parameters(self):
        with pytest.raises(ValueError, match="must hold floating arrays"):
            sam(optax.sgd(0.1)).init(())

    def test_what_update_lacks(self, setting):
        w, x, g0 = setting
        method = sam(optax.sgd(0.1))
        with pytest.raises(ValueError, match="needs `grad_fn`"):
            method.update(g0, method.init(w), w)
        with pytest.raises(ValueError, match="needs `params`"):
            method.update(g0, method.init(w), grad_fn=grad_fn_from(quadratic, x))
        with pytest.raises(ValueError, match="`measure_gain` needs `value_fn`"):
            step(sam(optax.sgd(0.1), measure_gain=True), w, x, g0)

    def test_gradient_of_another_structure(self, setting):
        w, _, g0 = setting
        method = sam(optax.sgd(0.1))
        with pytest.raises(ValueError, match="`grad_fn` must return a gradient"):
            method.update(g0, method.init(w), w, grad_fn=lambda w, i: [w])

    def test_batch_that_does_not_divide(self, setting):
        _, x, _ = setting
        with pytest.raises(ValueError, match="must divide the batch of 8"):
            grad_fn_from(quadratic, x, microbatch=3)

    def test_nan_gradient_stays_visible(self, setting):
        w, x, g0 = setting
        updates, _ = step(sam(optax.sgd(0.1)), w, x, g0 * jnp.nan)
        assert np.all(np.isnan(updates))
