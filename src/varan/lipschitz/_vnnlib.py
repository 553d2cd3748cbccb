"""Properties of networks from VNN-LIB files, read as data.

A file states when a property is VIOLATED: inputs in a box, outputs in a polyhedron, or
a disjunction of such cases. The reader brings the assertions into disjunctive normal
form and takes both dialects: 1.0 (`declare-const X_0 Real`) and 2.0 (`declare-network`
with `X[0,1]`).
"""

from __future__ import annotations

import itertools
import math
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from ._files import FileProblem, read_bytes

_TOKEN = re.compile(r"[()]|[^\s()\[\]]+(?:\[[^\]]*\])?|\[[^\]]*\]|[\[\]]")
_INDEXED = re.compile(r"([A-Za-z]\w*?)(?:_(\d{1,9})|(\[.*\]))", re.ASCII | re.DOTALL)
_INTEGERS = re.compile(r"\[\s*(?:\d{1,9}\s*(?:,\s*\d{1,9}\s*)*)?\]", re.ASCII)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_MOST_CASES = 10_000
_MOST_VARIABLES = 10_000_000
_MOST_DEPTH = 100
_MOST_BYTES = 500_000_000


class UnsafeCase(NamedTuple):
    """Inputs in a box whose outputs lie in a polyhedron: together a violation.

    Args:
        lower: Smallest value of each input, flat.
        upper: Largest value of each input, flat.
        A: Coefficients: unsafe where `A @ y <= b` in every row.
        b: Right-hand sides.
        strict: Rows where the file says `<`.

    Example:
        >>> import numpy as np
        >>> from varan.lipschitz import UnsafeCase
        >>> case = UnsafeCase(np.zeros(1), np.ones(1), np.eye(1), np.zeros(1),
        ...                   np.array([False]))
        >>> case.contains(np.array([0.5]), np.array([-1.0]))
        True
    """

    lower: Float[np.ndarray, " inputs"]
    upper: Float[np.ndarray, " inputs"]
    A: Float[np.ndarray, "rows outputs"]
    b: Float[np.ndarray, " rows"]
    strict: Bool[np.ndarray, " rows"]

    def contains(self, x: np.ndarray, y: np.ndarray) -> bool:
        """Whether an input and its output are a violation."""
        inside = np.all((self.lower <= x) & (x <= self.upper))
        gap = self.A @ y - self.b
        return bool(inside and np.all(np.where(self.strict, gap < 0, gap <= 0)))


def read_vnnlib(path: str | Path) -> list[UnsafeCase]:
    """Reads a property from a VNN-LIB file.

    Args:
        path: A file of version 1.0 or 2.0, or one compressed as `.gz`. Every input
            needs two bounds; conditions on outputs must be linear.

    Returns:
        The cases in which the property is violated; it holds if none can happen.

    Raises:
        ValueError: A file that is damaged or says what is not supported: nonlinear
            terms, conditions that mix inputs and outputs, inputs without bounds, an
            empty box, several networks.

    Example:
        >>> import pathlib, tempfile
        >>> from varan.lipschitz import read_vnnlib
        >>> text = '''
        ... (declare-const X_0 Real) (declare-const Y_0 Real) (declare-const Y_1 Real)
        ... (assert (>= X_0 -1)) (assert (<= X_0 1)) (assert (<= Y_0 Y_1))'''
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "p.vnnlib")
        ...     _ = file.write_text(text)
        ...     (case,) = read_vnnlib(file)
        >>> case.A.tolist(), case.b.tolist(), case.upper.tolist()
        ([[1.0, -1.0]], [0.0], [1.0])

    Source:
        Demarchi, Guidotti, Pulina and Tacchella, 2023, "Supporting Standardization of
        Neural Networks Verification with VNN-LIB and CoCoNet"; www.vnnlib.org.
    """
    path = Path(path)
    try:
        return _cases(_read(path))
    except FileProblem as problem:
        raise ValueError(f"read_vnnlib: {path.name}: {problem}") from problem


def _read(path: Path) -> str:
    try:
        return read_bytes("read_vnnlib", path, _MOST_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileProblem("it is no text.") from error
    except zlib.error as error:
        raise FileProblem("it is damaged. Compress it anew.") from error


def _quoted(part) -> str:
    """A part of the file for a message: files may hold words of any length."""
    text = part if isinstance(part, str) else repr(part)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _integers(text: str) -> tuple[int, ...] | None:
    """What `[1, 2]` lists, if it is such a list of integers from 0."""
    if not _INTEGERS.fullmatch(text):
        return None
    return tuple(map(int, re.findall(r"\d+", text)))


def _expressions(text: str) -> list:
    """Nested lists of words; comments run from a semicolon to the end of the line."""
    text = re.sub(r";[^\n]*", "", text)
    stack: list[list] = [[]]
    for token in _TOKEN.findall(text):
        if token == "(":
            stack.append([])
            if len(stack) > _MOST_DEPTH:
                raise FileProblem(f"parentheses are nested deeper than {_MOST_DEPTH}.")
        elif token == ")":
            if len(stack) == 1:
                raise FileProblem("there is a closing parenthesis too many.")
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(token)
    if len(stack) != 1:
        raise FileProblem("a closing parenthesis is missing; is the file complete?")
    return stack[0]


class _Atom(NamedTuple):
    """`sum coefficients . variables + constant <= 0` (or `< 0`)."""

    coefficients: dict[tuple[str, int], float]
    constant: float
    strict: bool


class _Variables:
    """Declared inputs and outputs, by flat index."""

    def __init__(self):
        self.sizes = {"input": 0, "output": 0}
        self.kinds: dict[str, tuple[str, tuple[int, ...] | None]] = {}

    def declare_scalar(self, name: str) -> None:
        match = _INDEXED.fullmatch(name)
        if not match or match[1] not in ("X", "Y") or match[2] is None:
            raise FileProblem(
                f"variables are called X_0, X_1, ... and Y_0, ...: {_quoted(name)}."
            )
        kind = "input" if match[1] == "X" else "output"
        if int(match[2]) != self.sizes[kind]:
            raise FileProblem(f"{name} is declared out of order or twice.")
        self.sizes[kind] += 1
        self.kinds[match[1]] = (kind, None)

    def declare_tensor(self, kind: str, name: str, shape: tuple[int, ...]) -> None:
        if self.sizes[kind]:
            raise FileProblem(f"there is more than one {kind}.")
        if name in self.kinds:
            raise FileProblem(f"{_quoted(name)} is declared twice.")
        size = math.prod(shape)
        if not 0 < size <= _MOST_VARIABLES:
            raise FileProblem(
                f"{kind} {_quoted(name)} has the impossible shape {_quoted(shape)}."
            )
        self.sizes[kind] = size
        self.kinds[name] = (kind, shape)

    def find(self, name: str) -> tuple[str, int]:
        match = _INDEXED.fullmatch(name)
        if match is None and name in self.kinds and self.kinds[name][1] in ((), (1,)):
            return self.kinds[name][0], 0
        if not match or match[1] not in self.kinds:
            raise FileProblem(f"{_quoted(name)} was not declared.")
        kind, shape = self.kinds[match[1]]
        if (shape is None) != (match[3] is None):
            raise FileProblem(f"{_quoted(name)} was not declared.")
        index = int(match[2]) if shape is None else _flat_index(name, match[3], shape)
        if index >= self.sizes[kind]:
            raise FileProblem(f"{name} was not declared.")
        return kind, index


def _flat_index(name: str, place: str, shape: tuple[int, ...]) -> int:
    places = _integers(place)
    if (
        places is None
        or len(places) != len(shape)
        or any(k >= n for k, n in zip(places, shape, strict=True))
    ):
        raise FileProblem(f"{_quoted(name)} lies outside the shape {_quoted(shape)}.")
    index = 0
    for k, n in zip(places, shape, strict=True):
        index = index * n + k
    return index


def _cases(text: str) -> list[UnsafeCase]:
    variables, asserted = _Variables(), []
    for expression in _expressions(text):
        if not isinstance(expression, list) or not expression:
            raise FileProblem(f"{_quoted(expression)} is no command.")
        head = expression[0]
        if head == "declare-const":
            if (
                len(expression) != 3
                or not isinstance(expression[1], str)
                or expression[2] != "Real"
            ):
                raise FileProblem(
                    f"a declaration is not understood: {_quoted(expression)}."
                )
            variables.declare_scalar(expression[1])
        elif head == "declare-network":
            _declare_network(expression, variables)
        elif head == "assert" and len(expression) == 2:
            asserted.append(expression[1])
        elif head not in ("vnnlib-version", "set-logic", "check-sat"):
            raise FileProblem(f"the command {_quoted(repr(head))} is not supported.")
    if not all(variables.sizes.values()):
        raise FileProblem("it must declare inputs and outputs.")
    conjunctions = _normal_form(["and", *asserted], variables)
    return [_case(atoms, variables.sizes) for atoms in conjunctions]


def _declare_network(expression, variables) -> None:
    if any(kind == "input" for kind, _ in variables.kinds.values()):
        raise FileProblem("it declares more than one network.")
    for part in expression[2:]:
        if not part or part[0] not in ("declare-input", "declare-output"):
            raise FileProblem(f"{_quoted(part)} is not supported inside a network.")
        _declare(part, variables)


def _declare(part, variables) -> None:
    """`(declare-input X Real [1,2])` and the like."""
    if len(part) not in (3, 4) or not all(isinstance(word, str) for word in part):
        raise FileProblem(
            f"a declaration is not understood: {_quoted(part)}. It needs a name, a "
            "kind and a shape."
        )
    head, name, kind, *rest = part
    if kind not in ("Real", "real", "float32", "float64", "Float32", "Float64"):
        raise FileProblem(
            f"{_quoted(name)} is of kind {_quoted(kind)}; real numbers are supported."
        )
    shape = _integers(rest[0]) if rest else ()
    if shape is None:
        raise FileProblem(
            f"{_quoted(name)} has the impossible shape {_quoted(rest[0])}."
        )
    variables.declare_tensor(head[8:], name, shape)


def _normal_form(expression, variables: _Variables) -> list[list[_Atom]]:
    """The expression as a disjunction of conjunctions of inequalities."""
    if not isinstance(expression, list) or not expression:
        raise FileProblem(f"{_quoted(repr(expression))} is no condition.")
    head, *parts = expression
    if head == "or":
        found = [case for part in parts for case in _normal_form(part, variables)]
    elif head == "and":
        found = [[]]
        for part in parts:
            further = _normal_form(part, variables)
            if len(found) * len(further) > _MOST_CASES:
                raise FileProblem(f"it has more than {_MOST_CASES} cases.")
            found = [a + b for a, b in itertools.product(found, further)]
    elif head in ("<=", "<", ">=", ">", "=", "==") and len(parts) == 2:
        found = [_comparison(head, *parts, variables)]
    else:
        raise FileProblem(f"the condition {_quoted(repr(head))} is not supported.")
    if len(found) > _MOST_CASES:
        raise FileProblem(f"it has more than {_MOST_CASES} cases.")
    return found


def _comparison(head, left, right, variables) -> list[_Atom]:
    terms = [_linear(left, variables), _linear(right, variables)]
    difference, constant = _finite(*_combined(terms, [1.0, -1.0]))
    negated = {k: -value for k, value in difference.items()}
    below = _Atom(difference, constant, head == "<")
    above = _Atom(negated, -constant, head == ">")
    if head in ("=", "=="):
        return [below, above]
    return [below if head in ("<", "<=") else above]


def _linear(term, variables) -> tuple[dict[tuple[str, int], float], float]:
    """A term as coefficients and a constant."""
    if isinstance(term, str):
        return _word(term, variables)
    if not term or not isinstance(term[0], str):
        raise FileProblem("a term is empty.")
    head, *parts = term
    linear = [_linear(part, variables) for part in parts]
    if head == "*" and linear:
        return _finite(*_product(linear))
    if head == "+" and linear:
        return _finite(*_combined(linear, [1.0] * len(linear)))
    if head == "-" and linear:
        signs = [-1.0] if len(linear) == 1 else [1.0] + [-1.0] * (len(linear) - 1)
        return _finite(*_combined(linear, signs))
    raise FileProblem(f"the operation {_quoted(repr(head))} is not supported.")


def _word(word: str, variables):
    """A number or a variable."""
    try:
        value = float(word)
    except ValueError:
        return {variables.find(word): 1.0}, 0.0
    # Python's numbers are more than the format's: `1_0`, `nan`.
    if not _NUMBER.fullmatch(word) or not math.isfinite(value):
        raise FileProblem(f"{_quoted(word)} is no finite number.")
    return {}, value


def _finite(coefficients, constant):
    if not all(map(math.isfinite, (*coefficients.values(), constant))):
        raise FileProblem("a number is too large; double precision is supported.")
    return coefficients, constant


def _product(factors):
    scale, moving = 1.0, None
    for coefficients, constant in factors:
        if not coefficients:
            scale *= constant
        elif moving is None:
            moving = coefficients, constant
        else:
            raise FileProblem("a product of two variables is not linear.")
    if moving is None:
        return {}, scale
    coefficients, constant = moving
    return {k: scale * v for k, v in coefficients.items()}, scale * constant


def _combined(terms, signs):
    total: dict[tuple[str, int], float] = {}
    for (coefficients, _), sign in zip(terms, signs, strict=True):
        for key, value in coefficients.items():
            total[key] = total.get(key, 0.0) + sign * value
    constants = [s * c for (_, c), s in zip(terms, signs, strict=True)]
    try:
        return total, math.fsum(constants)
    except OverflowError:
        return total, math.inf


def _case(atoms: list[_Atom], sizes) -> UnsafeCase:
    lower = np.full(sizes["input"], -np.inf)
    upper = np.full(sizes["input"], np.inf)
    rows = []
    for atom in atoms:
        terms = {k: v for k, v in atom.coefficients.items() if v}
        kinds = {kind for kind, _ in terms}
        if kinds == {"output"}:
            rows.append((terms, 0.0 - atom.constant, atom.strict))
        elif kinds == {"input"} and len(terms) == 1:
            (((_, index), slope),) = terms.items()
            _, side = _finite({}, -atom.constant / slope)
            if slope > 0:
                upper[index] = min(upper[index], side)
            else:
                lower[index] = max(lower[index], side)
        else:
            raise FileProblem(
                "conditions must bound one input or be linear in outputs alone."
            )
    _check_box(lower, upper)
    A = np.zeros((len(rows), sizes["output"]))
    for k, (terms, _, _) in enumerate(rows):
        for (_, index), slope in terms.items():
            A[k, index] = slope
    b = np.array([row[1] for row in rows], float)
    return UnsafeCase(lower, upper, A, b, np.array([r[2] for r in rows], bool))


def _check_box(lower, upper) -> None:
    free = np.flatnonzero(~(np.isfinite(lower) & np.isfinite(upper)))
    if len(free):
        raise FileProblem(f"input {free[0]} needs a lower and an upper bound.")
    crossed = np.flatnonzero(lower > upper)
    if len(crossed):
        raise FileProblem(
            f"the box is empty: input {crossed[0]} must lie between "
            f"{lower[crossed[0]]} and {upper[crossed[0]]}."
        )
