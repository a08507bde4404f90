"""The loss of CausalLM is the transformers model's own, for many architectures; packed documents are kept apart."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from toys import TINY_LLAMA, Classifier, classification, trainer

from lightning_cl import EWC, CausalLM, fit_tasks
from lightning_cl.models import causal_lm
from lightning_cl.models.visibility import check_isolation
from lightning_cl.passes.heads import SplitHead

VOCABULARY = 97
SMALL = TINY_LLAMA | {"vocab_size": VOCABULARY, "tie_word_embeddings": False, "num_key_value_heads": 1}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCABULARY}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
# With these the head can be taken apart.
SPLIT = {
    "llama": SMALL,
    "llama tied": SMALL | {"tie_word_embeddings": True},
    "qwen2": SMALL | {"model_type": "qwen2"},
    "qwen3": SMALL | {"model_type": "qwen3", "head_dim": 8},
    "mistral": SMALL | {"model_type": "mistral", "sliding_window": 4},
    "gpt2": GPT2,
    # Softcaps that bend logits as small as an untrained model's.
    "gemma2": SMALL | {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 0.05},
    "gemma": SMALL | {"model_type": "gemma", "head_dim": 8},
    "phi3": SMALL | {"model_type": "phi3", "pad_token_id": 0},
    "mixtral": SMALL | {"model_type": "mixtral"} | EXPERTS,
    "opt": {"model_type": "opt", "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "word_embed_proj_dim": 8, "dropout": 0.0},
}
# Something else stands between head and logits.
WHOLE = {
    "cohere": SMALL | {"model_type": "cohere", "logit_scale": 0.25},
    "granite": SMALL | {"model_type": "granite", "logits_scaling": 8.0},
}


def made(config, scale=5, **settings):
    torch.manual_seed(0)
    module = CausalLM(dict(config), schedule=None, **settings)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)  # logits of an untrained model are all alike
    module.logged = {}
    module.log_dict = lambda values, **settings: module.logged.update(values | {"weight": settings["batch_size"]})
    module.log = lambda name, value, **settings: module.logged.update({name: value})
    return module


def batch(rows=3, length=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, 6:], mask[2, 4:] = 0, 0
    labels[mask == 0] = -100
    labels[0, :3] = -100  # a prompt
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def compared(module, batch, loss_of=None):
    """Loss and gradients of training_step and of transformers."""
    results = []
    for step in (lambda: module.training_step(dict(batch), 0), lambda: module.lm(**batch, use_cache=False).loss):
        module.zero_grad()
        loss = step()
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    return results


def assert_alike(results, rtol=1e-4, atol=1e-6):
    (loss, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    assert any(g.abs().max() > 1e-3 for g in expected_gradients.values())
    for name, value in gradients.items():
        # fp32 sums are rounded in units of what is summed: gradients here go up to 60.
        unit = max(1.0, float(expected_gradients[name].abs().max()))
        expected = expected_gradients[name]
        torch.testing.assert_close(value, expected, rtol=rtol, atol=atol * unit, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("name", [*SPLIT, *WHOLE])
def test_loss_gradients_and_accuracy_are_the_models_own(name):
    module, data = made({**SPLIT, **WHOLE}[name]), batch()
    assert_alike(compared(module, data))
    assert module._head.exact == (name in SPLIT)
    labels, predicted = data["labels"][:, 1:], module.lm(**data).logits[:, :-1].argmax(-1)
    known = labels != -100
    assert module.logged["weight"] == int(known.sum()) == 6 + 5 + 3
    module.validation_step(data, 0)
    assert float(module.logged["val_token_accuracy"]) == pytest.approx(int((predicted == labels)[known].sum()) / 14)


@pytest.mark.parametrize("name", SPLIT)
def test_in_chunks_too(name, monkeypatch):
    """A chunk holds 4 of the 14 positions."""
    split = causal_lm.head_cross_entropy
    calls = []

    def chunked(hidden, labels, head, vocabulary):
        calls.append(len(hidden))
        return split(hidden, labels, head, vocabulary, chunk_bytes=4 * vocabulary * 4)

    monkeypatch.setattr(causal_lm, "head_cross_entropy", chunked)
    assert_alike(compared(made(SPLIT[name]), batch()))
    assert calls == [14]


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "gemma2", "cohere"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["", "lora"])
def test_under_lora_and_gradient_checkpointing(name, checkpointing, lora):
    config = {**SPLIT, **WHOLE}[name]
    module = made(config, gradient_checkpointing=checkpointing, lora=lora)
    if lora:
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.1)  # also B, which begins at zero
    results = compared(module, batch())
    assert_alike(results)
    if checkpointing:
        plain = made(config, lora=lora)
        plain.load_state_dict(module.state_dict())
        assert_alike([compared(plain, batch())[0], results[0]])


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapted_head_is_the_head(settings):
    module = made(SMALL, lora={"r": 4, **settings})
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    results = compared(module, batch())
    assert_alike(results)
    assert any("lm_head" in name for name in results[0][1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_under_autocast_from_the_first_step_on(name):
    """Autocast remembers the 16-bit copy of a weight: one made without gradients would starve the first step."""
    module = made(SPLIT[name])
    results = []
    for _ in range(2):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = module.training_step(batch(), 0)
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in module.named_parameters()}))
    assert_alike(results)
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        expected = module.lm(**batch(), use_cache=False).loss
    torch.testing.assert_close(results[0][0], expected.float().detach(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere"])
def test_a_batch_without_labels_has_a_loss_of_zero_and_gradients_of_zero(name):
    module = made({**SPLIT, **WHOLE}[name])
    data = batch() | {"labels": torch.full((3, 9), -100)}
    loss = module.training_step(data, 0)
    loss.backward()
    assert loss.item() == 0.0
    assert float(module.logged["train_token_accuracy"]) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


def test_batches_without_labels_weigh_nothing_in_validation(tmp_path):
    """Validation is a mean over the tokens that bear loss."""
    torch.manual_seed(0)
    module, data = CausalLM(dict(SMALL), schedule=None), batch()
    empty = data | {"labels": torch.full((3, 9), -100)}
    quiet = {"verbose": False}
    (expected,) = trainer(tmp_path).validate(module, DataLoader([data], batch_size=None), **quiet)
    (made,) = trainer(tmp_path).validate(module, DataLoader([data, *[empty] * 9], batch_size=None), **quiet)
    assert made == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "recurrent_gemma", "llama"])
def test_the_loss_is_right_also_when_training_has_made_logits_large(name):
    """A softcap hardly bends the small logits of an untrained model; by which setting it is called differs."""
    caps = {"gemma2": {"final_logit_softcapping": 5.0}, "recurrent_gemma": {"logits_soft_cap": 5.0}}
    module = made(SMALL | {"model_type": name, "head_dim": 8} | caps.get(name, {}), scale=1)
    module.training_step(batch(), 0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    assert_alike(compared(module, batch()))


def test_embeddings_that_were_resized_between_steps_are_used():
    module = made(SMALL)
    module.training_step(batch(), 0)
    module.lm.resize_token_embeddings(VOCABULARY + 7)
    data = batch()
    data["input_ids"][0, 5] = data["labels"][0, 5] = VOCABULARY + 3
    assert_alike(compared(module, data))


def test_the_look_at_the_model_leaves_its_modes_and_random_numbers_alone():
    module = made(SMALL | {"attention_dropout": 0.5})
    module.lm.model.layers[0].eval()
    before = [m.training for m in module.modules()]
    state = torch.get_rng_state()
    SplitHead(module.lm)
    check_isolation(module.lm)
    assert [m.training for m in module.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_the_auxiliary_loss_of_experts_is_not_dropped():
    """Asked for with output_router_logits, transformers adds it to the loss."""
    module = made(SPLIT["mixtral"] | {"output_router_logits": True, "router_aux_loss_coef": 1.0})
    assert_alike(compared(module, batch()))


class Rows(TorchDispatchMode):
    """The most positions that any [positions, vocabulary] tensor has."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[-1] == VOCABULARY:
                self.most = max(self.most, value.numel() // VOCABULARY)
        return made


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_only_positions_that_bear_loss_get_logits(name):
    module, data = made(SPLIT[name]), batch(rows=3, length=40)
    data["labels"][:, :-2] = -100
    data["attention_mask"][:] = 1
    known = int((data["labels"][:, 1:] != -100).sum())
    module.training_step(dict(data), 0)
    with Rows() as watch:
        module.training_step(dict(data), 0).backward()
    # The weight itself has 16 rows, or its transpose; logits of all positions would be 120.
    assert known <= watch.most <= 16
    with Rows() as watch:
        module.lm(**data).loss.backward()
    assert watch.most == 120


# ---------------------------------------------------------------------- packed documents


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gpt2", "gemma2", "phi3", "granite"])
@pytest.mark.parametrize("attention", [None, "eager"])
def test_isolation_by_position_ids_is_found_and_the_loss_is_that_of_the_documents_apart(name, attention):
    module = made({**SPLIT, **WHOLE}[name], attn_implementation=attention)
    check_isolation(module.lm)
    torch.manual_seed(3)
    one, other = torch.randint(VOCABULARY, (1, 5)), torch.randint(VOCABULARY, (1, 7))
    borders = torch.cat([torch.arange(5), torch.arange(7)])[None]
    labels = torch.cat([one, other], 1)
    packed_labels = labels.clone()
    packed_labels[0, 5] = -100  # the first token of a document is not predicted from the one before
    packed = {"input_ids": labels, "position_ids": borders, "labels": packed_labels}
    loss = module.training_step(packed, 0)
    apart = [module.training_step({"input_ids": ids, "labels": ids}, 0) for ids in (one, other)]
    torch.testing.assert_close(loss, (apart[0] * 4 + apart[1] * 6) / 10, rtol=1e-4, atol=1e-5)


class Leaking(nn.Module):
    """A model that does not read position_ids."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def forward(self, input_ids, position_ids=None, **more):
        return self.model(input_ids=input_ids, **more)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_that_leaks_is_refused_at_the_first_packed_batch(name):
    module = made(SPLIT[name])
    module.lm = Leaking(module.lm)
    ids = batch()["input_ids"]
    packed = {"input_ids": ids, "position_ids": torch.arange(9).expand(3, -1) % 4, "labels": ids}
    with pytest.raises(MisconfigurationException, match=r"packing=True: Leaking.*packing=False"):
        module.training_step(packed, 0)
    # Batches that are not packed are none of its business.
    module.training_step(batch(), 0)


@pytest.mark.parametrize("order", [["conv", "full_attention"], ["full_attention", "conv"]], ids=str)
def test_convolutions_that_reach_across_a_border_are_a_leak(order):
    """However small: LFM2's reach two tokens far, from the last two of one document into the first two of the next."""
    with pytest.raises(MisconfigurationException, match="packed documents see each other"):
        check_isolation(made(SMALL | {"model_type": "lfm2", "layer_types": order}).lm)


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"lora": {"r": 2}, "dtype": "bfloat16"}, {}])
def test_rounding_is_not_taken_for_a_leak(settings):
    torch.manual_seed(0)
    module = CausalLM(SMALL | {"hidden_size": 64}, schedule=None, **settings)
    module.configure_model()
    check_isolation(module.lm)
    with torch.autocast("cpu", torch.bfloat16):
        check_isolation(module.lm)


# ---------------------------------------------------------------------- logits for others


class Plain(CausalLM):
    """The same model in a module that knows of nothing."""

    logits = None

    def training_step(self, batch, batch_idx):
        return self.lm(**batch, use_cache=False).loss


def importances(kind, data, root, **settings):
    torch.manual_seed(0)
    module = kind(SMALL, lambda p: torch.optim.SGD(p, lr=0.0), schedule=None)
    ewc = EWC(**settings, normalize=False)
    loader = DataLoader(data, 2, collate_fn=lambda rows: {k: torch.stack([r[k] for r in rows]) for k in rows[0]})
    fit_tasks(trainer(root, [ewc], max_epochs=1), module, {"a": loader})
    return ewc.importance, ewc.report()["importance"][0]["estimator"]


@pytest.mark.parametrize("estimator", ["sample", "empirical", "auto"])
def test_the_fisher_of_causal_lm_is_that_of_a_plain_module(tmp_path, estimator):
    rows = batch()
    data = [{key: value[i] for key, value in rows.items()} for i in range(3)]
    ours, name = importances(CausalLM, data, tmp_path / "1", estimator=estimator)
    plain, other = importances(Plain, data, tmp_path / "2", estimator=estimator)
    assert name == other == {"auto": "sample"}.get(estimator, estimator)
    assert ours.keys() == plain.keys()
    assert all(value.any() for key, value in plain.items() if "proj" in key)
    for key, value in plain.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-12)


def test_a_head_that_is_called_logits_is_nobodys_method(tmp_path):
    """A submodule `self.logits`, a common name for a classifier's last layer, takes features and no batch."""

    class Named(Classifier):
        def __init__(self):
            super().__init__()
            self.logits = nn.Linear(3, 3)

        def forward(self, x):
            return self.logits(super().forward(x))

    ewc = EWC(samples=4)
    loader = DataLoader(classification(0, 16), 8)
    fit_tasks(trainer(tmp_path, [ewc], max_epochs=1), Named(), {"a": loader})
    assert ewc.report()["importance"][0]["estimator"] == "empirical"
