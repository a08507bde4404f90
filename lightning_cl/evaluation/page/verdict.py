"""The first sentence of the page: what became of the tasks."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from lightning_cl.evaluation.sentences import KEPT, row_names
from lightning_cl.evaluation.tables import format_number

State = Literal["kept", "lost", "diverged", "open"]


class Verdict(NamedTuple):
    """One sentence, and what the eye needs to take it in."""

    state: State
    headline: str
    shares: dict[str, float]
    """For each trained task but the last one: the share of its gain that is left; NaN where it is not known."""


def judge(report: dict[str, Any], enough: float = KEPT) -> Verdict:
    """Sums up what the run kept of its earlier tasks, the worst one by name.

    Args:
        report: of :func:`~lightning_cl.evaluation.build_report`.
        enough: the share of a task's gain that counts as kept.
    """
    trained = row_names(report)[1:]
    last = dict(zip(report["tasks"], report["matrix"][-1], strict=True))
    broken = [name for name in report["tasks"] if math.isinf(last[name])]
    if broken:
        names = ", ".join(broken)
        return Verdict("diverged", f"The run diverged: {report['monitor']} of {names} is not finite.", {})
    earlier = trained[:-1]
    shares = {name: math.nan if (share := report["kept"].get(name)) is None else share for name in earlier}
    known = {name: share for name, share in shares.items() if not math.isnan(share)}
    if not earlier:
        return Verdict("open", "One task so far: there is nothing yet that could be forgotten.", shares)
    if not known:
        return Verdict("open", "No earlier task was learnt well enough to say what was kept of it.", shares)
    kept = [name for name, share in known.items() if share >= enough]
    worst = min(known, key=lambda name: known[name])
    ends = f"{worst} kept {max(known[worst], 0.0):.0%} of what its training gave"
    if known[worst] < 0:
        ends = f"{worst} lost all that its training gave, and more"
    if len(kept) == len(known):
        what = "The earlier task was kept" if len(known) == 1 else f"All {len(known)} earlier tasks were kept"
        return Verdict("kept", f"{what}: {ends}.", shares)
    what = f"{len(known) - len(kept)} of {len(known)} earlier tasks {'was' if len(known) == 1 else 'were'} not kept"
    if len(known) == 1:
        what = "The earlier task was not kept"
    return Verdict("lost", f"{what} (less than {enough:.0%}): {ends}.", shares)


def change_of_average(report: dict[str, Any]) -> str:
    """Returns the mean score at the end next to the mean when each task was learnt."""
    name = report["monitor"]
    ends = f"{format_number(report['average'])} at the end, {format_number(report['mean_when_learnt'])} when learnt"
    return f"mean {name}: {ends}"
