"""What experts tell DeepSpeed. Without these a mistyped key would be ignored, or another one break the reduction unseen."""

import contextlib
import io
import logging.handlers

import pytest
from launching import TINY_RECIPE
from test_deepspeed import build, train, under
from test_hook import same
from torch import device, nn, optim
from worlds import make_world

from cyclebnn_dist.assembly import describe_engine
from cyclebnn_dist.comm import build_reducer
from cyclebnn_dist.config import RecipeError, load_recipe
from cyclebnn_dist.config.deepspeed_rules import BREAKING, PASSED, SET_BY_RECIPE, check_deepspeed_settings
from cyclebnn_dist.config.recipe import CommConfig, EngineConfig, Recipe
from cyclebnn_dist.config.schema import find
from cyclebnn_dist.engine import DeepSpeedEngine, zero
from cyclebnn_dist.engine.deepspeed_config import check_by_deepspeed, deepspeed_config

EVERYTHING_PASSED = {
    "comms_logger": {"enabled": True, "verbose": True},
    "disable_python_gc": False,
    "dump_state": True,
    "log_level": "info",
    "memory_breakdown": True,
    "wall_clock_breakdown": True,
}


def nested(path, value):
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


@pytest.fixture
def recipe_file(tmp_path, tiny_data):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(run_dir=tmp_path / "run", data=tiny_data))
    return path


def load(recipe_file, settings, stage=1):
    overrides = [] if stage is None else under(stage)
    return load_recipe(recipe_file, [*overrides, f"engine.deepspeed={settings}"])


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ("{wall_clock_breakdwon: true}", "wall_clock_breakdwon", "did you mean wall_clock_breakdown"),
        ("{zero_optimization: {stage: 2}}", "zero_optimization.stage", "engine.zero_stage instead"),
        ("{gradient_clipping: 1.0}", "gradient_clipping", "train.clip_norm instead"),
        ("{optimizer: {type: Adam}}", "optimizer", "optim.name instead"),
        (
            "{zero_optimization: {offload_optimizer: {device: cpu}}}",
            "zero_optimization.offload_optimizer",
            "device",
        ),
        ("{communication_data_type: fp16}", "communication_data_type", "averaged by this project"),
        ("{wall_clock_breakdown: 'yes'}", "wall_clock_breakdown", "true or false"),
        ("{zero_optimization: true}", "zero_optimization", "group of keys"),
        (
            "{zero_optimization: {allgather_bucket_size: 1000}}",
            "zero_optimization.allgather_bucket_size",
            "ignores it",
        ),
        ("{comms_logger: {enabled: auto}}", "comms_logger", "ignores"),
        ("{comms_logger: {enabled: true}}", "comms_logger.verbose", "keeps to itself"),
    ],
)
def test_what_must_not_be_told_is_refused_by_its_key(recipe_file, settings, key, words):
    with pytest.raises(RecipeError, match=words) as caught:
        load(recipe_file, settings)
    assert caught.value.key == f"engine.deepspeed.{key}"


def test_settings_for_deepspeed_are_refused_beside_ddp(recipe_file):
    with pytest.raises(RecipeError, match="does not use"):
        load(recipe_file, "{dump_state: true}", stage=None)


def test_keys_that_are_named_instead_exist():
    assert all(find(Recipe, key) is not None for key in SET_BY_RECIPE.values())
    assert (
        not set(PASSED) & set(SET_BY_RECIPE)
        | set(PASSED) & set(BREAKING)
        | set(SET_BY_RECIPE) & set(BREAKING)
    )


def test_every_setting_of_zero_and_of_the_top_is_known_or_refused():
    """A DeepSpeed with further settings may not have them pass in silence."""
    zero.open_deepspeed(device("cpu"))
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for name in DeepSpeedZeroConfig.model_fields:
        path = f"zero_optimization.{name}"
        if path not in PASSED:
            with pytest.raises(RecipeError):
                check_deepspeed_settings(nested(path, True))


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({"comms_logger": {"enable": True}}, "comms_logger.enable", "Extra inputs"),
        ({"comms_logger": {"verbose": "often"}}, "comms_logger.verbose", "boolean"),
        ({"zero_optimization": {"no_such": 1}}, "zero_optimization.no_such", "Extra inputs"),
    ],
)
def test_deepspeeds_own_classes_check_the_rest(settings, key, words):
    zero.open_deepspeed(device("cpu"))
    with pytest.raises(RecipeError, match=words) as caught:
        check_by_deepspeed(deepspeed_config(EngineConfig(name="deepspeed", deepspeed=settings)))
    assert caught.value.key == f"engine.deepspeed.{key}"


def test_what_is_handed_on_keeps_what_this_project_sets():
    told = deepspeed_config(EngineConfig(name="deepspeed", zero_stage=2, deepspeed=EVERYTHING_PASSED))
    assert told["zero_optimization"]["stage"] == 2
    assert told["wall_clock_breakdown"] is True


def train_told(rank, n, stage, settings):
    """Weights after each step, and all that was logged and printed."""
    heard = logging.handlers.BufferingHandler(capacity=10_000)
    logger = logging.getLogger()
    logger.addHandler(heard)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            engine, reducer = build(rank, n, stage, settings=settings)
            history = train(engine, reducer, rank, steps=range(3))
    finally:
        logger.removeHandler(heard)
    reducer.close()
    told = [*(record.getMessage() for record in heard.buffer), printed.getvalue()]
    return [weights for _, _, weights in history], "\n".join(told)


@pytest.mark.parametrize("stage", [0, 2])
def test_what_may_be_told_reaches_deepspeed_and_changes_no_weight(ranks, stage):
    check_deepspeed_settings(EVERYTHING_PASSED)
    expected = ranks(2, train_told, stage, {})
    told = ranks(2, train_told, stage, EVERYTHING_PASSED)
    for (history, _), (found, _) in zip(expected, told, strict=True):
        assert all(same(a, b) for a, b in zip(history, found, strict=True))
    for words in ("Engine after step", "fwd_microstep"):
        assert [words in texts for (_, texts), *_ in (told, expected)] == [True, False]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"comms_logger": {"enabled": True, "verbose": True}}, "comm op: all_gather"),
        ({"dump_state": True}, "DeepSpeedEngine:"),
    ],
)
def test_what_is_to_be_logged_is_heard_without_another_setting(ranks, settings, words):
    check_deepspeed_settings(settings)
    assert [words in ranks(2, train_told, 1, given)[0][1] for given in (settings, {})] == [True, False]


def build_with_a_bad_key_on_one_rank(rank, n):
    world = make_world(rank, n)
    model = nn.Linear(4, 4)
    settings = {"comms_logger": {"enable": True}} if rank == 1 else {}
    config = EngineConfig(name="deepspeed", zero_stage=1, deepspeed=settings)
    reducer = build_reducer(
        CommConfig(), model.named_parameters(), rank=rank, world_size=n, seed=0, device=world.device
    )
    try:
        DeepSpeedEngine(
            model, optim.SGD(model.parameters(), lr=0.1), reducer, config=config, amp="fp32", world=world
        )
    except RecipeError as error:
        return error.key
    finally:
        reducer.close()


def test_what_deepspeed_refuses_on_one_rank_ends_all_of_them_at_once(ranks):
    assert ranks(2, build_with_a_bad_key_on_one_rank) == ["engine.deepspeed.comms_logger.enable"] * 2


def test_ranks_told_differently_are_found_by_their_agreement():
    told = [EngineConfig(name="deepspeed", deepspeed=settings) for settings in ({}, {"dump_state": True})]
    assert len({describe_engine(config) for config in told}) == 2
