"""The part of Go's text/template that our templates for Ollama use, to check them where there is no Go."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = Mapping[str, str]

_ACTION = re.compile(r'\{\{((?:"(?:[^"\\]|\\.)*"|[^"])*?)\}\}', re.DOTALL)
_WORD = re.compile(r'\s*("(?:[^"\\]|\\.)*"|\d+|:=|[(),=]|\$?\w*(?:\.\w+)+|\$\w*|\w+)')
_LOOP = re.compile(r"range (\$\w+), (\$\w+) := (\S+)")
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda a, b: a == b,
    "gt": lambda a, b: a > b,
    "not": lambda a: not a,
    "len": len,
    "slice": lambda values, start: values[start:],
}


def ollama_prompt(template: str, messages: Sequence[Message]) -> str:
    """Returns the text that Ollama makes of a conversation with a template.

    Neighbours of one role become one message, with an empty line between them. All system texts together are
    ``.System``; a template that names ``.Messages`` is run once, another one is run for the last message.

    Args:
        template: of the subset of Go's language that :func:`~lightning_cl.export.go_template.derive_template` writes.
        messages: with ``role`` and ``content``.

    Raises:
        ValueError: for a template that is outside of this subset.
    """
    merged: list[dict[str, Any]] = []
    for message in messages:
        if merged and merged[-1]["Role"] == message["role"]:
            merged[-1]["Content"] += "\n\n" + message["content"]
        else:
            merged.append({"Role": message["role"], "Content": message["content"]})
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    prompt = merged[-1]["Content"] if merged and merged[-1]["Role"] == "user" else ""
    return evaluate(template, {"System": system, "Messages": merged, "Prompt": prompt, "Response": ""})


def evaluate(template: str, values: Mapping[str, Any]) -> str:
    """Runs a template.

    Known are fields, variables, strings, integers, ``if``, ``else if``, ``else``, ``range $i, $x := …``, ``eq``,
    ``gt``, ``not``, ``len`` and ``slice``; not the markers ``{{-`` and ``-}}``.

    Args:
        template: the text.
        values: the fields of the dot.

    Raises:
        ValueError: for anything else.

    Example:
        >>> evaluate('{{ if .System }}{{ .System }}: {{ end }}{{ "{{" }}', {"System": "Be kind"})
        'Be kind: {{'
    """
    body, _, end = _block(_parts(template))
    if end is not None:
        raise ValueError(f"template: {{{{ {end} }}}} closes nothing")
    output: list[str] = []
    _run(body, {"$": values}, values, output)
    return "".join(output)


def _parts(template: str) -> list[tuple[bool, str]]:
    """The texts and actions (True) of a template, the next one last."""
    parts, at = [], 0
    for found in _ACTION.finditer(template):
        parts += [(False, template[at : found.start()]), (True, found[1].strip())]
        at = found.end()
    parts.append((False, template[at:]))
    if any("{{" in text for action, text in parts if not action):
        raise ValueError("template: an action that does not end")
    return parts[::-1]


Node = tuple[Any, ...]


def _block(parts: list[tuple[bool, str]]) -> tuple[list[Node], list[tuple[bool, str]], str | None]:
    """Reads nodes up to an ``else`` or ``end``, and returns what ended them."""
    nodes: list[Node] = []
    while parts:
        action, text = parts.pop()
        word = text.split(" ", 1)[0]
        if not action:
            nodes.append(("text", text))
        elif word in ("end", "else"):
            return nodes, parts, text
        elif word == "if":
            nodes.append(_branches(text[3:], parts))
        elif word == "range":
            loop = _LOOP.fullmatch(text)
            if loop is None:
                raise ValueError(f"template: {{{{ {text} }}}} is not known; expected range $i, $x := …")
            body, _, end = _block(parts)
            if end != "end":
                raise ValueError(f"template: {{{{ {text} }}}} has no end of its own")
            nodes.append(("range", loop[1], loop[2], loop[3], body))
        elif (assigned := re.match(r"(\$\w+) :?= (.+)", text, re.DOTALL)) is not None:
            nodes.append(("set", assigned[1], assigned[2]))
        else:
            nodes.append(("write", text))
    return nodes, parts, None


def _branches(condition: str, parts: list[tuple[bool, str]]) -> Node:
    body, _, end = _block(parts)
    if end is None:
        raise ValueError(f"template: {{{{ if {condition} }}}} does not end")
    other: list[Node] = []
    if end.startswith("else if "):
        other = [_branches(end[8:], parts)]
    elif end == "else":
        other, _, last = _block(parts)
        if last != "end":
            raise ValueError(f"template: {{{{ if {condition} }}}} does not end")
    return ("if", condition, body, other)


def _run(nodes: Sequence[Node], variables: dict[str, Any], dot: Any, output: list[str]) -> None:
    for kind, *parts in nodes:
        if kind == "text":
            output.append(parts[0])
        elif kind == "write":
            output.append(str(_value(parts[0], variables, dot)))
        elif kind == "set":
            variables[parts[0]] = _value(parts[1], variables, dot)
        elif kind == "if":
            condition, body, other = parts
            _run(body if _value(condition, variables, dot) else other, variables, dot, output)
        else:
            index, element, values, body = parts
            for i, value in enumerate(_value(values, variables, dot)):
                variables |= {index: i, element: value}
                _run(body, variables, value, output)


def _value(expression: str, variables: Mapping[str, Any], dot: Any) -> Any:
    words, at = [], 0
    while at < len(expression):
        found = _WORD.match(expression, at)
        if found is None:
            raise ValueError(f"template: {expression!r} is not known")
        words.append(found[1])
        at = found.end()
    value = _call(words, variables, dot)
    if words:
        raise ValueError(f"template: {expression!r} is not known")
    return value


def _call(words: list[str], variables: Mapping[str, Any], dot: Any) -> Any:
    """A function with its arguments, or one value."""
    if not words or words[0] not in _FUNCTIONS:
        return _operand(words, variables, dot)
    function, arguments = _FUNCTIONS[words.pop(0)], []
    while words and words[0] != ")":
        arguments.append(_operand(words, variables, dot))
    return function(*arguments)


def _operand(words: list[str], variables: Mapping[str, Any], dot: Any) -> Any:
    word = words.pop(0) if words else ""
    if word == "(":
        value = _call(words, variables, dot)
        if not words or words.pop(0) != ")":
            raise ValueError("template: a parenthesis that does not close")
        return value
    if word.startswith('"'):
        return ast.literal_eval(word)
    if word.isdigit():
        return int(word)
    if word in ("true", "false"):
        return word == "true"
    start, *fields = word.split(".")
    if (start and start not in variables) or (not start and not fields):
        raise ValueError(f"template: {word!r} is not known")
    value = variables[start] if start else dot
    for field in fields:
        value = value[field]
    return value
