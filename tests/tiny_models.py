"""Tiny models with nothing trivial in them, and tokenizers of several families, for files that other programs read."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "I'm sure they're here; we'll see 1 12 123 1234 12345678 times, it's HE'LL.",
    "def f(x):\n    if x > 0:\n\t\treturn x**2\n\n\n    return -x\r\n",
    "Ärger über naïve Straßenbahnen — “quoted” 東京で日本語 Привет мир 😀",
]
SIZE = 480


def split(pattern):
    """Words by a pattern, as Llama 3 and Qwen cut them."""
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)


def byte_bpe(cut=None, ignore_merges=False, start=None, normalizer=None, extra=()):
    """A byte-level BPE tokenizer.

    Args:
        cut: the pre-tokenizer; GPT-2's if None.
        ignore_merges: take whole words from the vocabulary.
        start: a token in front of each text.
        normalizer: what is done before.
        extra: more added tokens.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *([start] if start else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=440,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens(["<think>", *extra])
    if start:
        ids = [(start, tokenizer.token_to_id(start))]
        tokenizer.post_processor = processors.TemplateProcessing(f"{start} $A", special_tokens=ids)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | ({"bos_token": start} if start else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tiny(kind="llama", **settings):
    """A model of two layers whose norms, biases and weights are all random."""
    given = {
        "vocab_size": SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(given | settings))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.25)
    return model
