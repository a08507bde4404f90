"""Record formats: what a record of somebody's data means, as a document that can be tokenised."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lightning_cl.data.messages import check_string, check_texts, conversation, parse_list

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
COLUMNS = frozenset({"tools", "system", "input", "context"}.union(*_REQUIRED))
"""Every key that means something."""


@dataclass(frozen=True)
class Text:
    """Plain text: each token is learnt.

    Args:
        text: what it says.
        header: a first line that tells where the text is from; it is learnt too, and no part of what the text says.
    """

    text: str
    header: str = ""

    @property
    def plain(self) -> str:
        """All of its text."""
        return self.header + self.text


@dataclass(frozen=True)
class Completion:
    """A prompt, and what is learnt after it."""

    prompt: str
    completion: str

    @property
    def plain(self) -> str:
        """All of its text."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Instruction:
    """An instruction with an optional input (alpaca; Dolly calls it context).

    A chat where there is a template for it, else a completion.
    """

    instruction: str
    input: str
    output: str
    where: str = field(default="", compare=False, repr=False)

    @property
    def plain(self) -> str:
        """All of its text."""
        return self.as_completion().plain

    def as_chat(self) -> Chat:
        """The input follows the instruction after a blank line; the output is the assistant's turn."""
        asked = f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
        turns = ({"role": "user", "content": asked}, {"role": "assistant", "content": self.output})
        return Chat(turns, where=self.where)

    def as_completion(self) -> Completion:
        """With plain headings."""
        given = f"### Input:\n{self.input}\n\n" if self.input else ""
        return Completion(f"### Instruction:\n{self.instruction}\n\n{given}### Response:\n", self.output)


@dataclass(frozen=True)
class Chat:
    """A conversation: the assistant's turns are learnt.

    Args:
        messages: dictionaries with ``role`` and ``content``, as ``apply_chat_template`` takes them.
        tools: JSON schemas of the tools that the conversation may use.
        first: index of the first message that may bear loss; those before it are the prompt.
        where: the record's place, for messages.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[Any, ...] | None = None
    first: int = 0
    where: str = field(default="", compare=False, repr=False)

    @property
    def plain(self) -> str:
        """All of its text, without a template."""
        calls = (json.dumps(message["tool_calls"]) for message in self.messages if message.get("tool_calls"))
        contents = (message["content"] for message in self.messages if message.get("content"))
        return "\n".join((*contents, *calls))


Document: TypeAlias = Text | Completion | Instruction | Chat


def has_known_format(keys: Collection[str]) -> bool:
    """Whether a record with these keys can be read."""
    return any(all(key in keys for key in required) for required in _REQUIRED)


def as_document(content: Any, where: str = "") -> Document:
    """A record as a document. A string is plain text; dictionaries are told apart by their keys.

    Keys without a value (None, NaN) are as if absent. Where the keys of several formats are there, the one that says
    more wins: conversations before prompts, prompts before plain text. Other keys are ignored.

    Args:
        content: a string or a dictionary.
        where: the record's place, for messages about it later.

    Raises:
        ValueError: if the record is malformed, with the reason.
    """
    if isinstance(content, str):
        return Text(check_string(content, "the text"))
    if not isinstance(content, dict):
        raise ValueError(f"expected a record such as {FORMATS}, got a {type(content).__name__}")
    record = {key: value for key, value in content.items() if not _is_missing(value)}
    if "messages" in record:
        return _chat(record, "messages", where)
    if "conversations" in record:
        return _chat(record, "conversations", where)
    for key in ("completion", "answer"):
        if "prompt" in record and key in record:
            return _completion(record, key, where)
    for given_key, output_key in (("input", "output"), ("context", "response")):
        if "instruction" in record and output_key in record:
            instruction, given, output = (
                check_string(record.get(name, ""), repr(name)) for name in ("instruction", given_key, output_key)
            )
            return Instruction(instruction, given, output, where)
    if "text" in record:
        return Text(check_string(record["text"], "'text'"))
    without = sorted(str(key) for key in content if key not in record and key in COLUMNS)
    empty = f" ({', '.join(map(repr, without))} without a value: expected a string)" if without else ""
    raise ValueError(f"expected {FORMATS}, got the keys {sorted(map(str, content))}{empty}")


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _chat(record: dict[str, Any], key: str, where: str) -> Chat:
    messages = conversation(record[key], key)
    system = record.get("system")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": check_string(system, "'system'")})
    _check_assistant(messages, key)
    return Chat(tuple(messages), _tools(record), where=where)


def _completion(record: dict[str, Any], key: str, where: str) -> Document:
    prompt, completion = record["prompt"], record[key]
    if not _is_list(prompt) and not _is_list(completion):
        return Completion(check_string(prompt, "'prompt'"), check_string(completion, repr(key)))
    # A string beside a list of messages is what the user says, or the assistant.
    asked, answered = _turns(prompt, "prompt", "user"), _turns(completion, key, "assistant")
    _check_assistant(answered, key)
    return Chat((*asked, *answered), _tools(record), first=len(asked), where=where)


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
        # Tables have one type a column: many data sets keep schemas as JSON.
        tools = parse_list(tools, "'tools'") if tools.strip() else None
    if tools is None or (hasattr(tools, "__len__") and len(tools) == 0):
        return None
    if hasattr(tools, "tolist"):
        tools = tools.tolist()  # pandas reads lists as arrays
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("'tools': expected a list of JSON schemas (dictionaries)")
    return tuple(check_texts(tools, "'tools'"))
