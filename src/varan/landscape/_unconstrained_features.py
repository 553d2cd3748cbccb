"""The unconstrained features model: a last layer and free features, both penalised.

With N samples, K targets, a last layer W (K x d) and features H (N x d, one row a
sample),

    f(W, H) = |H W' - Y|^2 / 2N + lam_w |W|^2 / 2K + lam_h |H|^2 / 2N
              [ + beta |H - anchor|^2 / 2N ]

The plain model is what a deep network's training minimises when the layers before the
last can produce any features; for balanced one-hot targets every minimiser is exactly
collapsed. The anchor holds the features near given ones (those of an earlier layer),
1/beta being the capacity of the layers between, and explains features that come near
collapse without reaching it. Minimised over W, the anchored problem is one implicit
Euler step of length 1/beta along the gradient flow of the plain one (`central_path`).

Both models come with a proof of optimality at any point (`certify`): the plain one
has a closed-form minimum, and the anchored one is strongly convex in H, with a
modulus that can be computed, once W is eliminated and beta is not too small.

Source: Tirer, Huang, Niles-Weed, 2023 (arXiv 2210.16658); the plain minimum: Tirer,
Bruna, 2022 (arXiv 2202.08087).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from ..core import Certificate, Problem, Solution, Solver, State, solve
from ..core._checks import (
    check_finite,
    check_nonempty,
    check_positive,
    check_shape,
    is_traced,
)
from ._collapse_metrics import check_labelled


class HeadAndFeatures(NamedTuple):
    """The unknowns of the unconstrained features model.

    Args:
        head: The last layer W, (K, d).
        features: The features H, (N, d), one row a sample.
    """

    head: Float[Array, "K d"]
    features: Float[Array, "N d"]


class UnconstrainedFeatures(Problem):
    """The unconstrained features model, plain or held near given features.

    Its unknown is a `HeadAndFeatures`; its condition is the gradient of f, O(N d K).

    Args:
        labels: Class of each sample (integers, `0 .. K-1`, none missing), or a target
            matrix Y of shape (N, K).
        lam_w: Weight decay of the last layer, positive.
        lam_h: Weight decay of the features, nonnegative.
        anchor: Features (N, d) to stay near, or `None` for the plain model.
        beta: Weight of the anchor, positive. Required with `anchor`.

    Raises:
        ValueError: On wrong shapes, NaN, `lam_w <= 0`, `lam_h < 0`, `beta <= 0`, or
            an anchor without `beta` (or the reverse).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.landscape import (
        ...     AlternatingRidge, UnconstrainedFeatures, global_optimum)
        >>> problem = UnconstrainedFeatures(jnp.array([0, 0, 1, 1]), 0.1, 0.1)
        >>> start = global_optimum(problem, 3, key=jax.random.key(0))
        >>> round(float(problem.optimal_value()), 4)   # c - c^2 / 2 with c = 0.1
        0.095
        >>> bool(jnp.isclose(problem.value(start), problem.optimal_value()))
        True

    Source:
        Tirer, Huang, Niles-Weed, 2023 (arXiv 2210.16658), equations 1 and 2.

    Differences:
        Features are rows, as in every other array of samples; targets may be any
        matrix; and `certify` proves more than the paper states (see there).
    """

    targets: Float[Array, "N K"]
    lam_w: Float[Array, ""]
    lam_h: Float[Array, ""]
    anchor: Float[Array, "N d"] | None
    beta: Float[Array, ""] | None

    def __init__(
        self,
        labels: Integer[Array, " N"] | Float[Array, "N K"],
        lam_w: float | Float[Array, ""],
        lam_h: float | Float[Array, ""],
        anchor: Float[Array, "N d"] | None = None,
        beta: float | Float[Array, ""] | None = None,
    ):
        owner = "UnconstrainedFeatures"
        check_positive(owner, "lam_w", lam_w)
        if not is_traced(lam_h) and not (np.isfinite(lam_h) and lam_h >= 0):
            raise ValueError(f"{owner}: `lam_h` must be nonnegative (got {lam_h}).")
        if (anchor is None) != (beta is None):
            raise ValueError(
                f"{owner}: `anchor` and `beta` must be given together (got only "
                f"{'beta' if anchor is None else 'anchor'})."
            )
        dtype = jnp.result_type(float)
        if anchor is not None:
            anchor = jnp.asarray(anchor)
            check_positive(owner, "beta", beta)
            check_shape(owner, "anchor", anchor, (len(labels), None))
            check_nonempty(owner, "anchor", anchor)
            check_finite(owner, "anchor", anchor)
            dtype = anchor.dtype
        self.targets = _targets(owner, labels, dtype)
        dtype = self.targets.dtype
        self.lam_w = jnp.asarray(lam_w, dtype)
        self.lam_h = jnp.asarray(lam_h, dtype)
        self.anchor = anchor
        self.beta = None if beta is None else jnp.asarray(beta, dtype)

    @property
    def ridge(self) -> Float[Array, ""]:
        """The penalty of the last layer on the scale of H'H: lam_w N / K."""
        samples, classes = self.targets.shape
        return self.lam_w * samples / classes

    def value(self, x: HeadAndFeatures) -> Float[Array, ""]:
        """The objective f at `x`."""
        samples, classes = self.targets.shape
        fit = jnp.sum((x.features @ x.head.T - self.targets) ** 2)
        decay = self.lam_h * jnp.sum(x.features**2)
        pull = 0.0
        if self.anchor is not None:
            pull = self.beta * jnp.sum((x.features - self.anchor) ** 2)
        head = self.lam_w * jnp.sum(x.head**2) / (2 * classes)
        return (fit + decay + pull) / (2 * samples) + head

    def condition(self, x: HeadAndFeatures) -> HeadAndFeatures:
        samples, classes = self.targets.shape
        misfit = x.features @ x.head.T - self.targets
        head = misfit.T @ x.features / samples + self.lam_w * x.head / classes
        features = misfit @ x.head + self.lam_h * x.features
        if self.anchor is not None:
            features = features + self.beta * (x.features - self.anchor)
        return HeadAndFeatures(head, features / samples)

    def best_head(self, features: Float[Array, "N d"]) -> Float[Array, "K d"]:
        """The last layer that minimises f for these features: ridge regression."""
        gram = features.T @ features + self.ridge * _eye_like(features)
        return _solve_definite(gram, features.T @ self.targets).T

    def best_features(self, head: Float[Array, "K d"]) -> Float[Array, "N d"]:
        """The features that minimise f for this last layer."""
        shrink, pull = self.lam_h, self.targets @ head
        if self.anchor is not None:
            shrink, pull = shrink + self.beta, pull + self.beta * self.anchor
        return _solve_definite(head.T @ head + shrink * _eye_like(head), pull.T).T

    def optimal_value(self) -> Float[Array, ""]:
        """The global minimum of the plain model, in closed form, for d >= K.

        Minimised over all factorisations of Z = H W', the penalties are a nuclear
        norm, and the minimiser's singular values are those of Y, soft-thresholded. For
        balanced classes it is c - c^2/2 with c = sqrt(lam_w lam_h), for c <= 1. For
        d < K it is a lower bound.
        """
        self._refuse_anchor("optimal_value")
        samples, _ = self.targets.shape
        strengths = jnp.linalg.svd(self.targets, compute_uv=False)
        cut = self._threshold()
        kept = jnp.minimum(strengths, cut)
        values = kept**2 / 2 + cut * (strengths - kept)
        return jnp.sum(values) / samples

    def certify(self, x, condition, tol) -> Certificate:
        """A proof of near-optimality at any `x`, converged or not.

        - Plain model: `value` is f(x) minus the global minimum.
        - Anchored model, with W eliminated: let F(H) = min_W f(W, H). N times its
          Hessian is at least `lam_h + beta - q^2/a` in every direction, with q the
          spectral norm of Y - H W' and a = lam_w N / K, and q grows by at most
          r |Y| / sqrt(a) within distance r. Where that modulus stays positive around
          `x`, F has exactly one minimiser there, and `value` bounds
          f(x) - F(minimiser); where `lam_h + beta > |Y|^2/a` (for balanced classes
          1/lam_w) it is positive everywhere, and the minimiser is the global one
          (`details["global"]`). Without such a modulus `value` is infinite.
        """
        if self.anchor is None:
            return Certificate(
                "optimality gap",
                self.value(x) - self.optimal_value(),
                tol=tol,
                proof=True,
                statement="f(x) exceeds the global minimum by at most value",
                details={"residual": self.residual(condition)},
            )
        head = self.best_head(x.features)
        reduced = HeadAndFeatures(head, x.features)
        samples = len(self.targets)
        slope = samples * jnp.linalg.norm(self.condition(reduced).features)
        modulus, everywhere = self._strong_convexity(reduced, slope)
        # Nonnegative but for rounding, since the reduced point has the best head.
        excess = jnp.maximum(self.value(x) - self.value(reduced), 0)
        gap = excess + slope**2 / (2 * samples * modulus)
        return Certificate(
            "optimality gap",
            jnp.where(modulus > 0, gap, jnp.inf),
            tol=tol,
            proof=True,
            statement=(
                "f(x) exceeds f at a nearby strict minimiser (the global one where "
                "details['global']) by at most value"
            ),
            details={
                "residual": self.residual(condition),
                "modulus": modulus,
                "distance": jnp.where(modulus > 0, slope / modulus, jnp.inf),
                "global": everywhere,
            },
        )

    @property
    def jacobian_tags(self):
        return frozenset({"symmetric"})

    @property
    def unique(self):
        # The plain model is invariant under rotations of the feature space.
        return self.anchor is not None

    def _strong_convexity(self, x, slope):
        """A modulus valid as far as the minimiser, else zero; and whether globally."""
        stiffness, size = self.lam_h + self.beta, _spectral_norm(self.targets)
        everywhere = stiffness - size**2 / self.ridge
        misfit = _spectral_norm(self.targets - x.features @ x.head.T)
        here = stiffness - misfit**2 / self.ridge
        # A minimiser within `radius` exists if radius * modulus(radius) >= 2 slope.
        radius = 4 * slope / jnp.where(here > 0, here, 1.0)
        worst = misfit + radius * size / jnp.sqrt(self.ridge)
        near = stiffness - worst**2 / self.ridge
        enough = (here > 0) & (near > 0) & (radius * near >= 2 * slope)
        local = jnp.where(enough, near, 0.0)
        return jnp.maximum(local, everywhere), everywhere > 0

    def _threshold(self):
        samples, classes = self.targets.shape
        return jnp.sqrt(self.lam_w * self.lam_h * samples / classes)

    def _refuse_anchor(self, method):
        if self.anchor is not None:
            raise ValueError(
                f"{method}: a closed form is known for the plain model only (got a "
                "problem with an anchor). Leave `anchor` and `beta` out."
            )


class AlternatingRidge(Solver):
    """Minimises over the features, then over the last layer: two ridge regressions.

    Each step costs O(N d^2 + d^3), needs no stepsize, and cannot raise the objective.
    Convergence is linear, the faster the larger `beta`. On the plain model it
    converges to a minimiser from almost every start.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.landscape import (
        ...     AlternatingRidge, HeadAndFeatures, UnconstrainedFeatures)
        >>> anchor = jax.random.normal(jax.random.key(0), (4, 3))
        >>> labels = jnp.array([0, 0, 1, 1])
        >>> problem = UnconstrainedFeatures(labels, 0.1, 0.1, anchor, 9.0)
        >>> start = HeadAndFeatures(problem.best_head(anchor), anchor)
        >>> solution = solve(problem, AlternatingRidge(), start, tol=1e-5)
        >>> bool(solution.converged)
        True

    Source:
        Tirer, Huang, Niles-Weed, 2023 (arXiv 2210.16658): the model; alternating
        minimisation of it is folklore.
    """

    def init(self, problem: UnconstrainedFeatures, start: HeadAndFeatures) -> State:
        return State(start, problem.condition(start))

    def step(self, problem: UnconstrainedFeatures, state: State) -> State:
        features = problem.best_features(state.x.head)
        x = HeadAndFeatures(problem.best_head(features), features)
        return State(x, problem.condition(x))


def proximal_features(
    anchor: Float[Array, "N d"],
    labels: Integer[Array, " N"] | Float[Array, "N K"],
    lam_w: float | Float[Array, ""],
    lam_h: float | Float[Array, ""],
    beta: float | Float[Array, ""],
    *,
    solver: Solver | None = None,
    tol: float | None = None,
    max_steps: int = 10_000,
) -> Solution:
    """Features that minimise the model near given ones, starting from them.

    The answer is differentiable in `anchor`, `lam_w`, `lam_h` and `beta`. For `beta`
    large enough its ratio Tr Sigma_W / Tr Sigma_B lies below the anchor's (the
    theorem); in practice it does for every `beta`.

    Args:
        anchor: The given features, one row a sample.
        labels: See `UnconstrainedFeatures`.
        lam_w: Weight decay of the last layer, positive.
        lam_h: Weight decay of the features, nonnegative.
        beta: Weight of the anchor, positive.
        solver: Any solver; `AlternatingRidge()` by default.
        tol: Bound on the norm of f's gradient; see `varan.solve`.
        max_steps: Step limit.

    Returns:
        A `varan.Solution`; `solution.x.features` and `solution.x.head`.

    Raises:
        ValueError: See `UnconstrainedFeatures`. Non-convergence is a status.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.landscape import collapse_metrics, proximal_features
        >>> labels = jnp.array([0, 0, 1, 1])
        >>> anchor = jax.random.normal(jax.random.key(0), (4, 3))
        >>> solution = proximal_features(anchor, labels, 0.1, 0.1, 9.0, tol=1e-5)
        >>> before = collapse_metrics(anchor, labels).nc1_ratio
        >>> after = collapse_metrics(solution.x.features, labels).nc1_ratio
        >>> bool(after < before)
        True

    Source:
        Tirer, Huang, Niles-Weed, 2023 (arXiv 2210.16658), corollary 3.2.
    """
    problem = UnconstrainedFeatures(labels, lam_w, lam_h, anchor, beta)
    start = HeadAndFeatures(problem.best_head(problem.anchor), problem.anchor)
    solver = AlternatingRidge() if solver is None else solver
    return solve(problem, solver, start, tol=tol, max_steps=max_steps)


def global_optimum(
    problem: UnconstrainedFeatures, dim: int, *, key: PRNGKeyArray
) -> HeadAndFeatures:
    """A global minimiser of the plain model, in closed form.

    For balanced classes and c = sqrt(lam_w lam_h) < 1 the features are exactly
    collapsed, their class means orthogonal with squared length
    (1 - c) sqrt(lam_w / lam_h), and the last layer parallel to them; for c >= 1
    everything is zero. All minimisers differ by a rotation, drawn from `key`.

    Args:
        problem: A plain model, `lam_h > 0`.
        dim: Feature dimension d, at least the number of targets K.
        key: Random key for the rotation.

    Returns:
        The minimiser.

    Raises:
        ValueError: If the problem has an anchor, `dim < K`, or `lam_h` is zero.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.landscape import (
        ...     UnconstrainedFeatures, collapse_metrics, global_optimum)
        >>> labels = jnp.array([0, 0, 1, 1, 2, 2])
        >>> problem = UnconstrainedFeatures(labels, 0.05, 0.05)
        >>> x = global_optimum(problem, 5, key=jax.random.key(0))
        >>> bool(collapse_metrics(x.features, labels).nc1_ratio < 1e-6)
        True

    Source:
        Tirer, Bruna, 2022 (arXiv 2202.08087), theorem 3.1; theorem 2.1 of Tirer,
        Huang, Niles-Weed, 2023 (arXiv 2210.16658).

    Differences:
        Stated here for any target matrix, through its singular value decomposition.
    """
    owner = "global_optimum"
    problem._refuse_anchor(owner)
    classes = problem.targets.shape[1]
    if dim < classes:
        raise ValueError(
            f"{owner}: `dim` must be at least the number of targets {classes} (got "
            f"{dim})."
        )
    check_positive(owner, "lam_h", problem.lam_h)
    dtype = problem.targets.dtype
    u, strengths, vt = jnp.linalg.svd(problem.targets, full_matrices=False)
    kept = strengths - problem._threshold()
    roots = jnp.where(kept > 0, jnp.sqrt(jnp.where(kept > 0, kept, 1.0)), 0.0)
    rank = len(roots)
    frame = jnp.linalg.qr(jax.random.normal(key, (dim, rank), dtype))[0]
    # Equal penalties for the two factors: |H|^2 lam_h / N = |W|^2 lam_w / K.
    balance = (problem.ridge / problem.lam_h) ** 0.25
    features = balance * (u * roots[None, :]) @ frame.T
    head = (vt.T * roots[None, :]) @ frame.T / balance
    return HeadAndFeatures(head, features)


def _targets(owner, labels, dtype):
    if jnp.ndim(labels) == 2:
        check_nonempty(owner, "labels", labels)
        check_finite(owner, "labels", labels)
        if not jnp.issubdtype(jnp.result_type(labels), jnp.floating):
            raise TypeError(
                f"{owner}: a target matrix must be floating (got "
                f"{jnp.result_type(labels)}). Pass integer labels as a vector."
            )
        return jnp.asarray(labels)
    if is_traced(labels):
        raise ValueError(
            f"{owner}: labels must be known outside a transformation, since they set "
            "the number of classes. Pass a target matrix instead."
        )
    classes = check_labelled(owner, np.zeros((len(labels), 1)), labels)
    return jax.nn.one_hot(labels, classes, dtype=dtype)


def _solve_definite(matrix, right):
    return jax.scipy.linalg.solve(matrix, right, assume_a="pos")


def _spectral_norm(matrix):
    # A bound in a certificate; differentiating a repeated singular value is not safe.
    return jnp.linalg.norm(jax.lax.stop_gradient(matrix), ord=2)


def _eye_like(rows):
    return jnp.eye(rows.shape[1], dtype=rows.dtype)
