"""SAMformer: one layer of attention between the channels of a series, and a linear map.

The forecast of D channels over H steps from their last L is `(X + A(X) X V O) W`: each
channel looks at the others through the row-stochastic matrix
`A(X) = softmax(X Q (X K)' / sqrt(d))`, and one matrix W, the same for all, maps what
results to the future. With `V O = 0` it is the linear forecaster, so it can express
whatever that can. Instance normalisation before and after takes level and scale out of
the problem. A sample costs `2 D L (4 d + H)` operations, and `D^2 (L + d)` more.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ..core._checks import check_positive


class RevIN(eqx.Module):
    """Reversible instance normalisation: the level and scale of each channel, taken
    out before a forecast and put back after it.

    Each channel of a sample is brought to mean 0 and deviation 1 over its own past,
    then scaled and shifted by two learned numbers a channel; `restore` undoes both. A
    forecast between the two moves with the sample's level and stretches with its
    scale.

    Args:
        channels: D, at least 1.
        eps: Added to the variance, so that a constant channel survives.

    Raises:
        ValueError: If `channels` is below 1, `eps` is not positive, or a sample has
            another number of channels.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.nets import RevIN
        >>> norm, x = RevIN(1), jnp.array([[1.0, 3.0, 1.0, 3.0]])
        >>> z, level_and_scale = norm.normalise(x)
        >>> z.round(3).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]
        >>> bool(jnp.allclose(norm.restore(z, level_and_scale), x, atol=1e-4))
        True

    Source: T. Kim, J. Kim, Y. Tae, C. Park, J.-H. Choi and J. Choo, 2022, "Reversible
        instance normalization for accurate time-series forecasting against
        distribution shift", ICLR.
    """

    scale: Float[Array, " channels"]
    shift: Float[Array, " channels"]
    eps: float = eqx.field(static=True)

    def __init__(self, channels: int, eps: float = 1e-5):
        _check_sizes("RevIN", channels=channels)
        check_positive("RevIN", "eps", eps)
        self.scale, self.shift, self.eps = jnp.ones(channels), jnp.zeros(channels), eps

    def normalise(
        self, x: Float[Array, "channels length"]
    ) -> tuple[Float[Array, "channels length"], tuple[Array, Array]]:
        """The normalised sample, and the level and scale that were taken out."""
        if x.ndim != 2 or len(x) != len(self.scale):
            raise ValueError(
                f"RevIN: a sample must have {len(self.scale)} channels and one axis of "
                f"time (got shape {x.shape})."
            )
        level = jnp.mean(x, 1, keepdims=True)
        scale = jnp.sqrt(jnp.var(x, 1, keepdims=True) + self.eps)
        z = (x - level) / scale * self.scale[:, None] + self.shift[:, None]
        return z, (level, scale)

    def restore(
        self, z: Float[Array, "channels steps"], level_and_scale: tuple[Array, Array]
    ) -> Float[Array, "channels steps"]:
        """Puts the level and scale of a sample back into what was made of it."""
        level, scale = level_and_scale
        # As the authors': a learned scale of zero stays finite.
        z = (z - self.shift[:, None]) / (self.scale[:, None] + self.eps**2)
        return z * scale + level


class SAMformer(eqx.Module):
    """A transformer for multivariate forecasts with attention between channels.

    One head, one layer, no feed-forward part and no position code, since channels have
    no order. Train it by sharpness-aware minimisation,
    `sam(optax.adam(1e-3), rho=0.7)` in the paper; by Adam alone attention overfits.

    Args:
        channels: D, of input and forecast.
        length: L, the past that is seen.
        horizon: H, the steps to forecast.
        d_model: d, width of the attention.
        revin: Whether instance normalisation stands before and after.
        key: Random key of the weights (Glorot's uniform distribution).

    Raises:
        ValueError: If a size is below 1, or a sample has another shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.nets import SAMformer
        >>> model = SAMformer(3, 24, 6, key=jax.random.key(0))
        >>> batch = jnp.ones((5, 3, 24))
        >>> jax.vmap(model)(batch).shape, model.attention(batch[0]).shape
        ((5, 3, 6), (3, 3))

    Source: Ilbert, Odonnat, Feofanov, Virmaux, Paolo, Palpanas and Redko, 2024,
        "SAMformer: Unlocking the Potential of Transformers in Time Series Forecasting
        with Sharpness-Aware Minimization and Channel-Wise Attention",
        arXiv:2402.10198, equation 2.

    Differences: As in the paper's formula, no map has a bias; the authors' code has.
    """

    query: Float[Array, "length d"]
    key: Float[Array, "length d"]
    value: Float[Array, "length d"]
    out: Float[Array, "d length"]
    head: Float[Array, "length horizon"]
    revin: RevIN | None

    def __init__(
        self,
        channels: int,
        length: int,
        horizon: int,
        d_model: int = 16,
        *,
        revin: bool = True,
        key: PRNGKeyArray,
    ):
        _check_sizes(
            "SAMformer",
            channels=channels,
            length=length,
            horizon=horizon,
            d_model=d_model,
        )
        draw = jax.nn.initializers.glorot_uniform()
        shapes = [(length, d_model)] * 3 + [(d_model, length), (length, horizon)]
        keys = jax.random.split(key, len(shapes))
        dtype = jnp.result_type(float)
        self.query, self.key, self.value, self.out, self.head = (
            draw(one, shape, dtype) for one, shape in zip(keys, shapes, strict=True)
        )
        self.revin = RevIN(channels) if revin else None

    def attention(
        self, x: Float[Array, "channels length"]
    ) -> Float[Array, "channels channels"]:
        """The matrix A of one sample: what each channel takes from which."""
        self._check(x)
        return self._attention(x if self.revin is None else self.revin.normalise(x)[0])

    def features(
        self, x: Float[Array, "channels length"]
    ) -> Float[Array, "channels length"]:
        """`X + A X V O`, what the linear map sees, of a normalised sample."""
        return x + self._attention(x) @ (x @ self.value) @ self.out

    def __call__(
        self, x: Float[Array, "channels length"]
    ) -> Float[Array, "channels horizon"]:
        """The forecast of one sample."""
        self._check(x)
        if self.revin is None:
            return self.features(x) @ self.head
        z, level_and_scale = self.revin.normalise(x)
        return self.revin.restore(self.features(z) @ self.head, level_and_scale)

    def _attention(self, z):
        scores = (z @ self.query) @ (z @ self.key).T
        return jax.nn.softmax(scores / self.query.shape[1] ** 0.5, axis=-1)

    def _check(self, x):
        if x.ndim != 2 or x.shape[1] != len(self.head):
            raise ValueError(
                "SAMformer: a sample must have shape (channels, "
                f"{len(self.head)}), time last (got {x.shape})."
            )


def attention_entropy(
    attention: Float[Array, "... rows columns"],
) -> Float[Array, "... rows"]:
    """Entropy of each row of an attention matrix, in nats.

    From 0, a row that looks at one place alone ("collapse"), to the logarithm of the
    number of columns, one that looks everywhere alike.

    Args:
        attention: Nonnegative, rows of sum 1.

    Returns:
        The entropy of each row.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.nets import attention_entropy
        >>> rows = jnp.array([[1.0, 0.0], [0.5, 0.5]])
        >>> [round(float(entropy), 3) for entropy in attention_entropy(rows)]
        [0.0, 0.693]

    Source: Zhai, Likhomanenko, Littwin, Busbridge, Ramapuram, Zhang, Gu and Susskind,
        2023, "Stabilizing transformer training by preventing attention entropy
        collapse", arXiv:2303.06296.
    """
    return jnp.sum(jax.scipy.special.entr(attention), -1)


def _check_sizes(owner, **sizes):
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{owner}: `{name}` must be at least 1 (got {size}).")
