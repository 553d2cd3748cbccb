"""A row's results as a file that other programs read."""

from __future__ import annotations

import json
from typing import Any

from ..results import finite
from ..standings import to_dict
from .gather import RowResult, ScaleResult


def as_json(entry: RowResult) -> str:
    """All numbers of a row, without its curves; infinities are words.

    Args:
        entry: The row.
    """
    row = entry.row
    told = {
        "id": row.id,
        "number": row.number,
        "title": row.title,
        "outcome": entry.outcome,
        "scales": {result.scale: _scale(result) for result in entry.scales},
        "races": [to_dict(race) for race in entry.races],
    }
    return (
        json.dumps(finite(told), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )


def _scale(result: ScaleResult) -> dict[str, Any]:
    verdict = result.verdict
    return {
        "outcome": result.outcome,
        "reason": result.reason,
        "remarks": list(result.remarks),
        "notes": result.notes,
        "checks": [check.to_dict() for check in verdict.checks] if verdict else [],
        "seeds": {
            str(seed): {
                "numbers": record.numbers,
                "settings": dict(record.settings),
                "environment": dict(record.environment),
                "wall_s": record.wall_s,
                "cpu_s": record.cpu_s,
                "compile_s": record.compile_s,
                "peak_memory_mib": record.peak_memory_mib,
                "run": record.run,
                "taken": record.taken,
            }
            for seed, record in result.records.items()
        },
        "failures": [
            {"seed": record.seed, "message": record.message, "taken": record.taken}
            for record in result.failures
        ],
    }
