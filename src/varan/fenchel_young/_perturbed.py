"""Perturbed optimisers: piecewise constant functions made smooth by noise.

An optimiser that picks a corner (a ranking, a shortest path, a one-hot argmax) has the
derivative zero wherever it has one. The mean over noise `z` of density `p`,

    f_sigma(x) = E f(x + sigma z),

is smooth, and its Jacobian needs only values of `f` and the score of the noise:

    J f_sigma(x) = -E f(x + sigma z) (grad log p(z))' / sigma.

The same weights give derivatives with respect to `sigma` and of every order: each
sample carries the likelihood ratio `p_x(y) / p_x0(y)`, one in value, whose derivatives
are the estimates. Where `f = argmax <y, x>`, the mean of the maximum is convex with
`f_sigma` as its gradient, and a Fenchel-Young loss on it trains through the optimiser.

Use it where `f` is a black box or piecewise constant. Where `f` is differentiable, the
mean of its own derivatives has less variance. The error falls like one over the square
root of `samples`, and grows like `1 / sigma` in a Jacobian; `certify` estimates it.

Cost: `samples` calls of `f` in one batch, also for value and derivatives together.

Source: Q. Berthet, M. Blondel, O. Teboul, M. Cuturi, J.-P. Vert and F. Bach, Learning
with Differentiable Perturbed Optimizers, NeurIPS 2020, arXiv 2002.08676.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..core._certificate import Certificate
from ..core._checks import check_choice, check_finite, check_positive
from ..core._envelope import envelope, tree_inner
from ..core._trees import tree_norm
from ._noise import Gumbel, Noise

ControlVariate = Literal["leave-one-out", "point", "none"]


class Perturbed(eqx.Module):
    """A function of which noise has made a smooth one; `perturbed_function` makes it.

    Args:
        function: The function, from a pytree of floating arrays to another.
        sigma: The scale of the noise.
        samples: How many draws are averaged.
        noise: Draws the noise and knows its density.
        control_variate: What is subtracted from the values in the derivatives.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.fenchel_young import Perturbed, perturbed_function
        >>> smooth = perturbed_function(jnp.sign, samples=1000, sigma=0.5)
        >>> isinstance(smooth, Perturbed)
        True
        >>> bool(0 < smooth(jnp.array([0.2]), jax.random.key(0))[0] < 1)
        True
    """

    function: Callable
    sigma: Float[Array, ""] | float
    noise: Noise
    samples: int = eqx.field(static=True)
    control_variate: ControlVariate = eqx.field(static=True)

    def __check_init__(self):
        if not callable(self.function):
            raise TypeError(
                "perturbed: the function must be callable (got "
                f"{type(self.function).__name__})."
            )
        check_positive("perturbed", "sigma", self.sigma)
        check_choice(
            "perturbed",
            "control_variate",
            self.control_variate,
            get_args(ControlVariate),
        )
        least = 2 if self.control_variate == "leave-one-out" else 1
        if self.samples < least:
            raise ValueError(
                f"perturbed: `samples` must be at least {least} with the control "
                f"variate {self.control_variate!r} (got {self.samples})."
            )
        for method in ("sample", "log_prob"):
            if not hasattr(self.noise, method):
                raise TypeError(
                    f"perturbed: `noise` must have a method `{method}` (got "
                    f"{type(self.noise).__name__}). Pass Gumbel() or Normal()."
                )

    def __call__(self, x: PyTree[Array], key: PRNGKeyArray) -> PyTree[Array]:
        """The Monte-Carlo estimate of the smoothed function; differentiable.

        Args:
            x: A pytree of floating arrays.
            key: The same key draws the same noise.

        Returns:
            What the function returns, averaged. Value and derivatives, of every
            order, with respect to `x` and `sigma`, are unbiased estimates. Arrays
            that the function holds are differentiated through the function itself.

        Raises:
            TypeError: if `x` or what the function returns is not floating.
            ValueError: if `x` is empty or not finite.
        """
        return _mean(self.draws(x, key))

    def draws(self, x: PyTree[Array], key: PRNGKeyArray) -> PyTree[Array]:
        """The values that `__call__` averages, along a new leading axis.

        Args:
            x: A pytree of floating arrays.
            key: The same key draws the same noise.
        """
        points, _, log_density, sound = _draw(self, x, key)
        values = jax.vmap(self.function)(points)
        base = _at_point(self, x, values)
        return _weighted(self, values, log_density, sound, base)

    def certify(
        self,
        x: PyTree[Array],
        key: PRNGKeyArray,
        direction: PyTree[Array] | None = None,
    ) -> Certificate:
        """How far the estimate is from its mean, estimated from its own draws.

        Args:
            x: A pytree of floating arrays.
            key: The key of the call that is to be judged.
            direction: Judges instead the directional derivative of the call along
                this pytree like `x`.

        Returns:
            A `Certificate` whose value is the root of the mean square error, in the
            Euclidean norm over all entries. It is an estimate: rare draws that did
            not occur do not show.
        """
        if self.samples < 2:
            raise ValueError(
                "certify: `samples` must be at least 2 to see a spread (got "
                f"{self.samples})."
            )
        what, draws = "value", self.draws
        if direction is not None:
            what = "directional derivative"

            def draws(x, key):
                return jax.jvp(lambda u: self.draws(u, key), (x,), (direction,))[1]

        return _spread(draws(x, key), what, self.samples)


class PerturbedMax(eqx.Module):
    """A maximum that noise has made smooth; `perturbed_max` makes it.

    Args:
        argmax: The perturbed maximiser, the gradient of the maximum.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.fenchel_young import PerturbedMax, perturbed_max
        >>> def corner(x):
        ...     return jax.nn.one_hot(jnp.argmax(x), x.size)
        >>> smooth = perturbed_max(corner, samples=1000, sigma=0.1)
        >>> isinstance(smooth, PerturbedMax)
        True
        >>> bool(smooth(jnp.zeros(2), jax.random.key(0)) > 0)  # noise lifts a maximum
        True
    """

    argmax: Perturbed

    def __call__(self, x: PyTree[Array], key: PRNGKeyArray) -> Float[Array, ""]:
        """The Monte-Carlo estimate of `E max_y <y, x + sigma z>`; differentiable.

        Args:
            x: A pytree of floating arrays.
            key: The same key draws the same noise.

        Returns:
            A scalar, convex in `x` for every key. Its gradient is the perturbed
            maximiser with the same key, and so on for every order.

        Raises:
            TypeError: if `x` or what the maximiser returns is not floating.
            ValueError: if `x` is empty or not finite, or the maximiser returns
                other shapes than it takes.
        """
        settings = self.argmax
        points, z, log_density, sound = _draw(settings, x, key)
        chosen = jax.vmap(settings.function)(points)
        values = jax.vmap(tree_inner)(chosen, points)
        # The derivatives with respect to `x` and `sigma`, by sample.
        slopes = chosen, jax.vmap(tree_inner)(chosen, z)
        base = _at_point(settings, x, chosen), jnp.zeros_like(values[0])
        slopes = _weighted(settings, slopes, log_density, sound, base)
        sigma = jnp.asarray(settings.sigma, values.dtype)
        value = jnp.where(sound, jnp.mean(values), jnp.nan)
        return envelope(value, _mean(slopes), (x, sigma))

    def certify(self, x: PyTree[Array], key: PRNGKeyArray) -> Certificate:
        """How far the estimate is from its mean; see `Perturbed.certify`.

        Args:
            x: A pytree of floating arrays.
            key: The key of the call that is to be judged.
        """
        points, _, _, sound = _draw(self.argmax, x, key)
        values = jax.vmap(tree_inner)(jax.vmap(self.argmax.function)(points), points)
        values = jnp.where(sound, values, jnp.nan)
        return _spread(values, "value", self.argmax.samples)


def perturbed_function(
    function: Callable,
    *,
    samples: int = 1000,
    sigma: Float[Array, ""] | float = 0.1,
    noise: Noise | None = None,
    control_variate: ControlVariate = "leave-one-out",
) -> Perturbed:
    """Makes a smooth function of any function, by averaging over noise.

    Args:
        function: From a pytree of floating arrays to another; must run under `vmap`.
            Its derivatives are not used.
        samples: How many draws are averaged.
        sigma: The scale of the noise, positive; a traced one is differentiated too.
            Smaller is closer to the function and noisier in the derivatives.
        noise: `Gumbel()` (the default), `Normal()`, or any object with
            `sample(key, shape, dtype)` and `log_prob(z)`.
        control_variate: What is subtracted from each draw's value in the derivatives,
            to lower their variance; none changes their mean. `"leave-one-out"`: the
            mean of the other draws, at no further call. `"point"`: the value at `x`,
            one call more. `"none"`.

    Returns:
        A `Perturbed`: call it with `(x, key)`.

    Raises:
        ValueError: if `sigma` is not positive or there are too few samples.
        TypeError: if `function` is not callable or `noise` is no noise.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.fenchel_young import perturbed_function
        >>> def steps(x):
        ...     return jnp.sum(jnp.floor(x))
        >>> smooth = perturbed_function(steps, samples=4000, sigma=0.7)
        >>> slope = jax.grad(smooth)(jnp.array([0.3]), jax.random.key(0))
        >>> bool(abs(slope[0] - 1) < 0.1)  # the staircase rises by one a step
        True

    Source: Berthet et al. (2020), arXiv 2002.08676, proposition 3.1.

    Differences: derivatives of every order and with respect to `sigma`, by likelihood
        ratios (J. Foerster et al., DiCE, ICML 2018, arXiv 1802.05098).
    """
    return Perturbed(
        function=function,
        sigma=sigma,
        noise=Gumbel() if noise is None else noise,
        samples=samples,
        control_variate=control_variate,
    )


def perturbed_argmax(
    argmax: Callable,
    *,
    samples: int = 1000,
    sigma: Float[Array, ""] | float = 0.1,
    noise: Noise | None = None,
    control_variate: ControlVariate = "leave-one-out",
) -> Perturbed:
    """Makes a differentiable maximiser of one that is piecewise constant.

    Args:
        argmax: From scores `x` to a maximiser of `<y, x>` over a fixed set; a pytree
            like `x`. Must run under `vmap`.
        samples: How many draws are averaged.
        sigma: The scale of the noise, positive.
        noise: As for `perturbed_function`.
        control_variate: As for `perturbed_function`.

    Returns:
        A `Perturbed`: call it with `(x, key)`. Its answers lie in the convex hull of
        the set.

    Raises:
        ValueError: if `sigma` is not positive or there are too few samples; in the
            call, if `argmax` does not return a pytree like its argument.
        TypeError: if `argmax` is not callable or `noise` is no noise.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.fenchel_young import perturbed_argmax
        >>> def ranks(x):
        ...     return jnp.argsort(jnp.argsort(x)).astype(x.dtype)
        >>> soft_ranks = perturbed_argmax(ranks, samples=500, sigma=0.2)
        >>> x, key = jnp.array([0.1, 2.0, 1.0]), jax.random.key(0)
        >>> [round(float(r)) for r in soft_ranks(x, key)]
        [0, 2, 1]
        >>> jax.jacobian(soft_ranks)(x, key).shape
        (3, 3)

    Source: Berthet et al. (2020), arXiv 2002.08676, definition 2.1.
    """
    return perturbed_function(
        _Checked(argmax),
        samples=samples,
        sigma=sigma,
        noise=noise,
        control_variate=control_variate,
    )


def perturbed_max(
    argmax: Callable,
    *,
    samples: int = 1000,
    sigma: Float[Array, ""] | float = 0.1,
    noise: Noise | None = None,
    control_variate: ControlVariate = "leave-one-out",
) -> PerturbedMax:
    """Makes a smooth maximum from its maximiser.

    Args:
        argmax: From scores `x` to a maximiser of `<y, x>` over a fixed set; a pytree
            like `x`. Must run under `vmap`.
        samples: How many draws are averaged.
        sigma: The scale of the noise, positive.
        noise: As for `perturbed_function`.
        control_variate: As for `perturbed_function`; of the second derivative.

    Returns:
        A `PerturbedMax`: call it with `(x, key)`; its `argmax` is the gradient.

    Raises:
        ValueError, TypeError: as `perturbed_argmax`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.fenchel_young import perturbed_max
        >>> def top(x):
        ...     return jax.nn.one_hot(jnp.argmax(x), x.size, dtype=x.dtype)
        >>> smooth_max = perturbed_max(top, samples=200)
        >>> x, key = jnp.array([0.1, 0.2]), jax.random.key(0)
        >>> gradient = jax.grad(smooth_max)(x, key)
        >>> bool(jnp.allclose(gradient, smooth_max.argmax(x, key)))
        True

    Source: Berthet et al. (2020), arXiv 2002.08676, proposition 2.2; J. Abernethy,
        C. Lee and A. Tewari, Perturbation Techniques in Online Learning and
        Optimization (2016).
    """
    return PerturbedMax(
        perturbed_argmax(
            argmax,
            samples=samples,
            sigma=sigma,
            noise=noise,
            control_variate=control_variate,
        )
    )


class _Checked(eqx.Module):
    """A maximiser whose answer must be like its argument."""

    argmax: Callable

    def __check_init__(self):
        if not callable(self.argmax):
            raise TypeError(
                "perturbed: `argmax` must be callable (got "
                f"{type(self.argmax).__name__})."
            )

    def __call__(self, x):
        y = self.argmax(x)
        want, got = (
            (jtu.tree_structure(tree), [jnp.shape(v) for v in jtu.tree_leaves(tree)])
            for tree in (x, y)
        )
        if want != got:
            raise ValueError(
                "perturbed: `argmax` must return arrays of the shapes of its argument "
                f"(got {got[1]} for {want[1]}). For another function use "
                "`perturbed_function`."
            )
        return y


@jax.custom_jvp
def _reweighted(value, excess, log_density):
    """`value + (ratio - 1) * excess`, where the likelihood ratio is one in value.

    The ratio is `exp(log_density - its value here)`. As a rule of differentiation
    rather than as that formula, so that a call without derivatives evaluates neither
    densities nor control variates.
    """
    del excess, log_density
    return value


@_reweighted.defjvp
def _reweighted_jvp(primals, tangents):
    value, excess, log_density = primals
    d_value, d_excess, d_log = tangents
    moved = _reweighted(d_value, d_excess, log_density)
    # ratio * excess = excess + (ratio - 1) * excess: every order by the same rule.
    weighted = _reweighted(excess, excess, log_density)
    return _reweighted(value, excess, log_density), moved + weighted * d_log


def _draw(settings, x, key):
    """Perturbed points, their standardised noise and log-densities, by sample.

    The points are constants; noise and densities are what they are as functions of `x`
    and `sigma` when the points stay where they are.
    """
    leaves, structure = jtu.tree_flatten(x)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    if sum(leaf.size for leaf in leaves) == 0:
        raise ValueError("perturbed: `x` must not be empty.")
    # One leaf takes the key itself: what a plain array draws is then no surprise.
    keys = [key] if len(leaves) == 1 else jax.random.split(key, len(leaves))
    points, noises = [], []
    log_density, sound = 0.0, True
    for leaf, leaf_key in zip(leaves, keys, strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"perturbed: `x` must be floating (got {leaf.dtype}). Convert it."
            )
        check_finite("perturbed", "x", leaf)
        sigma = jnp.asarray(settings.sigma, leaf.dtype)
        sound &= jnp.all(jnp.isfinite(leaf)) & (sigma > 0)
        here, width = jax.lax.stop_gradient((leaf, sigma))
        shape = (settings.samples, *leaf.shape)
        drawn = settings.noise.sample(leaf_key, shape, leaf.dtype)
        drawn = jax.lax.stop_gradient(drawn)
        points.append(here[None] + width * drawn)
        # Of `point - x` only the derivative: a small sigma would blow up its rounding.
        z = (width * drawn + (here - leaf)[None]) / sigma
        noises.append(z)
        logs = settings.noise.log_prob(z) - jnp.log(sigma)
        log_density = log_density + jnp.sum(logs, tuple(range(1, logs.ndim)))
    points, noises = (jtu.tree_unflatten(structure, part) for part in (points, noises))
    return points, noises, log_density, sound


def _weighted(settings, values, log_density, sound, at_point):
    """The values by sample with their ratios; in the derivatives less a constant."""

    def leaf(value, here):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(
                "perturbed: the function must return floating arrays (got "
                f"{value.dtype}). Convert them; an index as `jax.nn.one_hot`."
            )
        constant = jnp.zeros_like(value)
        if settings.control_variate == "leave-one-out":
            total = jnp.sum(value, 0, keepdims=True)
            constant = (total - value) / (settings.samples - 1)
        elif settings.control_variate == "point":
            constant = here[None]
        excess = value - jax.lax.stop_gradient(constant)
        logs = log_density.astype(value.dtype)
        logs = logs.reshape(logs.shape + (1,) * (value.ndim - 1))
        # What a function makes of NaN may look like any other value.
        value = jnp.where(sound, value, jnp.nan)
        return _reweighted(value, excess, jnp.broadcast_to(logs, value.shape))

    return jtu.tree_map(leaf, values, at_point)


def _at_point(settings, x, values):
    """The function at `x` where that is the control variate; else any placeholder."""
    if settings.control_variate == "point":
        return settings.function(jax.lax.stop_gradient(x))
    return values


def _mean(draws):
    return jtu.tree_map(lambda v: jnp.mean(v, 0), draws)


def _spread(draws, what, samples):
    """The certificate of a mean over independent draws."""
    errors = jtu.tree_map(lambda v: jnp.std(v, 0, ddof=1) / samples**0.5, draws)
    largest = [jnp.max(error) for error in jtu.tree_leaves(errors)]
    return Certificate(
        "Monte-Carlo error",
        tree_norm(errors),
        proof=False,
        statement=f"the {what} is about `value` from its mean over the noise, in root "
        "mean square",
        details={"largest entry": jnp.max(jnp.stack(largest))},
    )
