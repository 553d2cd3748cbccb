"""Sparse transport: a limit on every column's nonzeros through a tractable dual.

The claim: maximising a smooth concave (semi-)dual gives plans whose columns have at
most k nonzeros, between unregularised transport (k = 1) and quadratically regularised
transport (k = m), at the price of slower convergence for smaller k. Two parts:

- two Gaussian clouds in the plane, for every k and gamma: the limit, the marginals, the
  two ends of the range against an assignment solver and a projection on the transport
  polytope (Newton's method, no dual of ours), the order in k, the steps, and Sinkhorn's
  plan cut to its k largest entries a column as the naive rival, at its best epsilon;
- a toy router: tokens and experts with a capacity that just suffices, against the
  greedy router that drops what exceeds it and the best balanced assignment.

Kept: the objectives, L-BFGS on the semi-dual. Given up: vision mixtures of experts on
JFT-300M. Refuted by: a column beyond the limit, wrong ends of the range, marginals
missed where the optimum is no tie, or fewer steps for smaller k.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from varan.claims import Curve, Measurements
from varan.operators import project_transport
from varan.transport import entropic_transport, route_tokens, sparse_ot

TOL = 1e-6
MAX_STEPS = 1000
# Below this the last entry kept and the first dropped agree to half the digits.
TIE = 1.5e-8
# The rival may choose; units of the largest cost.
EPSILONS = (1e-3, 1e-2, 1e-1)


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Both parts, for one seed."""
    rng = np.random.default_rng(seed)
    numbers: dict[str, float] = {}
    curves = _clouds(scale, rng, numbers)
    _router(scale, rng, numbers)
    return Measurements(numbers, curves)


def _clouds(scale, rng, numbers):
    n, limits = scale["n"], scale["limits"]
    x, y = rng.normal(size=(n, 2)), 1 + 0.7 * rng.normal(size=(n, 2))
    cost = ((x[:, None] - y[None]) ** 2).sum(-1)
    cost = jnp.asarray(cost / cost.max())
    excess, clear, ties = 0, [0.0], 0
    ends, slopes, steps = [0.0], [0.0], {k: [] for k in limits}
    for gamma in scale["gammas"]:
        values = []
        for k in limits:
            run = sparse_ot(
                cost, max_nonzeros=k, gamma=gamma, tol=TOL, max_steps=MAX_STEPS
            )
            plan = np.asarray(run.plan)
            excess = max(excess, int((plan > 0).sum(0).max()) - k)
            margin = float(run.certificate.details["tie_margin"])
            ties += margin <= TIE
            if margin > TIE:
                clear.append(float(run.certificate.value))
            values.append(float(run.value))
            steps[k].append(int(run.stats["steps"]))
            if k == 1:
                ends.append(abs(values[-1] - _least(cost, gamma)))
            if k == n:
                ends.append(abs(values[-1] - _quadratic(cost, gamma)))
        slopes += list(np.diff(values))
    numbers["cardinality_excess"] = float(excess)
    numbers["marginal_error_without_tie"] = max(clear)
    numbers["ties"] = float(ties)
    numbers["end_error"] = max(ends)
    numbers["largest_increase_in_k"] = float(max(slopes))
    second = min(k for k in limits if k > 1)
    for k in limits:
        numbers[f"steps_{k}"] = float(np.mean(steps[k]))
    numbers["step_ratio"] = float(np.mean(steps[second]) / np.mean(steps[max(limits)]))
    if "rival_limit" in scale:
        numbers["truncated_sinkhorn_error"] = _truncated(cost, scale["rival_limit"])
    return [
        Curve(
            list(limits),
            [float(np.mean(steps[k])) for k in limits],
            "L-BFGS on the semi-dual",
            "steps",
            "nonzeros allowed in a column",
            f"steps to a marginal error of {TOL:g} (at most {MAX_STEPS})",
            log_x=True,
            log_y=True,
        )
    ]


def _least(cost, gamma):
    """The least transport cost of equal masses, and the constant of the quadratic."""
    n = cost.shape[0]
    matrix = np.asarray(cost)
    return matrix[linear_sum_assignment(matrix)].mean() + gamma / (2 * n)


def _quadratic(cost, gamma):
    mass = jnp.full(cost.shape[0], 1 / cost.shape[0])
    plan = project_transport(-cost / gamma, mass, mass)
    return float(jnp.sum(cost * plan + gamma / 2 * plan**2))


def _truncated(cost, k):
    """The row error of Sinkhorn's plan cut to k entries a column, columns refilled."""
    errors = []
    for epsilon in EPSILONS:
        plan = entropic_transport(cost, epsilon=epsilon, method="newton").plan
        kept = jnp.where(plan >= jax.lax.top_k(plan.T, k)[0][:, -1][None, :], plan, 0)
        kept = kept / kept.sum(0)[None, :] / cost.shape[1]
        errors.append(float(jnp.sum(jnp.abs(kept.sum(1) - 1 / cost.shape[0]))))
    return min(errors)


def _router(scale, rng, numbers):
    tokens, experts = scale["tokens"], scale["experts"]
    capacity = tokens // experts
    # Some experts are liked by all: the greedy router overloads them.
    scores = rng.normal(size=(tokens, experts)) + rng.normal(size=experts)
    routing = route_tokens(jnp.asarray(scores), capacity, gamma=scale["router_gamma"])
    used = np.asarray(routing.weights) > 0
    served = np.unique(np.asarray(routing.tokens)[used])
    numbers["router_excess"] = float(max(used.sum(1).max() - capacity, 0))
    numbers["router_unserved"] = float(tokens - served.size) / tokens
    numbers["router_error"] = float(routing.solution.certificate.value)
    choice = scores.argmax(1)
    load = np.bincount(choice, minlength=experts)
    numbers["greedy_unserved"] = float(np.maximum(load - capacity, 0).sum()) / tokens
    places = np.repeat(scores, capacity, axis=1)
    best = places[linear_sum_assignment(-places)].mean()
    got = float(np.sum(np.asarray(routing.solution.plan) * scores))
    numbers["router_score_below_best"] = best - got
