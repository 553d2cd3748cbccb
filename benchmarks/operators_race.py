"""Race: projections and isotonic regression against jaxopt, scipy and scikit-learn.

One instance, a batch of 256 by vmap, and the batch with the gradient of a weighted sum;
float64, each contestant one compiled program. jaxopt's transport projections stop at
a tolerance of 1e-3, ours at rounding; its box section bisects to 1e-5.

    python benchmarks/operators_race.py [--repeats 9] [--batch 256] [--only NAME]
"""

import argparse
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import isotonic_regression as scipy_isotonic
from sklearn.isotonic import isotonic_regression as sklearn_isotonic

import varan.operators as ops
from varan.lab.race import compile_time, race

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jaxopt import isotonic, projection


def section_data(n):
    ones = jnp.ones(n)
    return -ones, ones, ones, jnp.asarray(0.5)


def pairs():
    """Name: ours, theirs, shape of the point."""
    n, side = 1000, 32
    sums = jnp.full(side, 1 / side)
    lower, upper, normal, offset = section_data(n)
    return {
        "simplex": (ops.project_simplex, projection.projection_simplex, (n,)),
        "l1 ball": (ops.project_l1_ball, projection.projection_l1_ball, (n,)),
        "sparse simplex": (
            lambda x: ops.project_sparse_simplex(x, 20),
            lambda x: projection.projection_sparse_simplex(x, 20),
            (n,),
        ),
        "box section": (
            lambda x: ops.project_box_section(x, lower, upper, normal, offset),
            lambda x: projection.projection_box_section(
                x, (lower, upper, normal, offset)
            ),
            (n,),
        ),
        "transport": (
            lambda x: ops.project_transport(x, sums, sums),
            lambda x: projection.projection_transport(x, (sums, sums)),
            (side, side),
        ),
        "Birkhoff": (
            ops.project_birkhoff,
            projection.projection_birkhoff,
            (side, side),
        ),
        "entropic transport": (
            lambda x: ops.project_kl_transport(x, sums, sums),
            lambda x: projection.kl_projection_transport(x, (sums, sums)),
            (side, side),
        ),
        "isotonic": (ops.isotonic_l2, isotonic.isotonic_l2_pav, (n,)),
    }


def with_gradient(operator, weight):
    return jax.vmap(jax.grad(lambda x: jnp.vdot(weight, operator(x))))


def contest(title, contestants, repeats):
    result = race(contestants, repeats=repeats, reference="jaxopt")
    print(f"\n{title}\n{result.table()}")
    ours, theirs = (jnp.asarray(result.answers[k]) for k in ("varan", "jaxopt"))
    print(
        f"largest difference of the answers: {float(jnp.max(abs(ours - theirs))):.1e}"
    )


def run(name, ours, theirs, shape, batch, repeats):
    rng = np.random.default_rng(0)
    points = jnp.asarray(rng.standard_normal((batch, *shape)))
    weight = jnp.asarray(rng.standard_normal(shape))
    both = {"varan": ours, "jaxopt": theirs}
    seconds = {k: compile_time(f, points[0]).total for k, f in both.items()}
    print(
        f"\n{name}: compiled in "
        + ", ".join(f"{k} {s:.2f} s" for k, s in seconds.items())
    )
    one = {k: functools.partial(jax.jit(f), points[0]) for k, f in both.items()}
    many = {k: functools.partial(jax.jit(jax.vmap(f)), points) for k, f in both.items()}
    if name == "isotonic":
        rows = np.asarray(points)
        for peer, fit in (
            ("scipy", lambda row: scipy_isotonic(row).x),
            ("scikit-learn", sklearn_isotonic),
        ):
            one[peer] = functools.partial(fit, rows[0])
            many[peer] = lambda fit=fit: np.stack([fit(row) for row in rows])
    contest(f"{name}, one", one, repeats)
    contest(f"{name}, batch of {batch}", many, repeats)
    slopes = {
        k: functools.partial(jax.jit(with_gradient(f, weight)), points)
        for k, f in both.items()
    }
    contest(f"{name}, batch of {batch} with gradient", slopes, repeats)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--only", choices=list(pairs()))
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore")
    for name, (ours, theirs, shape) in pairs().items():
        if arguments.only in (None, name):
            run(name, ours, theirs, shape, arguments.batch, arguments.repeats)


if __name__ == "__main__":
    main()
