"""Generation of text after several prompts at once: the most probable tokens, or drawn ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cl.data.text.answer_ends import ends_of_answers
from lightning_cl.data.text.tokenizer import pad_token_id, start_tokens


@dataclass(frozen=True)
class Written:
    """A text that a model wrote after a prompt.

    Args:
        ids: the new tokens, with the end token if there is one.
        ended: True if the last token is an end token; else the text was cut off.
        surprise: mean of −log p of these tokens under the model, at temperature 1, in nats.
    """

    ids: list[int]
    ended: bool
    surprise: float


def generator_of(module: nn.Module) -> Any:
    """The outermost submodule of a module that generates text: a ``transformers`` model; None if there is none."""
    for part in module.modules():
        if part is not module and callable(getattr(part, "generate", None)) and hasattr(part, "config"):
            return part
    return None


def continue_tokens(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, pad_id: int, end_ids: Sequence[int] = ()
) -> list[list[int]]:
    """Lets a ``transformers`` model write after each prompt, the most probable token at each position.

    The model is in evaluation mode during this. Prompts are padded on the left, so that all end at the same position.

    Args:
        model: a model with ``generate``.
        prompts: token ids of each prompt; none is empty.
        max_new_tokens: the most tokens of an answer.
        pad_id: the token to pad with.
        end_ids: tokens that end an answer, in addition to those of the model's own ``generation_config``.

    Returns:
        for each prompt the new tokens, without the end token.
    """
    ends = _ends(model, end_ids)
    rows = _generate(model, prompts, max_new_tokens, pad_id, ends)
    return [row[: _end(row, ends)] for row in rows]


def sample_tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    pad_id: int,
    seeds: Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    end_ids: Sequence[int] = (),
) -> list[Written]:
    """Lets a ``transformers`` model write after each prompt, drawn from its distribution.

    Each prompt has its own random numbers, one for each position. So its text does not depend on the other prompts or
    on the global random states, and these states are not changed.

    Args:
        model: a model with ``generate``.
        prompts: token ids of each prompt; none is empty.
        max_new_tokens: the most tokens of a text.
        pad_id: the token to pad with.
        seeds: a seed for each prompt.
        temperature: the logits are divided by it; above 0.
        top_p: draw among the fewest most probable tokens that have this probability together (Holtzman et al. 2020).
        end_ids: tokens that end a text, in addition to those of the model's own ``generation_config``.
    """
    ends = _ends(model, end_ids)
    drawing = _Drawing(seeds, max_new_tokens, temperature, top_p)
    rows = _generate(model, prompts, max_new_tokens, pad_id, ends, [drawing])
    written = []
    for row, surprises in zip(rows, torch.stack(drawing.surprises, 1).tolist(), strict=True):
        length = min(_end(row, ends) + 1, len(row))
        written.append(Written(row[:length], row[length - 1] in ends, sum(surprises[:length]) / length))
    return written


class _Drawing:
    """A logits processor that draws one token and excludes all others, so that a greedy search takes it."""

    def __init__(self, seeds: Sequence[int], steps: int, temperature: float, top_p: float) -> None:
        numbers = [torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.numbers = torch.stack(numbers)
        self.temperature, self.top_p = temperature, top_p
        self.surprises: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # Sums along a row have no deterministic kernel on CUDA.
        device = "cpu" if torch.are_deterministic_algorithms_enabled() else scores.device
        numbers = self.numbers[:, len(self.surprises)].to(device)
        tokens = draw(scores.to(device), numbers, self.temperature, self.top_p).to(scores.device)
        self.surprises.append(-scores.log_softmax(-1).gather(1, tokens[:, None])[:, 0].cpu())
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def draw(logits: Tensor, numbers: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Draws one token for each row of logits, by inverting the distribution function.

    Args:
        logits: ``[rows, vocabulary]``.
        numbers: ``[rows]``, uniform in [0, 1).
        temperature: above 0.
        top_p: draw among the fewest tokens that have this probability together; 1: among all tokens.

    Returns:
        int64 ``[rows]``.
    """
    p = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        p = p.masked_fill(~_most_probable(p, top_p), 0.0)
    # Tokens stay in the order of the vocabulary, since sorting nearly equal probabilities depends on rounding.
    reached = p.cumsum(-1)
    total = reached[:, -1:]
    target = torch.minimum(
        numbers[:, None].to(reached) * total, total * (1 - 1e-6)
    )  # so it never is beyond the last possible token
    return torch.searchsorted(reached, target, right=True)[:, 0]


def _most_probable(p: Tensor, top_p: float) -> Tensor:
    """Marks the fewest tokens that have the probability `top_p` together: bool ``[rows, vocabulary]``."""
    for count in (1024, p.shape[-1]):  # 1024 are nearly always enough, and take a tenth of the time
        largest, order = p.topk(min(count, p.shape[-1]))
        reached = largest.cumsum(-1)
        if bool((reached[:, -1] >= top_p).all()):
            break
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, reached - largest < top_p)


@torch.no_grad()
def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    pad_id: int,
    ends: set[int],
    processors: Sequence[Any] = (),
) -> list[list[int]]:
    """The most probable new tokens of all rows after `processors`, including the tokens after an end token."""
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
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
            logits_processor=list(processors),
        )
    finally:
        for module, training in modes.items():
            module.training = training
    rows: list[list[int]] = written[:, longest:].tolist()
    return rows


def _ends(model: Any, end_ids: Sequence[int]) -> set[int]:
    """The tokens that end an answer."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {*end_ids, *(configured if isinstance(configured, (list, tuple)) else [configured])} - {None}


def _end(row: list[int], ends: set[int]) -> int:
    """The position of the first end token; the length if there is none."""
    return next((position for position, token in enumerate(row) if token in ends), len(row))


def prompt_tokens(tokenizer: Any, prompt: str, chat: bool = False) -> list[int]:
    """The tokens of a prompt in the form that the model was trained with.

    Args:
        tokenizer: the model's tokenizer.
        prompt: a text to continue; with `chat`, the message of a user.
        chat: write the prompt as the user's turn in the tokenizer's chat template, with the beginning of the answer.
    """
    if chat:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    front = start_tokens(tokenizer)  # as the texts of training have it
    ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return ids if ids[: len(front)] == front else front + ids


def answers(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """Returns the text that a model writes after each prompt (:func:`continue_tokens`)."""
    written = continue_tokens(model, prompts, max_new_tokens, pad_token_id(tokenizer), ends_of_answers(tokenizer))
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
