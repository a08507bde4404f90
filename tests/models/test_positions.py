"""Samples longer than a model's positions are found before training."""

from __future__ import annotations

import warnings

import datasets
import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toys import TINY_LLAMA, trainer

from lightning_cl import CausalLM, TaskDataModule, TaskMatrix, TrainedBPE, fit_tasks

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
OPT = {"model_type": "opt", "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
OPT |= {"max_position_embeddings": 64, "word_embed_proj_dim": 16}
LLAMA = TINY_LLAMA | {"max_position_embeddings": 64}
LONG, SHORT = ["x" * 300] * 3, ["x" * 40] * 3


class Never(Callback):
    def on_train_start(self, trainer, pl_module):
        pytest.fail("training has begun")


@pytest.fixture
def tokenizer(tmp_path):
    return TrainedBPE(257, str(tmp_path / "bpe")).train(["any"])


def fit(root, model, source, tokenizer, callbacks=(), **settings):
    data = TaskDataModule({"a": {"train": source, "val": SHORT}}, tokenizer, **{"max_length": 256} | settings)
    fit_tasks(trainer(root, [*callbacks], max_steps=1), CausalLM(model), data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", [GPT2, OPT], ids=["gpt2", "opt"])
@pytest.mark.parametrize("matrix", [True, False])
def test_a_table_of_positions_that_is_too_short_is_an_error(tmp_path, tokenizer, model, matrix):
    callbacks = [Never(), *([TaskMatrix()] if matrix else [])]
    with pytest.raises(MisconfigurationException, match=r"max_length=256: .*256 tokens.* 64 positions.*at most 64"):
        fit(tmp_path, model, LONG, tokenizer, callbacks)


@pytest.mark.filterwarnings("ignore")
def test_streams_and_packed_blocks_may_be_as_long_as_max_length(tmp_path, tokenizer):
    stream = datasets.Dataset.from_dict({"text": SHORT}).to_iterable_dataset()
    for source, settings in ((stream, {}), (SHORT, {"packing": True})):
        with pytest.raises(MisconfigurationException, match="max_length=256"):
            fit(tmp_path, GPT2, source, tokenizer, [Never()], **settings)


def test_rotary_positions_warn(tmp_path, tokenizer):
    with pytest.warns(UserWarning, match=r"max_length=256: .*made for 64 positions"):
        fit(tmp_path, LLAMA, LONG, tokenizer)


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_what_fits_is_trained_without_a_word(tmp_path, tokenizer, model):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*positions")
        fit(tmp_path, model, SHORT, tokenizer)
        fit(tmp_path, model, LONG, tokenizer, max_length=64)


@pytest.mark.filterwarnings("ignore")
def test_a_vocabulary_of_that_size_is_no_table_of_positions(tmp_path, tokenizer):
    with pytest.warns(UserWarning, match="made for 257 positions"):
        fit(tmp_path, LLAMA | {"max_position_embeddings": 257}, ["x" * 400] * 3, tokenizer, max_length=300)
