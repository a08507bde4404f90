"""Adapters of several tasks on 4-bit and 8-bit bases: they learn, and the base keeps every bit."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from adapting import Sentences, base_model
from toys import trainer

from lightning_cl import CausalLM, InfLoRA, OrthogonalLoRA, TaskDataModule, TaskMatrix, fit_tasks
from lightning_cl.callbacks.architecture.summed_adapters import adapted_layers, down_projections
from lightning_cl.models.adapters import adapter_of

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
]
TASKS = {"a": Sentences(1), "b": Sentences(2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    base_model(torch.bfloat16, hidden_size=64, num_hidden_layers=1).save_pretrained(path)
    return path


def base_bytes(module):
    """Every tensor that belongs to no adapter, bit for bit."""
    kept = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if "lora_" not in name:
            kept[name] = tensor.detach().clone().contiguous().view(torch.uint8)
    return kept


@pytest.mark.parametrize(
    ("make", "quantization"),
    [
        (lambda: OrthogonalLoRA(hard=True), "nf4"),
        (lambda: InfLoRA(0.5, batches=2), "int8"),
    ],
    ids=["OrthogonalLoRA", "InfLoRA"],
)
def test_two_tasks_are_learnt_around_a_quantised_base(tmp_path, folder, make, quantization):
    torch.manual_seed(0)
    module = CausalLM(
        folder,
        lambda p: torch.optim.AdamW(p, lr=0.02),
        schedule=None,
        lora={"r": 4},
        quantization=quantization,
        dtype="float32",
    )
    module.configure_model()
    before, method, matrix = base_bytes(module), make(), TaskMatrix()
    data = TaskDataModule(TASKS, batch_size=4)
    fit_tasks(trainer(tmp_path, [method, matrix], max_epochs=2), module, data)
    after = base_bytes(module)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert any(tensor.dtype in (torch.uint8, torch.int8) for tensor in module.state_dict().values())
    rows = matrix.matrix  # before training, after a, after b
    assert rows[1, 0] < rows[0, 0]
    assert rows[2, 1] < rows[1, 1]
    for layer in adapted_layers(module).values():
        assert all(layer.lora_B[adapter_of(module, task)].weight.abs().max() > 0 for task in TASKS)
    if isinstance(method, InfLoRA):
        assert method.report()["tasks"]["b"]["protected_share"] < 1e-10
        return
    first, second = (down_projections(module, task) for task in TASKS)
    assert all((first[path] @ second[path].T).abs().max() < 1e-5 for path in first)
