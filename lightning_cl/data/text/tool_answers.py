"""Answers of tools that a chat template writes inside the turn that called them: they bear no loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lightning_cl.data.text.formats import Chat

Span = tuple[int, int]
Render = Callable[[Chat], str | None]
_TOOLS = ("tool", "function")


def without_answers(chat: Chat, turn: int, span: Span, text: str, render: Render, special: Sequence[str]) -> list[Span]:
    """Removes the answers of tools from the span of the turn that called them (Gemma 4 writes both as one turn).

    Two changed conversations are rendered. One has another text as the answer, and shows the answer's first character.
    The other is without the answers, and shows everything that the template writes for them.

    Args:
        chat: the conversation.
        turn: index of the assistant's message.
        span: the message's start and end in `text`, in characters.
        text: the whole conversation, rendered.
        render: renders a changed conversation; returns None if the template refuses it.
        special: tokens that are never cut in the middle.

    Returns:
        the parts of the span that the assistant wrote.
    """
    start, end = span
    after = turn + 1
    while after < len(chat.messages) and chat.messages[after]["role"] in _TOOLS:
        after += 1
    if after == turn + 1:
        return [span]
    first, _ = _position(chat, turn + 1, text, render)
    if first > end:
        return [span]  # the answer is a turn of its own, as in nearly all templates
    alone = render(replace(chat, messages=(*chat.messages[: turn + 1], *chat.messages[after:]))) or ""
    begin = min(first, _common(text, alone))
    for token in special:
        found = text.rfind(token, max(0, begin - len(token) + 1), begin + len(token) - 1)
        begin = found if 0 <= found < begin < found + len(token) else begin
    stop = len(text) - min(_common(text[::-1], alone[::-1]), max(0, len(alone) - begin))
    words = (chat.messages[turn].get("content") or "").strip()
    if words:  # these follow the answers, and a template may write them differently without answers
        _, last = _position(chat, after - 1, text, render)
        said = text.find(words, last, end)
        stop = stop if said == -1 else min(stop, said)
    return [(a, b) for a, b in ((start, min(begin, end)), (max(stop, begin), end)) if a < b]


def _position(chat: Chat, index: int, text: str, render: Render) -> Span:
    """Finds start and end of a message's content with a marker whose first and last characters differ from it."""
    content = str(chat.messages[index].get("content")).strip()
    mark = "".join(next(c for c in "MZ" if c != other) for other in (content[:1], content[-1:]))
    marked = (*chat.messages[:index], chat.messages[index] | {"content": mark}, *chat.messages[index + 1 :])
    other = render(replace(chat, messages=marked)) or text
    return _common(text, other), len(text) - _common(text[::-1], other[::-1])


def _common(one: str, other: str) -> int:
    """The length of the common beginning of two texts."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
