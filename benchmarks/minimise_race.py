"""Race: small smooth convex problems, varan's solvers against optax and optimistix.

Logistic regression on breast cancer (31 unknowns) and softmax regression on digits
(650 unknowns), float64, from zero to a gradient norm of 1e-8; each solver is one
compiled program. `--cold` measures instead the processor seconds of the first answer,
tracing and compiling included, each in a process of its own.

    python benchmarks/minimise_race.py [--repeats 15] [--cold]
"""

import argparse
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
from sklearn.datasets import load_breast_cancer, load_digits

from varan import Newton, NewtonCG, Smooth, solve
from varan.lab.race import race

TOL, PENALTY, MAX_STEPS = 1e-8, 1e-4, 2000


def logistic(w, X, sign):
    return jnp.mean(jnp.logaddexp(0.0, -sign * (X @ w))) + PENALTY / 2 * w @ w


def softmax(W, X, label):
    scores = X @ W
    picked = jnp.take_along_axis(scores, label[:, None], 1)[:, 0]
    loss = jnp.mean(jax.nn.logsumexp(scores, 1) - picked)
    return loss + PENALTY / 2 * jnp.sum(W * W)


def breast_cancer():
    X, y = load_breast_cancer(return_X_y=True)
    X = np.c_[(X - X.mean(0)) / X.std(0), np.ones(len(X))]
    return logistic, jnp.zeros(X.shape[1]), (jnp.asarray(X), jnp.asarray(2.0 * y - 1))


def digits():
    X, y = load_digits(return_X_y=True)
    X = np.c_[X / 16, np.ones(len(X))]
    return softmax, jnp.zeros((X.shape[1], 10)), (jnp.asarray(X), jnp.asarray(y))


def optax_lbfgs(loss):
    """L-BFGS as the documentation of optax runs it, values and gradients reused."""

    @jax.jit
    def run(start, *data):
        method = optax.lbfgs(memory_size=10)

        def value(x):
            return loss(x, *data)

        value_and_grad = optax.value_and_grad_from_state(value)

        def proceed(carry):
            _, _, gradient, step = carry
            return (jnp.linalg.norm(gradient) > TOL) & (step < MAX_STEPS)

        def advance(carry):
            x, memory, _, step = carry
            objective, gradient = value_and_grad(x, state=memory)
            updates, memory = method.update(
                gradient, memory, x, value=objective, grad=gradient, value_fn=value
            )
            x = optax.apply_updates(x, updates)
            return x, memory, optax.tree_utils.tree_get(memory, "grad"), step + 1

        first = (start, method.init(start), jnp.ones_like(start), 0)
        return jax.lax.while_loop(proceed, advance, first)[0]

    return run


def optimistix_lbfgs(loss, tol):
    solver = optx.LBFGS(rtol=tol, atol=tol)

    @jax.jit
    def run(start, *data):
        return optx.minimise(
            lambda x, args: loss(x, *args), solver, start, data, max_steps=MAX_STEPS
        ).value

    return run


def contestants(loss, start, data):
    problem = Smooth(loss, *data, convex=True)
    ours = {"varan NewtonCG": NewtonCG()}
    if start.size <= 100:
        ours["varan Newton"] = Newton()
    runs = {
        name: lambda s=solver: solve(problem, s, start, tol=TOL).x
        for name, solver in ours.items()
    }
    peer = optax_lbfgs(loss)
    runs["optax L-BFGS"] = lambda: peer(start, *data)
    # It stops by a Cauchy criterion, not by the gradient: the loosest tolerance that
    # gives the same gradient norm is its fair setting.
    for tol in (1e-8, 1e-9, 1e-10, 1e-11, 1e-12):
        other = optimistix_lbfgs(loss, tol)
        try:
            answer = other(start, *data)
        except RuntimeError:
            continue
        if jnp.linalg.norm(jax.grad(loss)(answer, *data)) <= TOL:
            runs[f"optimistix L-BFGS ({tol:.0e})"] = lambda o=other: o(start, *data)
            break
    return runs


def cold(names):
    """Processor seconds from nothing compiled to the first answer, a process each."""
    program = """
import sys, time
import jax
jax.config.update("jax_enable_x64", True)
sys.path.insert(0, {folder!r})
import minimise_race as m
loss, start, data = m.{instance}()
from varan import Newton, NewtonCG, Smooth, solve
runs = {{
    "varan Newton": lambda: solve(
        Smooth(loss, *data, convex=True), Newton(), start, tol=m.TOL
    ).x,
    "varan NewtonCG": lambda: solve(
        Smooth(loss, *data, convex=True), NewtonCG(), start, tol=m.TOL
    ).x,
    "optax L-BFGS": lambda: m.optax_lbfgs(loss)(start, *data),
}}
jax.block_until_ready(jax.jit(lambda x: x + 1)(start))
begin = time.process_time()
jax.block_until_ready(runs[{name!r}]())
print(time.process_time() - begin)
"""
    folder = __file__.rsplit("/", 1)[0]
    for instance in ("breast_cancer", "digits"):
        for name in names:
            if instance == "digits" and name == "varan Newton":
                continue
            code = program.format(folder=folder, instance=instance, name=name)
            seconds = [
                float(subprocess.check_output([sys.executable, "-c", code]))
                for _ in range(3)
            ]
            print(f"{instance}  {name:16s} {np.median(seconds):.2f} s CPU, cold")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cold", action="store_true")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    if arguments.cold:
        cold(["varan Newton", "varan NewtonCG", "optax L-BFGS"])
        return
    for instance in (breast_cancer, digits):
        loss, start, data = instance()
        begin = time.perf_counter()
        result = race(
            contestants(loss, start, data),
            repeats=arguments.repeats,
            reference="optax L-BFGS",
        )
        print(f"\n{instance.__name__} ({time.perf_counter() - begin:.0f} s)")
        print(result.table())
        for name, answer in result.answers.items():
            print(f"  {name}: |g| {jnp.linalg.norm(jax.grad(loss)(answer, *data)):.1e}")


if __name__ == "__main__":
    main()
