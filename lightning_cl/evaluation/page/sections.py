"""Sections of the page that only some runs have."""

from __future__ import annotations

from typing import Any


def more_sections(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the sections of what a run's own probes found.

    Args:
        report: of :func:`~lightning_cl.evaluation.build_report`.

    Returns:
        for each its ``id``, ``title``, ``lines`` and ``tables`` (``rows``, ``caption``, ``texts``: the columns that
        hold text).
    """
    return []
