"""Rehearsal without stored data: the model itself writes the samples to rehearse."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_integer, check_positive
from lightning_cl.buffers import ReplayBuffer
from lightning_cl.callbacks.replay.mixer import Mixer, check_plannable, check_together
from lightning_cl.callbacks.replay.rehearsal import Prompt, as_sample, choose
from lightning_cl.callbacks.replay.rehearsal_prompts import UserTurn, beginning_of, read_prompts, start_of_text
from lightning_cl.callbacks.replay.sample_writer import SampleWriter, WritingSettings
from lightning_cl.callbacks.replay.stored import BufferCallback
from lightning_cl.core.checks import refuse_sharded
from lightning_cl.core.questions import Need, Trait
from lightning_cl.data.batch_source import TaskBatches, is_stream
from lightning_cl.data.foreign_loader import task_indices
from lightning_cl.data.mixing.plan import MixMode, seed_of
from lightning_cl.data.text.answer_ends import ends_of_answers
from lightning_cl.data.text.chat import has_template
from lightning_cl.data.text.tokenizer import end_tokens, pad_token_id, start_tokens
from lightning_cl.passes.generation import Written, generator_of, prompt_tokens


class SelfReplay(BufferCallback):
    """Rehearsal of samples that the model writes itself (LAMOL, Sun et al. 2020; SSR, Huang et al. 2024).

    Before each task, also the first, the model writes texts with its present weights. In the task they have the share
    `ratio` of the tokens that bear loss, like the stored samples of :class:`~lightning_cl.Replay`. No samples of
    earlier tasks are needed, and no data that a base model was trained on, which is usually not available. The model
    continues from:

    * `prompts`: instructions, which it answers in the tokenizer's chat template, or, without a template, texts;
    * without `prompts`, with a chat template: the template up to the user's words. The model writes the instruction
      too, and then answers it (Magpie, Xu et al. 2024);
    * without `prompts` and without a template: the start token. The model writes free text (LAMOL). If the tokenizer
      has no start token, the end token is used, after which pretrained models have seen texts begin. The tasks' own
      texts begin without it, so the model also continues from the first tokens of samples of each earlier task: one
      token of each of `samples` samples is stored;
    * with `examples`, also the stored beginnings of `examples` samples of each earlier task: the tokens before
      the last answer, or the first tokens of a text, at most 32.

    Each earlier task whose beginnings are stored has an equal share, and all other starts together have one such share.

    The model's text bears loss, including its end token; an instruction that the model wrote does not. Texts that are
    too short, noise, repetitive, duplicates, or outliers in their perplexity are left out, and counted in the report
    (:mod:`lightning_cl.callbacks.replay.rehearsal`). A model that has learnt nothing yet writes noise; then nothing is
    rehearsed.

    The samples are written anew for each task, by the model that has learnt one task more and has rehearsed its earlier
    texts. Texts of an older model would no longer fit the present one. The price is that mistakes are copied from task
    to task.

    With ``top_p=1`` and ``LwF(temperature=1, teacher="base", where="replayed")``, the base writes the texts of the
    first task from the start token alone. They give an unbiased estimate of the KL divergence from the base's texts to
    the model's: ``E_{y ~ base} Σ_t KL(base(· | y_<t) ‖ model(· | y_<t))``, without texts that the filters leave out and
    tokens after `max_new_tokens` (``configs/methods/self_replay_to_base.yaml``).

    Memory: the samples, 4 bytes and a bit per token, in checkpoints too. Compute: up to ``samples · max_new_tokens``
    tokens are generated before each task (twice as many if the model writes the instructions), `batch_size` texts at a
    time on each rank. Per step, see :class:`~lightning_cl.Replay`. Each batch of texts is kept in
    ``$LIGHTNING_CL_CACHE``, and a run that is killed resumes from there.

    Args:
        samples: the number of texts that are written before each task; those that pass the filters are kept.
        ratio: share of rehearsed tokens, from 0 (writes texts, and rehearses none) to below 1; or another value that
            :class:`~lightning_cl.Replay` accepts.
        prompts: a list of texts, a ``.txt`` file with one on each line, or a ``.jsonl`` file of records with ``prompt``
            or ``instruction``. None: the model writes the instructions, or free text.
        examples: the number of samples of each task whose beginnings are stored for later tasks.
        max_new_tokens: the most tokens of a text.
        min_new_tokens: shorter texts are left out.
        temperature: the number that logits are divided by; 1 is the model's own distribution.
        top_p: draw from the fewest most probable tokens that together have this probability; 1: from all.
        batch_size: the number of texts that each rank writes at a time.
        mode: ``replace``: rehearsed samples replace samples of the batch. ``add``: they are added to it.
        seed: seed for the writing and for the choice of rehearsed samples.

    Attributes:
        buffer: the :class:`~lightning_cl.buffers.ReplayBuffer` with the samples of the current task.
        written: for each task the numbers of its samples: written, kept, rejected by reason, tokens, seconds.

    Raises:
        ValueError, TypeError, FileNotFoundError: if an argument is out of its range, or `prompts` cannot be read.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import SelfReplay
        >>> method = SelfReplay(samples=100, prompts=["Tell me a story."])
        >>> trainer = L.Trainer(callbacks=[method], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> method.report()["samples"]
        100
    """

    owns = "the buffer of SelfReplay"
    replays_first = True

    relies_on: frozenset[Trait] = frozenset({"earlier samples"})

    def __init__(
        self,
        samples: int = 500,
        ratio: float | str | list[list[float]] = 0.05,
        prompts: list[str] | str | None = None,
        examples: int = 0,
        max_new_tokens: int = 256,
        min_new_tokens: int = 4,
        temperature: float = 1.0,
        top_p: float = 0.95,
        batch_size: int = 8,
        mode: MixMode = "replace",
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("samples", samples, 1),
            ("examples", examples, 0),
            ("max_new_tokens", max_new_tokens, 1),
            ("min_new_tokens", min_new_tokens, 1),
            ("batch_size", batch_size, 1),
        ):
            check_integer(name, value, least, f"an integer of at least {least}")
        if min_new_tokens > max_new_tokens:
            raise ValueError(f"min_new_tokens={min_new_tokens}: it is more than max_new_tokens={max_new_tokens}")
        self.temperature = check_positive("temperature", temperature, "a number above 0")
        self.top_p = check_positive("top_p", top_p, "a number above 0 and at most 1", most=1)
        # The buffer is in RAM: it is written anew for each task, and checkpoints contain it.
        super().__init__(ReplayBuffer(samples, seed=check_integer("seed", seed)), "memory")
        self.samples, self.examples, self.seed = samples, examples, seed
        self.mixer = Mixer(ratio, mode)
        self.prompts = read_prompts(prompts) if prompts is not None else None
        self.max_new_tokens, self.min_new_tokens = max_new_tokens, min_new_tokens
        self.batch_size = batch_size
        self.beginnings: dict[str, list[list[int]]] = {}
        self.written: dict[str, dict[str, Any]] = {}
        self._written_for: int | None = None  # number of tasks before the one that the samples are for

    @property
    @override
    def mixes(self) -> bool:
        return True  # the samples are written when the loader needs them

    @property
    @override
    def replays(self) -> bool:
        return self.mixer.replays

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_together(self.run)
        refuse_sharded(trainer, f"{type(self).__name__}: a model cannot write with")

    @override
    def check_loader(self, loader: Any, task: str) -> None:
        check_plannable(loader, type(self).__name__, task)
        if is_stream(loader):
            for argument, wrong in (
                ("mode='add'", self.mixer.mode == "add"),
                (f"examples={self.examples}", self.examples),
            ):
                if wrong:
                    raise MisconfigurationException(
                        f"{type(self).__name__}({argument}): the training data of task {task!r} is a stream, which is"
                        " read as it is trained on; give mode='replace' and examples=0"
                    )
            return
        sample = loader.dataset[0] if len(loader.dataset) else None
        if not isinstance(sample, dict) or not {"input_ids", "loss_mask"} <= sample.keys():
            holds = f"the keys {sorted(map(str, sample))}" if isinstance(sample, dict) else type(sample).__name__
            raise MisconfigurationException(
                f"{type(self).__name__}: a sample of task {task!r} holds {holds}; it has to stand in one batch with"
                ' what the model writes, {"input_ids", "loss_mask"}, as the samples of text tasks in TaskDataModule do'
            )

    @override
    def on_sequence_start(self) -> None:
        self._written_for = None  # the samples may be from other weights

    @override
    def mix_into(self, trainer: L.Trainer, loader: TaskBatches) -> None:
        # Texts are written here and not at the end of the previous task. So the first task has them too, they come from
        # the weights that this task starts from, and a checkpoint is loaded before. A preflight's plan calls this too,
        # at its end, and writes nothing then.
        if self._written_for != self.tasks_done and trainer.state.status == TrainerStatus.RUNNING:
            self._write(trainer)
            self._written_for = self.tasks_done
        if not self.replays:
            return
        number, seed = self.tasks_done + 1, seed_of(self.seed, self.tasks_done)
        name = type(self).__name__
        self.mixer.mix_into(trainer, self.run, loader, self.buffer, number=number, seed=seed, method=name)

    def earlier_tasks(self) -> int:
        """Returns 0: all samples are written by this run's model."""
        return 0

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Only beginnings of the task's samples are stored.
        assert self.task is not None
        loader: Any = trainer.train_dataloader
        count = self.examples or (self.samples if self._needs_first_tokens(trainer) else 0)
        if count == 0 or is_stream(loader):
            return
        indices = task_indices(loader)
        chosen = self._random().sample(indices, min(count, len(indices)))
        kept = [beginning_of(loader.dataset[index]) for index in chosen]
        self.beginnings[self.task.name] = kept if self.examples else [ids[:1] for ids in kept]

    def _needs_first_tokens(self, trainer: L.Trainer) -> bool:
        """Returns True if the model writes free text, and the tokenizer has no start token for it."""
        _, tokenizer, _ = _parts_of(trainer)
        return self.prompts is None and not has_template(tokenizer) and not start_tokens(tokenizer)

    def _random(self) -> random.Random:
        """Returns a generator that differs between tasks, and is the same on all ranks."""
        return random.Random(seed_of(self.seed, self.tasks_done))

    # ------------------------------------------------------------------ writing

    def _write(self, trainer: L.Trainer) -> None:
        """Fills the buffer with texts that the model writes now."""
        start = time.monotonic()
        model, tokenizer, max_length = _parts_of(trainer)
        name = self.run.position.name if self.run.driven else f"task-{self.tasks_done}"
        settings = WritingSettings(self.max_new_tokens, max_length, self.temperature, self.top_p, self.batch_size)
        writer = SampleWriter(trainer, model, pad_token_id(tokenizer), settings)

        def write(prompts: Sequence[Prompt], ends: Sequence[int], stage: int) -> list[Written]:
            seeds = [seed_of(self.seed, self.tasks_done, stage, row) for row in range(len(prompts))]
            label = f"SelfReplay: the model writes samples for {name!r}"
            return writer.write([prompt.ids for prompt in prompts], seeds, ends, label)

        count = min(self.samples, self.batch_size) if trainer.fast_dev_run else self.samples  # type: ignore[attr-defined]
        rejected: Counter[str] = Counter()
        prompts = self._prompts(tokenizer, count, write, rejected)
        room = None if max_length is None else max_length - self.min_new_tokens - 1
        fitting = [prompt for prompt in prompts if room is None or len(prompt.ids) <= room]
        rejected["long"] += len(prompts) - len(fitting)
        texts = write(fitting, ends_of_answers(tokenizer), 1)
        chosen, why = choose(fitting, texts, self.min_new_tokens, model.config.get_text_config().vocab_size)
        rejected.update(why)
        kept = self._store([(as_sample(fitting[index], texts[index]), fitting[index].task) for index in chosen])
        rejected["removed"] += len(chosen) - kept
        self.written[name] = {
            "written": count,
            "kept": kept,
            "rejected": {reason: number for reason, number in rejected.items() if number},
            "tokens": writer.tokens,
            "seconds": time.monotonic() - start,
        }
        self.run.begin_seconds += time.monotonic() - start
        self._tell(name)

    def _prompts(
        self, tokenizer: Any, count: int, write: Callable[..., list[Written]], rejected: Counter[str]
    ) -> list[Prompt]:
        """Returns `count` prompts, without unfinished or empty instructions of the model."""
        groups = 1 + len(self.beginnings)
        share, *shares = [count // groups + (group < count % groups) for group in range(groups)]
        if self.prompts is not None:
            given = [Prompt(tuple(prompt_tokens(tokenizer, text, has_template(tokenizer)))) for text in self.prompts]
            prompts = self._cycled(given, share)
        elif has_template(tokenizer):
            turn = UserTurn.of(tokenizer)
            asked = write([Prompt(turn.ids)] * share, [*end_tokens(tokenizer), *turn.ends], 0)
            words = [turn.words(text, tokenizer) for text in asked]
            rejected.update("unfinished" if said is None else "short" for said in words if not said)
            prompts = [Prompt(tuple(prompt_tokens(tokenizer, said, chat=True))) for said in words if said]
        else:
            prompts = [start_of_text(tokenizer)] * share
        for (task, beginnings), share in zip(self.beginnings.items(), shares, strict=True):
            # Nothing predicts a single first token, so such a text counts as free text.
            begun = [Prompt(tuple(ids), f"self:{task}", learnt=len(ids) == 1) for ids in beginnings]
            prompts += self._cycled(begun, share)
        return prompts

    def _cycled(self, prompts: list[Prompt], count: int) -> list[Prompt]:
        """Repeats prompts until there are `count`, in another order for each task."""
        order = self._random().sample(prompts, len(prompts))
        return [order[i % len(order)] for i in range(count)]

    def _store(self, samples: Sequence[tuple[dict[str, Tensor], str]]) -> int:
        """Replaces the buffer's content by samples with their tasks; returns their number."""
        self.buffer.clear()
        for sample, task in samples:
            self.buffer.add(sample, task)  # the buffer refuses samples that a user has removed
        return len(self.buffer)

    def _tell(self, name: str) -> None:
        told = rank_zero_info if self.written[name]["kept"] or self._knows_nothing(name) else rank_zero_warn
        told(self._sentence(name))

    def _knows_nothing(self, name: str) -> bool:
        """Returns True if texts were noise, as those of a model before its first training."""
        return "noise" in self.written[name]["rejected"]

    def _sentence(self, name: str) -> str:
        counts = self.written[name]
        reasons = ", ".join(f"{number} {reason}" for reason, number in counts["rejected"].items())
        nothing = "" if counts["kept"] else "; nothing is rehearsed"
        return (
            f"SelfReplay, for {name}: {counts['kept']} of {counts['written']} texts kept"
            f"{f' (rejected: {reasons})' if reasons else ''}{nothing}; {counts['tokens']:,} tokens in"
            f" {counts['seconds']:.0f} s"
        )

    # ------------------------------------------------------------------ state

    @override
    def continual_state(self) -> dict[str, Any]:
        return {
            **super().continual_state(),
            "written_for": self._written_for,
            "beginnings": {task: [list(ids) for ids in kept] for task, kept in self.beginnings.items()},
            "written": {
                name: {**counts, "rejected": dict(counts["rejected"])} for name, counts in self.written.items()
            },
        }

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        if state["buffer"]["capacity"] != self.samples:
            raise ValueError(
                f"samples={self.samples} does not fit the checkpoint, which was written with"
                f" {state['buffer']['capacity']}"
            )
        super().load_continual_state(state)
        self._written_for = state["written_for"]
        self.beginnings = {task: [list(ids) for ids in kept] for task, kept in state["beginnings"].items()}
        self.written = {name: dict(counts) for name, counts in state["written"].items()}

    @override
    def state_bytes(self) -> int:
        kept = sum(4 * len(ids) for beginnings in self.beginnings.values() for ids in beginnings)
        return super().state_bytes() + kept

    @override
    def report(self) -> dict[str, Any]:
        return {
            "ratio": self.mixer.ratio,
            "mode": self.mixer.mode,
            "samples": self.samples,
            "beginnings": {task: len(kept) for task, kept in self.beginnings.items()},
            "stored": self.buffer.counts(),
            "tasks": self.written,
            "sentences": [self._sentence(name) for name in self.written],
        }

    @override
    def advice(self, need: Need) -> str | None:
        return f"a {'larger' if need == 'keep' else 'smaller'} SelfReplay(ratio=…)"


def _parts_of(trainer: L.Trainer) -> tuple[Any, Any, int | None]:
    """Returns the model that writes, its tokenizer, and the most tokens that a sample may have.

    Raises:
        MisconfigurationException: if there is no model or no tokenizer; it names what is needed.
    """
    module, data = trainer.lightning_module, getattr(trainer, "datamodule", None)
    model = generator_of(module)
    if model is None:
        raise MisconfigurationException(
            f"SelfReplay: nothing in {type(module).__name__} can write text: it needs a transformers model, with"
            " generate(), in one of its attributes"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise MisconfigurationException(
            f"SelfReplay: {type(model).__name__} has an encoder and a decoder; it needs a model that continues texts"
        )
    tokenizer = next(
        (t for owner in (data, module) if hasattr(t := getattr(owner, "tokenizer", None), "eos_token_id")), None
    )
    if tokenizer is None:
        raise MisconfigurationException(
            "SelfReplay: needs the model's tokenizer: give TaskDataModule(tokenizer=…), or a module with an attribute"
            " `tokenizer`"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (getattr(data, "max_length", None), positions) if isinstance(limit, int)]
    return model, tokenizer, min(limits, default=None)
