"""One run with methods of the third family on any number of processes; started by test_third_family_on_ranks.py."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
warnings.simplefilter("ignore")

import lightning as L  # noqa: E402
import torch  # noqa: E402
from adapting import Sentences, SomebodysAdapter  # noqa: E402
from toys import Classifier, classification, trainer  # noqa: E402

from lightning_cl import (  # noqa: E402
    EWC,
    L2SP,
    MIGU,
    InputFreeze,
    Interpolate,
    KLBudget,
    LossCurves,
    Merge,
    RecoveryProbe,
    SubspaceFreeze,
    TaskAdapters,
    TaskDataModule,
    TaskMatrix,
    WeightAverage,
    fit_tasks,
)

NUMBERS = {name: classification(i, 40) for i, name in enumerate("abc")}
TEXTS = {name: Sentences(i + 1) for i, name in enumerate("ab")}
STACKS = {
    "interpolate": lambda: [Interpolate(0.5, during=0.5), EWC(0.1, samples=16, apply="proximal"), SubspaceFreeze(0.5)],
    "merge": lambda: [Merge("magmax"), WeightAverage(0.9), MIGU(0.5)],
    "inputs": lambda: [
        InputFreeze(0.8, batches=4),
        L2SP(KLBudget(0.1, every=2, outputs=lambda module, batch: module(batch[0]))),
        LossCurves(every=4, samples=7),
        RecoveryProbe(steps=2, samples=12, held_out=9),
    ],
    "adapters": lambda: [TaskAdapters(seed=3)],
}


def main(out: str, ranks: int, kind: str) -> None:
    """Two or three tasks, and what this rank ends with."""
    L.seed_everything(1, verbose=False)
    methods, matrix = STACKS[kind](), TaskMatrix()
    strategy = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
    run = trainer(out, [*methods, matrix], max_epochs=2, **strategy)
    adapted = kind == "adapters"
    module = SomebodysAdapter(dropout=0.0) if adapted else Classifier(lr=0.05)
    data = TaskDataModule(TEXTS if adapted else NUMBERS, batch_size=(4 if adapted else 8) // ranks)
    fit_tasks(run, module, data)
    seen = {"matrix": matrix.matrix}
    if kind == "inputs":
        penalty, curves, probe = methods[1:]
        seen["strengths"] = torch.tensor([choice["strength"] for choice in penalty.report()["chosen"]])
        seen |= {f"curve of {name}": torch.tensor(points) for name, points in curves.curves.items()}
        seen |= {f"recovery of {name}": torch.tensor(found["after"]) for name, found in probe.results["c"].items()}
    torch.save({**module.state_dict(), **seen}, f"{out}/rank{run.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
