"""What the store asks its database beyond plain choosing."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from ._schema import MEASUREMENTS, RACES

_M = MEASUREMENTS.c
MEASURED = _M.outcome == "measured"


def newest(*conditions: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """The ids of the newest measurements of every row, scale and seed.

    Of each row and scale, only those with the fingerprint of the newest one.

    Args:
        *conditions: What else must hold of them.
    """
    latest = sa.func.first_value(_M.fingerprint).over(
        partition_by=(_M.row, _M.scale), order_by=_M.id.desc()
    )
    place = sa.func.row_number().over(
        partition_by=(_M.row, _M.scale, _M.seed, _M.fingerprint),
        order_by=_M.id.desc(),
    )
    ranked = (
        sa.select(_M.id, _M.fingerprint, latest.label("latest"), place.label("place"))
        .where(MEASURED, *conditions)
        .subquery()
        .c
    )
    return sa.select(ranked.id).where(
        ranked.place == 1, ranked.fingerprint.is_not_distinct_from(ranked.latest)
    )


def failing() -> sa.Select[Any]:
    """The ids of the failures that nothing newer has made good.

    One counts when it is the last word on its seed and belongs to the row's newest
    measurement at its scale: taken after it, or in the same run.
    """
    last = sa.select(sa.func.max(_M.id)).group_by(_M.row, _M.scale, _M.seed)
    ids = sa.select(sa.func.max(_M.id)).where(MEASURED).group_by(_M.row, _M.scale)
    measured = (
        sa.select(_M.id, _M.row, _M.scale, _M.run).where(_M.id.in_(ids)).subquery().c
    )
    return (
        sa.select(_M.id)
        .outerjoin(
            measured.id.table,
            sa.and_(_M.row == measured.row, _M.scale == measured.scale),
        )
        .where(
            _M.id.in_(last),
            ~MEASURED,
            sa.or_(measured.id.is_(None), _M.id > measured.id, _M.run == measured.run),
        )
    )


def known_to(run: str) -> sa.Select[Any]:
    """The ids of what a run measured, and of what it may have taken from the store.

    That is what was measured before it with the fingerprint that it found itself.

    Args:
        run: The run's id.
    """
    own = (
        sa.select(_M.row, _M.scale, _M.fingerprint, sa.func.max(_M.id).label("last"))
        .where(MEASURED, _M.run == run)
        .group_by(_M.row, _M.scale, _M.fingerprint)
        .subquery()
        .c
    )
    return (
        sa.select(_M.id)
        .join(
            own.last.table,
            sa.and_(
                _M.row == own.row,
                _M.scale == own.scale,
                _M.fingerprint.is_not_distinct_from(own.fingerprint),
                _M.id <= own.last,
            ),
        )
        .where(MEASURED)
    )


def runs() -> sa.Select[Any]:
    """What the records of each run come to, and the environment of its last one."""
    total = sa.func.sum
    found = (
        sa.select(
            _M.run,
            sa.func.min(_M.id).label("first"),
            sa.func.max(_M.id).label("last"),
            sa.func.min(_M.taken).label("began"),
            sa.func.max(_M.taken).label("ended"),
            total(sa.case((MEASURED, 1), else_=0)).label("measured"),
            total(sa.case((MEASURED, 0), else_=1)).label("failed"),
            sa.func.coalesce(total(_M.wall_s), 0.0).label("wall_s"),
        )
        .group_by(_M.run)
        .subquery()
    )
    shown = [column for column in found.c if column.name not in ("first", "last")]
    return (
        sa.select(*shown, _M.environment)
        .join(MEASUREMENTS, _M.id == found.c.last)
        .order_by(found.c.first)
    )


def newest_races() -> sa.Select[Any]:
    """The newest race of each row and heat."""
    row, heat = RACES.c.row, RACES.c.heat
    ids = sa.select(sa.func.max(RACES.c.id)).group_by(row, heat)
    return sa.select(RACES).where(RACES.c.id.in_(ids)).order_by(row, heat)
