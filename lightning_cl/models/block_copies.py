"""Copies of decoder blocks that add nothing to the residual stream until they are trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cl.models.block_lists import architecture_of, decoder_blocks
from lightning_cl.passes.heads import evaluated, few_tokens

_LLAMA = ("self_attn.o_proj", "mlp.down_proj")
_NEOX = ("attention.dense", "mlp.dense_4h_to_h")
_BLOOM = ("self_attention.dense", "mlp.dense_4h_to_h")
_GPT2 = ("attn.c_proj", "mlp.c_proj")
_EXPERTS = ("self_attn.o_proj", "mlp.experts.down_proj|mlp.down_proj")  # some blocks have experts, others have none

# For each architecture: the parts of a block that write into the residual stream.
_OUTPUTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _LLAMA),
    **dict.fromkeys(("phi3", "olmo", "olmo2", "olmo3", "granite", "smollm3", "cohere", "cohere2"), _LLAMA),
    **dict.fromkeys(("stablelm", "helium", "glm", "glm4", "seed_oss", "arcee", "exaone4", "nemotron"), _LLAMA),
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe"), _EXPERTS),
    **dict.fromkeys(("bloom", "falcon"), _BLOOM),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _GPT2),
    "gpt_neox": _NEOX,
    "gpt_neo": ("attn.attention.out_proj", "mlp.c_proj"),
    "gptj": ("attn.out_proj", "mlp.fc_out"),
    "opt": ("self_attn.out_proj", "fc2"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "starcoder2": ("self_attn.o_proj", "mlp.c_proj"),
}


def find_outputs(model: Any, block: nn.Module, outputs: Sequence[str] | None = None) -> list[nn.Module | nn.Parameter]:
    """The parts of a block that write into the residual stream.

    Args:
        model: the block's model.
        block: one of its decoder blocks.
        outputs: names inside the block; None: as the architecture is known to have them.

    Raises:
        ValueError: if the architecture is not known, or has not these parts.
    """
    kind = model.config.get_text_config(decoder=True).model_type
    if outputs is None and kind not in _OUTPUTS:
        linear = [name for name, module in block.named_modules() if getattr(module, "weight", None) is not None]
        raise ValueError(
            f"model: the blocks of {architecture_of(model)} are not known; known are {', '.join(sorted(_OUTPUTS))}."
            f" Give outputs=[…], the names of the layers that write into the residual stream, from {linear}"
        )
    if outputs is not None and (isinstance(outputs, str) or not outputs):
        raise ValueError(f"outputs={outputs!r}: expected a list of names in a block, as ['attention.out', 'mlp.out']")
    found = []
    for names in _OUTPUTS[kind] if outputs is None else outputs:
        part = next((part for part in (_get(block, name) for name in names.split("|")) if part is not None), None)
        if part is None:
            raise ValueError(
                f"outputs: a block of {architecture_of(model)} has no layer or parameter {names!r}; it has"
                f" {sorted(dict(block.named_children()))}: give outputs=[…] with the names that it has"
            )
        found.append(part)
    return found


def silent_copy(model: Any, block: nn.Module, outputs: Sequence[str] | None = None) -> nn.Module:
    """A trainable copy of a block that adds nothing: the weights and biases of its output projections are 0.

    The copy shares the configuration of the model, and is in the block's mode. Quantised weights become 16-bit ones.

    Raises:
        ValueError: as :func:`find_outputs`.
    """
    shared = {id(config): config for config in _configs(model)}
    made: nn.Module = copy.deepcopy(block, shared)
    _replace_quantized(made)
    for parameter in made.parameters():
        parameter.requires_grad_(True)
    with torch.no_grad():
        for part in find_outputs(model, made, outputs):
            for parameter in part.parameters() if isinstance(part, nn.Module) else [part]:
                parameter.zero_()
    return made


def check_identity(model: Any, blocks: Sequence[nn.Module], outputs: Sequence[str] | None = None) -> None:
    """Runs a model on a few tokens to see that `blocks` give back their input to the bit, and can learn.

    A block could not learn if one zeroed projection read only the zeros of another one.

    Raises:
        ValueError: if they do not; the message says how large the difference is.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # nothing to run; the algebra of the known architectures stands for it
    changes: list[float] = []
    dead: list[bool] = []
    handles = [block.register_forward_hook(partial(_compare, changes), with_kwargs=True) for block in blocks]
    for block in blocks:
        for part in find_outputs(model, block, outputs):
            if isinstance(part, nn.Module):
                handles.append(part.register_forward_pre_hook(partial(_look, dead)))
    try:
        with evaluated(model):
            model(input_ids=few_tokens(model), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if len(changes) < len(blocks):
        raise ValueError(f"model: {architecture_of(model)} did not run its new blocks; expected one list of blocks")
    if any(change != 0 for change in changes):
        raise ValueError(
            f"model: a new block of {architecture_of(model)} changes its input by up to {max(changes):.2g} although its"
            " output projections are 0: a norm stands in the residual path, or outputs= misses a projection. Expected"
            " an architecture that adds attention and MLP to the input as it is (norms before them)"
        )
    if any(dead):
        raise ValueError(
            f"outputs={outputs!r}: in {architecture_of(model)} one zeroed layer reads the zeros of another, so that"
            " the new blocks could not learn; expected only the layers that write into the residual stream"
        )


def keep_unquantized(model: Any, indices: Sequence[int]) -> None:
    """Notes in the configuration of a quantised model that blocks have 16-bit weights, so that they load as such."""
    settings: Any = getattr(model.config, "quantization_config", None)
    if not hasattr(settings, "llm_int8_skip_modules"):
        return
    blocks = decoder_blocks(model)
    (prefix,) = (name for name, module in model.named_modules() if module is blocks)
    others = [name for name in settings.llm_int8_skip_modules or ["lm_head"] if not name.startswith(f"{prefix}.")]
    settings.llm_int8_skip_modules = others + [f"{prefix}.{index}" for index in indices]


def _get(block: nn.Module, path: str) -> nn.Module | nn.Parameter | None:
    part: Any = block
    for name in path.split("."):
        part = getattr(part, name, None)
    return part if isinstance(part, (nn.Module, nn.Parameter)) else None


def _configs(model: Any) -> list[Any]:
    """All configuration objects that the modules of a model share."""
    found = [getattr(module, "config", None) for module in model.modules()]
    return [config for config in found if config is not None]


def _replace_quantized(block: nn.Module) -> None:
    """Replaces the linear layers of bitsandbytes by plain ones."""
    plain = [parameter.dtype for parameter in block.parameters() if parameter.is_floating_point()]
    for name, module in list(block.named_modules()):
        if not type(module).__module__.startswith("bitsandbytes"):
            continue
        from peft.utils.integrations import dequantize_module_weight

        quantized: Any = module
        weight: Tensor = dequantize_module_weight(quantized).detach()
        bias = quantized.bias
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        dtype = plain[0] if plain else torch.bfloat16
        layer.weight = nn.Parameter(weight.to(dtype))
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(dtype))
        parent, _, last = name.rpartition(".")
        setattr(block.get_submodule(parent), last, layer.train(module.training))


def _compare(changes: list[float], module: Any, args: Any, kwargs: Any, output: Any) -> None:
    given = args[0] if args else kwargs["hidden_states"]
    made = output[0] if isinstance(output, tuple) else output
    same = (given == made) | (given.isnan() & made.isnan())
    changes.append(0.0 if bool(same.all()) else float((given - made).abs().max()))


def _look(dead: list[bool], module: Any, args: Any) -> None:
    dead.append(not bool(args[0].any()))
