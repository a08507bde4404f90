"""One run of a sequence on any number of processes; started by test_ddp.py, saves what each rank ends with."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
warnings.simplefilter("ignore")

import lightning as L  # noqa: E402
import torch  # noqa: E402
from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402
from lightning.pytorch.strategies import ModelParallelStrategy  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from toys import Classifier, classification, trainer  # noqa: E402

from lightning_cl import (  # noqa: E402
    EWC,
    KFACEWC,
    L2SP,
    MAS,
    SI,
    ForgettingBudget,
    LwF,
    Replay,
    RWalk,
    TaskDataModule,
    TaskMatrix,
    fit_tasks,
)
from lightning_cl.core.placement import full_cpu  # noqa: E402


class Sharded(Classifier):
    """Somebody's module with FSDP2."""

    sharded = False

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not self.sharded:
            self.sharded = True
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Seen(Callback):
    """The samples that this rank trains on, by their first number."""

    def __init__(self):
        self.samples = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.samples.append(batch[0][:, 0].clone())


def penalties(out: str, ranks: int) -> None:
    """Three tasks with all penalties and a teacher; some measure fewer samples than there are ranks."""
    L.seed_everything(1, verbose=False)

    def logits(module, batch):
        return module(batch[0])

    methods = {
        "ewc": EWC("auto", samples=15, outputs=logits),
        "mas": MAS(0.1, samples=1, outputs=logits),
        "kfac": KFACEWC(0.1, samples=1, outputs=logits),
        "rwalk": RWalk(0.1, every=2),
        "l2sp": L2SP(0.1, anchor="start"),
        "lwf": LwF(1.0, outputs=logits),
        "guard": ForgettingBudget(0.0, "nats", every=4, samples=15, action=["lr", "stop"], patience=1, grace_steps=7),
    }
    strategy = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
    run = trainer(out, list(methods.values()), max_epochs=2, **strategy)
    module = Classifier(lr=0.05)
    fit_tasks(
        run, module, TaskDataModule({n: classification(i, 40) for i, n in enumerate("abc")}, batch_size=8 // ranks)
    )
    found = {name: method.importance for name, method in methods.items() if hasattr(method, "importance")}
    found["factors"] = {f"{n}.{i}": side for n, f in methods["kfac"].factors.items() for i, side in enumerate(f)}
    looks = methods["guard"].looks
    found["guard"] = {key: torch.tensor([float(look[key]) for look in looks]) for key in ("step", "D", "SE")}
    found["guard"]["acted"] = torch.tensor([float(len(look["action"])) for look in looks])
    found["teacher"] = methods["lwf"].teacher.copies
    found["weights"] = dict(module.state_dict())
    chosen = torch.tensor([choice["strength"] for choice in methods["ewc"].auto.chosen])
    torch.save(found | {"chosen": {"strengths": chosen}}, f"{out}/rank{run.global_rank}.pt")


def main(out: str, ranks: int, kind: str, ckpt_path: str | None) -> None:
    """Three tasks with every method at once."""
    L.seed_everything(1, verbose=False)
    batch_size = 8 // ranks
    tasks = {name: classification(i, 40) for i, name in enumerate("abc")}
    if kind == "loaders":
        data = {name: DataLoader(dataset, batch_size, shuffle=True) for name, dataset in tasks.items()}
    else:
        data = TaskDataModule(tasks, batch_size=batch_size)
    ewc = EWC(1.0, samples=15, outputs=lambda module, batch: module(batch[0]))
    si, replay, matrix, seen = SI(1.0), Replay(20, 0.25), TaskMatrix(), Seen()
    checkpoint = ModelCheckpoint(every_n_train_steps=3, save_top_k=-1, filename="{step}")
    strategy = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
    if kind == "sharded":
        parallel = ModelParallelStrategy(
            data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
        strategy = {"strategy": parallel, "devices": ranks}
    methods = [si, replay, matrix, seen, checkpoint]
    if kind not in ("sharded", "whole"):
        methods.insert(0, ewc)
    run = trainer(out, methods, max_epochs=2, **strategy)
    # Dropout: each rank draws its own numbers, which a checkpoint must keep for all ranks.
    module = Sharded(dropout=0.2 if kind == "dropout" else 0.0, optimizer=torch.optim.AdamW, lr=0.01)
    fit_tasks(run, module, data, ckpt_path)
    torch.save(
        {
            "weights": {name: full_cpu(value) for name, value in module.state_dict().items()},
            "ewc": ewc.importance,
            "si": {name: full_cpu(value) for name, value in si.importance.items()},
            "buffer": torch.stack([sample[0] for sample in replay.buffer.items]),
            "matrix": matrix.matrix,
            "seen": seen.samples,
        },
        f"{out}/rank{run.global_rank}.pt",
    )


if __name__ == "__main__":
    if sys.argv[3] == "penalties":
        penalties(sys.argv[1], int(sys.argv[2]))
    else:
        main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] if len(sys.argv) > 4 else None)
