"""A stand-in for a pretrained chat model: a folder with a tiny random Llama and a tokenizer with a chat template."""

from __future__ import annotations

import json

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lightning_cl import TrainedBPE

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "owls",
    "and",
    "hens",
    "sleep",
    "in",
    "the",
    "barn",
    "near",
    "some",
    "old",
    "river",
]


def sentence(seed: int, length: int = 9) -> str:
    return " ".join(WORDS[(seed * 7 + i * i + i * (seed % 5)) % len(WORDS)] for i in range(length)) + "."


def chats(count: int, start: int = 0) -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": sentence(i)},
                {"role": "assistant", "content": sentence(i + 1)},
                {"role": "user", "content": sentence(i + 2, 4)},
                {"role": "assistant", "content": sentence(i + 3, 5)},
            ]
        }
        for i in range(start, start + count)
    ]


def write_jsonl(path, records) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def save_stand_in(folder, seed: int = 0, **config) -> str:
    """Writes the folder; its tokenizer has ChatML's special tokens and template."""
    trained = TrainedBPE(300, str(folder / "bpe")).train([sentence(i) for i in range(30)])
    trained._tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )
    tokenizer.save_pretrained(folder)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings | config)).save_pretrained(folder)
    return str(folder)
