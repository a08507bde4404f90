"""The mean over an optimizer step's tokens: however its batches are accumulated, cut off, or spread over processes."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import forked
import pytest
import torch

ROOT = Path(__file__).parents[2]
ANIMALS = ("cat", "dog", "owl", "hen", "fox")
# Of different lengths: answers of 1 to 30 tokens.
TASKS = {
    "a": [f"the {animal} sleeps{' in the barn' * (i % 4)}" for i, animal in enumerate(ANIMALS * 2)],
    "b": [f"def {animal}(x): return x{' + x * x' * (i % 3)}" for i, animal in enumerate(ANIMALS * 2)],
}


def main(out: str, ranks: int, batch_size: int, accumulated: int, mean_over: str = "step") -> None:
    """Two tasks of ten texts, so that the last step of an epoch has a quarter of the samples."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    warnings.simplefilter("ignore")
    import lightning as L
    from toys import TINY_LLAMA, trainer

    from lightning_cl import EWC, L2SP, CausalLM, LwF, TaskDataModule, TrainedBPE, fit_tasks

    L.seed_everything(1, verbose=False)
    tokenizer = TrainedBPE(280, str(Path(out) / "vocabulary")).train(TASKS["a"])
    module = CausalLM(TINY_LLAMA, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), schedule=None, mean_over=mean_over)
    methods = [L2SP(0.5, anchor="start"), EWC(5.0), LwF(1.0)]
    strategy = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
    run = trainer(out, methods, max_epochs=1, num_sanity_val_steps=0, accumulate_grad_batches=accumulated, **strategy)
    data = TaskDataModule(dict(TASKS), tokenizer=tokenizer, max_length=48, batch_size=batch_size)
    fit_tasks(run, module, data)
    torch.save(dict(module.lm.state_dict()), f"{out}/rank{run.global_rank}.pt")


def run(out: Path, *arguments: object) -> list[dict[str, torch.Tensor]]:
    out.mkdir()
    forked.run_ranks(int(str(arguments[0])), __file__, out, *arguments)
    return [torch.load(path, weights_only=True) for path in sorted(out.glob("rank*.pt"))]


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Steps of one batch each, in one process."""
    return run(tmp_path_factory.mktemp("runs") / "whole", 1, 8, 1)[0]


def test_accumulated_batches_give_the_step_of_one_batch(tmp_path, whole):
    assert difference(run(tmp_path / "four", 1, 2, 4)[0], whole) < 5e-6
    assert difference(run(tmp_path / "mean of means", 1, 2, 4, "batch")[0], whole) > 5e-4


def test_two_processes_give_the_step_of_one(tmp_path, whole):
    first, second = run(tmp_path / "two", 2, 2, 2)
    assert difference(first, second) == 0.0
    assert difference(first, whole) < 5e-6


def test_batches_of_equal_numbers_of_tokens_are_not_touched(tmp_path):
    """Bit for bit."""
    from toys import TINY_LLAMA, trainer

    from lightning_cl import CausalLM, TaskDataModule, TrainedBPE, fit_tasks

    weights = []
    for mean_over in ("step", "batch"):
        torch.manual_seed(1)
        tokenizer = TrainedBPE(280, str(tmp_path / "vocabulary")).train(TASKS["a"])
        module = CausalLM(TINY_LLAMA, mean_over=mean_over)
        data = TaskDataModule({"a": ["the cat sleeps", "the owl sleeps"] * 8}, tokenizer=tokenizer, batch_size=2)
        settings = {"max_steps": 3, "accumulate_grad_batches": 2, "num_sanity_val_steps": 0}
        fit_tasks(trainer(tmp_path / mean_over, **settings), module, data)
        weights.append(dict(module.lm.state_dict()))
    assert difference(*weights) == 0.0


def test_a_mean_over_something_else_is_refused():
    from lightning_cl import CausalLM

    with pytest.raises(ValueError, match="mean_over='window': expected one of"):
        CausalLM({"model_type": "llama"}, mean_over="window")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), *sys.argv[5:])
