"""Exported files as llama.cpp itself reads them, where its wheel ``xllamacpp`` is installed."""

from __future__ import annotations

import importlib.util
import json
import tempfile
import urllib.request
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_cl.export.gguf_tokenizer import Vocabulary, hard_texts, write_vocabulary
from lightning_cl.export.gguf_types import gguf


def is_installed() -> bool:
    """True if llama.cpp can be asked."""
    return importlib.util.find_spec("xllamacpp") is not None


class LlamaCpp:
    """A GGUF file in llama.cpp: in this process, on the CPU, with an fp32 cache and without flash attention.

    With llama.cpp's own settings (a 16-bit cache) log-probabilities differ by some thousandths, for any file.

    Args:
        path: the file.
        context: positions.
        threads: CPU threads.
        adapters: GGUF files of LoRA adapters; none is applied unless a call asks for it.

    Raises:
        ImportError: if ``xllamacpp`` is not installed.
        RuntimeError: if llama.cpp refuses the file.
    """

    def __init__(
        self, path: str | Path, context: int = 512, threads: int = 1, adapters: Sequence[str | Path] = ()
    ) -> None:
        try:
            import xllamacpp
        except ImportError as error:
            raise ImportError("llama.cpp is asked through the package xllamacpp: pip install xllamacpp") from error
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx = context
        settings.n_parallel = 1
        settings.warmup = False
        settings.verbosity = -1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapters:
            settings.lora_adapters = [_adapter(file) for file in adapters]
            settings.lora_init_without_apply = True
        self._adapters = len(adapters)
        self._scales: tuple[float, ...] = ()
        self._server = xllamacpp.Server(settings)
        # A server that is ended before its loop runs never ends: one answer shows that it does.
        self._server.handle_completions({"prompt": [0], "max_tokens": 1, "temperature": 0})

    @cached_property
    def size(self) -> int:
        """Number of tokens in the vocabulary."""
        return int(self._http("v1/models")["data"][0]["meta"]["n_vocab"])

    def logprobs(self, ids: Sequence[int], scales: Sequence[float] = ()) -> Tensor:
        """Returns the log-probabilities of all tokens after a text.

        Args:
            ids: the text's tokens; none is put in front of them.
            scales: by how much each adapter is applied, 0 for those that are not named.

        Returns:
            log-probabilities (vocabulary).
        """
        self._has_same(scales)
        answer = self._ask(ids, self._letter, scales, n_probs=self.size, logprobs=self.size, cache_prompt=False)
        found = torch.full((self.size,), float("nan"))
        for entry in answer["top_logprobs"] if answer else ():
            found[entry["id"]] = entry["logprob"]
        return found

    def token_logprobs(
        self, ids: Sequence[int], scales: Sequence[float] = (), places: Sequence[int] | None = None
    ) -> Tensor:
        """Returns the log-probability of each token of a text, after those before it.

        Each token is one call, which computes one position: a sequence takes as long as it takes to write it.

        Args:
            ids: the text's tokens, at least two.
            scales: by how much each adapter is applied, 0 for those that are not named.
            places: positions of the tokens that are asked for, from 1 on; default: all.

        Returns:
            log-probabilities, one per position; the mean of their negatives is the loss of a causal language model.
        """
        found = []
        for end in range(1, len(ids)) if places is None else places:
            wanted = int(ids[end])
            answer = self._ask(ids[:end], wanted, scales, n_probs=1, logprobs=1, cache_prompt=self._has_same(scales))
            if answer is not None:
                found.append(float(answer["logprob"]))
            else:  # part of a character: llama.cpp waits for the rest before it tells anything
                found.append(float(self.logprobs(ids[:end], scales)[wanted]))
        return torch.tensor(found)

    def _has_same(self, scales: Sequence[float]) -> bool:
        """True if the last call had the same adapters: what is cached of the text was computed with them."""
        same, self._scales = self._scales == tuple(scales), tuple(scales)
        return same

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Returns the ids of a text.

        Args:
            text: the text.
            special: with the start token as a prompt has it, and with special tokens where their text is.
        """
        content = {"content": text, "add_special": special, "parse_special": special}
        ids: list[int] = self._http("tokenize", content)["tokens"]
        return ids

    @cached_property
    def _letter(self) -> int:
        return self.tokenize("a", special=False)[0]

    def _http(self, page: str, content: Any = None) -> Any:
        """Asks what the package has no function for."""
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(
            f"{self._server.listening_address}/{page}", body, {"Content-Type": "application/json"}
        )
        # Without the proxies of the environment, which do not know this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)

    def _ask(self, prompt: Sequence[int], choose: int, scales: Sequence[float], **settings: Any) -> Any:
        """Has llama.cpp choose a certain token after a text.

        A bias makes it choose; the log-probabilities that it tells are those without a bias.

        Returns:
            the token and its log-probabilities; None if the token is a part of a character.
        """
        weights = [*scales, *[0.0] * (self._adapters - len(scales))]
        answer = self._server.handle_completions(
            {
                "prompt": [int(i) for i in prompt],
                "max_tokens": 1,
                "temperature": 0,
                "logit_bias": [[choose, 1e9]],
                "lora": [{"id": i, "scale": float(scale)} for i, scale in enumerate(weights)],
                **settings,
            }
        )
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp: {answer}")
        found = (answer["choices"][0].get("logprobs") or {}).get("content")
        if found and found[0]["id"] != choose:
            raise RuntimeError(f"llama.cpp: chose token {found[0]['id']} where {choose} was asked for")
        return found[0] if found else None


def _adapter(path: str | Path) -> Any:
    import xllamacpp

    return xllamacpp.CommonAdapterLoraInfo(str(path), 1.0)


def check_ids(tokenizer: Any, vocabulary: Vocabulary) -> None:
    """Compares a tokenizer's ids with those of llama.cpp, which reads the vocabulary in a file with a tiny model.

    Args:
        tokenizer: of ``transformers``.
        vocabulary: as the exported file will hold it.

    Raises:
        RuntimeError: naming the first text that gets other ids.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        _write_tiny(path, vocabulary)
        llama = LlamaCpp(path, context=64)
        for text in hard_texts(tokenizer):
            ours, theirs = tokenizer(text)["input_ids"], llama.tokenize(text)
            if ours != theirs:
                at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), -1)
                raise RuntimeError(
                    f"tokenizer: llama.cpp, with pre={vocabulary.pre!r}, gives other ids for {text[:60]!r}:"
                    f" {theirs[at : at + 5]} instead of {ours[at : at + 5]} at position {at}; check=False writes the"
                    " file nevertheless"
                )


def _write_tiny(path: Path, vocabulary: Vocabulary) -> None:
    """Writes a model of one layer and 32 numbers, all zero, around a vocabulary."""
    width = 32
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("embedding_length", "feed_forward_length", "context_length"):
        writer.add_uint32(f"llama.{key}", width)
    for key in ("block_count", "attention.head_count", "attention.head_count_kv"):
        writer.add_uint32(f"llama.{key}", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    write_vocabulary(writer, vocabulary)
    writer.add_tensor("token_embd.weight", np.zeros((len(vocabulary.tokens), width), np.float16))
    writer.add_tensor("output_norm.weight", np.zeros(width, np.float32))
    for norm in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{norm}.weight", np.zeros(width, np.float32))
    for matrix in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{matrix}.weight", np.zeros((width, width), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
