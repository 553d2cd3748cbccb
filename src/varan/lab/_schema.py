"""The store's tables as queries see them, and records to and from their rows.

The tables themselves, with keys and indices, are made by `_migrations`; a test holds
that both agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from ._records import RaceRecord, Record

# Structured fields are JSON text: read whole, never searched.
_MEASUREMENT_JSON = (
    "settings",
    "numbers",
    "curves",
    "notes",
    "sources",
    "environment",
)
_RACE_JSON = ("contestants", "environment", "settings", "skipped", "remarks")

ABOUT = sa.table("varan_store", sa.column("schema", sa.Integer))


def _columns(names: Mapping[str, Any]) -> list[sa.ColumnClause]:
    return [sa.column(name, kind) for name, kind in names.items()]


MEASUREMENTS = sa.table(
    "measurement",
    *_columns(
        {
            "id": sa.Integer,
            "row": sa.String,
            "scale": sa.String,
            "seed": sa.Integer,
            "outcome": sa.String,
            "taken": sa.String,
            "run": sa.String,
            "fingerprint": sa.String,
            "wall_s": sa.Float,
            "cpu_s": sa.Float,
            "compile_s": sa.Float,
            "peak_memory_mib": sa.Float,
            "message": sa.Text,
            "detail": sa.Text,
            **dict.fromkeys(_MEASUREMENT_JSON, sa.Text),
        }
    ),
)
RACES = sa.table(
    "race",
    *_columns(
        {
            "id": sa.Integer,
            "row": sa.String,
            "heat": sa.String,
            "reference": sa.String,
            "taken": sa.String,
            **dict.fromkeys(_RACE_JSON, sa.Text),
        }
    ),
)


def measurement_values(record: Record) -> dict[str, Any]:
    """A record as a row of `measurement`."""
    return _encode(record, _MEASUREMENT_JSON)


def measurement(values: Mapping[Any, Any]) -> Record:
    """A row of `measurement` as a record.

    Raises:
        ValueError: A structured field is no JSON.
    """
    fields = _decode(values, _MEASUREMENT_JSON)
    fields["numbers"] = {name: float(x) for name, x in fields["numbers"].items()}
    return Record(**fields)


def race_values(record: RaceRecord) -> dict[str, Any]:
    """A race as a row of `race`."""
    return _encode(record, _RACE_JSON)


def race(values: Mapping[Any, Any]) -> RaceRecord:
    """A row of `race` as a record.

    Raises:
        ValueError: A structured field is no JSON.
    """
    return RaceRecord(**_decode(values, _RACE_JSON))


def _encode(record: object, structured: tuple[str, ...]) -> dict[str, Any]:
    return {
        name: json.dumps(value, default=str) if name in structured else _storable(value)
        for name, value in vars(record).items()
    }


def _decode(values: Mapping[Any, Any], structured: tuple[str, ...]) -> dict[str, Any]:
    return {
        name: json.loads(value) if name in structured else value
        for name, value in values.items()
        if name != "id"
    }


def _storable(value: Any) -> Any:
    # What a dying process wrote may hold what no database takes as text.
    if isinstance(value, str):
        return (
            value.replace("\0", "\N{REPLACEMENT CHARACTER}")
            .encode("utf-8", "replace")
            .decode("utf-8")
        )
    return value
