"""A tokenizer with the tokens of chat templates, and conversations that are read with it."""

from __future__ import annotations

import copy

from lightning_cl.data.text.chat import encode_chats
from lightning_cl.data.text.formats import as_document
from lightning_cl.data.text.record_counts import Tally
from lightning_cl.data.text.tokenizer import TrainedBPE

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|tool|>"]
HEAD = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content or '' }}"
TAIL = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def chat_tokenizer(folder):
    tokenizer = TrainedBPE(300, folder).train(["the cat sat on the mat"])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def one(messages, tokenizer, tally=None, **record):
    tally = Tally() if tally is None else tally
    document = as_document({"messages": messages, **record}, "chat.jsonl, line 1", tally)
    (tokens,) = encode_chats([document], tokenizer, tally)
    return tokens


def learnt(tokens, tokenizer):
    """The learnt runs, as texts."""
    runs, last = [], False
    for token, is_learnt in zip(tokens.ids.tolist(), tokens.mask.tolist(), strict=True):
        if is_learnt:
            runs = [*runs, []] if not last else runs
            runs[-1].append(token)
        last = is_learnt
    return [tokenizer.decode(run) for run in runs]


# ---------------------------------------------------------------------- tool calls
