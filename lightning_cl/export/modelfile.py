"""Modelfiles: what Ollama needs to know of a model that is in a GGUF file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_cl.arguments import check_integer
from lightning_cl.data.text.chat import has_template
from lightning_cl.data.text.tokenizer import load_tokenizer, start_tokens
from lightning_cl.export.go_template import Chat, GoTemplate, derive_template, verify_template
from lightning_cl.files import replace_file

_LONGEST = 8192  # positions that are asked for where nobody says how many: their keys and values take memory
_COMMANDS = ("from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "message", "requires")
_PLAIN = "{{ .Prompt }}"  # a model without a chat template continues what it is given


def write_modelfile(
    folder: str | Path,
    gguf: str | Path,
    system: str | None = None,
    num_ctx: int | None = None,
    adapter: str | Path | None = None,
    template: str | bool = True,
    stop: Sequence[str] = (),
    tokenizer: Any = None,
    path: str | Path | None = None,
) -> Path:
    """Writes the Modelfile of a model that is in a GGUF file; then ``ollama create NAME -f Modelfile``.

    Ollama's template writes what the tokenizer's chat template writes. It is derived from it
    (:func:`~lightning_cl.export.go_template.derive_template`), and the file is read back and compared with
    ``apply_chat_template`` before it gets its name. A model without a chat template gets the prompt alone. A comment in
    the file says what is not as in training. Without a template in the file, Ollama can take one that it knows and that
    only resembles the chat template.

    Args:
        folder: as ``save_pretrained`` writes it: tokenizer and ``config.json``.
        gguf: the model's file (:func:`~lightning_cl.export.gguf.export_gguf`).
        system: text that each conversation begins with, unless the caller gives another.
        num_ctx: positions of a conversation; default: as many as the model has, at most 8,192, since memory grows with
            them. Ollama's own default is shorter than most models.
        adapter: the GGUF file of an adapter on this model; Ollama takes one.
        template: True: derived; a text: a Go template of your own, which is not compared; False: none.
        stop: more texts that end an answer. The end token, the model's other end tokens and what the chat template
            writes after an answer are there already.
        tokenizer: the one that the model was trained with, if the folder has none or another.
        path: the file; default: ``Modelfile`` next to the GGUF file, or ``Modelfile.NAME`` with the adapter's name. The
            paths in it are relative to it.

    Returns:
        the file.

    Raises:
        ValueError: for a chat template that cannot be followed, a text that a Modelfile cannot hold, a missing file, or
            more positions than the model has.
        RuntimeError: if the file does not read back as it was written.
    """
    folder, gguf = Path(folder), _gguf_file("gguf", gguf)
    adapter = None if adapter is None else _gguf_file("adapter", adapter)
    path = (
        Path(path)
        if path is not None
        else gguf.with_name("Modelfile" if adapter is None else f"Modelfile.{adapter.stem}")
    )
    tokenizer = load_tokenizer(str(folder)) if tokenizer is None else tokenizer
    render = partial(_render, tokenizer)
    start = tokenizer.decode(start_tokens(tokenizer))
    derived = derive_template(render, start) if template is True and has_template(tokenizer) else None
    notes = [] if template is not True else _notes(derived, tokenizer, start)
    _check_system(system, derived, template is True)
    commands = [("from", _relative(gguf, path)), ("parameter num_ctx", str(_positions(folder, num_ctx)))]
    if adapter is not None:
        commands.append(("adapter", _relative(adapter, path)))
    if template is not False:
        text = template if isinstance(template, str) else _PLAIN if derived is None else derived.text
        commands.append(("template", text))
    if system:
        commands.append(("system", system))
    stops = [*_stops(folder, tokenizer, "" if derived is None else derived.mid), *stop]
    commands += [("parameter stop", text) for text in dict.fromkeys(stops)]

    def write(temporary: Path) -> None:
        temporary.write_bytes(modelfile_text(commands, notes).encode())
        read = read_modelfile(temporary.read_bytes().decode())
        if read != commands:
            raise RuntimeError(f"{path}: does not read back as it was written; please report this")
        if derived is not None:
            verify_template(GoTemplate(dict(read)["template"], derived.system, derived.greeting, ""), render, start)

    replace_file(path, write)
    return path


def write_task_modelfiles(
    folder: str | Path, gguf: str | Path, adapters: Mapping[str, str | Path], **arguments: Any
) -> dict[str, Path]:
    """Writes one Modelfile per task, each with the same model and the task's adapter; Ollama keeps the model once.

    Args:
        folder: as in :func:`write_modelfile`.
        gguf: the model's file, without any adapter.
        adapters: for each task the GGUF file of its adapter.
        arguments: as in :func:`write_modelfile`.

    Returns:
        for each task its file, ``Modelfile.TASK`` next to the model's.

    Raises:
        ValueError: as :func:`write_modelfile` does, or if two tasks would have one file.
    """
    names = {task: modelfile_name(task) for task in adapters}
    if len({name.lower() for name in names.values()}) < len(names):
        raise ValueError(f"adapters={list(names)}: the names of two tasks give the same file; rename one of them")
    if "path" in arguments or "adapter" in arguments:
        raise ValueError("path, adapter: each task has its own; leave them out, or call write_modelfile for each task")
    return {
        task: write_modelfile(folder, gguf, adapter=file, path=Path(gguf).with_name(names[task]), **arguments)
        for task, file in adapters.items()
    }


def modelfile_name(task: str) -> str:
    """Returns the name of a task's Modelfile."""
    return "Modelfile." + re.sub(r"[^\w.-]+", "-", task)


# ------------------------------------------------------------------------------------------------- the format


def modelfile_text(commands: Sequence[tuple[str, str]], comments: Sequence[str] = ()) -> str:
    """Returns the text of a Modelfile.

    Args:
        commands: names and values, such as ``("from", "./model.gguf")`` and ``("parameter stop", "</s>")``.
        comments: lines at its beginning.

    Raises:
        ValueError: for a value that the format cannot hold: it ends at three quotes at the end of a line, and Ollama
            drops characters that cannot be printed, among them the no-break space and the joiner in emoji.
    """
    lines = [f"# {' '.join(comment.split())}" for comment in comments]
    for name, value in commands:
        word, _, parameter = name.partition(" ")
        bare = name == "from" or name == "adapter" or value.isdigit()
        lines.append(" ".join([word.upper(), *([parameter] if parameter else []), value if bare else f'"""{value}"""']))
        odd = next((c for c in value if not c.isprintable() and c not in "\n\r\t"), None)
        if odd is not None:
            raise ValueError(f"{name}: Ollama drops the character {odd!r} from a Modelfile; write the text without it")
        try:
            whole = read_modelfile(f"FROM x\n{lines[-1]}\n")[1:] == [(name, value)]
        except ValueError:  # a part of it is read as a line of its own
            whole = False
        if not whole:
            raise ValueError(
                f"{name}={value!r}: a Modelfile cannot hold this text; take out three quotes that follow each other,"
                " and spaces or quotes around the name of a file"
            )
    return "\n".join(lines) + "\n"


def read_modelfile(text: str) -> list[tuple[str, str]]:
    r"""Reads a Modelfile as Ollama does: names in any case, values bare, in quotes, or in three quotes.

    Args:
        text: of the file.

    Returns:
        names and values; a parameter's name is ``parameter NAME``.

    Raises:
        ValueError: for a line that begins with no command, a value that does not end, or no ``FROM``.

    Example:
        >>> read_modelfile('FROM ./a.gguf\nparameter stop "</s>"')
        [('from', './a.gguf'), ('parameter stop', '</s>')]
    """
    commands: list[tuple[str, str]] = []
    lines = re.split(r"(?<=[\n\r])", text)
    while lines:
        line = lines.pop(0)
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        word, value = _first_word(line)
        name = word.lower()
        if name == "parameter":
            parameter, value = _first_word(value)
            name = f"parameter {parameter}"
        elif name not in _COMMANDS:
            raise ValueError(f"Modelfile: {word!r} is no command; expected one of {', '.join(_COMMANDS)}, parameter")
        while (ended := _unquoted(value.strip())) is None:
            if not lines:
                raise ValueError(f"Modelfile: the value of {name} does not end")
            value += lines.pop(0)
        commands.append((name, "".join(c for c in ended if c.isprintable() or c in "\n\r\t")))
    if not any(name == "from" for name, _ in commands):
        raise ValueError("Modelfile: has no FROM")
    return commands


def _first_word(line: str) -> tuple[str, str]:
    word, *rest = re.split(r"[ \t]", line.lstrip(), maxsplit=1)
    return word.strip(), "".join(rest)


def _unquoted(value: str) -> str | None:
    """A value without its quotes; None if they do not close."""
    for quote in ('"""', '"'):
        if value.startswith(quote):
            closed = len(value) >= 2 * len(quote) and value.endswith(quote)
            return value[len(quote) : -len(quote)] if closed else None
    return value


# ------------------------------------------------------------------------------------------------- the values


def _render(tokenizer: Any, chat: Chat) -> str:
    text: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return text


def _gguf_file(argument: str, path: str | Path) -> Path:
    path = Path(path)
    made = "export_gguf" if argument == "gguf" else "export_adapter_gguf"
    if not path.is_file():
        raise ValueError(f"{argument}={str(path)!r}: no such file; expected a GGUF file, as {made} writes it")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{argument}={str(path)!r}: is no GGUF file; {made} writes one")
    return path


def _relative(file: Path, modelfile: Path) -> str:
    """The path from the Modelfile's folder, so that the folder can be handed on."""
    relative = Path(os.path.relpath(file.absolute(), modelfile.absolute().parent)).as_posix()
    return relative if relative.startswith("../") else f"./{relative}"


def _settings(folder: Path, file: str) -> dict[str, Any]:
    path = folder / file
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return settings


def _positions(folder: Path, wanted: int | None) -> int:
    config = _settings(folder, "config.json")
    has = config.get("max_position_embeddings", config.get("n_positions"))
    if wanted is None:
        return min(has or 2048, _LONGEST)
    check_integer("num_ctx", wanted, 1)
    if has is not None and wanted > has:
        raise ValueError(f"num_ctx={wanted}: the model has {has} positions; expected at most that")
    return wanted


def _check_system(system: str | None, derived: GoTemplate | None, is_derived: bool) -> None:
    if not system or not is_derived:
        return
    if derived is None:
        raise ValueError(
            f"system={system!r}: the tokenizer has no chat template, so the model has seen no system texts; leave it"
            " out, or give a Go template of your own (template=…)"
        )
    if derived.system == "dropped":
        raise ValueError(
            f"system={system!r}: the chat template leaves system texts out, so it would change nothing; put the text"
            " into the first prompt"
        )
    if derived.system == "refused":
        rank_zero_warn(
            "The chat template refuses system texts, so the model has seen none in training: the text is written before"
            " the first prompt."
        )


def _notes(derived: GoTemplate | None, tokenizer: Any, start: str) -> list[str]:
    """Comments for a reader of the file."""
    if derived is None:
        return ["The tokenizer has no chat template: the model continues the last prompt, and reads nothing else."]
    source = tokenizer.get_chat_template()
    notes = [
        "TEMPLATE writes what the tokenizer's chat template writes: it was derived from it, and compared with it.",
        *derived.notes,
    ]
    if derived.system == "dropped":
        notes.append("The chat template leaves system texts out, and so does TEMPLATE.")
    if derived.system == "refused":
        notes.append("The chat template refuses system texts; TEMPLATE writes them before the first prompt.")
    if not derived.greeting:
        notes.append("An answer before the first prompt is left out.")
    if re.search(r"\btools\b", source):
        notes.append("The chat template can describe tools; TEMPLATE cannot.")
    if "strftime_now" in source:
        notes.append("The chat template writes the date of today. TEMPLATE has the date on which it was made.")
    if start and not _render(tokenizer, [{"role": "user", "content": "a"}]).startswith(start):
        notes.append(f"Ollama puts {start} before each conversation, and the chat template does not.")
        rank_zero_warn(
            f"Ollama and llama.cpp put the tokenizer's start token {start!r} before each conversation, and the chat"
            " template does not: the model has not seen it there in training. A chat template that begins with"
            " {{ bos_token }} trains what they do."
        )
    return notes


def _stops(folder: Path, tokenizer: Any, mid: str) -> list[str]:
    """The texts that end an answer: end tokens, and those that follow an answer in the chat template."""
    ends = [
        ends if isinstance(ends, list) else [ends]
        for ends in (_settings(folder, file).get("eos_token_id") for file in ("generation_config.json", "config.json"))
        if ends is not None
    ]
    ids = [i for group in ([tokenizer.eos_token_id], *ends) for i in group if i is not None]
    texts = [text for i in ids if (text := tokenizer.decode([i]))]
    special = sorted((t for t in tokenizer.get_added_vocab() if t.strip()), key=len, reverse=True)
    found = re.findall("|".join(map(re.escape, special)), mid) if special else []
    if not found and mid.strip() and not any(text in mid for text in texts):
        found = [mid.strip().splitlines()[0].strip()]
    return list(dict.fromkeys([*texts, *found]))
