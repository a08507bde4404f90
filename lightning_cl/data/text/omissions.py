"""The parts of a conversation that a chat template leaves out, found by rendering it with and without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from lightning_cl.data.text.formats import Chat

CALLS = "tool calls"
ANSWERS = "answers of the assistant"
_TEXTS = {
    "system": "system texts",
    "developer": "system texts",
    "user": "questions of the user",
    "assistant": ANSWERS,
    "tool": "answers of tools",
    "function": "answers of tools",
}
_FIELDS = {
    "name": "names of speakers",
    "reasoning_content": "reasoning (reasoning_content)",
    "reasoning": "reasoning (reasoning)",
    "thinking": "reasoning (thinking)",
}
_SILENT = {"role", "content", "tool_calls", "tool_call_id", "id"}
"""Fields that need not be in the text: a template may leave ids out, and content and calls are checked apart."""

Render = Callable[[Chat], str | None]


class LeftOutError(ValueError):
    """A chat template leaves out the part of a conversation that is to be learnt."""


def check_left_out(chat: Chat, text: str, render: Render) -> set[str]:
    """Names the parts of a conversation that the template leaves out.

    Args:
        chat: the conversation.
        text: the whole conversation, rendered.
        render: renders a changed conversation; returns None if the template refuses it.

    Raises:
        LeftOutError: if all that the assistant says is left out, or a tool call or answer in a turn that is learnt.
    """
    found = list(omissions(chat, text, render))
    silent = {turn for turn, what in found if what == ANSWERS}
    spoken = {i for i, m in enumerate(chat.messages) if m["role"] == "assistant" and (m.get("content") or "").strip()}
    if spoken and spoken <= silent:
        # Some templates of models with images write content in parts only, and leave strings out.
        raise LeftOutError("nothing of what the assistant says is in the text that the chat template writes")
    for turn, what in found:
        if what in (CALLS, ANSWERS) and turn is not None and turn >= chat.first and turn not in chat.muted:
            raise LeftOutError(
                f"messages[{turn}]: the chat template leaves the {what} out, and the turn would be learnt without; give"
                " a template that writes them: TaskDataModule(chat_template=…)"
            )
    return {f"{what}, which the chat template leaves out" for _, what in found}


def omissions(chat: Chat, text: str, render: Render) -> Iterator[tuple[int | None, str]]:
    """Finds the parts of a conversation that are missing in its rendered text.

    Args:
        chat: the conversation.
        text: the whole conversation, rendered.
        render: renders a changed conversation; returns None if the template refuses it. It is not called for a content
            that is in the text literally.

    Yields:
        the index of a message (None for the conversation's tools), and the name of the missing part.
    """

    def is_the_same(changed: Chat) -> bool:
        return render(changed) == text

    def with_message(index: int, message: dict[str, Any]) -> Chat:
        return replace(chat, messages=(*chat.messages[:index], message, *chat.messages[index + 1 :]))

    if chat.tools and is_the_same(replace(chat, tools=None)):
        yield None, "tools"
    for index, message in enumerate(chat.messages):
        content = message.get("content")
        if isinstance(content, str) and content.strip():
            shown = content.rpartition("</think>")[2] if message["role"] == "assistant" else content
            # A template may write the content in another form. Then a changed content changes the text.
            marked = with_message(index, message | {"content": content + "MARKER"})
            if shown.strip() and shown.strip() not in text and is_the_same(marked):
                yield index, _TEXTS.get(message["role"], f"texts of {message['role']}")
            thought = content.partition("</think>")[0].rpartition("<think>")[2].strip() if shown != content else ""
            if thought and thought not in text:
                yield index, "thinking (<think>)"
        for key, value in message.items():
            if key in _SILENT or not value:
                continue
            if is_the_same(with_message(index, {k: v for k, v in message.items() if k != key})):
                yield index, _FIELDS.get(key, f"the field {key!r} of messages")
        yield from _calls(index, message, with_message, is_the_same)


def _calls(
    index: int,
    message: dict[str, Any],
    with_message: Callable[[int, dict[str, Any]], Chat],
    is_the_same: Callable[[Chat], bool],
) -> Iterator[tuple[int, str]]:
    calls: Sequence[Any] = message.get("tool_calls") or ()
    for number, call in enumerate(calls):
        others = [*calls[:number], *calls[number + 1 :]]
        # If no call is left, the key is removed, since an empty list can be an error in a template.
        without = {key: value for key, value in message.items() if key != "tool_calls"}
        if is_the_same(with_message(index, without | ({"tool_calls": others} if others else {}))):
            yield index, CALLS
            return
        function = call.get("function", call) if isinstance(call, dict) else {}
        if not function.get("arguments"):
            continue
        bare = function | {"arguments": {} if isinstance(function["arguments"], dict) else "{}"}
        changed = call | {"function": bare} if "function" in call else bare
        if is_the_same(with_message(index, message | {"tool_calls": [*calls[:number], changed, *calls[number + 1 :]]})):
            yield index, "arguments of tool calls"
