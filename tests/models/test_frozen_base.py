"""Checkpoints without the frozen base: what is in them, when they can be resumed from, and when not."""

from __future__ import annotations

import json
import shutil

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toys import TINY_LLAMA, trainer
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_cl import EWC, SI, CausalLM, Replay, TaskMatrix, fit_tasks
from lightning_cl.models.frozen_base import checksum, frozen_names

pytestmark = pytest.mark.filterwarnings("ignore")
VOCABULARY = 997
LORA = {"r": 2, "lora_dropout": 0.1}


def save_model(path, seed=0, **config):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": VOCABULARY}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_LLAMA | sizes | config)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def rows(seed, count=8):
    ids = torch.randint(VOCABULARY, (count, 10), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def loaders():
    return {name: torch.utils.data.DataLoader(rows(i), 2, shuffle=True) for i, name in enumerate("ab")}


def lm(folder, **settings):
    torch.manual_seed(0)
    return CausalLM(folder, lambda p: torch.optim.AdamW(p, lr=0.01), schedule=None, **{"lora": dict(LORA)} | settings)


def fit(root, module, ckpt_path=None, callbacks=(), **settings):
    L.seed_everything(7, verbose=False)
    checkpoint = ModelCheckpoint(every_n_train_steps=3, save_top_k=-1, filename="{step}")
    run = trainer(root, [*callbacks, checkpoint], max_epochs=1, **settings)
    fit_tasks(run, module, loaders(), ckpt_path)
    return module


@pytest.fixture(scope="module")
def first(tmp_path_factory, folder):
    """A run of two tasks under LoRA: its module, and the folder with its checkpoints."""
    root = tmp_path_factory.mktemp("first")
    return fit(root, lm(folder)), root


def boundary(root):
    return root / "tasks" / "0-a.ckpt"


def tensors(value, path=""):
    """All tensors of nested containers, by their place."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors(item, f"{path}/{index}")


def methods():
    return {
        "ewc": EWC(0.1, samples=4),
        "si": SI(0.1),
        "replay": Replay(6, 0.3),
        "matrix": TaskMatrix(),
    }


def fingerprint(module, methods):
    """Everything that must be equal: weights, importances, anchors, buffer, matrix."""
    state = {n: v for n, v in module.state_dict().items() if isinstance(v, torch.Tensor)}
    for name in ("ewc", "si"):
        state |= {f"{name}.importance.{key}": value for key, value in methods[name].importance.items()}
        state |= {f"{name}.anchor.{key}": value for key, value in methods[name].anchor.items()}
    buffer = methods["replay"].buffer
    for i, (sample, task) in enumerate(zip(buffer.items, buffer.tasks, strict=True)):
        state[f"buffer.{i}.{task}"] = torch.as_tensor(sample["input_ids"])
    state["matrix"] = methods["matrix"].matrix
    return state


# ---------------------------------------------------------------------- what is in a checkpoint


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_a_checkpoint_holds_no_tensor_of_the_base(tmp_path, folder, quantization):
    if quantization:
        pytest.importorskip("bitsandbytes")
    module = fit(tmp_path, lm(folder, quantization=quantization), callbacks=methods().values())
    adapter = {name for name, p in module.named_parameters() if p.requires_grad}
    state = module.state_dict()
    base = [v for n, v in state.items() if n not in adapter and isinstance(v, torch.Tensor) and v.numel() > 64]
    assert len(base) >= 15  # embedding and seven layers, twice
    paths = sorted(tmp_path.rglob("*.ckpt"))
    assert {p.parent.name for p in paths} == {"tasks", "0-a", "1-b"}
    sizes = sum(p.numel() for p in module.parameters() if p.requires_grad) * 4
    for path in paths:
        content = torch.load(path, weights_only=True)
        assert set(content["state_dict"]) == adapter
        for place, tensor in tensors(content):
            assert not any(tensor.shape == b.shape and torch.equal(tensor, b) for b in base), place
            assert tensor.numel() < VOCABULARY * 64, place
        # Adapter, its two moments in Adam, EWC's two, SI's four, and what is not tensors.
        assert path.stat().st_size < 10 * sizes + 200_000
    assert set(content["frozen_base"]["left_out"]) | adapter == set(state)


def test_full_tuning_keeps_everything(tmp_path, folder):
    module = fit(tmp_path, lm(folder, lora=None))
    content = torch.load(boundary(tmp_path), weights_only=True)
    assert set(content["state_dict"]) == set(module.state_dict())
    assert "frozen_base" not in content
    again = CausalLM.load_from_checkpoint(tmp_path / "tasks" / "1-b.ckpt", model=folder)
    for name, value in again.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


def test_an_adapter_on_a_configuration_keeps_the_base_which_is_nowhere_else(tmp_path):
    config = TINY_LLAMA | {"vocab_size": VOCABULARY}
    module = fit(tmp_path, lm(config))
    content = torch.load(tmp_path / "tasks" / "1-b.ckpt", weights_only=True)
    assert set(content["state_dict"]) == set(module.state_dict())
    torch.manual_seed(99)
    again = CausalLM.load_from_checkpoint(tmp_path / "tasks" / "1-b.ckpt", model=config, lora=LORA)
    for name, value in again.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_resume_from_every_checkpoint_equals_never_stopped(tmp_path, folder, quantization):
    if quantization:
        pytest.importorskip("bitsandbytes")

    def run(root, ckpt_path=None):
        made = methods()
        return fingerprint(fit(root, lm(folder, quantization=quantization), ckpt_path, made.values()), made)

    reference = run(tmp_path / "reference")
    checkpoints = sorted((tmp_path / "reference").rglob("*.ckpt"))
    assert len(checkpoints) >= 4
    for number, checkpoint in enumerate(checkpoints):
        resumed = run(tmp_path / str(number), checkpoint)
        assert reference.keys() == resumed.keys()
        assert [n for n in reference if not torch.equal(reference[n], resumed[n])] == [], checkpoint


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_resume_in_16_bits(tmp_path, folder, precision):
    """The strategy may change the base's type after it was loaded."""
    one = fit(tmp_path / "1", lm(folder), precision=precision)
    other = fit(tmp_path / "2", lm(folder), boundary(tmp_path / "1"), precision=precision)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_the_same_base_in_another_place_is_accepted(tmp_path, folder, first):
    module, root = first
    shutil.copytree(folder, tmp_path / "moved")
    other = fit(tmp_path, lm(tmp_path / "moved"), boundary(root))
    for name, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("what", ["embed_tokens.weight", "model.norm.weight", "layers.1.mlp.down_proj.weight"])
def test_one_changed_weight_of_the_base_is_found(tmp_path, folder, first, what):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        (weight,) = (p for name, p in model.named_parameters() if name.endswith(what))
        # The smallest change that there is.
        weight.view(-1)[-1] = torch.nextafter(weight.view(-1)[-1], torch.tensor(9.0))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(MisconfigurationException, match=r"frozen base .*Give the same base, in the same precision"):
        fit(tmp_path, lm(tmp_path / "model"), boundary(first[1]))


def test_weights_that_changed_in_place_are_said_to_have_changed(tmp_path):
    path = save_model(tmp_path / "model")
    fit(tmp_path / "1", lm(path))
    save_model(path, seed=1)
    with pytest.raises(MisconfigurationException, match="its weights have changed"):
        fit(tmp_path / "2", lm(path), boundary(tmp_path / "1"))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_base_whose_configuration_changed_in_place_is_refused_and_the_setting_named(tmp_path, folder, first):
    """The same weights with another epsilon, or another base of the rotations, are another model."""
    shutil.copytree(folder, tmp_path / "model")
    edit_config(tmp_path / "model", rms_norm_eps=0.5, transformers_version="4.0", use_cache=False, pad_token_id=3)
    with pytest.raises(MisconfigurationException, match=r"rms_norm_eps: 1e-06 then, 0\.5 now\)"):
        fit(tmp_path / "1", lm(tmp_path / "model"), boundary(first[1]))
    edit_config(tmp_path / "model", rms_norm_eps=1e-6)
    fit(tmp_path / "2", lm(tmp_path / "model"), boundary(first[1]))  # what decides nothing may differ


def test_a_checkpoint_of_before_that_has_no_configuration_is_resumed(tmp_path, folder, first):
    content = torch.load(boundary(first[1]), weights_only=True)
    del content["frozen_base"]["config"]
    torch.save(content, tmp_path / "older.ckpt")
    fit(tmp_path, lm(folder), tmp_path / "older.ckpt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "bfloat16"}, r"'dtype': None.*this run has .*'dtype': 'bfloat16'"),
        ({"quantization": "nf4"}, r"'quantization': None.*this run has .*'quantization': 'nf4'"),
        ({"quantization": "int8"}, r"this run has .*'quantization': 'int8'"),
        ({"lora": None}, r"frozen base"),
    ],
    ids=str,
)
def test_another_precision_of_the_base_is_refused(tmp_path, folder, first, settings, message):
    if "quantization" in settings:
        pytest.importorskip("bitsandbytes")
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, lm(folder, **settings), boundary(first[1]))


def test_another_base_is_refused_and_both_are_named(tmp_path, folder, first):
    other = save_model(tmp_path / "other", seed=1)
    with pytest.raises(MisconfigurationException, match=f"{folder}.*this run has.*{other}"):
        fit(tmp_path, lm(other), boundary(first[1]))


def test_the_checkpoint_of_a_full_run_is_none_of_an_adapters(tmp_path, folder):
    fit(tmp_path / "1", lm(folder, lora=None))
    with pytest.raises((RuntimeError, MisconfigurationException), match=r"lora_A"):
        fit(tmp_path / "2", lm(folder), boundary(tmp_path / "1"))


def test_an_adapter_of_another_rank_is_refused(tmp_path, folder, first):
    with pytest.raises(MisconfigurationException, match=r"r=2.*this run has.*r=4"):
        fit(tmp_path, lm(folder, lora=LORA | {"r": 4}), boundary(first[1]))


def test_an_adapter_of_another_scale_is_refused(tmp_path, folder, first):
    """The same tensors multiplied by something else are another model."""
    with pytest.raises((RuntimeError, MisconfigurationException), match="lora_alpha"):
        fit(tmp_path, lm(folder, lora=LORA | {"lora_alpha": 32}), boundary(first[1]))


# ---------------------------------------------------------------------- without a Trainer


def test_load_from_checkpoint(tmp_path, folder, first):
    module, root = first
    again = CausalLM.load_from_checkpoint(root / "tasks" / "1-b.ckpt", model=folder, lora=LORA)
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_validate_and_test_of_a_checkpoint(tmp_path, folder, first):
    module, root = first
    data = torch.utils.data.DataLoader(rows(1), 2)
    expected = trainer(tmp_path).validate(module, data, verbose=False)[0]
    for run in ("validate", "test"):
        fresh = lm(folder)
        made = getattr(trainer(tmp_path), run)(fresh, data, ckpt_path=root / "tasks" / "1-b.ckpt", verbose=False)[0]
        stage = {"validate": "val", "test": "test"}[run]
        assert {key.replace(stage, "val", 1): value for key, value in made.items()} == expected
    untrained = trainer(tmp_path).validate(lm(folder), data, verbose=False)[0]
    assert untrained["val_loss"] != expected["val_loss"]


def test_validate_refuses_another_base_too(tmp_path, first):
    other = save_model(tmp_path / "other", seed=1)
    with pytest.raises(MisconfigurationException, match="frozen base"):
        trainer(tmp_path).validate(lm(other), loaders()["a"], ckpt_path=boundary(first[1]), verbose=False)


@pytest.mark.parametrize("damage", ["missing", "unknown", "unknown of the base's kind"])
def test_a_missing_or_unknown_tensor_is_an_error_that_names_it(tmp_path, folder, first, damage):
    content = torch.load(first[1] / "tasks" / "1-b.ckpt", weights_only=True)
    state = content["state_dict"]
    name = next(iter(state))
    if damage == "missing":
        state.pop(name)
    else:
        name = "lm.other.weight" if damage == "unknown" else name.replace("layers.0", "layers.7")
        state[name] = torch.zeros(2)
    torch.save(content, tmp_path / "damaged.ckpt")
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
        CausalLM.load_from_checkpoint(tmp_path / "damaged.ckpt", model=folder, lora=LORA)
    CausalLM.load_from_checkpoint(tmp_path / "damaged.ckpt", model=folder, lora=LORA, strict=False)


# ---------------------------------------------------------------------- what somebody un-freezes


class Thaw(Callback):
    """Trains the last norm too, from a task on."""

    def __init__(self, task):
        self.left = task

    def setup(self, trainer, pl_module, stage):
        pl_module.configure_model()
        if stage == "fit":
            if self.left == 0:
                pl_module.lm.base_model.model.model.norm.weight.requires_grad_(True)
            self.left -= 1


@pytest.mark.parametrize("task", [0, 1])
def test_a_parameter_that_was_unfrozen_is_saved_and_resumed(tmp_path, folder, task):
    module = fit(tmp_path / "1", lm(folder), callbacks=[Thaw(task)])
    name = "lm.base_model.model.model.norm.weight"
    trained = module.state_dict()[name]
    assert not torch.equal(trained, torch.ones(64))
    contents = {p: torch.load(p, weights_only=True) for p in sorted((tmp_path / "1").rglob("*.ckpt"))}
    last = contents[tmp_path / "1" / "tasks" / "1-b.ckpt"]
    assert torch.equal(last["state_dict"][name], trained)
    assert name not in last["frozen_base"]["left_out"]
    for number, path in enumerate(p for p in contents if "1-b" in str(p) or task == 0):
        again = fit(tmp_path / f"again{number}", lm(folder), path, callbacks=[Thaw(0)])
        assert torch.equal(again.state_dict()[name], trained), path


# ---------------------------------------------------------------------- the checksum


def test_the_checksum_sees_every_bit_name_type_and_shape():
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.a = torch.nn.Parameter(torch.randn(300, 70), requires_grad=False)  # 84 kB: two whole rows and a rest
    module.b = torch.nn.Parameter(torch.randn(3, 5).bfloat16(), requires_grad=False)
    module.c = torch.nn.Parameter(torch.tensor(2.0), requires_grad=False)
    names = frozenset({"a", "b", "c"})
    seen = {checksum(module, names)}
    assert checksum(module, names) in seen

    def look():
        value = checksum(module, names)
        assert value not in seen
        seen.add(value)

    for bit in (0, 7, 31):
        for place in (0, 8191, 8192, 300 * 70 - 1):
            module.a.data.view(torch.int32).view(-1)[place] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31)).int()
            look()
    module.b.data.view(torch.int16).view(-1)[14] ^= 1
    look()
    module.c.data.neg_()
    look()
    module.a.data = module.a.data.view(150, 140)
    look()
    # Whole rows of 32 kB in another order.
    flat = module.a.data.view(-1).clone()
    flat[:8192], flat[8192:16384] = flat[8192:16384].clone(), flat[:8192].clone()
    module.a.data = flat.view(150, 140)
    look()
    module.a.data = module.a.data.T.contiguous().T
    assert checksum(module, names) in seen  # the layout in memory is not the content


def test_frozen_names_are_the_frozen_parameters_of_the_state():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
    module[0].requires_grad_(False)
    module[1].weight.requires_grad_(False)
    # Buffers are no parameters: running statistics change and are saved.
    assert frozen_names(module) == {"0.weight", "0.bias", "1.weight"}
    module[2].weight = module[0].weight  # tied: frozen under both names
    assert frozen_names(module) == {"0.weight", "0.bias", "1.weight", "2.weight"}
