"""TorchOpt's and betty's solvers on the problems of `bilevel_comparison.py`.

Each spends oracle calls as ours do: a gradient of either level, a Hessian or a cross
product is one call, counted where it is made. Both variables are one vector each.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

torch.set_num_threads(1)
logging.disable(logging.INFO)  # betty tells of every problem it is given
warnings.filterwarnings("ignore", message=".*functorch.vjp.*")
STEPS = 5  # lower steps and products of a round, as for ours


@dataclass
class Task:
    """A problem in PyTorch: losses of `(x, y, batch)`, batches, first points."""

    upper: Callable[[Any, Any, Any], Any]
    lower: Callable[[Any, Any, Any], Any]
    draw: Callable[[Any], Any]  # from a generator to a batch of each level
    whole: Any  # all data of each level
    x: np.ndarray
    y: np.ndarray


def cleaning(train, validation, penalty, batch, x, y):
    """Weights of samples; `y` holds a classifier's bias, then its weight."""
    (inputs, labels), (held, targets) = (
        (torch.tensor(np.array(a)), torch.tensor(np.array(b)).long())
        for a, b in (train, validation)
    )

    def losses(y, inputs, labels):
        logits = inputs @ y[10:].reshape(-1, 10) + y[:10]
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    def lower(x, y, rows):
        each = losses(y, inputs[rows], labels[rows])
        return (torch.sigmoid(x[rows]) * each).mean() + penalty * (y * y).sum()

    def upper(x, y, rows):
        return losses(y, held[rows], targets[rows]).mean()

    def draw(generator):
        return [
            torch.randint(len(z), (batch,), generator=generator) for z in (labels, held)
        ]

    whole = [torch.arange(len(z)) for z in (labels, held)]
    return Task(upper, lower, draw, whole, np.array(x), np.array(y))


def penalties(train, held, x, y):
    """One penalty a weight of a logistic regression, on all data."""
    parts = [tuple(torch.tensor(np.array(v)) for v in part) for part in (train, held)]

    def logistic(y, data):
        return torch.nn.functional.softplus(-data[1] * (data[0] @ y)).mean()

    def lower(x, y, data):
        return logistic(y, data) + (torch.exp(x) * y * y).sum() / 2

    def upper(x, y, data):
        return logistic(y, data)

    return Task(upper, lower, lambda _: parts, parts, np.array(x), np.array(y))


def methods():
    """Name to a function of task, stepsizes of x and y, calls and seed to x."""
    return {
        "TorchOpt, implicit, CG": torchopt_implicit,
        "TorchOpt, unrolled": torchopt_unrolled,
        "betty, CG": betty("cg"),
        "betty, Neumann": betty("neumann"),
    }


def check(task, problem, start, flat):
    """That both forms of the problem are one, values at the start on all data."""
    x, y = torch.tensor(np.array(start.x)), torch.tensor(np.array(flat))
    for ours, theirs, batch in (
        (problem.lower_value, task.lower, task.whole[0]),
        (problem.upper_value, task.upper, task.whole[1]),
    ):
        np.testing.assert_allclose(
            float(theirs(x, y, batch)), float(ours(start.x, start.y)), rtol=1e-6
        )


class Purse:
    """Counts calls; the last `x` that was paid for in whole rounds."""

    def __init__(self, calls):
        self.left = calls

    def pay(self, calls=1):
        self.left -= calls


def _rounds(task, calls, seed, one_round):
    """Rounds while the budget lasts; one that overspends is not counted."""
    generator = torch.Generator().manual_seed(seed)
    purse = Purse(calls)
    x, y = (torch.tensor(v, requires_grad=True) for v in (task.x, task.y))
    while True:
        before = x.detach().clone().numpy()
        x, y = one_round(x, y, generator, purse)
        if purse.left < 0:
            return before


def torchopt_implicit(task, a, b, calls, seed):
    """Five lower steps, the adjoint by five steps of conjugate gradients."""
    import torchopt

    purse_of_round = []

    def optimality(y, x, batches):
        return torch.func.grad(task.lower, argnums=1)(x, y, batches[-1])

    def linear(matvec, vector):
        def counted(v):
            purse_of_round[0].pay()
            return matvec(v)

        # Without `init` a product with zero is spent on the first residual.
        return torchopt.linear_solve.solve_cg(maxiter=STEPS)(counted, vector)

    @torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=linear)
    def inner(y, x, batches):
        for batch in batches[:STEPS]:
            y = y - b * torch.func.grad(task.lower, argnums=1)(x, y, batch)
        return y

    def one_round(x, y, generator, purse):
        purse_of_round[:] = [purse]
        batches = [task.draw(generator) for _ in range(STEPS + 1)]
        answer = inner(y, x, [batch[0] for batch in batches])
        loss = task.upper(x, answer, batches[-1][1])
        gradient = torch.autograd.grad(loss, x)[0]
        purse.pay(STEPS + 2)  # lower steps, upper gradient, cross product
        return (x - a * gradient).detach().requires_grad_(), answer.detach()

    return _rounds(task, calls, seed, one_round)


def torchopt_unrolled(task, a, b, calls, seed):
    """The derivative of five differentiable lower steps."""
    import torchopt

    def one_round(x, y, generator, purse):
        rule = torchopt.sgd(lr=b)
        weights = (y.detach().requires_grad_(),)
        state = rule.init(weights)
        for _ in range(STEPS):
            loss = task.lower(x, weights[0], task.draw(generator)[0])
            slope = torch.autograd.grad(loss, weights, create_graph=True)
            updates, state = rule.update(slope, state, inplace=False)
            weights = torchopt.apply_updates(weights, updates, inplace=False)
        loss = task.upper(x, weights[0], task.draw(generator)[1])
        gradient = torch.autograd.grad(loss, x)[0]
        # On the way back each step takes a Hessian and a cross product.
        purse.pay(3 * STEPS + 1)
        return (x - a * gradient).detach().requires_grad_(), weights[0]

    return _rounds(task, calls, seed, one_round)


class _Vector(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self):
        return self.value


def betty(kind):
    """Five lower steps between upper ones, the adjoint by five products."""

    def run(task, a, b, calls, seed):
        from betty.configs import Config, EngineConfig
        from betty.engine import Engine
        from betty.problems import ImplicitProblem

        generator = torch.Generator().manual_seed(seed)

        class Upper(ImplicitProblem):
            def training_step(self, batch):
                return task.upper(self(), self.lower(), batch)

            def get_batch(self):
                return task.draw(generator)[1]

        class Lower(ImplicitProblem):
            def training_step(self, batch):
                return task.lower(self.upper(), self(), batch)

            def get_batch(self):
                return task.draw(generator)[0]

        def problem(made, name, value, stepsize, config):
            module = _Vector(value)
            optimiser = torch.optim.SGD(module.parameters(), lr=stepsize)
            return made(name, config, module, optimiser, device="cpu")

        own = {
            "cg": {"cg_iterations": STEPS},
            "neumann": {"neumann_iterations": STEPS, "neumann_alpha": b},
        }
        config = Config(type=kind, unroll_steps=STEPS, **own[kind])
        upper = problem(Upper, "upper", task.x, a, Config(retain_graph=True))
        lower = problem(Lower, "lower", task.y, b, config)
        links = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
        engine = Engine([upper, lower], EngineConfig(train_iters=1), links)
        engine.train()
        purse = Purse(calls)
        while True:
            before = upper.module.value.detach().clone().numpy()
            for _ in range(STEPS):
                engine.global_step += 1
                engine.train_step()
            # Lower steps; upper gradient, the lower one again, products, cross one.
            purse.pay(2 * STEPS + 3)
            if purse.left < 0:
                return before

    return run
