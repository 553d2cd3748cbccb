"""Inside `shard_map`: right without typed axes, refused with them."""

import subprocess
import sys

_PROGRAM = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from varan import GradientDescent, Smooth, solve

mesh = Mesh(np.array(jax.devices()), ("i",))

def fit(c):
    problem = Smooth(lambda x, c: jnp.sum((x - c) ** 2), c[0])
    return solve(problem, GradientDescent(0.3), jnp.zeros(())).x[None]

def run(check):
    mapped = jax.shard_map(
        fit, mesh=mesh, in_specs=P("i"), out_specs=P("i"), check_vma=check
    )
    return mapped(jnp.array([1.0, 2.0]))

assert np.allclose(run(False), [1.0, 2.0], atol=1e-3), run(False)
try:
    run(True)
except NotImplementedError as error:
    assert "check_vma=False" in str(error)
else:
    raise AssertionError("not refused")
"""


def test_shards_solve_their_own_problems():
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
