"""Tokenizers: loaded from the hub or a folder, or a byte-level BPE vocabulary trained on the first task."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_cl.data.text.model_files import find_damaged_file
from lightning_cl.data.text.pretrained import resolve_source
from lightning_cl.files import cache_folder, replace_file

_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")  # one class, under its older and its newer name


class TrainedBPE:
    """A byte-level BPE vocabulary of fixed size, trained once and cached.

    It is trained on the first task alone, so that it needs no data of later tasks, and does not change when they come.
    Any text can be written in it, since it has all bytes.

    Args:
        vocab_size: number of tokens, ``<|endoftext|>`` included.
        cache_dir: folder for trained vocabularies; default ``$LIGHTNING_CL_CACHE`` or ``~/.cache/lightning_cl``.

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
        """Trains the vocabulary or loads it from the cache; returns a ``transformers`` tokenizer."""
        from transformers import PreTrainedTokenizerFast

        folder = Path(self.cache_dir) if self.cache_dir else cache_folder()
        digest = hashlib.sha256(json.dumps([1, self.vocab_size, list(texts)]).encode()).hexdigest()[:16]
        path = folder / f"bpe-{self.vocab_size}-{digest}.json"
        ends = {"eos_token": self.END, "pad_token": self.END}
        if not os.path.exists(path):
            trained = self._train(texts)
            try:
                replace_file(path, lambda temporary: trained.save(str(temporary)))
            except Exception as error:  # a read-only or full disk; tokenizers has no class of its own for it
                rank_zero_warn(f"{path}: the tokenizer cannot be kept there ({error}); it is trained in each run")
                return PreTrainedTokenizerFast(tokenizer_object=trained, **ends)
        return PreTrainedTokenizerFast(tokenizer_file=str(path), **ends)

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
    """A tokenizer from the hub, a folder, a ``.gguf`` file, or ``sample:NAME``.

    Raises:
        ValueError: if there is no tokenizer of that name, or a file of it is damaged.
    """
    from transformers import AutoTokenizer

    path = resolve_source(name, "tokenizer")
    try:
        if path.endswith(".gguf"):
            file = Path(path)
            return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        return _as_written(AutoTokenizer.from_pretrained(path), Path(path))
    except Exception as error:  # a damaged file can raise any error
        damaged = None if "pip install" in str(error) else find_damaged_file(path, error)
        if damaged is not None:
            raise ValueError(f"tokenizer={name!r}: {damaged}") from error
        if not isinstance(error, (OSError, ValueError)):
            raise
        raise ValueError(
            f"tokenizer={name!r}: no tokenizer folder of that name and none on the hub ({error})"
        ) from error


def _as_written(tokenizer: Any, folder: Path) -> Any:
    """Loads a tokenizer again if the generic class wrote its folder, and another class has read it.

    For some kinds of models ``AutoTokenizer`` takes a class of their own, which cuts texts in its own way, whatever the
    file says: a vocabulary of ours next to a Qwen2 model would give other tokens than in training.
    """
    from transformers import PreTrainedTokenizerFast

    settings = folder / "tokenizer_config.json"
    if not (settings.is_file() and (folder / "tokenizer.json").is_file()):
        return tokenizer
    writer = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class")
    if writer not in _GENERIC or type(tokenizer).__name__ in _GENERIC:
        return tokenizer
    return PreTrainedTokenizerFast.from_pretrained(folder)


def read_template(chat_template: str | Path) -> str:
    """Returns a chat template that is given as Jinja text, or as the path of a file with it.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(chat_template, str) and "{" in chat_template:
        return chat_template
    path = Path(chat_template)
    if not path.is_file():
        raise ValueError(
            f"chat_template={str(chat_template)!r}: expected a Jinja template or a file that holds one, and there is"
            f" no such file (looked in {path.absolute().parent})"
        )
    return path.read_text(encoding="utf-8")


def fingerprint(tokenizer: Any) -> str:
    """A hash of everything that decides a tokenizer's output: vocabulary, merges, and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        settings = json.loads(backend.to_str())
        for changed_by_calls in ("truncation", "padding"):
            settings.pop(changed_by_calls, None)
        content = json.dumps(settings, sort_keys=True)
    else:
        content = json.dumps(sorted(tokenizer.get_vocab().items()))
    special = [str(getattr(tokenizer, name, None)) for name in ("bos_token", "eos_token")]
    return hashlib.sha256(json.dumps([content, special]).encode()).hexdigest()


def plain_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of each text, without start and end tokens."""
    # verbose=False: documents longer than the model's context are cut later.
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def start_tokens(tokenizer: Any) -> list[int]:
    """Returns the tokens that the tokenizer itself puts before a text, as its model has seen them in training.

    A tokenizer can have a start token and not use it: SmolLM2's never puts it before plain text.
    """
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    fits = (at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain)
    return list(whole[: next(fits, 0)])


def end_tokens(tokenizer: Any) -> list[int]:
    """Returns the tokens that a document ends with: the end token, if there is one."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def pad_token_id(tokenizer: Any) -> int:
    """The token that a tokenizer pads with; its end token if it has no padding token."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
