"""The table of an export: formats, sizes, and the loss of every task in each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lightning_cl.evaluation.plain import plain
from lightning_cl.evaluation.tables import format_table

INDEX = "export.json"
"""The file of an exported folder that says what is in it."""

TORCH = "in torch"
"""The row of the model in memory, which the others are compared with."""


@dataclass(frozen=True)
class Format:
    """One format of an exported model."""

    name: str
    """As ``gguf q8_0``; of the model in memory: :data:`TORCH`."""
    files: tuple[str, ...] = ()
    """Names in the folder."""
    bytes: int = 0
    """Size of the files."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """For each task its mean loss in nats a token; NaN where nothing could be measured."""
    measured: str = ""
    """The program that computed the losses."""


@dataclass(frozen=True)
class Exported:
    """Content of an exported folder.

    Attributes:
        folder: the folder.
        formats: the model in memory first, if losses were measured.
        tokens: of each task that a loss is a mean over.
        forgetting: of the run, in nats a token; None: unknown.
        on_training_data: tasks whose losses are over training data, for want of validation data.
        checksums: SHA-256 of each file in the folder.
    """

    folder: Path
    formats: tuple[Format, ...]
    tokens: Mapping[str, int] = field(default_factory=dict)
    forgetting: float | None = None
    on_training_data: tuple[str, ...] = ()
    checksums: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes :data:`INDEX` into a folder; it has no path."""
        content = {
            "format": "lightning_cl export 1",
            "formats": [plain(asdict(each)) for each in self.formats],
            "tokens": dict(self.tokens),
            "forgetting": self.forgetting,
            "on_training_data": list(self.on_training_data),
            "sha256": dict(self.checksums),
        }
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / INDEX).write_text(f"{text}\n", encoding="utf-8")

    @staticmethod
    def read(folder: str | Path) -> Exported:
        """Reads what :meth:`write` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        folder = Path(folder)
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        formats = []
        for each in content["formats"]:
            losses = {task: _number(loss) for task, loss in each["losses"].items()}
            formats.append(Format(**each | {"files": tuple(each["files"]), "losses": losses}))
        told = content["tokens"], content["forgetting"], tuple(content["on_training_data"]), content["sha256"]
        return Exported(folder, tuple(formats), *told)

    def rows(self) -> list[list[str]]:
        """The table's cells, its head first: losses of the model in memory, then differences to it."""
        tasks = list(self.tokens)
        trained = next((each for each in self.formats if each.name == TORCH), None)
        table = [["format", "size", *tasks, *(["measured by"] if tasks else [])]]
        for each in self.formats:
            cells = []
            for task in tasks:
                loss = each.losses.get(task, math.nan)
                base = trained.losses.get(task, math.nan) if trained is not None and each is not trained else 0.0
                cells.append(_cell(loss - base, signed=trained is not None and each is not trained))
            size = f"{each.bytes / 1e6:,.1f} MB" if each.bytes else "–"
            table.append([each.name, size, *cells, *([each.measured or "–"] if tasks else [])])
        return table

    def sentences(self) -> list[str]:
        """Sentences on what the numbers say."""
        said = []
        if self.tokens:
            counts = sorted(set(self.tokens.values()))
            over = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
            said.append(
                f"Losses in nats a token, over {over} tokens of each task's validation data; all but {TORCH!r} as"
                " differences to it. They are other tokens than those of the run's matrix."
            )
        if self.on_training_data:
            said.append(f"Without validation data, and so over training data: {', '.join(self.on_training_data)}.")
        trained = next((each.losses for each in self.formats if each.name == TORCH), {})
        for each in (each for each in self.formats if each.files):
            rises = {task: loss - trained.get(task, math.nan) for task, loss in each.losses.items()}
            rises = {task: rise for task, rise in rises.items() if not math.isnan(rise)}
            mean = sum(rises.values()) / len(rises) if rises else 0.0
            if mean >= 0.01:
                worst = max(rises, key=lambda task: rises[task])
                text = f"{each.name} costs {mean:.3f} nats a token on average, most on {worst} ({rises[worst]:.3f})"
                if self.forgetting is not None:
                    text += f"; the tasks that came later cost {_cell(self.forgetting, signed=False)}"
                said.append(f"{text}.")
        return said

    def __str__(self) -> str:
        return "\n".join([*format_table(self.rows()), *(f"  {sentence}" for sentence in self.sentences())])


def _cell(value: float, signed: bool) -> str:
    """A number with three digits; a difference that is none has no sign."""
    text = "–" if math.isnan(value) else f"{value:{'+' if signed else ''}.3f}"
    return "0.000" if text in ("+0.000", "-0.000") else text


def _number(value: float | None) -> float:
    return math.nan if value is None else value
