"""Folders for mlx-lm, which runs models on Macs: whole models, LoRA adapters, and losses as MLX computes them.

mlx-lm reads the weights of ``transformers`` as they are, and not all of its configuration. Since version 5,
``transformers`` writes the base of the rotary embedding into ``rope_parameters``. mlx-lm's Llama and Qwen2 do not look
there: they take a default and compute something else without an error. :func:`export_mlx` writes it where they look.

Writing needs no MLX. To compute with it: ``pip install "lightning_cl[mlx]"``.
"""

from __future__ import annotations

import filecmp
import importlib.util
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from lightning_cl.export.folders import replace_folder
from lightning_cl.export.gguf_source import SavedTensors
from lightning_cl.export.mlx_adapter import WEIGHTS, export_adapter_mlx

_OTHER_FILES = {".json", ".jinja", ".txt", ".model", ".md"}
# The architectures of which mlx-lm computes what transformers computes, with these settings.
_KNOWN = ("llama", "mistral", "qwen2", "qwen3")
_ROPES = ("default", "linear", "dynamic", "llama3", "yarn")
_SMALL = 10_000_000
_PADDING = 32  # MLX compiles for each new length


def export_mlx(folder: str | Path, out: str | Path, link: bool = False, check: bool | None = None) -> Path:
    """Writes a folder that ``mlx_lm.load`` and ``transformers`` both run, with the same results.

    The weights are taken as they are. ``config.json`` gets the rotary embedding's base and scaling once more where
    mlx-lm looks for them. Everything is read back and compared. Memory: none of the weights are in memory.

    Args:
        folder: as ``save_pretrained`` writes it: a whole model in 16 or 32 bits.
        out: the new folder.
        link: take hard links to the weights instead of copies, which need no room. A program that overwrites a file in
            one of the two folders then changes both.
        check: compare the logits of MLX and ``transformers``, both in 32 bits, on a short text. None: only for an
            architecture other than Llama, Mistral, Qwen2 and Qwen3.

    Returns:
        the folder.

    Raises:
        ValueError: for a model that mlx-lm would compute otherwise, with the reason; or if `out` has files already.
        ImportError: if the logits are to be compared and MLX is not installed.
        RuntimeError: if what was written is not what the folder holds, or computes something else.
    """
    folder, out = Path(folder), Path(out)
    tensors = SavedTensors(folder)
    config = mlx_config(folder)
    weights = sorted(path.name for path in set(tensors.files.values()))
    others = [*_others(folder), *(path.name for path in folder.glob("model.safetensors.index.json"))]

    def write(temporary: Path) -> None:
        for name in weights:
            (os.link if link else shutil.copyfile)(folder / name, temporary / name)
        _copy(folder, temporary, others)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _, other, unread = filecmp.cmpfiles(folder, temporary, [*weights, *others], shallow=False)
        if other or unread:
            raise RuntimeError(f"{out.name}: {[*other, *unread]} cannot be read back as written")
        ours, theirs = _config(folder).to_dict(), _config(temporary).to_dict()
        changed = {key for key in ours if ours[key] != theirs.get(key)} - {
            "rope_theta",
            "rope_scaling",
            "_name_or_path",
        }
        if changed:
            raise RuntimeError(f"{out.name}: transformers reads other settings there: {sorted(changed)}")
        if check or (check is None and config["model_type"] not in _KNOWN):
            _compare_logits(temporary)

    return replace_folder(out, write, None)


def mlx_config(folder: str | Path) -> dict[str, Any]:
    """Returns the content of ``config.json`` as mlx-lm needs it.

    Args:
        folder: as ``save_pretrained`` writes it.

    Raises:
        ValueError: for a model that mlx-lm would compute otherwise, with the reason.
    """
    config = _config(Path(folder))
    content: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    rope = dict(getattr(config, "rope_parameters", None) or {})
    _refuse(config, rope)
    content["tie_word_embeddings"] = bool(config.tie_word_embeddings)
    if "rope_theta" in rope:
        content["rope_theta"] = rope.pop("rope_theta")
        scaling = None if rope.get("rope_type", "default") == "default" else rope
        if scaling or content.get("rope_scaling"):
            content["rope_scaling"] = scaling
    return content


def mlx_losses(
    folder: str | Path, sequences: Sequence[tuple[list[int], list[int]]], adapter: str | Path | None = None
) -> list[tuple[float, int]]:
    """Computes losses of token sequences with MLX, in the precision of the weights; logits are summed in 32 bits.

    Args:
        folder: of :func:`export_mlx`, or as ``save_pretrained`` writes it.
        sequences: for each its ids, and its labels: ids again, or −100 where there is no loss. The label at position
            ``i`` is predicted from the ids before ``i``, so the first one is never counted.
        adapter: the folder of an adapter, of :func:`export_adapter_mlx` or of peft.

    Returns:
        for each sequence the sum of its losses in nats, and the number of tokens that bear loss.

    Raises:
        ImportError: if MLX is not installed.
        ValueError: if a sequence has not as many labels as ids.
    """
    for place, (ids, labels) in enumerate(sequences):
        if len(ids) != len(labels):
            raise ValueError(f"sequences[{place}]: {len(ids)} ids and {len(labels)} labels; expected one for each")
    model = load_mlx(folder, adapter)
    found = []
    for ids, labels in sequences:
        places = [place for place in range(1, len(ids)) if labels[place] != -100]
        logprobs = _logprobs(model, ids) if places else np.zeros((0, 1), np.float32)
        total = sum(-float(logprobs[place - 1, labels[place]]) for place in places)
        found.append((total, len(places)))
    return found


def is_quick(folder: str | Path) -> bool:
    """Returns True if MLX is installed and computes a model's losses in seconds.

    On a GPU it does. MLX's matrix products on the CPU take about 3 s per GFLOP: a minute for 64 tokens and 135 million
    parameters, so that only models of up to 10 million are quick there.

    Args:
        folder: of :func:`export_mlx`, or as ``save_pretrained`` writes it.
    """
    if importlib.util.find_spec("mlx_lm") is None or importlib.util.find_spec("mlx") is None:
        return False
    import mlx.core as mx

    size = sum(math.prod(shape) for shape in SavedTensors(Path(folder)).shapes.values())
    return bool(mx.default_device() == mx.gpu) or size <= _SMALL


def load_mlx(folder: str | Path, adapter: str | Path | None = None) -> Any:
    """Loads a model into MLX, with an adapter if one is given, ready to compute.

    Args:
        folder: of :func:`export_mlx`, or as ``save_pretrained`` writes it.
        adapter: the folder of an adapter, of :func:`export_adapter_mlx` or of peft.

    Raises:
        ImportError: if MLX is not installed.
        ValueError: for a model or an adapter that mlx-lm would compute otherwise.
    """
    mlx_lm = import_mlx_lm()
    model, _ = mlx_lm.load_model(Path(folder), model_config=mlx_config(folder))
    if adapter is not None and (Path(adapter) / WEIGHTS).is_file():
        mlx_lm.load_adapters(model, str(adapter))
    elif adapter is not None:
        with tempfile.TemporaryDirectory() as temporary:
            mlx_lm.load_adapters(model, str(export_adapter_mlx(adapter, Path(temporary) / "mlx", folder)))
            _evaluate(model)
    model.eval()
    return model


def save_mlx(model: Any, folder: str | Path, out: str | Path) -> Path:
    """Saves a model that was trained with MLX, so that ``transformers`` and mlx-lm load it.

    Args:
        model: of :func:`load_mlx`, without an adapter.
        folder: the folder that it was loaded from, for the settings and the tokenizer.
        out: the new folder.

    Returns:
        the folder.

    Raises:
        ValueError: if `out` has files already.
        RuntimeError: if the weights have other names or shapes than those in `folder`.
    """
    folder = Path(folder)
    config, before = mlx_config(folder), SavedTensors(folder).shapes
    if config["tie_word_embeddings"]:
        before.pop("lm_head.weight", None)

    def write(temporary: Path) -> None:
        import_mlx_lm().save_model(temporary, model)
        _copy(folder, temporary, _others(folder))
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        saved = SavedTensors(temporary).shapes
        if saved != before:
            odd = sorted(saved.items() ^ before.items())[:3]
            raise RuntimeError(f"{Path(out).name}: the weights are not those of {folder.name}: {odd}")

    return replace_folder(Path(out), write, None)


def import_mlx_lm() -> Any:
    """Imports ``mlx_lm.utils``, and leaves the number of files that this process may open as it is.

    Raises:
        ImportError: if it is not installed, with the command that installs it.
    """
    try:
        with _keeping_file_limit():
            from mlx_lm import utils
    except ImportError as error:
        raise ImportError(f'MLX cannot be imported ({error}): pip install "lightning_cl[mlx]"') from error
    return utils


@contextmanager
def _keeping_file_limit() -> Iterator[None]:
    # mlx-lm lowers the limit for the whole process when it is imported, and no process can raise it again.
    with patch("resource.setrlimit"):
        yield


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ValueError(f"folder={str(folder)!r}: has no config.json; expected a folder that save_pretrained wrote")
    return AutoConfig.from_pretrained(folder)


def _others(folder: Path) -> list[str]:
    """Names of the files of the tokenizer, of generation, and the card."""
    ours = ("config.json", "model.safetensors.index.json")
    return sorted(p.name for p in folder.iterdir() if p.suffix in _OTHER_FILES and p.is_file() and p.name not in ours)


def _copy(folder: Path, out: Path, names: Sequence[str]) -> None:
    for name in names:
        shutil.copyfile(folder / name, out / name)


def _refuse(config: Any, rope: dict[str, Any]) -> None:
    """Refuses what mlx-lm would not compute, or otherwise.

    Raises:
        ValueError: with the reason.
    """
    if getattr(config, "quantization_config", None):
        raise ValueError(
            "quantization_config: the folder's weights are quantised, in a way that MLX does not read; save the model"
            " in 16 or 32 bits, an adapter with save_pretrained(merge=True), and quantise it with mlx_lm.convert -q"
        )
    kind = config.model_type
    if kind not in _KNOWN:
        return  # the logits decide
    windows = [name for name in getattr(config, "layer_types", None) or [] if name != "full_attention"]
    window = getattr(config, "sliding_window", None)
    if (windows or kind == "mistral") and window and window < config.max_position_embeddings:
        raise ValueError(
            f"sliding_window={window}: mlx-lm attends to all positions in {kind}; if no sequence is longer, set"
            " sliding_window to null in config.json"
        )
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act={config.hidden_act!r}: mlx-lm computes silu in {kind}")
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if kind == "qwen2" and size * config.num_attention_heads != config.hidden_size:
        raise ValueError(f"head_dim={size}: mlx-lm takes hidden_size / num_attention_heads for qwen2")
    if kind == "qwen3" and config.attention_bias:
        raise ValueError("attention_bias=True: mlx-lm's qwen3 has no biases")
    kinds = rope.get("rope_type", "default")
    odd = {"attention_factor", "truncate"} & rope.keys()
    if kinds not in _ROPES or odd or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"rope_parameters={rope}: mlx-lm knows {list(_ROPES)} for whole heads, without more settings")


def _logprobs(model: Any, ids: Sequence[int]) -> np.ndarray[Any, Any]:
    """Log-probabilities of the next token at each position: float32 ``[length, vocabulary]``."""
    import mlx.core as mx

    logits = model(mx.array([[*ids, *[0] * (-len(ids) % _PADDING)]]))[0, : len(ids)].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def _evaluate(model: Any) -> None:
    """Reads the weights now, since their file is about to be deleted."""
    import mlx.core as mx

    mx.eval(model.parameters())


def _compare_logits(folder: Path) -> None:
    """Compares MLX with ``transformers``, both in 32 bits.

    Raises:
        RuntimeError: if they differ by more than rounding.
    """
    import mlx.core as mx
    from transformers import AutoModelForCausalLM

    from_mlx = load_mlx(folder)
    from_mlx.set_dtype(mx.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [(7 * place + 3) % model.config.vocab_size for place in range(24)]
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    off = float((torch.from_numpy(_logprobs(from_mlx, ids)) - wanted).abs().max())
    if not off < 1e-3 * float(wanted.abs().max()):
        raise RuntimeError(f"{folder.name}: MLX's log-probabilities are {off:.2g} off those of transformers")
