"""Neural-collapse metrics: how far features are from one point a class, in a frame.

With h_i the feature of sample i, m_k the mean of class k and m the mean of the class
means,

    Sigma_W = (1/N) sum_i (h_i - m_{y_i})(h_i - m_{y_i})'
    Sigma_B = (1/K) sum_k (m_k - m)(m_k - m)'

collapse says: Sigma_W = 0 beside Sigma_B (NC1), the centred means form a simplex
equiangular tight frame (NC2), and the last layer's rows are parallel to them (NC3).
No d x d matrix is formed: a call costs O(N d K + d K^2).

Source: Papyan, Han, Donoho, 2020 (arXiv 2008.08186); the ratio form of NC1: Tirer,
Huang, Niles-Weed, 2023 (arXiv 2210.16658).
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer
from scipy.linalg import helmert

from ..core._checks import check_finite, check_nonempty, check_shape, is_traced
from ..core._trees import tree_norm


class CollapseMetrics(eqx.Module):
    """What `collapse_metrics` measured.

    Args:
        tr_w: Tr Sigma_W, the variability inside the classes.
        tr_b: Tr Sigma_B, the variability between the class means.
        nc1_ratio: Tr Sigma_W / Tr Sigma_B, the form that the theorems are about.
        nc1_pinv: Tr(Sigma_W Sigma_B^+) / K, the form that experiments report.
        nc2: Frobenius distance of the normalised Gram matrix of the centred class
            means from that of a simplex equiangular tight frame.
        nc3: Frobenius distance of the normalised last layer from the normalised
            centred class means; `None` where no last layer was given.
    """

    tr_w: Float[Array, ""]
    tr_b: Float[Array, ""]
    nc1_ratio: Float[Array, ""]
    nc1_pinv: Float[Array, ""]
    nc2: Float[Array, ""]
    nc3: Float[Array, ""] | None


def collapse_metrics(
    features: Float[Array, "N d"],
    labels: Integer[Array, " N"],
    head: Float[Array, "K d"] | None = None,
    *,
    num_classes: int | None = None,
    allow_unbalanced: bool = False,
) -> CollapseMetrics:
    """Measures how far features are from neural collapse.

    Plain arrays in; safe under `jit`, `vmap` and `grad`, also at exact collapse.

    Args:
        features: Output of the layer before the last, one row a sample.
        labels: Class of each sample, `0 .. K-1`, every class present.
        head: The last layer's matrix, for `nc3`.
        num_classes: K. Needed where `labels` is traced; else read off the labels.
        allow_unbalanced: Accept classes of different sizes. Sigma_W then weighs
            samples alike and Sigma_B classes alike, and no theorem stands behind the
            numbers.

    Returns:
        The metrics, scalars in the features' dtype. NaN where the class means
        coincide (no metric is defined there) and, for traced labels, where a class is
        empty or a label out of range.

    Raises:
        ValueError: On wrong shapes, NaN, labels out of range, an empty class,
            classes of different sizes, or coinciding class means.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.landscape import collapse_metrics
        >>> means = jnp.array([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
        >>> labels = jnp.array([0, 0, 1, 1, 2, 2])
        >>> noise = 0.1 * jnp.array([[1.0], [-1.0]] * 3)
        >>> metrics = collapse_metrics(means[labels] + noise, labels, head=means)
        >>> round(float(metrics.nc1_ratio), 5), bool(metrics.nc2 < 1e-5)
        (0.01125, True)

    Source:
        Papyan, Han, Donoho, 2020 (arXiv 2008.08186), section 2; Tirer, Huang,
        Niles-Weed, 2023 (arXiv 2210.16658), section 3.

    Differences:
        The centre is the mean of the class means, which is the global mean when the
        classes are of one size. The pseudo-inverse is taken of the K - 1 contrasts
        between class means instead of Sigma_B, so that its generic rank is full and
        no singular value is rounding noise that a cut-off has to guess.
    """
    owner = "collapse_metrics"
    num_classes = check_labelled(owner, features, labels, num_classes)
    if not allow_unbalanced:
        check_balanced(owner, labels, "Subsample, or pass `allow_unbalanced=True`.")
    means = class_means(features, labels, num_classes=num_classes)
    deviations = features - means[labels]
    contrasts = jnp.asarray(helmert(num_classes), features.dtype) @ means
    # Means that coincide leave rounding, which must not become a plausible number.
    rounding = 4 * jnp.finfo(features.dtype).eps * jnp.max(jnp.abs(means))
    differ = jnp.max(jnp.abs(contrasts)) > rounding
    if not is_traced(differ) and not bool(differ):
        raise ValueError(
            f"{owner}: the class means must differ (got the same for all classes): no "
            "metric is defined where they coincide."
        )
    contrasts = jnp.where(differ, contrasts, jnp.nan)
    tr_w = jnp.sum(deviations**2) / len(features)
    tr_b = jnp.sum(contrasts**2) / num_classes
    # Sigma_B^+ / K = C^+ C^+' with C the contrasts.
    whitened = deviations @ jnp.linalg.pinv(contrasts)
    centred = means - jnp.mean(means, axis=0)[None, :]
    return CollapseMetrics(
        tr_w=tr_w,
        tr_b=tr_b,
        nc1_ratio=tr_w / tr_b,
        nc1_pinv=jnp.sum(whitened**2) / len(features),
        nc2=_frame_distance(centred, num_classes),
        nc3=None if head is None else _duality_distance(head, centred),
    )


def class_means(
    features: Float[Array, "N d"],
    labels: Integer[Array, " N"],
    *,
    num_classes: int,
) -> Float[Array, "K d"]:
    """Mean feature of each class.

    Args:
        features: One row a sample.
        labels: Class of each sample, `0 .. num_classes - 1`.
        num_classes: K.

    Returns:
        One row a class; NaN in an empty class, and everywhere if a label is out of
        range.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.landscape import class_means
        >>> features, labels = jnp.arange(4.0)[:, None], jnp.array([0, 1, 0, 1])
        >>> class_means(features, labels, num_classes=2).tolist()
        [[1.0], [2.0]]

    Source:
        Papyan, Han, Donoho, 2020 (arXiv 2008.08186), section 2.
    """
    sums = jax.ops.segment_sum(features, labels, num_classes)
    sizes = jax.ops.segment_sum(jnp.ones_like(features[:, 0]), labels, num_classes)
    inside = jnp.all((labels >= 0) & (labels < num_classes))
    return jnp.where(inside, sums / sizes[:, None], jnp.nan)


def check_labelled(owner, features, labels, num_classes=None) -> int:
    """Checks features and labels together; returns the number of classes."""
    check_shape(owner, "features", features, (None, None))
    check_nonempty(owner, "features", features)
    check_shape(owner, "labels", labels, (len(features),))
    check_finite(owner, "features", features)
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(
            f"{owner}: `labels` must be integers (got {jnp.result_type(labels)}). "
            "Number the classes 0, 1, 2, ..."
        )
    if is_traced(labels):
        if num_classes is None:
            raise ValueError(
                f"{owner}: `num_classes` must be given where `labels` is traced."
            )
        return num_classes
    values = np.asarray(labels)
    found = int(values.max()) + 1
    num_classes = found if num_classes is None else num_classes
    if values.min() < 0 or found > num_classes:
        raise ValueError(
            f"{owner}: `labels` must lie in 0 .. {num_classes - 1} (got "
            f"{values.min()} .. {values.max()})."
        )
    sizes = np.bincount(values, minlength=num_classes)
    if num_classes < 2 or sizes.min() == 0:
        raise ValueError(
            f"{owner}: at least two classes are required, each with a sample (got "
            f"sizes {sizes.tolist()}). Number the classes without gaps."
        )
    return num_classes


def check_balanced(owner, labels, advice) -> None:
    """Refuses classes of different sizes."""
    if is_traced(labels):
        return
    sizes = np.bincount(np.asarray(labels))
    if sizes.min() != sizes.max():
        raise ValueError(
            f"{owner}: the classes must be of one size, as the theory assumes (got "
            f"sizes from {sizes.min()} to {sizes.max()}). {advice}"
        )


def _frame_distance(centred, num_classes):
    frame = np.eye(num_classes) - 1 / num_classes
    frame = jnp.asarray(frame / np.sqrt(num_classes - 1), centred.dtype)
    gram = centred @ centred.T
    return tree_norm(gram / tree_norm(gram) - frame)


def _duality_distance(head, centred):
    check_shape("collapse_metrics", "head", head, centred.shape)
    return tree_norm(head / tree_norm(head) - centred / tree_norm(centred))
