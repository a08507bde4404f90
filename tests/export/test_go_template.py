"""Go templates write what the chat templates write: in our evaluator, and in Go itself."""

from __future__ import annotations

import json

import pytest
from export.ollama_templates import MADE, REFUSED, go_renderer, shipped_templates

from lightning_cl.export.go_evaluator import evaluate, ollama_prompt
from lightning_cl.export.go_template import as_written, conversations, derive_template, literal, verify_template

CHATS = list(conversations())


@pytest.fixture(scope="module")
def go(tmp_path_factory):
    return go_renderer(tmp_path_factory.mktemp("go"))


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def renderer(tokenizer, source):
    """A chat template as a function that remembers what it wrote."""
    known = {}

    def render(chat):
        key = json.dumps(chat)
        if key not in known:
            try:
                known[key] = tokenizer.apply_chat_template(
                    chat, chat_template=source, tokenize=False, add_generation_prompt=True
                )
            except Exception as error:
                known[key] = error
        if isinstance(known[key], Exception):
            raise known[key]
        return known[key]

    return render


def expected(chat, template, render):
    """What Ollama must write, without the start token; None where the chat template refuses the conversation."""
    try:
        return render(as_written(chat, template)).removeprefix("<s>")
    except Exception:
        return None


def compare(templates, go):
    """Asserts that Go and the evaluator write what each chat template writes; returns how many were compared."""
    written = go([(template.text, CHATS) for template, _ in templates])
    compared = 0
    for (template, render), texts in zip(templates, written, strict=True):
        for chat, text in zip(CHATS, texts, strict=True):
            wanted = expected(chat, template, render)
            assert text == ollama_prompt(template.text, chat)
            assert wanted in (None, text)
            compared += wanted is not None
    return compared


def test_templates_are_derived_exactly(tokenizer, go):
    renders = {name: renderer(tokenizer, source) for name, source in MADE.items()}
    templates = {name: derive_template(render, "<s>") for name, render in renders.items()}
    kinds = {name: (t.system, t.greeting) for name, t in templates.items()}
    assert kinds == dict.fromkeys(MADE, ("kept", True)) | {
        "system dropped": ("dropped", True),
        "system refused": ("refused", False),
        "answers first refused": ("kept", False),
    }
    assert compare([(templates[name], renders[name]) for name in MADE], go) >= 20 * len(MADE)


def test_the_templates_of_real_models(tokenizer, go):
    templates, refused = [], {}
    shipped = shipped_templates()
    for source, model in shipped.items():
        render = renderer(tokenizer, source)
        try:
            templates.append((derive_template(render, "<s>"), render))
        except ValueError as error:
            refused[model] = str(error)
    assert compare(templates, go) > 10 * len(templates)
    assert len(shipped) > 60
    assert len(refused) <= 0.08 * len(shipped), refused


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(name, tokenizer):
    with pytest.raises(ValueError, match=r"^chat_template: (?s:.)*template=False"):
        derive_template(renderer(tokenizer, REFUSED[name]))


def test_a_template_that_differs_in_one_place_is_found(tokenizer):
    render = renderer(tokenizer, MADE["plain"])
    template = derive_template(render)
    assert verify_template(template, render) == len(CHATS)
    for find in ("<|im_end|>", "user", "assistant\n"):
        wrong = type(template)(template.text[::-1].replace(find[::-1], "", 1)[::-1], "kept", True, "")
        with pytest.raises(ValueError, match="depends on more"):
            verify_template(wrong, render)


def test_what_contents_lose_is_told(tokenizer):
    trimmed = renderer(tokenizer, MADE["plain"].replace("m.content", "(m.content | trim)"))
    thinking = renderer(tokenizer, MADE["plain"].replace("m.content", "m.content.split('</think>')[-1]"))
    assert ["spaces" in note for note in derive_template(trimmed).notes] == [True]
    assert ["thoughts" in note for note in derive_template(thinking).notes] == [True]
    assert derive_template(renderer(tokenizer, MADE["plain"])).notes == ()


def test_any_text_is_written_literally(go):
    texts = [
        "{",
        "{{",
        "{{{ x }}",
        '"""',
        'a"',
        '""',
        '\\n "{{" \\',
        "\u200b\u00a0\r\x00",
        "{{/* */}}",
        "a\n\t{",
        "日本▁｜",
    ]
    both = [literal(a + b) + "{{ .System }}" for a in texts for b in texts]
    assert [evaluate(text, {"System": "."}) for text in both] == [a + b + "." for a in texts for b in texts]
    system = [{"role": "system", "content": "."}]
    assert [done for (done,) in go([(text, [system]) for text in both])] == [a + b + "." for a in texts for b in texts]
    assert not any('"""' in text or not text.replace("\n", "").replace("\t", "").isprintable() for text in both)


@pytest.mark.parametrize(
    "template",
    [
        "{{ end }}",
        "{{ if .System }}",
        "{{ .System",
        "{{ printf 1 }}",
        "{{ else }}",
        "{{ range .Messages }}{{ end }}",
        "{{ $x }}",
    ],
)
def test_the_evaluator_refuses_what_it_does_not_know(template):
    with pytest.raises(ValueError, match="template: "):
        evaluate(template, {"System": "", "Messages": []})
