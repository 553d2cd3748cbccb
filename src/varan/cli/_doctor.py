"""`varan doctor`: what is installed and what is missing."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console

from ._common import FAILED, RESULTS, Json, Out, StoreAt, console, emit


def doctor(out: Out = RESULTS, store: StoreAt = None, as_json: Json = False) -> None:
    """Say what is installed, what is missing, and how to get it."""
    from ..lab.doctor import examine

    report = examine(out, store)
    if as_json:
        emit(report)
    else:
        _show(console(), report)
    if report["complaints"]:
        raise typer.Exit(FAILED)


def _show(screen: Console, report: dict[str, Any]) -> None:
    machine = report["machine"]
    lines = [
        f"varan {report['varan']}, Python {report['python']}",
        f"{machine['system']}, {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB",
        f"devices: {', '.join(report['devices']) or 'none'}",
        "packages: "
        + ", ".join(
            f"{name} {version or 'MISSING'}"
            for name, version in report["packages"].items()
        ),
    ]
    for extra in report["extras"]:
        missing = [name for name, version in extra["packages"].items() if not version]
        if missing:
            absent = f"lacks {', '.join(missing)}: {extra['install']}"
            lines.append(f"extra {extra['name']} (optional): {absent}")
        else:
            lines.append(f"extra {extra['name']}: complete")
    if report["store"]:
        lines.append(f"measurements go to {report['store']}")
    lines.append(f"plots go to {report['output']}")
    lines.extend(report["complaints"] or ["All that varan needs is there."])
    for line in lines:
        screen.print(line, markup=False, highlight=False, soft_wrap=True)
