"""VNN-LIB files: both dialects, and what must be refused."""

import gzip

import numpy as np
import pytest

from varan.lipschitz import read_vnnlib

DECLARED = """
; a comment (with a parenthesis
(declare-const X_0 Real)
(declare-const X_1 Real)
(declare-const Y_0 Real)
(declare-const Y_1 Real)
"""
BOX = """
(assert (>= X_0 -1.0)) (assert (<= X_0 1e0))
(assert (and (>= X_1 0) (<= X_1 (/ 1 2))))
""".replace("(/ 1 2)", "0.5")
DISJUNCTION = "(assert (or (and (<= Y_0 Y_1) (>= Y_1 2)) (and (< (* 2 Y_0) -3))))"
TENSORS = """
(vnnlib-version <2.0>)
(declare-network f
    (declare-input X Real [1,2])
    (declare-output Y Real [2]))
(assert (<= X[0,0] 1.0)) (assert (>= X[0,0] -1.0))
(assert (<= X[0,1] 0.5)) (assert (>= X[0,1] 0.0))
(assert (or (and (<= Y[0] Y[1]) (>= Y[1] 2)) (< (* 2 Y[0]) (- 3))))
"""


@pytest.fixture
def read(tmp_path):
    def run(text):
        path = tmp_path / "p.vnnlib"
        path.write_text(text)
        return read_vnnlib(path)

    return run


@pytest.mark.parametrize("text", [DECLARED + BOX + DISJUNCTION, TENSORS])
def test_disjunction(text, read):
    first, second = read(text)
    np.testing.assert_array_equal(first.lower, [-1, 0])
    np.testing.assert_array_equal(first.upper, [1, 0.5])
    np.testing.assert_array_equal(first.A, [[1, -1], [0, -1]])
    np.testing.assert_array_equal(first.b, [0, -2])
    np.testing.assert_array_equal(second.A, [[2, 0]])
    np.testing.assert_array_equal(second.b, [-3])
    assert second.strict.tolist() == [True] and not first.strict.any()
    x = np.zeros(2)
    assert first.contains(x, np.array([1.0, 2.0]))
    assert not first.contains(x, np.array([3.0, 2.0]))
    assert not second.contains(x, np.array([-1.5, 0.0]))  # strict
    assert second.contains(x, np.array([-1.6, 0.0]))
    assert not second.contains(x + 2, np.array([-1.6, 0.0]))


def test_terms_are_linear_combinations(read):
    (case,) = read(
        DECLARED + BOX + "(assert (= (+ Y_0 (* -2 Y_1) 1) (- Y_0 (* Y_1 3.0) 2)))"
    )
    np.testing.assert_array_equal(case.A, [[0, 1], [0, -1]])
    np.testing.assert_array_equal(case.b, [-3, 3])


def test_cases_of_inputs(read):
    """A disjunction over boxes, as the older properties have it."""
    boxes = "(assert (or (and (<= X_0 0)) (and (>= (* 2 X_0) 1))))"
    first, second = read(DECLARED + BOX + boxes)
    assert first.upper[0] == 0 and second.lower[0] == 0.5


def test_compressed_file(tmp_path):
    path = tmp_path / "p.vnnlib.gz"
    path.write_bytes(gzip.compress((DECLARED + BOX).encode()))
    (case,) = read_vnnlib(path)
    assert case.A.shape == (0, 2)


MANY = "(or " + "(<= Y_0 1) " * 200 + ")"
BAD = {
    "needs a lower and an upper bound": DECLARED + "(assert (<= X_0 1))",
    "the box is empty: input 0": DECLARED + BOX + "(assert (>= X_0 2))",
    "a product of two variables": DECLARED + "(assert (<= (* Y_0 Y_1) 1))",
    "bound one input or be linear in outputs": DECLARED + "(assert (<= X_0 Y_0))",
    "is the file complete": (DECLARED + BOX)[:-4],
    "a closing parenthesis too many": DECLARED + BOX + ")",
    "X_7 was not declared": DECLARED + "(assert (<= X_7 1))",
    "Z was not declared": DECLARED + "(assert (<= Z 1))",
    "is no finite number": DECLARED + "(assert (<= X_0 nan))",
    "out of order or twice": DECLARED + "(declare-const X_1 Real)",
    "variables are called": DECLARED + "(declare-const Z_0 Real)",
    "'sin' is not supported": DECLARED + "(assert (<= (sin Y_0) 1))",
    "'=>' is not supported": DECLARED + "(assert (=> Y_0 1))",
    "'minimize' is not supported": DECLARED + "(minimize Y_0)",
    "it must declare inputs": "(assert true)",
    "is no condition": DECLARED + "(assert true)",
    "nested deeper": "(" * 200 + ")" * 200,
    "more than 10000 cases": DECLARED + f"(assert (and {MANY} {MANY}))",
    "lies outside the shape": TENSORS + "(assert (<= X[0,2] 1))",
    "the impossible shape": TENSORS.replace("[1,2]", "[99999,99999]"),
    "is of kind Int": TENSORS.replace("X Real", "X Int"),
    "the impossible shape \\[1,-2]": TENSORS.replace("[1,2]", "[1,-2]"),
    "a declaration is not understood.*name, a kind": "(declare-network N"
    " (declare-input X))",
    "a declaration is not understood: .*'X_0'": "(declare-const (X_0) Real)",
    r"\[\] is not supported inside": "(declare-network N ())",
    "X is declared twice": TENSORS.replace("output Y", "output X"),
    r"X_9{55}\.\.\. was not declared": f"{DECLARED}(assert (<= X_{'9' * 5000} 1))",
    r"called X_0, .* X_9{55}\.\.\.": f"(declare-const X_{'9' * 5000} Real)",
    r"X\[9{55}\.\.\. lies outside": f"{TENSORS}(assert (<= X[{'9' * 5000}] 1))",
    r"X\[0 1\] lies outside": TENSORS + "(assert (<= X[0 1] 1))",
    r"\[ was not declared": TENSORS + "(assert (<= [ 1))",
    "1_0 is no finite number": DECLARED + "(assert (<= X_0 1_0))",
    "1e999 is no finite number": DECLARED + "(assert (<= X_0 1e999))",
    "a number is too large": DECLARED + "(assert (<= (* 1e300 1e300 Y_0) 0))",
    "a number is too large; d": DECLARED + "(assert (<= (+ 1e308 1e308) Y_0))",
    "a number is too large; do": DECLARED + "(assert (<= (* 1e-300 X_0) 1e300))",
    "'\\*' is not supported": DECLARED + "(assert (<= (*) Y_0))",
    "more than one network": TENSORS + "(declare-network g)",
}


@pytest.mark.parametrize("message", list(BAD))
def test_bad_file(message, read):
    with pytest.raises(ValueError, match=message):
        read(BAD[message])


def test_absent_and_binary_files(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        read_vnnlib(tmp_path / "absent.vnnlib")
    zipped = gzip.compress(DECLARED.encode())[:10] + b"\xff" * 100
    (tmp_path / "p.vnnlib.gz").write_bytes(zipped)
    with pytest.raises(ValueError, match="damaged"):
        read_vnnlib(tmp_path / "p.vnnlib.gz")
    (tmp_path / "p.vnnlib").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="it is no text"):
        read_vnnlib(tmp_path / "p.vnnlib")
