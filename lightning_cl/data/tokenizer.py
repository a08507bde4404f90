"""Tokenizers: loaded from the hub or a folder, or a byte-level BPE vocabulary trained on the first task."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class TrainedBPE:
    """A byte-level BPE vocabulary of fixed size, trained once and cached.

    It is trained on the first task alone: nothing about the future is needed, and data that arrives later finds the
    same vocabulary. Byte level means that any text can be written in it.

    Args:
        vocab_size: number of tokens, ``<|endoftext|>`` included.
        cache_dir: where trained vocabularies are kept; default ``$LIGHTNING_CL_CACHE`` or ``~/.cache/lightning_cl``.

    Raises:
        ValueError: if the vocabulary is too small for the 256 bytes and the end token.
    """

    END = "<|endoftext|>"

    def __init__(self, vocab_size: int, cache_dir: str | None = None) -> None:
        if vocab_size < 257:
            raise ValueError(f"vocab_size={vocab_size}: a byte-level vocabulary needs at least 257 tokens")
        self.vocab_size = vocab_size
        self.cache_dir = cache_dir

    def train(self, texts: Sequence[str]) -> Any:
        """Trains, or loads from the cache, and returns a ``transformers`` tokenizer."""
        from transformers import PreTrainedTokenizerFast

        folder = Path(self.cache_dir or os.environ.get("LIGHTNING_CL_CACHE") or Path.home() / ".cache" / "lightning_cl")
        digest = hashlib.sha256(json.dumps([1, self.vocab_size, list(texts)]).encode()).hexdigest()[:16]
        path = folder / f"bpe-{self.vocab_size}-{digest}.json"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
            os.close(handle)
            self._train(texts).save(temporary)
            os.replace(temporary, path)
        return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=self.END, pad_token=self.END)

    def _train(self, texts: Sequence[str]) -> Any:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[self.END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer


def load_tokenizer(name: str) -> Any:
    """A tokenizer from the hub or from a folder.

    Raises:
        ValueError: if there is none under that name; the message says what was tried.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer={name!r}: no tokenizer folder of that name and none on the hub ({error})"
        ) from error


def fingerprint(tokenizer: Any) -> str:
    """A hash of what a tokenizer does to text: vocabulary, merges, and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    special = [str(getattr(tokenizer, name, None)) for name in ("bos_token", "eos_token")]
    return hashlib.sha256(json.dumps([content, special]).encode()).hexdigest()
