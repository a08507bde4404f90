"""A model card: base, tasks, what was kept, and how to load it, as the README.md of a saved model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning_cl.evaluation.sentences import row_names
from lightning_cl.evaluation.tables import SCORES, UNSIGNED, format_number
from lightning_cl.version import __version__

Kind = Literal["model", "adapter", "merged", "quantized"]

_LIBRARY = {"adapter": "peft", "quantized": "gguf"}
_RELATION = {"adapter": "adapter"}

_WEIGHTS_TELL = "The model itself can repeat texts that it was trained on, and the names of its tasks are in this card."

_NO_REPORT = "How well it knows its tasks was not measured, or its weights were changed since: there is no matrix."


class Base(NamedTuple):
    """The model before its first task."""

    words: str
    """In a sentence; no path of a disk."""
    name: str | None = None
    """On the hub; None: it is not known to be there."""
    checksum: str | None = None
    """Of its weights, where it is kept."""


def describe_base(source: str | Mapping[str, Any], checksum: str | None = None) -> Base:
    """Describes the base of a model, without saying where it lies on a disk.

    Args:
        source: a name on the hub, a folder, a file, ``sample:NAME``, or a configuration.
        checksum: of its weights.
    """
    if isinstance(source, Mapping):
        return Base(f"none: trained from scratch, a `{_code(str(source['model_type']))}`", None, checksum)
    if source.startswith("sample:"):
        return Base(f"`{_code(source.removeprefix('sample:'))}`, from an installed package", None, checksum)
    local = Path(source).exists() or source.endswith(".gguf") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)
    if local or source.startswith("."):
        place = re.split(r"[/\\]", source.rstrip("/\\"))[-1]
        return Base(f"`{_code(place)}`, a local copy", None, checksum)
    return Base(f"`{source}`", source, checksum)


def model_card(
    base: Base,
    kind: Kind,
    report: Mapping[str, Any] | None = None,
    task: str | None = None,
    settings: Mapping[str, Any] | None = None,
    formats: Sequence[Sequence[str]] = (),
    notes: Sequence[str] = (),
    serving: str = "",
    names_no_base: bool = False,
) -> str:
    """Writes the card of a saved model, in Markdown with YAML at its top.

    It has no path of this machine, and no licence: that is for whoever publishes the model. It says what the run has
    kept of its training data, which is somebody's text.

    Args:
        base: what the model was before.
        kind: a whole model, an adapter, an adapter that is merged into its base, or GGUF files (``quantized``).
        report: of the run (:func:`~lightning_cl.evaluation.build_report`, or what ``report.json`` has); None: unknown.
        task: the task whose adapter it is, if each has its own; ``mean`` or ``sum`` of all.
        settings: further ones to show, as of LoRA.
        formats: rows of a table of the files' formats, its head first, as
            :meth:`lightning_cl.export.formats.Exported.rows` gives them.
        notes: sentences under that table.
        serving: command lines that serve the model.
        names_no_base: the adapter's ``adapter_config.json`` has no local path; the base's name on the hub is there, or
            none.
    """
    title = "Adapter" if kind == "adapter" else "Model"
    lines = [*_front_matter(base, kind), "", f"# {title}: {_tasks_in_words(report)}", ""]
    lines += [f"Trained with lightning_cl {__version__}, a library for continual learning.", "", "## Base", ""]
    lines += [f"- base model: {base.words}"]
    lines += [f"- checksum of the base's weights: `{base.checksum}`"] if base.checksum is not None else []
    lines += [f"- {_text(name)}: {_text(str(value))}" for name, value in (settings or {}).items() if value is not None]
    if task is not None:
        joined = task in ("mean", "sum")
        whose = f"{task} of the adapters of all tasks" if joined else f"adapter of the task {_text(task)}"
        lines += [f"- this is the {whose}"]
    lines += [""]
    lines += ["## Formats", "", *_table(formats[0], formats[1:]), "", *map(_item, notes), ""] if formats else []
    lines += _evidence(report) if report is not None else ["## Results", "", _NO_REPORT, ""]
    lines += _kept_data(report)
    lines += _how_to_load(kind, base, names_no_base)
    lines += ["", "## How to serve it", "", *_fenced(serving, "bash")] if serving else []
    return "\n".join(lines) + "\n"


def _front_matter(base: Base, kind: Kind) -> list[str]:
    named = base.name is not None
    relation = _RELATION.get(kind, "finetune")
    tags = {"adapter": ["  - lora"], "quantized": ["  - gguf"]}
    return [
        "---",
        *([f"base_model: {json.dumps(base.name)}", f"base_model_relation: {relation}"] if named else []),
        *([] if named else ["# base_model: its name on the hub, if it has one"]),
        *(["# base_model: better the trained model, if that is on the hub"] if kind == "quantized" else []),
        f"library_name: {_LIBRARY.get(kind, 'transformers')}",
        "pipeline_tag: text-generation",
        "tags:",
        "  - continual-learning",
        "  - lightning-cl",
        *tags.get(kind, []),
        "# license: that of the base goes along, and the data's; see the base's card before you name one",
        "---",
    ]


def _tasks_in_words(report: Mapping[str, Any] | None) -> str:
    names = row_names(dict(report))[1:] if report is not None else []
    return f"trained on {', then '.join(map(_text, names))}" if names else "trained on one task after another"


def _evidence(report: Mapping[str, Any]) -> list[str]:
    plain = dict(report)
    rows, better = row_names(plain), "lower" if report["mode"] == "min" else "higher"
    matrix = [[rows[i], *map(format_number, values)] for i, values in enumerate(report["matrix"])]
    scores = [
        [name.replace("_", " "), format_number(report[name], signed=name not in UNSIGNED), report["definitions"][name]]
        for name in SCORES
        if name in report
    ]
    lines = ["## Tasks, in their order", "", *_table(["task", "steps", "new", "measured on"], _tasks(report)), ""]
    lines += [
        "`measured on` is the number of validation samples and a fingerprint of them (SHA-256, its first 16 digits).",
        "",
        f"## {_text(report['monitor'])} of every task after every task",
        "",
        f"{better.capitalize()} is better. The first row is before any training.",
        "",
        *_table(["after", *report["tasks"]], matrix),
        "",
        *_table(["score", "value", "definition"], scores),
        "",
        *map(_item, report["sentences"]),
        *(
            _item(
                f"{change['task']}: rows above {rows[change['row']]!r} are measured on other data ({change['what']})."
            )
            for change in report.get("data_changes", ())
        ),
        "",
    ]
    for name, probe in report.get("probe", {}).items():
        values = [
            [rows[after] if after < len(rows) else str(after), *map(format_number, scores)]
            for after, scores in zip(probe["after"], probe["rows"], strict=True)
        ]
        head = ["after", *(f"{column} (n = {n})" for column, n in zip(probe["columns"], probe["n"], strict=True))]
        definition = f"{_text(probe['definition'])}; fingerprint of the questions: `{probe['measured_on']}`."
        lines += [f"## {_text(name)}", "", definition, "", *_table(head, values), ""]
    methods = ", ".join(map(_text, report["methods"])) or "none: plain training"
    return [*lines, "## Methods", "", methods, ""]


def _tasks(report: Mapping[str, Any]) -> list[list[str]]:
    costs = {cost["task"]: cost for cost in report["costs"]["tasks"]}
    rows = []
    for name in report["tasks"]:
        cost, on = costs.get(name, {}), report["measured_on"].get(name, {})
        unit = "tokens" if cost.get("new_tokens") else "samples"
        new = f"{cost[f'new_{unit}']:,.0f} {unit}" if f"new_{unit}" in cost else "–"
        samples = ", ".join(f"{count:,}" for count in on.get("samples", ()) if count is not None)
        watched = " (watched, not trained)" if name in report["watched"] else ""
        found = " ".join(part for part in (samples, on.get("data")) if part)
        rows.append([f"{name}{watched}", f"{cost['steps']:,.0f}" if cost else "–", new, found or "–"])
    return rows


def _kept_data(report: Mapping[str, Any] | None) -> list[str]:
    """Lines on what the run has kept of other people's texts, and where it is."""
    lines = ["## Training data that the run has kept", ""]
    if report is None:
        return [*lines, "Unknown: there is no report. This folder holds no training samples.", ""]
    rows = []
    for name, told in report["methods"].items():
        stored = told.get("stored") if isinstance(told, Mapping) else None
        if not isinstance(stored, Mapping) or not stored:
            continue
        what, counts = "training samples, verbatim", stored
        if "beginnings" in told:
            what, counts = "beginnings of training samples, verbatim", told["beginnings"]
            rows.append([name, "samples that the model has written", _counted(stored), "in the run's folder"])
        place = "in the run's folder" if told.get("storage", "disk") == "disk" else "in the run's checkpoints"
        rows.append([name, what, _counted(counts), place])
    if not rows:
        none = "None: no method of the run keeps samples. This folder holds no training samples."
        return [*lines, f"{none} {_WEIGHTS_TELL}", ""]
    return [
        *lines,
        *_table(["method", "what", "samples by task", "where"], rows),
        "",
        "What is verbatim is text of the people who wrote the training data. **It is not in this folder.** It is in the"
        " run's folder and its checkpoints, and goes along when those are handed on.",
        "",
        _WEIGHTS_TELL,
        "",
    ]


def _counted(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{task}: {number:,}" for task, number in counts.items()) or "none"


def _how_to_load(kind: Kind, base: Base, names_no_base: bool) -> list[str]:
    if kind == "quantized":
        lines = ["Any program on llama.cpp reads the file that you choose from the table:", ""]
        return ["## How to load it", "", *lines, *_fenced("llama-server -m FILE.gguf", "bash")]
    if kind != "adapter":
        code = ["from transformers import AutoModelForCausalLM, AutoTokenizer", "", 'folder = "this-folder"']
        code += ["model = AutoModelForCausalLM.from_pretrained(folder)"]
    elif names_no_base and base.name is None:
        code = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
        code += ['folder, base = "this-folder", "the-base"  # its folder, or its name on the hub']
        code += ["model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)"]
    else:
        code = ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer", ""]
        code += ['folder = "this-folder"', "model = AutoPeftModelForCausalLM.from_pretrained(folder)"]
    code += ["tokenizer = AutoTokenizer.from_pretrained(folder)"]
    lines = ["## How to load it", "", *_fenced("\n".join(code), "python")]
    if kind == "adapter" and names_no_base and base.name is None:
        lines += ["", "`adapter_config.json` names no base: it was a local copy. Give the one that is named above."]
    elif kind == "adapter" and not names_no_base:
        lines += [
            "",
            "`adapter_config.json` says where peft finds the base (`base_model_name_or_path`). Where that is a folder"
            " of the machine that trained it, write the base's name on the hub there before you publish the adapter.",
        ]
    return lines


# ---------------------------------------------------------------------- Markdown


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [
        f"| {' | '.join(cell if index == 1 else _text(cell) for cell in line)} |" for index, line in enumerate(lines)
    ]


def _text(text: str) -> str:
    """A text of somebody in Markdown, as it is: on one line, and no sign in it is markup."""
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_{}\[\]|~$^])", r"\\\1", line)
    return line.replace("://", "&#58;//").replace("www.", "www&#46;")  # else a link, without any brackets


def _item(text: str) -> str:
    """The same as an item of a list, where the first sign could begin a heading or another list."""
    line = _text(text)
    return f"- {re.sub('^[#+0-9-]', lambda found: f'&#{ord(found[0])};', line)}"


def _fenced(text: str, language: str) -> list[str]:
    """A block of code, which no backticks in it end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *text.splitlines(), fence]


def _code(text: str) -> str:
    """A text that stands between backticks."""
    return " ".join(text.replace("`", "'").split())
