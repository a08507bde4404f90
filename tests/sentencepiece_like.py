"""Tokenizers that put a space in front of every text, as Llama 2's and Mistral's do."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPACE = "▁"
KINDS = ("prepend", "first", "always")


def sentencepiece_like(kind: str, words: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A vocabulary of the bytes, the letters of some words, and those words with and without the space in front.

    Args:
        kind: ``prepend`` (a normalizer, as transformers 4 converted Llama 2) or the scheme of ``Metaspace``.
        words: separated by spaces.
        template: chat template.
    """
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    vocabulary = [*specials, *(f"<0x{i:02X}>" for i in range(256)), SPACE, *sorted({*words} - {" "})]
    merges = []
    for word in dict.fromkeys(words.split()):
        for piece in (SPACE + word, word):
            for end in range(2, len(piece) + 1):
                merges.append((piece[: end - 1], piece[end - 1]))
                vocabulary.append(piece[:end])
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    model = models.BPE(ids, list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "</s>", "[INST]", "[/INST]"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", ids["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        chat_template=template,
    )
