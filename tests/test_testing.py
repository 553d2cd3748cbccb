"""The contracts catch what they say they catch: one broken method for each check."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan import Certificate, FixedPoint, GradientDescent, Smooth, State
from varan.testing import MINIMUM, Case, checks, contract
from varan.testing._benches import BENCHES

# ------------------------------------------------------------------ sound methods


def shifted_bowl(x, c):
    return 0.5 * jnp.sum((x - c) ** 2)


BOWLS = tuple(Smooth(shifted_bowl, jnp.asarray(c)) for c in ([1.0, 2.0], [3.0, -1.0]))
SOLVER = Case(
    lambda: GradientDescent(0.5),
    BOWLS,
    jnp.zeros(2),
    tags={"shift", "permutation", "reflection"},
    bounds=(-5.0, 5.0),
    max_steps=50,
    name="descent",
)
OPTIMISER = Case(
    lambda: optax.sgd(0.1, momentum=0.5),
    BOWLS,
    jnp.zeros(2),
    kind="optimiser",
    name="sgd",
)


def check_vectors(owner, *vectors):
    if any(v.size == 0 for v in vectors) or len({v.shape for v in vectors}) > 1:
        raise ValueError(f"{owner}: `a` and `b` must be equally long and not empty.")


def product(a, b):
    check_vectors("product", a, b)
    return jnp.sum(jnp.sin(a) * b)


PAIRS = tuple(
    (jnp.asarray(a), jnp.asarray(b))
    for a, b in (([0.3, 0.4], [1.0, 2.0]), ([0.5, -0.2], [2.0, 0.1]))
)
FUNCTION = Case(lambda: product, PAIRS, kind="function", name="product")


def bound(a, b, budget):
    """Above sum(a * b), by Hoelder on blocks that shrink with the budget."""
    check_vectors("bound", a, b)
    blocks = 2 // budget
    a, b = a.reshape(-1, blocks), b.reshape(-1, blocks)
    value = jnp.sum(jnp.sum(jnp.abs(a), 1) * jnp.max(jnp.abs(b), 1))
    return Certificate("bound", value, proof=True, statement="a . b <= value")


CERTIFICATE = Case(
    lambda: bound,
    PAIRS,
    kind="certificate",
    truths=[float(jnp.sum(a * b)) for a, b in PAIRS],
    budgets=(1, 2),
    name="bound",
)
SOUND = (SOLVER, OPTIMISER, FUNCTION, CERTIFICATE)
test_contract = contract(SOUND)


# ----------------------------------------------------------------- broken methods


class Broken(GradientDescent):
    """Gradient descent whose step is spoilt by `spoil(problem, old, new)`."""

    def step(self, problem, state):
        new = super().step(problem, state)
        return self.spoil(problem, state, new)


def broken_solver(spoil):
    kind = type("Spoilt", (Broken,), {"spoil": lambda self, *args: spoil(*args)})
    return {"factory": lambda: kind(0.5)}


def is_eager(x):
    return not isinstance(x, jax.core.Tracer)


def eager_differs(problem, old, new):
    return State(new.x + 1.0, new.condition) if is_eager(new.x) else new


def flat_only(problem, old, new):
    return State(jnp.asarray(new.x), new.condition)


@jax.custom_batching.custom_vmap
def alone(x):
    return x


@alone.def_vmap
def _shared(size, batched, x):
    return jnp.broadcast_to(x[:1], x.shape), True


def lanes_mix(problem, old, new):
    x = alone(new.x)
    return State(x, problem.condition(x))


def lies(problem, old, new):
    zero = jax.tree_util.tree_map(jnp.zeros_like, new.condition)
    return State(new.x, zero)


def forgets_bounds(problem, old, new):
    x = jax.tree_util.tree_map(lambda x: x + 10.0, new.x)
    return State(x, problem.condition(x))


def towards_origin_only(problem, old, new):
    """Works where the answer lies near the origin."""
    x = jax.tree_util.tree_map(lambda x: jnp.clip(x, -4.0, 4.0), new.x)
    return State(x, problem.condition(x))


def positive_only(problem, old, new):
    x = jax.tree_util.tree_map(lambda x: x.at[0].set(jnp.abs(x[0])), new.x)
    return State(x, problem.condition(x))


def first_is_larger(problem, old, new):
    x = jnp.where(new.x[0] > new.x[-1], new.x[::-1], new.x)
    return State(x, problem.condition(x))


def flips_a_setting(problem, old, new):
    jax.config.update("jax_default_matmul_precision", "float32")
    return new


class RestartsFromNoise(GradientDescent):
    def init(self, problem, start):
        moved = jax.tree_util.tree_map(lambda x: x + 0.1, start)
        return State(moved, problem.condition(moved))


class Thrifty(GradientDescent):
    """Does not report what it evaluates."""

    def step(self, problem, state):
        new = super().step(problem, state)
        return State(new.x, new.condition, evaluations=0)


def stateless(update):
    def init(params):
        return optax.EmptyState()

    def step(updates, state, params=None):
        return jax.tree_util.tree_map(update, updates), state

    return {"factory": lambda: optax.GradientTransformation(init, step)}


def counting(dtype_of, structure=lambda count: count):
    def init(params):
        return jnp.zeros((), jnp.int32)

    def step(updates, state, params=None):
        scaled = jax.tree_util.tree_map(
            lambda u: (-0.1 * u).astype(dtype_of(u)), updates
        )
        return scaled, structure(state + 1)

    return {"factory": lambda: optax.GradientTransformation(init, step)}


@jax.custom_jvp
def wrong_slope(a):
    return jnp.sin(a)


wrong_slope.defjvp(lambda p, t: (jnp.sin(p[0]), 1.01 * jnp.cos(p[0]) * t[0]))


@jax.custom_vjp
def reverse_only(a):
    return jnp.sin(a)


reverse_only.defvjp(lambda a: (jnp.sin(a), a), lambda a, g: (jnp.cos(a) * g,))


def function(body):
    def checked(a, b):
        check_vectors("function", a, b)
        return body(a, b)

    return {"factory": lambda: checked}


def certificate(value, check=check_vectors):
    def certify(a, b, budget):
        check("certificate", a, b)
        return Certificate("bound", value(a, b, budget), proof=True, statement="")

    return {"factory": lambda: certify}


def overwrites(a, b):
    if isinstance(a, np.ndarray):
        a[0] = 0.0
    return jnp.sum(a * b)


def no_check(owner, *vectors):
    pass


def hoelder(a, b, budget):
    return bound(a, b, budget).value


def new_callable(number):
    return Smooth(lambda x, c: 0.5 * jnp.sum((x - c) ** 2), BOWLS[number].params[0])


NOISY = {"tags": {"stochastic"}}
STUCK = broken_solver(lambda problem, old, new: old)
MUTATIONS = [
    (SOLVER, "jit_equals_eager", broken_solver(eager_differs)),
    (SOLVER, "dtype_follows_input", {"factory": lambda: Doubling(0.5)}),
    (SOLVER, "pytrees", broken_solver(flat_only)),
    (SOLVER, "vmap_equals_loop", broken_solver(lanes_mix)),
    (SOLVER, "inputs_and_settings_untouched", broken_solver(flips_a_setting)),
    (SOLVER, "solves_and_status_is_true", broken_solver(lies)),
    (SOLVER, "stops_at_once_at_solution", {"factory": lambda: RestartsFromNoise(0.5)}),
    (SOLVER, "cut_off_says_so", {"factory": lambda: Thrifty(0.5)}),
    (SOLVER, "derivative_matches_differences", STUCK),
    (SOLVER, "forward_matches_reverse", STUCK),
    (SOLVER, "bounds_hold", broken_solver(forgets_bounds)),
    (SOLVER, "shift", broken_solver(towards_origin_only)),
    (SOLVER, "reflection", broken_solver(positive_only)),
    (SOLVER, "permutation", broken_solver(first_is_larger)),
    (SOLVER, "key_decides", {**NOISY, "factory": lambda key: GradientDescent(0.5)}),
    (OPTIMISER, "jit_equals_eager", stateless(
        lambda u: -0.1 * u if is_eager(u) else -0.2 * u)),
    (OPTIMISER, "dtype_follows_input", counting(lambda u: jnp.float64)),
    (OPTIMISER, "pytrees", stateless(lambda u: -0.1 * u / jnp.linalg.norm(u))),
    (OPTIMISER, "vmap_equals_loop", stateless(lambda u: -0.1 * alone(u))),
    (OPTIMISER, "bad_values_say_so", stateless(lambda u: jnp.nan_to_num(u, nan=1.0))),
    (OPTIMISER, "lowers_the_objective", stateless(lambda u: 0.1 * u)),
    (OPTIMISER, "accumulates", stateless(
        lambda u: -0.1 * u if is_eager(u) else 0.0 * u)),
    (OPTIMISER, "state_survives_scan", counting(
        lambda u: u.dtype, lambda count: count.astype(jnp.float32))),
    (FUNCTION, "jit_equals_eager", function(
        lambda a, b: jnp.sum(a * b) + (1.0 if is_eager(a) else 0.0))),
    (FUNCTION, "dtype_follows_input", function(
        lambda a, b: jnp.sum(a * b).astype(jnp.float64))),
    (FUNCTION, "pytrees", function(lambda a, b: a.at[0].add(jnp.sum(b)))),
    (FUNCTION, "vmap_equals_loop", function(lambda a, b: jnp.sum(alone(a) * b))),
    (FUNCTION, "bad_values_say_so", function(
        lambda a, b: jnp.sum(jnp.nan_to_num(a * b)))),
    (FUNCTION, "bad_shapes_say_so", {"factory": lambda: lambda a, b: jnp.sum(
        jnp.sin(a)) + jnp.sum(b)}),
    (FUNCTION, "inputs_and_settings_untouched", function(overwrites)),
    (FUNCTION, "derivative_matches_differences", function(
        lambda a, b: jnp.sum(wrong_slope(a) * b))),
    (FUNCTION, "forward_matches_reverse", function(
        lambda a, b: jnp.sum(reverse_only(a) * b))),
    (FUNCTION, "second_order_matches_differences", function(
        lambda a, b: jnp.sum(jax.lax.stop_gradient(jnp.cos(a)) * a * b))),
    (FUNCTION, "key_decides", {**NOISY, "factory": lambda key: lambda a, b: jnp.sum(
        a * b)}),
    (CERTIFICATE, "right_side_of_truth", certificate(
        lambda a, b, budget: jnp.sum(a * b) - 0.01)),
    (CERTIFICATE, "tightens_with_budget", certificate(
        lambda a, b, budget: hoelder(a, b, 3 - budget))),
    (CERTIFICATE, "tightens_with_budget", certificate(
        lambda a, b, budget: hoelder(a, b, 1))),
    (CERTIFICATE, "bad_values_say_so", certificate(
        lambda a, b, budget: jnp.nan_to_num(hoelder(a, b, budget)))),
    (CERTIFICATE, "bad_shapes_say_so", certificate(
        lambda a, b, budget: jnp.sum(jnp.abs(a)) * 0 + 1.0, no_check)),
    (CERTIFICATE, "inputs_and_settings_untouched", certificate(
        lambda a, b, budget: jnp.asarray(np.random.rand()) + jnp.sum(a))),
]  # fmt: skip


class Doubling(GradientDescent):
    """Its first iterate is of another dtype than the start."""

    def init(self, problem, start):
        wide = start.astype(jnp.float64)
        return State(wide, problem.condition(wide))


def run(case, check):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        checks(case)[check](BENCHES[case.kind](case))


@pytest.mark.parametrize(
    ("case", "check", "change"),
    MUTATIONS,
    ids=[f"{case.name}-{check}-{n}" for n, (case, check, _) in enumerate(MUTATIONS)],
)
def test_each_check_catches_a_broken_method(case, check, change):
    precision = jax.config.jax_default_matmul_precision
    broken = dataclasses.replace(case, **change)
    try:
        with pytest.raises(Exception) as caught:
            run(broken, check)
    finally:
        jax.config.update("jax_default_matmul_precision", precision)
    assert not isinstance(caught.value, NameError)  # a slip of this file


def test_compilation_is_counted():
    def rebuilt(a, b):
        return product(a, b)

    case = dataclasses.replace(FUNCTION, factory=lambda: rebuilt)
    bench = BENCHES["function"](case)
    assert bench.count_traces(bench.instances) == 1
    assert bench.count_traces(bench.instances) == 0
    bench.compiled = lambda instance: jax.jit(lambda i: bench.run(i))(instance)
    with pytest.raises(AssertionError, match="traced 2 times"):
        checks(case)["new_values_compile_nothing"](bench)


def test_every_check_has_a_mutation():
    every = {check for case in SOUND for check in checks(case)}
    caught = {check for _, check, _ in MUTATIONS}
    # The first has the test above; whatever breaks a chain breaks the update itself;
    # and no solver can call a failure a success any more, since `solve` evaluates the
    # condition of what it returns (tests/core/test_solve.py).
    unbreakable = {"new_values_compile_nothing", "chains", "failing_says_so"}
    assert every - caught == unbreakable


# --------------------------------------------------------------------- the harness


def test_counts_reach_the_minimum_of_each_kind():
    for case in SOUND:
        assert len(checks(case)) >= MINIMUM[case.kind]
    plain = dataclasses.replace(SOLVER, tags=set(), bounds=None)
    assert len(checks(plain)) == MINIMUM["solver"]


def test_a_battery_that_shrank_is_an_error(monkeypatch):
    monkeypatch.setitem(MINIMUM, "solver", 100)
    with pytest.raises(ValueError, match=r"contract: case 0 has only \d+ checks"):
        contract([SOLVER])
    with pytest.raises(ValueError, match="`cases` must not be empty"):
        contract([])


def test_cases_with_unknown_words_are_refused():
    for change in ({"tags": {"sochastic"}}, {"xfail": {"no_such_check": "why"}}):
        with pytest.raises(ValueError, match="unknown tags or checks"):
            dataclasses.replace(SOLVER, **change)
    with pytest.raises(ValueError, match="`kind` must be in"):
        dataclasses.replace(SOLVER, kind="sampler")
    with pytest.raises(ValueError, match="two at least"):
        dataclasses.replace(SOLVER, instances=BOWLS[:1])
    with pytest.raises(ValueError, match="one structure and function"):
        dataclasses.replace(SOLVER, instances=(new_callable(0), new_callable(1)))


def test_expected_failures_are_strict_and_named():
    case = dataclasses.replace(SOLVER, xfail={"cut_off_says_so": "a reason"})
    test = contract([case])
    (mark,) = test.pytestmark
    marks = {p.id: p.marks for p in mark.args[1]}
    (xfail,) = marks["descent-cut_off_says_so"]
    assert xfail.name == "xfail" and xfail.kwargs == {
        "reason": "a reason",
        "strict": True,
    }
    assert sum(map(len, marks.values())) == 1
    assert test.cases == (case,)


def test_a_check_that_skips_fails():
    def factory():
        pytest.skip("quietly")

    test = contract([dataclasses.replace(SOLVER, factory=factory)])
    (mark,) = test.pytestmark
    check, bench = mark.args[1][0].values
    with pytest.raises(pytest.fail.Exception, match="must not skip"):
        test(check, bench)


def test_importing_the_contracts_needs_no_pytest():
    import subprocess
    import sys

    code = "import sys, varan.testing; sys.exit('pytest' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_fixed_points_and_their_scale():
    """A map that contracts in every unit of length."""

    def tilted(x, c):
        return 0.5 * jnp.cos(x) + c

    from varan import FixedPointIteration

    case = Case(
        FixedPointIteration,
        [FixedPoint(tilted, jnp.asarray(c)) for c in ([2.0, 1.0], [0.3, 4.0])],
        jnp.zeros(2),
        tags={"scale"},
    )
    run(case, "scale")
