"""Blocks by a factorised matrix inequality: feasible, complete, soundly certified."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan.lipschitz import SLL, LDLTBlock, ResidualBlock, certify, lmi

L = 0.7


def leaky(x):
    return jax.nn.leaky_relu(x, 0.1)


# Slopes of every sign: mM = 0, negative, symmetric and positive.
KINDS = {
    "relu": (jax.nn.relu, (0.0, 1.0)),
    "gelu": (jax.nn.gelu, (-0.13, 1.13)),
    "abs": (jnp.abs, (-1.0, 1.0)),
    "leaky": (leaky, (0.1, 1.0)),
}


def make(kind="relu", widths=(5, 3), lipschitz=L, residual=True):
    activation, slopes = KINDS[kind]
    return LDLTBlock(
        4,
        3,
        widths,
        lipschitz=lipschitz,
        activation=activation,
        slopes=slopes,
        residual=residual,
        key=jax.random.key(0),
    )


def shaken(tree, seed, size=1.0):
    """The same with a random number added to every entry, larger ones to matrices."""
    rng = np.random.default_rng(seed)

    def moved(leaf):
        scale = size if leaf.ndim == 2 else 1.0
        value = np.asarray(leaf) + scale * rng.normal(size=leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    return jtu.tree_map(moved, tree)


@eqx.filter_jit
def written_out(block):
    """The explicit block, and its steepest Jacobian at random points."""
    explicit = block.explicit()
    points = 2 * np.random.default_rng(9).normal(size=(300, 4))
    points = jnp.asarray(points, block.bias.dtype)
    slopes = jax.vmap(jax.jacobian(explicit))(points)
    return explicit, jnp.max(jnp.linalg.norm(slopes, 2, axis=(1, 2)))


class TestInequality:
    @pytest.mark.parametrize(
        "kind, residual", [*((kind, True) for kind in KINDS), ("gelu", False)]
    )
    def test_any_free_matrices_are_feasible_and_bound_every_slope(self, kind, residual):
        block = make(kind, residual=residual)
        for seed in range(4):
            explicit, steepest = written_out(shaken(block, seed))
            matrix = lmi(explicit)
            assert np.linalg.eigvalsh(matrix)[0] >= -1e-10 * len(matrix)
            found = certify(explicit)
            assert found.proof and found.value <= L * (1 + 1e-6)
            assert steepest <= found.value

    def test_form_of_the_matrix(self):
        there, _ = written_out(shaken(make("gelu"), 3))
        (low, high), lam = there.slopes, [np.diag(v) for v in there.multipliers]
        matrix, (c, d), a, b = lmi(there), there.hidden, there.skip, there.output
        zero = np.zeros((3, 4))
        expected = np.block(
            [
                [
                    L**2 * np.eye(4) - a.T @ a + 2 * low * high * c.T @ lam[0] @ c,
                    -(low + high) * c.T @ lam[0],
                    -a.T @ b,
                ],
                [
                    np.zeros((5, 4)),
                    2 * lam[0] + 2 * low * high * d.T @ lam[1] @ d,
                    -(low + high) * d.T @ lam[1],
                ],
                [zero, np.zeros((3, 5)), 2 * lam[1] - b.T @ b],
            ]
        )
        np.testing.assert_allclose(np.triu(matrix), np.triu(expected), atol=1e-12)
        np.testing.assert_array_equal(matrix, matrix.T)

    def test_sll_is_on_its_boundary(self):
        layer = SLL(4, 6, key=jax.random.key(2))

        @eqx.filter_jit
        def both(layer, x):
            sums = layer.sums()
            block = ResidualBlock(
                jnp.eye(4),
                (layer.weight.T,),
                -2 * layer.weight / sums[None],
                (layer.bias,),
                jnp.zeros(4),
                (2 / sums,),
                1.0,
                jax.nn.relu,
                (0.0, 1.0),
            )
            return block, block(x), layer(x)

        x = jnp.asarray(np.random.default_rng(1).normal(size=4))
        block, mine, theirs = both(layer, x)
        np.testing.assert_allclose(mine, theirs, rtol=1e-12)
        matrix = lmi(block)
        np.testing.assert_allclose(matrix[:4], 0, atol=1e-12)
        assert np.linalg.eigvalsh(matrix)[0] >= -1e-10


class TestWholeClass:
    """Every block whose inequality is strict comes from some free matrices."""

    @pytest.mark.parametrize("kind", ["relu", "gelu", "leaky"])
    def test_recovers_blocks_made_without_the_construction(self, kind):
        block = make(kind)
        target = at_random(block, 7)
        found, _ = written_out(solved_for(block, target))
        for name in ("skip", "output", "hidden", "multipliers"):
            pairs = (jtu.tree_leaves(getattr(b, name)) for b in (found, target))
            for mine, theirs in zip(*pairs, strict=True):
                np.testing.assert_allclose(mine, theirs, atol=1e-9)

    def test_large_free_matrices_reach_the_boundary(self):
        """The skip alone comes as close to L times orthogonal as one likes."""
        rng = np.random.default_rng(0)
        last = jnp.asarray(np.pad(rng.normal(size=(3, 4)), ((0, 0), (0, 3))))
        block = eqx.tree_at(
            lambda b: (b.factors[0].free, b.last.free, b.last.log_shift),
            make(),
            (jnp.zeros((5, 4)), last, jnp.asarray(-30.0)),
        )
        skip = written_out(block)[0].skip / L
        np.testing.assert_allclose(skip @ skip.T, np.eye(3), atol=1e-6)


def at_random(block, seed):
    """Weights and multipliers that know nothing of the construction."""
    rng = np.random.default_rng(seed)
    there = jtu.tree_map(
        lambda leaf: 0.2 * rng.normal(size=leaf.shape), written_out(block)[0]
    )
    there = eqx.tree_at(
        lambda b: b.multipliers, there, tuple(map(np.exp, there.multipliers))
    )
    bound = float(certify(there).value)
    assert np.isfinite(bound)
    # Outputs and what proves their sensitivity are scaled to fit the constant.
    scale = L / (1.3 * bound)
    return eqx.tree_at(
        lambda b: (b.skip, b.output, b.multipliers),
        there,
        (
            scale * there.skip,
            scale * there.output,
            tuple(scale**2 * lam for lam in there.multipliers),
        ),
    )


def solved_for(block, target):
    """Free matrices for an explicit block, by eliminating its variables in order."""
    (low, high), size = target.slopes, target.skip.shape[1]
    factor, reach, spent = target.lipschitz * np.eye(size), np.eye(size), 0.0
    free = []
    for old, c, lam in zip(
        block.factors, target.hidden, target.multipliers, strict=True
    ):
        root = np.sqrt(lam)[:, None]
        full = factor @ factor.T + 2 * low * high * c.T @ (lam[:, None] * c)
        spent = spent + reach @ np.linalg.solve(full, reach.T)
        reach = (high + low) * reach @ np.linalg.solve(full, c.T * lam[None])
        contraction = (high - low) / np.sqrt(2) * root * c @ np.linalg.inv(factor).T
        lower, v = from_contraction(contraction, old)
        free.append(v)
        shift = np.exp(old.log_shift)
        inner = (high + low) ** 2 / (2 * shift) * lower.T @ lower
        inner = inner - 2 * low * high * np.eye(len(lam))
        x = np.linalg.cholesky(inner / (high - low) ** 2).T
        if low * high == 0:
            x = lower / np.sqrt(2 * shift)
        factor = root * np.linalg.inv(x)
    first = target.skip @ np.linalg.cholesky(spent)
    second = (target.output + target.skip @ reach) @ np.linalg.inv(factor).T
    _, last = from_contraction(np.concatenate([first, second], 1), block.last)
    logs = tuple(jnp.asarray(np.log(lam)) for lam in target.multipliers)
    return eqx.tree_at(
        lambda b: (*(f.free for f in b.factors), b.last.free, *b.log_multipliers),
        block,
        (*map(jnp.asarray, free), jnp.asarray(last), *logs),
    )


def from_contraction(k, old):
    """`T` and `V` with `K = T^{-1} V` and `T T' = V V' + a I`."""
    assert np.linalg.norm(k, 2) < 1
    rest = (np.eye(len(k)) - k @ k.T) / np.exp(old.log_shift)
    lower = np.linalg.inv(np.linalg.cholesky(rest))
    return lower, lower @ k


class TestConstant:
    def test_scales_the_sensitivity_linearly(self):
        block = shaken(make(), 1)
        wide = jtu.tree_unflatten(
            jtu.tree_structure(make(lipschitz=3 * L)), jtu.tree_leaves(block)
        )
        narrow = written_out(block)[0]
        wide = eqx.filter_jit(LDLTBlock.explicit)(wide)
        # The first layer takes the factor, after which the branch is as before.
        for name, factor in [("skip", 3), ("output", 1)]:
            np.testing.assert_allclose(
                getattr(wide, name), factor * getattr(narrow, name), rtol=1e-10
            )
        for factor, one, two in zip((3, 1), wide.hidden, narrow.hidden, strict=True):
            np.testing.assert_allclose(one, factor * two, rtol=1e-10)
        np.testing.assert_allclose(
            certify(wide).value, 3 * certify(narrow).value, rtol=1e-6
        )

    def test_starts_next_to_its_constant(self):
        found = certify(written_out(make())[0])
        assert 0.98 * L < found.value <= L
        assert found.details["min_eigenvalue"] > 0
        assert found.details["lipschitz"] == L

    def test_without_a_skip_the_chain_alone_is_left(self):
        there, _ = written_out(shaken(make("gelu", residual=False), 2))
        assert not np.any(there.skip)
        w = x = jnp.arange(4.0) / 4
        for c, b in zip(there.hidden, there.biases, strict=True):
            w = jax.nn.gelu(c @ w + b)
        np.testing.assert_allclose(there(x), there.output @ w + there.bias)

    @given(st.integers(0, 10_000), st.sampled_from([0.1, 1.0, 30.0]))
    @settings(max_examples=15, deadline=None, derandomize=True)
    def test_samples_never_exceed_the_proof(self, seed, size):
        explicit, steepest = written_out(shaken(make(), seed, size))
        assert steepest <= certify(explicit).value <= L * (1 + 1e-6)

    def test_exact_for_a_linear_map_and_infinite_without_proof(self):
        block = at_random(make(), 0)
        for spoilt in (np.zeros(5), np.full(5, -1.0)):
            bad = eqx.tree_at(lambda b: b.multipliers[0], block, spoilt)
            assert np.isinf(certify(bad).value)
        bad = eqx.tree_at(lambda b: b.multipliers[0], block, np.full(5, np.nan))
        with pytest.raises(ValueError, match="certify: `block` must be finite"):
            certify(bad)
        linear = eqx.tree_at(
            lambda b: (b.output, b.hidden),
            block,
            (np.zeros((3, 3)), tuple(map(np.zeros_like, block.hidden))),
        )
        norm = np.linalg.norm(block.skip, 2)
        assert norm <= certify(linear).value <= norm * (1 + 1e-5)

    def test_single_precision_is_certified_in_double(self, float32):
        for seed, size in [(0, 1.0), (1, 1e4)]:
            explicit, steepest = written_out(shaken(make(), seed, size))
            assert explicit.output.dtype == jnp.float32
            assert lmi(explicit).dtype == np.float64
            found = certify(explicit)
            assert found.value <= L * 1.001
            assert steepest <= found.value * 1.00001


def test_gradient_against_differences():
    block = shaken(make("gelu", widths=(3,)), 5)
    ahead = shaken(jtu.tree_map(jnp.zeros_like, block), 8)
    x = jnp.arange(4.0) / 4

    @jax.jit
    def values(size):
        def value(size):
            moved = jtu.tree_map(lambda a, b: a + size * b, block, ahead)
            return jnp.sum(moved(x) ** 2)

        return jax.jvp(value, (size,), (jnp.ones_like(size),))

    _, slope = values(jnp.asarray(0.0))
    there, back = (values(jnp.asarray(size))[0] for size in (1e-6, -1e-6))
    np.testing.assert_allclose(slope, (there - back) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"widths": ()}, "at least one of `widths`"),
        ({"in_size": 0}, "`in_size`, `out_size`"),
        ({"lipschitz": 0.0}, "`lipschitz` must be positive"),
        ({"lipschitz": float("inf")}, "`lipschitz` must be positive"),
        ({"activation": jax.nn.gelu}, r"slopes in \[0, 1\] \(saw -0.129 to 1.129\)"),
        ({"activation": jnp.abs}, r"slopes=\(m, M\)"),
        ({"slopes": (1.0, 0.0)}, "the least before the greatest"),
    ],
)
def test_bad_input(options, message):
    arguments = {"in_size": 4, "out_size": 3, "widths": (5,), **options}
    with pytest.raises(ValueError, match=message):
        LDLTBlock(**arguments, key=jax.random.key(0))


def test_certifying_under_jit_is_refused():
    with pytest.raises(ValueError, match="outside of jit"):
        eqx.filter_jit(certify)(make())
