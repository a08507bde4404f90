"""State of callbacks in a file: all kinds come back, memory that is shared is written, and nothing else is copied."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.integrations._transformers import state_file


def test_shared_and_partial_memory_comes_back_and_the_rest_is_not_copied(tmp_path, monkeypatch):
    whole, written = torch.arange(12.0).view(3, 4), {}
    state = {
        "whole": whole,
        "again": whole,
        "row": whole[1],
        "turned": whole.T,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "number": whole.sum(),
        "plain": [1, (2.5, None, "x"), {3: b"ab"}, True],
    }
    save = state_file.save_file

    def spy(tensors, *arguments, **more):
        written.update({name: tensor.data_ptr() for name, tensor in tensors.items()})
        save(tensors, *arguments, **more)

    monkeypatch.setattr(state_file, "save_file", spy)
    state_file.write_state(tmp_path / "state.safetensors", state)
    read = state_file.read_state(tmp_path / "state.safetensors")
    assert read["plain"] == state["plain"]
    for name in state.keys() - {"plain"}:
        assert torch.equal(read[name], state[name]), name
        assert read[name].dtype == state[name].dtype
    assert written["/whole"] == whole.data_ptr()
    assert len(set(written.values())) == len(written)


def test_a_cut_file_is_named(tmp_path):
    path = tmp_path / "state.safetensors"
    state_file.write_state(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"state\.safetensors: no readable state"):
        state_file.read_state(path)
