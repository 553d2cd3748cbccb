"""Fenchel-Young losses, sparse activations and perturbed optimisers: blocks that learn.

Three ways to put a maximiser into a model and train through it:

- activations: `sparsemax`, `entmax` and `fusedmax`, probabilities with exact zeros;
- losses: a regulariser (`Tsallis` and `Fused` on the simplex, `Euclidean` on any set
  with a projection) gives a prediction, its Fenchel-Young loss and a certificate, since the
  loss is a duality gap; `fenchel_young_loss` makes one of any smoothed maximum;
- perturbations: `perturbed_function`, `perturbed_argmax` and `perturbed_max` smooth any
  black box by noise, with unbiased derivatives of every order.

All take vectors or pytrees (batches by `vmap`), jit, and differentiate forward and
reverse. What optax and JAX already have stays there. For code that comes from jaxopt:

| jaxopt | here, in optax or in JAX |
| --- | --- |
| `perturbations.make_perturbed_argmax(f, num_samples, sigma, noise)` | `perturbed_argmax(f, samples=, sigma=, noise=)` |
| `perturbations.make_perturbed_max` | `perturbed_max` |
| `perturbations.make_perturbed_fun` | `perturbed_function` |
| `control_variate=True` / `False` | `control_variate="point"` / `"none"` |
| `perturbations.Gumbel`, `Normal` | `Gumbel`, `Normal` |
| `loss.make_fenchel_young_loss(max_fun)`: `loss(y_true, scores)` | `fenchel_young_loss(max_function)`: `loss(scores, target)` |
| `loss.multiclass_sparsemax_loss(label, scores)` | `Tsallis(2.0).loss(scores, one_hot)` |
| `loss.multiclass_logistic_loss(label, logits)` | `optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)` |
| `loss.binary_logistic_loss(label, logit)` | `optax.losses.sigmoid_binary_cross_entropy(logit, label)` |
| `loss.binary_sparsemax_loss(label, logit)` | `optax.losses.sparsemax_loss(logit, label)` |
| `loss.binary_hinge_loss(label, score)` | `optax.losses.hinge_loss(score, 2 * label - 1)` |
| `loss.binary_perceptron_loss(label, score)` | `optax.losses.perceptron_loss(score, 2 * label - 1)` |
| `loss.multiclass_hinge_loss(label, scores)` | `optax.losses.multiclass_hinge_loss(scores, label)` |
| `loss.multiclass_perceptron_loss(label, scores)` | `optax.losses.multiclass_perceptron_loss(scores, label)` |
| `loss.huber_loss(target, pred, delta)` | `optax.losses.huber_loss(pred, target, delta=delta)` |
| `loss.sparse_plus`, `loss.sparse_sigmoid` | `jax.nn.sparse_plus`, `jax.nn.sparse_sigmoid` |
"""  # noqa: E501 (rows of a table do not wrap)

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._entmax import entmax as entmax
    from ._entmax import sparsemax as sparsemax
    from ._fusedmax import Fused as Fused
    from ._fusedmax import fusedmax as fusedmax
    from ._noise import Gumbel as Gumbel
    from ._noise import Noise as Noise
    from ._noise import Normal as Normal
    from ._perturbed import Perturbed as Perturbed
    from ._perturbed import PerturbedMax as PerturbedMax
    from ._perturbed import perturbed_argmax as perturbed_argmax
    from ._perturbed import perturbed_function as perturbed_function
    from ._perturbed import perturbed_max as perturbed_max
    from ._regularisers import Euclidean as Euclidean
    from ._regularisers import Regulariser as Regulariser
    from ._regularisers import Tsallis as Tsallis
    from ._regularisers import fenchel_young_loss as fenchel_young_loss

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "Euclidean": "_regularisers",
        "Fused": "_fusedmax",
        "Gumbel": "_noise",
        "Noise": "_noise",
        "Normal": "_noise",
        "Perturbed": "_perturbed",
        "PerturbedMax": "_perturbed",
        "Regulariser": "_regularisers",
        "Tsallis": "_regularisers",
        "entmax": "_entmax",
        "fenchel_young_loss": "_regularisers",
        "fusedmax": "_fusedmax",
        "perturbed_argmax": "_perturbed",
        "perturbed_function": "_perturbed",
        "perturbed_max": "_perturbed",
        "sparsemax": "_entmax",
    },
)
