"""Lipschitz policies: the program against cvxpy, the constants, the bounds."""

import cvxpy
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.lipschitz import (
    Box,
    Kirszbraun,
    LipschitzPolicy,
    McShane,
    estimate_expert_rate,
    linear_expert_rate,
    lipschitz_policy,
)
from varan.lipschitz._lipschitz_regression import spanner

N = 14
A = jnp.array([[1.0, 0.2], [0.0, 1.0]])
B = jnp.array([[0.0, 0.1], [0.2, 0.0]])
K = jnp.array([[-0.9, -1.4], [0.3, -0.2]])
SIZE = float(jnp.linalg.norm(K, 2))
DOMAIN = Box.linf(jnp.zeros(2), 1.0)


class Linear(eqx.Module):
    """x+ = A x + B u with a cost whose constants are 1 in state and input."""

    def step(self, x, u):
        return A @ x + B @ u

    def cost(self, x, u):
        return jnp.linalg.norm(x) + jnp.linalg.norm(u)


def demonstrations(noise=0.0, seed=0, points=N):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (points, 2))
    u = x @ np.asarray(K).T
    direction = rng.normal(size=u.shape)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return jnp.asarray(x), jnp.asarray(u + noise * direction)


def nearest_values(x, u, alpha):
    """The program's solution and value by cvxpy."""
    v = cvxpy.Variable(u.shape)
    i, j = np.triu_indices(len(x), 1)
    radius = alpha * np.linalg.norm(x[i] - x[j], axis=1)
    rules = [cvxpy.norm(v[i] - v[j], axis=1) <= radius]
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(v - u)), rules)
    problem.solve(cvxpy.CLARABEL)
    return v.value, problem.value


def evaluate(function, x):
    """At any number of points up to 200; each kind of function compiles once."""
    function = getattr(function, "function", function)
    padded = jnp.concatenate([x, jnp.broadcast_to(x[:1], (200 - len(x), x.shape[1]))])
    return _evaluate(function, padded)[: len(x)]


@eqx.filter_jit
def _evaluate(function, x):
    return jax.vmap(function)(x)


def steepest(function, x, y):
    """The largest slope between pairs of points."""
    rise = np.asarray(evaluate(function, x) - evaluate(function, y))
    apart = np.linalg.norm(np.asarray(x - y), axis=1)
    return np.max(np.linalg.norm(rise, axis=1) / apart)


@eqx.filter_jit
def slope_along(function, x, move):
    return jax.jvp(function, (x,), (move,))[1]


@pytest.fixture(scope="module")
def data():
    return demonstrations(noise=0.3)


@pytest.fixture(scope="module")
def policies(data):
    """One of each extension, at half the expert's constant."""
    return {
        name: lipschitz_policy(*data, SIZE / 2, extension=name)
        for name in ("mcshane", "kirszbraun")
    }


@pytest.fixture(scope="module")
def probes():
    """Pairs of points, half of them close to each other."""
    rng = np.random.default_rng(1)
    x = rng.uniform(-1.5, 1.5, (200, 2))
    far = rng.uniform(-1.5, 1.5, (100, 2))
    near = x[100:] + 1e-3 * rng.normal(size=(100, 2))
    return jnp.asarray(x), jnp.asarray(np.concatenate([far, near]))


class TestProgram:
    def test_scalars_on_a_line_match_cvxpy(self, data):
        x, u = data[0][:, :1], data[1][:, :1]
        policy = lipschitz_policy(x, u, 0.4)
        values, optimum = nearest_values(*map(np.asarray, (x, u)), 0.4)
        np.testing.assert_allclose(policy.function.values, values, atol=1e-6)
        loss = float(policy.fit.details["loss"])
        assert abs(N * loss - optimum) <= 1e-6 * optimum

    def test_vectors_match_cvxpy(self, data, policies):
        values, optimum = nearest_values(*map(np.asarray, data), SIZE / 2)
        for policy in policies.values():
            found = evaluate(policy, data[0])
            # As far as cvxpy's conic solver goes; the gap below goes farther.
            np.testing.assert_allclose(found, values, atol=2e-5)
        loss, gap = policy.fit.details["loss"], policy.fit.value
        assert N * (loss - gap) <= optimum * (1 + 1e-9)
        assert policy.fit.proof and policy.fit.met

    def test_large_constant_interpolates(self):
        x, u = demonstrations()
        for extension in ("mcshane", "kirszbraun"):
            policy = lipschitz_policy(x, u, SIZE, extension=extension)
            np.testing.assert_allclose(evaluate(policy, x), u, atol=1e-9)

    def test_zero_constant_is_the_mean(self, data, probes):
        mean = jnp.broadcast_to(jnp.mean(data[1], 0), (200, 2))
        for extension in ("mcshane", "kirszbraun"):
            policy = lipschitz_policy(*data, 0.0, extension=extension)
            np.testing.assert_allclose(evaluate(policy, probes[0]), mean, atol=1e-7)

    def test_one_state_with_two_inputs(self, data):
        x = data[0].at[1].set(data[0][0])
        u = data[1].at[1].set(data[1][0] + 1.0)
        for extension in ("mcshane", "kirszbraun"):
            policy = lipschitz_policy(x, u, 9.0 * SIZE, extension=extension)
            found = policy.residuals[:2]
            np.testing.assert_allclose(found, 0.5 * 2**0.5, atol=1e-6)
            assert policy.fit.met

    def test_under_jit_and_vmap(self, data):
        def losses(alphas):
            fit = jax.vmap(lambda a: lipschitz_policy(*data, a).fit)(alphas)
            return fit.details["loss"]

        alphas = jnp.array([0.3, 0.6])
        alone = [lipschitz_policy(*data, a).fit.details["loss"] for a in alphas]
        np.testing.assert_allclose(jax.jit(losses)(alphas), alone, rtol=1e-6)

    def test_a_spanner_s_paths(self, data):
        x = np.asarray(data[0])
        pairs = spanner(x, 1.5)
        assert len(pairs) < N * (N - 1) / 4
        length = np.linalg.norm(x[:, None] - x[None], axis=2)
        paths = np.full((N, N), np.inf)
        np.fill_diagonal(paths, 0)
        for i, j in pairs:
            paths[i, j] = paths[j, i] = length[i, j]
        for k in range(N):
            paths = np.minimum(paths, paths[:, k, None] + paths[None, k])
        assert np.all(paths <= 1.5 * length + 1e-12)

    def test_a_spanner_keeps_the_constant(self, data, policies, probes):
        policy = lipschitz_policy(*data, SIZE / 2, extension="kirszbraun", stretch=1.5)
        assert steepest(policy, *probes) <= SIZE / 2 * (1 + 1e-9)
        best = policies["kirszbraun"].fit.details["loss"]
        found = policy.fit.details["loss"]
        assert best - 1e-9 <= found <= best + policy.fit.value


class TestExtensions:
    def test_constant(self, policies, probes):
        for policy in policies.values():
            assert steepest(policy, *probes) <= policy.lipschitz * (1 + 1e-9)
        assert policies["kirszbraun"].lipschitz == SIZE / 2
        np.testing.assert_allclose(policies["mcshane"].lipschitz, SIZE / 2 * 2**0.5)
        # The factor is real: by coordinates the map does exceed the constant.
        assert steepest(policies["mcshane"], *probes) > SIZE / 2 * 1.05

    def test_constant_whatever_the_values(self, probes):
        """Values far from any function with the constant still extend to one."""
        for seed in range(5):
            x, u = demonstrations(noise=5.0, seed=seed)
            for kind in (McShane, Kirszbraun):
                function = kind(x, u, 0.5)
                assert steepest(function, *probes) <= function.lipschitz * (1 + 1e-9)

    def test_goes_through_values_that_have_the_constant(self):
        x, u = demonstrations()
        for kind in (McShane, Kirszbraun):
            np.testing.assert_allclose(evaluate(kind(x, u, SIZE), x), u, atol=1e-9)

    def test_points_on_a_lattice_and_doubled(self, probes):
        """Ties and dependent rows do not stop the active-set method."""
        ticks = np.linspace(-1, 1, 3)
        x = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)
        x = jnp.asarray(np.concatenate([x, x[: N - 9]]))
        function = Kirszbraun(x, x @ K.T, SIZE)
        np.testing.assert_allclose(evaluate(function, x), x @ K.T, atol=1e-7)
        assert steepest(function, *probes) <= SIZE * (1 + 1e-7)

    def test_derivative(self, policies):
        x, move = jnp.array([0.31, -0.17]), jnp.array([0.6, 0.8])
        for policy in policies.values():
            slope = slope_along(policy.function, x, move)
            ends = evaluate(policy, jnp.stack([x + 1e-6 * move, x - 1e-6 * move]))
            np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, atol=1e-6)

    def test_derivative_at_a_demonstration(self, data, policies):
        slope = slope_along(policies["mcshane"].function, data[0][0], jnp.ones(2))
        assert np.all(np.isfinite(slope))


@pytest.fixture(scope="module")
def expert():
    return linear_expert_rate(A, B, K)


class TestBounds:
    def test_linear_rate_holds(self, expert):
        loop, power = np.asarray(A + B @ K), np.eye(2)
        for t in range(60):
            reach = np.linalg.norm(power, 2)
            assert reach <= float(expert.overshoot) * float(expert.rate) ** t * (
                1 + 1e-9
            )
            power = loop @ power
        assert expert.proof and expert.rate < 1
        np.testing.assert_allclose(expert.lipschitz, SIZE)
        np.testing.assert_allclose(expert.input_gain, 0.2)

    def test_unstable_expert(self, policies):
        expert = linear_expert_rate(A, B, -K)
        assert expert.rate > 1 and np.isinf(expert.overshoot)
        found = bound(policies["kirszbraun"], expert, noise=0.3)
        assert np.isinf(found.value) and np.isinf(found.details["uniform"])

    def test_estimated_rate(self, expert):
        found = estimate_expert_rate(
            Linear(), lambda x: K @ x, DOMAIN, steps=40, pairs=64, key=jax.random.key(0)
        )
        assert not found.proof
        np.testing.assert_allclose(found.lipschitz, SIZE, rtol=1e-9)
        worth = [float(r.overshoot / (1 - r.rate)) for r in (found, expert)]
        assert 0.2 * worth[1] <= worth[0] <= worth[1] * 1.1

    def test_learning_error(self, policies, expert, probes):
        inside = jnp.clip(probes[0], -1, 1)
        for policy in policies.values():
            found = policy.learning_error(expert, DOMAIN, noise=0.3, cells=900)
            error = evaluate(policy, inside) - inside @ K.T
            assert jnp.max(jnp.linalg.norm(error, axis=1)) <= found.value
            parts = found.details
            slope = policy.lipschitz + expert.lipschitz
            covering = parts["fit_error"] + slope * parts["fill_distance"]
            assert found.value <= covering * (1 + 1e-9)
            gaps = jnp.min(
                jnp.linalg.norm(inside[:, None] - policy.points[None], axis=2), 1
            )
            assert jnp.max(gaps) <= parts["fill_distance"]

    def test_trajectory(self, policies, expert):
        """No disturbance moves the learner's trajectory beyond the bound."""
        policy = policies["kirszbraun"]
        found = bound(policy, expert, noise=0.3, disturbance=0.05)
        deviations, regrets = attacked(policy, 0.05)
        assert found.proof and np.isfinite(found.value)
        assert np.all(deviations <= found.details["deviations"][None])
        assert np.max(regrets) <= found.details["regret"]
        calm = bound(policy, expert, noise=0.3)
        assert calm.value < found.value
        np.testing.assert_array_less(calm.details["attained"], calm.value)
        np.testing.assert_array_less(
            calm.details["attained_regret"], calm.details["regret"]
        )

    def test_inside_a_large_domain_the_uniform_bound_holds(self, policies, expert):
        # The tube of a loop that forgets fast stays inside, and below `uniform`.
        easy = eqx.tree_at(
            lambda r: (r.overshoot, r.rate, r.input_gain),
            expert,
            tuple(jnp.asarray(v) for v in (1.0, 0.5, 0.01)),
        )
        domain = Box.linf(jnp.zeros(2), 8.0)
        found = bound(policies["kirszbraun"], easy, domain=domain)
        assert found.details["inside"]
        assert found.value <= found.details["uniform"]

    def test_error_falls_with_demonstrations(self, policies, expert):
        """A linear expert is recovered as its demonstrations fill the domain."""
        errors = []
        for x in (demonstrations()[0], lattice()):
            function, u = McShane(x, x @ K.T, SIZE), x @ K.T
            policy = LipschitzPolicy(function, x, u, policies["mcshane"].fit, False)
            errors.append(policy.learning_error(expert, DOMAIN, cells=900).value)
        assert errors[1] < 0.4 * errors[0]


def lattice():
    ticks = np.linspace(-1, 1, 9)
    return jnp.asarray(np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2))


def bound(policy, expert, domain=DOMAIN, **settings):
    return policy.certificate(
        Linear(),
        expert,
        expert_path(),
        domain,
        cells=400,
        cost_lipschitz=(1.0, 1.0),
        **settings,
    )


def expert_path(steps=12):
    states = [np.array([0.5, -0.3])]
    for _ in range(steps):
        states.append(np.asarray(A + B @ K) @ states[-1])
    states = np.stack(states)
    return jnp.asarray(states), jnp.asarray(states[:-1] @ np.asarray(K).T)


def attacked(policy, size):
    """Deviations and regrets under random disturbances of full size."""
    states, inputs = expert_path()
    angles = jax.random.uniform(jax.random.key(0), (100, len(inputs)), maxval=6.3)
    noise = size * jnp.stack([jnp.cos(angles), jnp.sin(angles)], -1)
    system = Linear()

    @jax.jit
    @jax.vmap
    def run(noise):
        def step(x, e):
            u = policy(x + e)
            return system.step(x, u), (x, system.cost(x, u))

        last, (path, costs) = jax.lax.scan(step, states[0], noise)
        path = jnp.concatenate([path, last[None]])
        return jnp.linalg.norm(path - states, axis=1), jnp.sum(costs)

    deviations, costs = run(noise)
    return deviations, costs - sum(map(system.cost, states[:-1], inputs))


class Normalised(eqx.Module):
    """A small network whose constant is the product of its layers' norms."""

    first: jax.Array
    second: jax.Array

    @property
    def lipschitz(self):
        return jnp.linalg.norm(self.first) * jnp.linalg.norm(self.second)

    def __call__(self, x):
        return self.second @ jnp.tanh(self.first @ x)


class TestModule:
    def test_trained_with_the_constant(self, data, probes):
        keys = jax.random.split(jax.random.key(0))
        module = Normalised(
            jax.random.normal(keys[0], (8, 2)), jax.random.normal(keys[1], (2, 8))
        )
        # optax multiplies Python numbers by integer steps.
        with jax.numpy_dtype_promotion("standard"):
            policy = lipschitz_policy(*data, SIZE / 2, extension=module, steps=150)
        assert steepest(policy, *probes) <= SIZE / 2
        before = jnp.mean(jnp.sum((data[1] - jnp.mean(data[1], 0)[None]) ** 2, 1))
        assert policy.fit.details["loss"] < 0.8 * before
        assert policy.fit.proof and policy.fit.value > 0

    def test_without_a_constant(self, data):
        network = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
        with pytest.raises(TypeError, match="with an attribute `lipschitz`"):
            lipschitz_policy(*data, 1.0, extension=network)


def test_single_precision(float32, data):
    x, u = (jnp.asarray(np.asarray(a), jnp.float32) for a in data)
    policy = lipschitz_policy(x, u, SIZE / 2)
    assert policy.residuals.dtype == jnp.float32
    assert policy.fit.met


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"alpha": -1.0}, ValueError, "`alpha` must not be negative"),
        ({"X": jnp.zeros((0, 2))}, ValueError, "`X` must not be empty"),
        ({"X": jnp.zeros(3)}, ValueError, "`X` must have shape"),
        ({"X": jnp.zeros((3, 2), int)}, TypeError, "must hold floating numbers"),
        ({"U": jnp.zeros((3, 2))}, ValueError, "`U` must have shape"),
        ({"U": jnp.full((N, 2), jnp.nan)}, ValueError, "`U` must be finite"),
        ({"extension": "nearest"}, ValueError, "`extension` must be one of"),
        ({"stretch": 1.0}, ValueError, "`stretch` must be above 1"),
        ({"tol": 0.0}, ValueError, "`tol` must be positive"),
    ],
)
def test_bad_input(data, change, error, message):
    settings = {"X": data[0], "U": data[1], "alpha": 1.0} | change
    with pytest.raises(error, match=message):
        lipschitz_policy(**settings)


def test_bad_bounds(policies):
    policy, expert = policies["mcshane"], linear_expert_rate(A, B, K)
    states, inputs = expert_path()
    with pytest.raises(ValueError, match="`domain` must be finite"):
        policy.learning_error(expert, Box(-jnp.ones(2), jnp.full(2, jnp.inf)))
    with pytest.raises(ValueError, match="`trajectory` must have shape"):
        policy.certificate(Linear(), expert, (states, inputs[1:]), DOMAIN)
    with pytest.raises(ValueError, match="`disturbance` must not be negative"):
        bound(policy, expert, disturbance=-1.0)
    with pytest.raises(ValueError, match="`K` must have shape"):
        linear_expert_rate(A, B, K[:, :1])
