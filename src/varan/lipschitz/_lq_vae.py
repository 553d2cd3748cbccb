"""A filter against attacks: an autoencoder whose latent code is one of finitely many.

The encoder gives every latent a mean and a variance; each latent is then cut to a bit,
whether it lies within `q` of zero or not. A decoder of the bits gives the input back,
as training data look. Inputs that are near to each other, an image and its attacked
copy, have the same bits if the encoder moves its means by less than their distance to
`+-q`, and then the filter's output is the same, bit for bit: what `certify` proves.

Training pulls the size of the gradient of the summed means towards 0.1 on the data.
That is an estimate on the data and bounds nothing; the certificate bounds the encoder.

Use it in front of a classifier that cannot be retrained. A filter that quantises hides
its gradient, so measure it by attacks that know it (a smooth stand-in for the bits in
the backward pass), never by those that do not alone.

Cost: one encoder and one decoder an input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from ..core import Certificate
from ..core._checks import (
    check_choice,
    check_finite,
    check_nonempty,
    check_positive,
    is_traced,
)
from ..train import start_training, train_epochs
from ._forward import FORWARD_METHODS, ForwardMethod, bounds
from ._lipschitz import _rows
from ._sets import Box

# The authors': weight of reconstruction and of the penalty, the penalty's target, the
# gain of the soft bits, the share of the noise, steps between falls of the stepsize.
_WEIGHT, _SLOPE, _GAIN, _SHARE = 10.0, 0.1, 500.0, 0.5
_FALL, _EVERY = 0.98, 10_000
_RANGE = (-1.0, 1.0)


class LQVAE(eqx.Module):
    """A variational autoencoder with bits for latents, as a filter of inputs.

    Bits are +1 where a latent lies within `q` of zero and -1 elsewhere. Training
    reads soft bits through `decoder_c`, which moves the encoder, and hard ones through
    `decoder_d`, which does not; the filter is the encoder's means, hard bits,
    `decoder_d`.

    Args:
        encoder: From one input, with entries in [-1, 1], to a vector: the means of the
            latents, then the logarithms of their variances.
        decoder_c: From the soft bits to an input, entries in [-1, 1] (a last tanh).
        decoder_d: The same from the hard bits.
        q: Half the width of the cell of +1, positive; also scales the noise.

    Raises:
        ValueError: If `q` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.lipschitz import LQVAE
        >>> model = LQVAE.dense(6, 4, width=8, key=jax.random.key(0))
        >>> x = jax.random.uniform(jax.random.key(1), (32, 6), minval=-1)
        >>> model, losses = model.fit(x, epochs=2, batch_size=16, key=jax.random.key(2))
        >>> jax.vmap(model.filter)(x).shape, losses.shape
        ((32, 6), (2,))

    Source:
        Kyatham, Mishra, Yadav, Mishra and Prathosh, 2019, "Variational Inference with
        Latent Space Quantization for Adversarial Resilience", arXiv:1903.09940.

    Differences:
        The two decoders and the encoder take one step together: the hard bits pass no
        gradient on, and RMSProp scales each weight by itself, so that it is the same
        as three optimisers. The filter uses the means unless it is given a key: noise
        at test time hides gradients and helps nobody. `certify` is an addition.
    """

    encoder: Callable[[Array], Array]
    decoder_c: Callable[[Array], Array]
    decoder_d: Callable[[Array], Array]
    q: float = eqx.field(static=True, default=0.1)

    def __check_init__(self):
        check_positive("LQVAE", "q", self.q)

    @classmethod
    def dense(
        cls,
        inputs: int,
        latents: int = 32,
        *,
        width: int = 128,
        depth: int = 2,
        q: float = 0.1,
        key: PRNGKeyArray,
    ) -> LQVAE:
        """One of perceptrons: leaky ReLUs, a tanh at the end of the decoders.

        Args:
            inputs: Entries of an input.
            latents: Bits of the code.
            width: Of the hidden layers.
            depth: Hidden layers of each network.
            q: Half the width of the cell of +1.
            key: Random key of the weights.

        Returns:
            The untrained model.
        """
        leaky, keys = jax.nn.leaky_relu, jax.random.split(key, 3)
        encoder = eqx.nn.MLP(inputs, 2 * latents, width, depth, leaky, key=keys[0])
        soft, hard = (
            eqx.nn.MLP(latents, inputs, width, depth, leaky, jnp.tanh, key=one)
            for one in keys[1:]
        )
        return cls(encoder, soft, hard, q)

    def latents(
        self, x: Float[Array, ...]
    ) -> tuple[Float[Array, " latents"], Float[Array, " latents"]]:
        """The means of the latents and the logarithms of their variances."""
        mean, log_variance = jnp.split(self.encoder(x), 2)
        return mean, log_variance

    def code(self, z: Float[Array, " latents"]) -> Float[Array, " latents"]:
        """The hard bits of latents, +1 or -1; a latent at `+-q` itself has -1."""
        return jnp.where(jnp.abs(z) < self.q, 1, -1).astype(z.dtype)

    def soft_code(
        self, z: Float[Array, " latents"], gain: float | Float[Array, ""] = _GAIN
    ) -> Float[Array, " latents"]:
        """Bits with a gradient: the soft sign of `gain (q^2 - z^2)`."""
        return jax.nn.soft_sign(gain * (self.q**2 - z**2))

    def filter(
        self, x: Float[Array, ...], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, ...]:
        """The input as the filter sees it.

        Args:
            x: One input, entries in [-1, 1].
            key: Draws the latents; without one they are their means.

        Returns:
            The filtered input.

        Raises:
            ValueError: Entries outside [-1, 1] or not finite. Under jit NaN entries
                give NaN.
        """
        _check_range("LQVAE.filter", x)
        mean, log_variance = self.latents(x)
        z = mean if key is None else self._draw(mean, log_variance, key)
        # A latent that is NaN has no bit.
        return self.decoder_d(jnp.where(jnp.isnan(z), jnp.nan, self.code(z)))

    def fit(
        self,
        x: Float[Array, "samples ..."],
        *,
        epochs: int,
        batch_size: int = 64,
        stepsize: float = 3e-4,
        key: PRNGKeyArray,
    ) -> tuple[LQVAE, Float[Array, " epochs"]]:
        """Trains all three networks by RMSProp, without labels.

        Args:
            x: Inputs, entries in [-1, 1].
            epochs: Passes over them.
            batch_size: Samples of a step.
            stepsize: At the start; falls by 2 % in 10 000 steps.
            key: Random key.

        Returns:
            The trained model and the mean loss of each epoch.

        Raises:
            ValueError: No inputs, entries outside [-1, 1] or not finite, a stepsize
                that is not positive, or what `varan.train.train_epochs` refuses.
        """
        check_nonempty("LQVAE.fit", "x", x)
        _check_range("LQVAE.fit", x)
        check_positive("LQVAE.fit", "stepsize", stepsize)
        optimiser = _optimiser(float(stepsize))
        state = start_training(self, optimiser, key=key)
        state, losses = train_epochs(
            state, _loss, x, optimiser, epochs=epochs, batch_size=batch_size
        )
        return state.model, losses

    def certify(
        self,
        x: Float[Array, ...],
        radius_max: float = 0.1,
        *,
        norm: Literal["l2", "linf"] = "l2",
        forward: ForwardMethod = "crown",
        halvings: int = 12,
    ) -> Certificate:
        """A radius within which the filter's output does not change at all.

        The code changes only if a mean passes `q` or `-q`. Within the ball of radius r
        it moves by `L_j(r) r` at most, with `L_j(r)` a proved Lipschitz constant of
        mean j there; halving finds a large radius that passes for every latent.

        Args:
            x: One input, entries in [-1, 1].
            radius_max: The largest radius tried, positive.
            norm: Of the ball.
            forward: How the encoder's activations are bounded, as in
                `local_lipschitz`.
            halvings: Steps of bisection.

        Returns:
            The certificate, with the radius for its value: 0 if a mean is too near to
            `+-q`. Its details hold the `gap` of the nearest one, rounding subtracted.

        Raises:
            ValueError: Entries outside [-1, 1] or not finite, a radius that is not
                positive, or an unknown choice.
            UnsupportedPrimitive: An operation of the encoder without a rule.

        Source:
            Ours, by the argument of arXiv:1903.09940 with a proved constant.
        """
        owner = "LQVAE.certify"
        _check_range(owner, x)
        check_positive(owner, "radius_max", radius_max)
        check_choice(owner, "norm", norm, ("l2", "linf"))
        check_choice(owner, "forward", forward, FORWARD_METHODS)
        x = jnp.asarray(x)
        top = jnp.asarray(radius_max, x.dtype)
        radius, gap = _certify(self, x, top, norm, forward, halvings)
        return Certificate(
            "certified radius",
            radius,
            proof=True,
            statement="the filter's output is the same at every y with entries in "
            f"[-1, 1] and |y - x|_{norm[1:]} <= value",
            details={"gap": gap},
        )

    def _draw(self, mean, log_variance, key):
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        return mean + _SHARE * self.q * jnp.exp(log_variance / 2) * noise


@cache
def _optimiser(stepsize: float) -> optax.GradientTransformation:
    """The same object for the same stepsize, so that a second fit compiles nothing."""
    return optax.rmsprop(optax.exponential_decay(stepsize, _EVERY, _FALL))


def _loss(model: LQVAE, x: Array, key: PRNGKeyArray) -> Float[Array, ""]:
    """What the authors minimise, the three networks' parts in one sum."""

    def one(x, key):
        def summed(x):
            mean, log_variance = model.latents(x)
            return jnp.sum(mean), (mean, log_variance)

        slope, (mean, log_variance) = jax.grad(summed, has_aux=True)(x)
        z = model._draw(mean, log_variance, key)
        soft = model.decoder_c(model.soft_code(z))
        hard = model.decoder_d(jax.lax.stop_gradient(model.code(z)))
        divergence = (mean**2 + jnp.exp(log_variance) - log_variance - 1) / 2
        # The norm has no gradient at zero.
        length = jnp.sqrt(jnp.sum(slope**2) + jnp.finfo(x.dtype).tiny)
        errors = jnp.mean((soft - x) ** 2) + jnp.mean((hard - x) ** 2)
        return jnp.mean(divergence) + _WEIGHT * (errors + (_SLOPE - length) ** 2)

    return jnp.mean(jax.vmap(one)(x, jax.random.split(key, len(x))))


@eqx.filter_jit
def _certify(model, x, top, norm, forward, halvings):
    mean, _ = model.latents(x)
    rows = jnp.eye(mean.size, 2 * mean.size, dtype=x.dtype)
    # A sum of n terms rounds by n half units of its terms' sizes at most. An input
    # wrong by so much to either side makes every later sum wrong by as much, and
    # intervals carry it on: their width is for the means here and at another input, by
    # whatever program.
    units = x.size * jnp.finfo(x.dtype).eps * jnp.abs(x)
    point = bounds(model.encoder, Box(x - units, x + units), method="ibp")
    rounding = (point.upper - point.lower)[: mean.size]
    gap = jnp.abs(jnp.abs(mean) - model.q) - rounding

    def holds(radius):
        box = Box.linf(x, radius, clip=_RANGE)
        _, per_row, *_ = _rows(
            model.encoder, box, rows, "crown", norm, forward, True, False
        )
        outward = 1 + 2 * x.size * jnp.finfo(x.dtype).eps
        # NaN compares false: what cannot be bounded is not certified.
        return jnp.all(gap > per_row * outward * radius)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        passed = holds(middle)
        return jnp.where(passed, middle, low), jnp.where(passed, high, middle)

    low, _ = jax.lax.fori_loop(0, halvings, halve, (jnp.zeros_like(top), top))
    return jnp.where(holds(top), top, low), jnp.min(gap)


def _check_range(owner: str, x) -> None:
    if is_traced(x):
        return
    check_finite(owner, "x", x)
    low, high = float(np.min(np.asarray(x))), float(np.max(np.asarray(x)))
    if low < _RANGE[0] or high > _RANGE[1]:
        raise ValueError(
            f"{owner}: entries of `x` must lie in [-1, 1], the range of the decoders "
            f"(got {low:.3g} to {high:.3g}). Rescale the inputs."
        )
