"""Implicit differentiation against unrolling: accuracy, time, and other conditions.

The claim: from the optimality condition alone, the derivative of any solver's answer
follows; its error is linear in the error of the answer with the constant of theorem 1,
smaller than that of differentiating through the iterations, and it costs less.

Three parts. (a) Ridge regression on diabetes: error of both Jacobians and the bound at
every gradient step, at theta = 0 in the penalty exp(theta) |w|^2 / 2 on the mean loss.
(b) The dual of a multiclass support vector machine on digits: time and value of the
derivative of the validation loss in log(penalty), for three solvers, at equal
iterations. (c) A box-constrained quadratic program and a
lasso: derivatives by `kkt` and by the proximal-gradient condition against central
differences.

It keeps the paper's problems, solvers and fixed points, and gives up its sizes (see
the row's differences). Unrolling differentiates the very same iterations; it gets
reverse mode, as in the paper, and forward mode, which is its best for one parameter.
Settings are defaults, not tuned: steps 1/L for every gradient solver, and the kernel
and penalty of scikit-learn's support vector classifier.

The claim would be refuted by an error above the bound, by unrolling being as accurate
or as fast, or by conditions of one problem giving different derivatives.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np

from varan.claims import Curve, Measurements
from varan.core import custom_root, optimality, root_jvp
from varan.operators import project_box, project_simplex, prox_l1


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """One seed: a draw of the data, all three parts."""
    ridge, curves = _ridge(scale["ridge_steps"], seed)
    conditions = _conditions(scale["box_size"], seed)
    return Measurements(ridge | _svm(scale, seed) | conditions, curves)


def _diabetes(seed):
    from sklearn.datasets import load_diabetes

    X, y = load_diabetes(return_X_y=True)
    rows = np.random.default_rng(seed).permutation(len(y))[: int(0.8 * len(y))]
    X, y = X[rows], y[rows]
    X, y = (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()
    return jnp.asarray(X), jnp.asarray(y)


# (a) ridge regression: accuracy


def _ridge_loss(w, theta, X, y):
    return jnp.mean((X @ w - y) ** 2) / 2 + jnp.exp(theta) * w @ w / 2


@functools.partial(jax.jit, static_argnames="steps")
def _ridge_errors(X, y, steps):
    """Distances, and errors of the implicit and the unrolled Jacobian, by step."""
    gradient = optimality.stationary(_ridge_loss)
    theta, zero = jnp.zeros(()), jnp.zeros(X.shape[1])
    hessian = jax.jacfwd(gradient)(zero, theta, X, y)
    eigenvalues = jnp.linalg.eigvalsh(hessian)

    def descend(theta):
        def step(w, _):
            w = w - gradient(w, theta, X, y) / eigenvalues[-1]
            return w, w

        return jax.lax.scan(step, zero, None, length=steps)[1]

    def implicit(w):
        return root_jvp(lambda w, t: gradient(w, t, X, y), w, (theta,), (1.0,))

    exact = jnp.linalg.solve(hessian, -gradient(zero, theta, X, y))
    exact_tangent = jnp.linalg.solve(hessian, -exact)
    iterates, unrolled = jax.jvp(descend, (theta,), (jnp.ones(()),))
    tangents = jax.vmap(implicit)(iterates)
    distance = jnp.linalg.norm(iterates - exact[None], axis=1)
    return (
        distance,
        jnp.linalg.norm(tangents - exact_tangent[None], axis=1),
        jnp.linalg.norm(unrolled - exact_tangent[None], axis=1),
        # beta = exp(theta): the parameter enters as exp(theta) w.
        optimality.jacobian_error(distance, alpha=eigenvalues[0], beta=1.0).value,
    )


def _ridge(steps, seed):
    errors = _ridge_errors(*_diabetes(seed), steps)
    distance, implicit, unrolled, bound = map(np.asarray, errors)
    slope = np.polyfit(np.log(distance), np.log(implicit), 1)[0]
    numbers = {
        "ridge_error_over_bound": np.max(implicit / bound),
        "ridge_error_slope": slope,
        "ridge_error_over_unrolled_step_20": implicit[19] / unrolled[19],
        "ridge_error_implicit_step_20": implicit[19],
        "ridge_error_unrolled_step_20": unrolled[19],
        "ridge_bound_step_20": bound[19],
    }
    series = {"implicit": implicit, "unrolled": unrolled, "bound (theorem 1)": bound}
    curves = [
        Curve(
            distance.tolist(),
            error.tolist(),
            label,
            plot="ridge: Jacobian error against iterate error",
            x_label="distance of the iterate to the solution",
            y_label="error of the Jacobian",
            log_x=True,
            log_y=True,
        )
        for label, error in series.items()
    ]
    return numbers, curves


# (b) multiclass support vector machine: time


def _scores(x, lam, K, Y):
    """Scores of the points that the rows of `K` belong to."""
    return K @ (Y - x) / jnp.exp(lam)


def _dual(x, lam, K, Y):
    """The dual objective; `x` holds a point of the simplex for each sample."""
    return jnp.vdot(Y - x, _scores(x, lam, K, Y)) / 2 + jnp.vdot(x, Y)


def _project(x, *params):
    return jax.vmap(project_simplex)(x)


def _log(x):
    # Floored: entries decay to zero, where the logarithm has no derivative.
    return jnp.log(jnp.maximum(x, 1e-300))


def _entropic(dual, *params):
    return jax.nn.softmax(dual, axis=1)


def _repeat(step, x, steps):
    return jax.lax.scan(lambda x, _: (step(x), None), x, None, length=steps)[0]


def _sweep(x, lam, K, Y):
    """One pass of exact minimisation over the samples' blocks."""

    def update(carry, row):
        x, scores = carry
        curvature = K[row, row] / jnp.exp(lam)
        new = project_simplex(x[row] - (Y[row] - scores[row]) / curvature)
        scores = scores - jnp.outer(K[row], new - x[row]) / jnp.exp(lam)
        return (x.at[row].set(new), scores), None

    start = (x, _scores(x, lam, K, Y))
    return jax.lax.scan(update, start, jnp.arange(len(K)))[0][0]


def _solver(name, stepsize, steps):
    """The condition, the same for all solvers, and the solver `(start, *params)`."""
    condition = optimality.proj_grad(_dual, _project, stepsize)
    step = {
        "projected_gradient": condition.map,
        # A checkpoint a sweep: the tape of all block updates would take gigabytes.
        "block_coordinate": jax.checkpoint(_sweep),
        "mirror_descent": optimality.mirror(_dual, _entropic, _log, stepsize).map,
    }[name]
    return condition, lambda x, *params: _repeat(lambda x: step(x, *params), x, steps)


@functools.lru_cache
def _hypergradient(name, mode, steps, shapes):
    """Compiled once for all seeds: the validation loss's derivative in log(penalty)."""

    def loss(lam, start, stepsize, K, Y, K_val, Y_val):
        condition, solver = _solver(name, stepsize, steps)
        if mode == "implicit":
            # Right for unsymmetric systems, with short recurrences: GMRES would have to
            # store or restart over thousands of unknowns.
            krylov = lx.BiCGStab(rtol=1e-8, atol=1e-12, max_steps=2500)
            solver = custom_root(condition, linear_solver=krylov)(solver)
        x = solver(start, lam, K, Y)
        return jnp.sum((K_val @ (Y - x) / jnp.exp(lam) - Y_val) ** 2) / 2

    derivative = (jax.jacfwd if mode == "unrolled_forward" else jax.grad)(loss)
    return jax.jit(derivative).lower(*shapes).compile()


def _digits(scale, seed):
    """Kernel matrices of the training and validation images, and their labels."""
    from sklearn.datasets import load_digits
    from sklearn.metrics.pairwise import rbf_kernel
    from sklearn.preprocessing import StandardScaler

    X, y = load_digits(return_X_y=True)
    train, validation = scale["svm_train"], scale["svm_validation"]
    rows = np.random.default_rng(seed).permutation(len(y))[: train + validation]
    X, Y = StandardScaler().fit_transform(X)[rows], np.eye(10)[y[rows]]
    # The defaults of scikit-learn's support vector classifier: gamma="scale", C = 1.
    kernel = rbf_kernel(X, X[:train], gamma=1 / (X.shape[1] * X.var()))
    parts = kernel[:train], Y[:train], kernel[train:], Y[train:]
    return tuple(map(jnp.asarray, parts))


def _svm(scale, seed):
    K, Y, K_val, Y_val = _digits(scale, seed)
    stepsize = 1 / jnp.linalg.norm(K, 2)
    start = jnp.full(Y.shape, 0.1)
    arguments = (jnp.zeros(()), start, stepsize, K, Y, K_val, Y_val)
    shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments)
    numbers: dict[str, float] = {}
    for name in scale["solvers"]:
        steps = scale["sweeps" if name == "block_coordinate" else "gradient_steps"]
        modes = {m: _hypergradient(name, m, steps, shapes) for m in scale["modes"]}
        seconds, values = _race(modes, arguments, scale["rounds"])
        for mode in modes:
            numbers[f"svm_seconds_{mode}_{name}"] = seconds[mode]
            numbers[f"svm_hypergradient_{mode}_{name}"] = values[mode]
            if mode != "implicit":
                ratio = seconds["implicit"] / seconds[mode]
                numbers[f"svm_time_over_{mode}_{name}"] = ratio
        gap = abs(values["implicit"] / values["unrolled"] - 1)
        numbers[f"svm_gap_to_unrolled_{name}"] = gap
    return numbers


def _race(functions, arguments, rounds):
    """Seconds a call, interleaved so that a drifting machine harms all alike."""
    values, seconds = {}, dict.fromkeys(functions, 0.0)
    for _ in range(rounds):
        for name, function in functions.items():
            begin = time.perf_counter()
            values[name] = float(function(*arguments))
            seconds[name] += (time.perf_counter() - begin) / rounds
    return seconds, values


# (c) one derivative, several conditions


def _box(x, q, upper, Q):
    return x @ Q @ x / 2 + q @ x


def _box_sides(x, q, upper, Q):
    return {"lower": -x, "upper": x - upper}


def _squares(w, y, lam, X):
    return jnp.mean((X @ w - y) ** 2) / 2


def _split_lasso(parts, y, lam, X):
    """The lasso with w = positive - negative, both at least zero."""
    penalty = lam * (jnp.sum(parts["positive"]) + jnp.sum(parts["negative"]))
    return _squares(parts["positive"] - parts["negative"], y, lam, X) + penalty


def _split_signs(parts, y, lam, X):
    return jax.tree.map(jnp.negative, parts)


@jax.jit
def _box_derivatives(Q, q, upper, direction):
    stepsize = 1 / jnp.linalg.norm(Q, 2)
    condition = optimality.proj_grad(
        _box, lambda v, q, upper, Q: project_box(v, 0.0, upper), stepsize
    )

    params = (q, upper, Q)
    x, difference = _solutions(condition, 0 * upper, params, direction, steps=5000)
    slope = jax.grad(_box)(x, *params)
    multipliers = {"lower": jax.nn.relu(slope), "upper": jax.nn.relu(-slope)}
    point = optimality.KKTPoint(x, inequality=multipliers)
    by_kkt = root_jvp(
        optimality.kkt(_box, inequality=_box_sides), point, params, direction
    ).x
    by_map = root_jvp(condition, x, params, direction)
    return by_kkt, by_map, difference


@jax.jit
def _lasso_derivatives(X, y, lam, direction):
    stepsize = X.shape[0] / jnp.linalg.norm(X, 2) ** 2
    condition = optimality.prox_grad(
        _squares, lambda v, stepsize, y, lam, X: prox_l1(v, lam, stepsize), stepsize
    )

    params, zero = (y, lam, X), jnp.zeros(X.shape[1])
    w, difference = _solutions(condition, zero, params, direction, steps=20000)
    parts = {"positive": jax.nn.relu(w), "negative": jax.nn.relu(-w)}
    multipliers = jax.tree.map(jax.nn.relu, jax.grad(_split_lasso)(parts, *params))
    point = optimality.KKTPoint(parts, inequality=multipliers)
    by_kkt = root_jvp(
        optimality.kkt(_split_lasso, inequality=_split_signs), point, params, direction
    ).x
    by_map = root_jvp(condition, w, params, direction)
    by_kkt = by_kkt["positive"] - by_kkt["negative"]
    return by_kkt, by_map, difference


def _solutions(condition, start, params, direction, steps, step=1e-6):
    """The solution, and its central difference along `direction`."""

    def solve(sign):
        moved = jax.tree.map(lambda p, d: p + sign * step * d, params, direction)
        return _repeat(lambda x: condition.map(x, *moved), start, steps)

    middle, above, below = jax.vmap(solve)(jnp.array([0.0, 1.0, -1.0]))
    return middle, (above - below) / (2 * step)


def _conditions(size, seed):
    random = np.random.default_rng(seed)
    factor = random.standard_normal((size, size)) / np.sqrt(size)
    Q = jnp.asarray(factor @ factor.T + 0.1 * np.eye(size))
    q, to_q, to_upper = jnp.asarray(random.standard_normal((3, size)))
    box = _box_derivatives(Q, q, jnp.ones(size), (to_q, to_upper, jnp.zeros_like(Q)))
    X, y = _diabetes(seed)
    to_y = jnp.asarray(random.standard_normal(y.shape))
    lasso = _lasso_derivatives(
        X, y, jnp.asarray(0.1), (to_y, jnp.ones(()), jnp.zeros_like(X))
    )
    numbers = {}
    for name, (by_kkt, by_map, difference) in (("box", box), ("lasso", lasso)):
        numbers |= {
            f"{name}_gap_kkt": _gap(by_kkt, difference),
            f"{name}_gap_prox_grad": _gap(by_map, difference),
            f"{name}_gap_between_conditions": _gap(by_kkt, by_map),
        }
    gaps = [v for k, v in numbers.items() if not k.endswith("conditions")]
    between = [v for k, v in numbers.items() if k.endswith("conditions")]
    return numbers | {
        "worst_gap_to_finite_differences": max(gaps),
        "worst_gap_between_conditions": max(between),
    }


def _gap(derivative, reference):
    return float(jnp.linalg.norm(derivative - reference) / jnp.linalg.norm(reference))
