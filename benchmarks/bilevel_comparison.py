"""Bilevel solvers side by side: same problems, same calls, same care in tuning.

Two problems on real data: cleaning 300 digits of which 40 % carry wrong labels, one
weight a sample, on minibatches; and tuning one penalty a weight of a logistic
regression on breast_cancer, with exact oracles. Every solver may spend the same number
of oracle calls (gradients of either level, Hessian and cross products) and takes the
best of eight settings: four stepsizes of `x` and two of `y` (for MAID and HOAG, which
choose the steps of `y` themselves, two first accuracies; for the penalty methods two
values of sigma). The best is chosen by the upper loss at the lower answer for the `x`
found, the lower level solved to the end; that loss and the accuracy on test data are
shown, means over three seeds.

    python benchmarks/bilevel_comparison.py [--calls 4000] [--plot bilevel.svg]

With `--peers`, in an environment that has PyTorch, torchopt and betty-ml too, theirs
take turns with ours of the same kinds: five lower steps and five products a round, the
same starts, calls and settings, and batches of the same size from other generators.
"""

import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from varan import NewtonCG, Smooth, solve
from varan.bilevel import (
    AIDCG,
    F2SA,
    HOAG,
    LVHBA,
    MAID,
    MASOBA,
    SOBA,
    TTSA,
    BilevelProblem,
    BORep,
    Penalty,
    SingleLoopPenalty,
    Smoothness,
    StocBiO,
    Unrolled,
    data_cleaning,
    trajectory,
)
from varan.data import breast_cancer, digit_images, flip_labels, split, standardise

jax.config.update("jax_enable_x64", True)
SEEDS = 3
# BO-REP's steps have a length, LV-HBA's move x and y alike: grids of their own.
OWN = {
    "cleaning": {"BORep": (0.1, 0.3, 1.0, 3.0)},
    "penalties": {
        "BORep": (0.003, 0.01, 0.03, 0.1),
        "LVHBA": (0.003, 0.01, 0.03, 0.1),
    },
}
SIGMAS = (0.01, 0.1)
# Ours of the peers' kinds, and the best of the single loops.
OPPONENTS = ("AIDCG", "StocBiO", "Unrolled", "SOBA")


def solvers(key, constants, exact):
    """Name to a solver of two settings, the second setting's values, calls a round."""
    low = (0.1, 0.5)
    yield "AIDCG", lambda a, b: AIDCG(a, b, 5, 5, key=key), low, 13
    yield "StocBiO", lambda a, b: StocBiO(a, b, b, 5, 5, key=key), low, 12
    yield "TTSA", lambda a, b: TTSA(a, b, b, 5, 0.0, 0.0, key=key), low, 5
    yield "SOBA", lambda a, b: SOBA(a, b, b, key=key), low, 4
    yield "MASOBA", lambda a, b: MASOBA(a, b, b, key=key), low, 4
    yield "BORep", lambda a, b: BORep(a, b, b, refine_epochs=1, key=key), low, 4.5
    yield "Unrolled", lambda a, b: Unrolled(a, b, 5, key=key), low, 16
    yield "F2SA", lambda a, b: F2SA(a, 0.1, 3, 1 / b, 0.0, key=key), SIGMAS, 12
    yield (
        "Penalty",
        lambda a, b: Penalty(a, 0.1, b, 10.0, 1.0, 3, key=key),
        SIGMAS,
        12,
    )
    yield (
        "SingleLoopPenalty",
        lambda a, b: SingleLoopPenalty(a, 0.1, b, 10.0, 1.0, key=key),
        SIGMAS,
        6,
    )
    if exact:
        yield "LVHBA", lambda a, b: LVHBA(a, 0.1, 0.1, penalty=1 / b), SIGMAS, 5
        first = (1e-1, 1e-3)
        yield "HOAG", lambda a, b: HOAG(constants, a, b, max_inner=500), first, 8
        yield (
            "MAID",
            lambda a, b: MAID(constants, a, b, b, convex=True, max_inner=500),
            first,
            60,
        )


def cleaning(seed):
    """Digits, 40 % of the training labels wrong."""
    images, labels = digit_images()
    pixels = images.reshape(len(images), -1)
    train, validation, test = split((pixels, labels), [300, 200], seed)
    noisy, _ = flip_labels(train[1], 0.4, seed)
    parts = [(train[0], noisy), validation, test]
    train, validation, test = (tuple(map(jnp.asarray, part)) for part in parts)
    problem = data_cleaning(
        cross_entropies, train, validation, penalty=1e-3, batch=(64, 64)
    )
    y = {"weight": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
    sizes = (10.0, 100.0, 1000.0, 10_000.0)
    return problem, problem.point(jnp.zeros(300), y), sizes, None, partial_of(test)


def cross_entropies(y, data):
    logits = jax.nn.log_softmax(data[0] @ y["weight"] + y["bias"])
    return -jnp.take_along_axis(logits, data[1][:, None], axis=1)[:, 0]


def partial_of(test):
    """Test accuracy of a digit classifier."""

    def measure(y):
        guess = jnp.argmax(test[0] @ y["weight"] + y["bias"], axis=1)
        return jnp.mean(guess == test[1])

    return measure


def penalties(seed):
    """A logistic regression with one penalty a weight."""
    train, held, test = split(breast_cancer(), [100, 150], seed)
    inputs = standardise(train[0], held[0], test[0])
    train, held, test = (
        (jnp.asarray(z), jnp.asarray(part[1]))
        for z, part in zip(inputs, (train, held, test), strict=True)
    )
    problem = BilevelProblem(above, below, train, held)
    curvature, upper = (np.linalg.norm(z, 2) ** 2 / (4 * len(z)) for z in inputs[:2])
    third = 0.0963 * np.mean(np.linalg.norm(inputs[0], axis=1) ** 3)
    constants = Partial(logistic_constants, curvature, upper, third)
    start = problem.point(jnp.full(30, -2.0), jnp.zeros(30))

    def measure(y):
        return jnp.mean((test[0] @ y > 0) == (test[1] > 0))

    return problem, start, (1.0, 10.0, 100.0, 1000.0), constants, measure


def logistic(w, data):
    return jnp.mean(jax.nn.softplus(-data[1] * (data[0] @ w)))


def above(x, w, train, held):
    return logistic(w, held)


def below(x, w, train, held):
    return logistic(w, train) + jnp.sum(jnp.exp(x) * w**2) / 2


def logistic_constants(curvature, upper, third, x):
    least, most = jnp.exp(jnp.min(x)), jnp.exp(jnp.max(x))
    return Smoothness(least, curvature + most, upper, hessian=third, cross=most)


@eqx.filter_jit
def answer(problem, x, start):
    """The lower answer for the `x` found."""
    loss = Smooth(lambda y, x: problem.lower_value(x, y), x, convex=True)
    return solve(loss, NewtonCG(), start, tol=1e-7, max_steps=300).x


def look(problem, iterate):
    """Only what the budget needs: LV-HBA counts by the round."""
    return iterate.x


def run(name, make, seconds, cost, problem, start, sizes, calls, measure):
    """The best of the settings: upper loss at the lower answer, and test accuracy."""

    def search(a, b):
        method = jax.tree.map(jnp.asarray, make(a, b))
        if name in ("MAID", "HOAG"):
            return within(problem, method, start, calls)
        rounds = int(calls / cost)
        _, seen = trajectory(problem, method, start, look, steps=rounds, every=rounds)
        return jax.tree.map(lambda v: v[-1], seen)

    return best(search, seconds, problem, start, sizes, measure)


def best(search, seconds, problem, start, sizes, measure):
    """The best setting's loss, accuracy, stepsize; processor seconds, the median."""
    tried, times = [], []
    for a in sizes:
        for b in seconds:
            begun = time.process_time()
            x = jax.block_until_ready(search(a, b))
            times.append(time.process_time() - begun)
            y = answer(problem, x, start.y)
            loss = float(problem.upper_value(x, y))
            tried.append((loss if np.isfinite(loss) else np.inf, float(measure(y)), a))
    # Settings are data: only the first of them compiles.
    return *min(tried), float(np.median(times))


@eqx.filter_jit
def within(problem, method, start, calls):
    """Rounds while the budget lasts; a round that overspends is not counted."""
    first = method.begin(problem, start)
    dynamic, static = eqx.partition(first, eqx.is_array)

    def go(carry):
        now, _ = carry
        iterate = eqx.combine(now, static)
        return (iterate.oracles.total < calls) & (iterate.count < 1000)

    def advance(carry):
        now, _ = carry
        after = method.advance(problem, eqx.combine(now, static))
        return eqx.filter(after, eqx.is_array), now

    end, before = jax.lax.while_loop(go, advance, (dynamic, dynamic))
    end, before = (eqx.combine(v, static) for v in (end, before))
    over = end.oracles.total > calls
    return jax.tree.map(lambda a, b: jnp.where(over, a, b), before.x, end.x)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=4000)
    parser.add_argument("--plot")
    parser.add_argument("--peers", action="store_true")
    chosen = parser.parse_args()
    tables = {}
    for title, instance in (("cleaning", cleaning), ("penalties", penalties)):
        table = tables[title] = {}
        for seed in range(SEEDS):
            problem, start, sizes, constants, measure = instance(seed)
            plain = answer(problem, start.x, start.y)
            untuned = (float(problem.upper_value(start.x, plain)), measure(plain), 0, 0)
            table.setdefault("(untuned)", []).append(untuned)
            key, exact = jax.random.key(seed), constants is not None
            for name, make, seconds, cost in solvers(key, constants, exact):
                if chosen.peers and name not in OPPONENTS:
                    continue
                mine = OWN[title].get(name, sizes)
                setting = (name, make, seconds, cost, problem, start, mine)
                found = run(*setting, chosen.calls, measure)
                table.setdefault(name, []).append(found)
            for name, search in peers(title, problem, start, chosen, seed):
                found = best(search, (0.1, 0.5), problem, start, sizes, measure)
                table.setdefault(name, []).append(found)
        show(title, table)
    if chosen.plot:
        draw(tables, chosen.plot)


def peers(title, problem, start, chosen, seed):
    """Name to a search of two stepsizes, for what runs in PyTorch."""
    if not chosen.peers:
        return
    import bilevel_peers

    if title == "cleaning":
        (train, _), validation, penalty = problem.params[1:]
        y = jnp.concatenate([start.y["bias"], start.y["weight"].ravel()])
        task = bilevel_peers.cleaning(train, validation, float(penalty), 64, start.x, y)
    else:
        task = bilevel_peers.penalties(*problem.params, start.x, start.y)
        y = start.y
    bilevel_peers.check(task, problem, start, y)
    for name, method in bilevel_peers.methods().items():

        def search(a, b, method=method):
            return jnp.asarray(method(task, a, b, chosen.calls, seed))

        yield name, search


def show(title, table):
    print(f"\n{title}\n")
    print("| solver | upper loss | test accuracy | seconds | stepsizes |")
    print("| --- | --- | --- | --- | --- |")
    for name, rows in sorted(table.items(), key=lambda item: np.mean(item[1], 0)[0]):
        loss, accuracy, _, seconds = np.mean(rows, axis=0)
        chosen = ", ".join(f"{row[2]:g}" for row in rows)
        print(
            f"| {name} | {loss:.4f} | {accuracy:.3f} | {seconds:.2f} | {chosen} |",
            flush=True,
        )


def draw(tables, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    for axes, (title, table) in zip(figure.subplots(1, 2), tables.items(), strict=True):
        names = sorted(table, key=lambda name: -np.mean(table[name], axis=0)[0])
        for place, name in enumerate(names):
            losses = [row[0] for row in table[name]]
            axes.plot(losses, [place] * len(losses), "o", color="C0", alpha=0.5)
            axes.plot(np.mean(losses), place, "|", color="C1", markersize=16)
        axes.set(title=title, xlabel="upper loss at the lower answer", xscale="log")
        axes.set_yticks(range(len(names)), names)
    figure.savefig(path)


if __name__ == "__main__":
    main()
