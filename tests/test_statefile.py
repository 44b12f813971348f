"""Without these a resumed run would start from a state that is not the one it saved."""

import random

import numpy as np
import pytest
import torch

from cyclebnn_dist.statefile import read_state, write_state


def test_every_kind_of_state_comes_back_as_it_was(tmp_path):
    state = {
        "weights": {"0.weight": torch.randn(3, 4), 7: torch.arange(5)},
        "empty": torch.empty(0),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "halves": torch.randn(3).bfloat16(),
        "array": np.arange(6, dtype=np.uint32).reshape(2, 3),
        "blob": b"\x00\xffdali",
        "no blob": b"",
        "numbers": [1, 2.5, float("inf"), True, None, "text"],
        "betas": (0.9, 0.999),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "nested": {"a/b": {"c": torch.ones(1)}, "a": {"b/c": torch.zeros(1)}},
    }
    write_state(tmp_path / "state.safetensors", state)
    loaded = read_state(tmp_path / "state.safetensors")
    assert loaded["weights"].keys() == state["weights"].keys()
    for name in (("weights", "0.weight"), ("weights", 7)):
        assert torch.equal(loaded[name[0]][name[1]], state[name[0]][name[1]])
    for name in ("empty", "scalar", "halves"):
        assert loaded[name].dtype == state[name].dtype
        assert torch.equal(loaded[name], state[name])
    assert loaded["array"].dtype == np.uint32
    assert np.array_equal(loaded["array"], state["array"])
    for name in ("blob", "no blob", "numbers", "betas", "python"):
        assert loaded[name] == state[name], name
    assert np.array_equal(loaded["numpy"][1], state["numpy"][1])
    assert loaded["numpy"][2:] == state["numpy"][2:]
    assert loaded["nested"]["a/b"]["c"].item() == 1.0
    assert loaded["nested"]["a"]["b/c"].item() == 0.0


def test_tensors_that_share_memory_are_stored_apart(tmp_path):
    base = torch.arange(4.0)
    write_state(tmp_path / "s.safetensors", {"a": base, "b": base[1:3], "c": base})
    loaded = read_state(tmp_path / "s.safetensors")
    assert loaded["b"].tolist() == [1.0, 2.0]
    assert loaded["c"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_type_that_cannot_be_stored_is_named_with_its_place(tmp_path):
    with pytest.raises(TypeError, match="set at outer/inner"):
        write_state(tmp_path / "s.safetensors", {"outer": {"inner": {1, 2}}})
