"""Expectations of SAM and of its SDE, without drawing a single random number.

u(t, x), the expectation of a function at the horizon when started at x at time t, obeys
a backward recursion for an algorithm (the mean over the batches of u at the next point)
and Kolmogorov's backward equation for a diffusion. Both are solved by collocation with
polynomials in a square that moves with the mean path, so that errors of O(eta) show
undisturbed by sampling. For linear regression the moments close, and are exact.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.polynomial import chebyshev

from varan.sharpness import SamSDE, dnsam, sam, usam

NODES = 7
HALF_WIDTH = 0.25
HORIZON = 1.0
RK_STEPS = 100
METHODS = {"usam": usam, "sam": sam, "dnsam": dnsam}


def algorithm_step(sde: SamSDE) -> Callable:
    """One step of the optimiser itself, `(x, batch) -> x`."""
    gradient = jax.grad(sde.loss)
    method = METHODS[sde.variant](optax.sgd(sde.stepsize), sde.rho)

    def step(x, batch):
        updates, _ = method.update(
            gradient(x, batch),
            method.init(x),
            x,
            grad_fn=lambda y, i: gradient(y, batch),
            full_grad_fn=jax.grad(sde.mean_loss),
        )
        return x + updates

    return step


def algorithm_expectation(sde: SamSDE, start, steps, most_steps: int):
    """E f(x_K) of the algorithm in two dimensions, K = `steps` <= `most_steps`."""
    step = algorithm_step(sde)
    square, _, to_coefficients = _collocation()

    def mean_step(x):
        return jnp.mean(jax.vmap(step, (None, 0))(x, sde.batches), axis=0)

    def record(k, centres):
        return centres.at[k + 1].set(mean_step(centres[k]))

    centres = jnp.zeros((most_steps + 1, 2), start.dtype).at[0].set(start)
    centres = jax.lax.fori_loop(0, steps, record, centres)
    points = HALF_WIDTH * square

    def back(number, values):
        k = steps - 1 - number
        after = jax.vmap(jax.vmap(step, (None, 0)), (0, None))(
            centres[k][None, :] + points, sde.batches
        )
        local = (after - centres[k + 1][None, None, :]) / HALF_WIDTH
        rows = _basis(local.reshape(-1, 2)).reshape(*local.shape[:2], -1)
        return jnp.mean(rows @ (to_coefficients @ values), axis=1)

    last = jax.vmap(sde.mean_loss)(centres[steps][None, :] + points)
    values = jax.lax.fori_loop(0, steps, back, last)
    return _basis(jnp.zeros((1, 2)))[0] @ (to_coefficients @ values)


def sde_expectation(sde: SamSDE, start, *, drift=None, noise=1.0):
    """E f(X_T) of the diffusion in two dimensions.

    `drift` replaces the SDE's own; `noise` multiplies its covariance.
    """
    drift = sde.drift if drift is None else drift
    square, derivatives, to_coefficients = _collocation()
    points = HALF_WIDTH * square

    def backward(state):
        centre, values = state
        x = centre[None, :] + points
        move = jax.vmap(drift)(x) - drift(centre)[None, :]
        covariance = noise * sde.stepsize * jax.vmap(sde.covariance)(x)
        slopes = jnp.stack([d @ values for d in derivatives], axis=1)
        curvatures = jnp.stack([d @ slopes for d in derivatives], axis=1)
        change = jnp.sum(move * slopes, axis=1) / HALF_WIDTH
        change = change + jnp.sum(covariance * curvatures, (1, 2)) / 2 / HALF_WIDTH**2
        return -drift(centre), change

    end = _integrate(drift, start)
    last = jax.vmap(sde.mean_loss)(end[None, :] + points)
    centre, values = _integrate(backward, (end, last))
    local = (start - centre) / HALF_WIDTH
    return _basis(local[None, :])[0] @ (to_coefficients @ values)


def _integrate(velocity, start):
    """Classical Runge-Kutta: smooth, not stiff, and quick to compile."""
    h = HORIZON / RK_STEPS

    def ahead(state, slope, size):
        return jax.tree.map(lambda x, v: x + size * v, state, slope)

    def step(state, _):
        first = velocity(state)
        second = velocity(ahead(state, first, h / 2))
        third = velocity(ahead(state, second, h / 2))
        fourth = velocity(ahead(state, third, h))
        mean = jax.tree.map(
            lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, first, second, third, fourth
        )
        return ahead(state, mean, h), None

    return jax.lax.scan(step, start, length=RK_STEPS)[0]


def _collocation():
    """Chebyshev nodes on the square, differentiation there, values to coefficients."""
    nodes = chebyshev.chebpts1(NODES)
    values = chebyshev.chebvander(nodes, NODES - 1)
    slopes = np.stack(
        [chebyshev.chebval(nodes, chebyshev.chebder(row)) for row in np.eye(NODES)],
        axis=1,
    )
    one = slopes @ np.linalg.inv(values)
    derivatives = [np.kron(one, np.eye(NODES)), np.kron(np.eye(NODES), one)]
    square = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 2)
    inverse = np.linalg.inv(np.kron(values, values))
    return (
        jnp.asarray(square),
        [jnp.asarray(derivative) for derivative in derivatives],
        jnp.asarray(inverse),
    )


def _basis(points):
    """Products of Chebyshev polynomials at points, one row each; also outside."""

    def polynomials(x):
        rows = [jnp.ones_like(x), x]
        while len(rows) < NODES:
            rows.append(2 * x * rows[-1] - rows[-2])
        return jnp.stack(rows, axis=-1)

    first, second = polynomials(points[:, 0]), polynomials(points[:, 1])
    return (first[:, :, None] * second[:, None, :]).reshape(len(points), -1)


def affine_algorithm_moments(sde: SamSDE, start, steps):
    """E of (x, 1)(x, 1)' after `steps` steps that are affine in x; exact."""
    step = algorithm_step(sde)
    origin = jnp.zeros_like(start)

    def matrix(batch):
        shift = step(origin, batch)
        return _affine(jax.jacfwd(step)(origin, batch), shift, 1.0)

    maps = jax.vmap(matrix)(sde.batches)

    def one(_, moments):
        return jnp.mean(maps @ moments @ jnp.swapaxes(maps, 1, 2), axis=0)

    return jax.lax.fori_loop(0, steps, one, augmented(start))


def affine_sde_generator(sde: SamSDE, dim: int):
    """The matrix G with d/dt m = G m, m the entries of E (X, 1)(X, 1)'; exact.

    For directions that are affine in x.
    """
    origin = jnp.zeros(dim)
    slopes, shifts = jax.jacfwd(sde.directions)(origin), sde.directions(origin)
    maps = jax.vmap(lambda slope, shift: _affine(slope, shift, 0.0))(slopes, shifts)
    drift = -jnp.mean(maps, axis=0)
    centred = maps + drift[None, :, :]
    eye = jnp.eye(dim + 1)
    noise = jnp.mean(jax.vmap(jnp.kron)(centred, centred), axis=0)
    return jnp.kron(drift, eye) + jnp.kron(eye, drift) + sde.stepsize * noise


def _affine(slope, shift, corner):
    last = jnp.zeros_like(shift)
    return jnp.block(
        [[slope, shift[:, None]], [last[None, :], jnp.full((1, 1), corner)]]
    )


def augmented(x):
    """(x, 1)(x, 1)'."""
    one = jnp.append(x, 1.0)
    return one[:, None] * one[None, :]
