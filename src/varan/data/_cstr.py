"""A stirred tank reactor: the trajectories that learned models of it are judged by."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from ..core._checks import check_finite, check_shape

# Units: h, m^3, K, kmol, kJ, kg.
_FLOW, _VOLUME, _FEED_TEMPERATURE = 5.0, 1.0, 300.0
_RATE, _ACTIVATION, _GAS = 8.46e6, 5e4, 8.314
_HEAT, _DENSITY, _CAPACITY = -1.15e4, 1000.0, 0.231
_FEED = 4.0
_STEADY = np.array([1.9537, 401.8727])
_STEP, _STEPS, _EVERY = 1e-4, 50, 5
_ELLIPSE, _LEVEL = np.array([[1060.0, 22.0], [22.0, 0.52]]), 372.0


def cstr_trajectories(
    starts: Float[np.ndarray, "runs 2"], controls: Float[np.ndarray, "runs 2"]
) -> Float[np.ndarray, "runs 10 2"]:
    """How a continuous stirred tank reactor moves from a start under a held control.

    A second-order exothermic reaction `A -> B`, concentration C and temperature T:

        dC/dt = F/V (C0 - C) - k0 exp(-E / R T) C^2
        dT/dt = F/V (T0 - T) - dH / (rho cp) k0 exp(-E / R T) C^2 + Q / (rho cp V)

    by forward Euler, fifty steps of 1e-4 h, every fifth kept. All numbers are
    deviations from the steady state C = 1.9537 kmol/m^3, T = 401.8727 K,
    with feed 4 kmol/m^3 and no heat.

    Args:
        starts: Deviations of C (kmol/m^3) and T (K) at time zero.
        controls: Deviations of the feed's concentration (kmol/m^3), to 3.5 in the
            data, and of the heat (kJ/h), to 5e5.

    Returns:
        The deviations of C and T after 5, 10, ..., 50 steps.

    Raises:
        ValueError: If the shapes do not fit or a number is not finite.

    Example:
        >>> import numpy as np
        >>> from varan.data import cstr_trajectories
        >>> rest = cstr_trajectories(np.zeros((1, 2)), np.zeros((1, 2)))
        >>> rest.shape, bool(np.max(np.abs(rest)) < 1e-3)
        ((1, 10, 2), True)

    Source: Z. Wang and Z. Wu, 2024, "Input Convex Lipschitz RNN: A Fast and Robust
        Approach for Engineering Tasks", arXiv:2401.07494, section 5.
    """
    starts, controls = np.asarray(starts, float), np.asarray(controls, float)
    check_shape("cstr_trajectories", "starts", starts, (None, 2))
    check_shape("cstr_trajectories", "controls", controls, starts.shape)
    check_finite("cstr_trajectories", "starts", starts)
    check_finite("cstr_trajectories", "controls", controls)
    state, kept = starts + _STEADY, []
    feed, heat = _FEED + controls[:, 0], controls[:, 1]
    for step in range(1, _STEPS + 1):
        state = state + _STEP * _slope(state, feed, heat)
        if step % _EVERY == 0:
            kept.append(state - _STEADY)
    return np.stack(kept, 1)


def cstr_sequences(
    sequences: int, seed: int
) -> tuple[Float[np.ndarray, "sequences 10 4"], Float[np.ndarray, "sequences 10 2"]]:
    """Inputs and targets for a recurrent model of the reactor.

    Starts are the points of a 100 x 100 grid (C from 0 to 6, T from 300 to 600) inside
    an ellipse around the steady state; controls are 4 x 4 values; from all pairs a
    random sample is drawn. The input, start and control, is the same at every step, as
    in the paper.

    Args:
        sequences: How many, at least 1 and at most what the grid has (some 12 000).
        seed: Of the sample.

    Returns:
        The inputs (T, C, heat, feed, as deviations, not scaled) and the trajectories
        (T, C).

    Raises:
        ValueError: If `sequences` is out of range.

    Example:
        >>> from varan.data import cstr_sequences
        >>> inputs, targets = cstr_sequences(5, seed=0)
        >>> inputs.shape, targets.shape
        ((5, 10, 4), (5, 10, 2))

    Source: Wang and Wu, 2024, arXiv:2401.07494, section 5.
    """
    grid = np.meshgrid(np.linspace(0, 6, 100), np.linspace(300, 600, 100))
    points = np.stack(grid, -1).reshape(-1, 2) - _STEADY
    inside = np.einsum("ni,ij,nj->n", points, _ELLIPSE, points) < _LEVEL
    points = points[inside]
    levels = np.meshgrid(np.linspace(-3.5, 3.5, 4), np.linspace(-5e5, 5e5, 4))
    controls = np.stack(levels, -1).reshape(-1, 2)
    most = len(points) * len(controls)
    if not 1 <= sequences <= most:
        raise ValueError(
            f"cstr_sequences: `sequences` must be from 1 to {most} (got {sequences})."
        )
    drawn = np.random.default_rng(seed).choice(most, sequences, replace=False)
    start, control = points[drawn % len(points)], controls[drawn // len(points)]
    # The paper's order: temperature first, the last control last.
    inputs = np.concatenate([start[:, ::-1], control[:, ::-1]], 1)
    inputs = np.repeat(inputs[:, None], _STEPS // _EVERY, axis=1)
    return inputs, cstr_trajectories(start, control)[..., ::-1]


def _slope(state, feed, heat):
    concentration, temperature = state.T
    reaction = _RATE * np.exp(-_ACTIVATION / (_GAS * temperature)) * concentration**2
    flow, warm = _FLOW / _VOLUME, _DENSITY * _CAPACITY
    return np.stack(
        [
            flow * (feed - concentration) - reaction,
            flow * (_FEED_TEMPERATURE - temperature)
            - _HEAT / warm * reaction
            + heat / (warm * _VOLUME),
        ],
        -1,
    )
