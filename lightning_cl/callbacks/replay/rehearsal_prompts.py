"""Prompts for the rehearsal samples that a model writes: a user's, a chat template, or the start of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_cl.callbacks.replay.rehearsal import Prompt
from lightning_cl.data.text.answer_ends import around, special_token
from lightning_cl.data.text.containers import read_file, read_text
from lightning_cl.data.text.prompts import PromptDataset
from lightning_cl.data.text.tokenizer import end_tokens, start_tokens
from lightning_cl.passes.generation import Written

_KEYS = ("prompt", "instruction")


def read_prompts(prompts: Sequence[str] | str | Path) -> list[str]:
    """Reads prompts from a list, or from a file: ``.txt`` with one on each line, or ``.jsonl``.

    A ``.jsonl`` record has ``prompt`` or ``instruction``. An instruction's ``input`` follows it after a blank line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there is no prompt in it, or a line is malformed.
        TypeError: if the list contains something other than texts.
    """
    if not isinstance(prompts, (str, Path)):
        given = list(prompts)
        if not all(isinstance(prompt, str) for prompt in given):
            wrong = next(prompt for prompt in given if not isinstance(prompt, str))
            raise TypeError(f"prompts: expected texts, or a file of them; one is a {type(wrong).__name__}: {wrong!r}")
        found, where = given, f"prompts={given!r}"
    else:
        path, where = Path(prompts), f"prompts={str(prompts)!r}"
        if not path.is_file():
            raise FileNotFoundError(f"{where}: no such file (looked in {path.absolute().parent})")
        if path.suffix.lower() not in (".txt", ".jsonl"):
            raise ValueError(f"{where}: expected a .txt file with a prompt on each line, or a .jsonl file")
        txt = path.suffix.lower() == ".txt"
        found = read_text(path, where).splitlines() if txt else _from_records(path, where)
    found = [prompt.strip() for prompt in found if prompt.strip()]
    if not found:
        raise ValueError(f"{where}: there is no prompt in it; None lets the model write without any")
    return found


def _from_records(path: Path, where: str) -> list[str]:
    found = []
    for record in read_file(path, where):
        if record.problem is not None:
            raise ValueError(f"{record.where}: {record.problem}")
        content = record.content
        key = next((key for key in _KEYS if isinstance(content, dict) and isinstance(content.get(key), str)), None)
        if key is None:
            raise ValueError(f'{record.where}: expected a record such as {{"prompt": …}} or {{"instruction": …}}')
        more = content.get("input") if key == "instruction" else None
        found.append(f"{content[key]}\n\n{more}" if more else content[key])
    return found


@dataclass(frozen=True)
class UserTurn:
    """Position in a chat template where the user speaks.

    Args:
        ids: the tokens before the user's words.
        after: the text after them, without white space around it.
        ends: the special token that ends the user's words, if there is one.
    """

    ids: tuple[int, ...]
    after: str
    ends: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> UserTurn:
        """Finds the user's turn in a tokenizer's chat template.

        Raises:
            ValueError: if the template does not tell where a user's words begin and end.
        """
        before, after = around(tokenizer, "USERSWORDS", [], "user")
        if not after:
            raise ValueError(
                "prompts=None: the chat template does not tell where a user's words begin and end; give prompts, a list"
                " of instructions or a file"
            )
        # A space at the end would be the start of a word, and the model could not write that word as usual.
        ids = tokenizer(before.rstrip(" "), add_special_tokens=False)["input_ids"]
        return cls(tuple(ids), after, special_token(tokenizer, after))

    def words(self, written: Written, tokenizer: Any) -> str | None:
        """Returns the user's words in a text written after :attr:`ids`; None if they have no end."""
        text = tokenizer.decode(written.ids[: -1 if written.ended else None], skip_special_tokens=True)
        said, ended, _ = text.partition(self.after)
        return said.strip() if written.ended or ended else None


def start_of_text(tokenizer: Any) -> Prompt:
    """Returns the start token as a prompt, or the end token if the tokenizer has no start token.

    The library's texts do not begin with an end token, so an end token is no part of the sample.

    Raises:
        ValueError: if there is neither.
    """
    start = start_tokens(tokenizer)
    ids = start or end_tokens(tokenizer)
    if not ids:
        raise ValueError("prompts=None: the tokenizer has no start and no end token to write a text from; give prompts")
    return Prompt(tuple(ids), learnt=True, hidden=0 if start else 1)


def beginning_of(sample: dict[str, Any]) -> list[int]:
    """Returns the tokens before the last answer of a token sample; of a text, its first tokens."""
    ids: list[int] = PromptDataset([sample])[0]["prompt"]  # type: ignore[arg-type]
    return ids
