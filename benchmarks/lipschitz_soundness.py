"""Is any certified number on the wrong side? Random networks and boxes, counted.

Over 10,000 random small networks (plain, residual, convolutional; ReLU, leaky ReLU,
tanh, sigmoid, both GELUs, SiLU; normal weights, small integers that put activations on
their kinks, and large weights that nearly cancel) and boxes (from points to the whole
range), in single and double precision:
output bounds (IBP, CROWN, alpha-CROWN), Jacobian bounds and Lipschitz constants (every
method) against values at 129 points each in float64, and on ReLU networks against exact
enumeration and mixed-integer programs. Exits with 1 if one violation is found.

    python benchmarks/lipschitz_soundness.py [--networks 160] [--exact 100] [--seed 0]
"""

import argparse
import itertools
import sys

import jax

from varan.claims.lipschitz import _soundness as soundness


def families():
    """Every activation on plain networks; ReLU and tanh on the other shapes."""
    for shape, activation in itertools.product(soundness.SHAPES, soundness.ACTIVATIONS):
        if shape != "plain" and activation not in ("relu", "tanh"):
            continue
        for weights, dtype in itertools.product(
            soundness.WEIGHTS, ("float32", "float64")
        ):
            yield dict(shape=shape, activation=activation, weights=weights, dtype=dtype)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=160, help="of each family")
    parser.add_argument("--exact", type=int, default=100, help="of either weights")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    print("family | networks | comparisons | violations | worst excess")
    total = soundness.Count(0, 0, 0, float("-inf"))
    for place, family in enumerate(families()):
        count = soundness.sampled(arguments.seed + place, arguments.networks, **family)
        total = total + count
        _row(", ".join(family.values()), count)
    for weights in ("normal", "integers"):
        count = soundness.enumerated(arguments.seed, arguments.exact, weights=weights)
        total = total + count
        _row(f"exact, relu, {weights}", count)
    _row("all", total)
    sys.exit(1 if total.violations else 0)


def _row(name, count):
    numbers = (count.networks, count.comparisons, count.violations)
    cells = (name, *(f"{n:,}" for n in numbers), f"{count.worst:.1e}")
    print(" | ".join(cells), flush=True)


if __name__ == "__main__":
    main()
