"""Small Llamas with LoRA that the tests of adapters share."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from toys import TINY_LLAMA
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 300
SIZES = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": VOCABULARY}
IDS = torch.arange(3 * 9).view(3, 9) * 7 % VOCABULARY


def base_model(dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_LLAMA | SIZES | sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model.to(dtype)


def peft_model(dtype=torch.float32, sizes=None, **lora):
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    return get_peft_model(base_model(dtype, **(sizes or {})), LoraConfig(**config))


def move(module, tasks, size=0.2):
    """Adapters as training leaves them: no factor is zero."""
    from lightning_cl.models.adapters import adapter_parameters

    for i, task in enumerate(tasks):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for parameter in adapter_parameters(module, task).values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


@torch.no_grad()
def logits(model, ids=IDS):
    return model.eval()(input_ids=ids).logits
