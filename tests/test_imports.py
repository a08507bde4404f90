"""What importing loads, and what the package's face looks like."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import lightning_cl

ROOT = Path(lightning_cl.__file__).parent


@cache
def loaded_by():
    """The names in sys.modules of a fresh process after each of three imports, one after another."""
    imports = {
        "functional": "import lightning_cl.functional",
        "lightning": "import lightning.pytorch",
        "ours": "import lightning_cl; lightning_cl.EWC, lightning_cl.fit_tasks, lightning_cl.TaskDataModule",
    }
    program = f"""
import sys, json
found = {{}}
for name, code in {imports!r}.items():
    exec(code)
    found[name] = sorted(sys.modules)
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT.parent, capture_output=True, text=True, check=True, timeout=120
    )
    return {name: set(modules) for name, modules in json.loads(done.stdout.splitlines()[-1]).items()}


def test_the_mathematics_needs_torch_alone():
    loaded = loaded_by()["functional"]
    assert "torch" in loaded
    assert not {name.split(".")[0] for name in loaded} & {
        *("lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "transformers", "datasets", "peft")
    }


def test_public_names_load_no_model_code_beyond_lightnings_own():
    """Seconds of start-up time: transformers' model files, peft, datasets."""
    ours = loaded_by()["ours"]
    assert "lightning_cl.sequence.fit" in ours
    extra = ours - loaded_by()["lightning"]
    heavy = ("transformers.models", "peft", "datasets", "tokenizers", "matplotlib", "pandas")
    assert not [name for name in extra if name.startswith(heavy)]


@pytest.mark.parametrize("name", lightning_cl.__all__)
def test_every_public_name_is_there_and_explained(name):
    value = getattr(lightning_cl, name)
    assert inspect.isclass(value) or inspect.isfunction(value)
    # A dataclass without one gets its signature as docstring.
    assert len(inspect.getdoc(value) or "") > 40
    assert not (value.__doc__ or "").startswith(f"{name}(")


@pytest.mark.parametrize("name", lightning_cl.__all__)
def test_every_argument_of_a_public_name_is_documented(name):
    """They are the command line's help."""
    value = getattr(lightning_cl, name)
    documented = inspect.getdoc(value)
    arguments = [a for a in inspect.signature(value).parameters if a not in ("self", "args")]
    assert [a for a in arguments if f"\n    {a}: " not in documented] == []


def test_all_names_are_offered_by_dir():
    assert set(lightning_cl.__all__) <= set(dir(lightning_cl))


def test_functional_names_are_there_and_explained():
    from lightning_cl import functional

    assert all(inspect.getdoc(getattr(functional, name)) for name in functional.__all__)


def test_unknown_name_is_an_attribute_error_that_says_so():
    with pytest.raises(AttributeError, match=r"lightning_cl.*'EWCC'"):
        lightning_cl.EWCC


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "py.typed").is_file()
