"""Conversations as tokens: applies the tokenizer's chat template, and marks the assistant's tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_cl.data.text.call_fitting import CallFitting
from lightning_cl.data.text.formats import Chat
from lightning_cl.data.text.omissions import LeftOutError, check_left_out
from lightning_cl.data.text.record_counts import Tally
from lightning_cl.data.text.tokenizer import end_tokens
from lightning_cl.data.text.tool_answers import without_answers
from lightning_cl.data.text.tool_calls import has_calls

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NO_END = "an end of the answers, which the chat template marks with white space alone, or not at all"
_UNMARKED_END = "an end of the answers, which the chat template leaves out of {% generation %}"
Span = tuple[int, int]


class Spans(NamedTuple):
    """The learnt parts of a rendered conversation."""

    learnt: list[Span]
    """Start and end of each part, in characters."""
    open_end: bool
    """True if nothing ends the last turn; then the end token is appended and learnt."""
    endless: bool
    """True if a turn is learnt without an end."""


class Tokens(NamedTuple):
    """Token ids, and a mask of those that are to be learnt."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]


def has_template(tokenizer: Any) -> bool:
    """Returns True if a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode_chats(chats: Sequence[Chat], tokenizer: Any, tally: Tally) -> list[Tokens | None]:
    """Encodes conversations exactly as ``tokenizer.apply_chat_template`` writes them, with their loss masks.

    Loss is on the assistant's turns from ``Chat.first`` on, except those in ``Chat.muted``. A turn is all that follows
    the prompt of ``add_generation_prompt=True``, with its end-of-turn token. The header of a turn that is in this
    prompt has no loss, and neither has white space after the end of a turn. If a template writes no end, the role of
    the next turn ends an answer and is learnt; after the last turn, the end token is appended. Templates with
    ``{% generation %}`` mark the assistant's tokens themselves. For other templates, the turns are found in the
    rendered text (:func:`assistant_spans`).

    Args:
        chats: the conversations.
        tokenizer: a ``transformers`` tokenizer; a fast one if the template has no ``{% generation %}``.
        tally: counts the conversations that the template refuses, and the parts that it leaves out of others.

    Returns:
        for each conversation its tokens; None if it was refused.

    Raises:
        ValueError: if there is no template, if it is not valid Jinja or refuses a conversation, or if the tokenizer is
            a slow one.
    """
    if not has_template(tokenizer):
        raise ValueError(
            f"{chats[0].where}: a conversation needs a chat template, and the tokenizer has none: give the tokenizer of"
            " a chat model, or TaskDataModule(chat_template=…)"
        )
    from jinja2 import TemplateSyntaxError

    encoder = _Encoder(tokenizer)
    results: list[Tokens | None] = []
    rendered: list[tuple[int, str, Spans]] = []
    for chat in chats:
        try:
            chat = encoder.fitted(chat)
            text = encoder.render(chat, chat.messages)
            missing = check_left_out(chat, text, encoder.try_render)
            if encoder.marks_itself(chat):
                marked = encoder.marked(chat)
                missing |= {_UNMARKED_END} if encoder.has_bare_answer(chat, marked) else set()
                results.append(marked)
            else:
                spans = encoder.spans(chat, text)
                missing |= {_NO_END} if spans.endless else set()
                rendered.append((len(results), text, spans))
                results.append(None)
            tally.leave_out(missing)
        except TemplateSyntaxError as error:  # the fault is not in a record
            raise ValueError(
                f"chat_template: the tokenizer's chat template is not valid Jinja, line {error.lineno}: {error.message}"
            ) from error
        except LeftOutError as error:
            tally.refuse(f"{chat.where}: {error}")
            results.append(None)
        except Exception as error:  # a template is a program: it can raise anything
            tally.refuse(f"{chat.where}: the chat template refuses the conversation: {type(error).__name__}: {error}")
            results.append(None)
    if rendered and not tokenizer.is_fast:
        raise ValueError(
            f"{chats[0].where}: to find the assistant's tokens in a conversation needs a fast tokenizer, or a chat"
            " template with {% generation %} … {% endgeneration %} around what the assistant says"
        )
    if rendered:
        # apply_chat_template makes the same call. The template writes the start token, if there is one.
        encoded = tokenizer(
            [text for _, text, _ in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        for (position, _, spans), ids, offsets in zip(
            rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            mask = _overlaps(np.asarray(offsets).reshape(-1, 2), spans.learnt)
            end = end_tokens(tokenizer) if spans.open_end else []
            results[position] = Tokens(
                np.asarray([*ids, *end], np.int32), np.concatenate([mask, np.ones(len(end), bool)])
            )
    return results


def assistant_spans(chat: Chat, tokenizer: Any) -> tuple[str, list[Span]]:
    """The rendered conversation, and ``(start, end)`` of the assistant's turns in it, in characters.

    A turn starts where the generation prompt of the messages before it ends, and it ends where the messages up to it
    end. If a template has no generation prompt, the messages before a turn are the prompt, and the model has to write
    the header.

    This needs renderings that are prefixes of the whole. It fails for templates that write earlier turns differently
    from the last (for example without thinking), or that refuse parts of a conversation. Then the turn's content is
    replaced by a marker, and the text before and after the marker gives start and end of the turn.

    Raises:
        ValueError: if a turn cannot be found in either way.
    """
    encoder = _Encoder(tokenizer)
    chat = encoder.fitted(chat)
    text = encoder.render(chat, chat.messages)
    return text, encoder.spans(chat, text).learnt


class _Encoder:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
        self.special = tuple(sorted(token for token in added if token.strip()))
        self._calls = CallFitting(self.try_render)
        self._ends: dict[tuple[str, bool], bool] = {}  # by template, and for the last turn or an earlier one

    def fitted(self, chat: Chat) -> Chat:
        """The conversation with its tool calls in the form that the template needs (:class:`CallFitting`)."""
        return self._calls(chat, self._template(chat)) if has_calls(chat.messages) else chat

    def render(self, chat: Chat, messages: Sequence[dict[str, Any]], prompt: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tools=self._tools(chat), tokenize=False, add_generation_prompt=prompt
        )
        return text

    def marks_itself(self, chat: Chat) -> bool:
        return _GENERATION.search(self._template(chat)) is not None

    def marked(self, chat: Chat) -> Tokens:
        """Tokens with the mask of ``{% generation %}``."""
        ids, mask_of_all = self._marked(chat, chat.messages)
        mask = mask_of_all.copy()
        if any(message["role"] == "assistant" for message in chat.messages[: chat.first]):
            # The runs of marked tokens in the prompt alone are the first runs in the whole conversation.
            mask &= _run_starts(mask).cumsum() > self._runs(chat, chat.first)
        for turn in sorted(chat.muted):
            runs = _run_starts(mask_of_all).cumsum()
            mask &= ~((runs > self._runs(chat, turn)) & (runs <= self._runs(chat, turn + 1)))
        return Tokens(ids, mask)

    def _runs(self, chat: Chat, count: int) -> int:
        """Counts the runs of marked tokens that the first messages of a conversation have."""
        if all(message["role"] != "assistant" for message in chat.messages[:count]):
            return 0
        return int(_run_starts(self._marked(chat, chat.messages[:count]).mask).sum())

    def _marked(self, chat: Chat, messages: Sequence[dict[str, Any]]) -> Tokens:
        encoded = self.tokenizer.apply_chat_template(
            list(messages),
            tools=self._tools(chat),
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        return Tokens(np.asarray(encoded["input_ids"], np.int32), np.asarray(encoded["assistant_masks"], bool))

    def has_bare_answer(self, chat: Chat, tokens: Tokens) -> bool:
        """Tells if a learnt run ends with the words of an answer; a model that learns no end never stops writing."""
        starts, ends = _run_starts(tokens.mask), _run_starts(tokens.mask[::-1])[::-1]
        words = [(message.get("content") or "").rstrip() for message in chat.messages if message["role"] == "assistant"]
        last = tuple(text for text in words if text)
        for start, end in zip(np.flatnonzero(starts), np.flatnonzero(ends), strict=True):
            said = self.tokenizer.decode(tokens.ids[start : end + 1].tolist()).rstrip()
            if said.endswith(last) and not said.endswith(self.special):
                return True
        return False

    def spans(self, chat: Chat, text: str) -> Spans:
        """Finds the learnt parts of a rendered conversation: the assistant's turns, each with its end."""
        learnt, open_end, endless = [], False, False
        for turn, message in enumerate(chat.messages):
            if message["role"] != "assistant" or turn < chat.first or turn in chat.muted:
                continue
            start, end = self._by_prefix(chat, text, turn) or self._by_marker(chat, text, turn)
            if not self._is_ended(chat, turn, text[start:end]):
                if text[start:end] != text[start:end].rstrip():
                    endless = True  # white space is no end for a model that writes paragraphs
                elif turn + 1 < len(chat.messages):
                    header = self._end_by_next(chat, text, turn, end)
                    endless |= header == 0
                    end += header
                else:
                    open_end = bool(end_tokens(self.tokenizer))
                    endless |= not open_end
            learnt += without_answers(chat, turn, (start, end), text, self.try_render, self.special)
        return Spans(learnt, open_end, endless)

    def _is_ended(self, chat: Chat, turn: int, said: str) -> bool:
        """Tells if something follows the assistant's words in its turn: a token, or text, that ends it."""
        message = chat.messages[turn]
        said, words = said.rstrip(), (message.get("content") or "").rpartition("</think>")[2].strip()
        if not said.endswith(self.special) and (not words or said.endswith(words)):
            return False
        # The token after a call or a thinking may belong to that, and not end the turn (GLM). A short turn tells it.
        is_plain = words == (message.get("content") or "").strip() and not message.get("tool_calls")
        return is_plain or self._has_ends(chat, turn)

    def _has_ends(self, chat: Chat, turn: int) -> bool:
        """Tells if the template writes an end after a turn of one word, as the last turn or before the user's."""
        is_last = turn + 1 == len(chat.messages)
        key = (self._template(chat), is_last)
        if key not in self._ends:
            word = {"role": "assistant", "content": "MARKER"}
            after = () if is_last else ({"role": "user", "content": "Next"},)
            short = replace(chat, messages=(*chat.messages[:turn], word, *after))
            text = self.try_render(short)
            if text is None:
                return True
            try:
                start, end = self._by_prefix(short, text, turn) or self._by_marker(short, text, turn)
            except ValueError:
                return True
            self._ends[key] = not text[start:end].rstrip().endswith("MARKER")
        return self._ends[key]

    def _end_by_next(self, chat: Chat, text: str, turn: int, end: int) -> int:
        """The length of the beginning of the next turn's header, which ends a turn if the template writes no end.

        A model of this kind (GLM) stops by writing the role of the next speaker.
        """
        marker = "MARKER"
        while marker in text:
            marker += "X"
        marked = [*chat.messages]
        marked[turn + 1] = {**marked[turn + 1], "content": marker}
        whole = self._try(chat, marked) or ""
        if whole[:end] != text[:end] or marker not in whole:
            return 0
        header = whole[end : whole.index(marker)]
        name = header.lstrip()
        token = max((token for token in self.special if name.startswith(token)), key=len, default="")
        token = token or (name.split()[0] if name else "")
        return header.index(token) + len(token) if token else 0

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
            after = after.lstrip()  # without words, there is no white space between words and tool calls
        prompt = self._prompt(chat, text, turn)
        start = len(text) + 1
        if prompt is not None and text.startswith(prompt):
            start = len(prompt)  # all that the prompt lacks is learnt, such as an empty thinking before the words
        elif text.startswith(asked := before[: self._prompt_end(chat, marked, turn, marker, before)]):
            start = len(asked)
        elif prompt is not None:
            # The prompt begins a thinking that the turn writes differently. Their common beginning is the header.
            start = next((i for i, pair in enumerate(zip(prompt, text, strict=False)) if pair[0] != pair[1]), start)
        end = len(text) - len(after) + self._ending(chat, marked[: turn + 1], marker, after)
        if not found or not text.endswith(after) or start > end:
            raise ValueError(
                f"messages[{turn}], a turn of the assistant, cannot be found in the rendered text; use a template with"
                " {% generation %} … {% endgeneration %} around what the assistant says"
            )
        return start, end

    def _prompt_end(self, chat: Chat, marked: Sequence[dict[str, Any]], turn: int, marker: str, before: str) -> int:
        """Finds the end of the generation prompt in `before`, the text before the words of a turn.

        The earlier messages may be written differently when they are a conversation of their own. But the text after
        the words of the last of them, which get a marker too, is the same.
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
        """Measures the text between the marker and the end of its turn, in a conversation that ends with this turn."""
        _, found, alone = (self._try(chat, marked) or "").partition(marker)
        for rest in (alone, alone.lstrip()):
            end = self._turn_end(rest)
            if found and after.startswith(rest[:end]):
                return end
        token = next((token for token in self.special if after.lstrip().startswith(token)), "")
        return after.index(token) + len(token)

    def _prompt(self, chat: Chat, text: str, turn: int) -> str | None:
        """The messages before a turn, rendered with the generation prompt if the template has one.

        The result is None if the text does not start with those messages. It is also None if the template has a prompt
        but not here: some have it after a user's turn only. The header would then count as the assistant's words.
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
        """Finds the end of a turn's text; white space after an end-of-turn token belongs to the next turn."""
        stripped = text.rstrip()
        return len(stripped) if stripped.endswith(self.special) else len(text)

    def try_render(self, chat: Chat) -> str | None:
        """Renders the whole conversation; returns None if the template refuses it."""
        return self._try(chat, chat.messages)

    def _try(self, chat: Chat, messages: Sequence[dict[str, Any]], prompt: bool = False) -> str | None:
        try:
            return self.render(chat, messages, prompt)
        except Exception:  # some templates accept whole conversations only
            return None

    def _template(self, chat: Chat) -> str:
        template: str = self.tokenizer.get_chat_template(tools=self._tools(chat))
        return template

    @staticmethod
    def _tools(chat: Chat) -> list[Any] | None:
        return list(chat.tools) if chat.tools else None


def _overlaps(offsets: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Marks the tokens that have a character in one of the spans."""
    mask = np.zeros(len(offsets), bool)
    for start, end in spans:
        mask |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
    return mask


def _run_starts(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return mask & ~np.concatenate(([False], mask[:-1]))
