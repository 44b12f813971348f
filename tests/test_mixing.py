"""Mixup and CutMix. Without these labels would not say what is in the picture, or a restart would mix otherwise."""

import numpy as np
import pytest
import torch

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data import Mixing
from cyclebnn_dist.timm_import import timm

BATCH, CLASSES = 8, 10


def mixing(*, rank=0, seed=3, batch_size=BATCH, **settings):
    return Mixing(DataConfig(**settings), num_classes=CLASSES, batch_size=batch_size, seed=seed, rank=rank)


def batch(*, layout=torch.contiguous_format):
    """Image i is i everywhere, and of class i."""
    images = torch.arange(float(BATCH))[:, None, None, None].expand(BATCH, 3, 16, 16)
    return images.clone().contiguous(memory_format=layout), torch.arange(BATCH)


def mixed(mixer, step, **kwargs):
    return mixer(*batch(**kwargs), step=step)


def test_without_mixing_nothing_is_touched():
    images, labels = batch()
    got_images, got_labels = mixing()(images, labels, step=0)
    assert got_images is images
    assert got_labels is labels
    assert torch.equal(images, batch()[0])
    images, targets = mixed(mixing(mixup=0.8, mixup_prob=0.0), 0)
    assert torch.equal(images, batch()[0])
    assert torch.equal(targets, torch.eye(CLASSES)[:BATCH])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_labels_say_how_much_of_which_image_is_seen(layout):
    for settings in ({"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}):
        mixer, shares = mixing(**settings), []
        for step in range(12):
            images, targets = mixed(mixer, step, layout=layout)
            assert images.is_contiguous(memory_format=layout)
            assert torch.allclose(targets.sum(dim=1), torch.ones(BATCH))
            for index in range(BATCH):
                other = BATCH - 1 - index
                own = targets[index, index].item()
                assert targets[index, other].item() == pytest.approx(1 - own, abs=1e-6)
                assert images[index].mean().item() == pytest.approx(own * index + (1 - own) * other, abs=1e-4)
            shares.append(targets[0, 0].item())
        assert len({round(share, 6) for share in shares}) > 6


def test_the_switch_probability_chooses_between_the_two():
    """CutMix leaves whole pixels, mixup blends."""
    both = {"mixup": 1.0, "cutmix": 1.0}
    kinds = {}
    for probability in (0.0, 0.5, 1.0):
        mixer = mixing(**both, mixup_switch_prob=probability)
        images = [mixed(mixer, step)[0] for step in range(40)]
        kinds[probability] = np.mean([torch.equal(image, image.round()) for image in images])
    assert kinds[0.0] == 0
    assert 0.2 < kinds[0.5] < 0.8
    assert kinds[1.0] == 1


def test_a_step_is_mixed_the_same_whatever_came_before_and_ranks_differ():
    """A resumed run would not equal the undisturbed one; all ranks would cut the same window."""
    settings = {"mixup": 0.8, "cutmix": 1.0}
    first = mixing(**settings)
    expected = [mixed(first, step) for step in range(5)]
    np.random.seed(99)
    later = mixing(**settings)
    for step in (4, 2):
        for got, wanted in zip(mixed(later, step), expected[step], strict=True):
            assert torch.equal(got, wanted)
    others = [mixed(mixing(**settings, rank=1), 4), mixed(mixing(**settings, seed=4), 4), expected[3]]
    assert not any(torch.equal(targets, expected[4][1]) for _, targets in others)


def test_mixing_leaves_the_global_generator_alone():
    """Whatever else draws from it would depend on whether mixing is on."""
    np.random.seed(1)
    expected = np.random.rand(3)
    np.random.seed(1)
    mixed(mixing(mixup=0.8, cutmix=1.0), 0)
    assert np.array_equal(np.random.rand(3), expected)


def test_the_loss_is_timms_with_label_smoothing():
    images, labels = batch()
    np.random.seed([3, 3, 6, 0])  # seed, purpose, step, rank
    _, theirs = timm.data.Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=CLASSES)(images, labels)
    logits = torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(0))
    expected = timm.loss.SoftTargetCrossEntropy()(logits, theirs)
    _, targets = mixed(mixing(mixup=0.8, cutmix=1.0), 6)
    found = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("key", ["mixup", "cutmix"])
def test_an_odd_batch_is_refused(key):
    with pytest.raises(RecipeError) as refused:
        mixing(batch_size=7, **{key: 1.0})
    assert refused.value.key == f"data.{key}"
    assert "7" in refused.value.problem
    mixing(batch_size=7)
