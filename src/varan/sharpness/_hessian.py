"""The Hessian of a loss without ever forming it: products, operators, top eigenpairs.

A product costs about two gradients and the memory of one. `hessian_top` linearises
the gradient once and runs Lanczos in one compiled loop; what it returns carries its own
proof: within the residual `||H v - theta v||` of each Ritz value there is an
eigenvalue, whatever the iteration did.

Per class: the Hessian of the loss of one class is that of the same `loss_fn` at a batch
with that class's samples alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ..core._certificate import Certificate
from ..core._checks import check_choice, check_nonnegative
from . import _lanczos
from ._objective import (
    LogitLoss,
    Objective,
    check_counts,
    checked,
    objective,
    refuse_undefined,
    selected_size,
)

LossFn = Callable[[Any, Any], Float[Array, ""]]

RESIDUAL_SAYS = (
    "within value of every Ritz value there is, up to rounding, an eigenvalue; that "
    "none between them is missing, nor a copy of a multiple one, is likely"
)
# Lanczos steps between two looks at the Ritz values: a look costs an eigenvalue
# decomposition of the tridiagonal matrix.
_BLOCK = 6
# A look for what was missed takes this share of the steps done so far, and so many.
_AGAIN, _LEAST = 4, 3
# Power steps that estimate the Hessian's norm, for the shift of the power method.
_NORM_STEPS = 20


class Eigenpairs(eqx.Module):
    """Ritz pairs of a symmetric operator, best first.

    Args:
        values: The Ritz values. Each is at most the largest eigenvalue and at least
            the smallest.
        vectors: Unit vectors as trees like the parameters, with a leading axis of k.
        residuals: `||H v - theta v||`, evaluated: an eigenvalue lies that near, up to
            the rounding of the product.
        n_hvp: Products with the Hessian.
    """

    values: Float[Array, " k"]
    vectors: PyTree
    residuals: Float[Array, " k"]
    n_hvp: Int[Array, ""]

    @property
    def certificate(self) -> Certificate:
        """Of all pairs together: the largest residual."""
        return Certificate(
            "eigenvalue residual",
            jnp.max(self.residuals),
            proof=True,
            statement=RESIDUAL_SAYS,
            details={"values": self.values},
        )


def hvp(loss_fn: LossFn, params: PyTree, batch: PyTree, vector: PyTree) -> PyTree:
    """The product of the loss's Hessian with a vector, forward over reverse.

    About two gradients; differentiable. For many products at one point take
    `hessian_operator`, which shares the first half of the work.

    Args:
        loss_fn: `(params, batch) -> scalar`.
        params: Any pytree; its floating arrays are the variables.
        batch: What the loss is evaluated on.
        vector: A tree like the parameters' floating arrays.

    Returns:
        A tree like `vector`.

    Raises:
        ValueError: If `vector` has another structure or other shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import hvp
        >>> cube = lambda w, b: jnp.sum(w**3)
        >>> hvp(cube, jnp.ones(2), None, jnp.array([1.0, 2.0])).tolist()
        [6.0, 12.0]
    """
    arrays, static = eqx.partition(params, eqx.is_inexact_array)
    vector = eqx.filter(vector, eqx.is_inexact_array)
    shapes = [jtu.tree_map(jnp.shape, tree) for tree in (arrays, vector)]
    if jtu.tree_structure(arrays) != jtu.tree_structure(vector) or (
        jtu.tree_leaves(shapes[0]) != jtu.tree_leaves(shapes[1])
    ):
        raise ValueError(
            f"hvp: `vector` must be like the parameters, {shapes[0]} (got {shapes[1]})."
        )
    gradient = jax.grad(lambda arrays: loss_fn(eqx.combine(arrays, static), batch))
    return jax.jvp(gradient, (arrays,), (vector,))[1]


def hessian_operator(
    loss_fn: LossFn, params: PyTree, batch: PyTree, *, mask: PyTree | None = None
) -> lx.FunctionLinearOperator:
    """The loss's Hessian as a lineax operator on trees like the parameters.

    The gradient is linearised once, here: under jit make the operator inside the
    compiled function that uses it.

    Args:
        loss_fn: `(params, batch) -> scalar`.
        params: Any pytree; its floating arrays are the variables.
        batch: What the loss is evaluated on.
        mask: A tree of booleans (or boolean arrays) like the parameters, or a prefix
            of it, or a function from the parameters to one: rows and columns of the
            other parameters are zero.

    Returns:
        An operator that is tagged symmetric. Its products are NaN where the loss or
        its gradient is not finite at the parameters.

    Raises:
        ValueError: On parameters without floating arrays, an empty batch, a loss that
            is no scalar, a mask of another structure or without a parameter, or
            (outside of jit) a loss or gradient that is not finite.
        TypeError: If the mask is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import hessian_operator
        >>> H = hessian_operator(lambda w, b: jnp.sum(w**3), jnp.ones(2), None)
        >>> H.mv(jnp.array([1.0, 2.0])).tolist()
        [6.0, 12.0]
    """
    params, mask = checked("hessian_operator", params, batch, mask)
    flat = objective("hessian_operator", loss_fn, params, batch, mask)
    return _on_trees(flat, flat.hessian(), lx.symmetric_tag)


def ggn_operator(
    loss_fn: LogitLoss, params: PyTree, batch: PyTree, *, mask: PyTree | None = None
) -> lx.FunctionLinearOperator:
    """The generalised Gauss-Newton matrix `J' (d^2 loss / d logits^2) J`.

    The Hessian without the curvature of the network itself: positive semidefinite
    for a loss that is convex in the logits (cross-entropy is). One product costs about
    as much as one with the Hessian.

    Args:
        loss_fn: The loss with its logits in reach. Normalised logits count as the
            network's output.
        params: Any pytree; its floating arrays are the variables.
        batch: A pair of inputs and labels.
        mask: As in `hessian_operator`.

    Returns:
        An operator that is tagged symmetric and positive semidefinite.

    Raises:
        TypeError: If `loss_fn` is no `LogitLoss`.
        ValueError: As in `hessian_operator`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import LogitLoss, ggn_operator
        >>> loss = LogitLoss(lambda w, x: x * w, lambda z, y: jnp.mean((z - y) ** 2))
        >>> G = ggn_operator(loss, jnp.array([2.0]), (jnp.ones((4, 1)), jnp.zeros(4)))
        >>> G.mv(jnp.ones(1)).tolist()
        [2.0]

    Source: N. N. Schraudolph, 2002, "Fast curvature matrix-vector products for
        second-order gradient descent", Neural Computation 14.
    """
    if not isinstance(loss_fn, LogitLoss):
        raise TypeError(
            "ggn_operator: `loss_fn` must be a LogitLoss (got "
            f"{type(loss_fn).__name__}): the matrix needs the logits."
        )
    params, mask = checked("ggn_operator", params, batch, mask)
    flat = objective("ggn_operator", loss_fn, params, batch, mask)
    static = eqx.filter(params, eqx.is_inexact_array, inverse=True)
    x, y = flat.batch

    def logits(vector):
        return loss_fn.logits(eqx.combine(flat.unravel(vector), static), x)

    def slope_and_loss(z):
        return jax.value_and_grad(lambda z: loss_fn.of_logits(z, y))(z)[::-1]

    out, push = jax.linearize(logits, flat.point)
    pull = jax.linear_transpose(push, flat.point)
    slope, inner, loss = jax.linearize(slope_and_loss, out, has_aux=True)
    good = flat.defined(loss, pull(slope)[0])
    scale = jnp.where(good, flat.selected, jnp.nan)

    def product(vector):
        return scale * pull(inner(push(flat.selected * vector)))[0]

    tags = frozenset({lx.symmetric_tag, lx.positive_semidefinite_tag})
    return _on_trees(flat, product, tags)


def _on_trees(flat: Objective, product, tags):
    shape = jax.eval_shape(flat.unravel, flat.point)
    return lx.FunctionLinearOperator(
        lambda tree: flat.unravel(product(ravel_pytree(tree)[0])), shape, tags
    )


def hessian_top(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    *,
    k: int = 1,
    which: Literal["largest", "smallest"] = "largest",
    method: Literal["lanczos", "lobpcg", "power"] = "lanczos",
    max_steps: int = 96,
    tol: float = 1e-3,
    reorth: bool = True,
    mask: PyTree | None = None,
    key: PRNGKeyArray,
) -> Eigenpairs:
    """The largest (or smallest) eigenvalues of the loss's Hessian, each with a proof.

    The sign counts: "largest" is the most positive curvature, "smallest" the most
    negative. One product with the Hessian costs about two gradients.

    - `"lanczos"` needs the fewest products: one a step, and one a pair for its
      residual. Memory: `max_steps` vectors. From one start it sees one copy of a
      multiple eigenvalue, so that for k > 1 it starts again, orthogonally to what was
      found, with a quarter as many steps, until nothing new comes (at most k times).
    - `"lobpcg"` holds 4 k vectors: for networks of which `max_steps` do not fit.
      Needs more than 5 k parameters (of the mask).
    - `"power"` holds k vectors: subspace iteration on H shifted by its own norm, since
      unshifted it would converge to what is largest in modulus. Slow where the top
      eigenvalues are close; the residual says so.

    Args:
        loss_fn: `(params, batch) -> scalar`. The same function object does not compile
            again.
        params: Any pytree; its floating arrays are the variables.
        batch: What the loss is evaluated on.
        k: How many pairs, at least 1.
        which: The largest or the smallest eigenvalues.
        method: See above.
        max_steps: Steps at most, at least k; the products are up to k times as many
            for the methods with blocks, and for Lanczos where it starts again.
        tol: Stop when every residual is at most `tol` times the modulus of its value
            (not negative; 0 does all steps). A certificate for any value is returned.
        reorth: Lanczos with full reorthogonalisation. Without it a step saves
            `2 max_steps` vector operations and, as rounding mounts up, values come back
            as copies, and there is no second start: good for k = 1.
        mask: A tree of booleans (or boolean arrays) like the parameters, or a prefix
            of it, or a function from the parameters to one: the Hessian in the
            parameters where it is true.
        key: Random key of the start.

    Returns:
        Values, vectors and residuals, the most extreme first. What is proved is that an
        eigenvalue lies within each residual, and none of `"largest"` beyond the true
        one, both up to the rounding of the products; that no eigenvalue between was
        overlooked, nor a copy of a multiple one, is likely, not proved. NaN stays
        visible, and under jit stands for a loss or gradient that is not finite and for
        a mask with fewer than k parameters.

    Raises:
        ValueError: If a setting is out of range, parameters have no floating arrays,
            the batch is empty, the loss is no scalar, the mask does not fit or selects
            fewer than k parameters, or (outside of jit) the loss or its gradient is
            not finite.
        TypeError: If a count is no integer, or the mask not boolean.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.sharpness import hessian_top
        >>> loss = lambda w, b: w[0] ** 2 - 3 * w[1] ** 2 + w[2] ** 2 / 2
        >>> top = hessian_top(loss, jnp.ones(3), None, key=jax.random.key(0))
        >>> low = hessian_top(
        ...     loss, jnp.ones(3), None, which="smallest", key=jax.random.key(0))
        >>> round(float(top.values[0]), 3), round(float(low.values[0]), 3)
        (2.0, -6.0)

    Source: B. N. Parlett, 1980, "The symmetric eigenvalue problem", theorem 4.5.1
        (residuals) and chapter 13 (Lanczos); LOBPCG is JAX's.
    """
    check_choice("hessian_top", "which", which, ("largest", "smallest"))
    check_choice("hessian_top", "method", method, tuple(_METHODS))
    check_nonnegative("hessian_top", "tol", tol)
    check_counts("hessian_top", k=k, max_steps=max_steps)
    params, mask = checked("hessian_top", params, batch, mask)
    size = selected_size("hessian_top", params, mask)
    most = (size - 1) // 5 if method == "lobpcg" else size
    if not 1 <= k <= most:
        raise ValueError(
            f"hessian_top: `k` must lie in 1 .. {most} for {size} parameters and "
            f"method {method!r} (got {k})."
        )
    if max_steps < k:
        raise ValueError(
            f"hessian_top: `max_steps` must be at least k = {k} (got {max_steps})."
        )
    found = _top(
        loss_fn, params, batch, mask, key, jnp.asarray(tol),
        (k, which == "smallest", method, max_steps, reorth),
    )  # fmt: skip
    refuse_undefined("hessian_top", found.values, loss_fn, params, batch, mask)
    return found


@eqx.filter_jit
def _top(loss_fn, params, batch, mask, key, tol, settings):
    k, negated, method, steps, reorth = settings
    flat = objective("hessian_top", loss_fn, params, batch, mask)
    hessian = flat.hessian()
    sign = -1 if negated else 1
    product = (lambda v: -hessian(v)) if negated else hessian
    tol = tol.astype(flat.point.dtype)
    rows, count = _METHODS[method](product, flat, k, steps, tol, reorth, key)
    # A mask with fewer parameters than k has no k vectors.
    rows = jnp.where(jnp.sum(flat.selected) >= k, rows, jnp.nan)
    images = jax.lax.map(product, rows)
    values = jnp.sum(rows * images, 1)
    residuals = jnp.linalg.norm(images - values[:, None] * rows, axis=1)
    vectors = jax.vmap(flat.unravel)(rows)
    return Eigenpairs(sign * values, vectors, residuals, count + k)


def _by_lanczos(product, flat, k, steps, tol, reorth, key):
    steps = min(steps, flat.point.size)
    space = _lanczos.begin(key, flat.selected, steps)
    none = jnp.zeros(k, tol.dtype)
    look = jnp.asarray(min(_BLOCK, steps), jnp.int32)
    if k == 1 or steps == k or not reorth:
        space, rows, _ = _settled(product, space, none, look, k, tol, reorth)
        return rows, space.steps

    def unfinished(carry):
        *_, round, more = carry
        return more & (round <= k)

    def one(carry):
        space, _, before, count, look, round, _ = carry
        done = space.steps
        space, rows, values = _settled(product, space, before, look, k, tol, reorth)
        count = count + space.steps - done
        noise = 1e2 * jnp.finfo(tol.dtype).eps * jnp.max(jnp.abs(values))
        found = values - before > jnp.maximum(tol * jnp.abs(values), noise)
        found = found | (round == 0)
        # What spans all that is selected has missed nothing.
        more = jnp.any(found) & ~space.ended
        # One start sees one copy of a multiple eigenvalue.
        start = jax.random.normal(jax.random.fold_in(key, round), (n,), tol.dtype)
        space = _lanczos.restart(space, rows, values, flat.selected * start)
        look = jnp.minimum(k + jnp.maximum(count // _AGAIN, _LEAST), steps)
        return space, rows, values, count, look, round + 1, more

    n, zero = flat.point.size, jnp.zeros((), jnp.int32)
    rows = jnp.zeros((k, n), tol.dtype)
    begin = (space, rows, none, zero, look, zero, jnp.asarray(True))
    _, rows, _, count, *_ = jax.lax.while_loop(unfinished, one, begin)
    return rows, count


def _settled(product, space, before, look, k, tol, reorth):
    """Lanczos steps until the k largest Ritz pairs are good, the first look at `look`.

    Gives the space, the Ritz vectors as rows and their values, both largest first.
    """
    steps = space.diagonal.shape[0]

    def unfinished(carry):
        space, _, error, values, _ = carry
        # A NaN stops the loop, too: it never goes away.
        more = jnp.max(error - tol * jnp.abs(values)) > 0
        return more & (space.steps < steps) & ~space.ended

    def block(carry):
        space, *_, before, look = carry
        space = jax.lax.fori_loop(
            space.steps,
            look,
            lambda _, space: _lanczos.advance(product, space, reorth),
            space,
        )
        values, S = space.ritz()
        last = jnp.abs(space.off[space.steps - 1] * S[space.steps - 1, -k:])
        values = values[-k:]
        error = jnp.where(space.steps >= k, last, jnp.inf)
        if k > 1:
            # A pair that the start hardly contains comes late, and pushes the last one
            # out: the values must have been the same one look ago.
            error = jnp.maximum(error, jnp.abs(values - before))
        return space, S, error, values, jnp.minimum(look + _BLOCK, steps)

    S = jnp.zeros((steps, steps), tol.dtype)
    wanting = (S, jnp.full(k, jnp.inf, tol.dtype), before[::-1], look)
    space, S, _, values, _ = jax.lax.while_loop(unfinished, block, (space, *wanting))
    rows = S[:, : -k - 1 : -1].T @ space.basis[:steps]
    lengths = jnp.linalg.norm(rows, axis=1, keepdims=True)
    # A mask with fewer parameters than k leaves no vector, and no value.
    return space, jnp.where(lengths > 0.5, rows / lengths, jnp.nan), values[::-1]


def _by_lobpcg(product, flat, k, steps, tol, reorth, key):
    from jax.experimental.sparse.linalg import lobpcg_standard

    columns = jax.vmap(product, 1, 1)
    start = flat.selected[None, :] * jax.random.normal(
        key, (k, flat.point.size), tol.dtype
    )
    # Its tolerance is multiplied by 10 n and relative to about twice the value.
    scaled = tol / (20 * flat.point.size)
    _, U, count = lobpcg_standard(columns, start.T, steps, scaled)
    # It divides by the norm of the products, which a Hessian of zeros makes zero: any
    # vectors are eigenvectors then.
    rows = jnp.where(jnp.all(jnp.isfinite(U)), U.T, _orthonormal(start))
    return rows, k * count


def _by_power(product, flat, k, steps, tol, reorth, key):
    """Subspace iteration on H + s I, `s` a little more than H's norm."""
    first = min(max(steps // 4, 1), _NORM_STEPS)
    shape = (k, flat.point.size)
    start = _orthonormal(
        flat.selected[None, :] * jax.random.normal(key, shape, tol.dtype)
    )

    def powers(_, vector):
        image = product(vector)
        return image / jnp.maximum(jnp.linalg.norm(image), jnp.finfo(tol.dtype).tiny)

    most = jax.lax.fori_loop(0, first, powers, start[0])
    shift = 1.1 * jnp.linalg.norm(product(most))
    # From the random start again: by now `most` has forgotten all other directions.
    images = jax.lax.map(product, start)

    def unfinished(carry):
        _, _, index, error = carry
        return (error > 0) & (index < steps - first)

    def one(carry):
        rows, images, index, _ = carry
        rows = _orthonormal(images + shift * rows)
        images = jax.lax.map(product, rows)
        # Rayleigh and Ritz: the rows become Ritz vectors, largest first.
        small = rows @ images.T
        values, S = jnp.linalg.eigh((small + small.T) / 2)
        rows, images = S[:, ::-1].T @ rows, S[:, ::-1].T @ images
        residuals = jnp.linalg.norm(images - values[::-1, None] * rows, axis=1)
        error = jnp.max(residuals - tol * jnp.abs(values[::-1]))
        return rows, images, index + 1, error

    begin = (start, images, jnp.zeros((), jnp.int32), jnp.asarray(jnp.inf, tol.dtype))
    rows, _, index, _ = jax.lax.while_loop(unfinished, one, begin)
    return rows, first + 1 + k * (1 + index)


def _orthonormal(rows):
    return jnp.linalg.qr(rows.T)[0].T


_METHODS = {"lanczos": _by_lanczos, "lobpcg": _by_lobpcg, "power": _by_power}
