"""A saved memory as texts for mlx-lm's own trainer: ``train.jsonl`` and ``valid.jsonl``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning_cl.arguments import check_choice
from lightning_cl.buffers import Stored
from lightning_cl.buffers.disk.encoding import encode
from lightning_cl.buffers.store import digest
from lightning_cl.buffers.tokens import loss_tokens
from lightning_cl.data.text.tokenizer import fingerprint
from lightning_cl.export.memory import read_index, read_memory
from lightning_cl.files import replace_file

Kind = Literal["text", "completions"]
_MARKS = ("\x02user\x02", "\x02answer\x02")


class Written(NamedTuple):
    """Result of :func:`write_jsonl`."""

    train: int
    """Samples in ``train.jsonl``."""
    valid: int
    """Samples in ``valid.jsonl``."""
    changed: int
    """Samples that mlx-lm reads as other token ids than the run was trained on."""
    unmasked: int
    """Tokens that bore no loss in the run, and do in mlx-lm."""


def write_jsonl(
    folder: str | Path, tokenizer: Any, out: str | Path, valid: float = 0.1, kind: Kind = "text"
) -> Written:
    """Writes a saved memory as ``train.jsonl`` and ``valid.jsonl``, which ``mlx_lm.lora --data OUT`` trains on.

    Decoding loses what texts cannot say; the result counts it:

    * ``text``: mlx-lm learns every token of a text, so the prompts too. It puts the end token after each text, also
      after one that was cut at the longest length. Some token sequences are read back as others, since a tokenizer has
      one way to write a text.
    * ``completions``: mlx-lm applies the chat template to ``prompt`` and ``completion`` and, with ``--mask-prompt``,
      learns the answer alone. Only one prompt with one answer in that template can be written so. What ends the answer
      is learnt as well.

    The names of the tasks, and the share of replay, are not in these files.

    Args:
        folder: of :func:`~lightning_cl.export.memory.save_memory`.
        tokenizer: the run's tokenizer, of ``transformers``.
        out: the folder for the files; files of these names are replaced.
        valid: the part of each task's samples that goes to ``valid.jsonl``, in [0, 1). The same samples give the same
            parts, in any order; equal samples are in one part. mlx-lm wants at least a batch of them.
        kind: ``text`` or ``completions``.

    Returns:
        the counts.

    Raises:
        ValueError: for another tokenizer, for samples that are no token sequences, or that ``kind`` cannot express.
        RuntimeError: if what was written is not read back.
    """
    check_choice("kind", kind, ("text", "completions"))
    if not 0 <= valid < 1:
        raise ValueError(f"valid={valid!r}: expected a part of the samples, in [0, 1)")
    _check_tokenizer(read_index(folder)["tokenizer"], tokenizer)
    stored = list(read_memory(folder))
    write = _as_text if kind == "text" else _completions(tokenizer)
    lines = []
    changed = unmasked = 0
    for place, each in enumerate(stored):
        if loss_tokens(each.sample) is None:
            raise ValueError(f"folder={str(folder)!r}: sample {place} of task {each.task!r} is no token sequence")
        ids, learnt = _tokens(each)
        line, same, begin = write(ids, tokenizer, place, each.task)
        lines.append(json.dumps(line, ensure_ascii=False))
        changed += not same
        unmasked += sum(not bears for bears in learnt[max(1, begin) :])
    held_out = _held_out(stored, valid)
    files = {
        "train": [line for line, out_of in zip(lines, held_out, strict=True) if not out_of],
        "valid": [line for line, out_of in zip(lines, held_out, strict=True) if out_of],
    }
    for name, content in files.items():
        replace_file(Path(out) / f"{name}.jsonl", lambda path, content=content: _write(path, content))  # type: ignore[misc]
    return Written(len(files["train"]), len(files["valid"]), changed, unmasked)


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if path.read_text(encoding="utf-8").split("\n")[:-1] != lines:
        raise RuntimeError(f"{path.name}: is not what was written")


def _check_tokenizer(theirs: str | None, tokenizer: Any) -> None:
    if theirs is not None and theirs != fingerprint(tokenizer):
        raise ValueError("tokenizer: the memory was written with another one; give the run's own")


def _tokens(stored: Stored) -> tuple[list[int], list[bool]]:
    """Ids, and which of them bear loss."""
    sample = stored.sample
    ids = [int(token) for token in sample["input_ids"]]
    if "loss_mask" in sample:
        return ids, [bool(bears) for bears in sample["loss_mask"]]
    return ids, [int(label) != -100 for label in sample["labels"]]


def _held_out(stored: Sequence[Stored], part: float) -> list[bool]:
    keys = [digest(encode(each.sample)) for each in stored]
    chosen: dict[str, set[bytes]] = {}
    for task in {each.task for each in stored}:
        mine = sorted({key for key, each in zip(keys, stored, strict=True) if each.task == task})
        chosen[task] = set(mine[: min(math.ceil(part * len(mine)), len(mine) - 1)])
    return [key in chosen[each.task] for key, each in zip(keys, stored, strict=True)]


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _as_text(ids: list[int], tokenizer: Any, place: int, task: str) -> tuple[dict[str, str], bool, int]:
    """A line, True if mlx-lm reads it as these ids, and the first token that it learns."""
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    puts_start = tokenizer.encode("")[:1] == [start]
    begins = [1, 0] if puts_start and ids[:1] == [start] else [0]
    texts = [_decoded(ids[begin:], tokenizer) for begin in begins]
    for text in texts:
        read = tokenizer.encode(text)
        if read + ([] if read[-1:] == [end] else [end]) == ids:
            return {"text": text}, True, 0
    return {"text": texts[0]}, False, 0


def _completions(tokenizer: Any) -> Callable[[list[int], Any, int, str], tuple[dict[str, str], bool, int]]:
    """Returns a function that writes a line from ids, by the chat template of a tokenizer."""

    def rendered(prompt: str, answer: str | None, **settings: Any) -> Any:
        chat = [{"role": "user", "content": prompt}]
        chat += [] if answer is None else [{"role": "assistant", "content": answer}]
        return tokenizer.apply_chat_template(chat, return_dict=False, **settings)

    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("kind='completions': the tokenizer has no chat template; give kind='text'")
    head, _, rest = rendered(*_MARKS, tokenize=False).partition(_MARKS[0])
    middle, _, tail = rest.partition(_MARKS[1])

    def write(ids: list[int], _: Any, place: int, task: str) -> tuple[dict[str, str], bool, int]:
        text = _decoded(ids, tokenizer)
        prompt, found, answer = text.removeprefix(head).partition(middle)
        for end in _distinct((tail, tail.rstrip())):
            line = {"prompt": prompt, "completion": answer.removesuffix(end)}
            read = rendered(*line.values()) if found and text.startswith(head) and answer.endswith(end) else None
            if read is not None and (read == ids or read[: len(ids)] == ids):
                return line, read == ids, len(rendered(prompt, None, add_generation_prompt=True))
        raise ValueError(
            f"kind='completions': sample {place} of task {task!r} is no prompt and answer in the tokenizer's chat"
            " template; give kind='text'"
        )

    return write


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
