"""Quadratic programs: the condition, its derivative, the certificate, bad input."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from varan import stability
from varan.constrained import quadratic_program
from varan.core.optimality import KKTPoint
from varan.problems import Quadratic

EYE, ZERO = jnp.eye(2), jnp.zeros(2)


def test_start_is_moved_into_the_box():
    problem = Quadratic(EYE, ZERO, G=EYE, h=ZERO, lower=1.0)
    start = problem.start()
    np.testing.assert_array_equal(start.x, [1.0, 1.0])
    assert start.equality is None and start.inequality.shape == (2,)
    np.testing.assert_array_equal(problem.start(jnp.array([3.0, 0.0])).x, [3.0, 1.0])
    with pytest.raises(
        ValueError, match=r"Quadratic.start: `x` must have shape \(2,\)"
    ):
        problem.start(jnp.ones(3))


def test_condition_by_hand():
    problem = Quadratic(
        jnp.diag(jnp.array([2.0, 4.0])),
        jnp.array([-2.0, -4.0]),
        A=jnp.array([[1.0, 1.0]]),
        b=jnp.array([1.0]),
        G=jnp.array([[1.0, 0.0]]),
        h=jnp.array([0.5]),
        upper=jnp.array([jnp.inf, 0.6]),
    )
    point = KKTPoint(jnp.array([0.4, 0.6]), jnp.array([1.0]), jnp.array([0.3]))
    x, equality, inequality = problem.condition(point)
    # The second gradient, -0.6, is what the upper bound holds.
    np.testing.assert_allclose(x, [2 * 0.4 - 2 + 1 + 0.3, 0.0], atol=1e-15)
    np.testing.assert_allclose(equality, [0.0], atol=1e-15)
    np.testing.assert_allclose(inequality, [0.1], atol=1e-15)


def test_operators_and_arrays_have_one_condition():
    data = (EYE, jnp.ones(2), jnp.ones((1, 2)), jnp.ones(1))
    dense = Quadratic(data[0], data[1], A=data[2], b=data[3])
    free = Quadratic(
        lx.MatrixLinearOperator(data[0]),
        data[1],
        A=lx.MatrixLinearOperator(data[2]),
        b=data[3],
    )
    assert free.matrix_free and not dense.matrix_free
    point = KKTPoint(jnp.array([1.0, 3.0]), jnp.array([2.0]))
    for one, two in zip(
        jax.tree.leaves(dense.condition(point)),
        jax.tree.leaves(free.condition(point)),
        strict=True,
    ):
        np.testing.assert_allclose(one, two)


def test_gap_with_a_promised_curvature_needs_no_bounds():
    problem = Quadratic(2 * EYE, jnp.array([-2.0, 0.0]), curvature=2.0)
    certificate = problem.certify(*at(problem, jnp.array([1.5, 0.5])), 1e-8)
    assert certificate.kind == "duality gap"
    np.testing.assert_allclose(certificate.value, 0.5)  # exactly the true gap


def test_gap_without_bounds_or_curvature_is_not_claimed():
    one_sided = Quadratic(EYE, -jnp.ones(2), lower=0.0, upper=jnp.inf)
    certificate = one_sided.certify(*at(one_sided, jnp.array([1.0, 0.9])), 1e-8)
    assert not bool(certificate.met) and np.isinf(certificate.value)
    free = Quadratic(EYE, -jnp.ones(2))
    certificate = free.certify(*at(free, jnp.ones(2)), 1e-8)
    assert certificate.kind == "residual" and "curvature" in certificate.statement


def test_an_infeasible_point_never_meets_the_certificate():
    problem = Quadratic(EYE, ZERO, A=jnp.ones((1, 2)), b=jnp.ones(1), lower=-1, upper=1)
    # Below the least feasible value: the gap alone would be negative.
    certificate = problem.certify(*at(problem, ZERO, jnp.zeros(1)), 1e-8)
    assert float(certificate.value) == 1.0


def at(problem, x, equality=None, inequality=None):
    point = KKTPoint(x, equality, inequality)
    return point, problem.condition(point)


# ------------------------------------------------------------------ derivatives


def answer(c, **data):
    return quadratic_program(EYE, c, **data, tol=1e-10).x.x


def test_weakly_active_rows_have_no_derivative():
    def on_row(c):
        return answer(c, G=jnp.array([[1.0, 0.0]]), h=jnp.ones(1))[0]

    assert jnp.isnan(jax.grad(on_row)(jnp.array([-1.0, 0.0]))).any()
    np.testing.assert_allclose(jax.grad(on_row)(jnp.array([-1.1, 0.0])), 0, atol=1e-9)
    inside = jax.grad(on_row)(jnp.array([-0.9, 0.0]))
    np.testing.assert_allclose(inside, [-1.0, 0.0], atol=1e-9)


def test_weakly_active_bounds_have_no_derivative_but_the_rest_has():
    def nearest(c, unique):
        return answer(c, upper=1.0, unique=unique)

    c = jnp.array([-1.0, -0.5])
    _, tangent = jax.jvp(lambda c: nearest(c, True), (c,), (jnp.ones(2),))
    assert jnp.isnan(tangent).any()
    rest = jax.grad(lambda c: nearest(c, False)[1])(c)
    np.testing.assert_allclose(rest, [0.0, -1.0], atol=1e-9)
    assert jnp.isnan(jax.grad(lambda c: nearest(c, False)[0])(c)).any()


def test_dependent_rows_need_to_be_announced():
    A, b = jnp.array([[1.0, 1.0], [2.0, 2.0]]), jnp.array([1.0, 2.0])

    def first(c, unique):
        return answer(c, A=A, b=b, unique=unique)[0]

    c = jnp.array([0.3, -0.2])
    assert jnp.isnan(jax.grad(first)(c, True)).any()
    np.testing.assert_allclose(jax.grad(first)(c, False), [-0.5, 0.5], atol=1e-9)

    # The multipliers are a line: what depends on the choice has no derivative.
    def free(c):
        return quadratic_program(EYE, c, A=A, b=b, unique=False).x.equality[0]

    assert jnp.isnan(jax.grad(free)(c)).any()


def test_active_rows_that_meet_in_one_point():
    # Three rows through one vertex of the plane: x is unique, multipliers are not.
    G, h = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), jnp.array([1.0, 1.0, 2.0])

    def vertex(c):
        return answer(c, G=G, h=h, unique=False)

    c = jnp.array([-3.0, -3.0])
    np.testing.assert_allclose(vertex(c), [1.0, 1.0], atol=1e-9)
    np.testing.assert_allclose(jax.jacrev(vertex)(c), 0.0, atol=1e-7)


def test_fixed_coordinates_follow_their_bounds():
    def free(bound):
        lower, upper = jnp.array([-5.0, bound]), jnp.array([5.0, bound])
        Q = jnp.array([[1.0, 0.5], [0.5, 1.0]])
        return quadratic_program(Q, ZERO, lower=lower, upper=upper).x.x[0]

    np.testing.assert_allclose(jax.grad(free)(2.0), -0.5, atol=1e-9)


def test_a_line_of_solutions_has_no_derivative():
    def somewhere(c):
        return quadratic_program(jnp.diag(jnp.array([1.0, 0.0])), c).x.x

    jacobian = jax.jacrev(somewhere)(ZERO)
    assert jnp.isnan(jacobian).any()


def test_stability_of_the_solution():
    solution = quadratic_program(EYE, -jnp.ones(2), A=jnp.ones((1, 2)), b=jnp.ones(1))
    report = stability(solution, wrt=lambda p: p.c)
    # The projection on the line's direction has norm one, the multiplier 1 / sqrt(2).
    np.testing.assert_allclose(report.lipschitz, 1.0, rtol=1e-6)


# -------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (dict(Q=EYE, c=jnp.ones((2, 1))), ValueError, r"`c` must have shape \(n,\)"),
        (dict(Q=jnp.eye(3), c=ZERO), ValueError, r"`Q` must have shape \(2, 2\)"),
        (dict(Q=EYE, c=jnp.array([0, 1])), TypeError, "`c` must be floating"),
        (dict(Q=EYE, c=jnp.array([0, jnp.nan])), ValueError, "`c` must be finite"),
        (dict(Q=jnp.array([[1.0, 1.0], [0, 1]]), c=ZERO), ValueError, "symmetric"),
        (dict(Q=-EYE, c=ZERO), ValueError, "semidefinite"),
        (dict(Q=jnp.eye(2, dtype=jnp.float32), c=ZERO), TypeError, "dtype of `c`"),
        (dict(Q=EYE, c=ZERO, A=EYE), ValueError, "`A` and `b` must come together"),
        (dict(Q=EYE, c=ZERO, h=ZERO), ValueError, "`G` and `h` must come together"),
        (dict(Q=EYE, c=ZERO, A=EYE, b=jnp.ones(3)), ValueError, "`b` must have shape"),
        (dict(Q=EYE, c=ZERO, A=jnp.eye(3), b=ZERO), ValueError, "`A` must have shape"),
        (
            dict(Q=EYE, c=ZERO, G=jnp.ones((0, 2)), h=jnp.ones(0)),
            ValueError,
            "`G` must not be empty",
        ),
        (dict(Q=EYE, c=ZERO, lower=jnp.ones(3)), ValueError, "`lower` must have shape"),
        (dict(Q=EYE, c=ZERO, lower=jnp.nan), ValueError, "`lower` must not hold NaN"),
        (dict(Q=EYE, c=ZERO, upper=-jnp.inf), ValueError, "`upper` must not hold"),
        (dict(Q=EYE, c=ZERO, lower=1.0, upper=0.0), ValueError, "must not exceed"),
        (
            dict(Q=EYE, c=ZERO, curvature=0.0),
            ValueError,
            "`curvature` must be positive",
        ),
    ],
)
def test_bad_data_is_refused(data, error, message):
    with pytest.raises(error, match=f"Quadratic: .*{message}"):
        Quadratic(**data)


def test_a_wrong_unknown_is_refused():
    problem = Quadratic(EYE, ZERO, A=EYE, b=ZERO)
    with pytest.raises(ValueError, match="the unknown must be a KKTPoint of shapes"):
        problem.condition(KKTPoint(ZERO))


def test_gradients_with_respect_to_q_are_symmetric():
    def first(Q):
        return quadratic_program(Q, -jnp.array([1.0, 2.0])).x.x[0]

    gradient = jax.grad(first)(jnp.array([[2.0, 0.5], [0.5, 1.0]]))
    np.testing.assert_allclose(gradient, gradient.T)
    assert eqx.filter_jit(jax.grad(first))(EYE).shape == (2, 2)


@pytest.mark.parametrize("bound", ["upper", "h"])
def test_the_derivative_at_a_tie_is_nan_and_right_beside_it(bound):
    """At `x <= 1` the minimum of `(x - 1)^2 / 2` has one slope on either side."""

    def answer(limit):
        if bound == "upper":
            constraint = {"upper": limit}
        else:
            constraint = {"G": jnp.ones((1, 1)), "h": limit[None]}
        return quadratic_program(jnp.eye(1), -jnp.ones(1), **constraint).x.x[0]

    slopes = [float(jax.grad(answer)(jnp.asarray(v))) for v in (0.5, 1.0, 2.0)]
    np.testing.assert_allclose(slopes, [1.0, np.nan, 0.0], atol=1e-9)
