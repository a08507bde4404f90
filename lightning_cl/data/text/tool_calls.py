"""Tool calls of messages: one form for all exports, and arguments in the form that a chat template needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Message = dict[str, Any]


def unified_call(message: Message) -> Message:
    """Turns a message's ``function_call``, as older exports have it, into a list of one tool call."""
    call = message.get("function_call")
    if not isinstance(call, dict):
        return message
    rest = {key: value for key, value in message.items() if key != "function_call"}
    return {"tool_calls": [{"type": "function", "function": call}], **rest}


def written_calls(text: str) -> list[Message]:
    """Reads the tool calls that ShareGPT's speaker ``function_call`` writes as JSON; other text gives none."""
    try:
        calls = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return []
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) and "arguments" in call for call in calls):
        return []
    return [{"type": "function", "function": call} for call in calls]


def calls_of(message: Message) -> list[Message]:
    """The functions that a message calls: dictionaries with ``name`` and ``arguments``."""
    calls = message.get("tool_calls")
    if not isinstance(calls, (list, tuple)):
        return []
    return [call.get("function", call) for call in calls if isinstance(call, dict)]


def has_calls(messages: Sequence[Message]) -> bool:
    """Tells if one of the messages calls a tool."""
    return any(message.get("tool_calls") for message in messages)


def parsed_arguments(arguments: Any, name: str) -> Any:
    """Returns the arguments of a call as an object; OpenAI's export has them as JSON text.

    Raises:
        ValueError: for a text that is not valid JSON.
    """
    if not isinstance(arguments, str):
        return arguments
    if not arguments.strip():
        return {}
    try:
        parsed = json.loads(arguments)
        # Some exports encode twice.
        return json.loads(parsed) if isinstance(parsed, str) else parsed
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: expected a JSON object, got {arguments[:60]!r} ({error})") from error


def with_objects(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Returns messages whose calls have their arguments as objects.

    Raises:
        ValueError: for arguments that are not valid JSON.
    """
    return tuple(_with_arguments(message, i, parsed_arguments) for i, message in enumerate(messages))


def with_json(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Returns messages whose calls have their arguments as JSON text, in the form of ``tojson`` in chat templates."""
    return tuple(
        _with_arguments(message, i, lambda value, name: json.dumps(parsed_arguments(value, name), ensure_ascii=False))
        for i, message in enumerate(messages)
    )


def prints_python(messages: Sequence[Message], text: str) -> bool:
    """Tells if a template printed arguments as Python writes a dictionary; then it needs them as JSON text.

    Args:
        messages: messages with arguments as objects.
        text: the messages as the template rendered them.
    """
    return any(str(arguments) in text for arguments in _telling_arguments(messages))


def tells(messages: Sequence[Message]) -> bool:
    """Tells if Python and JSON write an argument of these messages differently."""
    return any(True for _ in _telling_arguments(messages))


def _telling_arguments(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    for message in messages:
        for call in calls_of(message):
            arguments = call.get("arguments")
            if isinstance(arguments, dict) and arguments:  # its keys are strings, which Python writes with other quotes
                yield arguments


def _with_arguments(message: Message, index: int, change: Callable[[Any, str], Any]) -> Message:
    if not message.get("tool_calls") or not isinstance(message["tool_calls"], (list, tuple)):
        return message
    calls = []
    for number, call in enumerate(message["tool_calls"]):
        name = f"messages[{index}]['tool_calls'][{number}]['arguments']"
        if isinstance(call, dict) and isinstance(call.get("function"), dict) and "arguments" in call["function"]:
            function = call["function"] | {"arguments": change(call["function"]["arguments"], name)}
            call = call | {"function": function}
        elif isinstance(call, dict) and "arguments" in call:
            call = call | {"arguments": change(call["arguments"], name)}
        calls.append(call)
    return message | {"tool_calls": calls}
