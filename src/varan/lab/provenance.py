"""Where a measurement comes from: sources, versions, machine, commit."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
# Changes to these cannot change what an experiment measures.
_OUTSIDE = ("lab/", "cli/", "testing/")
_RECORDED = (
    "varan",
    "jax",
    "jaxlib",
    "numpy",
    "scipy",
    "equinox",
    "optax",
    "optimistix",
    "lineax",
    "diffrax",
    "scikit-learn",
)


def loaded_sources() -> list[str]:
    """The files of varan that this process has loaded and an experiment depends on."""
    sources = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and name.partition(".")[0] == "varan":
            sources.add(Path(file).resolve().relative_to(PACKAGE).as_posix())
    return sorted(file for file in sources if not file.startswith(_OUTSIDE))


def hash_source(file: str) -> str:
    """The hash of one of varan's files; of an absent file, the word `absent`."""
    try:
        return hashlib.sha256((PACKAGE / file).read_bytes()).hexdigest()
    except OSError:
        return "absent"


def hash_package() -> str:
    """The hash of all of varan's files that an experiment may depend on."""
    files = sorted(
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*")
        if file.is_file() and file.parent.name != "__pycache__"
    )
    inside = [file for file in files if not file.startswith(_OUTSIDE)]
    text = json.dumps([(file, hash_source(file)) for file in inside])
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(
    row: str,
    scale: str,
    precision: str,
    settings: Mapping[str, Any],
    hashes: Mapping[str, str],
) -> str:
    """What a measurement depends on but for its seed, as one short hash.

    Args:
        row: The row's id.
        scale: The scale's name.
        precision: The precision the row runs in.
        settings: What the experiment reads.
        hashes: The files it has loaded and their hashes.
    """
    text = json.dumps(
        [row, scale, precision, dict(settings), dict(hashes)],
        sort_keys=True,
        default=str,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Versions, machine and commit, as plain data."""
    return {
        "python": platform.python_version(),
        "versions": versions(_RECORDED),
        "machine": machine(),
        "commit": commit(),
    }


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each package; `None` when it is absent."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """System, processor, cores and memory; no name of the machine or its user."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": cores(),
        "memory_gib": _memory_gib(),
    }


def commit() -> str | None:
    """The commit of the checkout that varan runs from, marked when files differ."""
    checkout = PACKAGE.parents[1]
    if not (checkout / ".git").exists():
        return None
    try:
        head = _git(checkout, "rev-parse", "HEAD")
        changed = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + (" with changes" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=10
    )
    return answer.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    return round(size / 2**30, 1)
