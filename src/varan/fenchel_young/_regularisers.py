"""Regularised prediction: what makes a Fenchel-Young loss.

A regulariser `Omega` turns scores into the prediction

    p(scores) = argmax_p <p, scores> - Omega(p),

whose value, the conjugate `Omega*(scores)`, is a smoothed maximum with the prediction
as its gradient. Fenchel and Young's inequality makes of it a loss

    L(scores, target) = Omega*(scores) + Omega(target) - <scores, target> >= 0,

zero exactly where the prediction is the target, convex in the scores, with the gradient
`prediction - target`. It is also the duality gap of the target as an answer to the
prediction problem: how much worse than the best it is. So the loss is its own
certificate.

Source: M. Blondel, A. F. T. Martins and V. Niculae, Learning with Fenchel-Young Losses,
Journal of Machine Learning Research 21 (2020), arXiv 1901.02324.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..core._certificate import Certificate
from ..core._envelope import envelope, tree_inner
from ..core._trees import tree_norm, tree_square
from ._entmax import check_alpha, check_scores, entmax


class Regulariser(eqx.Module):
    """A convex function whose conjugate and maximiser are known.

    Subclasses state `value`, `predict` and `conjugate`, whether `conjugate` is never
    below the truth (`bounds`), and the constant of strong convexity (`modulus`).

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.fenchel_young import Tsallis
        >>> loss = Tsallis(2.0).loss(jnp.array([2.0, 1.0]), jnp.array([1.0, 0.0]))
        >>> float(loss)  # a margin of one is enough
        0.0

    Source: Blondel et al. (2020), arXiv 1901.02324.
    """

    @abc.abstractmethod
    def value(self, p: PyTree[Array]) -> Float[Array, ""]:
        """`Omega(p)`; `inf` outside its domain."""

    @abc.abstractmethod
    def predict(self, scores: PyTree[Array]) -> PyTree[Array]:
        """The maximiser of `<p, scores> - Omega(p)`."""

    @abc.abstractmethod
    def conjugate(self, scores: PyTree[Array]) -> Float[Array, ""]:
        """The maximum `Omega*(scores)`; its gradient is the prediction."""

    @abc.abstractmethod
    def centre(self, scores: PyTree[Array]) -> PyTree[Array]:
        """Scores with the same losses, whose sums round less."""

    @property
    @abc.abstractmethod
    def bounds(self) -> bool:
        """Whether `conjugate` is an upper bound whatever its iteration reached."""

    @property
    @abc.abstractmethod
    def modulus(self) -> float | Float[Array, ""]:
        """The constant of strong convexity in the Euclidean norm; zero for none."""

    def loss(self, scores: PyTree[Array], target: PyTree[Array]) -> Float[Array, ""]:
        """The Fenchel-Young loss `Omega*(scores) + Omega(target) - <scores, target>`.

        Args:
            scores: A pytree of floating arrays.
            target: A pytree like it, in the domain of the regulariser.

        Returns:
            A scalar; never negative, zero exactly where the prediction is the target;
            `inf` outside the domain. The derivative with respect to `scores` is
            `predict(scores) - target`; that with respect to `target` is meant along
            the domain (up to a constant where all entries sum to one).

        Raises:
            ValueError: if the two are not alike.
            TypeError: if `scores` is not floating.
        """
        check_alike("loss", scores, target)
        centred = self.centre(scores)
        # A target of zero leaves out a score of -inf.
        kept = jtu.tree_map(
            lambda s, t: jnp.where(jnp.isneginf(s) & (t == 0), 0, s), centred, target
        )
        gap = self.conjugate(centred) + self.value(target) - tree_inner(kept, target)
        # Of a gap below zero only rounding is the cause; derivatives stay.
        return gap + jax.lax.stop_gradient(jax.nn.relu(-gap))

    def certify(self, scores: PyTree[Array], candidate: PyTree[Array]) -> Certificate:
        """How far a candidate is from the regularised prediction: its duality gap.

        Args:
            scores: A pytree of floating arrays.
            candidate: A pytree like it, for instance a target or an approximate
                prediction.

        Returns:
            A `Certificate` whose value is the loss. Its detail `distance` bounds the
            Euclidean distance to the prediction (`inf` without strong convexity).
        """
        gap = self.loss(scores, candidate)
        modulus = jnp.asarray(self.modulus, gap.dtype)
        distance = jnp.sqrt(2 * gap / jnp.where(modulus > 0, modulus, 1))
        return Certificate(
            "duality gap",
            gap,
            proof=self.bounds,
            statement="the candidate's <p, scores> - Omega(p) is at most `value` below "
            "the maximum",
            details={"distance": jnp.where(modulus > 0, distance, jnp.inf)},
        )


class Tsallis(Regulariser):
    """Tsallis' negative entropy on the simplex: softmax, entmax, sparsemax; losses.

    `Omega(p) = (sum p^alpha - 1) / (alpha (alpha - 1))`, at 1 Shannon's `sum p log p`.
    With `alpha = 1` the loss is the cross-entropy (less the target's entropy), with 2
    the sparsemax loss. For several labels at once, the target is their mean.

    Above 1 the loss is exactly zero, and not merely small, as soon as the target's
    score leads by `margin`; at 1 no finite lead is enough.

    The conjugate is evaluated by its dual, an upper bound for any threshold; so the
    certificate is a proof, up to rounding, whatever the iteration reached.

    Args:
        alpha: At least 1, as for `entmax`; an array is differentiated.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.fenchel_young import Tsallis
        >>> smooth, y = Tsallis(1.5), jnp.array([0.0, 1.0, 0.0])
        >>> scores = jnp.array([0.5, 1.0, -4.0])
        >>> gradient = jax.grad(smooth.loss)(scores, y)
        >>> bool(jnp.allclose(gradient, smooth.predict(scores) - y, atol=1e-6))
        True
        >>> smooth.margin
        2.0

    Source: Blondel et al. (2020), arXiv 1901.02324, sections 4.3 and 5.
    """

    alpha: Float[Array, ""] | float = 1.5

    def __check_init__(self):
        check_alpha("Tsallis", self.alpha, jnp.result_type(float))

    @property
    def margin(self) -> float | Float[Array, ""]:
        """The lead of the target's score from which the loss is zero."""
        if isinstance(self.alpha, (int, float)):
            return 1 / (self.alpha - 1) if self.alpha > 1 else math.inf
        return 1 / (self.alpha - 1)

    @property
    def bounds(self) -> bool:
        """Always: the conjugate is a dual value."""
        return True

    @property
    def modulus(self) -> float | Float[Array, ""]:
        """One up to `alpha = 2`: the curvature `p^(alpha - 2)` is at least one."""
        if isinstance(self.alpha, (int, float)):
            return 1.0 if self.alpha <= 2 else 0.0
        return jnp.where(self.alpha <= 2, jnp.ones_like(self.alpha), 0)

    def value(self, p: Float[Array, " n"]) -> Float[Array, ""]:
        """The negative entropy; `inf` outside the simplex.

        Args:
            p: Probabilities.
        """
        alpha, static = check_alpha("Tsallis", self.alpha, p.dtype)
        total = _negative_entropy(p, alpha if static is None else static)
        return on_simplex(p, total)

    def predict(self, scores: Float[Array, " n"]) -> Float[Array, " n"]:
        """`entmax(scores, alpha)`.

        Args:
            scores: A vector.
        """
        return entmax(scores, self.alpha)

    def centre(self, scores: Float[Array, " n"]) -> Float[Array, " n"]:
        """Less their maximum: a common shift changes no loss on the simplex.

        Args:
            scores: A vector.
        """
        scores = check_scores("Tsallis", scores)
        return scores - jnp.max(scores)

    def conjugate(self, scores: Float[Array, " n"]) -> Float[Array, ""]:
        """A smoothed maximum; at `alpha = 1` the log-sum-exp.

        Args:
            scores: A vector.
        """
        scores = check_scores("Tsallis", scores)
        alpha, static = check_alpha("Tsallis", self.alpha, scores.dtype)
        if static == 1:
            return jax.nn.logsumexp(scores)
        p = self.predict(scores)
        top = _dual(*jax.lax.stop_gradient((scores, p, alpha)))
        if static is not None:
            return envelope(top, p, scores)
        slope = -jax.grad(_negative_entropy, 1)(p, alpha)
        return envelope(top, (p, slope), (scores, alpha))


class Euclidean(Regulariser):
    """Half the square norm on a set with a projection: the projection as prediction.

    The set decides what is predicted: the box for independent labels, a box section
    for labels of a given number, the sparse simplex for at most k classes, the Birkhoff
    polytope for permutations, any `varan.operators.Polyhedron` for a structured output
    (SparseMAP). Targets are points of the set; a corner, for instance.

    Args:
        project: The projection on a closed set, from a pytree to one like it.
        convex: Whether the set is convex. If not, the loss keeps its sign, zeros and
            gradient, and only bounds no distance.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.fenchel_young import Euclidean
        >>> from varan.operators import project_box
        >>> labels = Euclidean(lambda s: project_box(s, 0.0, 1.0))
        >>> scores, y = jnp.array([2.0, 0.5, -3.0]), jnp.array([1.0, 0.0, 0.0])
        >>> [float(g) for g in jax.grad(labels.loss)(scores, y)]
        [0.0, 0.5, 0.0]

    Source: Blondel et al. (2020), arXiv 1901.02324, section 3.2; V. Niculae,
        A. F. T. Martins, M. Blondel and C. Cardie, SparseMAP, ICML 2018,
        arXiv 1802.04223; M. Blondel, Structured Prediction with Projection Oracles,
        NeurIPS 2019, arXiv 1910.11369.
    """

    project: Callable
    convex: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        if not callable(self.project):
            raise TypeError(
                "Euclidean: `project` must be callable (got "
                f"{type(self.project).__name__})."
            )

    @property
    def bounds(self) -> bool:
        """Not known: the projection is taken at its word."""
        return False

    @property
    def modulus(self) -> float:
        """One on a convex set."""
        return 1.0 if self.convex else 0.0

    def value(self, p: PyTree[Array]) -> Float[Array, ""]:
        """Half the square norm; `inf` where `p` is not its own projection.

        Args:
            p: A point.
        """
        fixed = jax.lax.stop_gradient(p)
        moved = tree_norm(jtu.tree_map(jnp.subtract, self.project(fixed), fixed))
        total = tree_square(p)
        slack = float(jnp.finfo(total.dtype).eps) ** 0.5
        outside = moved > slack * (1 + tree_norm(fixed))
        return jnp.where(outside, jnp.inf, total / 2)

    def predict(self, scores: PyTree[Array]) -> PyTree[Array]:
        """The projection of the scores.

        Args:
            scores: A pytree.
        """
        return self.project(scores)

    def centre(self, scores: PyTree[Array]) -> PyTree[Array]:
        """The scores themselves: the set is not known.

        Args:
            scores: A pytree.
        """
        return scores

    def conjugate(self, scores: PyTree[Array]) -> Float[Array, ""]:
        """`<p, scores> - ||p||^2 / 2` at the projection `p`.

        Args:
            scores: A pytree.
        """
        # No envelope here: the set's own data may be differentiated as well.
        p = self.project(scores)
        return tree_inner(scores, p) - tree_square(p) / 2


def fenchel_young_loss(
    max_function: Callable, regulariser: Callable | None = None
) -> Callable:
    """The Fenchel-Young loss of a smoothed maximum.

    Args:
        max_function: A convex function of scores whose gradient is the prediction: a
            log-sum-exp, a `perturbed_max`, a regulariser's `conjugate`.
        regulariser: Its conjugate, a function of the target. Without it the loss is
            right up to a constant that depends on the target alone: gradients are
            unchanged, but zero is no longer the least value unless the conjugate
            vanishes at the target, as at the corners for the log-sum-exp.

    Returns:
        A function `loss(scores, target, *more)`; what follows the target is handed to
        `max_function` (for a `perturbed_max`, the key). Its gradient with respect to
        the scores is `prediction - target`.

    Raises:
        TypeError: if `max_function` is not callable.
        ValueError: in the call, if scores and target are not alike.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.fenchel_young import fenchel_young_loss
        >>> logistic = fenchel_young_loss(jax.nn.logsumexp)
        >>> y = jnp.array([0.0, 1.0])
        >>> round(float(logistic(jnp.zeros(2), y)), 4)
        0.6931

    Source: Blondel et al. (2020), arXiv 1901.02324, definition 2; with perturbed
        maxima: Berthet et al. (2020), arXiv 2002.08676, section 4.

    Differences: `regulariser` closes the gap; scores come first, as in optax.
    """
    if not callable(max_function):
        raise TypeError(
            "fenchel_young_loss: `max_function` must be callable (got "
            f"{type(max_function).__name__})."
        )

    def loss(scores, target, *more):
        check_alike("fenchel_young_loss", scores, target)
        gap = max_function(scores, *more) - tree_inner(scores, target)
        return gap if regulariser is None else gap + regulariser(target)

    return loss


def check_alike(owner, scores, target):
    """Refuses a target that is not like the scores."""
    shapes = [
        (jtu.tree_structure(tree), [np.shape(v) for v in jtu.tree_leaves(tree)])
        for tree in (scores, target)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{owner}: `target` must have the shapes of `scores` (got {shapes[1][1]} "
            f"for {shapes[0][1]}). Pass a class as `jax.nn.one_hot`."
        )


def on_simplex(p, value):
    """`value` for probabilities, up to half the digits; NaN for NaN, else `inf`."""
    slack = float(jnp.finfo(p.dtype).eps) ** 0.5
    inside = jnp.all(p >= -slack) & (jnp.abs(jnp.sum(p) - 1) <= slack)
    return jnp.where(inside | jnp.any(jnp.isnan(p)), value, jnp.inf)


def _negative_entropy(p, alpha):
    """Tsallis' negative entropy; entries of zero add nothing, at any order."""
    if isinstance(alpha, float) and alpha == 1:
        return -jnp.sum(jax.scipy.special.entr(jnp.where(p >= 0, p, 0)))
    positive = p > 0
    powers = jnp.where(positive, jnp.where(positive, p, 1) ** alpha, 0)
    return (jnp.sum(powers) - 1) / (alpha * (alpha - 1))


def _dual(scores, p, alpha):
    """The dual value of the maximum over the simplex, at the threshold of `p`.

    For any threshold it is an upper bound of the maximum.
    """
    top = jnp.max(scores)
    z = (alpha - 1) * (scores - top)
    t = -(jnp.max(p) ** (alpha - 1))
    u = jax.nn.relu(z - t)
    powers = jnp.where(u > 0, jnp.where(u > 0, u, 1) ** (alpha / (alpha - 1)), 0)
    return top + (t + (jnp.sum(powers) * (alpha - 1) + 1) / alpha) / (alpha - 1)
