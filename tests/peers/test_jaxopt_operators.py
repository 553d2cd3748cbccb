"""Every proximal operator and projection of jaxopt, beside ours on one instance."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varan.operators as ops

pytest.importorskip("jaxopt")
from jaxopt import isotonic, projection, prox

RNG = np.random.default_rng(7)
X = jnp.asarray(1.5 * RNG.standard_normal(6))
SQUARE = jnp.asarray(RNG.standard_normal((4, 4)))
NORMAL = jnp.asarray(RNG.uniform(0.5, 2.0, 6))
ROWS, RIGHT = jnp.asarray(RNG.standard_normal((2, 6))), jnp.array([0.3, -0.4])
SUMS = jnp.array([0.1, 0.2, 0.3, 0.4]), jnp.array([0.3, 0.3, 0.2, 0.2])
LOW, HIGH = jnp.full(6, -0.5), jnp.full(6, 0.5)
SLACK = jnp.full(12, 0.8)
BOTH = jnp.concatenate([jnp.eye(6), -jnp.eye(6)])


def tight(function):
    from jaxopt import LBFGS

    return LBFGS(function, tol=1e-10, maxiter=2000)


# Name: ours, theirs, point, tolerance of the answers. Theirs are exact, or stop at a
# tolerance of about 1e-5 (bisection) or 1e-3 (OSQP).
PAIRS = {
    "none": (ops.prox_none, prox.prox_none, X, 0),
    "lasso": (
        lambda x: ops.prox_l1(x, 0.4, 0.5),
        lambda x: prox.prox_lasso(x, 0.4, 0.5),
        X,
        1e-12,
    ),
    "non-negative lasso": (
        lambda x: ops.prox_nonnegative_l1(x, 0.4, 0.5),
        lambda x: prox.prox_non_negative_lasso(x, 0.4, 0.5),
        X,
        1e-12,
    ),
    # Their second weight is relative to the first.
    "elastic net": (
        lambda x: ops.prox_elastic_net(x, 0.4, 0.4 * 0.7, 0.5),
        lambda x: prox.prox_elastic_net(x, (0.4, 0.7), 0.5),
        X,
        1e-12,
    ),
    "group lasso": (
        lambda x: ops.prox_group_lasso(x, 0.4, 0.5),
        lambda x: prox.prox_group_lasso(x, 0.4, 0.5),
        X,
        1e-12,
    ),
    "ridge": (
        lambda x: ops.prox_ridge(x, 0.4, 0.5),
        lambda x: prox.prox_ridge(x, 0.4, 0.5),
        X,
        1e-12,
    ),
    "non-negative ridge": (
        lambda x: ops.prox_nonnegative_ridge(x, 0.4, 0.5),
        lambda x: prox.prox_non_negative_ridge(x, 0.4, 0.5),
        X,
        1e-12,
    ),
    "projection as prox": (
        lambda x: ops.prox_from_projection(ops.project_simplex)(x, 0.5),
        lambda x: prox.make_prox_from_projection(projection.projection_simplex)(x, 1.0),
        X,
        1e-12,
    ),
    "non-negative": (ops.project_nonnegative, projection.projection_non_negative, X, 0),
    "box": (
        lambda x: ops.project_box(x, -0.5, 0.5),
        lambda x: projection.projection_box(x, (LOW, HIGH)),
        X,
        0,
    ),
    "hypercube": (
        ops.project_hypercube,
        lambda x: jnp.clip(x, 0.0, 1.0),
        X,
        0,
    ),
    "simplex": (
        lambda x: ops.project_simplex(x, 1.5),
        lambda x: projection.projection_simplex(x, 1.5),
        X,
        1e-12,
    ),
    "sparse simplex": (
        lambda x: ops.project_sparse_simplex(x, 2),
        lambda x: projection.projection_sparse_simplex(x, 2),
        X,
        1e-12,
    ),
    "l1 sphere": (ops.project_l1_sphere, projection.projection_l1_sphere, X, 1e-12),
    "l1 ball": (ops.project_l1_ball, projection.projection_l1_ball, X, 1e-12),
    "l2 sphere": (ops.project_l2_sphere, projection.projection_l2_sphere, X, 1e-12),
    "l2 ball": (ops.project_l2_ball, projection.projection_l2_ball, X, 1e-12),
    "hyperplane": (
        lambda x: ops.project_hyperplane(x, NORMAL, 0.4),
        lambda x: projection.projection_hyperplane(x, (NORMAL, 0.4)),
        X,
        1e-12,
    ),
    "half-space": (
        lambda x: ops.project_halfspace(x, NORMAL, -0.4),
        lambda x: projection.projection_halfspace(x, (NORMAL, -0.4)),
        X,
        1e-12,
    ),
    "affine set": (
        lambda x: ops.project_affine(x, ROWS, RIGHT),
        lambda x: projection.projection_affine_set(x, (ROWS, RIGHT)),
        X,
        1e-4,
    ),
    "polyhedron": (
        lambda x: ops.project_polyhedron(x, ROWS, RIGHT, BOTH, SLACK, tol=1e-9).x,
        lambda x: projection.projection_polyhedron(
            x, (ROWS, RIGHT, BOTH, SLACK), check_feasible=False
        ),
        X,
        1e-2,
    ),
    "box section": (
        lambda x: ops.project_box_section(x, LOW, HIGH, NORMAL, 0.4),
        lambda x: projection.projection_box_section(
            x, (LOW, HIGH, NORMAL, jnp.asarray(0.4))
        ),
        X,
        1e-4,
    ),
    "transport": (
        lambda x: ops.project_transport(x, *SUMS),
        lambda x: projection.projection_transport(x, SUMS, make_solver=tight),
        SQUARE,
        1e-6,
    ),
    "Birkhoff": (
        ops.project_birkhoff,
        lambda x: projection.projection_birkhoff(x, make_solver=tight),
        SQUARE,
        1e-6,
    ),
    "entropic transport": (
        lambda x: ops.project_kl_transport(x, *SUMS),
        lambda x: projection.kl_projection_transport(x, SUMS, make_solver=tight),
        SQUARE,
        1e-6,
    ),
    "entropic Birkhoff": (
        ops.project_kl_birkhoff,
        lambda x: projection.kl_projection_birkhoff(x, make_solver=tight),
        SQUARE,
        1e-6,
    ),
}


# jaxopt stops the gradient of the columns' projections, and returns zero here. Ours is
# held to finite differences by the operators' contract.
NO_SLOPES = ("transport", "Birkhoff")


@pytest.mark.parametrize("name", PAIRS)
def test_answers_and_derivatives_agree(name):
    ours, theirs, point, tol = PAIRS[name]
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(point.shape))

    def run(operator):
        def value(x):
            answer = operator(x)
            return jnp.vdot(weight, answer), answer

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (_, answer), slope = jax.value_and_grad(value, has_aux=True)(point)
        return answer, slope

    (answer, slope), (wanted, wanted_slope) = run(ours), run(theirs)
    np.testing.assert_allclose(answer, wanted, atol=tol + 1e-15)
    if name not in NO_SLOPES:
        np.testing.assert_allclose(slope, wanted_slope, atol=10 * tol + 1e-12)


def test_isotonic_regression_agrees():
    # Called without its compiled helper it warns that it is slow.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for increasing in (True, False):
            wanted = isotonic.isotonic_l2_pav(X, increasing=increasing)
            got = ops.isotonic_l2(X, increasing=increasing)
            np.testing.assert_allclose(got, wanted, atol=1e-12)
