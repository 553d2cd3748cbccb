"""The stirred tank reactor against an accurate integrator."""

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from varan.data import cstr_sequences, cstr_trajectories


def reference(start, control):
    """The balances, written again, by an adaptive method."""

    def slope(_, state):
        c, t = state[0] + 1.9537, state[1] + 401.8727
        reaction = 8.46e6 * np.exp(-5e4 / (8.314 * t)) * c * c
        return [
            5 * (4 + control[0] - c) - reaction,
            5 * (300 - t) + 1.15e4 / 231 * reaction + control[1] / 231,
        ]

    times = 5e-4 * np.arange(1, 11)
    return solve_ivp(slope, (0, 5e-3), start, t_eval=times, rtol=1e-9).y.T


def test_euler_follows_the_balances():
    starts = np.array([[0.5, -20.0], [-0.3, 30.0], [0.0, 0.0]])
    controls = np.array([[3.5, -5e5], [-2.0, 4e5], [0.0, 0.0]])
    found = cstr_trajectories(starts, controls)
    for run in range(3):
        exact = reference(starts[run], controls[run])
        # First order: some steps of 1e-4 h at slopes of up to 3e3 K/h.
        np.testing.assert_allclose(found[run, :, 0], exact[:, 0], atol=0.01)
        np.testing.assert_allclose(found[run, :, 1], exact[:, 1], atol=0.3)


def test_sequences_hold_start_and_control_and_what_follows():
    inputs, targets = cstr_sequences(50, seed=1)
    assert inputs.shape == (50, 10, 4) and targets.shape == (50, 10, 2)
    assert np.all(inputs == inputs[:, :1])
    temperature, concentration, heat, feed = inputs[:, 0].T
    starts = np.stack([concentration, temperature], 1)
    found = cstr_trajectories(starts, np.stack([feed, heat], 1))
    np.testing.assert_array_equal(targets, found[..., ::-1])
    matrix = np.array([[1060, 22], [22, 0.52]])
    assert np.all(np.einsum("ni,ij,nj->n", starts, matrix, starts) < 372)
    assert len(np.unique(inputs[:, 0], axis=0)) == 50
    assert set(np.abs(heat).round(3)) <= {5e5, round(5e5 / 3, 3)}
    again, _ = cstr_sequences(50, seed=1)
    np.testing.assert_array_equal(inputs, again)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cstr_sequences(0, 0), "`sequences` must be from 1 to 1"),
        (lambda: cstr_sequences(10**6, 0), "`sequences` must be from 1 to 1"),
        (
            lambda: cstr_trajectories(np.zeros((2, 3)), np.zeros((2, 2))),
            r"`starts` must have shape \(any, 2\)",
        ),
        (
            lambda: cstr_trajectories(np.zeros((2, 2)), np.zeros((1, 2))),
            r"`controls` must have shape \(2, 2\)",
        ),
        (
            lambda: cstr_trajectories(np.full((1, 2), np.nan), np.zeros((1, 2))),
            "`starts` must be finite",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
