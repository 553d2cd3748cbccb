"""The central path: gradient flow of the plain model with the last layer eliminated.

With W*(H) the best last layer for features H, the flow is

    dH/dt = -N grad_H min_W f(W, H) = -[(H W*' - Y) W* + lam_h H].

Along it Tr Sigma_W / Tr Sigma_B strictly decreases to zero, from any features that are
not collapsed: no balance around zero, no rank and no rescaling of the gradient is
assumed.

Class means M and deviations D move apart: W* depends on D through D'D alone, and D
obeys the linear equation dD/dt = -D (W*'W* + lam_h). So with D = Q R at the start
only the r x d factor R needs to be followed, r = min(N, d), and a step costs
O(d^3 + K d^2) whatever the number of samples. R is followed as a direction U of norm
one and the logarithm of |R|^2, so that Tr Sigma_W keeps its relative accuracy when it
is many orders below the class means.

Source: Tirer, Huang, Niles-Weed, 2023 (arXiv 2210.16658), theorem 3.1.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from ..core import Certificate, Status
from ..core._checks import check_finite, check_positive, is_traced
from ._collapse_metrics import check_balanced, check_labelled, class_means


class CentralPath(eqx.Module):
    """What `central_path` followed.

    Args:
        times: The T times, as given.
        means: Class means at each time, (T, K, d).
        log_tr_w: Natural logarithm of Tr Sigma_W at each time, (T,).
        tr_b: Tr Sigma_B at each time, (T,).
        status: `Status.CONVERGED`, or `STEP_LIMIT` or `DIVERGED` where the integrator
            gave up; numbers after that are NaN.
        certificate: How far the computed path is from the exact differential identity
            of Tr Sigma_W.
    """

    times: Float[Array, " T"]
    means: Float[Array, "T K d"]
    log_tr_w: Float[Array, " T"]
    tr_b: Float[Array, " T"]
    status: Int[Array, ""]
    certificate: Certificate
    _basis: Float[Array, "N r"]
    _factors: Float[Array, "T r d"]
    _labels: Integer[Array, " N"]

    @property
    def tr_w(self) -> Float[Array, " T"]:
        """Tr Sigma_W at each time."""
        return jnp.exp(self.log_tr_w)

    @property
    def nc1_ratio(self) -> Float[Array, " T"]:
        """Tr Sigma_W / Tr Sigma_B at each time."""
        return jnp.exp(self.log_tr_w - jnp.log(self.tr_b))

    @property
    def features(self) -> Float[Array, "T N d"]:
        """The features at each time; T N d numbers, made on each access."""
        means = self.means[:, self._labels]
        return means + jnp.einsum("nr,trd->tnd", self._basis, self._factors)


def central_path(
    features: Float[Array, "N d"],
    labels: Integer[Array, " N"],
    lam_w: float | Float[Array, ""],
    lam_h: float | Float[Array, ""],
    times: Float[Array, " T"],
    *,
    num_classes: int | None = None,
    solver=None,
    rtol: float = 1e-10,
    atol: float = 1e-12,
    max_steps: int = 100_000,
) -> CentralPath:
    """Follows features along the central path from `features` at time 0.

    Use float64: the theorem is about increments, which are rounding noise in float32.

    Args:
        features: The start, one row a sample, not collapsed.
        labels: Class of each sample, `0 .. K-1`, classes of one size.
        lam_w: Weight decay of the last layer, positive.
        lam_h: Weight decay of the features, nonnegative.
        times: Increasing times to report, the first one nonnegative.
        num_classes: K. Needed where `labels` is traced.
        solver: A diffrax solver; `diffrax.Dopri8()` by default.
        rtol: Relative tolerance of a step.
        atol: Absolute tolerance of a step.
        max_steps: Integrator step limit.

    Returns:
        The path, with its certificate: the largest defect, relative to Tr Sigma_W, of
        d/dt [e^{2 lam_h t} Tr Sigma_W] = -2 e^{2 lam_h t} Tr(W* Sigma_W W*')
        integrated along the path.

    Raises:
        ValueError: On wrong shapes, NaN, `lam_w <= 0`, `lam_h < 0`, unequal classes,
            times that do not increase, or features that are collapsed already (the
            theorem is empty there). An integrator that gives up is a status.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.landscape import central_path
        >>> start = jax.random.normal(jax.random.key(0), (6, 4))
        >>> labels = jnp.array([0, 0, 0, 1, 1, 1])
        >>> times = jnp.array([0.0, 1.0, 2.0])
        >>> path = central_path(start, labels, 0.1, 0.01, times, rtol=1e-5, atol=1e-6)
        >>> bool((jnp.diff(path.nc1_ratio) < 0).all())
        True

    Source:
        Tirer, Huang, Niles-Weed, 2023 (arXiv 2210.16658), theorem 3.1.

    Differences:
        The same flow in coordinates whose number does not grow with the samples.
    """
    import diffrax

    owner = "central_path"
    num_classes = _check(owner, features, labels, lam_w, lam_h, times, num_classes)
    dtype = features.dtype
    times = jnp.asarray(times, dtype)
    ridge = jnp.asarray(lam_w, dtype) * (len(features) / num_classes)
    lam_h = jnp.asarray(lam_h, dtype)
    means = class_means(features, labels, num_classes=num_classes)
    basis, factor = jnp.linalg.qr(features - means[labels])
    size = jnp.linalg.norm(factor)
    if not is_traced(size) and not float(size) > 0:
        raise ValueError(
            f"{owner}: `features` must vary inside the classes (got exactly collapsed "
            "ones): nothing is left to decrease."
        )
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(_velocity),
        diffrax.Dopri8() if solver is None else solver,
        t0=0.0,
        t1=times[-1],
        dt0=None,
        y0=(means, factor / size, 2 * jnp.log(size)),
        args=(len(features), ridge, lam_h),
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        max_steps=max_steps,
        throw=False,
    )
    result, done = solution.result, diffrax.RESULTS.successful
    failure = jnp.where(
        result == diffrax.RESULTS.max_steps_reached, Status.STEP_LIMIT, Status.DIVERGED
    )
    status = jnp.where(result == done, Status.CONVERGED, failure).astype(jnp.int32)
    # Times that were not reached come back infinite.
    means, direction, log_size = jax.tree.map(
        lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, jnp.nan), solution.ys
    )
    # Exactly zero on the true flow, which keeps the direction's norm.
    drift = jnp.log(jnp.sum(direction**2, axis=(1, 2)))
    centred = means - jnp.mean(means, axis=1, keepdims=True)
    defect = jnp.max(jnp.abs(drift))
    return CentralPath(
        times=times,
        means=means,
        log_tr_w=log_size + drift - np.log(len(features)),
        tr_b=jnp.sum(centred**2, axis=(1, 2)) / num_classes,
        status=status,
        certificate=Certificate(
            "flow identity defect",
            defect,
            tol=np.sqrt(rtol),
            proof=False,
            statement=(
                "at the reported times Tr Sigma_W obeys its exact differential "
                "identity up to the relative error value"
            ),
        ),
        _basis=basis,
        _factors=direction * jnp.exp(log_size / 2)[:, None, None],
        _labels=jnp.asarray(labels),
    )


def _velocity(t, y, args):
    del t
    means, direction, log_size = y
    samples, ridge, lam_h = args
    per_class = samples / len(means)
    spread = jnp.exp(log_size) * direction.T @ direction
    gram = per_class * means.T @ means + spread
    gram = gram + ridge * jnp.eye(len(gram), dtype=gram.dtype)
    head = per_class * jax.scipy.linalg.solve(gram, means.T, assume_a="pos").T
    pull = direction @ head.T
    # Divided by the norm, though it is one: else errors of the norm grow with the
    # decay.
    decay = jnp.sum(pull**2) / jnp.sum(direction**2)
    misfit = means @ head.T - jnp.eye(len(means), dtype=means.dtype)
    return (
        -(misfit @ head + lam_h * means),
        decay * direction - pull @ head,
        -2 * (decay + lam_h),
    )


def _check(owner, features, labels, lam_w, lam_h, times, num_classes):
    num_classes = check_labelled(owner, features, labels, num_classes)
    check_balanced(owner, labels, "Subsample the larger ones.")
    check_positive(owner, "lam_w", lam_w)
    if not is_traced(lam_h) and not (np.isfinite(lam_h) and lam_h >= 0):
        raise ValueError(f"{owner}: `lam_h` must be nonnegative (got {lam_h}).")
    check_finite(owner, "times", times)
    if not is_traced(times):
        values = np.asarray(times)
        if values.ndim != 1 or not len(values) or values[0] < 0 or _falls(values):
            raise ValueError(
                f"{owner}: `times` must be a vector of increasing nonnegative times."
            )
    return num_classes


def _falls(values):
    return bool(np.any(np.diff(values) <= 0))
