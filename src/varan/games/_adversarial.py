"""The least adversarial risk on a sample, by optimal transport.

An adversary moves every point by at most `eps` before it is classified. Two points of
different classes within `2 eps` can be moved to one place, where any classifier errs on
one of them. So of the plans between the sample and itself, with cost 0 for such pairs
and 1 for all others, the cheapest has a cost `D`, and the least risk of all classifiers
is `(1 - D) / 2`, whatever the classes' shares. With equal weights that is the size of
the largest matching of conflicting pairs over the number of points: found here by
Hopcroft and Karp's method on the pairs that a k-d tree returns.

Source: N. Garcia Trillos and R. Murray (2022), Adversarial Classification: Necessary
conditions and geometric flows, JMLR 23, arXiv 2011.10797.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..core._certificate import Certificate
from ..core._checks import (
    check_finite,
    check_nonempty,
    check_nonnegative,
    check_shape,
)


def adversarial_ot_lower_bound(
    X: Float[Array, "n d"] | Float[np.ndarray, "n d"],
    y: Int[Array, " n"] | Bool[Array, " n"] | Int[np.ndarray, " n"],
    epsilon: float,
) -> Certificate:
    """The least 0-1 risk of any classifier against moves of at most `epsilon`.

    `O(p sqrt(n))` for `p` conflicting pairs, on the host; the pairs are what takes
    memory.

    Args:
        X: Points, shape (n, d); moves are measured in Euclid's norm.
        y: Labels 0 and 1, shape (n,). The classes may be of any size.
        epsilon: How far the adversary moves a point, non-negative.

    Returns:
        A certificate: the bound is proved for the sample and attained there (by König's
        theorem); for the distribution behind it it is an estimate. `details` hold the
        number of matched pairs.

    Raises:
        ValueError: If a shape, a label or `epsilon` is not as required.

    Example:
        >>> import numpy as np
        >>> from varan.games import adversarial_ot_lower_bound
        >>> X, y = np.array([[0.0], [1.0], [1.5], [9.0]]), np.array([0, 1, 1, 0])
        >>> [float(adversarial_ot_lower_bound(X, y, e).value) for e in (0.4, 0.5)]
        [0.0, 0.25]

    Source:
        Garcia Trillos and Murray, 2022 (arXiv 2011.10797), the optimal transport
        formulation without assumptions on the classes' balance.

    Differences:
        A matching of size n takes the place of the linear programme of size n^2.
    """
    owner = "adversarial_ot_lower_bound"
    check_nonempty(owner, "X", X)
    check_shape(owner, "X", X, (None, None))
    check_finite(owner, "X", X)
    check_shape(owner, "y", y, (len(X),))
    check_nonnegative(owner, "epsilon", epsilon)
    labels = np.asarray(y)
    if not np.all((labels == 0) | (labels == 1)):
        raise ValueError(
            f"{owner}: `y` must hold labels 0 and 1 (got {np.unique(labels)[:5]})."
        )
    points = np.asarray(X)
    matched = _largest_matching(points[labels == 0], points[labels == 1], 2 * epsilon)
    floating = np.issubdtype(points.dtype, np.floating)
    dtype = jax.dtypes.canonicalize_dtype(points.dtype if floating else float)
    return Certificate(
        "least adversarial risk",
        jnp.asarray(matched / len(points), dtype),
        proof=True,
        statement="on this sample no classifier errs on less than value of the points "
        "after the adversary's moves",
        details={"matched": jnp.asarray(matched)},
    )


def adversarial_duality_gap(
    X: Float[Array, "n d"] | Float[np.ndarray, "n d"],
    y: Int[Array, " n"] | Bool[Array, " n"] | Int[np.ndarray, " n"],
    distances: Float[Array, " n"] | Float[np.ndarray, " n"],
    epsilon: float,
) -> Certificate:
    """How far a classifier is from the best against moves of up to `epsilon`.

    Its risk on the sample minus `adversarial_ot_lower_bound`, at the cost of that.

    Args:
        X: Points, shape (n, d).
        y: Labels 0 and 1, shape (n,).
        distances: How far each point must be moved until the classifier errs on it,
            zero where it errs already, infinite where it never does, shape (n,):
            `classifier.distances(X, y)` of a `LineClassifier` or `PlaneClassifier`, or
            lower bounds from a robustness certificate.
        epsilon: How far the adversary moves a point, non-negative.

    Returns:
        A certificate with `risk` and `bound` in its details: a proof for the sample,
        given the distances. For the distribution behind it, it is an estimate, too
        large on average: the bound fits the sample, the classifier need not.

    Raises:
        ValueError: If a shape, a label, a distance or `epsilon` is not as required.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import LineClassifier, adversarial_duality_gap
        >>> x, y = jnp.array([0.0, 1.0, 1.5, 9.0]), jnp.array([0, 1, 1, 1])
        >>> for boundary in (0.5, 1.2):
        ...     distances = LineClassifier(jnp.array([boundary])).distances(x, y)
        ...     print(adversarial_duality_gap(x[:, None], y, distances, 0.4).value)
        0.0
        0.5

    Source:
        Garcia Trillos and Murray, 2022 (arXiv 2011.10797), the optimal transport
        formulation.
    """
    owner = "adversarial_duality_gap"
    lower = adversarial_ot_lower_bound(X, y, epsilon)
    check_shape(owner, "distances", distances, (len(X),))
    moved = np.asarray(distances)
    if not np.all(moved >= 0):
        raise ValueError(
            f"{owner}: `distances` must not be negative (got minimum "
            f"{np.min(moved)}). Use zero where the classifier errs without a move."
        )
    risk = jnp.asarray(np.mean(moved <= epsilon), lower.value.dtype)
    return Certificate(
        "duality gap",
        risk - lower.value,
        proof=True,
        statement="on this sample no classifier's adversarial risk is lower by more "
        "than value",
        details={"risk": risk, "bound": lower.value},
    )


def _largest_matching(first, second, reach):
    """How many disjoint pairs of the two sets lie within reach, ends included."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching
    from scipy.spatial import KDTree

    if len(first) == 0 or len(second) == 0:
        return 0
    near = KDTree(first).query_ball_tree(KDTree(second), reach)
    ends = np.cumsum([0, *(len(row) for row in near)])
    columns = np.fromiter((j for row in near for j in row), np.int32, int(ends[-1]))
    graph = csr_array(
        (np.ones(len(columns), np.int8), columns, ends.astype(np.int32)),
        shape=(len(first), len(second)),
    )
    return int(np.sum(maximum_bipartite_matching(graph) >= 0))
