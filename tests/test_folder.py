"""The image list: the same on every machine, and clear about every layout it cannot read."""

import os
import pickle

import pytest

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.data import scan_folder


def make_tree(root, layout):
    for name, files in layout.items():
        (root / name).mkdir(parents=True)
        for file in files:
            (root / name / file).write_bytes(b"")


def test_files_are_sorted_and_labelled_by_sorted_class(tmp_path):
    """Ids and labels would depend on the order in which a file system lists its entries."""
    make_tree(tmp_path, {"train/wolf": ["b.JPEG", "a.jpg"], "train/cat": ["z.png", "y.Jpeg"]})
    images = scan_folder(tmp_path, "train", num_classes=2)
    assert images.classes == ["cat", "wolf"]
    assert images.files == ["cat/y.Jpeg", "cat/z.png", "wolf/a.jpg", "wolf/b.JPEG"]
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert len(images) == 4
    assert images.path(2) == str(tmp_path / "train/wolf/a.jpg")


def test_other_files_and_hidden_ones_are_left_out(tmp_path):
    """A stray .DS_Store or notes file would stop the decoder."""
    make_tree(tmp_path, {"train/cat": ["a.jpg", ".b.jpg", "notes.txt"], "train/.cache": ["c.jpg"]})
    (tmp_path / "train" / "README.md").write_text("x")
    (tmp_path / "train" / "cat" / "folder.jpg").mkdir()
    assert scan_folder(tmp_path, "train", num_classes=1).files == ["cat/a.jpg"]


def test_the_list_survives_a_broadcast_and_its_digest_tells_sets_apart(tmp_path):
    """Other ranks would read other files; a resumed run would not notice a changed data set."""
    make_tree(
        tmp_path,
        {"a/train/x": ["1.jpg", "2.jpg"], "b/train/x": ["1.jpg", "2.jpg"], "c/train/x": ["1.jpg", "3.jpg"]},
    )
    lists = {name: scan_folder(tmp_path / name, "train", num_classes=1) for name in "abc"}
    copy = pickle.loads(pickle.dumps(lists["a"]))
    assert (copy.files, copy.labels.tolist(), copy.root) == (lists["a"].files, [0, 0], lists["a"].root)
    assert copy.digest == lists["a"].digest == lists["b"].digest != lists["c"].digest
    assert 0 <= copy.digest < 2**63


def test_a_missing_folder_names_the_command_that_makes_one(tmp_path):
    """The first thing a newcomer meets."""
    with pytest.raises(RecipeError, match="cyclebnn data sample") as error:
        scan_folder(tmp_path / "nowhere", "train", num_classes=2)
    assert error.value.key == "data.path"
    assert str(tmp_path / "nowhere") in str(error.value)


@pytest.mark.parametrize(
    ("layout", "num_classes", "key", "message"),
    [
        ({"train": []}, 1, "data.path", "no class folders"),
        ({"train/cat": ["a.jpg"], "train/dog": []}, 2, "data.path", "no images in class dog"),
        ({"train/cat": ["a.txt"]}, 1, "data.path", "no images in class cat"),
        ({"train/cat": ["a.jpg"]}, 1000, "model.num_classes", "model.num_classes=1"),
    ],
)
def test_a_layout_that_cannot_be_trained_on_is_named(tmp_path, layout, num_classes, key, message):
    """The run would fail hours later, or learn a class that has no images."""
    make_tree(tmp_path, layout)
    with pytest.raises(RecipeError, match=message) as error:
        scan_folder(tmp_path, "train", num_classes=num_classes)
    assert error.value.key == key


@pytest.mark.parametrize(
    ("val", "message"), [(["cat", "dog", "fox"], "fox only in .*val"), (["cat"], "dog only in .*train")]
)
def test_validation_classes_must_be_those_of_training(tmp_path, val, message):
    """Labels would be shifted against training's, and accuracy be that of chance."""
    make_tree(tmp_path, {f"train/{name}": ["a.jpg"] for name in ("cat", "dog")})
    make_tree(tmp_path, {f"val/{name}": ["a.jpg"] for name in val})
    with pytest.raises(RecipeError, match=message):
        scan_folder(tmp_path, "val", num_classes=len(val))


def test_a_validation_folder_alone_can_be_evaluated(tmp_path):
    """`cyclebnn evaluate` would demand the training images."""
    make_tree(tmp_path, {"val/cat": ["a.jpg"]})
    assert len(scan_folder(tmp_path, "val", num_classes=1)) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder_is_named(tmp_path):
    """A traceback about scandir instead of the folder."""
    make_tree(tmp_path, {"train/cat": ["a.jpg"]})
    (tmp_path / "train" / "cat").chmod(0)
    with pytest.raises(RecipeError, match="cannot list"):
        scan_folder(tmp_path, "train", num_classes=1)
