"""The response to the anchor: against dense algebra, and its spectrum near collapse."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from varan.landscape import (
    HeadAndFeatures,
    UnconstrainedFeatures,
    collapse_spectrum,
    global_optimum,
    proximal_features,
    response_operator,
)

K, D, N = 3, 5, 3
LABELS = np.repeat(np.arange(K), N)
KEY = jax.random.key(0)
LAM_W, LAM_H, BETA = 0.08, 0.05, 4.0
ANCHOR = jax.random.normal(KEY, (K * N, D))


@jax.jit
def collapsed_matrices(targets, lam_w, lam_h, beta, axes):
    """Exact and large-beta response at a collapsed anchor, as matrices."""
    plain = UnconstrainedFeatures(targets, lam_w, lam_h)
    x = global_optimum(plain, len(axes), key=KEY)
    held = UnconstrainedFeatures(targets, lam_w, lam_h, x.features, beta)
    return tuple(
        response_operator(held, x, large_beta=large).as_matrix()
        for large in (False, True)
    )


@pytest.fixture(scope="module")
def solution():
    return proximal_features(ANCHOR, LABELS, LAM_W, LAM_H, BETA, tol=1e-12)


def test_is_the_schur_complement_of_the_hessian(solution):
    x, problem = solution.x, solution.problem
    head, features = x.head.ravel(), x.features.ravel()

    def value(head, features):
        return problem.value(
            HeadAndFeatures(head.reshape(K, D), features.reshape(-1, D))
        )

    @jax.jit
    def measure(problem, x):
        (ww, wh), (hw, hh) = jax.hessian(value, argnums=(0, 1))(head, features)
        schur = hh - hw @ jnp.linalg.solve(ww, wh)
        exact = response_operator(problem, x)
        iterative = response_operator(problem, x, linear_solver=lx.CG(1e-12, 1e-14))
        return jnp.linalg.inv(schur), exact.as_matrix(), iterative.mv(ANCHOR)

    inverse, matrix, answer = measure(problem, x)
    np.testing.assert_allclose(matrix, BETA / len(LABELS) * inverse, atol=1e-10)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    expected = (matrix @ ANCHOR.ravel()).reshape(ANCHOR.shape)
    np.testing.assert_allclose(answer, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("classes", "dim", "per_class"), [(3, 5, 3), (4, 7, 1)])
@pytest.mark.parametrize(("lam_w", "lam_h"), [(1.414, 0.4), (0.05, 0.05)])
def test_spectrum_near_collapse(classes, dim, per_class, lam_w, lam_h):
    targets, beta = np.repeat(np.eye(classes), per_class, axis=0), 100.0
    _, matrix = collapsed_matrices(targets, lam_w, lam_h, beta, np.ones(dim))
    size = dim * per_class
    known = collapse_spectrum(classes, dim, per_class, lam_w, lam_h, beta)
    assert sum(known.multiplicities) == size
    expected = np.sort(np.repeat(np.asarray(known.diagonal), known.multiplicities))
    blocks = np.asarray(matrix).reshape(classes, size, classes, size)
    for row in range(classes):
        for column in range(classes):
            values = np.linalg.svd(blocks[row, :, column], compute_uv=False)[::-1]
            if row == column:
                np.testing.assert_allclose(values, expected, atol=1e-12)
            else:
                np.testing.assert_allclose(values[-1], known.off_diagonal, atol=1e-12)
                np.testing.assert_allclose(values[:-1], 0, atol=1e-12)


def test_expansion_error_is_second_order_and_vanishes():
    targets = np.eye(K)[LABELS]
    betas = np.array([100.0, 200.0, 400.0])
    gaps, distances = [], []
    for beta in betas:
        exact, first = collapsed_matrices(targets, LAM_W, LAM_H, beta, np.ones(D))
        gaps.append(np.linalg.norm(exact - first, 2))
        distances.append(np.linalg.norm(exact - np.eye(len(exact)), 2))
    slope = np.polyfit(np.log(betas), np.log(gaps), 1)[0]
    assert abs(slope + 2) < 0.1
    # beta -> infinity: the features are the anchor.
    assert np.all(np.diff(distances) < 0) and distances[-1] < 1 / 50


def test_no_number_where_it_is_no_minimiser():
    held = UnconstrainedFeatures(LABELS, 1e-3, LAM_H, 0.01 * ANCHOR, 0.1)
    saddle = HeadAndFeatures(jnp.zeros((K, D)), jnp.zeros_like(ANCHOR))
    response = response_operator(held, saddle)
    assert jnp.all(jnp.isnan(response.mv(ANCHOR)))


def test_needs_an_anchor(solution):
    plain = UnconstrainedFeatures(LABELS, LAM_W, LAM_H)
    with pytest.raises(ValueError, match="must have an anchor"):
        response_operator(plain, solution.x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 5, 2, 0.1, 0.1, 1.0), "`num_classes` must be at least 2"),
        ((3, 3, 2, 0.1, 0.1, 1.0), "`dim` must exceed"),
        ((3, 5, 0, 0.1, 0.1, 1.0), "`per_class` at least 1"),
        ((3, 5, 2, 2.0, 0.5, 1.0), r"`lam_w \* lam_h` must be below 1"),
        ((3, 5, 2, 0.0, 0.1, 1.0), "`lam_w` must be positive"),
        ((3, 5, 2, 0.1, 0.1, 0.0), "`beta` must be positive"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        collapse_spectrum(*arguments)
