"""A-GEM on two processes is A-GEM on one: with DDP at its most delicate, and with sharded parameters."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import forked
import pytest
import torch

ROOT = Path(__file__).parents[2]


def main(out: str, kind: str) -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    warnings.simplefilter("ignore")
    import lightning as L
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from torch.utils.data import TensorDataset
    from toys import Classifier, classification, trainer

    from lightning_cl import TaskDataModule, fit_tasks
    from lightning_cl.callbacks.replay.agem import AGEM
    from lightning_cl.core.placement import full_cpu

    class TwoHeads(Classifier):
        """Classes from 3 on have a head of their own: one of the two has no gradient in a batch."""

        sharded = False

        def __init__(self):
            super().__init__()
            self.second = nn.Linear(16, 3)

        def configure_model(self):
            if kind == "sharded" and not self.sharded:
                self.sharded = True
                for part in (self.net[0], self.net[4], self.second):
                    fully_shard(part, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch, batch_idx):
            x, y = batch
            is_second = bool((y >= 3).all())
            hidden = self.net[:4](x)
            return nn.functional.cross_entropy((self.second if is_second else self.net[4])(hidden), y % 3)

        def validation_step(self, batch, batch_idx):
            pass

    ranks = 1 if kind == "one" else 2
    strategy = {
        "one": "auto",
        # The task's gradients lie in the buckets of DDP, and it looks for parameters without gradient.
        "ddp": DDPStrategy(gradient_as_bucket_view=True, find_unused_parameters=True),
        "sharded": ModelParallelStrategy(
            data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=False
        ),
    }[kind]
    L.seed_everything(1, verbose=False)
    method, module = AGEM(20), TwoHeads()
    run = trainer(out, [method], max_epochs=2, strategy=strategy, devices=ranks, accumulate_grad_batches=2)
    x, y = classification(1, 48).tensors
    tasks = {"a": TensorDataset(x, y), "b": TensorDataset(x, (y + 1) % 3 + 3), "c": TensorDataset(x, (y + 1) % 3)}
    fit_tasks(run, module, TaskDataModule(tasks, batch_size=8 // ranks))
    result = {
        "weights": {name: full_cpu(value) for name, value in module.state_dict().items()},
        "interference": method.interference,
    }
    torch.save(result, f"{out}/rank{run.global_rank}.pt")


def run(out, kind):
    out.mkdir()
    forked.run_ranks(1 if kind == "one" else 2, __file__, out, kind)
    return [torch.load(path, weights_only=True) for path in sorted(out.glob("rank*.pt"))]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory.mktemp("agem") / "one", "one")[0]


@pytest.mark.parametrize("kind", ["ddp", "sharded"])
def test_two_ranks_are_one_process(tmp_path, one, kind):
    first, second = run(tmp_path / kind, kind)
    assert first["interference"] == second["interference"]
    for name, value in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-4, atol=1e-6)
    for task, counts in one["interference"].items():
        ours = dict(first["interference"][task])
        assert ours.pop("cosines") == pytest.approx(counts["cosines"], rel=1e-3)
        assert ours == {key: value for key, value in counts.items() if key != "cosines"}
    assert 0 < sum(counts["projected"] for counts in one["interference"].values()) < 12


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
