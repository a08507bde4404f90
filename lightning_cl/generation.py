"""Text that a model continues, greedily, several prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_cl.data.tokenizer import end_tokens, pad_token_id, start_tokens


@torch.no_grad()
def continue_tokens(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, pad_id: int, end_ids: Sequence[int] = ()
) -> list[list[int]]:
    """What a ``transformers`` model writes after each prompt, the most probable token at each place.

    The model is in evaluation mode meanwhile. Prompts are padded on the left, so that all of them end at one place.

    Args:
        model: with ``generate``.
        prompts: token ids, none empty.
        max_new_tokens: the longest answer.
        pad_id: what to pad with.
        end_ids: tokens that end an answer, beside those of the model's own ``generation_config``.

    Returns:
        for each prompt the new tokens, up to and without the one that ends the answer.
    """
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {*end_ids, *(configured if isinstance(configured, (list, tuple)) else [configured])} - {None}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            # Greedy, whatever the model's own configuration says.
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad_id,
            eos_token_id=sorted(ends) or None,
        )
    finally:
        for module, training in modes.items():
            module.training = training
    continued = []
    for row in written[:, longest:].tolist():
        stop = next((place for place, token in enumerate(row) if token in ends), len(row))
        continued.append(row[:stop])
    return continued


def prompt_tokens(tokenizer: Any, prompt: str, chat: bool = False) -> list[int]:
    """A prompt as the model is to see it.

    Args:
        tokenizer: of the model.
        prompt: a text to continue; with `chat`, what a user says.
        chat: write it as the user's turn of the tokenizer's chat template, with the beginning of the answer.
    """
    if chat:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    front = start_tokens(tokenizer)  # as the texts of training have it
    ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return ids if ids[:1] == front else front + ids


def answers(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """What a model writes after each prompt (:func:`continue_tokens`), as text."""
    written = continue_tokens(model, prompts, max_new_tokens, pad_token_id(tokenizer), end_tokens(tokenizer))
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
