"""Conversations as tokens: the tokenizer's chat template, and which of its tokens are the assistant's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_cl.data.formats import Chat
from lightning_cl.data.tally import Tally

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


class Tokens(NamedTuple):
    """Token ids, and which of them are to be learnt."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode_chats(chats: Sequence[Chat], tokenizer: Any, tally: Tally) -> list[Tokens | None]:
    """Conversations as tokens, exactly as ``tokenizer.apply_chat_template`` writes them, with their loss masks.

    Loss is on the assistant's turns with their end-of-turn token, from ``Chat.first`` on: on all that follows the
    prompt of ``add_generation_prompt=True``. Without loss are the headers of turns that this prompt has, and white
    space after the end of a turn. Templates with ``{% generation %}`` say themselves what is the assistant's. For
    others the turns are found in the rendered text (:func:`assistant_spans`).

    Args:
        chats: the conversations.
        tokenizer: a ``transformers`` tokenizer; a fast one, where the template has no ``{% generation %}``.
        tally: counts the conversations that the template refuses.

    Returns:
        for each conversation its tokens; None if it was refused.

    Raises:
        ValueError: if there is no template, or it is no valid Jinja; if the tokenizer is a slow one, or the template
            refuses a conversation.
    """
    if not has_template(tokenizer):
        raise ValueError(
            f"{chats[0].where}: a conversation needs a chat template, and the tokenizer has none: give the tokenizer of"
            " a chat model, or TaskDataModule(chat_template=…)"
        )
    from jinja2 import TemplateSyntaxError

    encoder = _Encoder(tokenizer)
    results: list[Tokens | None] = []
    rendered: list[tuple[int, str, list[Span]]] = []
    for chat in chats:
        try:
            text = encoder.render(chat, chat.messages)
            _check_said(chat, text)
            if encoder.marks_itself(chat):
                results.append(encoder.marked(chat))
            else:
                rendered.append((len(results), text, encoder.spans(chat, text)))
                results.append(None)
        except TemplateSyntaxError as error:  # no record's fault
            raise ValueError(
                f"chat_template: the tokenizer's chat template is not valid Jinja, line {error.lineno}: {error.message}"
            ) from error
        except Exception as error:  # a template is a program: it can raise anything
            tally.refuse(f"{chat.where}: the chat template refuses the conversation: {type(error).__name__}: {error}")
            results.append(None)
    if rendered and not tokenizer.is_fast:
        raise ValueError(
            f"{chats[0].where}: to find the assistant's tokens in a conversation needs a fast tokenizer, or a chat"
            " template with {% generation %} … {% endgeneration %} around what the assistant says"
        )
    if rendered:
        # The same call that apply_chat_template makes: the template writes the start token, if there is one.
        encoded = tokenizer(
            [text for _, text, _ in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        for (place, _, spans), ids, offsets in zip(
            rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            results[place] = Tokens(np.asarray(ids, np.int32), _overlaps(np.asarray(offsets).reshape(-1, 2), spans))
    return results


def assistant_spans(chat: Chat, tokenizer: Any) -> tuple[str, list[Span]]:
    """The rendered conversation, and where in it the assistant's turns are, as ``(start, end)`` in characters.

    A turn starts where the generation prompt of the messages before it ends, and ends where the messages up to it end.
    Where a template knows no generation prompt, the messages are the prompt, and a header is the model's to write.
    That needs renderings that are prefixes of the whole. Templates that treat earlier turns in another way than the
    last (thinking that is dropped), or that refuse parts of a conversation, fail that; then the turn's content is
    replaced by a marker: what stands before and after the marker stands around the turn.

    Raises:
        ValueError: if a turn cannot be found in either way.
    """
    encoder = _Encoder(tokenizer)
    text = encoder.render(chat, chat.messages)
    return text, encoder.spans(chat, text)


class _Encoder:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
        self.special = tuple(sorted(token for token in added if token.strip()))

    def render(self, chat: Chat, messages: Sequence[dict[str, Any]], prompt: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tools=self._tools(chat), tokenize=False, add_generation_prompt=prompt
        )
        return text

    def marks_itself(self, chat: Chat) -> bool:
        return _GENERATION.search(self._template(chat)) is not None

    def marked(self, chat: Chat) -> Tokens:
        """Tokens with the mask of ``{% generation %}``."""
        ids, mask = self._marked(chat, chat.messages)
        if any(message["role"] == "assistant" for message in chat.messages[: chat.first]):
            # The runs of marked tokens in the prompt alone are the first ones in the whole.
            before = _run_starts(self._marked(chat, chat.messages[: chat.first]).mask).sum()
            mask &= _run_starts(mask).cumsum() > before
        return Tokens(ids, mask)

    def _marked(self, chat: Chat, messages: Sequence[dict[str, Any]]) -> Tokens:
        encoded = self.tokenizer.apply_chat_template(
            list(messages),
            tools=self._tools(chat),
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        return Tokens(np.asarray(encoded["input_ids"], np.int32), np.asarray(encoded["assistant_masks"], bool))

    def spans(self, chat: Chat, text: str) -> list[Span]:
        return [
            self._by_prefix(chat, text, turn) or self._by_marker(chat, text, turn)
            for turn, message in enumerate(chat.messages)
            if message["role"] == "assistant" and turn >= chat.first
        ]

    def _by_prefix(self, chat: Chat, text: str, turn: int) -> Span | None:
        prompt = self._prompt(chat, text, turn)
        whole = text if turn + 1 == len(chat.messages) else self._try(chat, chat.messages[: turn + 1])
        if prompt is None or whole is None or not text.startswith(whole) or not whole.startswith(prompt):
            return None
        return len(prompt), len(prompt) + self._turn_end(whole[len(prompt) :])

    def _by_marker(self, chat: Chat, text: str, turn: int) -> Span:
        marker = "MARKER"
        while marker in text:
            marker += "X"
        marked = [*chat.messages]
        marked[turn] = {**marked[turn], "content": marker}
        before, found, after = (self._try(chat, marked) or "").partition(marker)
        if not text.endswith(after):
            after = after.lstrip()  # white space between words and tool calls, where there are no words
        prompt = self._prompt(chat, text, turn)
        start = len(text) + 1
        if prompt is not None and text.startswith(prompt):
            start = len(prompt)  # what the prompt does not give has to be learnt, as an empty thinking before the words
        elif text.startswith(asked := before[: self._prompt_end(chat, marked, turn, marker, before)]):
            start = len(asked)
        elif prompt is not None:
            # The prompt opens a thinking that the turn goes on with in another way: what both have is the header.
            start = next((i for i, pair in enumerate(zip(prompt, text, strict=False)) if pair[0] != pair[1]), start)
        end = len(text) - len(after) + self._ending(chat, marked[: turn + 1], marker, after)
        if not found or not text.endswith(after) or start > end:
            raise ValueError(
                f"messages[{turn}], a turn of the assistant, cannot be found in the rendered text; use a template with"
                " {% generation %} … {% endgeneration %} around what the assistant says"
            )
        return start, end

    def _prompt_end(self, chat: Chat, marked: Sequence[dict[str, Any]], turn: int, marker: str, before: str) -> int:
        """Where in `before`, which is all that stands before the words of a turn, its generation prompt ends.

        The messages before it are written in another way where they are a conversation of their own. But what follows
        the words of the last of them, marked too, is the same.
        """
        if turn == 0:
            return len(before)
        asked = "ASKED" + marker
        both = [*marked]
        both[turn - 1] = {**both[turn - 1], "content": asked}
        between, found, _ = (self._try(chat, both) or "").partition(asked)[2].partition(marker)
        prompt = (self._try(chat, both[:turn], prompt=True) or "").partition(asked)[2]
        if self._can_prompt(chat) and prompt == (self._try(chat, both[:turn]) or "").partition(asked)[2]:
            return len(before)
        own = between[len(prompt) :]
        fits = found and between.startswith(prompt) and before.endswith(own)
        return len(before) - len(own) if fits else len(before)

    def _ending(self, chat: Chat, marked: Sequence[dict[str, Any]], marker: str, after: str) -> int:
        """How much of what follows the marker ends its turn: what follows it where the conversation ends there."""
        _, found, alone = (self._try(chat, marked) or "").partition(marker)
        for rest in (alone, alone.lstrip()):
            end = self._turn_end(rest)
            if found and after.startswith(rest[:end]):
                return end
        token = next((token for token in self.special if after.lstrip().startswith(token)), "")
        return after.index(token) + len(token)

    def _prompt(self, chat: Chat, text: str, turn: int) -> str | None:
        """The messages before a turn with the generation prompt, if the template knows one.

        None if there is no prompt here (some templates prompt after a user's turn only: the header would be taken for
        the assistant's words), or if the text does not start with those messages.
        """
        if turn == 0:
            return None
        before = self._try(chat, chat.messages[:turn])
        prompt = self._try(chat, chat.messages[:turn], prompt=True)
        if before is None or prompt is None or not text.startswith(before) or not prompt.startswith(before):
            return None
        return None if prompt == before and self._can_prompt(chat) else prompt

    def _can_prompt(self, chat: Chat) -> bool:
        return "add_generation_prompt" in self._template(chat)

    def _turn_end(self, text: str) -> int:
        """Where a turn's text ends: white space after an end-of-turn token belongs to the next turn."""
        stripped = text.rstrip()
        return len(stripped) if stripped.endswith(self.special) else len(text)

    def _try(self, chat: Chat, messages: Sequence[dict[str, Any]], prompt: bool = False) -> str | None:
        try:
            return self.render(chat, messages, prompt)
        except Exception:  # some templates take whole conversations only
            return None

    def _template(self, chat: Chat) -> str:
        template: str = self.tokenizer.get_chat_template(tools=self._tools(chat))
        return template

    @staticmethod
    def _tools(chat: Chat) -> list[Any] | None:
        return list(chat.tools) if chat.tools else None


def _check_said(chat: Chat, text: str) -> None:
    """Templates for content in parts (of models that also see) leave strings out without a word."""
    said = [(message.get("content") or "").strip() for message in chat.messages if message["role"] == "assistant"]
    if any(said) and not any(words and words.splitlines()[-1] in text for words in said):
        raise ValueError("nothing of what the assistant says is in the rendered text")


def _overlaps(offsets: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Which tokens have a character in one of the spans."""
    mask = np.zeros(len(offsets), bool)
    for start, end in spans:
        mask |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
    return mask


def _run_starts(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return mask & ~np.concatenate(([False], mask[:-1]))
