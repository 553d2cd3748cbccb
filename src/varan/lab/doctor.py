"""What is installed, what is missing, and how to get it."""

from __future__ import annotations

import importlib.util
import platform
import re
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from . import provenance

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)[^;]*(?:;.*extra\s*==\s*['\"](\w+)['\"])?")
# Extras for working on varan itself, which no user of it misses.
_INTERNAL = ("dev", "docs")


def examine(folder: Path, store: Path | str | None = None) -> dict[str, Any]:
    """Looks at the installation.

    Args:
        folder: The folder that results would go to.
        store: Where measurements would go; the folder when left out.

    Returns:
        Versions, devices, extras and complaints, as plain data; without complaints all
        that varan needs is there.
    """
    required, extras = _requirements()
    packages = provenance.versions(required)
    report: dict[str, Any] = {
        "varan": provenance.versions(["varan"])["varan"],
        "python": platform.python_version(),
        "machine": provenance.machine(),
        "commit": provenance.commit(),
        "packages": packages,
        "devices": _devices(),
        "extras": [_extra(name, members) for name, members in extras.items()],
        "output": str(folder),
    }
    report["store"], problem = _store(store or folder)
    report["complaints"] = [
        f"{name} is missing: pip install {name}"
        for name, version in packages.items()
        if version is None
    ]
    if not report["devices"]:
        report["complaints"].append("JAX finds no device: pip install --upgrade jax")
    report["complaints"].extend(filter(None, [problem, _unwritable(folder)]))
    return report


def _requirements() -> tuple[list[str], dict[str, list[str]]]:
    required: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in metadata.requires("varan") or []:
        match = _REQUIREMENT.match(line)
        assert match is not None
        name, extra = match.groups()
        if extra is None:
            required.append(name)
        elif extra not in _INTERNAL:
            extras.setdefault(extra, []).append(name)
    return required, extras


def _extra(name: str, members: list[str]) -> dict[str, Any]:
    found = provenance.versions(members)
    complete = all(found.values())
    return {
        "name": name,
        "packages": found,
        "install": None if complete else f'pip install "varan[{name}]"',
    }


def _devices() -> list[str]:
    if importlib.util.find_spec("jax") is None:
        return []
    import jax

    try:
        return [f"{device.platform}: {device.device_kind}" for device in jax.devices()]
    except RuntimeError:
        return []


def _store(location: Path | str) -> tuple[str | None, str | None]:
    """Where the store is or would be made, and why it could not be used."""
    if importlib.util.find_spec("sqlalchemy") is None:
        return None, None
    from .store import NoStoreError, Store, StoreError

    try:
        with Store(location, existing=True) as store:
            return store.location, None
    except NoStoreError as absent:
        return absent.location, None
    except StoreError as error:
        return None, str(error)


def _unwritable(folder: Path) -> str | None:
    """Why results could not be written there; nothing is left behind."""
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return None
    except OSError as error:
        return (
            f"{folder} cannot be written ({error.strerror}): choose another folder "
            "with --out"
        )
