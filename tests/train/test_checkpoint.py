"""Checkpoints: what is saved comes back, what does not fit is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.train import load_checkpoint, save_checkpoint

TREE = {
    "weight": jnp.array([[1.5, -0.0], [jnp.inf, 1e-300]]),
    "small": jnp.array([1, 2], jnp.int8),
    "half": jnp.array([1.5, 3.0], jnp.bfloat16),
    "key": jax.random.key(3),
    "numpy": np.arange(3),
    "name": "not saved",
}


@pytest.fixture
def file(tmp_path):
    save_checkpoint(tmp_path / "deep" / "file", TREE, {"losses": [1.0, 0.1]})
    return tmp_path / "deep" / "file"


def empty(tree):
    def blank(leaf):
        if isinstance(leaf, str):
            return "of the code"
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return leaf * 0

    return jax.tree.map(blank, tree)


def test_every_array_comes_back_and_the_rest_is_the_codes(file):
    tree, record = load_checkpoint(file, empty(TREE))
    assert record == {"losses": [1.0, 0.1]}
    assert tree.pop("name") == "of the code"
    assert bool(tree.pop("key") == TREE["key"])
    for name, leaf in tree.items():
        assert leaf.dtype == TREE[name].dtype, name
        assert np.asarray(leaf).tobytes() == np.asarray(TREE[name]).tobytes(), name
    assert isinstance(tree["numpy"], np.ndarray)


def test_a_write_that_fails_leaves_the_old_file(file, monkeypatch):
    before = file.read_bytes()

    def fail(number):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(file, empty(TREE))
    assert file.read_bytes() == before
    monkeypatch.undo()
    save_checkpoint(file, empty(TREE))
    assert sorted(other.name for other in file.parent.iterdir()) == ["file"]


@pytest.mark.parametrize("change", ["cut", "flipped", "empty payload"])
def test_damage_is_found(file, change):
    content = bytearray(file.read_bytes())
    if change == "cut":
        content = content[:-1]
    elif change == "flipped":
        content[-5] ^= 1
    else:
        content = content[: content.index(b"\n") + 1]
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"undamaged file .* checksum is wrong"):
        load_checkpoint(file, TREE)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\xff\n", b"[1]\n", b"{}\n"])
def test_foreign_files_are_refused(file, content):
    file.write_bytes(content)
    with pytest.raises(ValueError, match="must be a file of save_checkpoint"):
        load_checkpoint(file, TREE)


def test_other_versions_are_refused(file):
    file.write_bytes(file.read_bytes().replace(b'"version": 1', b'"version": 9', 1))
    with pytest.raises(ValueError, match=r"of version 1 .got version 9"):
        load_checkpoint(file, TREE)


def test_other_structures_are_named(file):
    with pytest.raises(ValueError, match=r"\['small'\] of shape \(2,\) and int8 there"):
        load_checkpoint(file, {**TREE, "small": jnp.zeros(3, jnp.int8)})
    with pytest.raises(ValueError, match=r"float64 there and .* float32 here"):
        load_checkpoint(file, {**TREE, "weight": jnp.zeros((2, 2), jnp.float32)})
    with pytest.raises(ValueError, match="5 arrays there and 6 here"):
        load_checkpoint(file, {**TREE, "zeta": jnp.zeros(3)})
    with pytest.raises(FileNotFoundError):
        load_checkpoint(file.parent / "none", TREE)
