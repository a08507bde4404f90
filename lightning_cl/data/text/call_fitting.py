"""Tool calls as a chat template wants them, however a record gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lightning_cl.data.text.formats import Chat
from lightning_cl.data.text.tool_calls import prints_python, tells, with_json, with_objects


class CallFitting:
    """Gives a conversation the arguments and the empty words that a template can write.

    Most templates write arguments that are an object as JSON, or look inside. One that prints what it gets wants the
    JSON text: from an object it would print Python. A call without words has no content in one export, an empty one in
    another: a template may refuse one of them, or leave the calls out.

    Args:
        render: renders a conversation; None where the template refuses it.
    """

    def __init__(self, render: Callable[[Chat], str | None]) -> None:
        self._render = render
        self._wants_json: dict[str, bool] = {}  # by template

    def __call__(self, chat: Chat, template: str) -> Chat:
        """The conversation as the template wants it; one that it refuses in any form comes back for its reason.

        Raises:
            ValueError: for arguments that are no JSON.
        """
        silent = [
            i for i, message in enumerate(chat.messages) if message.get("tool_calls") and not message.get("content")
        ]
        if not silent:
            return self._with_arguments(chat, template) or replace(chat, messages=with_objects(chat.messages))
        without, empty = _without(chat, silent, "content"), _with_empty(chat, silent)
        readable: list[Chat] = []
        for variant in (empty, without) if "content" in chat.messages[silent[0]] else (without, empty):
            fitted = self._with_arguments(variant, template)
            if fitted is not None:
                readable.append(fitted)
                if self._shows_calls(fitted):
                    return fitted
        return readable[0] if readable else replace(empty, messages=with_objects(empty.messages))

    def _with_arguments(self, chat: Chat, template: str) -> Chat | None:
        """The conversation with arguments as objects or as JSON texts; None if the template refuses both."""
        objects = replace(chat, messages=with_objects(chat.messages))
        texts = replace(chat, messages=with_json(chat.messages))
        if template in self._wants_json:
            known = texts if self._wants_json[template] else objects
            return None if self._render(known) is None else known
        text = self._render(objects)
        if text is None:
            wants_json = True
            if self._render(texts) is None:
                return None
        else:
            wants_json = prints_python(objects.messages, text)
        chosen = texts if wants_json else objects
        if tells(objects.messages) and self._shows_calls(chosen):  # else another conversation decides
            self._wants_json[template] = wants_json
        return chosen

    def _shows_calls(self, chat: Chat) -> bool:
        """Tells if the template writes something for the calls of a conversation."""
        calling = [i for i, message in enumerate(chat.messages) if message.get("tool_calls")]
        return self._render(_without(chat, calling, "tool_calls")) != self._render(chat)


def _without(chat: Chat, turns: Sequence[int], field: str) -> Chat:
    """The conversation without a field in some turns."""
    messages = (
        {key: value for key, value in message.items() if key != field} if i in turns else message
        for i, message in enumerate(chat.messages)
    )
    return replace(chat, messages=tuple(messages))


def _with_empty(chat: Chat, turns: Sequence[int]) -> Chat:
    """The conversation with an empty text in some turns."""
    messages = (message | {"content": ""} if i in turns else message for i, message in enumerate(chat.messages))
    return replace(chat, messages=tuple(messages))
