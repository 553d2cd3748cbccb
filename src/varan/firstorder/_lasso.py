"""The commonest penalised linear models, in one call each."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core import Solution, solve
from ..problems import ElasticNet, GeneralisedLinear, Logistic, Loss, Squared
from ._block_coordinate_descent import BlockCoordinateDescent


def lasso(
    X: Float[Array, "n d"],
    y: Float[Array, " n"],
    lam: Float[Array, ""] | float,
    **settings,
) -> Solution:
    """Minimises `||y - X w||^2 / (2 n) + lam * ||w||_1`.

    As scikit-learn's `Lasso(alpha=lam, fit_intercept=False)`: centre the data, or add
    an intercept as `GeneralisedLinear` says.

    Args:
        X: Shape (n, d).
        y: Shape (n,).
        lam: Not negative.
        **settings: Of `varan.solve`.

    Returns:
        A `Solution` with a duality gap; `x` has a derivative with respect to all three.

    Raises:
        ValueError: As `GeneralisedLinear` and `ElasticNet`; statuses as `solve`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.firstorder import lasso
        >>> lasso(jnp.eye(2), jnp.array([3.0, 0.2]), 0.5).x.round(3)
        Array([2., 0.], dtype=float32)

    Source:
        Tibshirani, 1996, "Regression shrinkage and selection via the lasso".
    """
    return _fit(X, y, Squared(), ElasticNet(lam), settings)


def elastic_net(
    X: Float[Array, "n d"],
    y: Float[Array, " n"],
    lam: Float[Array, ""] | float,
    l1_ratio: Float[Array, ""] | float = 0.5,
    **settings,
) -> Solution:
    """Minimises `||y - X w||^2 / (2 n) + lam * (r ||w||_1 + (1 - r) ||w||^2 / 2)`.

    As scikit-learn's `ElasticNet(alpha=lam, l1_ratio=r, fit_intercept=False)`.

    Args:
        X: Shape (n, d).
        y: Shape (n,).
        lam: Not negative.
        l1_ratio: The `r` above, in [0, 1].
        **settings: Of `varan.solve`.

    Returns:
        As `lasso`.

    Raises:
        ValueError: As `lasso`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.firstorder import elastic_net
        >>> elastic_net(jnp.eye(2), jnp.array([3.0, 0.2]), 1.0).x.round(3)
        Array([1., 0.], dtype=float32)

    Source:
        Zou, Hastie, 2005, "Regularization and variable selection via the elastic net".
    """
    penalty = ElasticNet(lam * l1_ratio, lam * (1 - l1_ratio))
    return _fit(X, y, Squared(), penalty, settings)


def logistic_l1(
    X: Float[Array, "n d"],
    y: Float[Array, " n"],
    lam: Float[Array, ""] | float,
    **settings,
) -> Solution:
    """Minimises the mean logistic loss of labels 0 and 1, plus `lam * ||w||_1`.

    As scikit-learn's `LogisticRegression(l1_ratio=1, C=1 / (n * lam),
    fit_intercept=False)`.

    Args:
        X: Shape (n, d).
        y: Shape (n,), in [0, 1].
        lam: Positive: with zero, classes that a plane separates have no solution.
        **settings: Of `varan.solve`.

    Returns:
        As `lasso`.

    Raises:
        ValueError: As `lasso`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.firstorder import logistic_l1
        >>> logistic_l1(jnp.array([[4.0], [-4.0]]), jnp.array([1, 0]), 2.0).x
        Array([0.], dtype=float32)

    Source:
        Tibshirani, 1996, "Regression shrinkage and selection via the lasso", section 8.
    """
    return _fit(X, y, Logistic(), ElasticNet(lam), settings)


def _fit(X, y, loss: Loss, penalty, settings):
    problem = GeneralisedLinear(X, y, loss=loss, penalty=penalty)
    start = jnp.zeros(problem.X.shape[1], problem.X.dtype)
    return solve(problem, BlockCoordinateDescent(), start, **settings)
