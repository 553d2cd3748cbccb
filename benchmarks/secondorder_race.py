"""Race: quasi-Newton, conjugate gradients, bounds and fixed points against peers.

Against jaxopt, scipy and optimistix (L-BFGS) on logistic regression (breast cancer, 31
unknowns; digits, 650), Rosenbrock's valley of growing size, non-negative least squares
and logistic regression between bounds, and a contraction in 200 dimensions. Float64,
everybody to one residual: the norm of the gradient, of `x - clip(x - gradient)`, or of
`f(x) - x`. Three kinds: one solve; a batch of 256 by `vmap` (scipy in a loop); one
solve with the gradient of a loss of its answer. Compile time is measured apart.

    python benchmarks/secondorder_race.py [--repeats 7] [--only NAME] [--kind KIND]
"""

import argparse
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import scipy.optimize
from sklearn.datasets import load_breast_cancer, load_digits

from varan import FixedPoint, NewtonCG, Smooth, solve
from varan.lab.race import compile_time, race
from varan.problems import BoxConstrained
from varan.secondorder import (
    LBFGSB,
    Anderson,
    nonlinear_cg,
    scale_by_hager_zhang_linesearch,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import jaxopt

TOL, LIMIT, LANES = 1e-6, 3000, 256
HISTORY = 10


# ----------------------------------------------------------------- objectives


def logistic(w, penalty, X, sign):
    return jnp.mean(jnp.logaddexp(0.0, -sign * (X @ w))) + penalty / 2 * w @ w


def softmax(w, penalty, X, label):
    scores = X @ w.reshape(X.shape[1], -1)
    picked = jnp.take_along_axis(scores, label[:, None], 1)[:, 0]
    loss = jnp.mean(jax.nn.logsumexp(scores, 1) - picked)
    return loss + penalty / 2 * w @ w


def valley(x, scale):
    return jnp.sum(scale * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def half_squares(x, penalty, A, b):
    return jnp.sum((A @ x - b) ** 2) / 2 + penalty / 2 * x @ x


def contraction(x, c, M):
    return jnp.tanh(M @ x) + c


# ------------------------------------------------------------------- instances
# Each: kind, function, start, the parameter that lanes and gradients vary, other data.


def breast_cancer():
    X, y = load_breast_cancer(return_X_y=True)
    X = np.c_[(X - X.mean(0)) / X.std(0), np.ones(len(X))]
    data = jnp.asarray(X), jnp.asarray(2.0 * y - 1)
    return "smooth", logistic, jnp.zeros(X.shape[1]), 1e-3, data


def digits():
    X, y = load_digits(return_X_y=True)
    data = jnp.asarray(np.c_[X / 16, np.ones(len(X))]), jnp.asarray(y)
    return "smooth", softmax, jnp.zeros(650), 1e-3, data


def rosenbrock(size):
    start = jnp.tile(jnp.array([-1.2, 1.0]), size // 2)
    return "smooth", valley, start, 100.0, ()


def bounded_logistic():
    _, function, start, penalty, data = breast_cancer()
    return "box", function, start, penalty, data, (-0.2, 0.2)


def bounded_rosenbrock(size):
    _, function, start, scale, data = rosenbrock(size)
    return "box", function, start, scale, data, (-1.5, 0.8)


def nonnegative(size):
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((2 * size, size)), rng.standard_normal(2 * size)
    data = jnp.asarray(A), jnp.asarray(b)
    return "box", half_squares, jnp.ones(size), 1e-3, data, (0.0, jnp.inf)


def fixed_point():
    rng = np.random.default_rng(0)
    M = rng.standard_normal((200, 200))
    M = 0.95 * M / np.linalg.norm(M, 2)
    return "fixed", contraction, jnp.zeros(200), 0.1, (jnp.asarray(M),)


INSTANCES = {
    "breast cancer": breast_cancer,
    "digits": digits,
    **{f"rosenbrock {n}": partial(rosenbrock, n) for n in (10, 100, 1000)},
    "bounded logistic": bounded_logistic,
    "bounded rosenbrock 100": partial(bounded_rosenbrock, 100),
    **{f"nnls {n}": partial(nonnegative, n) for n in (50, 500)},
    "fixed point": fixed_point,
}


# ----------------------------------------------------------------- contestants


def smooth(function, start, data):
    """Name to a function of the parameter, and scipy's, which cannot be traced."""

    def ours(method, parameter):
        problem = Smooth(function, parameter, *data, convex=function is not valley)
        return solve(problem, method, start, tol=TOL, max_steps=LIMIT).x

    def theirs(method, parameter):
        return method.run(start, parameter, *data).params

    zhang = optax.lbfgs(
        memory_size=HISTORY, linesearch=scale_by_hager_zhang_linesearch()
    )
    settings = {"fun": function, "tol": TOL, "maxiter": LIMIT}
    lbfgs = partial(jaxopt.LBFGS, **settings, history_size=HISTORY)
    return {
        "varan L-BFGS (Hager-Zhang)": partial(ours, zhang),
        "varan L-BFGS (optax zoom)": partial(ours, optax.lbfgs(memory_size=HISTORY)),
        "varan NewtonCG": partial(ours, NewtonCG()),
        "varan nonlinear CG": partial(ours, nonlinear_cg("polak-ribiere")),
        "optimistix L-BFGS": partial(
            ours, optx.LBFGS(rtol=TOL, atol=TOL, history_length=HISTORY)
        ),
        "jaxopt LBFGS": partial(theirs, lbfgs()),
        "jaxopt LBFGS (Hager-Zhang)": partial(theirs, lbfgs(linesearch="hager-zhang")),
        "jaxopt NonlinearCG": partial(theirs, jaxopt.NonlinearCG(**settings)),
    }, scipys(function, start, data, None)


def box(function, start, data, bounds):
    lower, upper = (jnp.full(start.shape, b) for b in bounds)

    def ours(parameter):
        problem = BoxConstrained(function, lower, upper, parameter, *data)
        return solve(
            problem, LBFGSB(history=HISTORY), start, tol=TOL, max_steps=LIMIT
        ).x

    peer = jaxopt.LBFGSB(
        function, tol=TOL, maxiter=LIMIT, history_size=HISTORY, implicit_diff=True
    )

    def theirs(parameter):
        return peer.run(start, (lower, upper), parameter, *data).params

    runs = {"varan LBFGSB": ours, "jaxopt LBFGSB": theirs}
    return runs, scipys(function, start, data, bounds)


def fixed(function, start, data):
    def ours(method, parameter):
        problem = FixedPoint(function, jnp.full(start.shape, parameter), *data)
        return solve(problem, method, start, tol=TOL, max_steps=LIMIT).x

    peer = jaxopt.AndersonAcceleration(function, history_size=5, tol=TOL, maxiter=LIMIT)

    def theirs(parameter):
        return peer.run(start, jnp.full(start.shape, parameter), *data).params

    runs = {"varan Anderson": partial(ours, Anderson()), "jaxopt Anderson": theirs}
    return runs, None


def scipys(function, start, data, bounds):
    """scipy's L-BFGS-B on the compiled value and gradient."""
    compiled = jax.jit(jax.value_and_grad(lambda x, p: function(x, p, *data)))
    limits = None if bounds is None else [tuple(map(float, bounds))] * start.size

    def run(parameter):
        return scipy.optimize.minimize(
            lambda x: tuple(np.asarray(v) for v in compiled(x, parameter)),
            np.asarray(start),
            jac=True,
            method="L-BFGS-B",
            bounds=limits,
            # Its test is of the largest entry; ours of the norm.
            options={
                "gtol": TOL / np.sqrt(start.size),
                "ftol": 0,
                "maxiter": LIMIT,
                "maxfun": 10 * LIMIT,
                "maxcor": HISTORY,
            },
        ).x

    return run


def residual(instance, x, parameter):
    kind, function, start, _, data, *bounds = instance
    if kind == "fixed":
        c = jnp.full(start.shape, parameter)
        return jnp.linalg.norm(function(x, c, *data) - x)
    gradient = jax.grad(function)(x, parameter, *data)
    lower, upper = bounds[0] if bounds else (-jnp.inf, jnp.inf)
    return jnp.linalg.norm(x - jnp.clip(x - gradient, lower, upper))


def contestants(instance, kind):
    shape, function, start, parameter, data, *bounds = instance
    makers = {"smooth": smooth, "box": box, "fixed": fixed}
    runs, scipy_run = makers[shape](function, start, data, *bounds)
    if kind == "gradient":
        weight = jnp.linspace(-1.0, 1.0, start.size)
        compiled = {
            name: jax.jit(jax.value_and_grad(lambda p, f=f: weight @ f(p)))
            for name, f in runs.items()
        }
        return compiled, parameter
    if kind == "batch":
        lanes = parameter * jnp.linspace(0.5, 2.0, LANES)
        compiled = {name: jax.jit(jax.vmap(f)) for name, f in runs.items()}
        if scipy_run is not None:
            compiled["scipy L-BFGS-B (loop)"] = lambda lanes: np.stack(
                [scipy_run(p) for p in lanes]
            )
        return compiled, lanes
    compiled = {name: jax.jit(f) for name, f in runs.items()}
    if scipy_run is not None:
        compiled["scipy L-BFGS-B"] = scipy_run
    return compiled, jnp.asarray(parameter)


def reached(instance, kind, answer, argument):
    """The worst residual of an answer, or the gradient that came out."""
    if kind == "gradient":
        return f"gradient {float(answer[1]):.6g}"
    if kind == "single":
        return f"residual {float(residual(instance, answer, argument)):.1e}"
    lanes = jax.vmap(partial(residual, instance))(jnp.asarray(answer), argument)
    return f"worst residual {float(jnp.max(lanes)):.1e}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=list(INSTANCES))
    parser.add_argument("--kind", nargs="*", default=["single", "batch", "gradient"])
    parser.add_argument("--methods", nargs="*", help="parts of contestants' names")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    for name in arguments.only:
        for kind in arguments.kind:
            instance = INSTANCES[name]()
            runs, argument = contestants(instance, kind)
            if arguments.methods:
                runs = {
                    n: f
                    for n, f in runs.items()
                    if any(m in n for m in arguments.methods)
                }
            peers = [n for n in runs if "jaxopt" in n]
            result = race(
                {n: partial(f, argument) for n, f in runs.items()},
                repeats=arguments.repeats,
                reference=(peers or list(runs))[0],
            )
            print(f"\n{name}, {kind}\n{result.table()}")
            for who, answer in result.answers.items():
                print(f"  {who}: {reached(instance, kind, answer, argument)}")
            if kind == "single":
                for who, run in runs.items():
                    if "scipy" not in who:
                        seconds = compile_time(run, argument).total
                        print(f"  {who}: compiled in {seconds:.2f} s")


if __name__ == "__main__":
    main()
