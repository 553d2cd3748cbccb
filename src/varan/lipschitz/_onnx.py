"""ONNX files as callables: read as data, checked against ONNX's own evaluator.

Whatever does not depend on the network's input is computed once when the file is read;
the rest becomes a list of JAX functions, so that everything that takes a JAX callable
takes the network: bounds, Lipschitz constants, gradients, jit and vmap.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._files import FileProblem, read_bytes
from ._nodes import UnsupportedPrimitive
from ._onnx_operators import KNOWN_INPUTS, MOST_ENTRIES, ON_SHAPES, OPERATORS, Node

# The oldest operator set whose arithmetic broadcasts as NumPy's does.
_OLDEST_OPSET = 7
_MOST_BYTES = 2_000_000_000
_MOST_SHAPE_ENTRIES = 10_000
_TRIALS = 3


class _Program:
    """The nodes that depend on the input, in order; one object is one program."""

    def __init__(self, nodes: list[Node]):
        self.nodes = nodes


class OnnxNetwork(eqx.Module):
    """A network read from an ONNX file, callable on one input without batch axis.

    It computes in the precision of its input, whatever the file's: give it float64 for
    certificates.

    Args:
        weights: The file's constants by name.
        program: The nodes that depend on the input.
        input_name: Name of the input.
        input_shape: Its shape without the batch axis.
        batched: Whether the file has a batch axis, of one sample or of any number.
        output_name: Name of the output.
    """

    weights: dict[str, Array]
    program: _Program = eqx.field(static=True)
    input_name: str = eqx.field(static=True)
    input_shape: tuple[int, ...] = eqx.field(static=True)
    batched: bool = eqx.field(static=True)
    output_name: str = eqx.field(static=True)

    def __call__(self, x: Float[Array, ...]) -> Float[Array, ...]:
        """The network's output, without batch axis if it has one of length 1."""
        if jnp.shape(x) != self.input_shape:
            raise ValueError(
                f"OnnxNetwork: the input must have shape {self.input_shape} "
                f"(got {jnp.shape(x)})."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                "OnnxNetwork: the input must hold floating-point numbers "
                f"(got {x.dtype})."
            )
        out = self._run(x[None] if self.batched else x)
        return out[0] if self.batched and out.ndim > 1 and out.shape[0] == 1 else out

    def _run(self, x):
        values: dict[str, Any] = {self.input_name: x}
        for node in self.program.nodes:
            inputs = [
                node.fixed[place]
                if place in node.fixed
                else self._read(values, name, x.dtype)
                for place, name in enumerate(node.inputs)
            ]
            values[node.outputs[0]] = _apply(node, inputs)
        return values[self.output_name]

    def _read(self, values, name, dtype):
        if not name:
            return None
        if name in values:
            return values[name]
        weight = self.weights[name]
        floating = jnp.issubdtype(weight.dtype, jnp.floating)
        return weight.astype(dtype) if floating else weight


def load_onnx(path: str | Path) -> OnnxNetwork:
    """Reads a feed-forward or convolutional network from an ONNX file.

    Nothing in the file is executed and no other file is opened. Every operator must be
    one of those below; the network that is built is compared with ONNX's reference
    evaluator on random inputs before it is returned.

    Args:
        path: An `.onnx` file, or one compressed as `.onnx.gz`. One input with at most
            one free dimension, the batch; one output.

    Returns:
        The network, a callable of one input without batch axis.

    Raises:
        ModuleNotFoundError: Without the package `onnx` (the extra `varan[onnx]`).
        ValueError: A file that is damaged, of another operator set, with external data
            or several inputs, or whose values differ from the reference evaluator's.
        UnsupportedPrimitive: An operator that is not supported, by name.

    Example:
        >>> import pytest
        >>> onnx = pytest.importorskip("onnx")
        >>> import tempfile, numpy as np, jax.numpy as jnp
        >>> from onnx import TensorProto, helper, numpy_helper
        >>> from varan.lipschitz import load_onnx
        >>> vector = lambda name: helper.make_tensor_value_info(
        ...     name, TensorProto.FLOAT, [1, 2])
        >>> weight = numpy_helper.from_array(np.float32([[1, 2], [3, 4]]), "W")
        >>> nodes = [helper.make_node("MatMul", ["x", "W"], ["h"]),
        ...          helper.make_node("Relu", ["h"], ["y"])]
        >>> graph = helper.make_graph(
        ...     nodes, "g", [vector("x")], [vector("y")], [weight])
        >>> opset = [helper.make_opsetid("", 17)]
        >>> model = helper.make_model(graph, opset_imports=opset, ir_version=8)
        >>> with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        ...     onnx.save(model, file.name)
        ...     network = load_onnx(file.name)
        >>> [float(v) for v in network(jnp.array([1.0, -1.0]))]
        [0.0, 0.0]

    Source:
        The Open Neural Network Exchange, operator sets 7 and later.
    """
    path = Path(path)
    model = _parse(path)
    try:
        network = _network(path, model)
        _compare(path, model, network)
    except FileProblem as problem:
        raise ValueError(f"load_onnx: {path.name}: {problem}") from problem
    return network


def _parse(path: Path):
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "load_onnx: the package `onnx` is needed. Install varan[onnx]."
        ) from error
    from google.protobuf.message import DecodeError

    try:
        data = read_bytes("load_onnx", path, _MOST_BYTES)
        model = onnx.load_model_from_string(data)
    except (DecodeError, zlib.error) as error:
        raise ValueError(
            f"load_onnx: {path.name} is no ONNX file, or a damaged one. Export it anew."
        ) from error
    if not model.HasField("graph"):
        state = "holds no model" if data else "is empty"
        raise ValueError(f"load_onnx: {path.name} {state}. Export it anew.")
    return model


def _network(path: Path, model) -> OnnxNetwork:
    graph = model.graph
    opset = _opset(model)
    weights = {t.name: _tensor(t, f"tensor {t.name!r}") for t in graph.initializer}
    if graph.sparse_initializer:
        raise FileProblem("sparse tensors are not supported.")
    given = [i for i in graph.input if i.name not in weights]
    if len(given) != 1 or len(graph.output) != 1:
        raise FileProblem(
            f"one input and one output are needed (got {len(given)} and "
            f"{len(graph.output)})."
        )
    _check_names(graph, given[0].name)
    shape, batched = _input_shape(given[0])
    x = jax.ShapeDtypeStruct((1, *shape) if batched else shape, jnp.float32)
    known, avals, program = dict(weights), {given[0].name: x}, []
    for proto in graph.node:
        node = _node(proto, path, opset)
        _check_reads(node, known, avals)
        if _shapes_only(node, known):
            known[node.outputs[0]] = _of_shapes(node, proto, opset, known, avals)
        elif node.operator not in OPERATORS:
            raise UnsupportedPrimitive(node.operator, path.name)
        else:
            _place(node, known, avals, program)
    output = graph.output[0].name
    if output not in avals:
        raise FileProblem("the output does not depend on the input.")
    read = {
        name
        for node in program
        for place, name in enumerate(node.inputs)
        if place not in node.fixed
    }
    with jax.enable_x64(True):  # a file's float64 stays what it is
        weights = {n: jnp.asarray(value) for n, value in known.items() if n in read}
    return OnnxNetwork(
        weights,
        _Program(program),
        given[0].name,
        shape,
        batched,
        output,
    )


def _check_names(graph, input_name: str) -> None:
    """A value has one maker; otherwise the order of the nodes would matter."""
    made = [input_name, *(tensor.name for tensor in graph.initializer)]
    made += [name for node in graph.node for name in node.output if name]
    name, times = Counter(made).most_common(1)[0]
    if times > 1:
        raise FileProblem(f"{name!r} is made more than once. Export the model anew.")


def _check_reads(node: Node, known: dict, avals: dict) -> None:
    for name in node.inputs:
        if name and name not in known and name not in avals:
            raise FileProblem(f"{_called(node)} reads {name!r}, which nothing makes.")


def _place(node: Node, known: dict, avals: dict, program: list) -> None:
    """Computes a node now, or puts it into the program."""
    for place, name in enumerate(node.inputs):
        setting = place in KNOWN_INPUTS.get(node.operator, ())
        if setting and name in avals:
            raise FileProblem(
                f"input {place} of {_called(node)} depends on the network's input."
            )
        if name in known:
            _check_constant(node, name, known[name], setting)
            if setting:
                node.fixed[place] = known[name]
    out = _built(node, known, avals)
    if all(not name or name in known for name in node.inputs):
        known[node.outputs[0]] = out
    else:
        avals[node.outputs[0]] = out
        program.append(node)


def _check_constant(node: Node, name: str, value: np.ndarray, setting: bool) -> None:
    """Values are finite floats; settings may be integers, or infinite limits."""
    if not setting and not _floating(value):
        raise FileProblem(
            f"{_called(node)} reads {name!r}, which holds {value.dtype}, not "
            "floating-point numbers."
        )
    limit = setting and node.operator == "Clip"
    if _floating(value) and np.any(np.isnan(value) if limit else ~np.isfinite(value)):
        raise FileProblem(
            f"{_called(node)} reads {name!r}, which holds NaN or infinity."
        )


def _shapes_only(node: Node, known: dict) -> bool:
    """Whether a node computes with integers that the file or its shapes give."""
    if node.operator in ("Constant", "Shape"):
        return True
    values = [known.get(name) for name in node.inputs if name]
    return node.operator in ON_SHAPES and all(
        v is not None and v.dtype.kind in "iub" for v in values
    )


def _of_shapes(node: Node, proto, opset: int, known: dict, avals: dict) -> np.ndarray:
    from onnx.reference import ReferenceEvaluator

    if node.operator == "Shape":
        source = node.inputs[0]
        shape = (avals[source] if source in avals else known[source]).shape
        get = node.attributes.get
        return np.asarray(shape[get("start", 0) : get("end")], np.int64)
    inputs = {name: known[name] for name in node.inputs if name}
    grows = node.operator in ("ConstantOfShape", "Expand", "Range", "Reshape")
    sizes = [v.size for v in inputs.values()]
    if grows:
        sizes += [math.prod(int(n) for n in np.ravel(v)) for v in inputs.values()]
    if max(map(abs, sizes), default=0) > _MOST_SHAPE_ENTRIES:
        raise FileProblem(f"{_called(node)} computes with arrays too large for shapes.")
    try:
        (out, *_) = ReferenceEvaluator(proto, opsets={"": opset}).run(None, inputs)
    except Exception as error:  # each operator has its own
        raise FileProblem(
            f"{_called(node)} does not fit the integers that it reads."
        ) from error
    return np.asarray(out)


def _built(node: Node, known: dict, avals: dict):
    """The output if the file gives it, else its shape; any error names the node."""
    try:
        out = _shape_of(node, known, avals)
        if all(not name or name in known for name in node.inputs):
            out = np.asarray(_apply(node, [known.get(name) for name in node.inputs]))
    except FileProblem as problem:
        raise FileProblem(f"{_called(node)}: {problem}") from problem
    except Exception as error:  # whatever NumPy and JAX raise for a file's numbers
        shapes = [(known | avals)[name].shape for name in node.inputs if name]
        raise FileProblem(
            f"{_called(node)} does not fit its inputs of shapes "
            f"{', '.join(map(str, shapes))}, or its attributes do not."
        ) from error
    return out


def _shape_of(node, known, avals):
    """The output's shape and dtype, without computing or allocating it."""
    dynamic = [name for name in dict.fromkeys(node.inputs) if name in avals]

    def run(values):
        found = dict(zip(dynamic, values, strict=True))
        return _apply(node, [found.get(n, known.get(n)) for n in node.inputs])

    # Weights come in the file's precision here, and in the input's when called.
    with jax.numpy_dtype_promotion("standard"):
        out = jax.eval_shape(run, [avals[name] for name in dynamic])
    if not 0 < math.prod(out.shape) <= MOST_ENTRIES:
        raise FileProblem(f"it makes an array of shape {out.shape}.")
    return out


def _apply(node: Node, inputs):
    # ONNX broadcasts as NumPy does.
    with jax.numpy_rank_promotion("allow"):
        return OPERATORS[node.operator](node, *inputs)


def _called(node) -> str:
    operator = node.operator if isinstance(node, Node) else node.op_type
    return f"{operator} ({node.name})" if node.name else operator


def _node(proto, path: Path, opset: int) -> Node:
    operator = proto.op_type
    if proto.domain not in ("", "ai.onnx"):
        raise UnsupportedPrimitive(f"{proto.domain}.{operator}", path.name)
    if operator not in {*OPERATORS, *ON_SHAPES, "Constant", "Shape"}:
        raise UnsupportedPrimitive(operator, path.name)
    used = [name for name in proto.output if name]
    several = operator in ("Dropout", "BatchNormalization")
    if used[:1] != proto.output[:1] or not used or (len(used) > 1 and not several):
        raise FileProblem(f"{_called(proto)} must have one output (got {len(used)}).")
    _check_form(proto, opset)
    return Node(
        operator,
        proto.name,
        {a.name: _attribute(proto, a) for a in proto.attribute},
        tuple(proto.input),
        tuple(used[:1]),
        {},
    )


def _check_form(proto, opset: int) -> None:
    """The node's inputs and attributes against ONNX's own declaration."""
    from onnx import defs

    try:
        form = defs.get_schema(proto.op_type, opset, "")
    except defs.SchemaError as error:
        raise FileProblem(
            f"{_called(proto)} is not in operator set {opset}."
        ) from error
    optional = defs.OpSchema.FormalParameterOption.Optional
    for place, formal in enumerate(form.inputs):
        given = place < len(proto.input) and proto.input[place]
        if formal.option != optional and not given:
            raise FileProblem(f"{_called(proto)} lacks its input `{formal.name}`.")
    if len(proto.input) > form.max_input:
        raise FileProblem(
            f"{_called(proto)} has at most {form.max_input} inputs in operator set "
            f"{opset} (got {len(proto.input)})."
        )
    given = {attribute.name: attribute.type for attribute in proto.attribute}
    for name, attribute in form.attributes.items():
        if attribute.required and name not in given:
            raise FileProblem(f"{_called(proto)} lacks its attribute `{name}`.")
        if name in given and given[name] != attribute.type.value:
            raise FileProblem(
                f"attribute `{name}` of {_called(proto)} must be of type "
                f"{attribute.type.name}."
            )


def _attribute(node, proto):
    from onnx import TensorProto, helper

    what = f"attribute `{proto.name}` of {_called(node)}"
    try:
        value = helper.get_attribute_value(proto)
    except ValueError as error:  # a reference, or no type
        raise FileProblem(f"{what} has no value.") from error
    if isinstance(value, TensorProto):
        return _tensor(value, what)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float):
        # `Clip` may have infinite limits.
        if math.isnan(value) or (math.isinf(value) and node.op_type != "Clip"):
            raise FileProblem(f"{what} is {value}.")
        return value
    if isinstance(value, int):
        return value
    if hasattr(value, "__iter__"):
        return tuple(value)
    raise FileProblem(f"{what} is of a type that is not supported.")


def _tensor(proto, what: str) -> np.ndarray:
    from onnx import TensorProto, numpy_helper

    if proto.data_location == TensorProto.EXTERNAL or proto.external_data:
        raise FileProblem(
            f"{what} lies in another file, which is not opened. Save the model as one "
            "file."
        )
    if math.prod(proto.dims) > MOST_ENTRIES or any(n < 0 for n in proto.dims):
        raise FileProblem(f"{what} has the impossible shape {tuple(proto.dims)}.")
    try:
        return numpy_helper.to_array(proto)
    except Exception as error:  # each version of onnx has its own
        raise FileProblem(f"{what} is damaged.") from error


def _floating(value: np.ndarray) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating)


def _opset(model) -> int:
    from onnx import defs

    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    newest = defs.onnx_opset_version()
    if len(versions) != 1 or not _OLDEST_OPSET <= versions[0] <= newest:
        raise FileProblem(
            f"operator sets {_OLDEST_OPSET} to {newest} are supported "
            f"(got {', '.join(map(str, versions)) or 'none'})."
        )
    return versions[0]


def _input_shape(info) -> tuple[tuple[int, ...], bool]:
    from onnx import TensorProto

    kind = info.type.tensor_type
    if kind.elem_type not in (TensorProto.FLOAT, TensorProto.DOUBLE):
        raise FileProblem(
            f"input {info.name!r} must be of type FLOAT or DOUBLE "
            f"(got {_type_name(kind.elem_type)})."
        )
    sizes = [d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim]
    if not sizes or None in sizes[1:]:
        raise FileProblem(
            f"input {info.name!r} must have a fixed shape but for the batch "
            f"(got {sizes})."
        )
    batched = sizes[0] in (None, 1) and len(sizes) > 1
    if sizes[0] is None and not batched:
        raise FileProblem(f"input {info.name!r} has no fixed shape.")
    shape = tuple(n for n in (sizes[1:] if batched else sizes) if n is not None)
    if math.prod(shape) > MOST_ENTRIES:
        raise FileProblem(f"input {info.name!r} has the impossible shape {shape}.")
    return shape, batched


def _type_name(number: int) -> str:
    from onnx import TensorProto

    known = number in TensorProto.DataType.values()
    return TensorProto.DataType.Name(number) if known else str(number)


def _compare(path: Path, model, network: OnnxNetwork) -> None:
    """Random inputs through ONNX's own evaluator and through ours."""
    rng = np.random.default_rng(0)
    run = jax.jit(lambda x: network._run(x))
    for _ in range(_TRIALS):
        shape = (1, *network.input_shape) if network.batched else network.input_shape
        x = rng.standard_normal(shape).astype(np.float32)
        expected = _evaluated(model, network.input_name, x)
        found = np.asarray(run(x))
        if not np.all(np.isfinite(expected)) or not np.all(np.isfinite(found)):
            raise FileProblem("its output for random inputs is NaN or infinite.")
        scale = 1 + np.max(np.abs(expected), initial=0.0)
        if found.shape != expected.shape or not np.allclose(
            found, expected, rtol=0, atol=1e-4 * scale
        ):
            raise FileProblem(
                "the network that was read does not compute what ONNX's reference "
                "evaluator does. Please report the file."
            )


def _evaluated(model, name: str, x: np.ndarray) -> np.ndarray:
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    (info,) = (i for i in model.graph.input if i.name == name)
    kind = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
    try:
        with np.errstate(all="ignore"):
            (out,) = ReferenceEvaluator(model).run(None, {name: x.astype(kind)})
    except Exception as error:  # each operator has its own
        raise FileProblem(
            "ONNX's reference evaluator cannot run it. Does `onnx.checker` accept it?"
        ) from error
    return np.asarray(out)
