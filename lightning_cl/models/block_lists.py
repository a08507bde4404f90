"""The list of a model's decoder blocks: where it is, and how blocks and configuration change together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_cl.random_state import untouched_random_state

_PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")  # one entry for each block
_INDEX_LISTS = ("mlp_only_layers",)  # settings that list indices of blocks
_INDICES = (
    "layer_idx",
    "layer_id",
    "layer_index",
    "layer_number",
)  # attributes of modules, of int


def architecture_of(model: Any) -> str:
    """The name of a model's architecture and class, for messages."""
    base = _without_adapters(model)
    kind = getattr(getattr(base, "config", None), "model_type", None)
    return f"{kind!r} ({type(base).__name__})"


def decoder_config(model: Any) -> Any:
    """The configuration that holds the number of decoder blocks; that of the text model in a model of several parts.

    Raises:
        ValueError: if the model has no configuration of ``transformers``.
    """
    config: Any = getattr(_without_adapters(model), "config", None)
    if not hasattr(config, "get_text_config"):
        raise ValueError(f"model: {type(model).__name__} has no configuration; expected a causal model of transformers")
    return config.get_text_config(decoder=True)


def decoder_blocks(model: Any) -> nn.ModuleList:
    """The list of a causal language model's decoder blocks, in the order of the path; the list itself, no copy.

    Works for any ``transformers`` model whose decoder keeps its blocks in one list of ``num_hidden_layers`` entries,
    also below peft.

    Raises:
        ValueError: if there is no such list; the message names the architecture.
    """
    count = getattr(decoder_config(model), "num_hidden_layers", None)
    base = _without_adapters(model)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    for module in (decoder if decoder is not None else base).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"model: {architecture_of(model)} has no list of {count} decoder blocks; expected a causal model whose decoder"
        " keeps its blocks in one nn.ModuleList of config.num_hidden_layers entries, such as 'llama' or 'gpt2'"
    )


def check_whole(model: Any) -> None:
    """Finds models whose blocks cannot be changed: with adapters, sharded, or with settings by index.

    Raises:
        ValueError: that says what would be right.
    """
    if hasattr(model, "peft_config") or any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            f"model: {architecture_of(model)} has adapters, whose blocks cannot be copied; insert the blocks first and"
            " add the adapters afterwards"
        )
    if any(type(parameter).__name__ == "DTensor" or hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"model: the weights of {architecture_of(model)} are sharded; insert the blocks before the model is"
            " sharded, or use one device or DDP"
        )
    if getattr(decoder_config(model), "is_heterogeneous", False):
        raise ValueError(
            f"model: {architecture_of(model)} has settings for single blocks (per_layer_config), which would point to"
            " other blocks; expected a model whose blocks are alike"
        )


def arrange(
    model: Any, modules: Sequence[nn.Module], sources: Sequence[int], settings: Mapping[str, Any]
) -> Callable[[], None]:
    """Gives a model other blocks and rewrites its configuration and the index in each block.

    Args:
        model: of ``transformers``.
        modules: the blocks, in the order of the path.
        sources: for each of them, the index of the old block whose settings it takes over.
        settings: of the configuration, set as they are; None deletes one.

    Returns:
        A function that undoes it.
    """
    blocks, config = decoder_blocks(model), decoder_config(model)
    old, count = list(blocks), len(blocks)
    rewritten: dict[str, Any] = {"num_hidden_layers": len(modules)}
    for name in _PER_BLOCK:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and len(value) == count:
            rewritten[name] = [value[source] for source in sources]
    for name in _INDEX_LISTS:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)):
            rewritten[name] = [i for i, source in enumerate(sources) if source in value]
    if "attention_layers" in rewritten and hasattr(config, "attention_types"):  # gpt_neo derives one from the other
        rewritten["attention_types"] = [[rewritten["attention_layers"], 1]]
    rewritten |= settings
    absent = object()
    before = {name: getattr(config, name, absent) for name in rewritten}

    def put(chosen: Sequence[nn.Module], values: Mapping[str, Any], missing: Any) -> None:
        for name, value in values.items():
            if value is not missing:
                setattr(config, name, value)
            elif hasattr(config, name):
                delattr(config, name)
        del blocks[:]
        blocks.extend(chosen)
        for index, block in enumerate(chosen):
            for module in block.modules():
                for name in _INDICES:
                    if isinstance(vars(module).get(name), int):
                        setattr(module, name, index)

    put(modules, rewritten, None)
    return lambda: put(old, before, absent)


def check_reload(model: Any) -> None:
    """Finds models that would not be the same after saving and loading: a fresh one, without memory, is compared.

    Compared are shapes of parameters, kinds of modules, and all plain attributes that depend on a block's index.

    Raises:
        ValueError: that names the architecture and the first difference.
    """
    try:
        with untouched_random_state(), torch.device("meta"):
            fresh = type(model)(copy.deepcopy(model.config))
    except Exception as error:  # of any kind, from the constructor of any architecture
        raise ValueError(
            f"model: {architecture_of(model)} cannot be built with {len(decoder_blocks(model))} blocks: {error}"
        ) from error
    ours, theirs = ([_plain(block) for block in decoder_blocks(each)] for each in (model, fresh))
    quantized = getattr(model, "is_quantized", False)
    for name in sorted({name for block in ours + theirs for name in block}):
        if name.startswith(("shape ", "class ")) and quantized:
            continue
        left, right = ([block.get(name) for block in each] for each in (ours, theirs))
        if quantized and None in left + right:
            continue  # an attribute of quantised layers, or of plain ones
        # An attribute that is the same everywhere in a model is a setting of the whole (gradient checkpointing).
        if left != right and not (_constant(left) and _constant(right)):
            at = next(i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b)
            raise ValueError(
                f"model: in {architecture_of(model)} {name.split(' ')[-1]!r} of a block depends on its index: block"
                f" {at} has {left[at]!r}, and would have {right[at]!r} after it was saved and loaded; expected an"
                " architecture whose blocks differ only by lists in the configuration, such as 'llama'"
            )


def _plain(block: nn.Module) -> dict[str, Any]:
    """The plain attributes, kinds of modules and shapes of parameters in a block."""
    found: dict[str, Any] = {f"shape {name}": tuple(value.shape) for name, value in block.named_parameters()}
    for path, module in block.named_modules():
        found[f"class {path}"] = type(module).__name__
        for name, value in vars(module).items():
            if name != "training" and not name.startswith("_") and isinstance(value, (bool, int, float, str)):
                found[f"{path}.{name}".lstrip(".")] = value
    return found


def _constant(values: list[Any]) -> bool:
    return all(value == values[0] for value in values)


def _without_adapters(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
