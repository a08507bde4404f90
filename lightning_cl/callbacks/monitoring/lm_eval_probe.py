"""Benchmarks of lm-evaluation-harness, before training and after every task."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_cl.arguments import check_integer
from lightning_cl.callbacks.monitoring.boundary_probe import BoundaryProbe, Row
from lightning_cl.evaluation.probe_items import fingerprint_of


class LMEvalProbe(BoundaryProbe):
    """Measures tasks of lm-evaluation-harness on the live model, before training and after every task.

    It needs the extra ``lm-eval``. The harness gets the model that is being trained, in the view that is deployed, and
    a copy of its tokenizer; nothing is saved or loaded in between. There is one column for each metric of each task,
    ``task/metric`` (``task/metric/filter`` where there are filters). Training stays the same, bit for bit. It works
    with every module that contains a causal model of ``transformers``, under :func:`~lightning_cl.fit_tasks`.

    Changes since before training are tested in pairs, document by document, where the harness gives a number for each.
    Most of the harness's own tasks load their data from the hub; a YAML file of yours in `include_path` can read local
    files (``dataset_path: json`` with ``dataset_kwargs: {data_files: …}``).

    Memory: 8 bytes for each document and metric. Compute at each boundary: what the tasks need.

    Args:
        tasks: names of tasks, as ``lm_eval --tasks`` has them.
        limit: number of documents of each task that are asked (the first ones); None: all.
        include_path: a folder, or several, with YAML files of further tasks.
        num_fewshot: number of examples before each document; None: as the task has it.
        chat: put the questions in the tokenizer's chat template.
        batch_size: number of requests that are computed together.

    Raises:
        ValueError: if there are no tasks, or an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import LMEvalProbe
        >>> probe = LMEvalProbe(["hellaswag", "arc_easy"], limit=100)
        >>> trainer = L.Trainer(callbacks=[probe], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> probe.tasks
        ['hellaswag', 'arc_easy']
    """

    definition = "scores of lm-evaluation-harness, ± their standard errors"
    prefix = "lm_eval"

    def __init__(
        self,
        tasks: Sequence[str],
        limit: int | None = None,
        include_path: str | Path | Sequence[str | Path] | None = None,
        num_fewshot: int | None = None,
        chat: bool = False,
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        if isinstance(tasks, str) or not tasks or not all(isinstance(task, str) and task for task in tasks):
            raise ValueError(f"tasks={tasks!r}: expected a list of names of tasks, as in ['hellaswag']")
        if limit is not None:
            check_integer("limit", limit, 1)
        if num_fewshot is not None:
            check_integer("num_fewshot", num_fewshot)
        check_integer("batch_size", batch_size, 1)
        paths = [include_path] if isinstance(include_path, (str, Path)) else list(include_path or ())
        for path in paths:
            if not Path(path).is_dir():
                raise ValueError(f"include_path={str(path)!r}: there is no such folder")
        self.tasks, self.limit, self.include_path = list(tasks), limit, [str(path) for path in paths]
        self.num_fewshot, self.chat, self.batch_size = num_fewshot, chat, batch_size

    @override
    def check(self) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise MisconfigurationException(
                "LMEvalProbe: lm-evaluation-harness is not installed: pip install 'lightning-cl[lm-eval]'"
            )

    @override
    def measure(self, trainer: L.Trainer, model: Any, tokenizer: Any) -> tuple[Row, str]:
        harness = importlib.import_module("lm_eval")
        wrapper = importlib.import_module("lm_eval.models.huggingface").HFLM
        manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=self.include_path or None)
        unknown = [task for task in self.tasks if not manager.match_tasks([task])]
        if unknown:
            where = f" in {', '.join(self.include_path)}" if self.include_path else ""
            raise MisconfigurationException(
                f"LMEvalProbe: lm-evaluation-harness knows no task {', '.join(map(repr, unknown))}{where}; `lm_eval ls"
                " tasks` lists those that it has"
            )
        with _quietly(), _as_it_is(model):
            # The harness gives its tokenizer a padding token.
            language_model = wrapper(
                pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=self.batch_size
            )
            results = harness.simple_evaluate(
                model=language_model,
                tasks=self.tasks,
                num_fewshot=self.num_fewshot,
                limit=1 if trainer.fast_dev_run else self.limit,  # type: ignore[attr-defined]
                task_manager=manager,
                bootstrap_iters=0,
                apply_chat_template=self.chat,
            )
        if results is None:
            return {}, ""  # not the first process of its machine: rank 0 has them
        documents = [
            [task, *sorted({(sample["doc_id"], sample["doc_hash"]) for sample in samples})]
            for task, samples in sorted(results["samples"].items())
        ]
        settings = [results.get("versions", {}), results.get("n-shot", {}), self.chat]
        return rows_of(results), fingerprint_of([documents, settings])


def rows_of(results: Mapping[str, Any]) -> Row:
    """Returns the columns of what ``simple_evaluate`` returns.

    A column has the numbers of the single documents where their mean is the score; else the score alone, which stands
    for ``n`` documents.
    """
    row: Row = {}
    for task, scores in results["results"].items():
        samples = results["samples"].get(task)
        if samples is None:
            continue  # a group: its tasks are there
        for key, score in scores.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(score, (int, float)):
                continue
            name = f"{task}/{metric}" if chosen == "none" else f"{task}/{metric}/{chosen}"
            values = _numbers(samples, metric, chosen)
            if values and math.isclose(sum(values) / len(values), score, abs_tol=1e-6):
                row[name] = {"values": values}
            else:
                row[name] = {"values": [float(score)], "n": [float(len({sample["doc_id"] for sample in samples}))]}
    return row


def _numbers(samples: Sequence[Mapping[str, Any]], metric: str, chosen: str) -> list[float] | None:
    """The metric's number of each document, in their order; None if one has another form."""
    found = sorted(
        ((sample["doc_id"], sample.get(metric)) for sample in samples if sample.get("filter", "none") == chosen),
        key=lambda pair: pair[0],
    )
    values = [float(value) for _, value in found if isinstance(value, (int, float))]
    return values if len(values) == len(found) else None


@contextmanager
def _quietly() -> Iterator[None]:
    """Lets the harness speak of errors only, and not describe the machine: that starts programs, for seconds."""
    logger, evaluator = logging.getLogger("lm_eval"), importlib.import_module("lm_eval.evaluator")
    level = logger.level
    describes = {name: getattr(evaluator, name, None) for name in ("add_env_info", "get_git_commit_hash")}
    logger.setLevel(logging.ERROR)
    try:
        for name in describes:
            setattr(evaluator, name, lambda *args, **kwargs: None)
        yield
    finally:
        logger.setLevel(level)
        for name, own in describes.items():
            if own is not None:
                setattr(evaluator, name, own)
            else:
                delattr(evaluator, name)


@contextmanager
def _as_it_is(model: Any) -> Iterator[None]:
    """Keeps the harness from tying a model's weights, which could put others into its place."""
    own = model.__dict__.get("tie_weights")
    model.__dict__["tie_weights"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.__dict__["tie_weights"]
        if own is not None:
            model.__dict__["tie_weights"] = own
