"""The curvature of each class's own loss: where the rare ones sit at saddle points.

At the end of a training the whole loss may be at a minimum and that of one class not:
its Hessian then has a clearly negative eigenvalue. All classes are measured in one
compiled loop, matrix-free.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from ..core._certificate import Certificate
from ..core._checks import is_traced
from ._hessian import RESIDUAL_SAYS, Eigenpairs, LossFn, hessian_top
from ._objective import refuse_undefined


class ClasswiseSpectrum(eqx.Module):
    """Both ends of the Hessian's spectrum, class by class.

    Args:
        largest: The largest eigenvalues; every array has a leading axis of classes.
        smallest: The smallest ones, likewise.
    """

    largest: Eigenpairs
    smallest: Eigenpairs

    @property
    def negativity(self) -> Float[Array, " classes"]:
        """`|lambda_min| / lambda_max` where the smallest is negative, else 0.

        Infinite where no eigenvalue is positive and the smallest is negative.
        """
        low, high = self.smallest.values[:, 0], self.largest.values[:, 0]
        ratio = jnp.maximum(-low, 0) / jnp.where(high > 0, high, 1)
        return jnp.where((high <= 0) & (low < 0), jnp.inf, ratio)

    @property
    def has_negative_curvature(self) -> Bool[Array, " classes"]:
        """Whether a negative eigenvalue is proved: value plus residual below zero.

        A Ritz value alone is never below the smallest eigenvalue; the residual leaves
        room for rounding, of which it is itself not free.
        """
        return self.smallest.values[:, 0] + self.smallest.residuals[:, 0] < 0

    @property
    def certificate(self) -> Certificate:
        """Of all classes: how far any value can be from an eigenvalue."""
        return Certificate(
            "eigenvalue residual",
            jnp.maximum(
                jnp.max(self.largest.residuals), jnp.max(self.smallest.residuals)
            ),
            proof=True,
            statement=RESIDUAL_SAYS,
            details={
                "smallest": self.smallest.values[:, 0],
                "negative": self.has_negative_curvature,
            },
        )


def classwise_spectrum(
    per_class_loss: LossFn,
    params: PyTree,
    batches: PyTree[Array],
    k: int = 1,
    *,
    max_steps: int = 64,
    tol: float = 1e-2,
    key: PRNGKeyArray,
) -> ClasswiseSpectrum:
    """The extreme eigenvalues of the Hessian of each class's loss, with residuals.

    Two runs of Lanczos a class, `max_steps` Hessian products each at most.

    Args:
        per_class_loss: `(params, batch) -> scalar`, of one class's batch. The same
            function object does not compile again.
        params: Any pytree; its floating arrays are the variables.
        batches: Arrays with a leading axis of classes. `batches_by_class` makes them,
            with weights of zero for what fills the rarer ones up.
        k: Eigenvalues at either end.
        max_steps, tol: As in `hessian_top`.
        key: Random key of the start.

    Returns:
        The largest and the smallest eigenvalues of every class; NaN, under jit, for a
        class whose loss or gradient is not finite.

    Raises:
        ValueError: As `hessian_top`, or if the batches differ in their classes or have
            none.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.sharpness import classwise_spectrum
        >>> loss = lambda w, a: jnp.sum(a * w**2) / 2
        >>> curvatures = jnp.array([[1.0, 2.0], [-3.0, 4.0]])  # of two classes
        >>> found = classwise_spectrum(
        ...     loss, jnp.ones(2), curvatures, key=jax.random.key(0))
        >>> [round(float(ratio), 3) for ratio in found.negativity]
        [0.0, 0.75]
        >>> found.has_negative_curvature.tolist()
        [False, True]

    Source: Rangwani, Aithal, Mishra and Babu, 2022, "Escaping Saddle Points for
        Effective Generalization on Class-Imbalanced Data", arXiv:2212.13827, section 3.

    Differences: The ends of the spectrum, which carry proofs; `spectral_density` with
        one class's batch gives the paper's picture.
    """
    sizes = {jnp.shape(leaf)[:1] for leaf in jtu.tree_leaves(batches)}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        raise ValueError(
            "classwise_spectrum: the arrays of `batches` must have one leading axis of "
            f"classes, of which there is one at least (got lengths {sorted(sizes)})."
        )
    found = _ends(per_class_loss, params, batches, jnp.asarray(tol), key, k, max_steps)
    tops = found.largest.values[:, 0]
    if not is_traced(tops):
        for c in np.flatnonzero(np.isnan(tops)):
            own = jtu.tree_map(lambda leaf, c=c: leaf[c], batches)
            owner = f"classwise_spectrum (class {c})"
            refuse_undefined(owner, tops[c], per_class_loss, params, own)
    return found


@eqx.filter_jit
def _ends(loss, params, batches, tol, key, k, max_steps):
    def of_class(batch):
        return ClasswiseSpectrum(*(
            hessian_top(
                loss, params, batch, k=k, which=which, max_steps=max_steps, tol=tol,
                key=key,
            )
            for which in ("largest", "smallest")
        ))  # fmt: skip

    return jax.lax.map(of_class, batches)


def batches_by_class(
    x: Float[np.ndarray, "samples ..."],
    labels: Int[np.ndarray, " samples"],
    classes: int,
    *,
    most: int | None = None,
) -> tuple[Float[Array, ...], Int[Array, ...], Float[Array, ...]]:
    """Samples sorted by class and filled up to one length, with weights that say so.

    Args:
        x: The samples.
        labels: 0 .. classes - 1.
        classes: How many.
        most: Samples of a class at most, the first ones; all if left out.

    Returns:
        Samples, labels and weights, each with leading axes (classes, length). The
        weights of a class sum to 1: `jnp.sum(weights * losses)` is its mean loss.

    Raises:
        ValueError: If a class has no sample, a label is no class, or the lengths
            differ.

    Example:
        >>> import numpy as np
        >>> from varan.sharpness import batches_by_class
        >>> x, y = np.array([5.0, 6.0, 7.0]), np.array([1, 0, 1])
        >>> samples, labels, weights = batches_by_class(x, y, 2)
        >>> samples.tolist(), weights.tolist()
        ([[6.0, 6.0], [5.0, 7.0]], [[1.0, 0.0], [0.5, 0.5]])
    """
    x, labels = np.asarray(x), np.asarray(labels)
    if len(x) != len(labels):
        raise ValueError(
            "batches_by_class: `x` and `labels` must have one length (got "
            f"{len(x)} and {len(labels)})."
        )
    if classes < 1 or not np.all(np.isin(labels, np.arange(classes))):
        odd = np.setdiff1d(labels, np.arange(classes))
        raise ValueError(
            f"batches_by_class: `labels` must lie in 0 .. {classes - 1} (got "
            f"{', '.join(map(str, odd[:5]))} among them)."
        )
    rows = [np.flatnonzero(labels == c)[:most] for c in range(classes)]
    empty = [c for c in range(classes) if not rows[c].size]
    if empty:
        raise ValueError(
            "batches_by_class: every class must have a sample (got none of class "
            f"{', '.join(map(str, empty))})."
        )
    length = max(row.size for row in rows)
    filled = np.stack(
        [np.pad(row, (0, length - row.size), mode="edge") for row in rows]
    )
    present = np.arange(length)[None] < np.array([row.size for row in rows])[:, None]
    weights = present / present.sum(1, keepdims=True)
    dtype = jnp.result_type(float)
    # Repeats of a sample, not zeros: no value that the data do not have.
    return (
        jnp.asarray(x[filled]),
        jnp.asarray(labels[filled]),
        jnp.asarray(weights, dtype),
    )
