"""One LoRA adapter for each task, on any module that contains a ``PeftModel``.

The base is frozen, one adapter trains, all others rest: what an earlier task computes stays the same to the last bit.
peft's own switches change what is trainable as a side effect (``set_adapter`` and the end of ``disable_adapter``
unfreeze). These here do not, but for :func:`train_adapter`, which is there for it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args
from zlib import crc32

import torch
from torch import nn

from lightning_cl.models.adapter_factors import adapter_factors, check_products, mean_factors
from lightning_cl.models.adapter_names import RESERVED, adapter_name, task_name
from lightning_cl.models.loading import quiet_peft
from lightning_cl.random_state import seed_of, untouched_random_state

Init = Literal["fresh", "previous", "mean"]
Train = Literal["AB", "B"]

# ---------------------------------------------------------------------- what there is


def find_peft_model(module: nn.Module) -> Any:
    """The ``PeftModel`` with LoRA adapters that a module is or contains.

    Raises:
        ValueError: if there is none, or more than one, or it has adapters of another kind.
    """
    try:
        from peft import PeftModel, PeftType
    except ImportError as error:
        raise ValueError("adapters: peft is not installed: pip install peft") from error

    found = [part for part in module.modules() if isinstance(part, PeftModel)]
    if len(found) != 1:
        number = "no model with peft adapters, or it is not built yet" if not found else f"{len(found)} PeftModels"
        raise ValueError(
            f"{type(module).__name__}: it contains {number}; expected one, as CausalLM(lora={{'r': 8}}) has, or any"
            " module with a PeftModel in it"
        )
    kinds = {str(config.peft_type) for config in found[0].peft_config.values()} - {str(PeftType.LORA)}
    if kinds:
        raise ValueError(f"{type(module).__name__}: its adapters are of the kind {sorted(kinds)}; expected LoRA")
    return found[0]


def list_adapters(module: nn.Module) -> list[str]:
    """The tasks that have an adapter, in the order in which they got them."""
    return [task for task in map(task_name, find_peft_model(module).peft_config) if task is not None]


def adapter_of(module: nn.Module, task: str) -> str:
    """The name in peft of a task's adapter, or of the adapter that has that very name.

    Raises:
        ValueError: if there is none; the message lists those that there are.
    """
    configs = find_peft_model(module).peft_config
    for name in (adapter_name(task), task):
        if name in configs:
            return name
    known = [task_name(name) or name for name in configs]
    raise ValueError(f"task={task!r}: it has no adapter; there are adapters of {known}")


def adapter_parameters(module: nn.Module, task: str) -> dict[str, nn.Parameter]:
    """All parameters of a task's adapter by their name in the module, with copies of whole layers that it trains."""
    name = adapter_of(module, task)
    return {path: p for path, p in module.named_parameters() if name in path.split(".")}


def adapter_bytes(module: nn.Module, task: str) -> int:
    """Returns the size of the parameters of a task's adapter, in bytes."""
    return sum(p.numel() * p.element_size() for p in adapter_parameters(module, task).values())


def is_untrained(module: nn.Module, task: str) -> bool:
    """Returns True if a task's adapter adds nothing to the base: the factors that begin as zero still are."""
    model, name = find_peft_model(module), adapter_of(module, task)
    return all(not bool(factors.second.any()) for factors in adapter_factors(model, name))


# ---------------------------------------------------------------------- allocation


def allocate_adapter(
    module: nn.Module, task: str, init: Init = "fresh", rank: int | None = None, seed: int = 0
) -> None:
    """Makes the adapter of a task, frozen, with the configuration of the module's template.

    The template is the adapter that the module came with (``default``). It is deleted as soon as the first task has an
    adapter: otherwise it would stay untrained, and be saved and merged instead of the tasks' adapters. Only then is the
    new adapter in use; otherwise the active adapter stays active. A task that has an adapter already keeps it as it is.

    The random factors depend on the seed and the task's name alone: they are the same on every device and process,
    and no global random state is moved.

    Memory: rank · Σ (inputs + outputs) of the adapted layers, in fp32 around a 16-bit base.

    Args:
        module: contains a ``PeftModel``.
        task: its name.
        init: ``fresh`` starts from the base; ``previous`` from a copy of the last task's adapter; ``mean`` from the
            mean of the products ``ΔW`` of all tasks so far, brought to the rank by a singular value decomposition. A
            first task is always fresh.
        rank: another rank than the template's; ``lora_alpha`` follows, so that ``lora_alpha / rank`` stays.
        seed: of the random factors.

    Raises:
        ValueError: if the module has no such template, the template has been trained, it is of a kind that cannot be
            had once for each task, or an argument is out of its range.
    """
    if init not in get_args(Init):
        raise ValueError(f"init={init!r}: expected one of {list(get_args(Init))}")
    if task in RESERVED:
        raise ValueError(f"task={task!r}: this name has a meaning of its own where a task is named; give another one")
    model, name = find_peft_model(module), adapter_name(task)
    if name in model.peft_config:
        return
    earlier = [adapter for adapter in model.peft_config if task_name(adapter) is not None]
    templates = [adapter for adapter in model.peft_config if adapter not in earlier]
    _check_templates(module, model, earlier, templates)
    config = copy.deepcopy(model.peft_config[[*templates, *earlier][0]])
    config.inference_mode = False
    if rank is not None:
        _set_rank(config, rank)
    if init == "mean" and earlier:
        check_products(model, earlier)
    with _as_it_was(model), untouched_random_state(), quiet_peft():
        model.add_adapter(name, config)
    for parameter in adapter_parameters(model, task).values():
        parameter.requires_grad_(False)
    _draw(model, name, config, seed_of(seed, crc32(task.encode())))
    if init == "previous" and earlier:
        _copy(model, earlier[-1], name)
    elif init == "mean" and earlier:
        _take_mean(model, earlier, name)
    if templates:
        _switch(model, [name], enabled=True)
        _delete(model, templates[0])


def remove_adapter(module: nn.Module, task: str) -> None:
    """Deletes the adapter of a task; if it was in use, the last of the others is from now on.

    Raises:
        ValueError: if the task has none, or it is the only one.
    """
    model, name = find_peft_model(module), adapter_of(module, task)
    others = [adapter for adapter in model.peft_config if adapter != name]
    if not others:
        raise ValueError(f"task={task!r}: it has the only adapter; a PeftModel needs one")
    active = [adapter for adapter in model.active_adapters if adapter != name]
    _switch(model, active or others[-1:], _enabled(model))
    _delete(model, name)


def fold_adapters(module: nn.Module, tasks: Sequence[str], name: str = "default") -> None:
    """Replaces the adapters of several tasks by one whose ``ΔW`` is the sum of theirs, exactly; it is frozen.

    Its rank is the sum of their ranks. It can be saved, served and merged as any LoRA adapter.

    Args:
        module: contains a ``PeftModel``.
        tasks: their names, at least one.
        name: of the new adapter in peft.

    Raises:
        ValueError: if one of them has no adapter, or is more than its products (DoRA, copies of whole layers).
    """
    model = find_peft_model(module)
    sources = [adapter_of(module, task) for task in tasks]
    parts = {factors.path: factors for factors in mean_factors(model, sources)}
    ranks = {path.removeprefix("base_model.model."): len(part.first) for path, part in parts.items()}
    config = copy.deepcopy(model.peft_config[sources[0]])
    # The scale is in the factors already: lora_alpha / r is 1 in each layer.
    config.use_rslora, config.r = False, max(ranks.values())
    config.lora_alpha = config.r
    others = {re.escape(path): rank for path, rank in ranks.items() if rank != config.r}
    config.rank_pattern, config.alpha_pattern = others, dict(others)
    with _as_it_was(model), untouched_random_state(), quiet_peft(), torch.no_grad():
        model.add_adapter(name, config)
        for factors in adapter_factors(model, name):
            factors.first.copy_(parts[factors.path].first)
            factors.second.copy_(parts[factors.path].second * len(sources))
    _switch(model, [name], enabled=True)
    for source in sources:
        _delete(model, source)
    for path, parameter in module.named_parameters():
        if name in path.split("."):
            parameter.requires_grad_(False)


def _delete(model: Any, adapter: str) -> None:
    with _as_it_was(model):
        model.delete_adapter(adapter)


def _check_templates(module: nn.Module, model: Any, earlier: list[str], templates: list[str]) -> None:
    if len(templates) > 1 or (templates and earlier):
        raise ValueError(
            f"{type(module).__name__}: besides the tasks' adapters it has {templates}; expected no other adapter than"
            " one template before the first task"
        )
    config = model.peft_config[[*templates, *earlier][0]]
    for setting, allowed in (("bias", ["none"]), ("init_lora_weights", [True, "gaussian"]), ("lora_bias", [False])):
        value = getattr(config, setting, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{setting}={value!r}: this changes or trains weights of the base, which all tasks share; expected"
                f" {' or '.join(map(repr, allowed))}"
            )
    if templates and not is_untrained(model, templates[0]):
        raise ValueError(
            f"{type(module).__name__}: its adapter {templates[0]!r} has been trained and would be deleted: the tasks'"
            " adapters take its place. Merge it into the base first (merge_and_unload), and begin with a fresh one"
        )


def _set_rank(config: Any, rank: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank={rank!r}: expected a positive integer, or None for the template's")
    if config.rank_pattern or config.alpha_pattern:
        raise ValueError(
            f"rank={rank}: the template has ranks of its own for some layers (rank_pattern); expected None"
        )
    alpha = config.lora_alpha * rank / config.r
    config.lora_alpha, config.r = int(alpha) if alpha.is_integer() else alpha, rank


@torch.no_grad()
def _draw(model: Any, name: str, config: Any, seed: int) -> None:
    """Draws the first factors as peft does (uniform, or normal), on the CPU in fp32; the second are zero."""
    generator = torch.Generator().manual_seed(seed)
    for factors in adapter_factors(model, name):
        drawn = torch.empty(factors.first.shape)
        if factors.embedding:
            drawn.normal_(generator=generator)
        elif config.init_lora_weights == "gaussian":
            drawn.normal_(std=1 / len(drawn), generator=generator)
        else:
            bound = drawn.shape[1] ** -0.5
            drawn.uniform_(-bound, bound, generator=generator)
        factors.first.copy_(drawn)
        factors.second.zero_()


@torch.no_grad()
def _copy(model: Any, source: str, target: str) -> None:
    ours = dict(model.named_parameters())
    for path, parameter in adapter_parameters(model, target).items():
        theirs = ours.get(".".join(source if part == target else part for part in path.split(".")))
        if theirs is None or theirs.shape != parameter.shape:
            raise ValueError(
                f"init='previous': the last task's adapter is {'absent' if theirs is None else list(theirs.shape)} at"
                f" {path}, the new one is {list(parameter.shape)}; expected the same layers and ranks"
            )
        parameter.copy_(theirs)


@torch.no_grad()
def _take_mean(model: Any, sources: Sequence[str], target: str) -> None:
    mean = {factors.path: factors for factors in mean_factors(model, sources)}
    for factors in adapter_factors(model, target):
        if factors.path not in mean:
            continue
        joint = mean[factors.path]
        # Of two thin matrices: the decomposition of the product without the product.
        q_in, r_in = torch.linalg.qr(joint.first.double().cpu().T)
        q_out, r_out = torch.linalg.qr(joint.second.double().cpu())
        u, s, v = torch.linalg.svd(r_out @ r_in.T)
        kept = min(len(s), len(factors.first))
        # The first factor keeps the size that it is drawn with: a direction without weight can still be learnt.
        size = factors.first.double().norm(dim=1).mean().cpu()
        factors.first[:kept].copy_(size * v[:kept] @ q_in.T)
        factors.second[:, :kept].copy_(q_out @ u[:, :kept] * s[:kept] / (size * factors.scale))


# ---------------------------------------------------------------------- which one works


def train_adapter(module: nn.Module, task: str, train: Train = "AB") -> None:
    """Puts the adapter of a task to use, makes it trainable, and freezes everything else in the module.

    Args:
        module: contains a ``PeftModel``.
        task: its name.
        train: ``AB`` trains both factors; ``B`` only the one that begins as zero, the random one stays.

    Raises:
        ValueError: if the task has no adapter, or an argument is out of its range.
    """
    if train not in get_args(Train):
        raise ValueError(f"train={train!r}: expected one of {list(get_args(Train))}")
    use_adapter(module, task)
    module.requires_grad_(False)
    for path, parameter in adapter_parameters(module, task).items():
        parts = path.split(".")
        parameter.requires_grad_(train == "AB" or not {"lora_A", "lora_embedding_B"} & set(parts))


def use_adapter(module: nn.Module, task: str | None) -> None:
    """Lets a module compute with the adapter of a task from now on; nothing becomes trainable or frozen.

    Args:
        module: contains a ``PeftModel``.
        task: its name; None: the base alone.

    Raises:
        ValueError: if the task has no adapter.
    """
    model = find_peft_model(module)
    names = list(model.active_adapters) if task is None else [adapter_of(module, task)]
    _switch(model, names, enabled=task is not None)


def use_adapters(module: nn.Module, tasks: Sequence[str]) -> None:
    """Lets a module compute with the sum of several tasks' adapters from now on; nothing becomes trainable or frozen.

    Args:
        module: contains a ``PeftModel``.
        tasks: their names, at least one.

    Raises:
        ValueError: if one of them has no adapter.
    """
    model = find_peft_model(module)
    _switch(model, [adapter_of(module, task) for task in tasks], enabled=True)


@contextmanager
def using_adapter(module: nn.Module, task: str | None) -> Iterator[None]:
    """:func:`use_adapter` inside; afterwards the module computes as before."""
    with keep_switches(find_peft_model(module)):
        use_adapter(module, task)
        yield


@contextmanager
def keep_switches(model: Any, enabled: bool | None = None) -> Iterator[None]:
    """Afterwards the same adapters of a ``PeftModel`` are in use as before; inside they may be turned on or off."""
    names, before = list(model.active_adapters), _enabled(model)
    if enabled is not None:
        _switch(model, names, enabled)
    try:
        yield
    finally:
        _switch(model, names, before)


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Keeps what is trainable, among the parameters that are still there."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, trainable in before:
            parameter.requires_grad_(trainable)


def _switch(model: Any, names: list[str], enabled: bool) -> None:
    with _as_it_was(model):
        model.base_model.set_adapter(names)
        model.active_adapter = names[0]
        if enabled:
            model.base_model.enable_adapter_layers()
        else:
            model.base_model.disable_adapter_layers()
        model._adapters_disabled = not enabled


def _enabled(model: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return not any(layer.disable_adapters for layer in model.modules() if isinstance(layer, BaseTunerLayer))
