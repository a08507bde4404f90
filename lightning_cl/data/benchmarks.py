"""Folders of published benchmarks as tasks: TRACE, CL_Benchmark (O-LoRA) and Super-NaturalInstructions (SAPT).

The files are read as they are, and nothing is downloaded. Prompts and task orders are the published ones;
metrics differ in details. In a configuration: ``tasks: {benchmark: trace, folder: LLM-CL-Benchmark_500}``, with further
arguments of the function. The metrics are measured by :class:`~lightning_cl.TaskMatrix`; the published figures are
those of the test data (``metric_split="test"``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_cl.arguments import check_choice, check_integer
from lightning_cl.tasks import Task

TRACE_TASKS: dict[str, tuple[int, list[str]]] = {
    "C-STANCE": (5, ["accuracy", "exact_match"]),
    "FOMC": (3, ["accuracy", "exact_match"]),
    "MeetingBank": (7, ["rouge_l"]),
    "Py150": (5, ["edit_similarity"]),
    "ScienceQA": (3, ["accuracy"]),
    "NumGLUE-cm": (5, ["exact_match"]),
    "NumGLUE-ds": (5, ["exact_match"]),
    "20Minuten": (7, ["sari", "rouge_l"]),
}
"""TRACE's tasks in its order, with the number of epochs and the metrics."""

_SHORT = {1: "dbpedia,amazon,yahoo,agnews", 2: "dbpedia,amazon,agnews,yahoo", 3: "yahoo,amazon,agnews,dbpedia"}
_LONG = {
    4: "MNLI,CB,WiC,COPA,QQP,BoolQA,RTE,IMDB,yelp,amazon,SST-2,dbpedia,agnews,MultiRC,yahoo",
    5: "MultiRC,BoolQA,WiC,MNLI,CB,COPA,QQP,RTE,IMDB,SST-2,dbpedia,agnews,yelp,amazon,yahoo",
    6: "yelp,amazon,MNLI,CB,COPA,QQP,RTE,IMDB,SST-2,dbpedia,agnews,yahoo,MultiRC,BoolQA,WiC",
}
CL_BENCHMARK_ORDERS = {number: names.split(",") for number, names in (_SHORT | _LONG).items()}
"""O-LoRA's orders: 1 to 3 of four tasks, 4 to 6 of fifteen."""

_SUPERNI = {
    1: "1572 363 1290 181 002 1510 639 1729 073 1590 748 511 591 1687 875",
    2: "748 073 1590 639 1572 1687 591 363 1510 1729 181 511 002 1290 875",
}
SUPERNI_ORDERS = {number: [f"task{task}" for task in names.split()] for number, names in _SUPERNI.items()}
"""SAPT's two orders of fifteen tasks, by the numbers in their names."""


def trace(
    folder: str | Path,
    order: Sequence[str] | None = None,
    metrics: Mapping[str, list[str]] | None = None,
    epochs: bool = False,
) -> list[Task]:
    """The tasks of TRACE (Wang et al. 2023), or of any folder in its layout.

    The layout is ``<folder>/<task>/{train,eval,test}.json``, each a list of ``{"prompt", "answer"}``. ``eval.json`` is
    the validation data. TRACE's prompts contain the instruction, and are joined with the answer without anything
    between. Its ROUGE-L and its accuracy are computed in other ways in details
    (:mod:`lightning_cl.functional.text_scores`), and its literals in Py150 are not replaced here.

    Args:
        folder: such as ``LLM-CL-Benchmark_500``.
        order: names of the tasks; default: TRACE's eight tasks in TRACE's order.
        metrics: metrics by task, for tasks that are not TRACE's, or instead of TRACE's.
        epochs: True: train each task for as many epochs as TRACE did (5, 3, 7, 5, 3, 5, 5, 7).

    Raises:
        FileNotFoundError: if there is no such folder, or a task's ``train.json`` is missing.
        ValueError: if `metrics` names a task that is not in `order`.
    """
    names = list(order) if order is not None else list(TRACE_TASKS)
    base, own = _folder(folder), dict(metrics or {})
    _check_known("metrics", own, names)
    tasks = []
    for name in names:
        _need(base / name / "train.json", "trace", names, base)
        published = TRACE_TASKS.get(name, (None, None))
        count = published[0] if epochs else None
        tasks.append(Task(name, train=str(base / name), metrics=own.get(name, published[1]), max_epochs=count))
    return tasks


def cl_benchmark(
    folder: str | Path, order: int | Sequence[str] = 1, instructions: str | Path | None = None
) -> list[Task]:
    """The tasks of O-LoRA's CL_Benchmark (Wang et al. 2023), of which many papers report orders 1 to 6.

    The layout is ``<folder>/<category>/<data set>/{train,dev,test,labels}.json``: lists of ``{"label", "sentence"}``,
    and of the labels. A prompt is the category's instruction, ``Option:`` and the labels, the sentence, and
    ``Answer:``; a prompt of COPA has neither instruction nor labels. The metric is the exact match without case and
    punctuation. In the published data, ``dev.json`` is ``test.json``: a warning tells if that is so.

    Args:
        folder: such as ``CL_Benchmark``.
        order: 1 to 6, or names of data sets in their order.
        instructions: the file ``instruction_config.json`` of the benchmark; default: the one in `folder`, or in the
            folder ``configs`` next to it.

    Raises:
        FileNotFoundError: if a folder or a file is missing.
        ValueError: if a file has another content, or `order` is unknown.
    """
    base = _folder(folder)
    names = _order(order, CL_BENCHMARK_ORDERS)
    sets = {path.parent.name: path.parent for path in sorted(base.glob("*/*/train.json"))}
    texts = _instructions(base, instructions)
    tasks, leaking = [], []
    for name in names:
        if name not in sets:
            raise FileNotFoundError(f"{base}: no <category>/{name}/train.json in it; there are {sorted(sets)}")
        of_task, category = sets[name], sets[name].parent.name
        labels = _read(of_task / "labels.json")
        if category not in texts and category != "COPA":
            raise ValueError(f"{of_task}: there is no instruction for the category {category!r}, only {sorted(texts)}")
        asked = "" if category == "COPA" else f"{texts[category]}Option: {', '.join(labels)} \n"
        splits = {role: of_task / f"{file}.json" for role, file in (("val", "dev"), ("test", "test"))}
        splits = {role: path for role, path in splits.items() if path.is_file()}
        if len(splits) == 2 and splits["val"].read_bytes() == splits["test"].read_bytes():
            leaking.append(name)
        data: dict[str, Any] = {
            role: _classified(path, asked, labels) for role, path in {"train": of_task / "train.json", **splits}.items()
        }
        tasks.append(Task(name, **data, metrics=["normalized_match"], choices=list(labels)))
    if leaking:
        rank_zero_warn(
            f"cl_benchmark: dev.json is the same file as test.json for {', '.join(leaking)}: what is chosen on the"
            " validation data is chosen on the test data"
        )
    return tasks


def superni(folder: str | Path, order: int | Sequence[str] = 1, examples: int = 0) -> list[Task]:
    """Tasks of Super-NaturalInstructions (Wang et al. 2022), by default the fifteen that SAPT and its successors learn.

    The layout is ``<folder>/<task>/{train,dev,test}.json``, or ``<folder>/<task>.json`` as in the original repository,
    where a share is held out: an object with ``Definition``, ``Positive Examples`` and ``Instances``. The prompt is the
    definition, the examples, and the input. Of several outputs the first is learnt (SAPT draws one), and all are
    accepted. The metric is ROUGE-L, here without a stemmer, and the exact match without case and punctuation.

    Args:
        folder: such as ``SuperNI``.
        order: 1 or 2 (SAPT's), or the tasks in their order: whole names, or beginnings such as ``task591``.
        examples: positive examples in each prompt; SAPT has none.

    Raises:
        FileNotFoundError: if there is no such folder or task.
        ValueError: if a file has another content, a beginning fits several tasks, or `order` is unknown.
    """
    check_integer("examples", examples, 0)
    base = _folder(folder)
    found = {path.stem if path.is_file() else path.name: path for path in sorted(base.iterdir()) if _is_task(path)}
    tasks = []
    for wanted in _order(order, SUPERNI_ORDERS):
        fitting = [name for name in found if name == wanted or name.startswith(f"{wanted}_")]
        if len(fitting) != 1:
            number = "no task" if not fitting else f"{len(fitting)} tasks"
            error = FileNotFoundError if not fitting else ValueError
            raise error(f"{base}: {number} {wanted!r} in it; there are {sorted(found)[:20]}")
        path = found[fitting[0]]
        files = {role: path / f"{name}.json" for role, name in (("train", "train"), ("val", "dev"), ("test", "test"))}
        sources = {"train": path} if path.is_file() else {role: file for role, file in files.items() if file.is_file()}
        data: dict[str, Any] = {role: _instances(file, examples) for role, file in sources.items()}
        tasks.append(Task(fitting[0], **data, metrics=["rouge_l", "normalized_match"]))
    return tasks


BENCHMARKS: dict[str, Callable[..., list[Task]]] = {"trace": trace, "cl_benchmark": cl_benchmark, "superni": superni}
"""The readers, by the name that a configuration gives as ``benchmark``."""


def benchmark_tasks(arguments: Mapping[str, Any]) -> list[Task]:
    """The tasks of ``{benchmark: NAME, folder: …}``.

    Args:
        arguments: ``benchmark``, and the arguments of that function.

    Raises:
        ValueError: if the name or an argument is unknown.
    """
    given = dict(arguments)
    reader = BENCHMARKS[check_choice("benchmark", given.pop("benchmark"), tuple(BENCHMARKS))]
    known = reader.__code__.co_varnames[: reader.__code__.co_argcount]
    _check_known(f"tasks: {{benchmark: {reader.__name__}, …}}", given, known)
    if "folder" not in given:
        raise ValueError(f"tasks: {{benchmark: {reader.__name__}}}: give `folder` too; it takes {list(known)}")
    return reader(**given)


# ---------------------------------------------------------------------- inside


def _classified(path: Path, asked: str, labels: Sequence[str]) -> list[dict[str, Any]]:
    records = []
    for number, item in enumerate(_read(path)):
        if not isinstance(item, dict) or not {"label", "sentence"} <= item.keys():
            raise ValueError(f'{path}, item {number}: expected {{"label", "sentence"}}, got {item!r:.200}')
        if item["label"] not in labels:
            raise ValueError(f"{path}, item {number}: the label {item['label']!r} is not in labels.json ({labels})")
        # Without the space, the label's tokens would be those of the middle of a word.
        records.append({"prompt": f"{asked}{item['sentence']}\nAnswer:", "answer": f" {item['label']}"})
    return records


def _instances(path: Path, examples: int) -> list[dict[str, Any]]:
    content = _read(path)
    if not isinstance(content, dict) or not {"Definition", "Instances"} <= content.keys():
        raise ValueError(f'{path}: expected an object with "Definition", "Positive Examples" and "Instances"')
    definition = content["Definition"]
    definition = definition if isinstance(definition, str) else definition[0]
    shown = "".join(
        f"Positive Example {number} -\nInput: {one['input'].strip()}\nOutput: {one['output'].strip()}\n"
        for number, one in enumerate(content.get("Positive Examples", [])[:examples], 1)
    )
    start = f"Definition: {definition.strip()}\n\n{shown}Now complete the following example -\n"
    records = []
    for number, item in enumerate(content["Instances"]):
        if not isinstance(item, dict) or not item.get("output") or "input" not in item:
            raise ValueError(f'{path}, instance {number}: expected {{"input", "output"}}, got {item!r:.200}')
        outputs = [item["output"]] if isinstance(item["output"], str) else list(item["output"])
        record = {"prompt": f"{start}Input: {item['input']}\nOutput: ", "answer": outputs[0]}
        records.append(record | ({"references": outputs} if len(outputs) > 1 else {}))
    return records


def _instructions(base: Path, given: str | Path | None) -> dict[str, str]:
    """The first zero-shot instruction of each category."""
    name = "instruction_config.json"
    places = [Path(given)] if given is not None else [base / name, base.parent / "configs" / name]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"cl_benchmark(instructions={given!r}): there is no {' and no '.join(map(str, places))}; give the"
            " benchmark's instruction_config.json, which has the text before each prompt"
        )
    content = _read(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object with a list of instructions for each category")
    zero_shot = {
        category: [one["instruction"] for one in items if one.get("instruction_type") == "zero-shot"]
        for category, items in content.items()
    }
    return {category: texts[0] for category, texts in zero_shot.items() if texts}


def _order(order: int | Sequence[str], known: Mapping[int, list[str]]) -> list[str]:
    if isinstance(order, int):
        if order not in known:
            raise ValueError(f"order={order}: expected one of {list(known)}, or a list of names")
        return list(known[order])
    if isinstance(order, str):
        raise ValueError(f"order={order!r}: expected one of {list(known)}, or a list of names")
    return list(order)


def _is_task(path: Path) -> bool:
    return (path / "train.json").is_file() if path.is_dir() else path.suffix == ".json"


def _folder(folder: str | Path) -> Path:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"folder={str(folder)!r}: no such folder (looked in {Path(folder).absolute().parent})")
    return Path(folder)


def _need(path: Path, benchmark: str, names: Sequence[str], base: Path) -> None:
    if not path.is_file():
        present = sorted(file.parent.name for file in base.glob("*/train.json"))
        raise FileNotFoundError(
            f"{benchmark}: there is no {path}; {base} has {present}. Give order=[…], a list of these, for other tasks"
            f" than {list(names)}"
        )


def _check_known(what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"{what}: unknown {unknown[0]!r}; there are {list(known)}")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from error
