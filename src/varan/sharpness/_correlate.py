"""Whether measures track targets over many models: rank correlations with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from ._objective import MeasureResult, check_counts

Valued = Callable[[Any], Any] | Float[Array, " models"] | Sequence[float]


class CorrelationTable(eqx.Module):
    """Kendall's tau of each measure with each target.

    Args:
        measures: Names of the rows.
        targets: Names of the columns.
        tau: Kendall's tau-b.
        low: Lower ends of the 95 % intervals.
        high: Upper ends.
        measured: The measures' values.
        aimed: The targets' values.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.sharpness import correlate
        >>> values = {"size": jnp.arange(6.0)}
        >>> table = correlate(None, values, values, key=jax.random.key(0))
        >>> table.among(jnp.arange(6) < 4, key=jax.random.key(0)).measured.shape
        (1, 4)
    """

    measures: tuple[str, ...] = eqx.field(static=True)
    targets: tuple[str, ...] = eqx.field(static=True)
    tau: Float[Array, "measures targets"]
    low: Float[Array, "measures targets"]
    high: Float[Array, "measures targets"]
    measured: Float[Array, "measures models"]
    aimed: Float[Array, "targets models"]

    def among(
        self,
        chosen: Bool[Array, " models"] | np.ndarray,
        *,
        resamples: int = 1000,
        key: PRNGKeyArray,
    ) -> CorrelationTable:
        """The table over some of the models only, which are not measured again."""
        rows = np.flatnonzero(np.asarray(chosen))
        return _table(
            self.measures, self.targets, self.measured[:, rows], self.aimed[:, rows],
            resamples, key,
        )  # fmt: skip

    def __str__(self) -> str:
        width = max(map(len, self.measures))
        head = " " * width + "".join(f"  {name:>22}" for name in self.targets)
        lines = [head]
        for i, name in enumerate(self.measures):
            cells = (
                f"{self.tau[i, j]:6.2f} [{self.low[i, j]:5.2f}, {self.high[i, j]:5.2f}]"
                for j in range(len(self.targets))
            )
            lines.append(f"{name:{width}}" + "".join(f"  {c:>22}" for c in cells))
        return "\n".join(lines)


def correlate(
    models: PyTree | Sequence[PyTree] | None,
    measures: Mapping[str, Valued],
    targets: Mapping[str, Valued],
    *,
    resamples: int = 1000,
    key: PRNGKeyArray,
) -> CorrelationTable:
    """Kendall's tau between measures and targets over many models.

    Tau is the share of pairs of models that both put in the same order, minus the share
    of pairs in opposite order; ties are accounted for (tau-b). The interval is a
    percentile bootstrap over the models; where all pairs agree resampling has nothing
    to vary, and its end is the exact one of n // 2 pairs that share no model. The
    models of one sweep share their hyperparameters' effects: a tau says what happens
    together, not what causes what, so it is worth a look within subgroups
    (`CorrelationTable.among`) and beside the hyperparameters themselves as targets.

    Args:
        models: A list of models of one structure, which differ in arrays and numbers,
            or one tree whose arrays have a leading axis of models; None if all measures
            and targets are arrays.
        measures: Name to a function from a model to a number (or to a
            `MeasureResult`), compiled once and run model by model, or to an array of
            values.
        targets: The same: test errors, learning rates.
        resamples: Of the bootstrap, at least 1.
        key: Random key of the bootstrap.

    Returns:
        The table; `str` prints it. NaN where a value is NaN, or all models are tied.

    Raises:
        ValueError: On fewer than three models, models of different structures or
            shapes, values of different lengths, a function without models, or no
            measure or target.
        TypeError: If `resamples` is no integer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.sharpness import correlate
        >>> models = jnp.array([[1.0, 2.0], [0.0, 1.0], [2.0, 5.0], [3.0, 4.0]])
        >>> table = correlate(
        ...     models, {"norm": jnp.linalg.norm}, {"rank": [2, 1, 4, 3]},
        ...     key=jax.random.key(0))
        >>> round(float(table.tau[0, 0]), 3)
        1.0

    Source: M. Andriushchenko, F. Croce, M. Müller, M. Hein, N. Flammarion, 2023,
        "A Modern Look at the Relationship between Sharpness and Generalization",
        arXiv:2302.07011, sections 4 and 5; M. G. Kendall, 1938.

    Differences: The intervals are added.
    """
    if not measures or not targets or resamples < 1:
        raise ValueError(
            "correlate: at least one of `measures`, of `targets` and of `resamples` is "
            f"needed (got {len(measures)}, {len(targets)} and {resamples})."
        )
    check_counts("correlate", resamples=resamples)
    if isinstance(models, list | tuple) and models:
        models = _stacked(models)
    tables = [
        {name: _values(name, entry, models) for name, entry in part.items()}
        for part in (measures, targets)
    ]
    sizes = {v.size for part in tables for v in part.values()}
    if len(sizes) != 1 or min(sizes) < 3:
        raise ValueError(
            "correlate: all measures and targets must have one value for each of at "
            f"least 3 models (got {sorted(sizes)})."
        )
    rows, columns = (jnp.stack(list(part.values())) for part in tables)
    return _table(tuple(measures), tuple(targets), rows, columns, resamples, key)


def _stacked(models):
    """One tree; what is no array (activation functions) all models must share."""
    if len({jtu.tree_structure(model) for model in models}) != 1:
        raise ValueError(
            f"correlate: `models` must have one structure (got {len(models)} models "
            "that differ). Give arrays of values instead of functions of the models."
        )

    def stack(*leaves):
        arrays = any(map(eqx.is_array, leaves))
        if arrays or any(isinstance(leaf, np.ndarray) for leaf in leaves):
            return _stack_numbers(leaves)
        same = all(leaf is leaves[0] or leaf == leaves[0] for leaf in leaves)
        if not same and all(map(eqx.is_array_like, leaves)):
            return _stack_numbers(leaves)
        if not same:
            raise ValueError(
                "correlate: `models` may differ in arrays and numbers only (got "
                f"{leaves[0]!r} and others)."
            )
        return leaves[0]

    return jtu.tree_map(stack, *models)


def _stack_numbers(leaves):
    shapes = {jnp.shape(leaf) for leaf in leaves}
    if len(shapes) != 1:
        raise ValueError(
            "correlate: `models` must have arrays of one shape (got "
            f"{', '.join(map(str, sorted(shapes)))})."
        )
    return jnp.stack([jnp.asarray(leaf) for leaf in leaves])


def _values(name, entry, models):
    if not callable(entry):
        values = jnp.asarray(np.asarray(entry, float), jnp.result_type(float))
    elif models is None:
        raise ValueError(
            f"correlate: {name!r} is a function, so `models` must be given (got None)."
        )
    else:
        values = _measure_all(entry, models)
    if values.ndim != 1:
        raise ValueError(
            f"correlate: {name!r} must give one number a model (got shape "
            f"{values.shape})."
        )
    return values.astype(jnp.result_type(float))


@eqx.filter_jit
def _measure_all(function, models):
    arrays, static = eqx.partition(models, eqx.is_array)

    def one(arrays):
        found = function(eqx.combine(arrays, static))
        return found.value if isinstance(found, MeasureResult) else found

    return jax.lax.map(one, arrays)


def _table(measures, targets, measured, aimed, resamples, key):
    tau, low, high = _bootstrap(measured, aimed, key, resamples)
    return CorrelationTable(measures, targets, tau, low, high, measured, aimed)


@eqx.filter_jit
def _bootstrap(measured, aimed, key, resamples):
    """Tau and its interval; a resample is a weight for each model."""
    n = measured.shape[1]
    dtype = measured.dtype
    drawn = jax.random.randint(key, (resamples, n), 0, n)
    weights = jax.vmap(lambda row: jnp.bincount(row, length=n))(drawn).astype(dtype)
    weights = jnp.concatenate([jnp.ones((1, n), dtype), weights])

    # If a share c of all pairs agrees, n // 2 disjoint ones all do with probability
    # c^(n // 2): at 0.025 stands the end of the interval for a tau of 1.
    least = 2 * 0.025 ** (1 / (n // 2)) - 1
    alike = 1 - 1e2 * float(jnp.finfo(dtype).eps)

    def paired(orders):
        return jnp.einsum("ri,ij,rj->r", weights, orders, weights)

    def one(x, y):
        s, t = _order(x), _order(y)
        norm = jnp.sqrt(paired(s * s) * paired(t * t))
        taus = jnp.where(
            norm > 0, paired(s * t) / jnp.where(norm > 0, norm, 1), jnp.nan
        )
        known = ~jnp.any(jnp.isnan(x) | jnp.isnan(y))
        low, high = jnp.nanquantile(taus[1:], jnp.asarray([0.025, 0.975], dtype))
        low = jnp.where(taus[0] >= alike, jnp.minimum(low, least), low)
        high = jnp.where(taus[0] <= -alike, jnp.maximum(high, -least), high)
        return tuple(jnp.where(known, v, jnp.nan) for v in (taus[0], low, high))

    return jax.lax.map(lambda x: jax.lax.map(lambda y: one(x, y), aimed), measured)


def _order(x):
    above = x[:, None] > x[None, :]
    return above.astype(x.dtype) - above.T.astype(x.dtype)
