"""Without these a resumed run would start from a state that is not the one it saved."""

import hashlib
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from cyclebnn_dist.checkpoint import statefile
from cyclebnn_dist.checkpoint.statefile import (
    DTYPES,
    Written,
    digest_of,
    encode_state,
    encode_tensors,
    read_state,
    write_encoded,
    write_state,
)


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


@given(
    tensors=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
        max_size=6,
    ),
    chunk=st.integers(1, 64),
)
def test_the_safetensors_library_reads_what_is_written(tmp_path_factory, tensors, chunk):
    generator = torch.Generator().manual_seed(0)
    expected = {
        name: torch.randint(0, 2, shape, generator=generator).to(dtype)
        for name, (dtype, shape) in tensors.items()
    }
    path = tmp_path_factory.mktemp("written") / "file.safetensors"
    whole, statefile.CHUNK_BYTES = statefile.CHUNK_BYTES, chunk
    try:
        written = write_encoded(path, encode_tensors(expected))
    finally:
        statefile.CHUNK_BYTES = whole
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    content = path.read_bytes()
    assert written == Written(len(content), hashlib.sha256(content).hexdigest()) == digest_of(path)


def test_an_encoded_state_does_not_follow_what_training_changes(tmp_path):
    weight, array, steps = torch.ones(3, 4).t(), np.ones(3), [1, 2]
    encoded = encode_state({"weight": weight, "array": array, "steps": steps})
    weight.mul_(2)
    array *= 2
    steps.append(3)
    write_encoded(tmp_path / "s.safetensors", encoded)
    loaded = read_state(tmp_path / "s.safetensors")
    assert loaded["weight"].shape == (4, 3)
    assert loaded["weight"].unique().tolist() == [1.0]
    assert loaded["array"].tolist() == [1.0] * 3
    assert loaded["steps"] == [1, 2]


def test_a_tensor_that_no_file_can_hold_is_named_with_its_place():
    with pytest.raises(TypeError, match=r"torch.complex64 at moments/w"):
        encode_state({"moments": {"w": torch.zeros(1, dtype=torch.complex64)}})
