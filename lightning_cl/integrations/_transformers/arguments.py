"""Settings of a ``transformers.Trainer`` that would break continual learning without an error."""

from __future__ import annotations

from typing import Any, TypeVar

Arguments = TypeVar("Arguments")

_INSIDE_BACKWARD = ("lomo", "adalomo")


def continual_args(args: Arguments, replay: bool = True) -> Arguments:
    """Checks training arguments, and returns them unchanged.

    Each of the refused settings would leave a run without an error in which a penalty does nothing, the replayed share
    is another one, or a resumed run differs from an unbroken one. The callbacks call it when training begins.

    Three things are no errors, and good to know. A penalty's gradient is added after ``max_grad_norm`` has clipped that
    of the task, and in a Lightning Trainer before; ``apply="proximal"`` does not depend on it. SI's path integral uses
    the clipped gradient. Warm-up and schedules start anew with each Trainer, that is in each task.

    Args:
        args: ``TrainingArguments``, or a class derived from it as TRL's ``SFTConfig``.
        replay: True if the training data is a :class:`ReplayDataset` or its ``to_datasets()``.

    Returns:
        The arguments.

    Raises:
        ValueError: naming the first setting that does not fit, the reason, and what to use.

    Example:
        >>> from transformers import TrainingArguments
        >>> args = TrainingArguments(output_dir="run", train_sampling_strategy="sequential", report_to="none")
        >>> continual_args(args) is args
        True
    """
    for name, value, reason in _refused(args, replay):
        raise ValueError(f"{name}={value!r}: {reason}")
    return args


def _refused(args: Any, replay: bool) -> list[tuple[str, Any, str]]:
    found: list[tuple[str, Any, str]] = []

    def refuse(name: str, wrong: bool, reason: str) -> None:
        if wrong:
            value = getattr(args, name, None)
            found.append((name, getattr(value, "value", value), reason))

    strategy = getattr(args, "train_sampling_strategy", "random")
    if replay:
        refuse(
            "train_sampling_strategy",
            strategy != "sequential",
            "the plan of new and replayed samples is to be read in its order, which is random already; another order"
            " gives batches with too many replayed samples or none; use train_sampling_strategy='sequential'",
        )
        refuse(
            "packing",
            bool(getattr(args, "packing", False)),
            "packing cuts the plan of new and replayed samples into other pieces; use packing=False, or packed samples"
            " in `new` and in the buffer",
        )
    refuse(
        "ignore_data_skip",
        bool(getattr(args, "ignore_data_skip", False)),
        "a resumed run would train on the first samples of the epoch again; use ignore_data_skip=False",
    )
    saves = str(getattr(getattr(args, "save_strategy", "no"), "value", args.save_strategy)) != "no"
    refuse(
        "save_only_model",
        saves and bool(getattr(args, "save_only_model", False)),
        "a run that resumes without the optimizer's state is another run; use save_only_model=False, or"
        " save_strategy='no'",
    )
    refuse(
        "auto_find_batch_size",
        bool(getattr(args, "auto_find_batch_size", False)),
        "after an error for lack of memory it trains the task again from half-trained weights, which would become the"
        " anchor; use a batch size that fits, with gradient_accumulation_steps",
    )
    refuse(
        "fp16",
        bool(getattr(args, "fp16", False)),
        "squared gradients of single samples underflow in fp16, and steps that its loss scaling skips would count; use"
        " bf16=True or neither",
    )
    optim = str(getattr(getattr(args, "optim", ""), "value", getattr(args, "optim", "")))
    refuse(
        "optim",
        optim in _INSIDE_BACKWARD or optim.endswith("layerwise"),
        "it changes weights inside the backward pass, before a penalty is added: the penalty would do nothing; use"
        " 'adamw_torch' or another one that steps after it",
    )
    for name in ("deepspeed", "fsdp"):
        refuse(
            name,
            bool(getattr(args, name, None)),
            "parameters shared out over processes are not supported here; use one device, or the Lightning Trainer with"
            " FSDP2",
        )
    for name in ("world_size", "n_gpu"):
        refuse(
            name,
            int(getattr(args, name, 1)) > 1,
            "several devices are not supported here, since importances and buffers would differ between them; use one"
            " (CUDA_VISIBLE_DEVICES=0), or the Lightning Trainer with strategy='ddp'",
        )
    return found
