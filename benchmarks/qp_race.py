"""Race: quadratic programs, varan's solvers against jaxopt, SciPy, cvxpy, scikit-learn.

Float64, every contestant to an error of the optimality condition of 1e-6 or better
(printed below each table, measured alike for all). Programs:

- `equality`: random, n unknowns, n / 2 equalities;
- `general`: random, n unknowns, n / 4 equalities, n inequalities;
- `box`: random, n unknowns in a box;
- `nnls`: non-negative least squares, the diabetes data with squares and products;
- `svm`: the dual of a support vector machine with a Gaussian kernel, breast cancer.

`--mode single` solves one; `batch` solves 256 with other right-hand sides in one call;
`gradient` solves one and differentiates a weighted sum of its solution in c. JAX's
contestants are jitted; SciPy's and scikit-learn's are plain calls; cvxpy's problems are
compiled once, with parameters (DPP), and only solved in the race.

    python benchmarks/qp_race.py [--mode single] [--repeats 7] [--only general]
"""

import argparse
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.preprocessing import StandardScaler, scale
from sklearn.svm import SVC

from varan import solve
from varan.constrained import OSQP, BoxCoordinateDescent, quadratic_program
from varan.lab.race import compile_time, race
from varan.problems import Quadratic

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import jaxopt
try:
    import cvxpy
except ImportError:
    cvxpy = None

BATCH, TOL, SPREAD = 256, 1e-6, 0.1


def random_program(n, p, q, box, seed=0):
    rng = np.random.default_rng(seed)
    half, inside = rng.standard_normal((n, n)), rng.standard_normal(n)
    data = dict(Q=half @ half.T / n + 0.01 * np.eye(n), c=rng.standard_normal(n))
    if p:
        A = rng.standard_normal((p, n))
        data.update(A=A, b=A @ inside)
    if q:
        G = rng.standard_normal((q, n))
        data.update(G=G, h=G @ inside + rng.uniform(0, 1, q))
    if box:
        data.update(lower=-0.1 * np.ones(n), upper=0.1 * np.ones(n))
    return data


def nnls():
    X, y = load_diabetes(return_X_y=True)
    pairs = [X] + [X[:, [i]] * X[:, i:] for i in range(X.shape[1])]
    X, y = scale(np.concatenate(pairs, axis=1)), scale(y)
    # Both signs' columns would be lasso's; one sign's is the classical problem.
    return dict(Q=X.T @ X / len(y), c=-X.T @ y / len(y), lower=np.zeros(X.shape[1]))


def svm():
    X, y = load_breast_cancer(return_X_y=True)
    X, y = StandardScaler().fit_transform(X), 2.0 * y - 1
    kernel = rbf_kernel(X, gamma=1 / X.shape[1])
    return dict(
        Q=y[:, None] * kernel * y,
        c=-np.ones(len(y)),
        A=y[None, :],
        b=np.zeros(1),
        lower=np.zeros(len(y)),
        upper=np.ones(len(y)),
    )


PROGRAMS = {
    "equality 20": lambda: random_program(20, 10, 0, False),
    "equality 200": lambda: random_program(200, 100, 0, False),
    "general 10": lambda: random_program(10, 2, 10, False),
    "general 50": lambda: random_program(50, 12, 50, False),
    "general 200": lambda: random_program(200, 50, 200, False),
    "box 50": lambda: random_program(50, 0, 0, True),
    "box 300": lambda: random_program(300, 0, 0, True),
    "nnls": nnls,
    "svm": svm,
}


def ours(name, data):
    """Solvers of varan: name to a function of c."""
    static = {k: jnp.asarray(v) for k, v in data.items() if k != "c"}

    def with_solver(solver):
        def run(c):
            problem = Quadratic(c=c, **static)
            return solve(problem, solver, problem.start(), tol=TOL, max_steps=4000)

        return lambda c: run(c).x.x

    found = {
        "varan": lambda c: quadratic_program(c=c, **static, tol=TOL, max_steps=4000).x.x
    }
    if set(data) <= {"Q", "c", "lower", "upper"}:
        found["varan BoxCoordinateDescent"] = with_solver(BoxCoordinateDescent())
    if name.startswith("equality"):
        found["varan OSQP"] = with_solver(OSQP())
    return found


def from_jaxopt(data):
    """Solvers of jaxopt, at the loosest tolerance that is as exact as ours."""
    d = {k: jnp.asarray(v) for k, v in data.items()}
    n = d["c"].size
    found = {}
    if set(d) == {"Q", "c", "A", "b"}:
        peer = jaxopt.EqualityConstrainedQP(tol=1e-8)
        found["jaxopt EqualityConstrainedQP"] = lambda c: (
            peer.run(params_obj=(d["Q"], c), params_eq=(d["A"], d["b"])).params.primal
        )
        return found
    lower = d.get("lower", jnp.full(n, -jnp.inf))
    upper = d.get("upper", jnp.full(n, jnp.inf))
    if not {"A", "G"} & set(d):
        descent = jaxopt.BoxCDQP(tol=1e-7, maxiter=10_000)
        found["jaxopt BoxCDQP"] = lambda c: (
            descent.run(
                jnp.zeros(n), params_obj=(d["Q"], c), params_ineq=(lower, upper)
            ).params
        )
    rows = [(d[k], low, d[r]) for k, r, low in _row_kinds(d)]
    if "lower" in d:
        rows.append((jnp.eye(n), lower, upper))
    M, lo, up = (jnp.concatenate(part) for part in zip(*rows, strict=True))
    split = jaxopt.BoxOSQP(tol=1e-7, maxiter=20_000)
    found["jaxopt BoxOSQP"] = lambda c: split.run(
        params_obj=(d["Q"], c), params_eq=M, params_ineq=(lo, up)
    ).params.primal[0]
    return found


def _row_kinds(d):
    if "A" in d:
        yield "A", "b", d["b"]
    if "G" in d:
        yield "G", "h", jnp.full(d["h"].shape, -jnp.inf)


def from_cvxpy(data):
    x, c = cvxpy.Variable(data["c"].size), cvxpy.Parameter(data["c"].size)
    constraints = []
    if "A" in data:
        constraints.append(data["A"] @ x == data["b"])
    if "G" in data:
        constraints.append(data["G"] @ x <= data["h"])
    if "lower" in data:
        constraints.append(x >= data["lower"])
    if "upper" in data:
        constraints.append(x <= data["upper"])
    half = cvxpy.quad_form(x, cvxpy.psd_wrap(data["Q"])) / 2
    problem = cvxpy.Problem(cvxpy.Minimize(half + c @ x), constraints)

    def with_solver(**settings):
        def run(value):
            c.value = np.asarray(value)
            problem.solve(**settings)
            return x.value

        return run

    return {
        "cvxpy OSQP": with_solver(
            solver="OSQP", eps_abs=1e-7, eps_rel=1e-7, polishing=True, max_iter=100_000
        ),
        "cvxpy Clarabel": with_solver(solver="CLARABEL"),
    }


def from_scipy(name, data):
    n = data["c"].size
    bounds = (
        scipy.optimize.Bounds(data["lower"], data.get("upper", np.inf))
        if "lower" in data
        else None
    )
    constraints = []
    if "A" in data:
        A, b = data["A"], data["b"]
        constraints.append(
            {"type": "eq", "fun": lambda x: A @ x - b, "jac": lambda x: A}
        )
    if "G" in data:
        G, h = data["G"], data["h"]
        constraints.append(
            {"type": "ineq", "fun": lambda x: h - G @ x, "jac": lambda x: -G}
        )

    def minimise(c):
        c = np.asarray(c)
        return scipy.optimize.minimize(
            lambda x: x @ (data["Q"] @ x / 2 + c),
            np.zeros(n),
            jac=lambda x: data["Q"] @ x + c,
            method="SLSQP" if constraints else "L-BFGS-B",
            bounds=bounds,
            constraints=constraints,
            options={"maxiter": 5000, "ftol": 1e-14},
        ).x

    found = (
        {}
        if name == "svm"
        else {"SciPy SLSQP" if constraints else "SciPy L-BFGS-B": minimise}
    )
    if name == "nnls":
        half = np.linalg.cholesky(data["Q"] + 1e-12 * np.eye(n))
        found["SciPy nnls"] = lambda c: scipy.optimize.nnls(
            half.T, -np.linalg.solve(half, np.asarray(c))
        )[0]
    if name == "svm":
        y = data["A"][0]
        kernel = y[:, None] * data["Q"] * y

        def classify(c):
            machine = SVC(C=1.0, kernel="precomputed", tol=1e-6).fit(kernel, y)
            x = np.zeros(n)
            x[machine.support_] = np.abs(machine.dual_coef_[0])
            return x

        found["scikit-learn SVC"] = classify
    return found


def error(data, x, c):
    """How far `x` is from feasible and, as its value shows, from the best."""
    x, c = np.asarray(x), np.asarray(c)
    missed = [0.0]
    if "A" in data:
        missed.append(np.abs(data["A"] @ x - data["b"]).max())
    if "G" in data:
        missed.append((data["G"] @ x - data["h"]).max())
    if "lower" in data:
        missed.append((data["lower"] - x).max())
    if "upper" in data:
        missed.append((x - data["upper"]).max())
    return x @ (data["Q"] @ x / 2 + c), max(missed)


def contestants(name, data, mode):
    c = jnp.asarray(data["c"])
    jitted = {**ours(name, data), **from_jaxopt(data)}
    plain = {**from_scipy(name, data), **(from_cvxpy(data) if cvxpy else {})}
    weight = jnp.linspace(1.0, 2.0, c.size)
    if mode == "gradient":
        derived = {k: _gradient(f, weight) for k, f in jitted.items()}
        return {label: partial(jax.jit(f), c) for label, f in derived.items()}
    if mode == "batch":
        noise = np.random.default_rng(1).standard_normal((BATCH, c.size))
        many = c + SPREAD * jnp.asarray(noise)
        # SVC knows no other right-hand side than one.
        plain.pop("scikit-learn SVC", None)
        runs = {k: partial(jax.jit(jax.vmap(f)), many) for k, f in jitted.items()}
        return {**runs, **{k: partial(_loop, f, many) for k, f in plain.items()}}
    runs = {label: partial(jax.jit(f), c) for label, f in jitted.items()}
    return {**runs, **{label: partial(f, c) for label, f in plain.items()}}


def _gradient(f, weight):
    return jax.grad(lambda c: f(c) @ weight)


def _loop(f, many):
    return np.stack([f(lane) for lane in np.asarray(many)])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=["single", "batch", "gradient"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="")
    parser.add_argument(
        "--skip", nargs="*", default=[], help="leave out contestants named so"
    )
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore")
    for name, make in PROGRAMS.items():
        if arguments.only not in name:
            continue
        data = make()
        if arguments.compile:
            for label, f in {**ours(name, data), **from_jaxopt(data)}.items():
                spent = compile_time(f, jnp.asarray(data["c"]))
                print(f"{name}  {label}: {spent.total:.2f} s to compile")
            continue
        runs = contestants(name, data, arguments.mode or "single")
        runs = {
            label: run
            for label, run in runs.items()
            if not any(part in label for part in arguments.skip)
        }
        result = race(runs, repeats=arguments.repeats, reference="varan")
        print(f"\n{name}, {arguments.mode or 'single'}")
        print(result.table())
        if arguments.mode in (None, "single"):
            for label, x in result.answers.items():
                value, missed = error(data, x, data["c"])
                print(f"  {label}: value {value:.10g}, misses by {missed:.1e}")
        if arguments.mode == "gradient":
            for label, g in result.answers.items():
                print(f"  {label}: |gradient| {np.linalg.norm(g):.8g}")


if __name__ == "__main__":
    main()
