"""Feedback policies with a Lipschitz constant, learned from an expert's demonstrations.

Of all policies with constant `alpha` the one nearest to the demonstrated inputs is
found on the demonstrations first, a convex program in its values there, and then
extended to all states with the same constant. The constant trades generalisation for
robustness: an error `e` in the measured state moves the input by at most `alpha |e|`,
and a policy that may bend less follows the expert less closely.

What is known of the expert's closed loop bounds the learner's. Between demonstrations
the error of the policy is at most what it is at one of them plus `(alpha + constant of
the expert)` times the distance; along a trajectory, errors add up at the rate at which
the expert's loop forgets them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from ..core import Certificate
from ..core._checks import (
    check_choice,
    check_finite,
    check_nonempty,
    check_nonnegative,
    check_positive,
    check_shape,
    is_traced,
)
from ..train import start_training, train_epochs
from ._expert_rate import ExpertRate, check_bounded
from ._extensions import Kirszbraun, McShane
from ._lipschitz_regression import all_pairs, fit_values, spanner
from ._sets import Box


class ScaledModule(eqx.Module):
    """A module divided by its own constant, times the constant it shall have."""

    module: Any
    constant: Float[Array, ""]
    offset: Float[Array, " outputs"]

    @property
    def lipschitz(self) -> Float[Array, ""]:
        """The constant it shall have."""
        return self.constant

    def __call__(self, x):
        """The scaled module at a point."""
        own = jnp.asarray(self.module.lipschitz, x.dtype)
        return self.offset + self.constant / own * jnp.atleast_1d(self.module(x))


class LipschitzPolicy(eqx.Module):
    """A policy with a Lipschitz constant that is proved; made by `lipschitz_policy`.

    Called with one state, (states,), it returns one input; `jax.vmap` makes a batch.
    Differentiable in the state.

    Args:
        function: The extension, `McShane`, `Kirszbraun` or a scaled module.
        points: The demonstrated states, (points, states).
        inputs: The demonstrated inputs, (points, inputs).
        fit: How far the mean squared error on the demonstrations is above the least
            that any policy with the constant can have: a proof.
        scalar: Whether inputs come without an axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import lipschitz_policy
        >>> policy = lipschitz_policy(jnp.eye(2), jnp.array([0.0, 4.0]), 1.0)
        >>> round(float(policy(jnp.array([0.5, 0.5]))), 3)
        2.0
    """

    function: Any
    points: Float[Array, "points states"]
    inputs: Float[Array, "points inputs"]
    fit: Certificate
    scalar: bool = eqx.field(static=True)

    def __call__(self, x: Float[Array, " states"]) -> Float[Array, ...]:
        """The input at a state."""
        value = self.function(x)
        return value[0] if self.scalar else value

    @property
    def lipschitz(self) -> Float[Array, ""]:
        """`|policy(x) - policy(y)| <= lipschitz |x - y|`, Euclidean norms."""
        return self.function.lipschitz

    @property
    def residuals(self) -> Float[Array, " points"]:
        """The distance to each demonstrated input."""
        return _residuals(self.function, self.points, self.inputs)

    def learning_error(
        self,
        expert: ExpertRate,
        domain: Box,
        *,
        noise: float = 0.0,
        cells: int = 10_000,
    ) -> Certificate:
        """How far the policy can be from the expert, anywhere in a box of states.

        The box is covered by a grid of cells, and each cell by the demonstration that
        bounds the error there best: `|u_i - policy(x_i)| + noise + (own constant +
        expert's) distance`. Costs cells times demonstrations distances.

        Args:
            expert: Its constants; `lipschitz` is read.
            domain: A bounded box of states.
            noise: The largest error of a demonstrated input, not negative.
            cells: How many cells at least; more make the bound smaller.

        Returns:
            A certificate, a proof if the expert's constant is. Its details are the
            covering argument's parts: `fit_error` and `fill_distance`, from which
            `value <= fit_error + (own + expert's) fill_distance`.

        Raises:
            ValueError: An unbounded domain or one of another dimension, negative noise,
                or fewer than one cell.

        Source: derived here from the covering argument of arXiv:2103.16629.
        """
        owner = "learning_error"
        check_bounded(owner, domain)
        check_shape(owner, "domain", domain.lower, self.points.shape[1:])
        check_nonnegative(owner, "noise", noise)
        check_positive(owner, "cells", cells)
        grid, reach = _grid(domain, cells)
        slope = self.lipschitz + expert.lipschitz.astype(self.points.dtype)
        offsets = self.residuals + jnp.asarray(noise, self.points.dtype)
        error, distance = _covered(grid, self.points, offsets, slope)
        outward = 1 + 256 * float(jnp.finfo(self.points.dtype).eps)
        return Certificate(
            "policy error",
            (error + slope * reach) * outward,
            proof=expert.proof,
            statement="|policy(x) - expert(x)| <= value for all x in the domain",
            details={
                "fit_error": jnp.max(offsets),
                "fill_distance": (distance + reach) * outward,
            },
        )

    def certificate(
        self,
        system: Any,
        expert: ExpertRate,
        trajectory: tuple[Float[Array, "steps+1 states"], Float[Array, "steps inputs"]],
        domain: Box,
        *,
        disturbance: float = 0.0,
        noise: float = 0.0,
        cost_lipschitz: tuple[float, float] = (0.0, 0.0),
        cells: int = 10_000,
    ) -> Certificate:
        """How far the learner's trajectory can leave the expert's, and at what cost.

        At a step the input is wrong by at most `w = error + constant * disturbance`,
        and by `(own constant + expert's) d` more at a state that lies `d` outside the
        domain. The expert's loop carries it on: `e_t <= c gain sum b^(t-1-s) w_s`.
        While the tube stays inside the domain this is below `c gain w / (1 - b)`;
        where it leaves, the bound grows as a small-gain argument says.

        Args:
            system: Has `step(x, u)` and `cost(x, u)`; run once without disturbance.
            expert: The constants of its loop.
            trajectory: The expert's states and inputs from the start of interest.
            domain: The box on which the learning error is bounded.
            disturbance: Largest Euclidean error of a measured state, not negative.
            noise: As in `learning_error`.
            cost_lipschitz: Constants of `cost` in state and input, near the trajectory.
            cells: As in `learning_error`.

        Returns:
            A certificate; its value bounds every `|x_t - expert's x_t|` under any
            disturbance, and is infinite for an unstable loop. Details: `deviations`,
            the bound at each time; `uniform`, the bound for all times inside the
            domain; `inside`, whether the tube stays there; `learning_error`;
            `regret`, a bound of the cost's growth; `attained` and `attained_regret`,
            both without a disturbance.

        Raises:
            ValueError: A trajectory whose shapes do not fit or that is not finite, a
                negative disturbance or cost constant, or as `learning_error`.

        Source: derived here after arXiv:2103.16629.
        """
        owner = "certificate"
        states, inputs = (jnp.asarray(a, self.points.dtype) for a in trajectory)
        check_shape(owner, "trajectory", states, (None, self.points.shape[1]))
        inputs = inputs[:, None] if inputs.ndim == 1 else inputs
        shape = (states.shape[0] - 1, self.inputs.shape[1])
        check_shape(owner, "trajectory", inputs, shape)
        for part in (states, inputs):
            check_finite(owner, "trajectory", part)
        check_nonnegative(owner, "disturbance", disturbance)
        check_nonnegative(owner, "cost_lipschitz", cost_lipschitz)
        error = self.learning_error(expert, domain, noise=noise, cells=cells).value
        numbers = [
            jnp.asarray(v, self.points.dtype) for v in (disturbance, *cost_lipschitz)
        ]
        deviations, details = _tube(
            self.lipschitz, expert, error, _margins(states, domain), *numbers
        )
        inputs = inputs[:, 0] if self.scalar else inputs
        measured = _attained(self, system, states, inputs)
        return Certificate(
            "trajectory deviation",
            jnp.max(deviations),
            proof=expert.proof,
            statement="|x_t - expert's x_t| <= value at every time of the trajectory, "
            "for every disturbance of the measured states within the given size",
            details={"deviations": deviations, "learning_error": error}
            | details
            | measured,
        )


def lipschitz_policy(
    X: Float[Array, "points states"],
    U: Float[Array, "points ..."],
    alpha: float | Float[Array, ""],
    *,
    extension: Literal["mcshane", "kirszbraun"] | Callable = "mcshane",
    stretch: float | None = None,
    tol: float | None = None,
    optimiser: optax.GradientTransformation | None = None,
    steps: int = 2000,
) -> LipschitzPolicy:
    """The policy with a Lipschitz constant that is nearest to demonstrations.

    Minimises `mean |u_i - policy(x_i)|^2` over all policies with constant `alpha`: a
    convex program in the values at the demonstrations, then an extension. With N
    demonstrations of m inputs it takes some tens of Newton steps of `(N m)^3 / 3`
    flops; a call of the policy then costs one pass over the demonstrations.

    Args:
        X: Demonstrated states.
        U: The expert's inputs at these, (points,) or (points, inputs). The same state
            may stand twice with different inputs: no policy interpolates them, and
            `residuals` says by how much.
        alpha: The constant, in inputs per state, Euclidean norms, not negative. 0 gives
            the mean of the inputs.
        extension: `"mcshane"`: explicit; m inputs have the constant `sqrt(m) alpha`.
            `"kirszbraun"`: keeps `alpha`, a small quadratic program at each call. Or an
            Equinox module from states to inputs whose attribute `lipschitz` bounds its
            constant at all weights: it is scaled to `alpha` and trained.
        stretch: Hold only a spanner of the pairs to the constant, with paths of at most
            this factor, above 1; for many demonstrations, outside jit. The extension
            has its constant nevertheless, and `fit` says what the rest costs.
        tol: How far the mean squared error may lie above the least, in units of the
            inputs' variance. Default: the root of the dtype's rounding unit.
        optimiser: For a module; Adam at 1e-2 if left out.
        steps: For a module: gradient steps on all demonstrations.

    Returns:
        A `LipschitzPolicy`. Where `fit` is not met the program was not solved, which
        leaves its constant and its other certificates as they are.

    Raises:
        TypeError: A module without the attribute `lipschitz`, or arrays that are not
            floating.
        ValueError: Shapes that do not fit, no demonstrations, numbers that are not
            finite, a negative `alpha`, or `stretch` not above 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import lipschitz_policy
        >>> X = jnp.linspace(-1.0, 1.0, 5)[:, None]
        >>> policy = lipschitz_policy(X, 2.0 * X, 1.0, extension="kirszbraun")
        >>> round(float(policy(jnp.array([0.25]))[0]), 3), float(policy.lipschitz)
        (0.25, 1.0)

    Source:
        A. A. Al Makdah, V. Krishnan and F. Pasqualetti, 2021, "Learning Lipschitz
        Feedback Policies from Expert Demonstrations: Closed-Loop Guarantees,
        Generalization and Robustness", arXiv:2103.16629.

    Differences:
        The program is solved by augmented Lagrangians with Newton steps
        (`varan.lipschitz._lipschitz_regression`); the constants of the closed-loop
        bounds are derived here.
    """
    owner = "lipschitz_policy"
    x, u, scalar = _checked_data(owner, X, U)
    check_nonnegative(owner, "alpha", alpha)
    constant = jnp.asarray(alpha, x.dtype)
    tol = float(np.sqrt(jnp.finfo(x.dtype).eps)) if tol is None else tol
    check_positive(owner, "tol", tol)
    # The values' last digits move the loss by the root of their number.
    inner = jnp.asarray(tol / (4 * len(x) ** 0.5), x.dtype)
    fitted = fit_values(x, u, constant, _pairs(owner, x, stretch), inner)
    goal = tol * jnp.mean(jnp.sum((u - jnp.mean(u, 0, keepdims=True)) ** 2, 1))
    if isinstance(extension, str):
        check_choice(owner, "extension", extension, ("mcshane", "kirszbraun"))
        kind = McShane if extension == "mcshane" else Kirszbraun
        function = kind(x, fitted.values, constant)
    else:
        function = _trained(owner, extension, x, u, constant, optimiser, steps)
        goal = None
    residuals = _residuals(function, x, u)
    loss = jnp.mean(residuals**2)
    fit = Certificate(
        "optimality gap",
        jnp.maximum(loss - 2 * fitted.lower / len(x), 0),
        tol=goal,
        proof=True,
        statement="mean |u_i - policy(x_i)|^2 is at most value above the least of all "
        "policies with the constant alpha",
        details={
            "loss": loss,
            "largest_residual": jnp.max(residuals),
            "newton_steps": fitted.steps,
        },
    )
    return LipschitzPolicy(function, x, u, fit, scalar)


def _checked_data(owner, states, inputs):
    """States and inputs as matrices of one dtype, and whether inputs were scalars."""
    states, inputs = jnp.asarray(states), jnp.asarray(inputs)
    for name, array in (("X", states), ("U", inputs)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"{owner}: `{name}` must hold floating numbers (got {array.dtype}). "
                "Convert it, for instance with jnp.asarray(values, float)."
            )
        check_nonempty(owner, name, array)
        check_finite(owner, name, array)
    check_shape(owner, "X", states, (None, None))
    scalar = inputs.ndim == 1
    inputs = (inputs[:, None] if scalar else inputs).astype(states.dtype)
    check_shape(owner, "U", inputs, (states.shape[0], None))
    return states, inputs, scalar


def _pairs(owner, x, stretch):
    if stretch is None:
        return jnp.asarray(all_pairs(len(x)))
    if not stretch > 1:
        raise ValueError(
            f"{owner}: `stretch` must be above 1 (got {stretch}). Leave it out to hold "
            "all pairs to the constant."
        )
    if is_traced(x):
        raise ValueError(
            f"{owner}: `stretch` needs concrete states (got traced ones). Leave it out "
            "under jit."
        )
    return jnp.asarray(spanner(np.asarray(x), stretch))


def _trained(owner, module, x, u, constant, optimiser, steps):
    """A module scaled to the constant and fitted to the data."""
    if not (isinstance(module, eqx.Module) and hasattr(module, "lipschitz")):
        raise TypeError(
            f"{owner}: `extension` must be 'mcshane', 'kirszbraun' or an Equinox "
            f"module with an attribute `lipschitz` (got {type(module).__name__}). Give "
            "it one that bounds its constant."
        )
    if steps < 1:
        raise ValueError(f"{owner}: `steps` must be at least 1 (got {steps}).")

    offset = jnp.mean(u, 0)

    def loss(module, batch):
        states, inputs = batch
        found = jax.vmap(ScaledModule(module, constant, offset))(states)
        return jnp.mean(jnp.sum((found - inputs) ** 2, 1))

    optimiser = optax.adam(1e-2) if optimiser is None else optimiser
    state = start_training(module, optimiser, key=jax.random.key(0))
    settings = {"epochs": steps, "batch_size": len(x)}
    trained = train_epochs(state, loss, (x, u), optimiser, **settings)[0].model
    return ScaledModule(trained, constant, offset)


@eqx.filter_jit
def _residuals(function, points, inputs):
    return jnp.sqrt(jnp.sum((jax.vmap(function)(points) - inputs) ** 2, 1))


def _grid(domain, cells):
    """Centres of equal cells of a box, and how far a cell reaches from its centre."""
    sides = domain.upper - domain.lower
    each = math.ceil(cells ** (1 / sides.size))
    ticks = (jnp.arange(each, dtype=sides.dtype) + 0.5) / each
    axes = jnp.meshgrid(*[ticks] * sides.size, indexing="ij")
    share = jnp.stack([axis.reshape(-1) for axis in axes], 1)
    centres = domain.lower[None] + share * sides[None]
    return centres, jnp.sqrt(jnp.sum((sides / (2 * each)) ** 2))


@jax.jit
def _covered(grid, points, offsets, slope):
    """The largest over the grid of the least bound, and of the least distance."""

    def at(centre):
        distance = jnp.sqrt(jnp.sum((points - centre[None]) ** 2, 1))
        return jnp.min(offsets + slope * distance), jnp.min(distance)

    error, distance = jax.lax.map(at, grid, batch_size=256)
    return jnp.max(error), jnp.max(distance)


def _margins(states, domain):
    """How deep in the box each state lies; outside, minus the distance."""
    inside = jnp.minimum(states - domain.lower[None], domain.upper[None] - states)
    depth = jnp.min(inside, 1)
    outside = jnp.sqrt(jnp.sum(jnp.minimum(inside, 0) ** 2, 1))
    return jnp.where(depth >= 0, depth, -outside)


@eqx.filter_jit
def _tube(constant, expert, error, margins, disturbance, state_cost, input_cost):
    """The bound of the deviation at each time, and what follows from it."""
    dtype = margins.dtype
    over, rate, gain, lipschitz = (
        v.astype(dtype)
        for v in (expert.overshoot, expert.rate, expert.input_gain, expert.lipschitz)
    )
    nominal = error + constant * disturbance
    outward = 1 + 64 * float(jnp.finfo(dtype).eps)

    def step(total, margin):
        # 0 * inf: before the first step even an unstable loop has not moved.
        deviation = jnp.where(total > 0, over * gain * total, 0) * outward
        beyond = jnp.maximum(deviation - margin, 0)
        wrong = nominal + (constant + lipschitz) * beyond
        return (rate * total + wrong) * outward, (deviation, wrong)

    _, (deviations, wrongs) = jax.lax.scan(step, jnp.zeros((), dtype), margins)
    uniform = over * gain * nominal / (1 - rate) * outward
    inputs = (wrongs + lipschitz * deviations)[:-1]
    regret = state_cost * jnp.sum(deviations[:-1]) + input_cost * jnp.sum(inputs)
    return deviations, {
        "uniform": jnp.where(rate < 1, uniform, jnp.inf),
        "inside": jnp.all(deviations <= margins),
        "regret": regret * outward,
    }


@eqx.filter_jit
def _attained(policy, system, states, inputs):
    """The deviation and the regret of the policy on the system, undisturbed."""

    def step(x, _):
        u = policy(x)
        return system.step(x, u), (x, system.cost(x, u))

    last, (path, costs) = jax.lax.scan(step, states[0], None, len(inputs))
    path = jnp.concatenate([path, last[None]])
    expert = jax.vmap(system.cost)(states[:-1], inputs)
    return {
        "attained": jnp.max(jnp.sqrt(jnp.sum((path - states) ** 2, 1))),
        "attained_regret": jnp.sum(costs) - jnp.sum(expert),
    }
