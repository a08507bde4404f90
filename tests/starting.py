"""Tokenizers that put a start token in front of a text, as Llama's do."""

from __future__ import annotations

from tokenizers.processors import TemplateProcessing


def puts_in_front(tokenizer, token):
    """Makes a fast tokenizer put `token` in front of every text."""
    tokenizer.bos_token = token
    identifier = tokenizer.convert_tokens_to_ids(token)
    post = TemplateProcessing(f"{token} $A", special_tokens=[(token, identifier)])
    tokenizer.backend_tokenizer.post_processor = post
    return tokenizer
