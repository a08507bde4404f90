"""Conversations of other tools: calls, switches, what a template leaves out, and what ends an answer."""

from __future__ import annotations

import copy
import json

import pytest
from chat_templates import HEAD, TAIL, chat_tokenizer, learnt, one, with_template
from transformers import PreTrainedTokenizerFast

from lightning_cl import TaskDataModule
from lightning_cl.data.text.chat import encode_chats
from lightning_cl.data.text.formats import Chat, Completion, as_document
from lightning_cl.data.text.record_counts import Tally
from lightning_cl.data.text.records import read_documents
from lightning_cl.data.text.tokenizer import TrainedBPE
from lightning_cl.data.text.tokens import encode

CALLS = {
    "tojson": "{{ call.arguments | tojson }}",  # Qwen, Hermes, SmolLM3
    "printed": "{{ call.arguments }}",  # DeepSeek, Mistral's older ones: want JSON text
    "either": "{% if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif %}",
    "items": "{% for k, v in call.arguments.items() %}<{{ k }}>{{ v }}</{{ k }}>{% endfor %}",  # GLM, MiniMax
    "joined": "{{ '{' + call.name + ': ' + call.arguments + '}' }}",  # adds texts: an object is an error
}
TOOLS = "{% if tools %}{{ 'Tools: ' }}{{ tools | tojson }}{{ '\n' }}{% endif %}"
ARGUMENTS = {"number": "0", "größe": [1, 2.5, None, True], "who": 'it\'s "me"'}


def calling(how):
    call = "{% for c in m.tool_calls or [] %}{% set call = c.function %}{{ '<call>' + call.name }}" + CALLS[how]
    return TOOLS + HEAD + call + "{{ '</call>' }}{% endfor %}" + TAIL


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return chat_tokenizer(str(tmp_path_factory.mktemp("bpe")))


def call(arguments, **more):
    return {"id": "c0", "type": "function", "function": {"name": "look", "arguments": arguments}} | more


def asking(arguments, **message):
    return [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call(arguments)]} | message,
        {"role": "tool", "tool_call_id": "c0", "content": "there"},
        {"role": "assistant", "content": "It is there."},
    ]


@pytest.mark.parametrize("how", CALLS)
def test_arguments_as_text_and_as_an_object_give_the_same_tokens_encoded_once(plain, how):
    tokenizer = with_template(plain, calling(how))
    texts = [
        tokenizer.decode(one(asking(given), tokenizer).ids)
        for given in (ARGUMENTS, json.dumps(ARGUMENTS), json.dumps(ARGUMENTS, ensure_ascii=False, indent=1))
    ]
    assert texts[0] == texts[1] == texts[2]
    said = texts[0].partition("<call>look")[2].partition("</call>")[0]
    if how == "items":
        assert said.startswith("<number>0</number><größe>[1, 2.5, None, True]</größe>")
    else:
        said = said.partition(": ")[2][:-1] if how == "joined" else said
        said = texts[0].partition("look: ")[2].partition("}</call>")[0] if how == "joined" else said
        assert json.loads(said) == ARGUMENTS  # a call that is encoded twice would be a text


@pytest.mark.parametrize("how", CALLS)
def test_calls_without_arguments_do_not_decide_for_others(plain, how):
    tokenizer = with_template(plain, calling(how))
    chats = [Chat(tuple(asking(arguments))) for arguments in ({}, "{}", "", ARGUMENTS, json.dumps(ARGUMENTS))]
    tokens = encode_chats(chats, tokenizer, Tally())
    assert tokens[3].ids.tolist() == tokens[4].ids.tolist()
    assert tokens[0].ids.tolist() == tokens[1].ids.tolist() == tokens[2].ids.tolist()


def test_the_single_call_of_older_exports_is_a_tool_call(plain):
    tokenizer = with_template(plain, calling("tojson"))
    old = asking("{}")
    old[1] = {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"number": "0"}'}}
    assert '<call>look{"number": "0"}</call>' in tokenizer.decode(one(old, tokenizer).ids)


def test_arguments_that_are_no_json_are_an_error(plain):
    with pytest.raises(ValueError, match=r"line 1.*messages\[1\]\['tool_calls'\]\[0\].*JSON.*'\{number: 0'"):
        one(asking("{number: 0"), with_template(plain, calling("tojson")))


# ---------------------------------------------------------------------- what a template leaves out


@pytest.mark.parametrize("arguments", [{"number": "0"}, '{"number": "0"}'])
def test_a_template_without_calls_is_an_error_where_a_call_is_to_be_learnt(plain, arguments):
    tokenizer = with_template(plain, HEAD + TAIL)  # as SmolLM2's
    with pytest.raises(ValueError, match=r"line 1: .*messages\[1\].*leaves the tool calls out.*chat_template"):
        one(asking(arguments), tokenizer)
    tally = Tally("skip")
    assert one(asking(arguments), tokenizer, tally) is None
    assert tally.bad == 1
    # In a prompt they are counted: nothing wrong is learnt.
    tally = Tally()
    assert learnt(one(asking(arguments, weight=0), tokenizer, tally), tokenizer) == ["It is there.<|im_end|>"]
    assert tally.left_out == {"tool calls, which the chat template leaves out": 1}


def test_the_second_call_of_a_turn_counts_too(plain):
    first = calling("tojson").replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    messages = asking({})
    messages[1]["tool_calls"] = [call({"number": "0"}), call({"number": "1"})]
    with pytest.raises(ValueError, match="tool calls"):
        one(messages, with_template(plain, first))


@pytest.mark.parametrize(
    ("template", "record", "what"),
    [
        (HEAD + TAIL, {"tools": [{"type": "function", "function": {"name": "look"}}]}, "tools"),
        (HEAD + TAIL, {"reasoning_content": "add one"}, "reasoning (reasoning_content)"),
        (HEAD + TAIL, {"name": "Ada"}, "names of speakers"),
        (HEAD + TAIL, {"refusal": "no"}, "the field 'refusal' of messages"),
        (
            HEAD.replace("m.content or ''", "m.content.split('</think>')[-1]") + TAIL,
            {"content": "<think>add one</think>2"},
            "thinking (<think>)",
        ),
        (
            "{% for m in messages if m.role != 'system' %}" + HEAD.partition("%}")[2] + TAIL,
            {"system": "Be kind."},
            "system texts",
        ),
    ],
)
def test_what_a_template_leaves_out_is_counted(plain, template, record, what):
    tokenizer = with_template(plain, template)
    own = {key: value for key, value in record.items() if key not in ("tools", "system")}
    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"} | own]
    tally = Tally()
    tokens = one(messages, tokenizer, tally, **{k: v for k, v in record.items() if k not in own})
    assert tally.left_out == {f"{what}, which the chat template leaves out": 1}
    assert learnt(tokens, tokenizer) == ["2<|im_end|>"]


def test_a_template_that_writes_everything_has_nothing_to_say(plain):
    full = calling("tojson").replace("m.role", "m.role + (m.name or '') + (m.reasoning_content or '')")
    tools = [{"type": "function", "function": {"name": "look"}}]
    tally = Tally()
    messages = [{"role": "system", "content": " trimmed \n"}, *asking({"a": 1}, name="Ada", reasoning_content="hm")]
    one(messages, with_template(plain, full.replace("m.content or ''", "(m.content or '') | trim")), tally, tools=tools)
    assert tally.left_out == {}


def test_thinking_on_one_line_is_no_reason_to_refuse(plain):
    tokenizer = with_template(plain, HEAD.replace("m.content or ''", "m.content.split('</think>')[-1] | trim") + TAIL)
    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "<think>one more</think> 2"}]
    assert learnt(one(messages, tokenizer), tokenizer) == ["2<|im_end|>"]


# ---------------------------------------------------------------------- switches


@pytest.mark.parametrize("switch", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}])
@pytest.mark.parametrize("template", [HEAD + TAIL, "generation"])
def test_a_turn_that_is_switched_off_bears_no_loss(plain, switch, template):
    if template == "generation":
        template = HEAD.replace("{{ m.content or '' }}", "") + (
            "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
            "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        )
    tokenizer = with_template(plain, template)
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "not this", **switch},
        {"role": "user", "content": "Again"},
        {"role": "assistant", "content": "this", **{key: type(value)(1) for key, value in switch.items()}},
    ]
    tokens = one(turns, tokenizer)
    assert learnt(tokens, tokenizer) == ["this<|im_end|>"]
    everything = one([{k: v for k, v in turn.items() if k not in switch} for turn in turns], tokenizer)
    assert tokens.ids.tolist() == everything.ids.tolist()


@pytest.mark.parametrize("message", [{"weight": 0.5}, {"train": "no"}, {"role": "user", "train": True}])
def test_a_switch_that_means_something_else_is_an_error(message):
    turn = {"role": "assistant", "content": "b"} | message
    with pytest.raises(ValueError, match=r"messages\[1\]\['(weight|train)'\]"):
        as_document({"messages": [{"role": "user", "content": "a"}, turn, {"role": "assistant", "content": "c"}]})


def test_only_the_last_turn(plain):
    tokenizer = with_template(plain, HEAD + TAIL)
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    ((ids, mask),) = encode([Chat(tuple(turns))], tokenizer, 64, last_turn=True)
    assert tokenizer.decode(ids[mask]) == "d<|im_end|>"


# ---------------------------------------------------------------------- fields of other formats


def test_system_and_history_of_alpaca_stand_in_the_prompt(plain):
    record = {
        "system": "One word.",
        "history": [["What is red?", "A colour."]],
        "instruction": "What is 0?",
        "input": "",
        "output": "Number.",
    }
    tally = Tally()
    document = as_document(record, tally=tally)
    assert tally.left_out == {}
    tokenizer = with_template(plain, HEAD + TAIL)
    ((ids, mask),) = encode([document], tokenizer, 128)
    assert tokenizer.decode(ids[mask]) == "Number.<|im_end|>"
    roles = ["system\nOne word.", "user\nWhat is red?", "assistant\nA colour.", "user\nWhat is 0?"]
    asked = "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in roles)
    assert tokenizer.decode(ids[~mask]) == asked + "<|im_start|>assistant\n\n"
    bare = document.as_completion()
    assert bare.asked.startswith("One word.\n\n### Instruction:\nWhat is red?\n\n### Response:\nA colour.\n\n")
    assert document == as_document(record | {"history": json.dumps(record["history"])})


@pytest.mark.parametrize(
    ("record", "unused"),
    [
        ({"messages": [{"role": "assistant", "content": "b"}], "history": [["a", "b"]], "text": "x"}, "history text"),
        (
            {"messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}], "system": "c"},
            "system",
        ),
        ({"prompt": "a", "completion": "b", "tools": [{"name": "x"}], "input": "c"}, "tools input"),
        ({"text": "a", "system": "b", "images": ["c.png"]}, "system images"),
        ({"instruction": "a", "output": "b", "context": "c", "tools": []}, "context"),
        ({"prompt": "a", "completion": "b", "system": "c", "id": 3}, ""),
    ],
)
def test_no_known_field_is_dropped_in_silence(record, unused):
    tally = Tally()
    as_document(record, tally=tally)
    assert tally.left_out == {f"the field {name!r}": 1 for name in unused.split()}


# ---------------------------------------------------------------------- templates for prompts, and ends


def test_prompts_and_completions_can_have_the_template(plain):
    tokenizer, tally = with_template(plain, HEAD + TAIL), Tally()
    document = Completion("a", "b", "Be kind.")
    ((ids, mask),) = encode([document], tokenizer, 64, tally, template=True)
    assert tokenizer.decode(ids[mask]) == "b<|im_end|>"
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\na")
    assert tally.untemplated == 0
    ((ids, _),) = encode([document], tokenizer, 64, tally)
    assert tokenizer.decode(ids) == "Be kind.\n\nab<|endoftext|>"
    assert tally.untemplated == 1


def test_the_plan_says_that_no_template_is_used(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path))
    records = [{"prompt": f"a{i}", "completion": "b"} for i in range(4)]
    for template, said in ((False, True), (True, False)):
        data = TaskDataModule({"a": records}, with_template(plain, HEAD + TAIL), template=template)
        data.setup()
        assert any("without the tokenizer's chat template" in line for line in data.describe(data.tasks[0])) == said
    data = TaskDataModule({"a": records}, plain, template=True)
    with pytest.raises(ValueError, match="template=True: the tokenizer has no chat template"):
        data.setup()


GLM = (
    "{%- for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{%- endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_what_ends_an_answer_is_learnt_where_a_turn_ends_by_the_next_role(plain):
    tokenizer = with_template(plain, GLM)
    turns = [{"role": r, "content": t} for r, t in zip(["user", "assistant"] * 2, ["a", "b", "c", "d"], strict=True)]
    tokens = one(turns, tokenizer)
    assert learnt(tokens, tokenizer) == ["b<|user|>", "d<|endoftext|>"]
    assert tokens.ids.tolist()[:-1] == tokenizer.apply_chat_template(turns)["input_ids"]


def test_a_role_that_is_plain_text_is_learnt_as_it_is_written(plain):
    words = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(plain.backend_tokenizer), eos_token=TrainedBPE.END)
    tokenizer = with_template(words, GLM.replace("<|{{ m.role }}|>", "\n[{{ m.role }}]").replace("<|a", "\n[a"))
    turns = [{"role": r, "content": t} for r, t in zip(["user", "assistant"] * 2, ["a", "b", "c", "d"], strict=True)]
    assert learnt(one(turns, tokenizer), tokenizer)[0] == "b[user]"


def test_white_space_alone_ends_no_answer_and_is_said(plain):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
    tally = Tally()
    one(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], with_template(plain, template), tally
    )
    assert any("end of the answers" in what for what in tally.left_out)


@pytest.mark.parametrize("answer", ["", "  ", None])
def test_an_empty_answer_is_one_fault_in_every_container(tmp_path, answer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": answer}]
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "a.csv").write_text(f"prompt,completion\na,b\nc,{answer or ''}\n")
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    for source in (str(lines), str(tmp_path / "a.csv"), str(tmp_path / "a.parquet"), records):
        with pytest.raises(ValueError, match=r"(line [23]|row 1|item 1): "):
            list(read_documents(source, "t", "train"))
        tally = Tally("skip")
        assert len(list(read_documents(source, "t", "train", tally))) == 1
        assert tally.bad == 1


def test_copies_of_a_call_stay_on_one_side_however_its_arguments_are_given():
    from lightning_cl.data.text.splitting import said

    one, other = (Chat(tuple(asking(given))) for given in ({"a": 1}, '{"a":1}'))
    assert said(one) == said(other)
