"""Continual learning in a ``transformers.Trainer``, or one derived from it as TRL's ``SFTTrainer``.

::

    from lightning_cl import Task
    from lightning_cl.integrations.transformers import EWC, Replay, TaskMatrix, continual_args, fit_tasks

    def make_trainer(task):
        args = TrainingArguments(f"run/{task.name}", train_sampling_strategy="sequential", learning_rate=1e-4)
        return Trainer(model, continual_args(args), train_dataset=task.train, data_collator=collate)

    fit_tasks(make_trainer, [Task("chat", chat, val=chat_val), Task("code", code, val=code_val)],
              callbacks=[EWC(), Replay(ratio=0.05), TaskMatrix()], folder="run")

The callbacks also work in a Trainer of your own, without ``fit_tasks``: each call of ``train`` is one task. There is no
subclass of ``Trainer``.
"""

from lightning_cl.integrations._transformers.arguments import continual_args
from lightning_cl.integrations._transformers.callbacks import EWC, KFACEWC, L2SP, MAS, SI, Interpolate, Replay, RWalk
from lightning_cl.integrations._transformers.driver import load_state
from lightning_cl.integrations._transformers.matrix import TaskMatrix
from lightning_cl.integrations._transformers.replay_dataset import ReplayDataset
from lightning_cl.integrations._transformers.sequence import fit_tasks

__all__ = [
    "EWC",
    "KFACEWC",
    "L2SP",
    "MAS",
    "SI",
    "Interpolate",
    "RWalk",
    "Replay",
    "ReplayDataset",
    "TaskMatrix",
    "continual_args",
    "fit_tasks",
    "load_state",
]
