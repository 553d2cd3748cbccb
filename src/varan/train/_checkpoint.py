"""Checkpoints: one file, written whole or not at all, read only where it fits."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

_KIND, _VERSION = "varan checkpoint", 1


def save_checkpoint(
    path: str | os.PathLike, tree: PyTree, record: Mapping[str, Any] | None = None
) -> None:
    """Writes the arrays of a pytree to a file.

    The file appears under its name only when it is complete, so that a process killed
    at any moment leaves the old one or the new one. It begins with one line of JSON
    (version, shapes, dtypes, a checksum, the record) and holds NumPy arrays after it,
    and nothing that could be executed.

    Args:
        path: Of the file; folders above it are made.
        tree: Any pytree; its arrays are written, random keys included. Everything
            else belongs to the code and is not.
        record: Further numbers and words that JSON can hold.

    Raises:
        OSError: If the file cannot be written.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> from pathlib import Path
        >>> from varan.train import load_checkpoint, save_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "model"
        ...     save_checkpoint(file, {"w": jnp.ones(2)}, {"epoch": 3})
        ...     tree, record = load_checkpoint(file, {"w": jnp.zeros(2)})
        >>> tree["w"].tolist(), record
        ([1.0, 1.0], {'epoch': 3})
    """
    arrays, payload = _plain(tree), io.BytesIO()
    eqx.tree_serialise_leaves(payload, arrays)
    header = {
        "kind": _KIND,
        "version": _VERSION,
        "arrays": _describe(arrays),
        "sha256": hashlib.sha256(payload.getvalue()).hexdigest(),
        "record": dict(record or {}),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        file.write(payload.getvalue())
        # On the disk before it gets the name: a power cut leaves no empty file.
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_checkpoint(
    path: str | os.PathLike, like: PyTree
) -> tuple[PyTree, dict[str, Any]]:
    """Reads a checkpoint into a pytree of the same structure.

    Args:
        path: A file that `save_checkpoint` wrote.
        like: A pytree with arrays of the shapes and dtypes that were saved; what is
            no array is taken from it.

    Returns:
        The tree with the arrays of the file, and the record.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, of another version, damaged, or of another
            structure.

    Example:
        >>> import tempfile, jax
        >>> from pathlib import Path
        >>> from varan.train import load_checkpoint, save_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(Path(folder) / "key", jax.random.key(7))
        ...     key, _ = load_checkpoint(Path(folder) / "key", jax.random.key(0))
        >>> bool(key == jax.random.key(7))
        True
    """
    line, _, payload = Path(path).read_bytes().partition(b"\n")
    header = _parse(path, line)
    if hashlib.sha256(payload).hexdigest() != header["sha256"]:
        raise ValueError(
            f"load_checkpoint: `path` must be an undamaged file (got {path}, whose "
            "checksum is wrong). Delete it to start anew."
        )
    arrays = _plain(like)
    _check_structure(path, header["arrays"], _describe(arrays))
    loaded = eqx.tree_deserialise_leaves(io.BytesIO(payload), arrays)

    def restore(old, new):
        if not eqx.is_array(old):
            return old
        if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(new, impl=jax.random.key_impl(old))
        return new

    return jtu.tree_map(restore, like, loaded), header["record"]


def fingerprint(tree: PyTree) -> str:
    """Sixteen hexadecimal digits that change with any array of the tree."""
    digest = hashlib.sha256()
    for leaf in jtu.tree_leaves(_plain(tree)):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def _plain(tree):
    """The arrays of a tree, random keys as numbers."""

    def numbers(leaf):
        if not eqx.is_array(leaf):
            return None
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key_data(leaf)
        return leaf

    return jtu.tree_map(numbers, tree)


def _describe(arrays):
    leaves, _ = jtu.tree_flatten_with_path(arrays)
    return [
        [jtu.keystr(path), list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves
    ]


def _parse(path, line):
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("kind") != _KIND:
        raise ValueError(
            f"load_checkpoint: `path` must be a file of save_checkpoint (got {path}, "
            "which is none). Give another path."
        )
    if header.get("version") != _VERSION:
        raise ValueError(
            f"load_checkpoint: `path` must be of version {_VERSION} (got version "
            f"{header.get('version')} in {path}). Read it with the varan that wrote it."
        )
    return header


def _check_structure(path, saved, wanted):
    if saved == wanted:
        return
    for there, here in zip(saved, wanted, strict=False):
        if there != here:
            difference = f"{_show(there)} there and {_show(here)} here"
            break
    else:
        difference = f"{len(saved)} arrays there and {len(wanted)} here"
    raise ValueError(
        f"load_checkpoint: `like` must have the arrays of {path} (got {difference}). "
        "Build the model and the optimiser as they were when it was saved."
    )


def _show(entry):
    name, shape, dtype = entry
    return f"{name or 'the array'} of shape {tuple(shape)} and {dtype}"
