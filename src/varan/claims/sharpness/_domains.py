"""Four domains of MNIST-1D, one of them left out: the task of row 169.

The domains are settings of the generator: as published; with more noise; tilted; half
of the signals backwards. Training and validation are of the other three, whose signals
standardise all; the domain that is left out is only ever tested on.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from varan.data import mnist1d, standardise

from ._benchmark import Data

DOMAINS = {
    "plain": {},
    "noisy": {"correlated_noise": 0.5, "independent_noise": 0.1},
    "tilted": {"shear": (0.375, 1.125)},
    "backwards": {"reversal": 0.5},
}
ARMS = ("sgd-decay", "adam", "sam", "gam", "fad")


def left_out(target: str, seed: int, samples: int, *, validate: bool = False) -> Data:
    """Three domains to train on and the fourth to test on.

    Args:
        target: The domain that is left out.
        seed: From which the domains are drawn; each has its own signals.
        samples: Signals of a domain; a fifth of them is for validation.
        validate: Test on the three domains' validation signals instead, as tuning does.

    Returns:
        The data, as column `"domains"`.

    Raises:
        ValueError: If there is no such domain.
    """
    if target not in DOMAINS:
        raise ValueError(
            f"left_out: `target` must be one of {', '.join(DOMAINS)} (got {target!r})."
        )
    test = []
    kept, held_out = samples - samples // 5, samples // 5
    train, validation = [], []
    for place, (name, settings) in enumerate(DOMAINS.items()):
        key = jax.random.fold_in(jax.random.key(seed), place)
        drawn = mnist1d(key, samples, standardise=False, **settings)
        signals, labels = (np.asarray(part) for part in drawn)
        if name == target:
            test.append((signals, labels))
        else:
            train.append((signals[:kept], labels[:kept]))
            validation.append((signals[-held_out:], labels[-held_out:]))
    parts = train, validation if validate else test
    (x, y), (x_test, y_test) = (
        tuple(np.concatenate(column) for column in zip(*part, strict=True))
        for part in parts
    )
    x, x_test = standardise(x, x_test)
    x, x_test, y, y_test = map(jnp.asarray, (x, x_test, y, y_test))
    return Data("domains", (x, y), (x_test, y_test))
