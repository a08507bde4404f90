"""Models on disk: whole, as an adapter, or merged; each is loaded again and compared before the call returns."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_cl.evaluation.model_card import Base, Kind, model_card
from lightning_cl.files import replace_file
from lightning_cl.models.adapter_factors import mean_factors
from lightning_cl.models.adapter_gates import is_gated
from lightning_cl.models.adapter_names import task_name
from lightning_cl.models.adapters import adapter_of, is_untrained
from lightning_cl.models.decoder_columns import has_columns
from lightning_cl.models.loading import load_pretrained, quiet_peft

_WEIGHTS = "adapter_model.safetensors"


def save_whole(model: Any, folder: str | Path) -> None:
    """All weights, as ``AutoModelForCausalLM.from_pretrained`` loads them.

    Raises:
        ValueError: if the model has columns of a progressive network.
        RuntimeError: if what was written is not what is in memory.
    """
    if has_columns(model):
        raise ValueError(
            "save_pretrained: the model has a column of blocks for each task (ProgressiveNetwork), which no class of"
            " transformers can load and no merge can bring together; keep the run's checkpoint"
        )
    model.save_pretrained(folder)
    again = load_pretrained(str(folder), dtype=str(model.dtype).removeprefix("torch."))
    _compare(model.state_dict(), again.state_dict(), folder)


def save_adapters(
    model: Any,
    folder: str | Path,
    source: str,
    task: str | None = None,
    merge: bool = False,
    dtype: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[Path, str | None]:
    """LoRA adapters as folders that peft loads, or merged into their base as folders that transformers loads.

    Args:
        model: the ``PeftModel``.
        folder: where to.
        source: the base's name, folder or file.
        task: a task with an adapter of its own (or the adapter's name in peft); ``all``: each task in a folder of its
            own in `folder`; ``mean``: one adapter, whose ``ΔW`` is the mean of those of all tasks that were trained;
            its rank is the sum of theirs. None: the only adapter there is, or ``all``.
        merge: merge the adapter into its base (:func:`save_merged`).
        dtype: of the base's weights, with `merge`; None: as they are stored.
        settings: further arguments of ``from_pretrained``, with `merge`.

    Returns:
        the folders that were written, each with its task (or ``mean``); None for the only adapter there is.

    Raises:
        ValueError: if there is no such adapter, or several and nothing says which one to merge.
        RuntimeError: if what was written is not what is in memory.
    """
    folder = Path(folder)
    adapters = {task_name(name) or name: name for name in model.peft_config}
    if task is None and len(adapters) > 1:
        if merge:
            raise ValueError(
                f"save_pretrained(merge=True): there are adapters of {list(adapters)}: give one of them as `task`, or"
                " 'mean' for one model of all of them, or 'all' for a model of each"
            )
        task = "all"
    if task == "mean":
        chosen = {folder: _trained(model)}
    elif task == "all":
        chosen = {folder / place: [name] for place, name in _places(adapters).items()}
    else:
        chosen = {folder: [next(iter(adapters.values())) if task is None else adapter_of(model, task)]}
    base = folder.absolute() / "base" if source.endswith(".gguf") and not merge else None
    if base is not None:
        load_pretrained(source).save_pretrained(base)
    for place, names in chosen.items():
        if len(adapters) > 1 and task != "mean" and is_untrained(model, names[0]):
            rank_zero_warn(
                f"{place}: the adapter {task_name(names[0]) or names[0]!r} is untrained; with it a model computes what"
                " its base computes"
            )
        if not merge:
            _write(model, place, names, mean=task == "mean", base=base)
        else:
            save_merged(model, source, dtype, settings, place, names, mean=task == "mean")
    if len(adapters) == 1:
        return dict.fromkeys(chosen)
    return {place: "mean" if task == "mean" else task_name(names[0]) for place, names in chosen.items()}


def _trained(model: Any) -> list[str]:
    """The adapters that a mean is taken of."""
    tasks = [name for name in model.peft_config if task_name(name) is not None] or list(model.peft_config)
    trained = [name for name in tasks if not is_untrained(model, name)]
    if not trained:
        raise ValueError("save_pretrained(task='mean'): none of the adapters has been trained")
    return trained


def _places(adapters: Mapping[str, str]) -> dict[str, str]:
    """For the folder of each task the adapter's name: the task's name, as far as a folder can have it."""
    places: dict[str, str] = {}
    for task, name in adapters.items():
        place = slug = re.sub(r"[^\w.-]+", "_", task).strip("._-") or "task"
        while place.lower() in {other.lower() for other in places} | {"base"}:  # some disks know no capitals
            place = f"{slug}-{len(places) + 1}"
            slug = f"{slug}-"
        places[place] = name
    return places


def _write(
    model: Any, folder: str | Path, adapters: Sequence[str], mean: bool = False, base: Path | None = None
) -> None:
    """Writes one adapter, or the mean of several, into the root of a folder, and compares.

    Args:
        model: the ``PeftModel``.
        folder: where to.
        adapters: names in peft.
        mean: take their mean.
        base: the folder of the base that peft is to load, if it is not the one in the configuration.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    folder = Path(folder)
    name = adapters[0]
    mean = mean or is_gated(model, name)  # the mean of one: all that it adds, as one adapter
    if base is not None:
        for adapter in adapters:
            model.peft_config[adapter].base_model_name_or_path = str(base)
    made = _mean(model, adapters) if mean else None
    # The base's own embeddings are as they were: peft would look for them on the hub to find that out.
    if name == "default" and not mean:
        model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
    else:  # peft gives other names a folder in the folder
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".adapter-") as temporary:
            model.save_pretrained(temporary, selected_adapters=[name], save_embedding_layers=False)
            for file in [*Path(temporary).glob("*.*"), *(Path(temporary) / name).glob("*.*")]:
                file.replace(folder / file.name)
    if made is not None:
        config, memory = made
        config.save_pretrained(str(folder))
        save_file(memory, folder / _WEIGHTS, metadata={"format": "pt"})
    else:
        memory = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    _compare(memory, load_file(folder / _WEIGHTS), folder)


def _mean(model: Any, adapters: Sequence[str]) -> tuple[Any, dict[str, Tensor]]:
    """The configuration and the weights of an adapter that is the mean of several."""
    weights: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for factors in mean_factors(model, adapters):
        ranks[factors.path.removeprefix("base_model.model.")] = len(factors.first)
        if factors.embedding:
            pair = {"lora_embedding_A": factors.second.T, "lora_embedding_B": factors.first.T}
        else:
            pair = {"lora_A.weight": factors.first, "lora_B.weight": factors.second}
        weights |= {f"{factors.path}.{part}": value.cpu().contiguous() for part, value in pair.items()}
    config = copy.deepcopy(model.peft_config[adapters[0]])
    config.inference_mode, config.use_rslora = True, False
    # The scale is in the factors already: lora_alpha / r is 1 in each layer.
    config.r = config.lora_alpha = max(ranks.values())
    others = {re.escape(path): rank for path, rank in ranks.items() if rank != config.r}
    config.rank_pattern, config.alpha_pattern = others, dict(others)
    return config, weights


def save_merged(
    model: Any,
    source: str,
    dtype: str | None,
    settings: Mapping[str, Any] | None,
    folder: str | Path,
    adapters: Sequence[str] = ("default",),
    mean: bool = False,
) -> None:
    """A LoRA adapter merged into its base, which is loaded for it in 16 or 32 bits: never into quantised weights.

    Args:
        model: the ``PeftModel``.
        source: the base's name, folder or file.
        dtype: of the base's weights; None: as they are stored.
        settings: further arguments of ``from_pretrained``.
        folder: where to.
        adapters: one adapter's name in peft; with `mean` several.
        mean: merge the mean of the adapters.

    Raises:
        RuntimeError: if a merged weight is not ``W + ΔW``, rounded once, or what was written is not what was merged.
    """
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as temporary:
        _write(model, Path(temporary) / "adapter", adapters, mean)
        base = load_pretrained(source, dtype=dtype, settings=settings)
        with quiet_peft():
            adapted = PeftModel.from_pretrained(base, Path(temporary) / "adapter")
    for name, layer in adapted.named_modules():
        if hasattr(layer, "get_delta_weight") and hasattr(layer, "merge"):
            _merge_layer(name, layer, folder)
    save_whole(adapted.unload(), folder)  # what is merged stays


@torch.no_grad()
def _merge_layer(name: str, layer: Any, folder: str | Path) -> None:
    before = layer.get_base_layer().weight.detach().clone()
    delta = sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
    layer.merge(safe_merge=True)
    merged = layer.get_base_layer().weight
    if any(adapter in layer.lora_variant for adapter in layer.active_adapters):
        return  # DoRA and the like scale what is merged
    # Both ΔW and the sum are rounded to the weights' precision.
    expected = before.float() + delta
    allowed = torch.finfo(before.dtype).eps * (expected.abs() + delta.abs()) + torch.finfo(before.dtype).tiny
    if merged.dtype != before.dtype or bool(((merged.float() - expected).abs() > allowed).any()):
        raise RuntimeError(f"{folder}: the merged weight {name} is not the base's plus the adapter's")


def write_cards(
    folders: Mapping[Path, str | None],
    base: Base,
    kind: Kind,
    card: Mapping[str, Any] | str | Path | None,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> None:
    """Writes a model card, ``README.md``, into each folder, in place of the one that peft has written.

    Args:
        folders: each with the task whose adapter it has; None: it is the only one.
        base: what the model was before.
        kind: what is in the folders.
        card: the run's report, or the path of its ``report.json``; None: unknown.
        settings: further ones to show.
        more: further arguments of :func:`~lightning_cl.evaluation.model_card.model_card`.

    Raises:
        ValueError: if `card` is no report.
    """
    report = json.loads(Path(card).read_text(encoding="utf-8")) if isinstance(card, (str, Path)) else card
    for folder, task in folders.items():
        text = model_card(base, kind, report, task, settings, **more)
        replace_file(folder / "README.md", partial(_write_text, text))


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def check_card(card: Any) -> None:
    """Checks that an argument can be the report of a run.

    Raises:
        ValueError: if it is something else, or a path of no such file.
    """
    if isinstance(card, (str, Path)):
        if not Path(card).is_file():
            raise ValueError(f"card={str(card)!r}: there is no such file; expected the report.json of a run")
        card = json.loads(Path(card).read_text(encoding="utf-8"))
    if card is not None and not (isinstance(card, Mapping) and {"matrix", "tasks", "sentences", "costs"} <= set(card)):
        raise ValueError(f"card={card!r:.80}: expected the report of a run, as report.json has it")


def _compare(memory: dict[str, Any], disk: dict[str, Any], folder: str | Path) -> None:
    different = [
        name
        for name, value in memory.items()
        if isinstance(value, Tensor)
        and (name not in disk or not torch.equal(value.detach().cpu(), disk[name].detach().cpu().to(value.dtype)))
    ]
    if different:
        raise RuntimeError(f"{folder}: what was written is not what is in memory: {different[:3]}")
