"""Conversations: the template's own tokens, and loss on what the assistant says, for templates of different habits."""

from __future__ import annotations

import copy

import pytest
from sentencepiece_like import KINDS, sentencepiece_like

from lightning_cl.data.text.chat import assistant_spans, encode_chats
from lightning_cl.data.text.formats import Chat, Instruction, as_document
from lightning_cl.data.text.record_counts import Tally
from lightning_cl.data.text.tokenizer import TrainedBPE
from lightning_cl.data.text.tokens import encode

SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eot|>"]

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '<|stop|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The assistant's thinking stays in the last turn only.
THINKING = (
    "{% for m in messages %}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The generation prompt opens the thinking, and the rendered turns have none: no prefix property at all.
OPENED = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '<|stop|>' + m['content'].split('</think>')[-1] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|><think>\n' }}{% endif %}"
)
# The same, with an empty thinking of another form than the one the prompt opens.
# Headers without special tokens, no generation prompt, and an end token after the assistant alone.
FILLED = OPENED.replace("'<|stop|>' + m", "'<|stop|>' + ('<think></think>' if m['role'] == 'assistant' else '') + m")
BARE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ 'Q: ' + m['content'] + '\n' if m['role'] == 'user' else 'A: ' + m['content'] + eos_token + '\n' }}{% endfor %}"
)
# Nothing marks the end of a turn but the line's end.
LINES = (
    "{% for m in messages %}{{ m['role'] + '> ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant> ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory):
    """Each byte is a token: pieces of a text tokenised one by one give the tokens of the whole."""
    tokenizer = TrainedBPE(257, str(tmp_path_factory.mktemp("bytes"))).train(["any"])
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.bos_token = "<s>"
    return tokenizer


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """Tokens of several letters, as in real vocabularies."""
    texts = ["What is the answer? The answer is four.\n\nHello there, assistant and user and system.\n"] * 20
    tokenizer = TrainedBPE(420, str(tmp_path_factory.mktemp("merges"))).train(texts)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.bos_token = "<s>"
    return tokenizer


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def talk(*contents, system=None):
    """User and assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return tuple(([{"role": "system", "content": system}] if system is not None else []) + turns)


def only(chat, tokenizer):
    (tokens,) = encode_chats([chat], tokenizer, Tally())
    return tokens


def learnt(tokens, tokenizer):
    """What the model is taught to say: the text of each run of learnt tokens."""
    runs, previous = [], False
    for token, flag in zip(tokens.ids.tolist(), tokens.mask.tolist(), strict=True):
        if flag:
            runs = runs if previous else [*runs, []]
            runs[-1].append(token)
        previous = flag
    return [tokenizer.decode(run) for run in runs]


TURNS = talk("Größe?", "10 µm 🐍🏽‍🔬", "a\r\nb", "  two\n\nlines  ", "", "日本語")

HEADS = {"user": ("<|im_start|>user\n", 0), "assistant": ("<|im_start|>assistant\n", 0)}


def chatml_by_hand(turns):
    pieces = [("<|im_start|>system\nYou are kind.<|im_end|>\n", 0)]
    for message in turns:
        learn = message["role"] == "assistant"
        pieces += [HEADS[message["role"]], (message["content"] + "<|im_end|>", learn), ("\n", 0)]
    return pieces


def llama_by_hand(turns):
    pieces = [("<s>", 0)]
    for message in turns:
        learn = message["role"] == "assistant"
        pieces += [
            (f"<|start|>{message['role']}<|stop|>\n\n", 0),
            (message["content"].strip() + "<|eot|>", learn),
        ]
    return pieces


def bare_by_hand(turns):
    pieces = []
    for message in turns:
        if message["role"] == "user":
            pieces.append((f"Q: {message['content']}\n", 0))
        else:
            # The prompt of add_generation_prompt=True ends before the header: the model has to write it.
            pieces += [("A: ", 1), (message["content"] + TrainedBPE.END, 1), ("\n", 0)]
    return pieces


def opened_by_hand(turns):
    pieces = [("<s>", 0)]
    for message in turns:
        learn = message["role"] == "assistant"
        pieces += [(f"<|start|>{message['role']}<|stop|>", 0), (message["content"].strip() + "<|eot|>", learn)]
    return pieces


def lines_by_hand(turns):
    pieces = []
    for message in turns:
        pieces += [(f"{message['role']}> ", 0), (f"{message['content']}\n", message["role"] == "assistant")]
    return pieces


BY_HAND = [
    (CHATML, chatml_by_hand),
    (GENERATION, lambda turns: chatml_by_hand(turns)[1:]),
    (THINKING, lambda turns: chatml_by_hand(turns)[1:]),
    (LLAMA, llama_by_hand),
    (BARE, bare_by_hand),
    (OPENED, opened_by_hand),
    (LINES, lines_by_hand),
]
NAMES = ["chatml", "generation", "thinking", "llama", "bare", "opened", "lines"]


@pytest.mark.parametrize(("template", "by_hand"), BY_HAND, ids=NAMES)
@pytest.mark.parametrize("turns", [TURNS, TURNS[:2], talk("hi", "", "so", "end ")], ids=["long", "short", "silent"])
def test_ids_and_mask_are_those_put_together_by_hand(bytewise, template, by_hand, turns):
    tokenizer = with_template(bytewise, template)
    ids, mask = [], []
    for piece, learn in by_hand(turns):
        tokens = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += tokens
        mask += [bool(learn)] * len(tokens)
    found = only(Chat(turns), tokenizer)
    assert found.ids.tolist() == ids
    assert found.mask.tolist() == mask


@pytest.mark.parametrize("template", [template for template, _ in BY_HAND], ids=NAMES)
def test_ids_are_those_of_apply_chat_template(merging, template):
    tokenizer = with_template(merging, template)
    for turns in (TURNS, TURNS[:2], talk("What is the answer?", "The answer is four.")):
        expected = tokenizer.apply_chat_template(list(turns))["input_ids"]
        assert only(Chat(turns), tokenizer).ids.tolist() == expected


def test_start_token_is_there_once(merging):
    tokens = only(Chat(TURNS), with_template(merging, LLAMA))
    assert tokens.ids.tolist().count(merging.bos_token_id) == 1
    assert tokens.ids[0] == merging.bos_token_id


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (GENERATION, "<|im_end|>"), (LLAMA, "<|eot|>"), (BARE, TrainedBPE.END), (LINES, "\n")],
)
def test_learnt_tokens_are_the_answers_with_their_end(merging, template, end):
    tokenizer = with_template(merging, template)
    tokens = only(Chat(talk("What?", "The answer is four.", "And?", "Hello there")), tokenizer)
    header = "A: " if template == BARE else ""
    said = [text.lstrip(" ") for text in learnt(tokens, tokenizer)]  # the space of "assistant> " is in a word's token
    assert said == [f"{header}The answer is four.{end}", f"{header}Hello there{end}"]


def test_thinking_is_learnt_where_the_template_leaves_it(bytewise):
    turns = talk("one", "<think>\nhm\n</think>\n\nfirst", "two", "<think>\nso\n</think>\n\nsecond")
    tokenizer = with_template(bytewise, THINKING)
    said = learnt(only(Chat(turns), tokenizer), tokenizer)
    assert said == ["first<|im_end|>", "<think>\nso\n</think>\n\nsecond<|im_end|>"]


def test_thinking_that_the_template_drops_is_not_learnt(bytewise):
    turns = talk("one", "<think>\nhm\n</think>\n\nfirst", "two", "<think>so</think>second")
    tokenizer = with_template(bytewise, OPENED)
    assert learnt(only(Chat(turns), tokenizer), tokenizer) == ["first<|eot|>", "second<|eot|>"]


def test_empty_thinking_of_another_form_is_not_cut_in_the_middle(bytewise):
    tokenizer = with_template(bytewise, FILLED)
    said = learnt(only(Chat(talk("one", "first", "two", "second")), tokenizer), tokenizer)
    assert said == ["first<|eot|>", "second<|eot|>"]


def test_thinking_that_the_prompt_closes_is_learnt_from_where_it_differs(bytewise):
    # The prompt ends in an empty thinking, and this turn has one with words.
    closed = THINKING.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n\n</think>\n\n' }}{% endif %}")
    shown = closed.replace(
        "+ c +", "+ ('' if '<think>' in c or m['role'] == 'user' else '<think>\n\n</think>\n\n') + c +"
    )
    turns = talk("one", "first", "two", "<think>\nso\n</think>\n\nsecond")
    tokenizer = with_template(bytewise, shown)
    said = learnt(only(Chat(turns), tokenizer), tokenizer)
    assert said == ["first<|im_end|>", "so\n</think>\n\nsecond<|im_end|>"]


@pytest.mark.parametrize("opened", ["", "<think>\\n"])
def test_tool_call_of_an_earlier_turn_without_its_thinking(bytewise, opened):
    # As Qwen3 does (and 3.5, whose prompt opens the thinking): an empty thinking after the last question alone, and a
    # line's end between words and calls.
    late = (
        "{% set ns = namespace(last=0) %}{% for m in messages %}"
        "{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m['content'] }}{% if m['tool_calls'] %}{{ '\n' if m['content'] else '' }}{{ 'CALL' }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\nOPENED' }}{% endif %}"
    ).replace("OPENED", opened)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    turns = (talk("1")[0], call, {"role": "tool", "content": "2"}, talk("", "3")[1], *talk("4", "5"))
    tokenizer = with_template(bytewise, late)
    said = learnt(only(Chat(turns), tokenizer), tokenizer)
    last = "<think>\n\n</think>\n\n5<|im_end|>"
    assert said == ["CALL<|im_end|>", "3<|im_end|>", last.removeprefix(opened.replace("\\n", "\n"))]


def test_answer_that_repeats_the_question_and_the_markup_is_found(bytewise):
    # Searching the rendered text for the answer would find the question.
    turns = talk("same", "same", "assistant\nsame", "assistant\nsame")
    for template in (CHATML, THINKING, GENERATION):
        tokenizer = with_template(bytewise, template)
        assert learnt(only(Chat(turns), tokenizer), tokenizer) == ["same<|im_end|>", "assistant\nsame<|im_end|>"]
    text, ((start, end), _) = assistant_spans(Chat(turns), with_template(bytewise, OPENED))
    assert text[start:end] == "same<|eot|>"
    assert text[:start] == "<s><|start|>user<|stop|>same<|eot|><|start|>assistant<|stop|>"


def test_generation_prompt_after_a_user_alone(bytewise):
    # Two turns of the assistant in a row: there is no generation prompt before the second.
    picky = CHATML.replace("if add_generation_prompt", "if add_generation_prompt and messages[-1]['role'] == 'user'")
    turns = (*talk("hi", "one"), {"role": "assistant", "content": "two"})
    tokenizer = with_template(bytewise, picky)
    assert learnt(only(Chat(turns), tokenizer), tokenizer) == ["one<|im_end|>", "two<|im_end|>"]


# The answer follows a space, and there is no generation prompt; v3 puts the system's words before the last question.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else ' ' + m['content'] + eos_token }}{% endfor %}"
)
MISTRAL_3 = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}{{ bos_token }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if loop.last or loop.index0 + 2 == messages | length else '') + m['content'] }}"
    "{{ '[/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize("kind", [*KINDS, "bytes"])
@pytest.mark.parametrize(("template", "system"), [(MISTRAL, None), (MISTRAL_3, None), (MISTRAL_3, "Be brief.")])
@pytest.mark.parametrize("answer", ["42 m", "漢字", "- b", "```py\n1```", "", "ja", "\nb"])
def test_learning_begins_where_the_inference_prompt_ends(bytewise, kind, template, system, answer):
    """Oracle: the template's own prompt, for each answer of the conversation as the last one."""
    own = (
        with_template(bytewise, template) if kind == "bytes" else sentencepiece_like(kind, "wie lang ja 42 b", template)
    )
    turns = talk("wie", answer, "lang", answer, system=system)
    answers = [place for place, message in enumerate(turns) if message["role"] == "assistant"]
    for place in answers:
        tokens = only(Chat(turns[: place + 1], first=place), own)
        prompt = own.apply_chat_template(list(turns[:place]), add_generation_prompt=True)["input_ids"]
        assert tokens.ids[: len(prompt)].tolist() == prompt
        assert tokens.mask.tolist() == [False] * len(prompt) + [True] * (len(tokens.ids) - len(prompt))
    # An earlier answer begins with the space, too.
    said = learnt(only(Chat(turns), own), own)
    words = f" {answer.strip() if template == MISTRAL_3 else answer}" + own.eos_token
    assert len(said) == 2
    assert all(text in (words, words[1:]) for text in said)  # decoding leaves the first space out
    assert sum(only(Chat(turns), own).mask) == 2 * len(tokens.ids[len(prompt) :])


def test_thinking_is_learnt_after_any_turn(bytewise):
    # As Qwen3 does: after the last question the last turn gets an empty thinking, whoever spoke before it.
    late = (
        "{% set ns = namespace(last=0) %}{% for m in messages %}"
        "{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' and loop.index0 > ns.last and loop.last %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = with_template(bytewise, late)
    last = "<think>\n\n</think>\n\ntwo<|im_end|>"
    turns = (*talk("hi", "one"), {"role": "assistant", "content": "two"})
    assert learnt(only(Chat(turns), tokenizer), tokenizer) == ["one<|im_end|>", last]
    assert learnt(only(Chat(talk("hi", "one", "hi", "two")), tokenizer), tokenizer) == ["one<|im_end|>", last]
    # Words that are the same everywhere are not taken for one another.
    turns = ({"role": "user", "content": "two"}, *({"role": "assistant", "content": "two"} for _ in range(3)))
    assert learnt(only(Chat(turns), tokenizer), tokenizer) == ["two<|im_end|>", "two<|im_end|>", last]


def test_thinking_that_is_empty_without_its_words_is_learnt_with_them(bytewise):
    # The earlier turn is written otherwise where it is the last, and the marked one without its thinking.
    split = "{% set t = m['content'].split('</think>') %}"
    shown = (
        f"{{% for m in messages %}}{split}{{{{ '<|im_start|>' + m['role'] + '\n' }}}}"
        "{% if m['role'] == 'assistant' and loop.index0 + 2 > messages | length %}"
        "{{ (t[0] if t | length > 1 else '<think>') + '</think>' + t[-1] }}{% else %}{{ t[-1] }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = with_template(bytewise, shown)
    thoughtful = {"role": "assistant", "content": "<think>so</think>two"}
    said = learnt(only(Chat((*talk("hi", "one"), thoughtful)), tokenizer), tokenizer)
    assert said == ["one<|im_end|>", "<think>so</think>two<|im_end|>"]


def test_conversation_that_the_assistant_opens(bytewise):
    turns = ({"role": "assistant", "content": "Hello!"}, *talk("hi", "yes?"))
    for template in (CHATML, GENERATION, LLAMA, LINES):
        tokenizer = with_template(bytewise, template)
        said = learnt(only(Chat(turns), tokenizer), tokenizer)
        assert [text[:4] for text in said] == ["Hell", "yes?"]


@pytest.mark.parametrize("template", [CHATML, GENERATION, LLAMA, THINKING, OPENED, LINES])
def test_turns_of_the_prompt_bear_no_loss(bytewise, template):
    tokenizer = with_template(bytewise, template)
    turns = talk("a", "not this", "b", "this", "c", "and this")
    said = learnt(only(Chat(turns, first=3), tokenizer), tokenizer)
    assert [text.split("<")[0].strip() for text in said] == ["this", "and this"]
    # The tokens are the same as where all of it is learnt.
    assert only(Chat(turns, first=3), tokenizer).ids.tolist() == only(Chat(turns), tokenizer).ids.tolist()


def test_prompt_and_completion_as_messages_learn_the_completion():
    chat = as_document({"prompt": list(talk("a", "b", "c")), "completion": list(talk("", "d")[1:])})
    assert isinstance(chat, Chat)
    assert chat.first == 3


TOOLS = CHATML.replace(
    "+ m['content'] +", "+ (m['content'] or '') + (m['tool_calls'] | tojson if m['tool_calls'] else '') +"
)


@pytest.mark.parametrize("template", [TOOLS, "{{ tools | tojson if tools else '' }}" + TOOLS])
def test_tool_calls_are_learnt_as_the_template_writes_them(bytewise, template):
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    turns = (
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    )
    tools = ({"type": "function", "function": {"name": "add", "parameters": {"default": None}}},)
    tokenizer = with_template(bytewise, template)
    tokens = only(Chat(turns, tools), tokenizer)
    assert tokens.ids.tolist() == tokenizer.apply_chat_template(list(turns), tools=list(tools))["input_ids"]
    call = '[{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]<|im_end|>'
    assert learnt(tokens, tokenizer) == [call, "It is 2.<|im_end|>"]


def test_instruction_becomes_a_conversation(bytewise):
    tokenizer = with_template(bytewise, LLAMA)
    ((ids, mask),) = encode([Instruction("Add.", "1 and 2", "3")], tokenizer, 512)
    assert tokenizer.decode(ids[~mask]).endswith("user<|stop|>\n\nAdd.\n\n1 and 2<|eot|><|start|>assistant<|stop|>\n\n")
    assert tokenizer.decode(ids[mask]) == "3<|eot|>"


# ---------------------------------------------------------------------- length


def test_long_conversation_is_cut_on_the_right(bytewise):
    tokenizer = with_template(bytewise, GENERATION)
    chat = Chat(talk("a", "b" * 50, "c", "d" * 50))
    whole = only(chat, tokenizer)
    for length in (40, 60, 100):
        tally = Tally()
        ((ids, mask),) = encode([chat], tokenizer, length, tally)
        assert ids.tolist() == whole.ids[:length].tolist()
        assert mask.tolist() == whole.mask[:length].tolist()
        assert (tally.truncated, tally.dropped) == (1, 0)


def test_conversation_that_is_cut_before_the_first_answer_is_dropped(bytewise):
    tally = Tally()
    tokenizer = with_template(bytewise, CHATML)
    assert list(encode([Chat(talk("a" * 100, "b")), Chat(talk("a", "b"))], tokenizer, 90, tally)) != []
    assert (tally.dropped, tally.truncated) == (1, 0)


# ---------------------------------------------------------------------- errors


def test_conversation_without_a_template_says_what_to_do(bytewise):
    with pytest.raises(ValueError, match=r"chat\.jsonl, line 3: .*chat template.*TaskDataModule\(chat_template"):
        list(encode([Chat(talk("a", "b"), where="chat.jsonl, line 3")], bytewise, 64))


def test_conversation_that_the_template_refuses_is_named(bytewise):
    tokenizer = with_template(bytewise, BARE)
    wrong = Chat(talk("a", "b", system="odd"), where="chat.jsonl, line 7")
    with pytest.raises(ValueError, match=r"chat\.jsonl, line 7: .*roles must alternate"):
        list(encode([wrong], tokenizer, 64))
    tally = Tally("skip")
    samples = list(encode([Chat(talk("a", "b")), wrong, Chat(talk("c", "d"))], tokenizer, 64, tally))
    assert [tokenizer.decode(ids[mask])[:4] for ids, mask in samples] == ["A: b", "A: d"]
    assert (tally.bad, tally.dropped) == (1, 0)
    assert "line 7" in tally.reasons[0]


def test_turn_that_cannot_be_found_is_an_error(bytewise):
    # What the template writes depends on the whole conversation: no rendering has anything in common with it.
    count = "messages | map(attribute='content') | join | length | string"
    strange = f"{{% for m in messages %}}{{{{ m['content'] + ({count}) }}}}{{% endfor %}}"
    with pytest.raises(ValueError, match=r"x, line 1.*messages\[1\].*generation"):
        only(Chat(talk("abc", "def", "g"), where="x, line 1"), with_template(bytewise, strange))


@pytest.mark.parametrize("mark", ["", "{% generation %}x{% endgeneration %}"])
def test_template_that_leaves_the_words_out_is_refused(bytewise, mark):
    # As those for content in parts do with strings.
    parts = "{% for m in messages %}{{ m['role'] }}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match=r"x, line 1.*nothing of what the assistant says"):
        only(Chat(talk("abc", "def"), where="x, line 1"), with_template(bytewise, parts + mark))


def test_slow_tokenizer_is_refused(bytewise):
    tokenizer = with_template(bytewise, CHATML)

    class Slow:
        is_fast = False

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    with pytest.raises(ValueError, match="fast tokenizer"):
        encode_chats([Chat(talk("a", "b"))], Slow(), Tally())


@pytest.mark.parametrize("on_bad_record", ["error", "skip"])
def test_a_broken_template_is_no_records_fault(bytewise, on_bad_record):
    broken = copy.deepcopy(bytewise)
    broken.chat_template = "{% for m in messages %}{{ m['content'] }"
    chat = as_document({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    tally = Tally(on_bad_record)
    with pytest.raises(ValueError, match=r"chat_template: .*not valid Jinja, line 1"):
        encode_chats([chat], broken, tally)
    assert tally.bad == 0
