"""Statistics of what is kept put the same few numbers into thousands of buffers."""

from __future__ import annotations

from functools import lru_cache

import pytest

from lightning_cl.buffers import memory

# Here samples are numbers; how samples of all kinds are stored is tested in the other files.
TESTS_OF_CHOICE = ("test_selection.py", "test_budgets_and_policies.py")


@pytest.fixture(scope="module", autouse=True)
def a_number_is_encoded_once(request):
    """Encoding takes more time than the choice."""
    encode = memory.encode
    encoded_once = lru_cache(maxsize=512, typed=True)(encode)

    def encode_number(sample, extra=None):
        return encoded_once(sample) if extra is None and type(sample) in (int, tuple) else encode(sample, extra)

    with pytest.MonkeyPatch.context() as patch:
        if request.path.name in TESTS_OF_CHOICE:
            patch.setattr(memory, "encode", encode_number)
        yield
