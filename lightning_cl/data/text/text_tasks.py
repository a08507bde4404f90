"""Tasks whose data is text: their splits, tokenised once and kept, or read as a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_cl.data.text.containers import NO_LAYOUT
from lightning_cl.data.text.dataset import TokenDataset
from lightning_cl.data.text.formats import Document
from lightning_cl.data.text.layout import Layout
from lightning_cl.data.text.record_counts import Tally
from lightning_cl.data.text.records import is_text_source, read_documents
from lightning_cl.data.text.sources import content_key, is_stream, resolve_splits
from lightning_cl.data.text.splitting import split_documents
from lightning_cl.data.text.token_cache import cached
from lightning_cl.data.text.tokenizer import fingerprint, start_tokens
from lightning_cl.data.text.tokens import Sample, encode
from lightning_cl.tasks import Task

ROLES = ("train", "val", "test")


@dataclass(frozen=True)
class TextSettings:
    """Settings that decide, together with the data, how text becomes samples.

    Args:
        max_length: the most tokens in a sample.
        val_fraction: the share that is held out if there is no validation data.
        seed: seed of that choice.
        on_bad_record: ``error`` or ``skip``.
        path_header: True: a file's document starts with its path.
        template: True: prompts with completions are written in the tokenizer's chat template.
        last_turn: True: only the last turn of the assistant bears loss.
        layout: names of the data's own columns.
    """

    max_length: int
    val_fraction: float
    seed: int
    on_bad_record: str
    path_header: bool
    template: bool = False
    last_turn: bool = False
    layout: Layout = NO_LAYOUT

    def encoded(self, documents: Iterable[Document], tokenizer: Any, tally: Tally) -> Iterator[Sample]:
        """The samples of documents."""
        return encode(documents, tokenizer, self.max_length, tally, self.template, self.last_turn)


class TokenStream:
    """A stream of text, tokenised anew in each pass.

    Args:
        source: a table without length.
        task: the task's name, for messages.
        role: the role of this data, for messages.
        tokenizer: a ``transformers`` tokenizer.
        settings: the settings that decide about the samples.

    Attributes:
        tally: counts of what was left out in the latest pass.
    """

    def __init__(self, source: Any, task: str, role: str, tokenizer: Any, settings: TextSettings) -> None:
        self._source, self._task, self._role = source, task, role
        self._tokenizer, self._settings = tokenizer, settings
        self.tally = Tally(settings.on_bad_record)
        self._warned = False
        self._told: set[str] = set()  # left-out parts of records that were already warned about

    def __str__(self) -> str:
        return f"task {self._task!r}, {self._role}"

    def peek(self) -> tuple[dict[str, Any] | None, Tally]:
        """Returns the first sample of a new pass (None if there is none), and counts of what was left out before it."""
        stream = TokenStream(self._source, self._task, self._role, self._tokenizer, self._settings)
        sample = next(stream(0), None)
        return sample, stream.tally

    def __call__(self, epoch: int) -> Iterator[dict[str, Any]]:
        """Makes one pass over the stream; passes the epoch's number to a stream that has ``set_epoch``."""
        if hasattr(self._source, "set_epoch"):
            self._source.set_epoch(epoch)
        tally = self.tally = Tally(self._settings.on_bad_record)
        settings = self._settings
        documents = read_documents(self._source, self._task, self._role, tally, settings.path_header, settings.layout)
        warned = 0
        for ids, mask in self._settings.encoded(documents, self._tokenizer, tally):
            for reason in tally.reasons[warned:]:
                rank_zero_warn(f"{self}: a malformed record is skipped: {reason}")
            warned = len(tally.reasons)
            for what in sorted(tally.left_out.keys() - self._told):
                rank_zero_warn(f"{self}: not in the samples: {what}; how often is in the report")
            self._told |= tally.left_out.keys()
            if not self._warned and tally.truncated + tally.dropped:
                self._warned = True
                what = "is cut off" if tally.truncated else "is dropped: there is nothing to learn in it"
                rank_zero_warn(
                    f"{self}: a sample {what} (max_length={self._settings.max_length}); a stream is read as it is"
                    " trained on, and how many there were in all is in the report"
                )
            yield {"input_ids": ids, "loss_mask": mask}


def split_sources(task: Task) -> dict[str, Any]:
    """A task's data by role; if `val` or `test` is not given, the splits of `train` supply it."""
    layout = Layout.of(task.columns, task.field)
    sources = {role: layout.renamed(getattr(task, role)) for role in ROLES}
    if not is_text_source(sources["train"]):
        return sources
    supplied = {role: layout.renamed(source) for role, source in resolve_splits(sources["train"]).items()}
    given = {role: sources[role] if sources[role] is not None else supplied[role] for role in ("val", "test")}
    return {"train": supplied["train"], **given}


def prepare_texts(task: Task, sources: dict[str, Any], tokenizer: Any, settings: TextSettings) -> dict[str, Any]:
    """The text of a task as data sets of token samples, by role; streams as :class:`TokenStream`.

    Args:
        task: the task.
        sources: the result of :func:`split_sources`; sources that are not text are left out.
        tokenizer: a ``transformers`` tokenizer.
        settings: the settings that decide about the samples.

    Returns:
        the data sets by role. If ``val`` was held out of ``train``, it is among them, perhaps empty.

    Raises:
        ValueError: for a malformed record (the message names file and line), or if there is no token to predict.
    """
    texts = {role: source for role, source in sources.items() if is_text_source(source)}
    streams = {role: source for role, source in texts.items() if is_stream(source)}
    made: dict[str, Any] = {
        role: TokenStream(source, task.name, role, tokenizer, settings) for role, source in streams.items()
    }
    whole = {role: source for role, source in texts.items() if role not in streams}
    held_out = "train" in whole and sources["val"] is None
    if held_out:
        made |= _train_and_held_out(task, whole.pop("train"), tokenizer, settings)
    for role, source in whole.items():
        made[role] = _tokenised(task, source, role, tokenizer, settings)
    for role, data in made.items():
        if isinstance(data, TokenDataset):
            _check(task, role, data, settings.max_length, may_be_empty=held_out and role == "val")
    warn_left_out(task.name, made, settings.max_length)
    return made


def _train_and_held_out(task: Task, source: Any, tokenizer: Any, settings: TextSettings) -> dict[str, TokenDataset]:
    tally = Tally(settings.on_bad_record)
    parts: dict[str, list[Document]] = {}

    def part(role: str) -> list[Document]:
        if not parts:  # read once, and only if one of the two is not in the cache
            documents = list(read_documents(source, task.name, "train", tally, settings.path_header, settings.layout))
            parts["train"], parts["val"] = split_documents(documents, settings.val_fraction, settings.seed)
            tally.records, tally.held_out = len(documents), len(parts["val"])
        return parts[role]

    def make(role: str) -> TokenDataset:
        documents = part(role)
        # Records that were skipped during reading count once, for the training part.
        own = tally if role == "train" else Tally(settings.on_bad_record)
        return TokenDataset.from_samples(settings.encoded(documents, tokenizer, own), own)

    key = _key(source, "train", tokenizer, settings)
    split = {"val_fraction": settings.val_fraction, "seed": settings.seed}
    return {
        role: cached(None if key is None else {**key, **split, "part": role}, lambda role=role: make(role))  # type: ignore[misc]
        for role in ("train", "val")
    }


def _tokenised(task: Task, source: Any, role: str, tokenizer: Any, settings: TextSettings) -> TokenDataset:
    def make() -> TokenDataset:
        tally = Tally(settings.on_bad_record)
        documents = read_documents(source, task.name, role, tally, settings.path_header, settings.layout)
        return TokenDataset.from_samples(settings.encoded(documents, tokenizer, tally), tally)

    return cached(_key(source, role, tokenizer, settings), make)


def _key(source: Any, role: str, tokenizer: Any, settings: TextSettings) -> dict[str, Any] | None:
    content = content_key(source, settings.path_header, role)
    if content is None:
        return None
    return {
        "content": content,
        "tokenizer": fingerprint(tokenizer),
        "chat_template": repr(getattr(tokenizer, "chat_template", None)),
        "start": start_tokens(tokenizer),
        "template": settings.template,
        "last_turn": settings.last_turn,
        "layout": [settings.layout.columns, settings.layout.field],
        "max_length": settings.max_length,
        "on_bad_record": settings.on_bad_record,
        "rules": 4,  # raised whenever the same records get other tokens, loss masks or splits
    }


def _check(task: Task, role: str, data: TokenDataset, max_length: int, may_be_empty: bool) -> None:
    tally = data.tally
    if len(data) == 0 and not may_be_empty:
        why = (
            f"; in {tally.too_long} samples it comes after max_length={max_length}: give more" if tally.too_long else ""
        )
        raise ValueError(f"task {task.name!r}, {role}: there is no token to predict in it{why}")
    if tally.bad:
        reasons = "".join(f"\n  {reason}" for reason in tally.reasons)
        rank_zero_warn(f"task {task.name!r}, {role}: {tally.bad} malformed records were skipped:{reasons}")


_NAMES = {"train": "training", "val": "validation", "test": "test"}


def left_out(texts: Mapping[str, Any]) -> dict[str, int]:
    """Returns the counts of dropped and cut-off samples and of malformed records, as ``train_dropped`` and so on.

    Args:
        texts: a task's data by role. Token data sets count fully, streams as far as their latest pass has come.
    """
    counts: dict[str, int] = {}
    for role, data in texts.items():
        tally: Tally = data.tally
        counts |= {
            f"{role}_dropped": tally.dropped,
            f"{role}_cut_off": tally.truncated,
            f"{role}_malformed": tally.bad,
        }
        counts |= {f"{role}_without {what}": count for what, count in sorted(tally.left_out.items())}
    return counts


def warn_left_out(task: str, texts: Mapping[str, Any], max_length: int) -> None:
    """Warns of the task's samples that were dropped or cut off, with advice, and of the parts of records not used.

    Args:
        task: the task's name.
        texts: the task's data by role; streams are skipped, since they are not read yet.
        max_length: the most tokens in a sample.
    """
    whole = {role: data for role, data in texts.items() if isinstance(data, TokenDataset)}
    for role, data in whole.items():
        for what, count in sorted(data.tally.left_out.items()):
            rank_zero_warn(f"task {task!r}, {_NAMES[role]}: not used: {what}: {count:,}")
    said = [f"{_NAMES[role]}: {words}" for role, data in whole.items() if (words := _words(data))]
    if not said:
        return
    longer = any(data.tally.truncated or data.tally.too_long for data in whole.values())
    advice = f"; a larger max_length than {max_length} keeps more" if longer else ""
    rank_zero_warn(f"task {task!r}, {'; '.join(said)}{advice}")


def warn_odd_split(task: str, train: TokenDataset, fraction: float, batch_size: int) -> None:
    """Warns if a validation split leaves very little to train on, or differs much from the share asked for.

    Args:
        task: the task's name.
        train: the samples that are left to train on.
        fraction: the share of the records that was asked for.
        batch_size: samples in a batch.
    """
    tally = train.tally
    words = f"task {task!r}: {tally.held_out:,} of {tally.records:,} records are held out for validation"
    wanted = fraction * tally.records
    if len(train) < batch_size:
        rank_zero_warn(f"{words}; {len(train):,} samples are left to train on, less than a batch of {batch_size}")
    elif abs(tally.held_out - wanted) > 1:
        said = (
            f"{words}, where val_fraction={fraction:g} of them is {wanted:,.1f}: their lengths differ, and characters"
            " count as well as records; give Task(val=…) to choose"
        )
        (rank_zero_warn if tally.held_out > 3 * wanted + 3 else rank_zero_info)(said)


def warn_validated_on_training_data(task: str, val: TokenDataset, max_length: int) -> None:
    """Warns that validation uses the training data since nothing usable was held out, and gives the reason.

    Args:
        task: the task's name.
        val: the held-out samples; there are none.
        max_length: the most tokens in a sample.
    """
    if val.tally.dropped:
        why = f"all {val.tally.dropped} samples that were held out were dropped"
        why += f" (nothing to learn within max_length={max_length})" if val.tally.too_long else ""
    else:
        why = "it is too little to hold something out"
    rank_zero_warn(f"task {task!r}: validation uses the training data, since {why}: give Task(val=…)")


def _words(data: TokenDataset) -> str:
    tally = data.tally
    parts = {
        "cut off": tally.truncated,
        "dropped, since what is to be learnt comes after the cut": tally.too_long,
        "dropped, since there is nothing to learn": tally.dropped - tally.too_long,
    }
    said = ", ".join(f"{count:,} {what}" for what, count in parts.items() if count)
    return f"of {len(data) + tally.dropped:,} samples {said}" if said else ""
