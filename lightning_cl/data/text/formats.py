"""Record formats: turns a record of a user's data into a document that can be tokenised."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from lightning_cl.arguments import is_integer
from lightning_cl.data.text.messages import check_string, check_texts, conversation, parse_list, without_switches
from lightning_cl.data.text.record_counts import Tally

FORMATS = (
    '{"text"}, {"prompt", "completion"}, {"prompt", "answer"}, {"messages": [{"role", "content"}, …]},'
    ' {"conversations": [{"from", "value"}, …]}, {"instruction", "output"} or {"instruction",'
    ' "response"}'
)
_REQUIRED = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("prompt", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("text",),
)
EXTRAS = ("choices", "references")
"""Keys that are not trained on: the possible answers, and further accepted answers, for the metrics of a task."""
COLUMNS = frozenset({"tools", "system", "history", "input", "context", *EXTRAS}.union(*_REQUIRED))
"""Every key that has a meaning."""
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
"""Keys of data that cannot be learnt here; they are counted and reported."""


@dataclass(frozen=True)
class Text:
    """Plain text: each token is learnt.

    Args:
        text: the text itself.
        header: a first line that tells where the text is from. It is learnt too, but does not count as its words.
    """

    text: str
    header: str = ""

    @property
    def plain(self) -> str:
        """All of its text."""
        return self.header + self.text


@dataclass(frozen=True)
class Completion:
    """A prompt, and the text that is learnt after it.

    Args:
        prompt: the text before the completion, not learnt.
        completion: the text that is learnt.
        system: a text before the prompt; in a chat template it is a turn of its own.
        where: the record's position in its source, for messages.
        extras: the values of :data:`EXTRAS` as they are in the record.
    """

    prompt: str
    completion: str
    system: str = ""
    where: str = field(default="", compare=False, repr=False)
    extras: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def asked(self) -> str:
        """All text before the completion."""
        return f"{self.system}\n\n{self.prompt}" if self.system else self.prompt

    @property
    def plain(self) -> str:
        """All of its text."""
        return self.asked + self.completion

    def as_chat(self) -> Chat:
        """A conversation: the prompt is the user's turn, the completion the assistant's."""
        system = ({"role": "system", "content": self.system},) if self.system else ()
        turns = ({"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.completion})
        return Chat((*system, *turns), where=self.where, extras=self.extras)


@dataclass(frozen=True)
class Instruction:
    """An instruction with an optional input (alpaca; Dolly calls it context).

    It becomes a conversation if the tokenizer has a chat template, else a completion.

    Args:
        instruction: the question or the request.
        input: the text that the instruction is about; may be empty.
        output: the answer, which is learnt.
        where: the record's position in its source, for messages.
        system: a text before everything else.
        history: earlier pairs of instruction and answer; they are a part of the prompt.
        extras: the values of :data:`EXTRAS` as they are in the record.
    """

    instruction: str
    input: str
    output: str
    where: str = field(default="", compare=False, repr=False)
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()
    extras: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def plain(self) -> str:
        """All of its text."""
        return self.as_completion().plain

    def as_chat(self) -> Chat:
        """A conversation: the user's turn is instruction, blank line and input; the output is the assistant's turn."""
        asked = f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
        turns = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in (*self.history, (asked, self.output)):
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return Chat(tuple(turns), first=len(turns) - 1 if self.history else 0, where=self.where, extras=self.extras)

    def as_completion(self) -> Completion:
        """A completion whose prompt has plain headings."""
        given = f"### Input:\n{self.input}\n\n" if self.input else ""
        earlier = "".join(f"### Instruction:\n{q}\n\n### Response:\n{a}\n\n" for q, a in self.history)
        prompt = f"{earlier}### Instruction:\n{self.instruction}\n\n{given}### Response:\n"
        return Completion(prompt, self.output, self.system, self.where, self.extras)


@dataclass(frozen=True)
class Chat:
    """A conversation: the assistant's turns are learnt.

    Args:
        messages: dictionaries with ``role`` and ``content``, as ``apply_chat_template`` takes them.
        tools: JSON schemas of the tools that the conversation may use.
        first: index of the first message that may bear loss; those before it are the prompt.
        where: the record's position in its source, for messages.
        muted: indices of the assistant's turns that bear no loss.
        extras: the values of :data:`EXTRAS` as they are in the record.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[Any, ...] | None = None
    first: int = 0
    where: str = field(default="", compare=False, repr=False)
    muted: frozenset[int] = frozenset()
    extras: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def last_alone(self) -> Chat:
        """The same conversation with loss on the assistant's last turn alone."""
        last = max((i for i, message in enumerate(self.messages) if message["role"] == "assistant"), default=0)
        return replace(self, first=max(self.first, last))

    @property
    def plain(self) -> str:
        """All of its text, without a template."""
        calls = (json.dumps(message["tool_calls"]) for message in self.messages if message.get("tool_calls"))
        contents = (message["content"] for message in self.messages if message.get("content"))
        return "\n".join((*contents, *calls))


Document: TypeAlias = Text | Completion | Instruction | Chat


def has_known_format(keys: Collection[str]) -> bool:
    """Returns True if a record with these keys can be read."""
    return any(all(key in keys for key in required) for required in _REQUIRED)


def as_document(content: Any, where: str = "", tally: Tally | None = None) -> Document:
    """Turns a record into a document. A string is plain text; the keys of a dictionary decide its format.

    Keys without a value (None, NaN) are ignored. If a record has the keys of several formats, conversations come before
    prompts, and prompts before plain text; the keys of the other formats are counted as unused. Keys that no format has
    are ignored.

    Args:
        content: a string or a dictionary.
        where: the record's position in its source, for messages about it later.
        tally: counts the known keys that the document has no use for.

    Raises:
        ValueError: if the record is malformed; the message gives the reason.
    """
    if isinstance(content, str):
        return Text(check_string(content, "the text"))
    if not isinstance(content, dict):
        raise ValueError(f"expected a record such as {FORMATS}, got a {type(content).__name__}")
    record = {key: value for key, value in content.items() if not _is_missing(value)}
    extras = {key: record.pop(key) for key in EXTRAS if key in record}
    record = _with_chosen_answer(record, extras.get("choices"))
    document, used = _by_keys(record, where)
    if document is not None and extras and not isinstance(document, Text):
        document = replace(document, extras=extras)
    if document is not None:
        if tally is not None:
            unused = [key for key in record if key in COLUMNS and key not in used and not _is_empty(record[key])]
            media = [key for key in record if key in _MEDIA and not _is_empty(record[key])]
            tally.leave_out(f"the field {key!r}" for key in (*unused, *media))
        return document
    without = sorted(str(key) for key in content if key not in record and key in COLUMNS)
    empty = f" ({', '.join(map(repr, without))} without a value: expected a string)" if without else ""
    raise ValueError(f"expected {FORMATS}, got the keys {sorted(map(str, content))}{empty}")


def check_answer(document: Document) -> None:
    """Checks that the answer is not empty; an empty text, an empty cell of a table and a null are the same fault.

    Raises:
        ValueError: if a prompt or an instruction has no answer, since only an end token would be learnt.
    """
    answer = document.completion if isinstance(document, Completion) else getattr(document, "output", "-")
    if not answer.strip():
        raise ValueError("the answer is empty: there is nothing to learn")


def _with_chosen_answer(record: dict[str, Any], choices: Any) -> dict[str, Any]:
    """A record whose answer is the number of a choice, counted from 0, with the choice's text instead."""
    texts = choices_in(choices) if choices is not None else None
    if not texts:
        return record
    numbers = {
        key: record[key] for key in ("answer", "completion", "output", "response") if is_integer(record.get(key))
    }
    for key, number in numbers.items():
        if not 0 <= number < len(texts):
            raise ValueError(f"{key!r}: {number} is the number of no choice; there are {len(texts)}, counted from 0")
    return record | {key: texts[number] for key, number in numbers.items()}


def choices_in(value: Any) -> list[str] | None:
    """The texts of a record's choices: a list of texts, such a list under ``text``, or JSON text; else None."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = parse_list(value, "'choices'")
    if isinstance(value, dict):
        value = value.get("text")
    value = value.tolist() if hasattr(value, "tolist") else value  # pandas reads lists as arrays
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) for one in value):
        return None
    return list(value)


def _by_keys(record: dict[str, Any], where: str) -> tuple[Document | None, set[str]]:
    """The document that a record describes, and the keys that it was made from."""
    for key in ("messages", "conversations"):
        if key in record:
            chat, has_system = _chat(record, key, where)
            return chat, {key, "tools", *(["system"] if has_system else [])}
    for key in ("completion", "answer"):
        if "prompt" in record and key in record:
            completion = _completion(record, key, where)
            return completion, {"prompt", key, "system", *(["tools"] if isinstance(completion, Chat) else [])}
    for given_key, output_key in (("input", "output"), ("context", "response")):
        if "instruction" in record and output_key in record:
            instruction, given, output = (
                check_string(record.get(name, ""), repr(name)) for name in ("instruction", given_key, output_key)
            )
            system, history = _system(record), _history(record.get("history"))
            used = {"instruction", given_key, output_key, "system", "history"}
            return Instruction(instruction, given, output, where, system, history), used
    if "text" in record:
        return Text(check_string(record["text"], "'text'")), {"text"}
    return None, set()


def _system(record: dict[str, Any]) -> str:
    return check_string(record.get("system", ""), "'system'").strip()


def _history(history: Any) -> tuple[tuple[str, str], ...]:
    """Earlier turns of alpaca's records: a list of pairs of instruction and answer."""
    if isinstance(history, str):
        history = parse_list(history, "'history'") if history.strip() else None
    if hasattr(history, "tolist"):
        history = history.tolist()  # pandas reads lists as arrays
    pairs = []
    for i, pair in enumerate(history or ()):
        pair = pair.tolist() if hasattr(pair, "tolist") else pair
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"'history'[{i}]: expected a pair of instruction and answer, got {pair!r}")
        question, answer = (check_string(text, f"'history'[{i}]") for text in pair)
        pairs.append((question, answer))
    return tuple(pairs)


def _is_empty(value: Any) -> bool:
    return (isinstance(value, str) and not value.strip()) or (hasattr(value, "__len__") and len(value) == 0)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _chat(record: dict[str, Any], key: str, where: str) -> tuple[Chat, bool]:
    """A conversation, and True if the record's system text is in it."""
    messages = conversation(record[key], key)
    system = _system(record)
    if system and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": check_string(record["system"], "'system'")})
    _check_assistant(messages, key)
    messages, muted = without_switches(messages, key)
    has_system = messages[0]["role"] in ("system", "developer") and messages[0].get("content", "").strip() == system
    return Chat(tuple(messages), _tools(record), where=where, muted=muted), has_system


def _completion(record: dict[str, Any], key: str, where: str) -> Document:
    prompt, completion = record["prompt"], record[key]
    system = _system(record)
    if not _is_list(prompt) and not _is_list(completion):
        return Completion(check_string(prompt, "'prompt'"), check_string(completion, repr(key)), system, where)
    # If one of the two is a list of messages and the other a string, the string is the user's or assistant's message.
    asked, answered = _turns(prompt, "prompt", "user"), _turns(completion, key, "assistant")
    _check_assistant(answered, key)
    if system and asked[0]["role"] not in ("system", "developer"):
        asked.insert(0, {"role": "system", "content": system})
    (asked, _), (answered, muted) = without_switches(asked, "prompt"), without_switches(answered, key)
    first = len(asked)
    return Chat(
        (*asked, *answered), _tools(record), first, where=where, muted=frozenset(first + turn for turn in muted)
    )


def _turns(content: Any, key: str, role: str) -> list[dict[str, Any]]:
    if _is_list(content):
        return conversation(content, key)
    return [{"role": role, "content": check_string(content, repr(key))}]


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or hasattr(value, "tolist")  # pandas reads lists as arrays


def _check_assistant(messages: list[dict[str, Any]], key: str) -> None:
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(f"{key}: there is no assistant turn to learn; the roles are {[m['role'] for m in messages]}")


def _tools(record: dict[str, Any]) -> tuple[Any, ...] | None:
    tools = record.get("tools")
    if isinstance(tools, str):
        # A column of a table has one type only, so many data sets keep schemas as JSON text.
        tools = parse_list(tools, "'tools'") if tools.strip() else None
    if tools is None or (hasattr(tools, "__len__") and len(tools) == 0):
        return None
    if hasattr(tools, "tolist"):
        tools = tools.tolist()  # pandas reads lists as arrays
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("'tools': expected a list of JSON schemas (dictionaries)")
    return tuple(check_texts(tools, "'tools'"))
