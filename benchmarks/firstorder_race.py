"""Race: penalised linear models, varan against scikit-learn, scipy and jaxopt.

Lasso, elastic net, sparse logistic regression and non-negative least squares on the
data that scikit-learn bundles, float64, from zero. Every contestant runs at the loosest
of its tolerances (powers of ten) that brings the objective within 1e-8 of the best
known one, relatively; who reaches it with none is left out, and named.

- single: one solve, of one compiled program.
- batch: 256 penalties; by vmap, or one after the other (scikit-learn's paths reuse the
  neighbour's solution where there is a path).
- gradient: one solve and the derivative of a loss of its solution by the penalty.

    python benchmarks/firstorder_race.py [--repeats 11] [--only lasso] [--compile]
"""

import argparse
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls as scipy_nnls
from sklearn import datasets, linear_model
from sklearn.preprocessing import PolynomialFeatures

from varan import solve
from varan.firstorder import BlockCoordinateDescent, ProximalGradient
from varan.lab.race import compile_time, race
from varan.operators import prox_elastic_net
from varan.problems import ElasticNet, GeneralisedLinear, Logistic, Squared

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import jaxopt

GAP, RATIO = 1e-8, {"lasso": 1.0, "elastic net": 0.5, "nnls": 0.0}
TOLERANCES = [10.0**-k for k in range(2, 15)]


def columns(X):
    """Standardised, without constant and repeated ones (a binary one's square)."""
    X = X[:, X.std(0) > 0]
    X = (X - X.mean(0)) / X.std(0)
    _, first = np.unique(X.round(9), axis=1, return_index=True)
    return np.ascontiguousarray(X[:, np.sort(first)])


def diabetes():
    X, y = datasets.load_diabetes(return_X_y=True)
    X = PolynomialFeatures(2, include_bias=False).fit_transform(X)
    return columns(X), (y - y.mean()) / y.std()


def breast_cancer():
    X, y = datasets.load_breast_cancer(return_X_y=True)
    return columns(X), y - y.mean()


def digits():
    X, y = datasets.load_digits(return_X_y=True)
    return columns(X), (y - y.mean()) / y.std()


def cancer_labels():
    X, y = datasets.load_breast_cancer(return_X_y=True)
    return columns(X), y.astype(float)


def digit_parities():
    X, y = datasets.load_digits(return_X_y=True)
    return columns(X), (y % 2).astype(float)


def digit_from_others():
    """One picture as a non-negative mixture of others: columns are pictures."""
    X = datasets.load_digits().data
    return X[1:61].T.copy(), X[0].copy()


INSTANCES = [
    ("lasso", diabetes),
    ("lasso", digits),
    ("elastic net", diabetes),
    ("elastic net", breast_cancer),
    ("logistic", cancer_labels),
    ("logistic", digit_parities),
    ("nnls", digit_from_others),
]


def problem_of(kind, X, y, lam):
    if kind == "logistic":
        return GeneralisedLinear(X, y, loss=Logistic(), penalty=ElasticNet(lam))
    if kind == "nnls":
        return GeneralisedLinear(X, y, penalty=ElasticNet(nonnegative=True))
    ratio = RATIO[kind]
    penalty = ElasticNet(lam * ratio, lam * (1 - ratio))
    return GeneralisedLinear(X, y, loss=Squared(), penalty=penalty)


def ours(kind, X, y, solver):
    def make(tol):
        def fit(lam):
            start = jnp.zeros(X.shape[1])
            end = solve(problem_of(kind, X, y, lam), solver, start, tol=tol)
            return end.x

        return fit

    return make


def averaged(kind):
    """jaxopt's loss, its columns' curvatures averaged as the loss itself is.

    Its own are sums over samples: n times too large, and its steps too short for any
    of these instances.
    """
    known = jaxopt.objective
    base = type(known.binary_logreg if kind == "logistic" else known.least_squares)

    class Averaged(base):
        def columnwise_lipschitz_const(self, data):
            return super().columnwise_lipschitz_const(data) / data[0].shape[0]

    return Averaged()


def by_jaxopt(kind, X, y, coordinates):
    ratio = RATIO.get(kind, 1.0)

    def prox(v, lam, scaling=1.0):
        if kind == "nnls":
            return jax.nn.relu(v)
        return prox_elastic_net(v, lam * ratio, lam * (1 - ratio), scaling)

    fun = averaged(kind)

    def make(tol):
        if coordinates:
            solver = jaxopt.BlockCoordinateDescent(fun, prox, maxiter=5000, tol=tol)
        else:
            solver = jaxopt.ProximalGradient(fun, prox, maxiter=20_000, tol=tol)

        def fit(lam):
            return solver.run(jnp.zeros(X.shape[1]), lam, (X, y)).params

        return fit

    return make


def by_sklearn(kind, X, y, method):
    X, y = np.asarray(X), np.asarray(y)

    def make(tol):
        def fit(lam):
            if kind == "logistic":
                model = linear_model.LogisticRegression(
                    l1_ratio=1, C=1 / (len(y) * lam), solver=method, tol=tol,
                    fit_intercept=False, max_iter=10_000,
                )  # fmt: skip
            else:
                model = linear_model.ElasticNet(
                    alpha=lam, l1_ratio=RATIO[kind], fit_intercept=False, tol=tol,
                    max_iter=100_000, precompute=method == "Gram",
                )  # fmt: skip
            return model.fit(X, y).coef_.ravel()

        return fit

    return make


def path_by_sklearn(kind, X, y, tol):
    def run(lams):
        return linear_model.enet_path(
            np.asarray(X), np.asarray(y), l1_ratio=RATIO[kind], alphas=lams, tol=tol,
            max_iter=100_000,
        )[1].T  # fmt: skip

    return run


def contestants(kind, X, y):
    makers = {
        "varan BlockCoordinateDescent": ours(kind, X, y, BlockCoordinateDescent()),
        "varan ProximalGradient": ours(kind, X, y, ProximalGradient()),
        "jaxopt BlockCoordinateDescent": by_jaxopt(kind, X, y, True),
        "jaxopt ProximalGradient": by_jaxopt(kind, X, y, False),
    }
    if kind == "logistic":
        for method in ("liblinear", "saga"):
            makers[f"sklearn {method}"] = by_sklearn(kind, X, y, method)
    elif kind == "nnls":
        matrix, target = np.asarray(X), np.asarray(y)
        makers["scipy nnls"] = lambda tol: lambda lam: scipy_nnls(matrix, target)[0]
    else:
        for method in ("Gram", "columns"):
            makers[f"sklearn {method}"] = by_sklearn(kind, X, y, method)
    return makers


def compiles(name):
    return name.startswith(("varan", "jaxopt"))


def tuned(makers, kind, X, y, lam):
    """Each at its loosest tolerance that reaches the objective; and that tolerance."""
    exact = ours(kind, X, y, BlockCoordinateDescent())(1e-12)(lam)
    value = jax.jit(lambda w: problem_of(kind, X, y, lam).value(w))
    best, fits = float(value(exact)), {}
    for name, make in makers.items():
        for tol in TOLERANCES:
            fit = make(tol)
            fit = jax.jit(fit) if compiles(name) else fit
            found = float(value(jnp.asarray(fit(lam))))
            best = min(best, found)
            if found - best <= GAP * best:
                fits[name] = fit, tol
                break
        else:
            print(f"  {name}: does not reach the objective")
    return fits


def three_races(kind, instance, repeats, batch_size, with_compile):
    X, y = map(jnp.asarray, instance())
    top = float(jnp.max(jnp.abs(X.T @ y))) / len(y)
    lam = top / 50 if kind != "logistic" else top / 200
    print(f"\n{kind}, {instance.__name__}, {X.shape}")
    fits = tuned(contestants(kind, X, y), kind, X, y, lam)
    print("  tolerances:", {name: f"{tol:.0e}" for name, (_, tol) in fits.items()})
    runs = {name: lambda f=fit: f(lam) for name, (fit, _) in fits.items()}
    reference = next(n for n in runs if n.startswith(("sklearn", "scipy")))
    print(race(runs, repeats=repeats, reference=reference).table())
    if kind == "nnls":
        return
    lams = np.geomspace(20 * lam, lam, batch_size)
    runs = {}
    for name, (fit, tol) in fits.items():
        if compiles(name):
            batch = jax.jit(jax.vmap(fit))
            runs[name] = lambda b=batch: b(jnp.asarray(lams))
        else:
            runs[name] = lambda f=fit: np.stack([f(v) for v in lams])
            if kind != "logistic":
                path = path_by_sklearn(kind, X, y, tol)
                runs["sklearn path"] = lambda p=path: p(lams)
    print(f"batch of {batch_size}")
    print(race(runs, repeats=max(3, repeats // 3), reference=reference).table())
    runs = {}
    for name, (fit, _) in fits.items():
        if compiles(name):
            slope = jax.jit(jax.value_and_grad(lambda v, f=fit: jnp.sum(f(v) ** 2)))
            runs[name] = lambda s=slope: s(lam)
    print("solve and gradient")
    print(race(runs, repeats=repeats).table())
    if with_compile:
        for name, (fit, _) in fits.items():
            if compiles(name):
                print(f"  {name}: compiles in {compile_time(fit, lam).total:.2f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--only", default="")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore")
    for kind, instance in INSTANCES:
        if arguments.only in f"{kind}, {instance.__name__}":
            three_races(
                kind, instance, arguments.repeats, arguments.batch, arguments.compile
            )


if __name__ == "__main__":
    main()
