"""Solvers of games side by side: same problems, same calls, same care in tuning.

Five problems: a bilinear game, a strongly monotone saddle function, an operator that
is negatively comonotone, a quadratic game of two players that is not monotone, and a
small adversarial training. Every solver may spend the same number of oracle calls
(evaluations of the operator; a Jacobian product of proximal point counts as one) and
takes the best of twelve stepsizes, multiples of 1 / L from 0.05 to 20 (of proximal
point ten times those). Shown are the calls until the residual is 1e-6 of the start's
or, where the budget ends before, the residual reached, and the multiple.

    python benchmarks/games_comparison.py [--calls 1000] [--plot games_comparison.svg]
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

from varan import solve
from varan.games import (
    EuclideanBox,
    Extragradient,
    Game,
    GradientDescentAscent,
    Halpern,
    OptimisticGradient,
    PastExtragradient,
    ProximalPoint,
    ReflectedGradient,
    bilinear_game,
    estimate_lipschitz,
    quadratic_game,
    quartic_saddle,
    rotation_game,
)

jax.config.update("jax_enable_x64", True)
TARGET = 1e-6
MULTIPLES = np.geomspace(0.05, 20.0, 12)
SOLVERS = {
    "Extragradient": Extragradient,
    "Extragradient, move half": lambda a: Extragradient(a, a / 2),
    "PastExtragradient": PastExtragradient,
    "ReflectedGradient": ReflectedGradient,
    "OptimisticGradient": OptimisticGradient,
    "Halpern": Halpern,
    "GradientDescentAscent": GradientDescentAscent,
    "ProximalPoint": lambda a: ProximalPoint(10 * a),
}


def problems():
    """Name to a game and a start."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape))  # noqa: E731
    A = normal(20, 20) / np.sqrt(20) + jnp.eye(20)
    yield "bilinear", bilinear_game(A, normal(20)), (normal(20), normal(20))
    saddle = quartic_saddle(jax.random.key(0), 20)
    yield "strongly monotone", saddle, (normal(20), normal(20))
    # rho = 0.1 / L: beyond monotone, within extragradient's theory.
    yield "negatively comonotone", rotation_game(1.0, float(np.arccos(-0.1))), normal(2)
    # The players' own curvature is small against a coupling that is not skew.
    B12, B21 = 2 * jnp.eye(5) + 0.3 * normal(5, 5), -0.5 * jnp.eye(5)
    blocks = [[0.2 * jnp.eye(5), B12], [B21, 0.2 * jnp.eye(5)]]
    game = quadratic_game(blocks, [normal(5), normal(5)])
    yield "two players, not monotone", game, (normal(5), normal(5))
    yield "adversarial training", *adversarial_training(normal)


def adversarial_training(normal):
    """A linear classifier of two digits against one perturbation of all images."""
    images, labels = load_digits(n_class=2, return_X_y=True)
    X, y = jnp.asarray(images[:200] / 16 - 0.5), jnp.asarray(2.0 * labels[:200] - 1)
    high = (jnp.full(64, 1e3), jnp.full(64, 0.1))  # the weights are as good as free
    box = EuclideanBox(jax.tree.map(jnp.negative, high), high)

    def loss(w, d, X, y):
        margin = y * ((X + d[None, :]) @ w)
        return jnp.mean(jax.nn.softplus(-margin)) + 0.005 * w @ w - 0.05 * d @ d

    return Game.from_saddle(loss, X, y, project=box), (0.1 * normal(64), jnp.zeros(64))


@eqx.filter_jit
def runs(make, game, start, stepsizes, calls):
    """Traces, one lane a stepsize."""

    def one(a):
        return solve(
            game,
            make(a),
            start,
            tol=1e-12,
            max_steps=calls,
            max_evaluations=calls,
            differentiate="none",
        ).trace

    return jax.vmap(one)(stepsizes)


def judge(trace):
    """Calls until 1e-6 of the first residual (or infinity), and the last residual."""
    used = np.isfinite(trace.residual)
    relative = trace.residual[used] / trace.residual[0]
    reached = np.flatnonzero(relative <= TARGET)
    spent = trace.evaluations[used][reached[0]] if reached.size else np.inf
    return float(spent), float(relative[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--plot", default=None, help="where to save the curves")
    arguments = parser.parse_args()
    table, curves = {}, {}
    for problem, game, start in problems():
        points = jax.tree.map(lambda v: v[None], start)
        L = estimate_lipschitz(game, points).value
        for name, make in SOLVERS.items():
            steps = jnp.asarray(MULTIPLES) / L
            traces = runs(make, game, start, steps, arguments.calls)
            lanes = [
                jax.tree.map(lambda v, k=k: np.asarray(v[k]), traces)
                for k in range(len(MULTIPLES))
            ]
            best = min(range(len(lanes)), key=lambda k: judge(lanes[k]))
            table[problem, name] = *judge(lanes[best]), MULTIPLES[best]
            curves[problem, name] = lanes[best]
    show(table)
    if arguments.plot:
        draw(curves, arguments.calls, arguments.plot)


def show(table):
    names = list(dict.fromkeys(problem for problem, _ in table))
    print("| solver | " + " | ".join(names) + " |")
    print("| --- |" + " --- |" * len(names))
    for solver in SOLVERS:
        cells = []
        for problem in names:
            spent, last, multiple = table[problem, solver]
            result = f"{spent:.0f}" if np.isfinite(spent) else f"residual {last:.0e}"
            grew = last > 1
            cells.append("diverges" if grew else f"{result} ({multiple:.2g})")
        print(f"| {solver} | " + " | ".join(cells) + " |")


def draw(curves, calls, path):
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(problem for problem, _ in curves))
    figure = Figure(
        figsize=(9.0, 3.0 * -(-(len(names) + 1) // 3)), layout="constrained"
    )
    *places, corner = figure.subplots(-(-(len(names) + 1) // 3), 3).flat
    for axes, problem in zip(places, names, strict=True):
        for place, solver in enumerate(SOLVERS):
            trace = curves[problem, solver]
            last = np.isfinite(trace.residual).sum() - 1
            used = np.unique(np.linspace(0, last, 80).astype(int))
            # Dashes tell curves apart that lie on one another.
            style = "-" if place % 2 == 0 else "--"
            axes.plot(
                trace.evaluations[used], trace.residual[used], style, label=solver
            )
        axes.set(title=problem, xlabel="oracle calls", ylabel="residual", yscale="log")
        axes.set_xlim(0, calls)
    corner.axis("off")
    corner.legend(*places[0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
