"""Tool calls in the form that a chat template needs, whatever form a record has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lightning_cl.data.text.formats import Chat
from lightning_cl.data.text.tool_calls import prints_python, tells, with_json, with_objects


class CallFitting:
    """Gives a conversation's arguments and empty contents the form that a template can write.

    Most templates take arguments as an object, which they write as JSON or read fields of. Some print arguments as they
    are; these need the JSON text, since an object would be printed as Python. A call without words has no content in
    some exports, and an empty content in others. A template may refuse one of the two, or leave the calls out.

    Args:
        render: renders a conversation; returns None if the template refuses it.
    """

    def __init__(self, render: Callable[[Chat], str | None]) -> None:
        self._render = render
        self._wants_json: dict[str, bool] = {}  # by template

    def __call__(self, chat: Chat, template: str) -> Chat:
        """Returns the conversation in the form that the template needs.

        If the template refuses all forms, one of them is returned, so that rendering it raises the template's error.

        Raises:
            ValueError: for arguments that are not valid JSON.
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
        # The form is remembered only if this conversation shows which one the template needs.
        if tells(objects.messages) and self._shows_calls(chosen):
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
