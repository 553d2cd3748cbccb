"""The engine in other people's loops, and its own options."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.sharpness import (
    Rule,
    amp,
    complement,
    dnsam,
    fsam,
    grad_fn_from,
    norm_params,
    perturbed,
    random_mask_like,
    sam,
    topk_mask,
    tram,
    tram_fisher,
    wasam,
)
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

    def test_mapped_axis_that_jax_keeps_track_of(self, setting):
        """There the gradient of replicated weights is a sum over the devices."""
        w, x, _ = setting
        method = sam(optax.sgd(1.0), 0.1, axis_name="d")
        one = lambda w, x: step(method, w, x, jax.grad(quadratic)(w, x))[0]  # noqa: E731
        mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec

        def mapped(**options):
            specs = {"in_specs": (spec(), spec("d")), "out_specs": spec()}
            return jax.jit(jax.shard_map(one, mesh=mesh, **specs, **options))(w, x)

        alone, _ = step(sam(optax.sgd(1.0), 0.1), w, x, jax.grad(quadratic)(w, x))
        np.testing.assert_allclose(mapped(check_vma=False), alone, rtol=1e-12)
        with pytest.raises(ValueError, match="`axis_name` must be an axis of"):
            mapped()

    def test_curvature_counts_as_two(self, setting):
        w, x, g0 = setting

        def curved(g0, params, state, grad_fn, call):
            gradient, product = call.hvp(params, g0)
            return gradient + product, state, None

        updates, state = step(perturbed(optax.sgd(1.0), Rule(curved)), w, x, g0)
        np.testing.assert_allclose(updates, -(g0 + H @ g0), rtol=1e-12)
        assert int(state.grad_evals) == 3


class TestPrecision:
    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize(
        "dtype, rho, least, most",
        [
            ("bfloat16", 0.05, 0, 0),
            ("bfloat16", 50, 45, 55),
            ("float32", 0.05, 0.049, 0.051),
        ],
    )
    def test_what_rounds_away_is_not_reported(self, compiled, dtype, rho, least, most):
        """0.05 over 4096 weights of about one is 0.0008 for each."""
        w = jnp.linspace(1.0, 2.0, 4096).astype(dtype)
        method = sam(optax.sgd(1.0), rho, measure_gain=True)
        value = lambda w: jnp.sum(w.astype(jnp.float32))  # noqa: E731

        def info(w):
            g = jnp.ones_like(w)
            more = {"grad_fn": lambda w, i: g, "value_fn": value}
            return method.update(g, method.init(w), w, **more)[1].info

        found = (jax.jit(info) if compiled else info)(w)
        assert least <= found.ascent_norm <= most
        assert least <= found.first_order_gain / 64 <= most
        assert found.ascent_norm.dtype == jnp.float32


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


TWO = {"a": jnp.array([1.0, -1.0, 0.5]), "b": jnp.asarray(0.5)}


def regression(w, x):
    return jnp.mean((x @ w["a"] + w["b"] - 1) ** 2)


@pytest.fixture(scope="module")
def samples():
    return jax.random.normal(jax.random.key(3), (8, 3))


def once(method, params, grad_fn, g0, **extra):
    return method.update(g0, method.init(params), params, grad_fn=grad_fn, **extra)


class TestArgumentsOfTheRule:
    """A line search as base refuses arguments that it does not know."""

    @pytest.mark.parametrize(
        "make, extra",
        [
            (dnsam, {"full_grad_fn": lambda w: w}),
            (tram, {"logits_fn": lambda w, noise: noise(w)[None]}),
            (tram_fisher, {"noisy_grad_fn": lambda w, noise: noise(w)}),
            (fsam, {"fisher_fn": jnp.square}),
        ],
    )
    def test_they_do_not_reach_the_base(self, setting, make, extra):
        w, x, g0 = setting
        search = optax.scale_by_backtracking_linesearch(10)
        method = make(optax.chain(optax.sgd(1.0), search))
        value_fn = lambda w: quadratic(w, x)  # noqa: E731
        more = {"value": value_fn(w), "grad": g0, "value_fn": value_fn}
        updates, _ = step(method, w, x, g0, **more, **extra)
        assert value_fn(w + updates) < value_fn(w)

    @pytest.mark.parametrize(
        "make, name, arguments",
        [(dnsam, "full_grad_fn", 1), (tram_fisher, "noisy_grad_fn", 2)],
    )
    @pytest.mark.parametrize("answer", [None, jnp.ones(3)])
    def test_other_gradients_must_fit_too(self, setting, make, name, arguments, answer):
        w, x, g0 = setting
        function = lambda *given: answer  # noqa: E731
        with pytest.raises(ValueError, match=f"`{name}` must return arrays"):
            step(make(optax.sgd(1.0)), w, x, g0, **{name: function})

    def test_full_gradient_of_nan_stays_visible(self, setting):
        w, x, g0 = setting
        _, state = step(
            dnsam(optax.sgd(1.0)), w, x, g0, full_grad_fn=lambda w: w * jnp.nan
        )
        assert np.isnan(state.info.ascent_norm)


class TestGradientsThatDoNotFit:
    @pytest.mark.parametrize(
        "answer, got",
        [
            (jnp.ones((5, 3)), r"shape \(5, 3\) for \(3,\)"),
            ((jnp.asarray(1.0), jnp.ones(3)), "PyTreeDef"),
            (None, "PyTreeDef"),
        ],
    )
    def test_of_one_array(self, answer, got):
        w = jnp.ones(3)
        with pytest.raises(ValueError, match=f"`grad_fn` must return .*{got}"):
            once(sam(optax.sgd(1.0)), w, lambda w, i: answer, w)

    def test_value_beside_the_gradient(self, samples):
        pair = lambda w, i: jax.value_and_grad(regression)(w, samples)  # noqa: E731
        with pytest.raises(ValueError, match="return the second output alone"):
            once(sam(optax.sgd(1.0)), TWO, pair, TWO)

    @pytest.mark.parametrize("g0", [None, {"a": TWO["a"]}, {**TWO, "a": jnp.ones(4)}])
    def test_the_caller_s_own(self, samples, g0):
        with pytest.raises(ValueError, match="`updates` must be the gradient"):
            once(sam(optax.sgd(1.0)), TWO, grad_fn_from(regression, samples), g0)

    @pytest.mark.parametrize("value_fn", [lambda w: w, lambda w: (w[0], None)])
    def test_value_of_several_numbers(self, setting, value_fn):
        w, x, g0 = setting
        with pytest.raises(ValueError, match="`value_fn` must be one number"):
            method = sam(optax.sgd(1.0), measure_gain=True)
            step(method, w, x, g0, value_fn=value_fn)


class TestChunksThatDoNotFit:
    @pytest.mark.parametrize("there", [None, 4, 8])
    def test_number_of_chunks(self, samples, there):
        grad_fn = grad_fn_from(regression, samples, microbatch=there)
        with pytest.raises(ValueError, match="`microbatch` must be that of"):
            once(sam(optax.sgd(1.0), microbatch=2), TWO, grad_fn, None)

    def test_hidden_in_another_function(self, samples):
        whole = grad_fn_from(regression, samples)
        with pytest.raises(ValueError, match="`microbatch` must be given"):
            grad_fn = lambda w, i, chunk: whole(w, i, chunk)  # noqa: E731
            once(sam(optax.sgd(1.0), microbatch=2), TWO, grad_fn, None)

    @pytest.mark.parametrize(
        "batch", [(jnp.ones((8, 3)), jnp.ones(2)), (jnp.ones(8), 1.0), ()]
    )
    def test_batch_without_one_leading_axis(self, batch):
        with pytest.raises(ValueError, match="must have one leading axis"):
            grad_fn_from(regression, batch, microbatch=2)

    @pytest.mark.parametrize("microbatch", [None, 2])
    def test_empty_batch(self, samples, microbatch):
        with pytest.raises(ValueError, match="`batch` must not be empty"):
            grad_fn_from(regression, samples[:0], microbatch=microbatch)


class TestMasksThatDoNotFit:
    @pytest.mark.parametrize("mask", [np.ones((4, 3), bool), np.ones(2, bool)])
    def test_shape(self, mask):
        w = jnp.ones(3)
        with pytest.raises(ValueError, match="`mask` must have the shapes"):
            once(sam(optax.sgd(1.0), mask=mask), w, lambda w, i: w, w)

    @pytest.mark.parametrize(
        "take",
        [
            lambda m: once(sam(optax.sgd(1.0), mask=m), TWO, lambda w, i: w, TWO),
            complement,
            lambda m: random_mask_like(m, TWO, key=jax.random.key(0)),
            lambda m: topk_mask(TWO, 0.5, maskable=m),
        ],
    )
    def test_numbers(self, take):
        with pytest.raises(ValueError, match=r"must hold booleans .*got float"):
            take({"a": 0.5, "b": True})


class TestParametersThatDoNotFit:
    @pytest.mark.parametrize(
        "leaf, kind",
        [
            (jnp.arange(3), "int64"),
            (jnp.ones(3, complex), "complex128"),
            (jax.random.key(0), "key<fry>"),
            (jnp.tanh, "PjitFunction"),
            (1.0, "float"),
        ],
    )
    def test_leaf_that_is_no_real_floating_array(self, leaf, kind):
        with pytest.raises(ValueError, match=rf"got {kind} at \['step'\]"):
            sam(optax.sgd(1.0)).init({"w": jnp.ones(2), "step": leaf})

    @pytest.mark.parametrize(
        "make",
        [
            lambda rule: optax.masked(rule, {"a": True, "b": False}),
            lambda rule: optax.multi_transform(
                {"x": rule, "y": optax.sgd(0.1)}, {"a": "x", "b": "y"}
            ),
        ],
    )
    def test_rule_inside_a_mask(self, make):
        with pytest.raises(ValueError, match=r"MaskedNode` at .* its own `mask`"):
            make(sam(optax.sgd(1.0))).init(TWO)

    @pytest.mark.parametrize("between", [lambda b: b, optax.chain])
    def test_rule_inside_a_rule(self, between):
        with pytest.raises(ValueError, match="Rules cannot be nested"):
            sam(between(sam(optax.sgd(1.0)))).init(TWO)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: sam(optax.sgd(1.0), interval=1.5),
            lambda: sam(optax.sgd(1.0), microbatch=2.0),
            lambda: sam(optax.sgd(1.0), ascent_steps=1.5),
            lambda: amp(optax.sgd(1.0), inner_iter=1.5),
            lambda: fsam(optax.sgd(1.0), mask_every=1.5),
            lambda: wasam(optax.sgd(1.0), every=1.5),
            lambda: jax.jit(lambda n: sam(optax.sgd(1.0), interval=n).init(TWO))(2),
        ],
    )
    def test_counts_that_are_none(self, make):
        with pytest.raises(ValueError, match="must be a whole number"):
            make()

    @pytest.mark.parametrize("rho", [jnp.ones(3), [0.1, 0.2]])
    def test_radius_of_several_numbers(self, rho):
        with pytest.raises(ValueError, match="`rho` must be one number"):
            sam(optax.sgd(1.0), rho)


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
