"""Users' Equinox models: what builds them, and the file with their weights.

The file is read as data, leaf by leaf: each must have the shape that the model expects
before any of it is read. What builds the model is the user's own choice, named on the
command line; only `--make` runs code of theirs.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from ._common import fail

# A first line longer than this is no line of hyperparameters.
_LONGEST_LINE = 1_000_000
_SAVED = (
    "It must be what equinox.tree_serialise_leaves or varan.train.save_checkpoint "
    "wrote."
)


def load_model(file: Path, arch: str | None, make: str | None) -> Any:
    """The model whose weights are in the file; call it under `jax.enable_x64(True)`."""
    if (arch is None) == (make is None):
        fail(
            "Say what the model is: --arch or --make, one of the two.",
            "--arch mlp:40-128-128-10, or --make package.module:function.",
        )
    try:
        content = file.read_bytes()
    except OSError as error:
        fail(f"{file}: {error.strerror or error}.")
    settings, payload, whole = _split(file, content)
    template = _by_name(arch) if arch else _by_function(make or "", settings)
    return _fill(file, template, payload, whole)


def _split(file, content):
    """A first line of JSON, if any; the leaves; whether numbers are among them."""
    if not content.startswith(b"{"):
        return {}, content, True
    line, _, payload = content[:_LONGEST_LINE].partition(b"\n")
    payload = content[len(line) + 1 :]
    try:
        settings = json.loads(line)
    except (ValueError, RecursionError):
        fail(f"{file} begins with a line that is not JSON.", _SAVED)
    if settings.get("kind") != "varan checkpoint":
        return settings, payload, True
    if hashlib.sha256(payload).hexdigest() != settings.get("sha256"):
        fail(f"{file} is damaged: its checksum is wrong.", "Save it again.")
    record = settings.get("record")
    return record if isinstance(record, dict) else {}, payload, False


def _by_name(arch: str):
    import equinox as eqx
    import jax

    kind, _, sizes = arch.partition(":")
    try:
        inputs, *widths, outputs = map(int, sizes.split("-"))
    except ValueError:
        inputs, widths, outputs = 0, [], 0
    if kind not in ("mlp", "mlpnet") or min(inputs, outputs, *widths, 1) < 1:
        fail(
            f"--arch must be mlp:SIZES or mlpnet:SIZES (got {arch!r}).",
            "Sizes from input to output, such as mlp:40-128-128-10.",
        )
    if kind == "mlpnet":
        if not widths:
            fail("--arch mlpnet needs a hidden layer, such as mlpnet:40-128-10.")
        nets = importlib.import_module("varan.nets")
        key = jax.random.key(0)
        return eqx.filter_eval_shape(
            nets.MLPNet, inputs, outputs, tuple(widths), key=key
        )
    if len(set(widths)) > 1:
        fail(
            f"--arch mlp must have hidden layers of one width (got {arch!r}).",
            "Build other models with --make package.module:function.",
        )
    width = widths[0] if widths else 1
    return eqx.filter_eval_shape(
        eqx.nn.MLP, inputs, outputs, width, len(widths), key=jax.random.key(0)
    )


def _by_function(make: str, settings: dict[str, Any]):
    import equinox as eqx
    import jax

    module, _, name = make.partition(":")
    # As `python -m` does: the user's module may lie where the command is run.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
        wanted = inspect.signature(function).parameters
        if "key" in wanted:
            settings = {**settings, "key": jax.random.key(0)}
        return eqx.filter_eval_shape(function, **settings)
    # Whatever the user's own code raises, also while it is imported.
    except Exception as error:
        fail(
            f"--make {make} built no model: {type(error).__name__}: {error}",
            "It must be package.module:function; the function is called with the "
            "hyperparameters of the file's first line, and with key= if it takes one.",
        )


def _fill(file, template, payload, whole):
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import jax.tree_util as jtu

    stream = io.BytesIO(payload)

    def read(path, leaf):
        name = jtu.keystr(path) or "the model"
        is_array = eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
        if is_array:
            values = _read_leaf(file, stream, name, tuple(leaf.shape), leaf.dtype)
            return jnp.asarray(values)
        if whole and isinstance(leaf, bool | int | float | complex):
            return type(leaf)(_read_leaf(file, stream, name, (), None).item())
        return leaf

    model = jtu.tree_map_with_path(read, template)
    if stream.read(1):
        fail(
            f"{file} holds more than the model.",
            "The file is of a larger model; check --arch or --make.",
        )
    return model


def _read_leaf(file, stream, name, shape, dtype):
    """One NPY block, of the expected shape, or one sentence."""
    import numpy as np

    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        found, by_columns, kind = readers[np.lib.format.read_magic(stream)](stream)
    except (ValueError, KeyError, TypeError, SyntaxError, EOFError, RecursionError):
        fail(f"{file} does not hold the weights of {name}.", _SAVED)
    if kind.kind == "V" and str(dtype) == "bfloat16":
        kind = np.dtype(dtype)
    # Precision is the file's; whether a number is whole, the model's.
    sort = {kind.kind, getattr(dtype, "kind", None)}
    fits = dtype is None or kind == dtype or sort <= {"f"} or sort <= {"i", "u"}
    if tuple(found) != shape or kind.kind not in "fiubcV" or not fits:
        wanted = "a number" if dtype is None else f"{dtype} of shape {shape}"
        fail(
            f"{file} holds {kind} of shape {tuple(found)} where {name} is {wanted}.",
            "The file is of another model; check --arch or --make.",
        )
    size = math.prod(shape) * kind.itemsize
    data = stream.read(size)
    if len(data) < size:
        fail(f"{file} ends within {name}.", "It was cut off; save it again.")
    values = np.frombuffer(data, kind)
    return values.reshape(shape, order="F" if by_columns else "C")
