"""Continuations of several prompts at once: the most probable ones, and drawn ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from starting import puts_in_front
from torch.utils.data import DataLoader
from toys import TINY_LLAMA, trainer
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_cl import CausalLM, PromptSamples, TrainedBPE
from lightning_cl.passes.generation import (
    continue_tokens,
    draw,
    generator_of,
    pad_token_id,
    prompt_tokens,
    sample_tokens,
)

VOCABULARY = 60
PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10], [11, 12, 13], [59, 58, 57, 3]]
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1}
CONFIGS = {
    "llama": TINY_LLAMA,
    "gpt2": GPT2 | {"eos_token_id": None},
    "mistral": TINY_LLAMA | {"model_type": "mistral", "sliding_window": 4},
}
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def model(name="llama", **settings):
    torch.manual_seed(0)
    config = CONFIGS[name] | {"vocab_size": VOCABULARY, "eos_token_id": None, "pad_token_id": None}
    config |= {"tie_word_embeddings": False} | settings  # else a token continues itself
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)  # answers that are not one token again and again
    return made


@torch.no_grad()
def by_hand(model, prompt, count, ends=()):
    """One prompt, token by token, without cache and padding."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_of_different_lengths_are_continued_as_each_alone(name):
    lm = model(name)
    expected = [by_hand(lm, prompt, 9) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS)
    assert len({token for answer in expected for token in answer}) > 8
    # Whatever is padded with, also a token that occurs in the prompts.
    for pad in (0, 3):
        assert continue_tokens(lm, PROMPTS, 9, pad) == expected
    assert [continue_tokens(lm, [prompt], 9, 0)[0] for prompt in PROMPTS] == expected


def test_an_answer_ends_before_the_first_end_token():
    lm = model()
    free = [by_hand(lm, prompt, 9) for prompt in PROMPTS]
    end, other = free[0][3], free[2][5]
    expected = [by_hand(lm, prompt, 9, (end, other)) for prompt in PROMPTS]
    assert len(expected[0]) <= 3
    assert len({len(answer) for answer in expected}) > 1
    # Padding with the end token, as models without a padding token do.
    for pad in (0, end):
        assert continue_tokens(lm, PROMPTS, 9, pad, [end, other]) == expected
    # Ends of the model's own configuration count too.
    lm.generation_config.eos_token_id = end
    assert continue_tokens(lm, PROMPTS, 9, 0, [other]) == expected
    lm.generation_config.eos_token_id = [end, other]
    assert continue_tokens(lm, PROMPTS, 9, 0) == expected


def test_an_end_token_in_the_prompt_ends_nothing():
    lm = model()
    assert continue_tokens(lm, [[3, 0, 5]], 4, 0, [0]) == [by_hand(lm, [3, 0, 5], 4, (0,))]


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 50, "top_p": 0.9},
        {"num_beams": 3},
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
    ],
    ids=str,
)
def test_greedy_whatever_the_models_configuration_says(settings):
    """Chat models on the hub bring settings for sampling, some a penalty for repetition."""
    lm = model()
    expected = [by_hand(lm, prompt, 12) for prompt in PROMPTS]
    for name, value in settings.items():
        setattr(lm.generation_config, name, value)
    assert continue_tokens(lm, PROMPTS, 12, 0) == expected


def test_modes_are_as_before_and_dropout_is_off():
    lm = model(attention_dropout=0.9)
    expected = [by_hand(lm, prompt, 5) for prompt in PROMPTS]
    lm.train()
    lm.model.layers[0].eval()
    before = [module.training for module in lm.modules()]
    assert continue_tokens(lm, PROMPTS, 5, 0) == expected
    assert [module.training for module in lm.modules()] == before
    assert torch.is_grad_enabled()


def test_modes_are_as_before_after_an_exception(monkeypatch):
    lm = model().train()
    lm.model.layers[1].eval()
    before = [module.training for module in lm.modules()]

    def fail(*args, **settings):
        assert not lm.training
        raise KeyboardInterrupt

    monkeypatch.setattr(lm.model, "forward", fail)
    with pytest.raises(KeyboardInterrupt):
        continue_tokens(lm, PROMPTS, 5, 0)
    assert [module.training for module in lm.modules()] == before


def test_with_gradient_checkpointing_while_it_trains():
    lm = model()
    expected = [by_hand(lm, prompt, 5) for prompt in PROMPTS]
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lm.train()
    assert continue_tokens(lm, PROMPTS, 5, 0) == expected
    assert lm.is_gradient_checkpointing


# ---------------------------------------------------------------------- drawn


def counts_of_draws(logits, **settings):
    """How often each token is drawn by 10,000 evenly spread numbers: its probability, and no chance in it."""
    numbers = (torch.arange(10_000) + 0.5) / 10_000
    return torch.bincount(draw(logits.expand(10_000, -1), numbers, **settings), minlength=logits.shape[-1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_with_their_probability(temperature):
    logits = torch.tensor([2.0, -1.0, 0.5, 0.5, -30.0, 1.0])
    expected = 10_000 * (logits.double() / temperature).softmax(-1)
    assert (counts_of_draws(logits, temperature=temperature) - expected).abs().max() <= 1


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1.0, [0, 1, 2, 3]), (0.95, [0, 1, 3]), (0.7, [1, 3]), (0.6, [1]), (1e-9, [1])]
)
def test_top_p_draws_among_the_fewest_most_probable_tokens(top_p, kept):
    p = torch.tensor([0.1, 0.6, 0.04, 0.26])
    expected = torch.zeros(4)
    expected[kept] = 10_000 * p[kept] / p[kept].sum()
    assert (counts_of_draws(p.log(), top_p=top_p) - expected).abs().max() <= 1
    # The probability is that at the temperature.
    assert (counts_of_draws(2 * p.log(), temperature=2.0, top_p=top_p) - expected).abs().max() <= 1


@pytest.mark.parametrize("flat", [0.001, 1.0])
def test_top_p_of_a_large_vocabulary(flat):
    """Where the most probable thousand have enough, and where they have not."""
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) / flat**0.3
    p = logits.softmax(-1)
    for row in range(3):
        ordered = p[row].sort(descending=True)
        kept = ordered.indices[: int((ordered.values.cumsum(0) < 0.8).sum()) + 1]
        assert (len(kept) < 1024) == (flat < 1)
        drawn = draw(logits[row].expand(500, -1), torch.linspace(0, 1 - 1e-6, 500), top_p=0.8)
        assert set(drawn.tolist()) <= set(kept.tolist())
        expected = p[row, kept] / p[row, kept].sum() * 500
        assert (torch.bincount(drawn, minlength=5000)[kept] - expected).abs().max() <= 1.1


def test_the_ends_of_the_interval_draw_tokens_that_are_possible():
    logits = torch.tensor([[-torch.inf, 1.0, 0.0, -torch.inf]] * 2)
    numbers = torch.tensor([0.0, 1 - 2**-24])
    assert draw(logits, numbers).tolist() == [1, 2]
    assert draw(logits, numbers, top_p=0.5).tolist() == [1, 1]


@torch.no_grad()
def drawn_by_hand(model, prompt, count, seed, temperature, top_p, ends=()):
    """One prompt, token by token, without cache and padding: the tokens and −log p of each."""
    ids, numbers = list(prompt), torch.rand(count, generator=torch.Generator().manual_seed(seed))
    surprises = []
    for number in numbers:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
        ids.append(int(draw(logits, number[None], temperature, top_p)))
        surprises.append(-float(logits.log_softmax(-1)[0, ids[-1]]))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :], surprises


@pytest.mark.parametrize("name", CONFIGS)
def test_drawn_texts_are_those_of_each_prompt_alone(name):
    lm = model(name)
    seeds = [5, 6, 7, 8]
    by_itself = [drawn_by_hand(lm, p, 9, seed, 2.0, 0.9) for p, seed in zip(PROMPTS, seeds, strict=True)]
    assert len({token for ids, _ in by_itself for token in ids}) > 15
    end = by_itself[1][0][4]
    expected = [drawn_by_hand(lm, p, 9, seed, 2.0, 0.9, {end}) for p, seed in zip(PROMPTS, seeds, strict=True)]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [1], [2, 1]):
        texts = sample_tokens(lm, [PROMPTS[i] for i in order], 9, 0, [seeds[i] for i in order], 2.0, 0.9, [end])
        assert [text.ids for text in texts] == [expected[i][0] for i in order]
        assert [text.ended for text in texts] == [expected[i][0][-1] == end for i in order]
        # Under the model itself: not at that temperature, and not among the most probable ones alone.
        for i, text in zip(order, texts, strict=True):
            assert text.surprise == pytest.approx(sum(expected[i][1]) / len(expected[i][1]), rel=1e-4)
    assert expected[1][0][-1] == end


def test_drawing_has_random_numbers_of_its_own():
    lm = model()
    torch.manual_seed(1)
    one = sample_tokens(lm, PROMPTS, 9, 0, [1, 2, 3, 4])
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after)  # nothing was taken from the global ones
    torch.manual_seed(2)
    assert sample_tokens(lm, PROMPTS, 9, 0, [1, 2, 3, 4]) == one
    same_prompt = sample_tokens(lm, [[3]] * 8, 9, 0, range(8))
    assert len({tuple(text.ids) for text in same_prompt}) == 8


def test_drawing_whatever_the_models_configuration_says():
    lm = model()
    expected = sample_tokens(lm, PROMPTS, 12, 0, [1, 2, 3, 4])
    lm.generation_config.do_sample, lm.generation_config.top_k, lm.generation_config.temperature = True, 1, 0.1
    lm.generation_config.repetition_penalty = 3.0
    assert sample_tokens(lm, PROMPTS, 12, 0, [1, 2, 3, 4]) == expected


def test_what_in_a_module_generates_text():
    class Holder(torch.nn.Module):
        def __init__(self, lm):
            super().__init__()
            self.layer, self.lm = torch.nn.Linear(2, 2), lm

        def generate(self):
            raise AssertionError("the module's own is no model's")

    lm = model()
    assert generator_of(Holder(lm)) is lm
    assert generator_of(torch.nn.Linear(2, 2)) is None


# ---------------------------------------------------------------------- texts


@pytest.fixture
def tokenizer(tmp_path):
    made = TrainedBPE(300, str(tmp_path)).train(["the cat sleeps in the barn", "the dog <user><assistant>"])
    made.chat_template = TEMPLATE
    return made


def test_a_prompt_in_the_chat_template(tokenizer):
    ids = prompt_tokens(tokenizer, "the cat", chat=True)
    assert tokenizer.decode(ids) == "<user>the cat<|endoftext|><assistant>"
    assert ids.count(tokenizer.eos_token_id) == 1  # as one token, and none added
    assert tokenizer.decode(prompt_tokens(tokenizer, "the cat")) == "the cat"


def test_a_prompt_begins_as_the_texts_that_were_trained_on(tokenizer):
    """Training puts a start token in front of every document."""
    from lightning_cl.data.text.tokens import tokenize

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    puts_in_front(tokenizer, "<s>")
    (document,) = tokenize(["the cat"], tokenizer, 64)
    assert document[0] == tokenizer.bos_token_id
    assert prompt_tokens(tokenizer, "the cat") == document[:-1]


def test_the_template_writes_the_start_token_once(tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    assert prompt_tokens(tokenizer, "the cat", chat=True).count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(("pad", "end", "expected"), [("p", "e", 1), (None, "e", 2), (None, None, 0), ("0", "e", 0)])
def test_what_is_padded_with(pad, end, expected):
    ids = {"p": 1, "e": 2, "0": 0, None: None}
    names = {"pad_token_id": ids[pad], "eos_token_id": ids[end]}
    assert pad_token_id(type("Tokenizer", (), names)) == expected


def lm(tokenizer):
    torch.manual_seed(0)
    module = CausalLM(TINY_LLAMA | {"tie_word_embeddings": False}, max_new_tokens=6)
    module.tokenizer = tokenizer
    module.configure_model()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    return module


@pytest.mark.parametrize("chat", [False, True])
def test_generate_predict_and_prompt_samples_say_the_same(tokenizer, chat):
    module, prompts = lm(tokenizer), ["the cat", "a", "the dog sleeps in the barn"]
    ids = [prompt_tokens(tokenizer, prompt, chat) for prompt in prompts]
    ends = {tokenizer.eos_token_id}
    expected = [tokenizer.decode(by_hand(module.lm.eval(), i, 6, ends), skip_special_tokens=True) for i in ids]
    assert len(set(expected)) > 1
    assert [module.generate(prompt, 6, chat=chat) for prompt in prompts] == expected
    samples = PromptSamples(prompts, 6, chat=chat)
    run = SimpleNamespace(fast_dev_run=False, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    samples.ask(run, module, SimpleNamespace(tokenizer=tokenizer), 1)
    assert samples.answers == {1: expected}
    references = [tokenizer(text)["input_ids"] for text in ("x", "the barn", "")]
    batches = DataLoader([{"prompt": ids, "reference": references}], batch_size=None)
    (made,) = trainer(None).predict(module, batches)
    assert [sample["generated"] for sample in made] == expected
    assert [sample["reference"] for sample in made] == ["x", "the barn", ""]
    assert [sample["prompt"] for sample in made] == [tokenizer.decode(i) for i in ids]
