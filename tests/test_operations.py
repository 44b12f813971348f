"""Faster operations. Without these, RandAugment here would do something else than DALI's, or than its own table says."""

import numpy as np
import pytest
from nvidia import dali
from nvidia.dali import pipeline_def
from nvidia.dali.auto_aug import auto_augment, rand_augment, trivial_augment
from nvidia.dali.auto_aug.core import signed_bin

from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data import augment
from cyclebnn_dist.data.operations import faster_on_cpu

HEIGHT, WIDTH, BINS = 40, 56, 31
SUITES = {
    "randaugment": rand_augment.get_rand_augment_suite(use_shape=True),
    "trivialaugment": trivial_augment.get_trivial_augment_wide_suite(use_shape=True),
    "autoaugment": list(auto_augment.get_image_net_policy(use_shape=True).augmentations.values()),
}


def outputs(operation, pixels):
    """Of one operation at every magnitude and both signs: int64 [2 BINS, HEIGHT, WIDTH, 3]."""

    @pipeline_def(
        batch_size=2 * BINS,
        num_threads=1,
        device_id=None,
        prefetch_queue_depth=1,
        enable_conditionals=True,
    )
    def described():
        images = dali.fn.external_source(name="images", ndim=3, dtype=dali.types.UINT8, layout="HWC")
        magnitude = dali.fn.external_source(name="magnitude", ndim=0, dtype=dali.types.INT32)
        sign = dali.fn.external_source(name="sign", ndim=0, dtype=dali.types.INT32)
        found = operation(
            images,
            magnitude_bin=signed_bin(magnitude, random_sign=sign),
            num_magnitude_bins=BINS,
            shape=(HEIGHT, WIDTH),
            fill_value=128,
        )
        return found, magnitude, sign  # inputs that an operation does not use would be gone else

    magnitude, sign = (each.astype(np.int32) for each in np.divmod(np.arange(2 * BINS), 2))
    found, _, _ = described().run(images=[pixels] * len(sign), magnitude=magnitude, sign=sign)
    return found.as_array().astype(np.int64)


@pytest.mark.parametrize("policy", SUITES)
def test_faster_operations_do_what_dalis_do(policy):
    """To one level of 255 in a few pixels, at noise, which shows half a pixel's shift in every one."""
    random = np.random.default_rng(0)
    pixels = random.integers((0, 30, 90), (200, 256, 91), size=(HEIGHT, WIDTH, 3)).astype(np.uint8)
    slow, fast = SUITES[policy], faster_on_cpu(SUITES[policy])
    assert [each.name for each in fast] == [each.name for each in slow]
    replaced = [pair for pair in zip(slow, fast, strict=True) if pair[0] is not pair[1]]
    assert {"rotate", "shear_x", "shear_y", "translate_y", "contrast"} & {each.name for each, _ in replaced}
    for dalis, ours in replaced:
        expected = outputs(dalis, pixels)
        levels = np.abs(outputs(ours, pixels) - expected)
        assert levels.max() <= 1, dalis.name
        assert (levels > 0).mean() < 0.1, dalis.name
        assert np.abs(expected - pixels).mean() > 10, dalis.name


def test_pipelines_on_a_cpu_use_them(monkeypatch):
    """The warps are most of what RandAugment costs there."""
    used = []
    monkeypatch.setattr(augment, "select", lambda suite, *args, data, **kwargs: used.append(suite) or data)
    config = DataConfig(augment="randaugment")

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def described():
        images = dali.fn.external_source(name="images", ndim=3, dtype=dali.types.UINT8, layout="HWC")
        return augment.augmented(images, config)

    described()
    assert [each.name for each in used[0]] == [each.name for each in SUITES["randaugment"]]
    assert all(
        ours is not dalis
        for ours, dalis in zip(used[0], SUITES["randaugment"], strict=True)
        if dalis.name in ("rotate", "shear_x", "contrast")
    )
