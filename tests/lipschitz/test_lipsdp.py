"""LipSDP beyond slopes: never below a pair of points, closed forms, the paper's LMI."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.lipschitz import LinearFractional, lipsdp
from varan.lipschitz._lipsdp_program import (
    FORMS,
    inequality,
    kept_by,
    ties_of,
    with_kept,
)

RNG = np.random.default_rng(0)
# Relative: what the barrier's tolerance of 1e-6 leaves, twice.
SOLVER = 2e-6


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[-1])


WEIGHTS = [normal(8, 4), normal(8, 8, seed=1), normal(3, 8, seed=2)]
DIRECTIONS = [RNG.normal(size=(4, 2)) for _ in range(2)]
DIRECTIONS = [v / np.linalg.norm(v, axis=1)[:, None] for v in DIRECTIONS]


def groupsort(z, group):
    return np.sort(z.reshape(len(z), -1, group), 2).reshape(z.shape)


def householder(z, layer):
    """Reflects a group where it lies on the negative side of its direction."""
    groups = z.reshape(len(z), -1, 2)
    along = np.einsum("bgi,gi->bg", groups, DIRECTIONS[layer])
    back = 2 * np.minimum(along, 0)[:, :, None] * DIRECTIONS[layer][None]
    return (groups - back).reshape(z.shape)


ACTIVATIONS = {
    "maxmin": lambda z, k: groupsort(z, 2),
    "groupsort": lambda z, k: groupsort(z, 4),
    "householder": householder,
    "nonexpansive": lambda z, k: groupsort(-z, 2),
    "relu": lambda z, k: np.maximum(z, 0),
}
SETTINGS = {"groupsort": {"group": 4}, "householder": {"directions": DIRECTIONS}}


def network(x, activation):
    for layer, weight in enumerate(WEIGHTS[:-1]):
        bias = normal(len(weight), seed=7 + layer)
        x = ACTIVATIONS[activation](x @ weight.T + bias[None], layer)
    return x @ WEIGHTS[-1].T


def largest_quotient(function, inputs, norm=2):
    """Over pairs near and far, half of them moved along signs."""
    x = np.random.default_rng(3).normal(size=(4000, inputs))
    step = np.random.default_rng(4).normal(size=x.shape)
    step[::2] = np.sign(step[::2])
    step *= np.geomspace(1e-3, 3, len(x))[:, None]
    moved = np.linalg.norm(function(x + step) - function(x), norm, 1)
    return np.max(moved / np.linalg.norm(step, norm, 1))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_constraints_hold_for_the_activation(activation):
    """Whatever the multipliers of what is kept, of any sign."""
    model = LinearFractional.feedforward([np.eye(8), np.eye(8)])
    group = {"groupsort": 4, "relu": 1}.get(activation, 2)
    kept = kept_by("test", (8,), activation, group, DIRECTIONS[:1])
    form = FORMS["slope" if activation == "relu" else "norm"]
    ties = ties_of((8,), group, "neuron")
    whole = with_kept(inequality(model, form, ties, slice(None), "l2"), kept)
    y = RNG.normal(size=len(whole.cost))
    free = np.isnan(whole.cost)
    y = np.where(free, y, np.abs(y)) * (whole.cost != 1)
    x, other = RNG.normal(size=(2, 200, 8))
    values = [ACTIVATIONS[activation](z, 0) for z in (x, other)]
    u = np.concatenate([x - other, values[0] - values[1]], 1)
    assert np.max(np.einsum("bi,ij,bj->b", u, whole.weighed(y), u)) <= 1e-9
    if free.any():  # and of no sign at all: what is kept is kept exactly
        only = whole.weighed(np.where(free, y, 0))
        assert np.max(np.abs(np.einsum("bi,ij,bj->b", u, only, u))) <= 1e-9


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_between_samples_and_the_product(activation):
    found = lipsdp(WEIGHTS, activation=activation, **SETTINGS.get(activation, {}))
    sampled = largest_quotient(lambda x: network(x, activation), 4)
    assert found.kind == "proof" and found.gap[0] <= 1e-6
    details = found.certificate.details
    assert details["least_eigenvalue"] >= details["required"] > 0
    product = np.prod([np.linalg.norm(w, 2) for w in WEIGHTS])
    assert sampled <= found.bound <= product * (1 + SOLVER)
    assert sampled >= 0.3 * found.bound  # and not by being far off


def test_more_knowledge_is_tighter():
    kept, bare = (lipsdp(WEIGHTS, activation=a) for a in ("maxmin", "nonexpansive"))
    layers = lipsdp(WEIGHTS, activation="nonexpansive", structure="layer").bound
    product = np.prod([np.linalg.norm(w, 2) for w in WEIGHTS])
    assert kept.bound < 0.99 * bare.bound and bare.bound < layers
    # One multiplier a layer and no more is the product of norms.
    np.testing.assert_allclose(layers, product, rtol=SOLVER)


def test_pairs_are_one_relu_each():
    """Max and min share a ReLU: the same constraint. Written with two, they lose."""
    identity = [np.eye(4), np.eye(4)]
    np.testing.assert_allclose(lipsdp(identity, tol=1e-9).bound, 1, rtol=1e-6)
    split = _rewritten(identity, _SPLIT)
    np.testing.assert_allclose(
        lipsdp(split, activation="relu", tol=1e-9).bound, np.sqrt(2), rtol=1e-6
    )
    shared = lipsdp(_rewritten(WEIGHTS, _SHARED), activation="relu")
    np.testing.assert_allclose(shared.bound, lipsdp(WEIGHTS).bound, rtol=SOLVER)
    x = RNG.normal(size=(50, 2))
    for skip, out, inner in (_SPLIT, _SHARED):
        np.testing.assert_allclose(
            x @ skip.T + np.maximum(x @ inner.T, 0) @ out.T,
            np.sort(x, 1)[:, ::-1],
            atol=1e-12,
        )


# (H, G, W) such that max and min of a pair are H x + G relu(W x).
_SPLIT = (
    np.array([[0.0, 1.0], [0.0, 1.0]]),
    np.array([[1.0, 0.0], [0.0, -1.0]]),
    np.array([[1.0, -1.0], [-1.0, 1.0]]),
)
_SHARED = (
    np.array([[0.0, 1.0], [1.0, 0.0]]),
    np.array([[1.0], [-1.0]]),
    np.array([[1.0, -1.0]]),
)


def _rewritten(weights, pair):
    blocks = []
    for weight in weights[:-1]:
        skip, out, inner = (np.kron(np.eye(len(weight) // 2), m) for m in pair)
        blocks.append((skip @ weight, out, inner @ weight))
    return LinearFractional.residual(blocks, head=weights[-1])


def test_linear_where_sums_are_all_that_counts():
    """Adding up the groups leaves a linear map, whose norm is the constant."""
    head = np.kron(normal(3, 2, seed=5), np.ones((1, 4)))
    found = lipsdp([WEIGHTS[0], head], activation="groupsort", group=4, tol=1e-9)
    np.testing.assert_allclose(found.bound, np.linalg.norm(head @ WEIGHTS[0], 2), 1e-6)


def test_order_within_a_group_does_not_matter():
    order = np.array([1, 0, 3, 2, 5, 4, 7, 6])
    other = [WEIGHTS[0][order], WEIGHTS[1][order], WEIGHTS[2]]
    bounds = [lipsdp(w).bound for w in (WEIGHTS, other)]
    np.testing.assert_allclose(*bounds, rtol=SOLVER)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_paper_s_inequality_has_the_same_value(norm):
    """With gamma, nu and tau as unknowns, by another solver."""
    pytest.importorskip("cvxpy")
    weights = [WEIGHTS[0], WEIGHTS[2][:1]]
    ours, theirs = (
        lipsdp(weights, norm=norm, solver=s).per_row for s in ("barrier", "clarabel")
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_the_inequality_as_the_paper_writes_it():
    """One layer; sums kept are enforced by nu = tau large."""
    w1, w2 = WEIGHTS[0], WEIGHTS[2]
    found = lipsdp([w1, w2], activation="groupsort", group=4)
    t = np.diag(np.repeat(found.multipliers[0], 4))
    p = 1e5 * np.kron(np.eye(2), np.ones((4, 4)))
    rho = float(found.bound) ** 2
    matrix = np.block(
        [
            [w1.T @ (t - 2 * p) @ w1 - rho * np.eye(4), w1.T @ (p + p)],
            [(p + p) @ w1, -t - 2 * p + w2.T @ w2],
        ]
    )
    assert np.linalg.eigvalsh(matrix)[-1] <= 1e-4
    # It is rho that makes it so.
    matrix[:4, :4] += 0.02 * rho * np.eye(4)
    assert np.linalg.eigvalsh(matrix)[-1] > 1e-4


def test_linf_bounds_row_sums():
    found = lipsdp(WEIGHTS, norm="linf", activation="maxmin")
    sampled = largest_quotient(lambda x: network(x, "maxmin"), 4, np.inf)
    assert found.per_row.shape == (3,) and found.bound == jnp.max(found.per_row)
    assert sampled <= found.bound


def test_residual_and_implicit():
    skip, out, inner = normal(4, 4, seed=8), normal(4, 8, seed=9), WEIGHTS[0]
    residual = LinearFractional.residual([(skip, out, inner), (None, out, inner)])

    def chain(x):
        x = x @ skip.T + groupsort(x @ inner.T, 2) @ out.T
        return x + groupsort(x @ inner.T + 0.3, 2) @ out.T

    found = lipsdp(residual)
    parts = [np.linalg.norm(m, 2) for m in (skip, out, inner)]
    naive = (parts[0] + parts[1] * parts[2]) * (1 + parts[1] * parts[2])
    assert largest_quotient(chain, 4) <= found.bound < naive

    loop = 0.6 * np.linalg.qr(normal(8, 8, seed=3))[0]
    implicit = LinearFractional(inner, loop, np.zeros((3, 4)), WEIGHTS[2], (8,))

    def fixed_point(x):
        w = np.zeros((len(x), 8))
        for _ in range(80):  # 0.6^80 is below rounding
            w = groupsort(x @ inner.T + w @ loop.T, 2)
        return w @ WEIGHTS[2].T

    found = lipsdp(implicit)
    naive = parts[2] * np.linalg.norm(WEIGHTS[2], 2) / 0.4
    assert largest_quotient(fixed_point, 4) <= found.bound < naive


def test_reads_a_model():
    net = eqx.nn.MLP(4, 3, 8, 2, key=jax.random.key(0))
    read = lipsdp(LinearFractional.from_callable(net, jnp.zeros(4)), activation="relu")
    direct = lipsdp([layer.weight for layer in net.layers], activation="relu")
    np.testing.assert_allclose(read.bound, direct.bound, rtol=1e-12)
    with pytest.raises(ValueError, match="slopes of activations must be between 0 and"):
        LinearFractional.from_callable(jnp.abs, jnp.zeros(4))


def test_cut_off_it_is_looser_and_holds():
    short, whole = (lipsdp(WEIGHTS, max_steps=steps) for steps in (3, 200))
    assert short.kind == "proof" and short.steps == 3 and short.gap[0] > 1e-6
    assert whole.bound < short.bound < np.inf


def test_what_is_constant():
    found = lipsdp([np.zeros((8, 4)), WEIGHTS[1], WEIGHTS[2]])
    assert 0 <= found.bound < 1e-6


def test_directions_are_normalised_with_a_warning():
    longer = [3.0 * v for v in DIRECTIONS]
    with pytest.warns(UserWarning, match="not of length one"):
        found = lipsdp(WEIGHTS, activation="householder", directions=longer)
    unit = lipsdp(WEIGHTS, activation="householder", directions=DIRECTIONS)
    np.testing.assert_allclose(found.bound, unit.bound, rtol=1e-9)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"group": 3}, "`group` must divide every width"),
        ({"activation": "sort"}, "`activation` must be one of"),
        ({"activation": "householder"}, "`directions` must hold an array"),
        ({"activation": "householder", "directions": [1, 2]}, "must have shape"),
        ({"model": [np.eye(2)]}, "at least two matrices"),
        ({"model": [np.eye(2), np.eye(4)]}, "`head` must have shape"),
        ({"model": [np.eye(2), np.full((2, 2), np.nan)]}, "must be finite"),
        ({"tol": 0.0}, "`tol` must be positive"),
        ({"solver": "mosek"}, "`solver` must be one of"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        lipsdp(**{"model": WEIGHTS, **arguments})


def test_a_loop_that_stretches_is_refused():
    eye = np.eye(2)
    with pytest.raises(ValueError, match="no multipliers make the loop a contraction"):
        lipsdp(LinearFractional(eye, 2 * eye, eye, eye, (2,)))
