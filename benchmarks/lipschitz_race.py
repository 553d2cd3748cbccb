"""Race: bounds of ReLU networks and of their Jacobians, ours against auto_LiRPA.

Both sides get the same networks, inputs and radii in float32 on one thread: 64 inputs,
10 outputs, He initialisation. Three tasks: CROWN bounds of the outputs; bounds of all
640 entries of the Jacobian; the l_inf local Lipschitz constant of the first output.
Activation ranges are those of plain CROWN on both sides (`optimize=False` there,
`forward="crown"` here). The two run in processes of their own and take turns; what is
timed is the processor time of the call, after a warm-up. Compilation here and
`BoundedModule`'s set-up there are timed apart.

auto_LiRPA's Jacobian bounds are in its public repository only. Install torch and the
repository into an environment and name its interpreter; without it the peer is skipped:

    python benchmarks/lipschitz_race.py --peer-python /path/to/python [--rounds 7]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

NETWORKS = {"2x64": (64, 64, 64, 10), "4x256": (64, 256, 256, 256, 256, 10)}
RADII = (0.01, 0.05)
TASKS = ("crown", "jacobian", "lipschitz")


def instance(sizes: tuple[int, ...], seed: int) -> dict[str, np.ndarray]:
    """Weights, biases and an input."""
    rng = np.random.default_rng(seed)
    arrays = {"x": rng.normal(size=sizes[0])}
    for k, (m, n) in enumerate(itertools.pairwise(sizes)):
        arrays[f"w{k}"] = rng.normal(size=(n, m)) * (2 / m) ** 0.5
        arrays[f"b{k}"] = 0.1 * rng.normal(size=n)
    return {name: a.astype(np.float32) for name, a in arrays.items()}


def layers(arrays) -> list[tuple[np.ndarray, np.ndarray]]:
    count = sum(name.startswith("w") for name in arrays)
    return [(arrays[f"w{k}"], arrays[f"b{k}"]) for k in range(count)]


def ours(arrays, epsilon: float, task: str):
    """A function without arguments that runs one task and waits for it."""
    import jax
    import jax.numpy as jnp

    from varan.lipschitz import Box, bounds, jacobian_bounds, local_lipschitz

    pairs = [(jnp.asarray(w), jnp.asarray(b)) for w, b in layers(arrays)]
    model = tuple(map(list, zip(*pairs, strict=True)))
    box = Box.linf(jnp.asarray(arrays["x"]), epsilon)
    first = jnp.eye(1, 10)

    def run():
        if task == "crown":
            found = bounds(model, box)
        elif task == "jacobian":
            found = jacobian_bounds(model, box, forward="crown")
        else:
            bound = local_lipschitz(
                model, box, rows=first, forward="crown", samples=0
            ).bound
            found = Box(bound, bound)
        jax.block_until_ready(found)
        return np.asarray(found.lower), np.asarray(found.upper)

    return run


def theirs(arrays, epsilon: float, task: str):
    """The same task for auto_LiRPA; runs in its own environment."""
    import torch
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm
    from auto_LiRPA.jacobian import GradNorm, JacobianOP
    from torch import nn

    modules: list[nn.Module] = []
    for w, b in layers(arrays):
        linear = nn.Linear(w.shape[1], w.shape[0])
        linear.weight.data = torch.from_numpy(w)
        linear.bias.data = torch.from_numpy(b)
        modules += [linear, nn.ReLU()]
    net = nn.Sequential(*modules[:-1])

    class Entries(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return JacobianOP.apply(self.net(x), x)

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.norm = net, GradNorm(norm=1)

        def forward(self, x, mask):
            return self.norm(JacobianOP.apply(self.net(x).matmul(mask), x))

    x = torch.from_numpy(arrays["x"])[None]
    ball = BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=epsilon))
    mask = torch.eye(10)[:, :1]
    if task == "crown":
        bounded = BoundedModule(net, x)
    elif task == "jacobian":
        bounded = BoundedModule(Entries(), x)
    else:
        bounded = BoundedModule(Norm(), (ball, mask))

    def run():
        with torch.no_grad():
            if task == "crown":
                low, high = bounded.compute_bounds(x=(ball,), method="CROWN")
            elif task == "jacobian":
                low, high = bounded.compute_jacobian_bounds(ball, optimize=False)
            else:
                _, high = bounded.compute_jacobian_bounds(
                    (ball, mask), optimize=False, bound_lower=False
                )
                low = high
        return low.numpy(), high.numpy()

    return run


def serve() -> None:
    """Answers requests, one JSON line each: the peer's side of the pipe."""
    # The peer logs to standard output: the answers get a channel of their own.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    ready: dict[str, object] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = json.dumps([request["file"], request["epsilon"], request["task"]])
        started = time.process_time()
        if name not in ready:
            arrays = dict(np.load(request["file"]))
            ready[name] = theirs(arrays, request["epsilon"], request["task"])
            started_call = time.process_time()
            set_up = started_call - started
            started = started_call
        else:
            set_up = 0.0
        low, high = ready[name]()
        seconds = time.process_time() - started
        np.savez(request["answer"], low=low, high=high)
        print(json.dumps({"seconds": seconds, "set_up": set_up}), file=channel)
        channel.flush()


class Peer:
    """auto_LiRPA behind a pipe."""

    def __init__(self, python: str):
        self.process = subprocess.Popen(
            [python, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, file: str, epsilon: float, task: str, answer: str) -> dict:
        request = {"file": file, "epsilon": epsilon, "task": task, "answer": answer}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line.startswith("{"):
            raise RuntimeError(f"auto_LiRPA failed on {task} (got {line!r}).")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def available(python: str | None) -> bool:
    if python is None:
        return False
    test = [python, "-c", "import auto_LiRPA.jacobian"]
    return subprocess.run(test, capture_output=True).returncode == 0


def timed(run) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
    started = time.process_time()
    answer = run()
    return time.process_time() - started, answer


def contest(
    peer: Peer | None, folder: Path, net: str, epsilon: float, task: str, rounds: int
) -> dict:
    """One task on one instance, in turns."""
    arrays = instance(NETWORKS[net], seed=0)
    file, answer = str(folder / f"{net}.npz"), str(folder / "answer.npz")
    np.savez(file, **arrays)
    run = ours(arrays, epsilon, task)
    cold, (low, high) = timed(run)
    row = {"network": net, "epsilon": epsilon, "task": task, "cold_s": cold}
    if peer is not None:
        row["peer_set_up_s"] = peer.ask(file, epsilon, task, answer)["set_up"]
    mine, other = [], []
    for _ in range(rounds):
        # A short call is repeated, so that the clock's grain does not show.
        repeats = 20 if cold and timed(run)[0] < 0.005 else 1
        mine.append(np.median([timed(run)[0] for _ in range(repeats)]))
        if peer is not None:
            times = [
                peer.ask(file, epsilon, task, answer)["seconds"]
                for _ in range(min(repeats, 5))
            ]
            other.append(np.median(times))
    row["ours_ms"] = 1e3 * float(np.median(mine))
    if peer is not None:
        found = np.load(answer)
        row["peer_ms"] = 1e3 * float(np.median(other))
        row["ratio"] = float(np.median(np.divide(other, mine)))
        row |= compare(task, low, high, found["low"], found["high"])
    return row


def compare(task: str, low, high, peer_low, peer_high) -> dict[str, float]:
    """How the answers differ, in relative terms."""
    if task == "lipschitz":
        return {"ours": float(high), "peer": float(peer_high.squeeze())}
    width = high - low
    peer_width = peer_high.reshape(width.shape) - peer_low.reshape(width.shape)
    return {
        "mean_width_over_peer": float(width.mean() / peer_width.mean()),
        "largest_width_over_peer": float((width / peer_width).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", help="interpreter that imports auto_LiRPA")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()
    peer = Peer(options.peer_python) if available(options.peer_python) else None
    if peer is None:
        print("auto_LiRPA: skipped, not importable in the given environment")
    with tempfile.TemporaryDirectory() as folder:
        for net in options.networks:
            for task in options.tasks:
                for epsilon in RADII:
                    row = contest(
                        peer, Path(folder), net, epsilon, task, options.rounds
                    )
                    print(json.dumps(row), flush=True)
    if peer is not None:
        peer.close()
    return None


if __name__ == "__main__":
    main()
