"""Record formats: what each record means, and what is wrong with it."""

from __future__ import annotations

import pytest

from lightning_cl.data.text.formats import Chat, Completion, Instruction, Text, as_document

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
CHAT = Chat((USER, ASSISTANT))
TOOL = {"type": "function", "function": {"name": "add"}}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
BROKEN_CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"q": "x\ud800"}}}]}
NAN = float("nan")


@pytest.mark.parametrize(
    ("record", "document"),
    [
        ("plain", Text("plain")),
        ({"text": "plain", "id": 3}, Text("plain")),
        ({"prompt": "a ", "completion": "b"}, Completion("a ", "b")),
        ({"prompt": "a", "answer": "b"}, Completion("a", "b")),
        ({"prompt": "", "completion": ""}, Completion("", "")),
        ({"prompt": [USER], "completion": [ASSISTANT]}, Chat((USER, ASSISTANT), first=1)),
        ({"prompt": "hi", "completion": [ASSISTANT]}, Chat((USER, ASSISTANT), first=1)),
        ({"prompt": [USER], "answer": "hello"}, Chat((USER, ASSISTANT), first=1)),
        ({"messages": [USER, ASSISTANT]}, CHAT),
        ({"messages": (USER, ASSISTANT), "tools": []}, CHAT),
        ({"messages": [USER, ASSISTANT], "tools": [TOOL]}, Chat((USER, ASSISTANT), (TOOL,))),
        (
            {"messages": [USER, ASSISTANT], "tools": '[{"type": "function"}]'},
            Chat(CHAT.messages, ({"type": "function"},)),
        ),
        # as pandas writes it into a CSV file
        ({"messages": [USER, ASSISTANT], "tools": str([TOOL | {"strict": None}])}, 2),
        ({"messages": [USER, CALL, {"role": "tool", "content": "2"}, ASSISTANT]}, 4),
        ({"messages": [USER, CALL | {"content": None}]}, Chat((USER, CALL))),
        ({"messages": [USER | {"name": None}, ASSISTANT | {"tool_calls": None}]}, CHAT),
        ({"messages": '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]'}, CHAT),
        ({"messages": "[{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'hello'}]"}, CHAT),
        (
            {
                "messages": [
                    USER | {"content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                    ASSISTANT,
                ]
            },
            CHAT,
        ),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, CHAT),
        ({"conversations": [{"from": "user", "value": "hi"}, {"from": "model", "value": "hello"}]}, CHAT),
        ({"conversations": [USER, ASSISTANT]}, CHAT),
        (
            {
                "system": "Be kind.",
                "conversations": [{"from": "human", "value": "hi"}, {"from": "assistant", "value": "hello"}],
            },
            Chat(({"role": "system", "content": "Be kind."}, USER, ASSISTANT)),
        ),
        ({"system": "", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, CHAT),
        ({"instruction": "do", "input": "it", "output": "done"}, Instruction("do", "it", "done")),
        ({"instruction": "do", "output": "done"}, Instruction("do", "", "done")),
        # what a table has in the columns of other formats
        ({"text": "plain", "prompt": None, "completion": NAN, "messages": None}, Text("plain")),
        ({"instruction": "do", "input": NAN, "output": "done"}, Instruction("do", "", "done")),
        # the format that says more
        ({"text": "### do: done", "instruction": "do", "output": "done"}, Instruction("do", "", "done")),
        ({"text": "hi hello", "messages": [USER, ASSISTANT]}, CHAT),
        ({"prompt": "hi", "completion": "hello", "messages": [USER, ASSISTANT]}, CHAT),
        ({"text": "plain", "prompt": "alone"}, Text("plain")),
    ],
)
def test_record_is_told_by_its_keys(record, document):
    found = as_document(record)
    if isinstance(document, int):
        assert len(found.messages) == document
    else:
        assert found == document


def test_names_of_sharegpt_become_roles():
    speakers = ["system", "human", "function_call", "observation", "gpt", "user", "tool", "chatgpt", "function"]
    found = as_document({"conversations": [{"from": speaker, "value": "x"} for speaker in speakers]})
    roles = ["system", "user", "assistant", "tool", "assistant", "user", "tool", "assistant", "tool"]
    assert [message["role"] for message in found.messages] == roles


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (5, ["int", '"text"', '"messages"']),
        ({}, ["keys []", '"messages"']),
        ({"txt": "x", "b": 1}, ["['b', 'txt']", '{"text"}', '{"prompt", "completion"}', '"conversations"', '"output"']),
        ({"text": None}, ["'text' without a value", "string"]),
        ({"text": 5}, ["'text'", "string", "int"]),
        ({"text": "a\ud800"}, ["'text'", "character 1", "surrogate"]),
        ({"prompt": "a"}, ["['prompt']"]),
        ({"prompt": "a", "completion": 3}, ["'completion'", "string", "int"]),
        ({"prompt": ["a"], "completion": "b"}, ["prompt[0]", "str"]),
        ({"prompt": 5, "completion": [ASSISTANT]}, ["'prompt'", "string", "int"]),
        ({"prompt": [USER], "completion": [USER]}, ["completion", "no assistant turn"]),
        ({"prompt": [], "completion": [ASSISTANT]}, ["prompt", "empty"]),
        ({"messages": []}, ["messages", "empty"]),
        ({"messages": "hi"}, ["messages", "list", "str"]),
        ({"messages": "[{"}, ["messages", "JSON"]),
        # as datasets' to_csv writes it
        (
            {"messages": "[{'role': 'user', 'content': 'hi'}\n {'role': 'assistant', 'content': 'x'}]"},
            ["to_json", "comma"],
        ),
        ({"messages": [USER, ASSISTANT], "tools": "[{'a': 1} {'b': 2}]"}, ["'tools'", "to_json"]),
        ({"messages": [USER, BROKEN_CALL]}, ["messages[1]['tool_calls'][0]", "'q'", "character 1", "surrogate"]),
        ({"messages": [USER, ASSISTANT], "tools": [{"a": ["\ud800"]}]}, ["'tools'[0]['a'][0]", "surrogate"]),
        ({"messages": [USER]}, ["no assistant turn", "['user']"]),
        ({"messages": ["hi"]}, ["messages[0]", "str"]),
        ({"messages": [USER, {"role": "assistant"}]}, ["messages[1] has no 'content'", "['role']"]),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, ["messages[1] has no 'content'"]),
        ({"messages": [USER, {"role": "assistant", "content": 5}]}, ["messages[1]['content']", "int"]),
        ({"messages": [{"content": "hi"}]}, ["messages[0] has no 'role'", "['content']"]),
        ({"messages": [USER, {"role": "robot", "content": "x"}]}, ["messages[1]", "'robot'", "assistant"]),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, ["messages[0]", "'image'", "text"]),
        ({"conversations": [{"from": "alien", "value": "x"}]}, ["conversations[0]", "'alien'", "human"]),
        ({"conversations": [{"from": "human"}]}, ["conversations[0] has no 'value'"]),
        ({"conversations": [{"from": "human", "value": 1}]}, ["conversations[0]['value']", "int"]),
        ({"messages": [USER, ASSISTANT], "tools": "[{"}, ["'tools'", "JSON"]),
        ({"messages": [USER, ASSISTANT], "tools": [1]}, ["'tools'", "list"]),
        ({"instruction": "do", "output": 1}, ["'output'", "string"]),
    ],
)
def test_malformed_record_says_what_is_wrong(record, words):
    with pytest.raises(ValueError, match=r".") as error:
        as_document(record)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_place_of_a_record_is_kept_but_does_not_tell_documents_apart():
    first, second = (as_document({"messages": [USER, ASSISTANT]}, where) for where in ("line 1", "line 2"))
    assert (first.where, second.where) == ("line 1", "line 2")
    assert first == second


def test_instruction_without_a_template_has_plain_headings():
    assert Instruction("Add.", "1 2", "3").as_completion() == Completion(
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n", "3"
    )
    assert Instruction("Hi.", "", "3").as_completion().prompt == "### Instruction:\nHi.\n\n### Response:\n"


def test_instruction_in_a_conversation_has_its_input_after_a_blank_line():
    asked = [Instruction("Add.", given, "3").as_chat().messages[0]["content"] for given in ("1 2", "")]
    assert asked == ["Add.\n\n1 2", "Add."]


@pytest.mark.parametrize(
    ("record", "plain"),
    [
        ("a", "a"),
        ({"prompt": "a ", "completion": "b"}, "a b"),
        ({"messages": [USER, CALL, ASSISTANT]}, 'hi\nhello\n[{"function": {"name": "add", "arguments": {}}}]'),
        ({"instruction": "a", "output": "b"}, "### Instruction:\na\n\n### Response:\nb"),
    ],
)
def test_plain_text_is_all_of_it(record, plain):
    assert as_document(record).plain == plain
