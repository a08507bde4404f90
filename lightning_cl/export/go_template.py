"""Go templates for Ollama, derived from what a chat template does.

A chat template is a Jinja program, and Ollama's own templates are Go programs. The program is not translated: it is
run on conversations whose contents are markers, and the texts between the markers are what the Go template writes. What
was derived is compared with the chat template on other conversations. There is no table of model families.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from lightning_cl.export.go_evaluator import ollama_prompt

Chat = list[dict[str, str]]
Render = Callable[[Chat], str]
"""Writes a conversation up to where the next answer begins; raises any error for one that it refuses."""

_SYSTEM = "qzSystemZq"
_TURNS = 4  # the probes' prompts: enough to tell the first, the last and one between
_WAY_ROUND = (
    "; give a Go template of your own (template=…), leave it to Ollama (template=False; a recent one runs the chat"
    " template that is in the GGUF file), or train with a simpler chat template"
)


class Slot(NamedTuple):
    """A place between contents: the text there depends on nothing else."""

    kind: str
    """``head`` before the first prompt, ``gen`` after a prompt, ``mid`` between an answer and a prompt, ``hello``
    before an answer that begins a conversation."""
    system: bool
    """True if there is a system text."""
    last: bool
    """True if the prompt at this place is the last one."""


@dataclass(frozen=True)
class GoTemplate:
    """A Go template, and what it does with system texts.

    Attributes:
        text: the template.
        system: ``kept``; ``dropped`` if the chat template leaves system texts out; ``refused`` if it raises an error
            for them: then they are written before the first prompt, with an empty line between.
        greeting: an answer that begins a conversation is written. Otherwise it is left out, since the chat template
            refuses it or writes it in another way.
        mid: the text between an answer and the next prompt.
        notes: what differs for contents of a kind.
    """

    text: str
    system: str
    greeting: bool
    mid: str
    notes: tuple[str, ...] = ()


def derive_template(render: Render, start: str = "") -> GoTemplate:
    """Derives the Go template that writes what a chat template writes.

    Conversations are covered that have system texts at their beginning, prompts and answers in turn, and a prompt at
    their end; also those that Ollama cuts at the front. Tools, images and thoughts are not.

    Compute: about 40 conversations are rendered.

    Args:
        render: the chat template, with the beginning of the next answer (``add_generation_prompt=True``).
        start: the text of the start token, if the tokenizer itself puts it before each text: it is left out then.

    Raises:
        ValueError: if the text depends on more than on the roles; the message says on what, and a way round.

    Example:
        >>> def render(chat):
        ...     return "".join(f"<{m['role']}>{m['content']}</s>" for m in chat) + "<assistant>"
        >>> template = derive_template(render)
        >>> ollama_prompt(template.text, [{"role": "user", "content": "Hello"}])
        '<user>Hello</s><assistant>'
        >>> template.mid
        '</s><user>'
    """
    render = _without(render, start)
    rules, system = _rules(render)
    greeting = _add_greeting(render, rules, system)
    mid = rules[Slot("mid", False, False)]
    template = GoTemplate(_write(rules, greeting), system, greeting, mid, tuple(_notes(render)))
    verify_template(template, render)
    return template


def verify_template(template: GoTemplate, render: Render, start: str = "") -> int:
    """Compares a Go template with a chat template on conversations that it was not derived from.

    Args:
        template: the Go template.
        render: the chat template.
        start: as in :func:`derive_template`.

    Returns:
        the number of conversations that were equal.

    Raises:
        ValueError: with the first conversation that differs.
    """
    render, equal = _without(render, start), 0
    for chat in conversations():
        try:
            expected = render(as_written(chat, template))
        except Exception:  # a template is a program: it can raise anything
            continue
        written = ollama_prompt(template.text, chat)
        if written != expected:
            raise ValueError(
                f"chat_template: depends on more than the roles of the messages: of {chat} it makes {expected!r}, and"
                f" what was derived from it makes {written!r}{_WAY_ROUND}"
            )
        equal += 1
    if not equal:
        raise ValueError(f"chat_template: refuses all of the conversations that it was tried on{_WAY_ROUND}")
    return equal


def as_written(chat: Chat, template: GoTemplate) -> Chat:
    """Returns the conversation that a chat template is given, in place of one that it does not take as it is."""
    system = "\n\n".join(m["content"] for m in chat if m["role"] == "system")
    rest = [m for m in chat if m["role"] != "system"]
    if rest[0]["role"] == "assistant" and not template.greeting:
        rest = rest[1:]
    if not system:
        return rest
    if template.system != "refused":
        return [{"role": "system", "content": system}, *rest]
    return [{**rest[0], "content": f"{system}\n\n{rest[0]['content']}"}, *rest[1:]]


def conversations() -> Iterator[Chat]:
    """Yields conversations with texts as people write them, from one prompt to six, with and without a system text."""
    prompts = ("Hi", "What is 2 + 2?\nAnswer {{ briefly }}.", 'Say "ja" — 日本', "x", "<b>Why?</b>", "1, 2 & 'three'")
    answers = ("Hello! How can I help?", "4", "ja\n\n- eins\n- zwei", "def f(x):\n    return x", "%d {% raw %}", "{}")
    for system in ("", "Be kind.", "Two lines,\nand a {{ brace }}."):
        for first in range(2):
            for turns in (1, 2, 3, 6):
                texts = [text for pair in zip(prompts, answers, strict=True) for text in pair][: 2 * turns - 1]
                chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
                if first:
                    chat.insert(0, {"role": "assistant", "content": "Good morning."})
                yield [*([{"role": "system", "content": system}] if system else []), *chat]


def _without(render: Render, start: str) -> Render:
    return lambda chat: render(chat).removeprefix(start)


# ------------------------------------------------------------------------------------------------- probing


def _rules(render: Render) -> tuple[dict[Slot, str], str]:
    """The text in each place, and what is done with system texts."""
    rules: dict[Slot, str] = {}
    for turns in range(1, _TURNS + 1):
        _learn(rules, render, False, turns)
    try:
        render(_marked(True, 1))
    except Exception:  # a template is a program: it can raise anything
        for slot, text in list(rules.items()):
            before = f"{text}{_SYSTEM}\n\n" if slot.kind == "head" else text
            rules[slot._replace(system=True)] = before
        return rules, "refused"
    for turns in range(1, _TURNS + 1):
        _learn(rules, render, True, turns)
    return rules, "kept" if any(_SYSTEM in text for text in rules.values()) else "dropped"


def _marked(system: bool, turns: int, greeting: bool = False) -> Chat:
    roles = ["system"] * system + ["assistant"] * greeting + ["user", "assistant"] * turns
    return [
        {"role": role, "content": _SYSTEM if role == "system" else f"qz{role.title()}{i}Zq"}
        for i, role in enumerate(roles[:-1])
    ]


def _learn(rules: dict[Slot, str], render: Render, system: bool, turns: int, greeting: bool = False) -> None:
    """Renders one probe and adds what stands in its places; refuses what differs from an earlier probe."""
    chat = _marked(system, turns, greeting)
    told = "-".join(m["role"] for m in chat)
    try:
        text = render(chat)
    except Exception as error:  # a template is a program: it can raise anything
        raise ValueError(
            f"chat_template: refuses a conversation {told}: {type(error).__name__}: {error}{_WAY_ROUND}"
        ) from error
    asked = [m for m in chat if m["role"] != "system"]
    where = [(match.start(), match.end()) for m in asked for match in re.finditer(m["content"], text)]
    if len(where) != len(asked) or where != sorted(where) or text.count(_SYSTEM) > 1:
        raise ValueError(
            f"chat_template: leaves out, repeats, changes or reorders what is said in a conversation {told}{_WAY_ROUND}"
        )
    pieces = [text[: where[0][0]], *(text[a[1] : b[0]] for a, b in pairwise(where)), text[where[-1][1] :]]
    left = turns  # prompts that are still to come
    for i, piece in enumerate(pieces):
        after = asked[i]["role"] if i < len(asked) else "assistant"
        before = asked[i - 1]["role"] if i else ""
        kind = {"": "head" if after == "user" else "hello", "user": "gen", "assistant": "mid"}[before]
        slot = Slot(kind, system, left == 0 if kind == "gen" else left == 1 and kind != "hello")
        left -= after == "user"
        if rules.setdefault(slot, piece) != piece:
            raise ValueError(
                f"chat_template: writes {piece!r} in a conversation {told} where it writes {rules[slot]!r} in another:"
                f" it depends on more than the roles{_WAY_ROUND}"
            )


def _add_greeting(render: Render, rules: dict[Slot, str], system: str) -> bool:
    """Adds what stands before an answer that begins a conversation; False if it is refused, or changes other places."""
    added = dict(rules)
    try:
        for turns in range(1, _TURNS):
            for with_system in (False, True):
                _learn(added, render, with_system, turns, greeting=True)
    except ValueError:
        return False
    rules |= added
    return True


def _notes(render: Render) -> Iterator[str]:
    """Notes on what the chat template does with contents, and the Go template cannot."""

    def text(*contents: str) -> str:
        roles = ("user", "assistant")
        try:
            return render([{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)])
        except Exception:  # a template is a program: it can raise anything
            return ""

    if "  qz  " not in text("  qz  "):
        yield "The chat template removes spaces around a message. Ollama does not, so send messages without them."
    if "qzThought" not in text("a", "<think>\nqzThought\n</think>\n\nb", "c"):
        yield "The chat template leaves the thoughts of earlier answers out. Ollama does not, so send answers without."


# ------------------------------------------------------------------------------------------------- writing

_IS_LAST = "eq (len (slice $.Messages $i)) {}"


def _write(rules: dict[Slot, str], greeting: bool) -> str:
    """The template: one pass over the messages; system texts are fields of the whole."""
    head, gen, mid = _choice(rules, "head", 1), _choice(rules, "gen", 1), _choice(rules, "mid", 2)
    answer = "{{ .Content }}{{ if gt (len (slice $.Messages $i)) 1 }}" + mid + "{{ end }}"
    answer = _begin(_choice(rules, "hello", 0)) + answer if greeting else "{{ if $begun }}" + answer + "{{ end }}"
    return (
        "{{ $begun := false }}{{ range $i, $_ := .Messages }}"
        '{{ if eq .Role "user" }}' + _begin(head) + "{{ .Content }}" + gen
        + '{{ else if eq .Role "assistant" }}' + answer + "{{ end }}{{ end }}"
    )  # fmt: skip


def _begin(text: str) -> str:
    return "{{ if not $begun }}" + text + "{{ $begun = true }}{{ end }}"


def _choice(rules: dict[Slot, str], kind: str, left: int) -> str:
    """The template of a place; `left` messages are left, with this one, where the prompt there is the last."""

    def by_system(last: bool) -> str:
        return _if("$.System", literal(rules[Slot(kind, True, last)]), literal(rules[Slot(kind, False, last)]))

    return _if(_IS_LAST.format(left), by_system(True), by_system(False)) if left else by_system(False)


def _if(condition: str, one: str, other: str) -> str:
    return one if one == other else f"{{{{ if {condition} }}}}{one}{{{{ else }}}}{other}{{{{ end }}}}"


def literal(text: str) -> str:
    """Returns the template of a text: a Modelfile drops characters that cannot be printed, and ends at three quotes.

    Example:
        >>> print(literal("a {{ b }}"))
        a {{ "{{" }} b }}
    """
    parts = (re.sub(r"\{\{+|\{\Z|\{?\"\"+|\{?[^\n\t\x20-\x7e]", _quoted, part) for part in text.split(_SYSTEM))
    return "{{ $.System }}".join(parts)


def _quoted(found: re.Match[str]) -> str:
    text = found[0]
    if text.isprintable() and not re.search(r"\{\{|\{$|\"", text):
        return text
    escaped = "".join(f"\\U{ord(c):08x}" if not c.isprintable() or c == '"' else c for c in text)
    return f'{{{{ "{escaped}" }}}}'
