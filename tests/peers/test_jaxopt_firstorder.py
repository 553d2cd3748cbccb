"""jaxopt's first-order solvers: same instances, same solutions and derivatives."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan import solve
from varan.firstorder import (
    BlockCoordinateDescent,
    MirrorDescent,
    ProximalGradient,
    scale_by_goldstein_linesearch,
)
from varan.operators import (
    project_box,
    project_kl_transport,
    project_simplex,
    project_transport,
    prox_elastic_net,
)
from varan.problems import (
    Composite,
    ElasticNet,
    GeneralisedLinear,
    GroupLasso,
    Logistic,
    Multinomial,
    SetConstrained,
)

jaxopt = pytest.importorskip("jaxopt")
from jaxopt import objective, projection, prox

N, D = 20, 4
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((N, D)))
Y = jnp.asarray(X @ jnp.array([2.0, -1.0, 0.3, 0.0]) + RNG.normal(size=N))
LABEL = jnp.where(Y > 0, 1.0, 0.0)
CLASS = jnp.asarray(RNG.integers(0, 3, N))
START = jnp.zeros(D)


def assert_same(ours, peer, data, atol=1e-7):
    """Values and Jacobians of two functions of the data."""
    for f in (lambda g: g, jax.jacrev):
        mine, its = (jax.jit(f(g))(data) for g in (ours, peer))
        np.testing.assert_allclose(mine, its, atol=atol)


def squares(w, data):
    return jnp.mean((X @ w - data) ** 2) / 2


def by_block(problem, gram=None):
    shape = (D, *problem.y.shape[1:])
    solver = BlockCoordinateDescent(gram=gram)
    return solve(problem, solver, jnp.zeros(shape), tol=1e-10, max_steps=5000).x


@pytest.mark.parametrize("acceleration", [True, False])
def test_proximal_gradient(acceleration):
    def ours(lam):
        problem = Composite(
            lambda w, lam: squares(w, Y),
            lambda v, t, lam: prox_elastic_net(v, lam[0], lam[1], t),
            lam,
        )
        solver = ProximalGradient(accelerate=acceleration)
        return solve(problem, solver, START, tol=1e-10).x

    peer = jaxopt.ProximalGradient(
        squares, prox.prox_elastic_net, tol=1e-11, maxiter=9000,
        acceleration=acceleration,
    )  # fmt: skip
    # Theirs weighs the squares by the product of both numbers.
    assert_same(
        ours,
        lambda lam: peer.run(START, (lam[0], lam[1] / lam[0]), data=Y).params,
        jnp.array([0.2, 0.1]),
    )


def test_projected_gradient():
    def ours(y):
        problem = SetConstrained(squares, lambda v, y: project_box(v, -0.5, 0.5), y)
        return solve(problem, ProximalGradient(), START, tol=1e-10).x

    peer = jaxopt.ProjectedGradient(
        squares, projection.projection_box, tol=1e-11, maxiter=5000
    )
    assert_same(ours, lambda y: peer.run(START, (-0.5, 0.5), data=y).params, Y)


@pytest.mark.parametrize("gram", [True, False])
def test_block_coordinate_descent_on_the_lasso(gram):
    def ours(lam):
        return by_block(GeneralisedLinear(X, Y, penalty=ElasticNet(lam)), gram)

    peer = jaxopt.BlockCoordinateDescent(
        objective.least_squares, prox.prox_lasso, tol=1e-12, maxiter=5000
    )
    assert_same(ours, lambda lam: peer.run(START, lam, (X, Y)).params, jnp.array(0.2))


def test_block_coordinate_descent_on_the_sparse_logistic_model():
    def ours(lam):
        problem = GeneralisedLinear(X, LABEL, loss=Logistic(), penalty=ElasticNet(lam))
        return by_block(problem)

    peer = jaxopt.BlockCoordinateDescent(
        objective.binary_logreg, prox.prox_lasso, tol=1e-12, maxiter=20_000
    )
    # Theirs divides by the columns' curvatures summed, not averaged: many sweeps.
    assert_same(
        ours, lambda lam: peer.run(START, lam, (X, LABEL)).params, jnp.array(0.05)
    )


def test_block_coordinate_descent_on_rows():
    def ours(lam):
        problem = GeneralisedLinear(
            X,
            jax.nn.one_hot(CLASS, 3, dtype=X.dtype),
            loss=Multinomial(),
            penalty=GroupLasso(lam),
            unique=True,
        )
        return by_block(problem)

    peer = jaxopt.BlockCoordinateDescent(
        objective.multiclass_logreg, prox.prox_group_lasso, tol=1e-12, maxiter=20_000
    )
    start = jnp.zeros((D, 3))
    assert_same(
        ours,
        lambda lam: peer.run(start, lam, (X, CLASS)).params,
        jnp.array(0.05),
        atol=1e-6,
    )


def test_mirror_descent_on_the_simplex():
    start = jnp.full(D, 1 / D)

    def ours(y):
        problem = SetConstrained(squares, lambda v, y: project_simplex(v), y)
        return solve(problem, MirrorDescent(0.5), start, tol=1e-9, max_steps=3000).x

    peer = jaxopt.MirrorDescent(
        squares,
        jaxopt.MirrorDescent.make_projection_grad(
            lambda y, _: jax.nn.softmax(y), jnp.log
        ),
        stepsize=0.5,
        tol=1e-10,
        maxiter=30_000,
    )
    y = X @ jnp.array([0.4, 0.3, 0.2, 0.1])
    assert_same(ours, lambda y: peer.run(start, None, data=y).params, y, atol=1e-6)


def test_mirror_descent_on_the_transport_polytope():
    cost = jnp.asarray(np.random.default_rng(1).uniform(size=(3, 3)))
    sums = jnp.full(3, 1 / 3)
    start = sums[:, None] * sums[None, :]

    def energy(P, cost):
        return jnp.sum(P * cost + 0.3 * jax.scipy.special.xlogy(P, P))

    def ours(cost):
        problem = SetConstrained(
            energy, lambda V, cost: project_transport(V, sums, sums), cost
        )
        solver = MirrorDescent(
            1.5, projection=lambda y, cost: project_kl_transport(y, sums, sums)
        )
        return solve(problem, solver, start, tol=1e-9).x

    peer = jaxopt.MirrorDescent(
        energy,
        jaxopt.MirrorDescent.make_projection_grad(
            lambda y, marginals: projection.kl_projection_transport(y, marginals),
            jnp.log,
        ),
        stepsize=1.5,
        tol=1e-7,
        maxiter=200,
        implicit_diff=False,
    )
    mine, its = ours(cost), peer.run(start, (sums, sums), cost=cost).params
    # Their projection stops at marginals that are wrong by a thousandth.
    np.testing.assert_allclose(mine, its, atol=1e-3)
    np.testing.assert_allclose(jnp.sum(mine, 1), sums, atol=1e-12)


def batch_loss(w, rows):
    return jnp.mean((X[rows] @ w - (X @ jnp.arange(1.0, 5.0))[rows]) ** 2) / 2


BATCHES = jnp.asarray(np.random.default_rng(2).integers(0, N, (60, 8)))


def iterates_of_optax(method):
    def step(carry, rows):
        w, state = carry
        value, grad = jax.value_and_grad(batch_loss)(w, rows)
        updates, state = method.update(
            grad, state, w, value=value, grad=grad,
            value_fn=lambda w: batch_loss(w, rows),
        )  # fmt: skip
        w = optax.apply_updates(w, updates)
        return (w, state), w

    return jax.lax.scan(step, (START, method.init(START)), BATCHES)[1]


def iterates_of_jaxopt(solver):
    def step(carry, rows):
        w, state = solver.update(*carry, rows)
        return (w, state), w

    state = solver.init_state(START, BATCHES[0])
    return jax.lax.scan(step, (START, state), BATCHES)[1]


def chained(method, momentum):
    return optax.chain(method, optax.trace(momentum)) if momentum else method


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("variant", ["SPS_max", "SPS+"])
def test_polyak_sgd_is_optax(variant, momentum):
    longest = {"SPS_max": 0.7, "SPS+": math.inf}[variant]
    name = {"SPS_max": "sps", "SPS+": "sps+"}[variant]
    peer = jaxopt.PolyakSGD(
        batch_loss, variant=variant, max_stepsize=0.7, momentum=momentum
    )
    ours = chained(optax.polyak_sgd(longest, variant=name), momentum)
    np.testing.assert_allclose(
        iterates_of_optax(ours), iterates_of_jaxopt(peer), atol=1e-10
    )


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("option", ["increase", "conservative", "goldstein"])
def test_armijo_sgd_is_optax_and_goldsteins_search_is_ours(option, momentum):
    peer = jaxopt.ArmijoSGD(batch_loss, reset_option=option, momentum=momentum)
    search = (
        scale_by_goldstein_linesearch()
        if option == "goldstein"
        else optax.scale_by_backtracking_linesearch(
            15,
            slope_rtol=0.1,
            increase_factor={"increase": 1.5, "conservative": 1.0}[option],
        )
    )
    ours = iterates_of_optax(chained(optax.chain(optax.sgd(1.0), search), momentum))
    theirs = iterates_of_jaxopt(peer)
    if option != "goldstein":
        np.testing.assert_allclose(ours, theirs, atol=1e-8)
        return
    # Between a step too long and one too short ours halves; theirs may go on for ever.
    # Both interpolate the data.
    exact = jnp.arange(1.0, 5.0)
    assert jnp.linalg.norm(ours[-1] - exact) < 1e-3
    assert jnp.linalg.norm(ours[-1] - exact) <= 2 * jnp.linalg.norm(theirs[-1] - exact)
