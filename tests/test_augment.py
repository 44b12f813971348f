"""Augmentation. Without these, recipes tuned with torchvision and timm would be trained with other images here."""

import dataclasses
import random as python_random

import numpy as np
import pytest
import torch
from nvidia import dali
from nvidia.dali import pipeline_def
from PIL import Image

from cyclebnn_dist.config import RecipeError, load_recipe
from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data import EvalLoader, TrainLoader, augment, erasing, jitter, pipeline, scan_folder
from cyclebnn_dist.data.order import ERASING, uniforms
from cyclebnn_dist.timm_import import timm

CPU = torch.device("cpu")
CONFIG = DataConfig(image_size=32, threads=1, mean=(0.0,) * 3, std=(1.0,) * 3)


def smooth_image(height, width):
    """Waves of a dozen pixels or more: where a resize puts them shows, how it filters them hardly."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / width * 12), np.sin(y / height * 12), np.sin((x + y) / height * 9)]
    return (127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def distance(left, right):
    """Kolmogorov and Smirnov's distance of two samples."""
    points = np.concatenate([left, right])
    below = [np.searchsorted(np.sort(each), points, side="right") / len(each) for each in (left, right)]
    return np.abs(below[0] - below[1]).max()


BOUND = 0.045
"""Two samples of 3500 from one distribution are further apart than this once in 600 times."""
DRAWS = 3500


def our_crops(path, config, count=DRAWS):
    """Top, left, height, width of the crops of one image."""
    batch = 500

    @pipeline_def(batch_size=batch, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def windows():
        encoded, _ = pipeline._encoded()
        return pipeline._crop_window(encoded, config)

    built, found = windows(), []
    for start in range(0, count, batch):
        places = range(start, start + batch)
        feeds = pipeline.training_feeds(
            config, uniforms(places, pipeline.num_columns(config), seed=3, epoch=1)
        )
        inputs = {name: feeds[name] for name in ("crop_width", "crop_height", "crop_place")}
        paths = [np.frombuffer(str(path).encode(), np.uint8)] * batch
        starts, sizes = (output.as_array() for output in built.run(paths=paths, **inputs))
        found.append(np.concatenate([starts, sizes], axis=1))
    return np.concatenate(found)


def timms_crops(path, config, count=DRAWS):
    python_random.seed(5)
    image = Image.open(path)
    draw = timm.data.transforms.RandomResizedCropAndInterpolation.get_params
    return np.array([draw(image, config.scale, config.ratio) for _ in range(count)])


def crop_statistics(crops, height, width):
    top, left, h, w = crops.astype(float).T
    return {
        "area": h * w / (height * width),
        "ratio": np.log(w / h),
        "top": top / np.maximum(height - h, 1),
        "left": left / np.maximum(width - w, 1),
    }


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (120, 480)])
def test_random_resized_crops_are_distributed_as_timms(tmp_path, shape):
    path = tmp_path / "image.png"
    Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(path)
    config = DataConfig()
    ours = crop_statistics(our_crops(path, config), *shape)
    theirs = crop_statistics(timms_crops(path, config), *shape)
    apart = {name: distance(ours[name], theirs[name]) for name in ours}
    assert max(apart.values()) < BOUND, apart


def test_the_comparison_would_see_another_crop_range(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.zeros((375, 500, 3), np.uint8)).save(path)
    theirs = crop_statistics(timms_crops(path, DataConfig()), 375, 500)
    for name, changed in {"area": {"scale": (0.14, 1.0)}, "ratio": {"ratio": (0.8, 1.25)}}.items():
        ours = crop_statistics(our_crops(path, DataConfig(**changed)), 375, 500)
        assert distance(ours[name], theirs[name]) > BOUND


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_validation_sees_the_pixels_that_timm_would_show(tmp_path, interpolation):
    """Of every image, in one pass: sizes whose longer side is no integer, odd margins, enlargements, crop_pct 1."""
    folder = tmp_path / "val" / "x"
    folder.mkdir(parents=True)
    shapes = [(40, 61), (61, 40), (77, 50), (50, 75), (20, 31), (333, 500), (100, 501), (64, 64), (53, 40)]
    for index, shape in enumerate(shapes):
        pixels = np.random.default_rng(index).integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    images = scan_folder(tmp_path, "val", num_classes=1)
    for size, crop_pct in ((32, 0.875), (32, 1.0), (25, 0.9), (31, 0.95)):
        config = dataclasses.replace(CONFIG, image_size=size, crop_pct=crop_pct, interpolation=interpolation)
        loader = EvalLoader(images, config, batch_size=len(shapes), rank=0, world_size=1, device=CPU)
        (batch,) = loader
        loader.close()
        transform = timm.data.create_transform(
            size, crop_pct=crop_pct, interpolation=interpolation, mean=config.mean, std=config.std
        )
        for index, shape in enumerate(shapes):
            expected = transform(Image.open(images.path(index)))
            # Noise shows every shift, and every filter that is not the same; coefficients are rounded differently.
            levels = (batch.images[index] - expected).abs() * 255
            assert levels.max() < 1.01, (shape, size, crop_pct)


def test_orientation_in_exif_is_left_alone_as_timm_does(tmp_path):
    """Some photographs would be trained and judged lying on their side, others not."""
    pixels = Image.fromarray(smooth_image(40, 64))
    exif = pixels.getexif()
    exif[0x0112] = 6
    for split in ("train", "val"):
        (tmp_path / split / "x").mkdir(parents=True)
        pixels.save(tmp_path / split / "x" / "a.jpg", quality=95, exif=exif)
        pixels.save(tmp_path / split / "x" / "b.jpg", quality=95)
    config = dataclasses.replace(CONFIG, scale=(1.0, 1.0), ratio=(1.6, 1.6), flip=0.0)
    val, train = (scan_folder(tmp_path, split, num_classes=1) for split in ("val", "train"))
    (shown,) = EvalLoader(val, config, batch_size=2, rank=0, world_size=1, device=CPU)
    trained = TrainLoader(train, config, batch_size=2, rank=0, world_size=1, seed=0, device=CPU).next()
    for images in (shown.images, trained.images):
        torch.testing.assert_close(images[0], images[1], atol=0.01, rtol=0)


TIMMS_NAMES = {
    "AutoContrast": "auto_contrast", "Equalize": "equalize", "Invert": "invert", "Rotate": "rotate",
    "PosterizeIncreasing": "posterize", "SolarizeIncreasing": "solarize", "SolarizeAdd": "solarize_add",
    "ColorIncreasing": "color", "ContrastIncreasing": "contrast", "BrightnessIncreasing": "brightness",
    "SharpnessIncreasing": "sharpness", "ShearX": "shear_x", "ShearY": "shear_y",
    "TranslateXRel": "translate_x", "TranslateYRel": "translate_y",
}  # fmt: skip


def test_timms_randaugment_draws_timms_operations_at_timms_magnitudes():
    """BNext's rand-m7-mstd0.5-inc1."""
    config = DataConfig(
        augment="randaugment_timm", randaugment_magnitude=21, randaugment_std=1.5, randaugment_prob=0.5
    )
    names = [operation.name for operation in augment._suites(config)[0]]
    theirs = [TIMMS_NAMES[name] for name in timm.data.auto_augment.rand_augment_choices("", increasing=True)]
    assert sorted(names) == sorted([*theirs, "identity"])
    columns = pipeline.num_columns(config)
    random = uniforms(range(30_000), columns, seed=0, epoch=0)[:, pipeline._CROP_COLUMNS :]
    feeds = augment.feeds(config, random)
    times = np.bincount(feeds["operation"].ravel(), minlength=len(names)) / feeds["operation"].size
    assert times[names.index("identity")] == pytest.approx(0.5, abs=0.01)
    assert times[:-1] == pytest.approx([0.5 / 15] * 15, abs=0.005)
    levels = feeds["magnitude"] / 3
    assert levels.mean() == pytest.approx(7, abs=0.02)
    # Rounding to thirds of a level adds a variance of its own.
    assert levels.std() == pytest.approx((0.5**2 + (1 / 3) ** 2 / 12) ** 0.5, rel=0.02)
    assert abs(np.corrcoef(feeds["magnitude"].ravel(), feeds["operation"].ravel())[0, 1]) < 0.02
    far = augment.feeds(dataclasses.replace(config, randaugment_std=60.0), random)["magnitude"]
    assert (far.min(), far.max()) == (0, 30)


def test_timms_randaugment_changes_pixels_and_places_as_timm_does():
    config = DataConfig(augment="randaugment_timm", randaugment_num_ops=1, image_size=16)
    suite = augment._suites(config)[0]
    names = [operation.name for operation in suite]
    pointwise = ["Invert", "SolarizeIncreasing", "SolarizeAdd", "PosterizeIncreasing"]
    # At the last level timm posterizes to no bits at all.
    cases = [(name, level) for name in pointwise for level in (4, 7, 10)][:-1]
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    feeds = {
        "operation": np.array([[names.index(TIMMS_NAMES[name])] for name, _ in cases], np.int32),
        "sign": np.zeros((len(cases), 1), np.int32),
        "magnitude": np.array([[3 * level] for _, level in cases], np.int32),
    }
    found = run_on(pixels, feeds, lambda images: augment.augmented(images, config), conditionals=True)
    for (name, level), changed in zip(cases, found, strict=True):
        argument = timm.data.auto_augment.LEVEL_TO_ARG[name]
        arguments = argument(level, {}) if argument else ()
        expected = timm.data.auto_augment.NAME_TO_OP[name](Image.fromarray(pixels), *arguments)
        assert np.array_equal(changed, np.asarray(expected)), (name, level)
    for name in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel", "ColorIncreasing"):
        low, high = suite[names.index(TIMMS_NAMES[name])].mag_range
        (theirs,) = timm.data.auto_augment.LEVEL_TO_ARG[name](7, {})
        offset = 1.0 if name.endswith("Increasing") else 0.0  # enhancing factors lie about 1
        assert low + (high - low) * 0.7 == pytest.approx(abs(theirs - offset), abs=1e-6), name


def timms_policy():
    """AutoAugment's sub-policies as timm has them: (operation in DALI's name, probability, level), idle steps left out."""
    names = {
        "ShearX": "shear_x", "ShearY": "shear_y", "TranslateYRel": "translate_y", "Rotate": "rotate",
        "Color": "color", "Posterize": "posterize", "Solarize": "solarize", "SolarizeAdd": "solarize_add",
        "Invert": "invert", "Equalize": "equalize", "AutoContrast": "auto_contrast",
    }  # fmt: skip
    without_level = {"invert", "equalize", "auto_contrast"}
    return [
        [
            (names[step.name], step.prob, 0 if names[step.name] in without_level else step.magnitude)
            for step in steps
            if step.prob
        ]
        for steps in timm.data.auto_augment.auto_augment_policy_v0({})
    ]


def test_autoaugment_draws_timms_policy():
    config = DataConfig(augment="autoaugment")
    columns = pipeline.num_columns(config)
    count = 50_000
    random = uniforms(range(count), columns, seed=0, epoch=0)[:, pipeline._CROP_COLUMNS :]
    feeds = augment.feeds(config, random)
    policy = timms_policy()
    done = {}
    for stage, suite in enumerate(augment._suites(config)):
        names = [operation.name for operation in suite]
        for operation, magnitude in zip(
            feeds["operation"][:, stage], feeds["magnitude"][:, stage], strict=True
        ):
            if names[operation] != "identity":
                key = (names[operation], int(magnitude))
                done[key] = done.get(key, 0) + 1
    expected = {}
    for steps in policy:
        for name, probability, level in steps:
            expected[name, level] = expected.get((name, level), 0) + probability * count / len(policy)
    assert done.keys() == expected.keys()
    for key, times in expected.items():
        assert abs(done[key] - times) < 5 * times**0.5, key
    assert 0.49 < feeds["sign"].mean() < 0.51


def test_autoaugment_does_what_its_numbers_say():
    """Inversion, by its table entry, gives the negative; nothing, where no step is drawn."""
    config = DataConfig(augment="autoaugment", image_size=8)
    suite = [operation.name for operation in augment._suites(config)[0]]
    operations = [[suite.index("invert"), -1], [suite.index("identity"), -1]]
    idle = len(augment._suites(config)[1]) - 1
    feeds = {
        "operation": np.array([[first, idle] for first, _ in operations], np.int32),
        "sign": np.zeros((2, 2), np.int32),
        "magnitude": np.zeros((2, 2), np.int32),
    }
    pixels = np.random.default_rng(0).integers(0, 256, size=(8, 8, 3)).astype(np.uint8)
    found = run_on(pixels, feeds, lambda images: augment.augmented(images, config), conditionals=True)
    assert np.array_equal(found[0], 255 - pixels)
    assert np.array_equal(found[1], pixels)


def run_on(pixels, feeds, node, *, conditionals=False):
    """Outputs of a DALI node for the same uint8 image with every row of the feeds."""
    count = len(next(iter(feeds.values())))

    @pipeline_def(
        batch_size=count,
        num_threads=1,
        device_id=None,
        prefetch_queue_depth=1,
        enable_conditionals=conditionals,
    )
    def described():
        images = dali.fn.external_source(name="images", ndim=3, dtype=dali.types.UINT8, layout="HWC")
        return node(images)

    (output,) = described().run(images=[pixels] * count, **feeds)
    return output.as_array()


def test_colour_jitter_changes_pixels_as_torchvision_does():
    from torchvision.transforms import functional

    config, without_saturation = (DataConfig(color_jitter=(0.4, 0.4, extent, 0.0)) for extent in (0.4, 0.0))
    random = uniforms(range(40), 4, seed=1, epoch=0)
    feeds = jitter.feeds(config, random)
    # Far enough from black and white that nothing is cut: then torchvision's order has no say.
    pixels = np.random.default_rng(0).integers(95, 135, size=(16, 16, 3)).astype(np.uint8)
    found = run_on(pixels, feeds, lambda images: jitter.jittered(images, config))
    for row in range(len(random)):
        image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
        for name in ("contrast", "brightness", "saturation"):
            image = getattr(functional, f"adjust_{name}")(image, float(feeds[name][row]))
        assert np.abs(found[row] - image.permute(1, 2, 0).numpy() * 255).max() < 2
    bright = {"brightness": np.array([1.4], np.float32), "contrast": np.array([1.4], np.float32)}
    white = run_on(
        np.full((4, 4, 3), 250, np.uint8), bright, lambda images: jitter.jittered(images, without_saturation)
    )
    assert (white == 255).all()


def test_colour_jitter_has_torchvisions_ranges():
    config = DataConfig(color_jitter=(0.4, 1.5, 0.2, 0.1))
    feeds = jitter.feeds(config, uniforms(range(4000), 4, seed=1, epoch=0))
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0, 2.5),
        ("saturation", 0.8, 1.2),
        ("hue", -36, 36),
    ):
        margin = (high - low) / 400
        assert low <= feeds[name].min() < low + margin, name
        assert high - margin < feeds[name].max() <= high, name
    assert jitter.feeds(DataConfig(), np.empty((3, 0))) == {}
    assert set(jitter.feeds(DataConfig(color_jitter=(0.4, 0, 0, 0)), np.zeros((3, 4)))) == {
        "brightness",
        "contrast",
    }


def test_hue_turns_colours_and_leaves_greys_and_lightness():
    config = DataConfig(color_jitter=(0.0, 0.0, 0.0, 0.5))
    feeds = {"hue": np.array([0.0, 120.0, 180.0], np.float32), "saturation": np.ones(3, np.float32)}
    pixels = np.array([[[150, 110, 110], [128, 128, 128]]], np.uint8)
    same, third, half = run_on(pixels, feeds, lambda images: jitter.jittered(images, config)).astype(int)
    assert np.abs(same - pixels).max() <= 1
    for turned in (third, half):
        assert np.abs(turned[0, 1] - 128).max() <= 1
        assert abs(turned[0, 0] @ [0.299, 0.587, 0.114] - 121.96) < 2
    assert third[0, 0].argmax() != 0
    assert half[0, 0].argmin() == 0


def erased_by_timm(count, size):
    python_random.seed(2)
    erase = timm.data.random_erasing.RandomErasing(1.0, mode="const", device="cpu")
    boxes = []
    for _ in range(count):
        rows = (erase(torch.ones(1, size, size))[0] == 0).nonzero()
        if len(rows):
            low, high = rows.min(dim=0).values, rows.max(dim=0).values
            boxes.append([*low.tolist(), *(high - low + 1).tolist()])
    return np.array(boxes)


def test_erased_rectangles_are_distributed_as_timms():
    random = uniforms(range(DRAWS), erasing._COLUMNS, seed=0, epoch=0, purpose=ERASING)
    ours = crop_statistics(erasing.erased_boxes(1.0, random, size=96), 96, 96)
    theirs = crop_statistics(erased_by_timm(DRAWS, 96), 96, 96)
    apart = {name: distance(ours[name], theirs[name]) for name in ours}
    assert max(apart.values()) < BOUND, apart
    fraction = (erasing.erased_boxes(0.25, random, size=96)[:, 2] > 0).mean()
    assert abs(fraction - 0.25) < 0.03


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", ["const", "pixel"])
def test_erasing_touches_its_rectangles_only_and_depends_on_the_place(mode, layout):
    config = DataConfig(erasing=0.5, erasing_mode=mode)
    fresh = torch.full((40, 3, 24, 24), 7.0).contiguous(memory_format=layout)
    whole = erasing.erase_(fresh.clone(), config, places=range(40), seed=4, epoch=2)
    random = uniforms(range(40), erasing._COLUMNS, seed=4, epoch=2, purpose=ERASING)
    filled = []
    for image, (top, left, height, width) in zip(
        whole, erasing.erased_boxes(0.5, random, size=24).tolist(), strict=True
    ):
        inside = torch.zeros(24, 24, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        assert (image[:, ~inside] == 7).all()
        filled.append(image[:, inside].flatten())
    assert 8 < sum(len(values) > 0 for values in filled) < 32
    values = torch.cat(filled)
    assert values.mean().abs() < 0.05
    assert values.std() == pytest.approx(0.0 if mode == "const" else 1.0, abs=0.05)
    part = erasing.erase_(fresh[:13].clone(), config, places=range(20, 33), seed=4, epoch=2)
    assert torch.equal(part, whole[20:33])
    assert not torch.equal(erasing.erase_(fresh.clone(), config, places=range(40), seed=4, epoch=3), whole)
    assert torch.equal(erasing.erase_(fresh.clone(), DataConfig(), places=range(40), seed=4, epoch=2), fresh)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    (root / "train" / "x").mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(24):
        pixels = np.clip(smooth_image(40, 50) * 0.8 + random.integers(-20, 40, size=3), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(root / "train" / "x" / f"{index:02d}.jpg")
    return scan_folder(root, "train", num_classes=1)


EVERYTHING = dataclasses.replace(
    CONFIG, augment="autoaugment", color_jitter=(0.4, 0.4, 0.4, 0.1), erasing=0.5, erasing_mode="pixel"
)


def loader_of(images, config, *, batch_size=6, rank=0, world_size=1, **kwargs):
    return TrainLoader(
        images, config, batch_size=batch_size, rank=rank, world_size=world_size, seed=3, device=CPU, **kwargs
    )


def test_with_all_augmentations_a_restart_and_other_ranks_see_the_same_pixels(photographs):
    """Augmentations drawn from a generator of their own would differ after a restart."""
    whole = loader_of(photographs, EVERYTHING)
    expected = [whole.next() for _ in range(6)]
    whole.load_state_dict(
        loader_of(photographs, EVERYTHING).state_dict() | {"epoch": 0, "step": 3, "place": 18}
    )
    for batch in expected[3:]:
        assert torch.equal(whole.next().images, batch.images)
    pair = [loader_of(photographs, EVERYTHING, batch_size=3, rank=rank, world_size=2) for rank in range(2)]
    for batch in expected[:2]:
        assert torch.equal(torch.cat([loader.next().images for loader in pair]), batch.images)


def test_every_augmentation_changes_something(photographs):
    """A key could be read and left without effect."""
    plain = loader_of(photographs, CONFIG).next().images
    for change in (
        {"augment": "autoaugment"}, {"color_jitter": (0.4, 0.0, 0.0, 0.0)}, {"color_jitter": (0.0, 0.4, 0.0, 0.0)},
        {"color_jitter": (0.0, 0.0, 0.4, 0.0)}, {"color_jitter": (0.0, 0.0, 0.0, 0.2)}, {"erasing": 1.0},
    ):  # fmt: skip
        assert not torch.equal(
            loader_of(photographs, dataclasses.replace(CONFIG, **change)).next().images, plain
        )


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_images_come_in_the_type_of_the_recipe(photographs, name, dtype):
    """Half the memory would be promised, or other pixels given."""
    full = loader_of(photographs, EVERYTHING, channels_last=True).next().images
    config = dataclasses.replace(EVERYTHING, dtype=name)
    loader = loader_of(photographs, config, channels_last=True)
    for images in (loader.next().images, loader.blank().images):
        assert images.dtype == dtype
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.shape == full.shape
    narrow = loader_of(photographs, config).next().images
    torch.testing.assert_close(narrow.float(), full, atol=0.02, rtol=0.01)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data.dtype=bf16", "data.dtype"),
        ("data.erasing=1.5", "data.erasing"),
        ("data.color_jitter=[0.4, 0.4, 0.4, 0.6]", "data.color_jitter"),
        ("data.color_jitter=[0.4, -0.1, 0.4, 0]", "data.color_jitter"),
        ("data.mixup=-1", "data.mixup"),
        ("data.mixup_prob=2", "data.mixup_prob"),
    ],
)
def test_augmentation_out_of_range_is_refused(tmp_path, override, key):
    (tmp_path / "recipe.yaml").write_text("{}")
    with pytest.raises(RecipeError) as refused:
        load_recipe(tmp_path / "recipe.yaml", [override])
    assert refused.value.key == key
