"""Turns that call tools, in templates that are unlike ChatML: what ends them, who says what, calls without words."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from chat_templates import HEAD, TAIL, chat_tokenizer, learnt, one, with_template

from lightning_cl.data.text.answer_ends import ends_of_answers
from lightning_cl.data.text.chat import encode_chats
from lightning_cl.data.text.formats import as_document
from lightning_cl.data.text.record_counts import Tally
from lightning_cl.passes.generation import answers

ARGUMENTS = {"number": "0", "who": 'it\'s "me"', "deep": {"a": None}}
WRITTEN = json.dumps(ARGUMENTS, ensure_ascii=False)
# GLM: no end of turn, and a call ends with a token of its own.
GLM = (
    "{% for m in messages %}{{ '<|tool|>' if m.role == 'tool' else '<|' + m.role + '|>' }}{{ '\n' }}"
    "{% set words = m.content or '' %}{% if m.role == 'assistant' and '</think>' in words %}"
    "{{ '<think>' + words.split('</think>')[0].split('<think>')[-1].strip() + '</think>\n' }}"
    "{% set words = words.split('</think>')[-1].strip() %}{% endif %}{{ words }}"
    "{% for c in m.tool_calls or [] %}{{ '\n<call>' + c.function.name + c.function.arguments | tojson + '</call>' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Gemma 4: a call, its answer and what the model says next are one turn.
ONE_TURN = (
    "{% set ns = namespace(open=false) %}{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<answer>it says: ' + m.content + '</answer>' }}{% else %}"
    "{% if not ns.open %}{{ '<|im_start|>' + m.role + '\n' }}{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.arguments | tojson + '</call>' }}{% endfor %}"
    "{% set ns.open = true if m.tool_calls else false %}"
    "{% if not ns.open %}{{ '<|im_end|>\n' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and not ns.open %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ADDS = HEAD.replace("m.content or ''", "m['content'] + ''")
# It writes calls of turns that have no words, and of no others.
WORDLESS = HEAD.replace(
    "{{ m.content or '' }}",
    "{% if m['content'] is not defined %}{% for c in m.tool_calls %}{{ c.function.arguments + '' }}{% endfor %}"
    "{% else %}{{ m['content'] + '' }}{% endif %}",
)
CALLED = "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"


def asking(words="I look.", arguments=ARGUMENTS, answers=("there",), **message):
    calls = [{"type": "function", "function": {"name": "look", "arguments": arguments}} for _ in answers]
    return [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": words, "tool_calls": calls} | message,
        *({"role": "tool", "content": answer} for answer in answers),
        {"role": "assistant", "content": "It is there."},
    ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return chat_tokenizer(str(tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="module")
def marked(plain):
    """With the tokens that frame calls and answers."""
    tokenizer = with_template(plain, GLM)
    tokenizer.add_tokens(["<call>", "</call>", "<answer>", "</answer>", "<think>", "</think>"], special_tokens=True)
    return tokenizer


def test_a_call_ends_by_the_next_role_where_turns_have_no_end(marked):
    tokens = one(asking(), with_template(marked, GLM))
    end = marked.eos_token
    assert learnt(tokens, marked) == [f"I look.\n<call>look{WRITTEN}</call><|tool|>", f"It is there.{end}"]


def test_thinking_does_not_hide_that_a_turn_has_no_end(marked):
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>one</think>Hello."},
        {"role": "user", "content": "Again"},
        {"role": "assistant", "content": "<think>two</think>Yes."},
    ]
    assert learnt(one(turns, with_template(marked, GLM)), marked) == [
        "<think>one</think>\nHello.<|user|>",
        f"<think>two</think>\nYes.{marked.eos_token}",
    ]


@pytest.mark.parametrize("answers", [("there",), ("Mended", "gone")])
def test_what_tools_answer_inside_a_turn_is_not_learnt(marked, answers):
    tokens = one(asking(answers=answers), with_template(marked, ONE_TURN))
    calls = f"<call>{WRITTEN}</call>" * len(answers)
    assert learnt(tokens, marked) == [f"I look.{calls}", "It is there.<|im_end|>"]


def test_words_after_the_answer_in_the_turn_that_called_are_learnt(marked):
    last = "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + '</call>' }}{% endfor %}"
    template = (
        "{% for m in messages %}{% if m.role != 'tool' %}{{ '<|im_start|>' + m.role + '\n' }}"
        f"{last}{{% if m.tool_calls %}}{{% for t in messages if t.role == 'tool' %}}"
        "{{ '<answer>' + t.content + '</answer>' }}{% endfor %}{% endif %}{{ m.content or '' }}{{ '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokens = one(asking("So I think.", arguments={}), with_template(marked, template))
    assert learnt(tokens, marked) == ["<call>look</call>", "So I think.<|im_end|>", "It is there.<|im_end|>"]


@pytest.mark.parametrize("words", [None, "", "absent"])
@pytest.mark.parametrize("arguments", [ARGUMENTS, WRITTEN])
@pytest.mark.parametrize(
    "template",
    [HEAD + CALLED + TAIL, HEAD.replace(" or ''", "") + CALLED + TAIL, ADDS + CALLED + TAIL, WORDLESS + TAIL],
)
def test_a_call_without_words_is_one_thing_however_it_is_written(plain, words, arguments, template):
    messages = asking(words, arguments)
    if words == "absent":
        del messages[1]["content"]
    tokens = one(messages, with_template(plain, template))
    assert learnt(tokens, plain) == [f"{WRITTEN}<|im_end|>", "It is there.<|im_end|>"]


def test_a_conversation_that_is_refused_says_nothing_about_the_next(plain):
    joined = "{% for c in m.tool_calls or [] %}{{ c.function.arguments + '' }}{% endfor %}"
    alternate = "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}"
    tokenizer = with_template(plain, alternate + HEAD + joined + TAIL)
    tally = Tally("skip")
    chats = [as_document({"messages": messages}, "w", tally) for messages in (asking()[1:], asking())]
    refused, tokens = encode_chats(chats, tokenizer, tally)
    assert refused is None
    assert tally.bad == 1
    assert learnt(tokens, plain) == [f"I look.{WRITTEN}<|im_end|>", "It is there.<|im_end|>"]


WAYS = {
    "table": lambda m: m | {"tool_calls": json.dumps(m["tool_calls"])},
    "pandas": lambda m: m | {"tool_calls": np.array(m["tool_calls"], dtype=object)},
    "twice": lambda m: m | {"tool_calls": [{"function": {"name": "look", "arguments": json.dumps(WRITTEN)}}]},
    "bare": lambda m: m | {"tool_calls": [{"name": "look", "arguments": WRITTEN}]},
}


@pytest.mark.parametrize("way", WAYS)
def test_calls_are_read_however_a_table_holds_them(plain, way):
    tokenizer = with_template(plain, HEAD + CALLED.replace("c.function.", "(c.function or c).") + TAIL)
    messages = asking()
    expected = one(messages, tokenizer)
    messages[1] = WAYS[way](messages[1])
    assert one(np.array(messages, dtype=object), tokenizer).ids.tolist() == expected.ids.tolist()
    assert WRITTEN in plain.decode(expected.ids)


@pytest.mark.parametrize("calls", [{"name": "look"}, ["look"], [{"function": {"arguments": "{}"}}], 3])
def test_calls_of_no_known_shape_are_an_error(calls):
    with pytest.raises(ValueError, match=r"messages\[1\]\['tool_calls'\].*expected a list of"):
        as_document({"messages": asking(tool_calls=calls)}, "w")


def test_no_calls_are_no_calls(plain):
    refuses = "{% for m in messages if 'tool_calls' in m %}{{ raise_exception('one call a turn') }}{% endfor %}"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello.", "tool_calls": []}]
    tokenizer = with_template(plain, refuses + HEAD + TAIL)
    assert learnt(one(turns, tokenizer), tokenizer) == ["Hello.<|im_end|>"]


def test_calls_of_sharegpt_are_those_of_other_formats(plain):
    tokenizer = with_template(plain, HEAD + CALLED + TAIL)
    call = {"name": "look", "arguments": ARGUMENTS}
    for value, count in ((call, 1), ([call, call], 2)):
        shared = [
            {"from": "human", "value": "Where?"},
            {"from": "function_call", "value": json.dumps(value)},
            *({"from": "observation", "value": "there"} for _ in range(count)),
            {"from": "gpt", "value": "It is there."},
        ]
        tally = Tally()
        (tokens,) = encode_chats([as_document({"conversations": shared}, "w", tally)], tokenizer, tally)
        assert tokens.ids.tolist() == one(asking("", answers=["there"] * count), tokenizer).ids.tolist()


@pytest.mark.parametrize(("end", "said"), [("{% endgeneration %}<|im_end|>", 1), ("<|im_end|>{% endgeneration %}", 0)])
def test_an_end_that_a_template_does_not_mark_is_said(plain, end, said):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}" + end + "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    )
    tally = Tally()
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    tokens = one(turns * 2, with_template(plain, template), tally)
    assert learnt(tokens, plain) == ["Hello." if said else "Hello.<|im_end|>"] * 2
    assert sum("{% generation %}" in what for what in tally.left_out) == said


@pytest.mark.parametrize(
    ("template", "ends"), [(HEAD + TAIL, {"<|im_end|>"}), (GLM, {"<|user|>", "<|tool|>"}), (None, set())]
)
def test_a_model_stops_where_it_was_taught_to(plain, template, ends):
    tokenizer = with_template(plain, template)  # its own end token is another, as that of many base models
    wanted = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids([*ends])}
    assert set(ends_of_answers(tokenizer)) == wanted
    for end in wanted:
        model = Writes([*tokenizer("yes", add_special_tokens=False)["input_ids"], end, 5, 6])
        assert answers(model, tokenizer, [[3, 4]], 8) == ["yes"]


class Writes(torch.nn.Module):
    """Writes the same tokens after any prompt, until it is stopped."""

    def __init__(self, ids):
        super().__init__()
        self.ids = ids
        self.generation_config = None
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def generate(self, input_ids=None, inputs=None, **_):
        asked = input_ids if input_ids is not None else inputs
        return torch.cat([asked, torch.tensor([self.ids] * len(asked))], 1)
