"""Messages of a conversation: checks them, and gives them the one form that chat templates take."""

from __future__ import annotations

import ast
import json
from typing import Any

from lightning_cl.data.text.tool_calls import unified_call, written_calls

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SWITCHES = ("weight", "train", "training", "loss")
"""Fields of messages by which other tools say that an answer is not learnt: OpenAI, axolotl, ms-swift."""
_SPEAKERS = {
    **{role: role for role in _ROLES},
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""ShareGPT's names for the roles, in lower case; any case is read."""


def check_string(value: Any, name: str) -> str:
    """Returns `value` if it is text.

    Raises:
        ValueError: if it is something else, or has half a surrogate pair (valid in JSON, but not for tokenizers).
    """
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a string, got a {type(value).__name__}")
    return _check_encodable(value, name)


def check_texts(value: Any, name: str) -> Any:
    """Returns `value` if all strings in it are text, however deep in lists and dictionaries.

    Raises:
        ValueError: if one has half a surrogate pair.
    """
    if isinstance(value, str):
        _check_encodable(value, name)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_texts(key, name)
            check_texts(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            check_texts(item, f"{name}[{i}]")
    return value


def _check_encodable(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: character {error.start} is half a surrogate pair, which is no text") from error
    return text


def conversation(messages: Any, key: str) -> list[dict[str, Any]]:
    """Messages as ``apply_chat_template`` takes them, from ``{role, content}`` or ShareGPT's ``{from, value}``.

    Args:
        messages: a list of messages, or such a list as JSON text, as in a table.
        key: the field that they come from, for error messages.

    Raises:
        ValueError: if they are malformed; the message gives the reason.
    """
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        messages = parse_list(messages, key)
    messages = _lists(messages)
    if not isinstance(messages, (list, tuple)):
        raise ValueError(
            f'{key}: expected a list of {{"role", "content"}} or {{"from", "value"}}, got a {type(messages).__name__}'
        )
    if not messages:
        raise ValueError(f"{key}: the conversation is empty")
    return [_message(message, f"{key}[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f'{name}: expected {{"role", "content"}}, got a {type(message).__name__}')
    message = {key: value for key, value in message.items() if value is not None}
    for field, value in message.items():
        check_texts(value, f"{name}[{field!r}]")
    if "role" not in message and "from" in message:
        return _shared(message, name)
    message = unified_call(message)
    if "tool_calls" in message:
        calls = _calls(message.pop("tool_calls"), f"{name}['tool_calls']")
        message |= {"tool_calls": calls} if calls else {}  # some templates treat an empty list as a call
    role = message.get("role")
    if role is None:
        raise ValueError(f"{name} has no 'role'; its keys are {sorted(map(str, message))}")
    if role not in _ROLES:
        raise ValueError(f"{name}: unknown role {role!r}; there are {', '.join(_ROLES)}")
    if "content" not in message:
        if role == "assistant" and message.get("tool_calls"):
            return dict(message)
        raise ValueError(f"{name} has no 'content'; its keys are {sorted(map(str, message))}")
    result: dict[str, Any] = message | {"content": _content(message["content"], name)}
    return result


def _shared(message: dict[str, Any], name: str) -> dict[str, Any]:
    speaker = message["from"]
    if not isinstance(speaker, str) or speaker.strip().lower() not in _SPEAKERS:
        raise ValueError(f"{name}: unknown speaker {speaker!r}; there are {', '.join(_SPEAKERS)}, in any case")
    if "value" not in message:
        raise ValueError(f"{name} has no 'value'; its keys are {sorted(message)}")
    value = check_string(message["value"], f"{name}['value']")
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    if speaker.strip().lower() == "function_call" and (calls := written_calls(value)):
        return {"role": "assistant", "tool_calls": calls, **rest}
    return {"role": _SPEAKERS[speaker.strip().lower()], "content": value, **rest}


def _lists(value: Any) -> Any:
    """Turns arrays into lists, however deep, since pandas reads lists as arrays."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def _calls(calls: Any, name: str) -> list[Any]:
    """Returns the calls of tools as a list, also if a table has them as JSON.

    Raises:
        ValueError: if one of them has no name, since a template could not write it.
    """
    if isinstance(calls, str):
        calls = parse_list(calls, name) if calls.strip() else []
    wanted = 'expected a list of {"function": {"name", "arguments"}}'
    if not isinstance(calls, (list, tuple)):
        raise ValueError(f"{name}: {wanted}, got a {type(calls).__name__}")
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{name}[{i}]: {wanted}, got {str(call)[:80]}")
    return list(calls)


def without_switches(messages: list[dict[str, Any]], key: str) -> tuple[list[dict[str, Any]], frozenset[int]]:
    """Takes the switches of other tools out of messages.

    Args:
        messages: as :func:`conversation` gives them.
        key: their field, for error messages.

    Returns:
        The messages without switches, and the indices of the assistant's turns that bear no loss.

    Raises:
        ValueError: for a switch that is neither on nor off, or one that asks for loss on another role.
    """
    muted, plain = set(), []
    for i, message in enumerate(messages):
        for switch in _SWITCHES:
            if switch not in message:
                continue
            value, name = message[switch], f"{key}[{i}][{switch!r}]"
            if not isinstance(value, (bool, int, float)) or value not in (0, 1):
                raise ValueError(f"{name}: {value!r}, expected 1 or true (learnt), or 0 or false (no loss)")
            if message["role"] == "assistant" and not value:
                muted.add(i)
            elif message["role"] != "assistant" and value and switch != "weight":
                raise ValueError(f"{name}: {value!r} for {message['role']!r}: only the assistant's turns are learnt")
        plain.append({field: value for field, value in message.items() if field not in _SWITCHES})
    return plain, frozenset(muted)


def _content(content: Any, name: str) -> str:
    if not isinstance(content, (list, tuple)):
        return check_string(content, f"{name}['content']")
    # Data for models with images has the content in parts. Text parts are joined; other parts cannot be learnt here.
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text"):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{name}['content']: expected a string, or parts of type 'text', got {kind!r}")
    return "".join(check_string(part.get("text"), f"{name}['content']") for part in content)


def parse_list(text: str, key: str) -> Any:
    """Reads a list from text in a table's field, which is JSON or Python code.

    Args:
        text: the field's text.
        key: its column, for error messages.

    Raises:
        ValueError: if it is neither.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        try:
            return ast.literal_eval(text)  # pandas writes Python code into a CSV file
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            # Dataset.to_csv writes lists as numpy does, without commas.
            array = "}\n" in text or "} {" in text
            hint = (
                "; there is no comma between its items, as where datasets' Dataset.to_csv wrote it: write the data by"
                " to_json or to_parquet"
            )
            raise ValueError(
                f"{key}: not valid JSON ({error.msg} at column {error.colno}){hint if array else ''}"
            ) from error
