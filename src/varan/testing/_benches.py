"""Cases made ready for checks: float64 instances, shared compiled functions."""

from __future__ import annotations

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from ..core import Smooth, solve
from ..core._solve import _as_solver
from ._tools import (
    TRACES,
    View,
    cast,
    counted,
    fill,
    finite,
    flatten,
    inexact,
    moved,
    tree_floats,
)

STEPS = 4  # enough for memory to matter, few enough to run without jit


class _Bench:
    """A case made ready: instances in float64, compiled functions shared."""

    def __init__(self, case: Case):
        self.case = case
        self._traces = 0

    @property
    def traces(self):
        return self._traces

    @functools.cached_property
    def method(self):
        return self.make(0)

    @functools.cached_property
    def instances(self):
        return [cast(i, jnp.float64) for i in self.case.instances]

    @functools.cached_property
    def compiled(self):
        return jax.jit(self.run)

    @functools.cached_property
    def derivative(self):
        return eqx.filter_jit(self._derive)

    def make(self, seed):
        stochastic = "stochastic" in self.case.tags
        return self.case.factory(*([jax.random.key(seed)] if stochastic else []))

    def call(self, instance):
        return self.method(*instance)

    def run(self, instance):
        self._traces += 1
        return self.call(instance)

    def eager_and_jitted(self):
        return self.call(self.instances[0]), self.compiled(self.instances[0])

    def count_traces(self, instances):
        before = self.traces
        for instance in instances:
            jax.block_until_ready(self.compiled(instance))
        return self.traces - before

    def key_run(self, seed):
        return self.make(seed)(*self.instances[0])

    def refuse_bad(self, value):
        if np.isnan(value):  # a function may saturate at infinity, tanh for one
            bad = self.call(fill(self.instances[0], value))
            assert not finite(bad), f"{value} gave finite numbers: {bad}"

    def refuse_empty(self):
        # Sums and means of nothing exist; a refusal must only be clear.
        self.call(tree_floats(lambda leaf: leaf[..., :0], self.instances[0]))

    def refuse_shape(self):
        leaves, structure = jtu.tree_flatten(self.instances[0])
        if len(leaves) > 1:
            leaves[0] = jnp.concatenate([jnp.atleast_1d(leaves[0])] * 2, axis=-1)
            self.call(jtu.tree_unflatten(structure, leaves))
            raise AssertionError("arrays that do not fit together were accepted")

    def other_structure(self):
        """The answer for equal numbers in another dress, and the plain answer."""
        instance = jtu.tree_map(np.asarray, self.instances[0])
        return self.call(instance), self.call(self.instances[0])

    def smooth(self, floating, rest):
        return inexact(self.compiled(eqx.combine(floating, rest)))

    def _derive(self, floating, rest, direction, weight):
        function = functools.partial(self.smooth, rest=rest)
        _, tangent = jax.jvp(function, (floating,), (direction,))
        _, pullback = jax.vjp(function, floating)
        return tangent, pullback(weight)[0]


class _CertificateBench(_Bench):
    def call(self, instance):
        return self.certify(instance, self.case.budgets[-1]).value

    def certify(self, instance, budget):
        return self.method(*instance, budget)

    def refuse_bad(self, value):
        bad = self.call(fill(self.instances[0], value))
        assert not finite(bad), f"data {value} were certified as {bad}"

    def refuse_empty(self):
        bad = self.call(tree_floats(lambda leaf: leaf[..., :0], self.instances[0]))
        assert not finite(bad), f"nothing was certified as {bad}"


class _SolverBench(_Bench):
    @functools.cached_property
    def instances(self):
        return [counted(cast(p, jnp.float64)) for p in self.case.instances]

    @property
    def traces(self):  # of all cases with problems of this class
        return TRACES[type(self.case.instances[0])]

    @functools.cached_property
    def start(self):
        return cast(self.case.start, jnp.float64)

    def solve(self, problem, start=None, method=None, **settings):
        settings = {"tol": self.case.tol, **settings}
        start = self.start if start is None else start
        method = self.method if method is None else method
        return solve(problem, method, start, max_steps=self.case.max_steps, **settings)

    def compiled(self, problem, **settings):  # `solve` compiles by itself
        end = self.solve(problem, **settings)
        return self.case.observe(problem, end.x), end.status, end.steps

    run = compiled

    def call(self, problem):
        return self.solve(problem).x

    def eager_and_jitted(self):
        step = eqx.filter_jit(lambda state: solver.step(problem, state))
        problem, solver = self.instances[0], _as_solver(self.method, self.instances[0])
        one = two = solver.init(problem, self.start)
        for _ in range(STEPS):
            one, two = solver.step(problem, one), step(two)
        return one.x, two.x

    def key_run(self, seed):
        return self.solve(self.instances[0], method=self.make(seed)).trace.residual

    def refuse_bad(self, value):
        problem = self.instances[0]
        if jtu.tree_leaves(eqx.filter(problem, eqx.is_inexact_array)):
            end = self.solve(fill(problem, value))
            # Infinite data may still leave a finite answer (a bound at infinity).
            solved = np.isinf(value) and finite(end.x)
            assert solved or not end.converged, f"converged on data {value}"
        end = self.solve(problem, fill(self.start, value))
        assert finite(end.x) or not end.converged, f"converged from start {value}"

    def refuse_empty(self):
        self.solve(self.instances[0], tree_floats(lambda x: x[..., :0], self.start))
        raise AssertionError("an empty start was accepted")

    def refuse_shape(self):
        longer = tree_floats(
            lambda x: jnp.concatenate([jnp.atleast_1d(x)] * 2), self.start
        )
        end = self.solve(self.instances[0], longer, max_evaluations=9)
        assert flatten(end.x).size == flatten(longer).size, (
            "the start was not used whole"
        )

    def other_structure(self):
        flat = flatten(self.start)
        split = {"head": flat[:1], "tail": (flat[1:],)} if flat.size > 1 else [flat]
        view = View.make(self.start)
        end = self.solve(moved(self.instances[0], view), split)
        assert jtu.tree_structure(end.x) == jtu.tree_structure(split)
        return view(end.x), self.solve(self.instances[0]).x

    def smooth(self, floating, rest):
        problem = eqx.combine(floating, rest)
        return inexact(self.case.observe(problem, self.solve(problem).x))


class _OptimiserBench(_Bench):
    @functools.cached_property
    def start(self):
        return cast(self.case.start, jnp.float64)

    def call(self, problem):
        return self.train(self.method, problem, self.start)

    def eager_and_jitted(self):
        import optax

        params, problem = self.start, self.instances[0]
        state = self.method.init(params)
        for _ in range(STEPS):
            updates, state = self.update(self.method, problem, state, params)
            params = optax.apply_updates(params, updates)
        return params, self.compiled(problem)

    def key_run(self, seed):
        return self.train(self.make(seed), self.instances[0], self.start)

    def update(self, method, problem, state, params):
        import optax

        value, grad = jax.value_and_grad(problem.value)(params)
        return optax.with_extra_args_support(method).update(
            grad, state, params, value=value, grad=grad, value_fn=problem.value
        )

    def train(self, method, problem, params, steps=STEPS):
        import optax

        def body(carry, _):
            params, state = carry
            updates, state = self.update(method, problem, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = params, method.init(params)
        return jax.lax.scan(body, carry, length=steps)[0][0]

    def refuse_bad(self, value):
        if np.isnan(value):  # an infinite gradient may be clipped rightly
            state = self.method.init(self.start)
            problem = fill(self.instances[0], value)
            flat = flatten(self.update(self.method, problem, state, self.start)[0])
            assert np.all(np.isnan(flat) | (flat == 0)), f"NaN became {flat}"

    def refuse_empty(self):
        params = [self.start, jnp.zeros(0)]
        problem = Smooth(lambda p, inner: inner.value(p[0]), self.instances[0])
        end = self.train(self.method, problem, params)
        assert end[1].shape == (0,) and finite(end)

    def refuse_shape(self):
        state = self.method.init(self.start)
        self.method.update([self.start, self.start], state, self.start)
        raise AssertionError("updates of another structure were accepted")

    def other_structure(self):
        flat, view = flatten(self.start), View.make(self.start)
        split = {"head": flat[:1], "tail": (flat[1:],)}
        end = self.train(self.method, moved(self.instances[0], view), split)
        return view(end), self.run(self.instances[0])


BENCHES = {
    "solver": _SolverBench,
    "optimiser": _OptimiserBench,
    "certificate": _CertificateBench,
    "function": _Bench,
}
