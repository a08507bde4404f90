"""Ends of answers: the tokens at which a model that was trained on conversations stops writing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_cl.data.text.chat import has_template
from lightning_cl.data.text.tokenizer import end_tokens


def ends_of_answers(tokenizer: Any) -> list[int]:
    """The tokens that end an answer of a model: the end token, and those that end a turn in the chat template.

    A base model's tokenizer often has another end token than the template. If the template writes no end, the token of
    the next role, a user or a tool, ends the answer.
    """
    ends = set(end_tokens(tokenizer))
    if has_template(tokenizer):
        asked = [{"role": "user", "content": "."}]
        for role in (None, "user", "tool"):
            next_turn = [] if role is None else [{"role": role, "content": "."}]
            _, after = around(tokenizer, "ASSISTANTSWORDS", asked, "assistant", next_turn)
            ends.update(special_token(tokenizer, after))
    return sorted(ends)


def around(
    tokenizer: Any, words: str, before: Sequence[dict[str, str]], role: str, after: Sequence[dict[str, str]] = ()
) -> tuple[str, str]:
    """Returns the text that a template writes before and after a message's words; empty texts if it refuses them.

    Args:
        tokenizer: a tokenizer with a chat template.
        words: the content of the message, used as a marker.
        before: the messages before it.
        role: the role of the message.
        after: the messages after it.
    """
    said = [*before, {"role": role, "content": words}, *after]
    try:
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=role == "user")
    except Exception:  # a template is a program: it can raise anything
        return "", ""
    text_before, _, text_after = text.partition(words)
    return text_before, text_after.strip()


def special_token(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The special token that a text begins with, in a tuple; an empty tuple if it begins with none."""
    special = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    found = max((token for token in special if token.strip() and text.startswith(token)), key=len, default=None)
    return () if found is None else (tokenizer.convert_tokens_to_ids(found),)
