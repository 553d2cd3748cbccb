"""The contract of differentiable functions, for every operator with data of its own."""

import jax.numpy as jnp
import numpy as np

import varan.operators as ops
from varan.testing import Case, contract


def draw(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape))


def sums(seed, count):
    raw = np.random.default_rng(seed).uniform(0.5, 1.5, count)
    return jnp.asarray(2.0 * raw / raw.sum())


def balanced(direction):
    """A change of the row and column sums that keeps their totals equal."""
    x, rows, columns = direction
    return x, rows - jnp.mean(rows), columns - jnp.mean(columns)


def vectors(*data, count=6):
    """Two instances of a point and the same set or function data."""
    fixed = tuple(jnp.asarray(v) for v in data)
    return [(draw(count, seed=seed, scale=2.0), *fixed) for seed in (3, 4)]


WEIGHTS = jnp.linspace(0.5, 2.0, 6)
NORMAL = jnp.array([1.0, -2.0, 0.5, 1.5, -0.5, 1.0])
PLANS = [(draw(3, 4, seed=s), sums(s + 5, 3), sums(s + 9, 4)) for s in (0, 1)]
SQUARE = [(draw(4, 4, seed=s),) for s in (0, 1)]


def section(x, lower, normal, offset):
    return ops.project_box_section(x, lower, 1.0, normal, jnp.sum(offset))


# Each with a point, and what of the set or the function is differentiable.
INSTANCES = {
    "nonnegative_l1": (ops.prox_nonnegative_l1, vectors(0.3, 0.8)),
    "nonnegative_ridge": (ops.prox_nonnegative_ridge, vectors(0.3, 0.8)),
    "group_lasso": (ops.prox_group_lasso, vectors(0.7, 0.8)),
    "nuclear_norm": (
        ops.prox_nuclear_norm,
        [(draw(4, 3, seed=s), jnp.asarray(0.7), jnp.asarray(0.9)) for s in (0, 1)],
    ),
    "tv1d": (ops.prox_tv1d, vectors(WEIGHTS[1:])),
    "hypercube": (ops.project_hypercube, vectors(1.5)),
    "simplex": (ops.project_simplex, vectors(1.5)),
    "sparse_simplex": (
        lambda x, total: ops.project_sparse_simplex(x, 3, total),
        vectors(1.5),
    ),
    "box_section": (section, vectors(-WEIGHTS, NORMAL, [0.4])),
    "l1_ball": (ops.project_l1_ball, vectors(1.5)),
    "l1_sphere": (ops.project_l1_sphere, vectors(1.5)),
    "l2_sphere": (ops.project_l2_sphere, vectors(1.5)),
    "linf_ball": (ops.project_linf_ball, vectors(1.5)),
    "linf_sphere": (ops.project_linf_sphere, vectors(1.5)),
    "second_order_cone": (ops.project_second_order_cone, vectors()),
    "positive_semidefinite": (ops.project_positive_semidefinite, SQUARE),
    "isotonic_l2": (ops.isotonic_l2, vectors(WEIGHTS)),
    "isotonic_kl": (ops.isotonic_kl, vectors(WEIGHTS)),
    "kl_simplex": (ops.project_kl_simplex, vectors(1.5)),
    "birkhoff": (ops.project_birkhoff, SQUARE),
    "kl_birkhoff": (ops.project_kl_birkhoff, SQUARE),
    "transport": (ops.project_transport, PLANS),
    "kl_transport": (ops.project_kl_transport, PLANS),
}


def scalars(instance):
    return [value for value in instance if jnp.ndim(value) == 0]


SCALARS = {"bad_shapes_say_so": "scalar data fit a point of any shape"}
CASES = [
    Case(
        lambda function=function: function,
        instances,
        kind="function",
        name=name,
        xfail=SCALARS if len(scalars(instances[0])) > 0 else {},
        project=balanced if name.endswith("transport") else lambda v: v,
    )
    for name, (function, instances) in INSTANCES.items()
]
test_contract = contract(CASES)
