"""The sample data set: deterministic, complete or absent, and never written over somebody's files."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.data import sample
from cyclebnn_dist.data.sample import CLASSES, draw_image, generate_sample

SMALL = {"num_train": 120, "num_val": 20, "image_size": 24}


def digest(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_workers(tmp_path):
    """Two people's quickstarts would train on different data."""
    assert generate_sample(tmp_path / "one", seed=3, workers=1, **SMALL)
    assert generate_sample(tmp_path / "two", seed=3, workers=2, **SMALL)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    generate_sample(tmp_path / "other", seed=4, workers=1, **SMALL)
    assert digest(tmp_path / "one") != digest(tmp_path / "other")


def test_both_splits_hold_every_class_evenly_and_share_no_image(tmp_path):
    """Accuracy would be measured on training images, or a class be missing."""
    generate_sample(tmp_path / "set", workers=1, **SMALL)
    for split, count in (("train", 120), ("val", 20)):
        folders = sorted((tmp_path / "set" / split).iterdir())
        assert tuple(folder.name for folder in folders) == CLASSES
        assert [len(list(folder.glob("*.JPEG"))) for folder in folders] == [count // 10] * 10
    files = digest(tmp_path / "set")
    assert len(set(files.values())) == len(files)


def test_a_second_call_leaves_the_finished_set_alone(tmp_path, monkeypatch):
    """Every `make quickstart` would draw all images again."""
    generate_sample(tmp_path / "set", workers=1, **SMALL)
    monkeypatch.setattr(sample, "_write_chunk", None)
    assert generate_sample(tmp_path / "set", workers=1, **SMALL) is False


def test_an_interrupted_generation_leaves_nothing_and_is_redone(tmp_path, monkeypatch):
    """Training would run on half a data set."""
    write, calls = sample._write_chunk, []

    def interrupted(chunk):
        calls.append(chunk)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(chunk)

    monkeypatch.setattr(sample, "_write_chunk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_sample(tmp_path / "set", workers=1, **SMALL)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(sample, "_write_chunk", write)
    assert generate_sample(tmp_path / "set", workers=1, **SMALL)


def test_an_empty_folder_is_filled_and_a_foreign_one_is_refused(tmp_path):
    """Somebody's own files would be mixed with generated ones."""
    (tmp_path / "empty").mkdir()
    assert generate_sample(tmp_path / "empty", workers=1, **SMALL)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(RecipeError, match="something else"):
        generate_sample(tmp_path / "mine", workers=1, **SMALL)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_sample_set_of_other_size_or_seed_is_refused_by_name(tmp_path):
    """`--train 8000` would silently train on the 4000 images made before."""
    generate_sample(tmp_path / "set", workers=1, **SMALL)
    with pytest.raises(RecipeError, match="seed 0"):
        generate_sample(tmp_path / "set", workers=1, seed=1, **SMALL)


@pytest.mark.parametrize(
    ("key", "value"), [("num_train", 5), ("num_val", 0), ("image_size", 4), ("seed", -1)]
)
def test_sizes_out_of_range_are_refused(tmp_path, key, value):
    """A class would be empty, and training fail later with a stranger message."""
    with pytest.raises(RecipeError, match="at least"):
        generate_sample(tmp_path / "set", **{**SMALL, key: value})
    assert not (tmp_path / "set").exists()


def test_a_linear_model_on_the_pixels_cannot_tell_the_classes():
    """Ninety percent in the quickstart would prove nothing about the network."""

    def draw(split, count):
        images = np.stack([draw_image(split, index, image_size=24, seed=0) for index in range(count)])
        return images.reshape(count, 12, 2, 12, 2, 3).mean(axis=(2, 4)).reshape(count, -1) / 255 - 0.5

    train, val = draw("train", 1500), draw("val", 500)
    targets = np.eye(10)[np.arange(1500) % 10]
    weights = np.linalg.solve(train.T @ train + 3.0 * np.eye(train.shape[1]), train.T @ targets)
    accuracy = np.mean((val @ weights).argmax(axis=1) == np.arange(500) % 10)
    assert 0.1 < accuracy < 0.5
