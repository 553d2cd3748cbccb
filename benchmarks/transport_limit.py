"""How close plain Sinkhorn is to its limit: half a sweep over one read of the matrix.

    python benchmarks/transport_limit.py [--sizes 500 1000]

One thread: `OMP_NUM_THREADS=1` and `XLA_FLAGS=--xla_cpu_multi_thread_eigen=false`.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from varan.lab.race import race
from varan.transport import EntropicTransport, Sinkhorn

ROUNDS = 200


def measure(n):
    """Prints the ratio for one size, with its interval."""
    rng = np.random.default_rng(0)
    problem = EntropicTransport(jnp.asarray(rng.uniform(size=(n, n))), epsilon=0.05)
    matrix = problem.cost
    solver = Sinkhorn(sweeps=ROUNDS)
    state = jax.jit(solver.init)(problem, problem.start())
    step = jax.jit(solver.step)

    @jax.jit
    def reads(v):
        def both(_, v):
            return (v @ matrix) @ matrix.T * (1 / n**2)

        return jax.lax.fori_loop(0, ROUNDS, both, v)

    result = race(
        {
            "reads": lambda: reads(problem.a),
            "sweeps": lambda: step(problem, state).x,
        },
        repeats=9,
        reference="sweeps",
    )
    ratio, low, high = result.ratio("reads")
    print(f"n={n}: half-sweep / read of the matrix {ratio:.2f} [{low:.2f}, {high:.2f}]")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 1000])
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    for n in options.sizes:
        measure(n)


if __name__ == "__main__":
    main()
