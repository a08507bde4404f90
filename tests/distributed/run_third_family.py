"""Runs with methods of the third family on any number of processes; test_third_family_on_ranks.py starts it once."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

import lightning as L  # noqa: E402
import torch  # noqa: E402
from adapting import Sentences, SomebodysAdapter, base_model  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.strategies import ModelParallelStrategy  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from toys import Classifier, classification, trainer  # noqa: E402

from lightning_cl import (  # noqa: E402
    EWC,
    L2SP,
    MIGU,
    SI,
    BlockExpansion,
    ForgettingBudget,
    InputFreeze,
    Interpolate,
    KLBudget,
    LossCurves,
    Merge,
    ProgressiveAdapters,
    ProgressiveNetwork,
    RecoveryProbe,
    SubspaceFreeze,
    TaskAdapters,
    TaskDataModule,
    TaskMatrix,
    WeightAverage,
    fit_tasks,
)
from lightning_cl.core.placement import full_cpu  # noqa: E402

NUMBERS = {name: classification(i, 40) for i, name in enumerate("abc")}
TEXTS = {name: Sentences(i + 1) for i, name in enumerate("ab")}
DDP = {
    "interpolate": lambda: [Interpolate(0.5, during=0.5), EWC(0.1, samples=16, apply="proximal"), SubspaceFreeze(0.5)],
    "merge": lambda: [Merge("magmax"), WeightAverage(0.9), MIGU(0.5)],
    "inputs": lambda: [
        InputFreeze(0.8, batches=4),
        L2SP(KLBudget(0.1, every=2, outputs=lambda module, batch: module(batch[0]))),
        LossCurves(every=4, samples=7),
        RecoveryProbe(steps=2, samples=12, held_out=9),
    ],
    "rollback": lambda: [
        ForgettingBudget(0.0, "nats", every=2, samples=16, action=["rollback", "lr", "rollback"], patience=1),
        SI(1e-3),
        EWC(1e-3, samples=16),
        ModelCheckpoint(),
    ],
    "adapters": lambda: [TaskAdapters(seed=3)],
    "progressive adapters": lambda: [ProgressiveAdapters(seed=3)],
    "progressive network": lambda: [ProgressiveNetwork(4, seed=3)],
    "blocks": lambda: [BlockExpansion(1)],
}
SHARDED = {
    "sharded subspaces": lambda: [Interpolate(0.5, during=0.5), SubspaceFreeze(0.5, others="trained")],
    "sharded average": lambda: [Merge("mean"), WeightAverage(0.5)],
    "sharded ties": lambda: [Merge("ties", tasks="independent")],
    "sharded inputs": lambda: [InputFreeze(0.8, batches=4, general=NUMBERS["c"])],
}
STACKS = DDP | SHARDED
LORA = ("adapters", "progressive adapters")
WHOLE = ("progressive network", "blocks")


class Sharded(Classifier):
    """Somebody's module with FSDP2."""

    sharded = False

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not self.sharded:
            self.sharded = True
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class SomebodysModel(L.LightningModule):
    """A third-party module with a language model in it."""

    def __init__(self):
        super().__init__()
        self.model = base_model()

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def main(out: Path, ranks: int, kind: str) -> None:
    """Two or three tasks, and what this rank ends with."""
    L.seed_everything(1, verbose=False)
    methods, matrix = STACKS[kind](), TaskMatrix()
    strategy = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
    if ranks > 1 and kind in SHARDED:
        parallel = ModelParallelStrategy(ranks, 1, save_distributed_checkpoint=False)
        strategy = {"strategy": parallel, "devices": ranks}
    run = trainer(str(out), [*methods, matrix], max_epochs=2, **strategy)
    texts = kind in LORA + WHOLE
    if texts:
        module = SomebodysAdapter(dropout=0.0) if kind in LORA else SomebodysModel()
    else:
        module = Sharded(lr=0.3 if kind == "rollback" else 0.05)
    data = TaskDataModule(TEXTS if texts else NUMBERS, batch_size=(4 if texts else 8) // ranks)
    fit_tasks(run, module, data)
    found = {name: full_cpu(value) for name, value in module.state_dict().items()}
    found["matrix"] = matrix.matrix
    if kind == "inputs":
        penalty, curves, probe = methods[1:]
        found["strengths"] = torch.tensor([choice["strength"] for choice in penalty.report()["chosen"]])
        found |= {f"curve of {name}": torch.tensor(points) for name, points in curves.curves.items()}
        found |= {f"recovery of {name}": torch.tensor(one["after"]) for name, one in probe.results["c"].items()}
    if kind == "rollback":
        looks = methods[0].looks
        assert {"rollback, lr", "rollback, stop"} <= {look["action"] for look in looks}, looks
        found["looks"] = torch.tensor([[float(look[key]) for key in ("step", "D", "SE", "n")] for look in looks])
        found["acted"] = torch.tensor([float(len(look["action"])) for look in looks])
    torch.save(found, out / f"rank{run.global_rank}-{kind}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for stack in sys.argv[3:] or STACKS:
        main(Path(sys.argv[1]), int(sys.argv[2]), stack)
