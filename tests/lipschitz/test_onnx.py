"""ONNX files: operators against ONNX's own evaluator, and files to refuse."""

import gzip
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.lipschitz import (
    BoundGraph,
    Box,
    UnsupportedPrimitive,
    bounds,
    load_onnx,
    local_lipschitz,
)

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

FILES = Path(__file__).parent / "onnx"


def tensor(name, value):
    return numpy_helper.from_array(np.asarray(value), name)


def info(name, shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def model(nodes, weights, shape, opset=17, inputs=()):
    """A model from x of a shape to y of whatever shape comes out."""
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(
        nodes, "g", [info("x", shape), *inputs], [output], weights
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.fixture
def saved(tmp_path):
    def save(proto, name="net.onnx"):
        path = tmp_path / name
        path.write_bytes(proto.SerializeToString())
        return path

    return save


def node(operator, *inputs, **attributes):
    return helper.make_node(operator, inputs, ["y"], **attributes)


rng = np.random.default_rng(0)
IMAGE = (1, 2, 5, 5)


def weight(*shape):
    return rng.standard_normal(shape).astype(np.float32)


INT = np.int64
# Name: node, weights, shape of the input, operator set.
SINGLE = {
    "gemm transposed": (
        node("Gemm", "x", "W", "c", transB=1, alpha=0.5, beta=2.0),
        {"W": weight(3, 4), "c": weight(3)},
        (1, 4),
    ),
    "matmul of a matrix": (node("MatMul", "x", "W"), {"W": weight(4, 2)}, (1, 3, 4)),
    "conv same": (
        node("Conv", "x", "W", "c", auto_pad="SAME_LOWER", strides=[2, 1]),
        {"W": weight(3, 2, 2, 3), "c": weight(3)},
        IMAGE,
    ),
    "conv dilated, grouped": (
        node("Conv", "x", "W", group=2, dilations=[2, 1], pads=[1, 0, 2, 1]),
        {"W": weight(4, 1, 2, 2)},
        IMAGE,
    ),
    "conv of a series": (
        node("Conv", "x", "W", strides=[2], pads=[1, 1]),
        {"W": weight(3, 2, 3)},
        (1, 2, 7),
    ),
    "max pool padded": (
        node("MaxPool", "x", kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 1]),
        {},
        IMAGE,
    ),
    "max pool, size rounded up": (
        node("MaxPool", "x", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
        {},
        IMAGE,
    ),
    "average pool": (
        node("AveragePool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
        {},
        IMAGE,
    ),
    "average pool with padding": (
        node(
            "AveragePool", "x", kernel_shape=[2, 2], pads=[1] * 4, count_include_pad=1
        ),
        {},
        IMAGE,
    ),
    "global average pool": (node("GlobalAveragePool", "x"), {}, IMAGE),
    "batch normalisation": (
        node("BatchNormalization", "x", "s", "b", "m", "v", epsilon=0.01),
        {"s": weight(2), "b": weight(2), "m": weight(2), "v": np.float32([1, 2])},
        IMAGE,
    ),
    "leaky relu": (node("LeakyRelu", "x", alpha=0.2), {}, (1, 4)),
    "sigmoid": (node("Sigmoid", "x"), {}, (1, 4)),
    "clip": (
        node("Clip", "x", "low", "high"),
        {"low": np.float32(-0.5), "high": np.float32(0.5)},
        (1, 4),
    ),
    "clip of old": (node("Clip", "x", min=-0.5, max=0.5), {}, (1, 4), 9),
    "clip without limits": (
        node("Clip", "x", "low", "high"),
        {"low": np.float32(0), "high": np.finfo(np.float32).max},
        (1, 4),
    ),
    "clip far away": (
        node("Clip", "x", "low", "high"),
        {"low": np.float32(-3.4e38), "high": np.float32(np.inf)},
        (1, 4),
    ),
    "clip of old, far away": (node("Clip", "x", min=-1e5, max=1e30), {}, (1, 4), 9),
    "clip to what lies far": (
        node("Clip", "x", "low"),
        {"low": np.float32(1e5)},
        (1, 4),
    ),
    "flatten all": (node("Flatten", "x", axis=4), {}, IMAGE),
    "constant minus": (node("Sub", "c", "x"), {"c": weight(4)}, (1, 4)),
    "times": (node("Mul", "x", "c"), {"c": weight(1, 4)}, (1, 4)),
    "divided": (node("Div", "x", "c"), {"c": np.float32(3.0)}, (1, 4)),
    "largest of": (node("Max", "x", "c"), {"c": weight(1, 4)}, (1, 4)),
    "slice with steps": (
        node("Slice", "x", "s", "e", "a", "t"),
        {
            "s": np.array([-1, 1], INT),
            "e": np.array([-9, 5], INT),
            "a": np.array([1, 3], INT),
            "t": np.array([-1, 2], INT),
        },
        IMAGE,
    ),
    "slice of old": (
        node("Slice", "x", starts=[1], ends=[3], axes=[2]),
        {},
        IMAGE,
        9,
    ),
    "gather": (
        node("Gather", "x", "i", axis=1),
        {"i": np.array([[1, -1]], INT)},
        (1, 4),
    ),
    "pad": (
        node("Pad", "x", "p", "c"),
        {"p": np.array([0, 0, 1, 2, 0, 0, 0, 1], INT), "c": np.float32(0.5)},
        IMAGE,
    ),
    "transpose": (node("Transpose", "x", perm=[0, 2, 3, 1]), {}, IMAGE),
    "unsqueeze": (
        node("Unsqueeze", "x", "a"),
        {"a": np.array([1, -1], INT)},
        (1, 4),
    ),
    "flatten": (node("Flatten", "x", axis=2), {}, IMAGE),
    "reshape": (node("Reshape", "x", "s"), {"s": np.array([0, -1, 5], INT)}, IMAGE),
    "mean": (
        node("ReduceMean", "x", axes=[2, 3], keepdims=0),
        {},
        IMAGE,
    ),
    "sum": (node("ReduceSum", "x", "a"), {"a": np.array([1], INT)}, IMAGE),
}


def test_double_precision(saved):
    made = of_one("Add", (1, 4), weights={"c": np.ones(4)})
    made.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    assert load_onnx(saved(made))(jnp.zeros(4)).tolist() == [1.0] * 4


@pytest.mark.parametrize("name", list(SINGLE))
def test_operator(name, saved):
    """`load_onnx` itself compares with the evaluator."""
    made, weights, shape, *opset = SINGLE[name]
    constants = [tensor(k, v) for k, v in weights.items()]
    network = load_onnx(saved(model([made], constants, shape, *opset)))
    x = jax.random.normal(jax.random.key(1), network.input_shape)
    graph = BoundGraph.from_callable(network, x)
    np.testing.assert_allclose(graph(x), network(x), rtol=1e-9, atol=1e-12)


LARGEST = float(np.finfo(np.float32).max)
LIMITS = [(0.0, LARGEST), (0.0, np.inf), (-3.4e38, None), (-1e30, 1e20), (-1e7, 2e5)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("low, high", LIMITS)
def test_far_limits_do_not_loosen_bounds(low, high, dtype, saved):
    limits = {"low": low, "high": high}
    given = {name: v for name, v in limits.items() if v is not None}
    constants = [tensor(name, np.float32(v)) for name, v in given.items()]
    network = load_onnx(saved(model([node("Clip", "x", *given)], constants, (1, 3))))
    box = Box.linf(jnp.array([0.5, 1.0, 2.0], dtype), 0.25)
    found = bounds(network, box)
    np.testing.assert_allclose(found.lower, box.lower, rtol=1e-5)
    np.testing.assert_allclose(found.upper, box.upper, rtol=1e-5)


@pytest.fixture(scope="module", params=["perceptron", "convolutional", "branches"])
def exported(request):
    """A classifier of digits that PyTorch exported (see make_models.py)."""
    return load_onnx(FILES / f"{request.param}.onnx")


def test_bounds_of_an_exported_network(exported):
    key = jax.random.key(0)
    box = Box.linf(jax.random.uniform(key, (64,)), 0.02, clip=(0.0, 1.0))
    share = jax.random.uniform(key, (200, 64))
    inside = box.lower[None] + (box.upper - box.lower)[None] * share
    outputs = jax.jit(jax.vmap(exported))(inside)
    found = bounds(exported, box)
    assert np.all(outputs >= found.lower[None]) and np.all(outputs <= found.upper[None])
    lipschitz = local_lipschitz(exported, box, forward="ibp", samples=0)
    reach = np.max(np.abs(outputs - outputs[:1]), 1)
    far = np.max(np.abs(inside - inside[:1]), 1)
    assert np.all(reach <= lipschitz.bound * far * (1 + 1e-12))


def test_network_is_a_pytree_under_jit(exported):
    x = jnp.linspace(0.0, 1.0, 64)
    np.testing.assert_allclose(eqx.filter_jit(exported)(x), exported(x), rtol=1e-9)
    with pytest.raises(ValueError, match=r"must have shape \(64,\)"):
        exported(x[:5])
    with pytest.raises(ValueError, match=r"floating-point numbers \(got int"):
        exported(jnp.arange(64))


def test_compressed_file(tmp_path):
    path = tmp_path / "net.onnx.gz"
    path.write_bytes(gzip.compress((FILES / "perceptron.onnx").read_bytes()))
    assert load_onnx(path).input_shape == (64,)


RELU = helper.make_node("Relu", ["x"], ["y"])


def unknown_operator():
    return model([node("Softmax", "x")], [], (1, 4))


def own_domain():
    made = model([node("Relu", "x", domain="acme")], [], (1, 4))
    made.opset_import.append(helper.make_opsetid("acme", 1))
    return made


def branching():
    graph = model([RELU], [], (1, 4)).graph
    return model([node("If", "x", then_branch=graph)], [], (1, 4))


@pytest.mark.parametrize(
    "make, message",
    [
        (unknown_operator, "no rule for `Softmax`"),
        (own_domain, "`acme.Relu`"),
        (branching, "no rule for `If`"),
    ],
)
def test_unsupported_operator_is_named(make, message, saved):
    with pytest.raises(UnsupportedPrimitive, match=message):
        load_onnx(saved(make()))


def external_data():
    far = tensor("W", weight(4, 4))
    far.ClearField("raw_data")
    far.data_location = TensorProto.EXTERNAL
    far.external_data.add(key="location", value="../../etc/passwd")
    return model([node("MatMul", "x", "W")], [far], (1, 4))


def huge_tensor():
    huge = tensor("W", weight(4, 4))
    huge.dims[0] = 2**40
    return model([node("MatMul", "x", "W")], [huge], (1, 4))


def huge_intermediate():
    pads = tensor("p", np.array([0, 0, 0, 2**40], INT))
    return model([node("Pad", "x", "p")], [pads], (1, 4))


def huge_constant():
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["c"]),
        node("Add", "x", "c"),
    ]
    return model(nodes, [tensor("s", np.array([2**20, 2**20], INT))], (1, 4))


def torn_tensor():
    torn = tensor("W", weight(4, 4))
    torn.raw_data = torn.raw_data[:10]
    return model([node("MatMul", "x", "W")], [torn], (1, 4))


def with_nan():
    return model([node("Mul", "x", "c")], [tensor("c", np.float32([np.nan]))], (1, 4))


def of_one(operator, shape=IMAGE, opset=17, weights=None, **attributes):
    """A model of one node that reads x and the weights."""
    weights = weights or {}
    made = node(operator, "x", *weights, **attributes)
    return model([made], [tensor(k, v) for k, v in weights.items()], shape, opset)


def of_names(*nodes):
    """A model of nodes `operator, inputs, outputs`, each a word."""
    made = [helper.make_node(o, i.split(), y.split()) for o, i, y in nodes]
    return model(made, [], (1, 4))


def of_input(kind):
    made = model([RELU], [], (1, 4))
    made.graph.input[0].type.tensor_type.elem_type = kind
    return made


def cast_and_back():
    there = helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16)
    return model([there, node("Cast", "h", to=TensorProto.FLOAT)], [], (1, 4))


def emptied():
    places = {"s": np.array([2], INT), "e": np.array([2], INT)}
    return of_one("Slice", weights=places)


KERNEL = {"W": weight(3, 2, 2, 2)}
POOL = {"kernel_shape": [2, 2]}
BAD = {
    r"Conv: `strides` must be 2 positive integers \(got \(0, 0\)": lambda: of_one(
        "Conv", weights=KERNEL, auto_pad="SAME_UPPER", strides=[0, 0]
    ),
    "AveragePool: `strides` must be": lambda: of_one(
        "AveragePool", **POOL, auto_pad="SAME_UPPER", strides=[0, 0]
    ),
    "MaxPool: `strides` must be": lambda: of_one(
        "MaxPool", **POOL, ceil_mode=1, strides=[0, 0]
    ),
    "Conv: `dilations` must be": lambda: of_one(
        "Conv", weights=KERNEL, dilations=[1, 0]
    ),
    "Conv: `pads` must be 4 integers from 0": lambda: of_one(
        "Conv", weights=KERNEL, pads=[0, 0, -1, 0]
    ),
    "Conv: `kernel_shape`": lambda: of_one("Conv", weights=KERNEL, kernel_shape=[3, 3]),
    "AveragePool: its input of shape": lambda: of_one(
        "AveragePool", kernel_shape=[10**9, 10**9]
    ),
    "MaxPool: its input of shape": lambda: of_one(
        "MaxPool", kernel_shape=[10**9, 10**9], ceil_mode=1
    ),
    "MaxPool: `pads` .* beyond its window": lambda: of_one(
        "MaxPool", **POOL, pads=[3] * 4
    ),
    "AveragePool: dilated": lambda: of_one(
        "AveragePool", **POOL, opset=19, dilations=[2, 2]
    ),
    "Gather: axis 0 lies outside": lambda: model(
        [
            helper.make_node("ReduceSum", ["x"], ["h"], keepdims=0),
            node("Gather", "h", "i"),
        ],
        [tensor("i", np.array(0, INT))],
        (1, 4),
    ),
    "Flatten: axis 7 lies outside": lambda: of_one("Flatten", axis=7),
    "Unsqueeze: an axis is repeated": lambda: of_one(
        "Unsqueeze", weights={"a": np.array([0, 0], INT)}
    ),
    "Slice: a step is 0": lambda: of_one(
        "Slice", weights={k: np.array([k == "e"], INT) for k in "seat"}
    ),
    r"Slice: it makes an array of shape \(0, 2, 5, 5\)": emptied,
    r"Reshape does not fit its inputs of shapes \(1, 2, 5, 5\), \(1,\)": lambda: of_one(
        "Reshape", weights={"s": np.array([7], INT)}
    ),
    r"Dropout must have one output \(got 0\)": lambda: of_names(("Dropout", "x", "")),
    "BatchNormalization must have one output": lambda: of_names(
        ("BatchNormalization", "x x x x x", "")
    ),
    "reads 'W', which holds int64": lambda: of_one(
        "MatMul", (1, 4), weights={"W": np.ones((4, 2), INT)}
    ),
    "Shape reads 'ghost', which nothing makes": lambda: of_names(
        ("Shape", "ghost", "y")
    ),
    "cannot run it": lambda: of_one(
        "Add", (1, 4), weights={"c": np.ones(4, np.float64)}
    ),
    "Gemm lacks its input `B`": lambda: of_one("Gemm", (1, 4)),
    "Sum lacks its input `data_0`": lambda: of_names(("Sum", "", "y")),
    "MaxPool lacks its attribute `kernel_shape`": lambda: of_one("MaxPool"),
    "Concat lacks its attribute `axis`": lambda: of_one("Concat"),
    "`kernel_shape` of MaxPool must be of type INTS": lambda: of_one(
        "MaxPool", kernel_shape=2
    ),
    "Relu has at most 1 inputs": lambda: of_names(("Relu", "x x", "y")),
    "Range is not in operator set 7": lambda: of_one("Range", opset=7),
    "Div: it divides by zero": lambda: of_one("Div", weights={"c": np.float32([0, 1])}),
    "Add reads 'c', which holds NaN or inf": lambda: of_one(
        "Add", weights={"c": np.float32([np.inf])}
    ),
    "Clip reads 'low', which holds NaN": lambda: of_one(
        "Clip", weights={"low": np.float32(np.nan)}
    ),
    "Clip: its limit inf leaves no number": lambda: of_one(
        "Clip", weights={"low": np.float32(np.inf)}
    ),
    "Clip: its limits must be single": lambda: of_one(
        "Clip", weights={"low": np.zeros(5, np.float32)}
    ),
    "its output for random inputs is NaN": lambda: of_one(
        "Mul", opset=17, weights={"c": np.float32([3e38])}, shape=(1, 9)
    ),
    "BatchNormalization: a variance plus `epsilon`": lambda: of_one(
        "BatchNormalization", weights={k: np.float32([-1, -1]) for k in "sbmv"}
    ),
    "`alpha` of LeakyRelu is nan": lambda: of_one("LeakyRelu", alpha=float("nan")),
    "`alpha` of Gemm is inf": lambda: of_one(
        "Gemm", (1, 4), weights={"W": weight(4, 4)}, alpha=float("inf")
    ),
    "Cast: it casts the network's values to float16": cast_and_back,
    r"type FLOAT or DOUBLE \(got INT64\)": lambda: of_input(TensorProto.INT64),
    r"type FLOAT or DOUBLE \(got 999\)": lambda: of_input(999),
    "'x' is made more than once": lambda: of_names(("Relu", "x", "x")),
    "'y' is made more than once": lambda: of_names(
        ("Relu", "x", "y"), ("Tanh", "x", "y")
    ),
    "lies in another file": external_data,
    "impossible shape": huge_tensor,
    "makes an array of shape": huge_intermediate,
    "too large for shapes": huge_constant,
    "'W' is damaged": torn_tensor,
    "holds NaN": with_nan,
    "operator sets 7 to": lambda: model([RELU], [], (1, 4), opset=999),
    "operator sets": lambda: model([RELU], [], (1, 4), opset=6),
    "one input and one output": lambda: model(
        [node("Add", "x", "z")], [], (1, 4), inputs=[info("z", (1, 4))]
    ),
    "must have a fixed shape": lambda: model([RELU], [], ("batch", "length")),
    "which nothing makes": lambda: model([node("Add", "x", "ghost")], [], (1, 4)),
    "depends on the network's input": lambda: model(
        [node("Reshape", "x", "x")], [], (1, 4)
    ),
    "does not depend on the input": lambda: model(
        [node("Identity", "c")], [tensor("c", weight(4))], (1, 4)
    ),
    "in training mode": lambda: model(
        [node("BatchNormalization", *"xsbmv", training_mode=1)],
        [tensor(k, np.ones(2, np.float32)) for k in "sbmv"],
        IMAGE,
        opset=15,
    ),
    "does not fit a kernel": lambda: model(
        [node("Conv", "x", "W")], [tensor("W", weight(1, 1, 2, 2))], (1, 4)
    ),
}


@pytest.mark.parametrize("message", list(BAD))
def test_bad_model(message, saved):
    with pytest.raises(ValueError, match=message):
        load_onnx(saved(BAD[message]()))


def test_bad_files(tmp_path):
    whole = (FILES / "perceptron.onnx").read_bytes()
    zipped = gzip.compress(whole)[:10] + b"\xff" * 100
    for name, data, message in (
        ("torn.onnx", whole[:700], "damaged"),
        ("text.onnx", b"{}" * 50, "damaged"),
        ("torn.onnx.gz", zipped, "damaged"),
        ("empty.onnx", b"", "is empty"),
        (
            "bare.onnx",
            onnx.ModelProto(ir_version=8).SerializeToString(),
            "holds no model",
        ),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            load_onnx(tmp_path / name)
    with pytest.raises(ValueError, match="No such file"):
        load_onnx(tmp_path / "absent.onnx")
    (tmp_path / "net.onnx.gz").write_bytes(whole)
    with pytest.raises(ValueError, match="gzip"):
        load_onnx(tmp_path / "net.onnx.gz")
