"""DER++ on two processes is DER++ on one: one rank stores the logits, the other reads them."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import forked
import pytest
import torch

ROOT = Path(__file__).parents[2]


def main(out: str, ranks: int) -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    warnings.simplefilter("ignore")
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint
    from toys import Classifier, classification, trainer

    from lightning_cl import TaskDataModule, fit_tasks
    from lightning_cl.callbacks.replay.derpp import DERpp

    L.seed_everything(1, verbose=False)
    method = DERpp(40, 0.25, 5.0, outputs=lambda module, batch: module(batch[0]))
    strategy = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
    run = trainer(out, [method, ModelCheckpoint(out)], max_epochs=1, **strategy)
    module, tasks = Classifier(), {name: classification(seed) for seed, name in enumerate("abc")}
    fit_tasks(run, module, TaskDataModule(tasks, batch_size=8 // ranks))
    extras = {str(i): method.buffer.extra(n)["top_logits"] for i, n in enumerate(method.buffer.numbers)}
    files = method.report()["storage"]
    torch.save({"weights": module.state_dict(), "extras": extras, "storage": files}, f"{out}/rank{run.global_rank}.pt")


def run(out, ranks):
    out.mkdir()
    forked.run_ranks(ranks, __file__, out, ranks)
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_are_one_process(tmp_path):
    (one,), (first, second) = run(tmp_path / "one", 1), run(tmp_path / "two", 2)
    assert first["storage"] == "disk"
    assert len(one["extras"]) == 40
    for name, value in one["extras"].items():
        torch.testing.assert_close(first["extras"][name], value, rtol=1e-2, atol=1e-3)
        assert torch.equal(first["extras"][name], second["extras"][name])
    for name, value in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-3, atol=1e-5)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
