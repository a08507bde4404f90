"""Tokenised data on disk. Data is tokenised once, and again after a change of anything that its tokens depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightning_cl.checksum import checksum_of
from lightning_cl.data.text.dataset import TokenDataset
from lightning_cl.data.text.record_counts import Tally
from lightning_cl.files import cache_folder, remove_old, replace_file

FORMAT = 2
"""Version of the file format. It is part of the key, so a version that tokenises differently ignores old files."""


def cached(key: dict[str, Any] | None, make: Callable[[], TokenDataset]) -> TokenDataset:
    """Reads a tokenised data set from the cache; if it is not there, makes it and writes it there.

    A file has ``ids`` (int32), ``loss_mask`` (bool) and ``ends`` (int64) in safetensors' format, and a checksum over
    all of it. Its tensors are mapped into RAM. A file that was not written to its end is never read.

    Args:
        key: everything that the result depends on, in a form that JSON can write: content of the files, tokenizer,
            template, length, mask rule, split. None: nothing is cached.
        make: a function that tokenises the data.
    """
    if key is None:
        return make()
    text = json.dumps({"format": FORMAT, **key}, sort_keys=True)
    path = cache_folder() / "tokens" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    found = _read(path, text)
    if found is not None:
        return found
    made = make()
    _write(path, made, text)
    return made


def _read(path: Path, key: str) -> TokenDataset | None:
    try:
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            if meta.get("key") != key:  # although its name is made from the key
                raise ValueError("it says that it is of other data")
            tensors = {name: file.get_tensor(name) for name in ("ids", "loss_mask", "ends")}
        if checksum_of(tensors.items(), key, meta["tally"]) != meta["checksum"]:
            raise ValueError("its checksum does not fit")
        return TokenDataset.from_tensors(**tensors, tally=Tally(**json.loads(meta["tally"])))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        rank_zero_warn(f"{path}: a damaged file in the cache of tokenised data ({error}); it is made again")
        return None


def _write(path: Path, data: TokenDataset, key: str) -> None:
    metadata = {"key": key, "tally": json.dumps(asdict(data.tally))}
    metadata["checksum"] = checksum_of(data.tensors.items(), metadata["key"], metadata["tally"])
    try:
        remove_old(path.parent, ".*.safetensors")  # temporary files of killed processes
        replace_file(path, lambda temporary: save_file(data.tensors, temporary, metadata=metadata))
    except (OSError, SafetensorError) as error:  # a full disk raises SafetensorError
        rank_zero_warn(f"{path}: tokenised data cannot be kept there ({error}); it is made anew in each run")
