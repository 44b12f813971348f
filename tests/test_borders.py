"""SIGKILL across the borders within a run. Without these a run killed beside one would end with other weights."""

import json
import os
import signal

import pytest
from launching import TINY_RECIPE
from safetensors.torch import save_file
from test_end_to_end import assert_same_final_state
from test_teachers import CONVNEXT, EFFICIENTNET, network
from test_train import run

from cyclebnn_dist.binary import METHODS
from cyclebnn_dist.config import load_recipe
from cyclebnn_dist.engine import DDPEngine
from cyclebnn_dist.losses.distillation import assistant_index
from cyclebnn_dist.metrics import read_journal
from cyclebnn_dist.phases import build_phases

ASSISTANTS = [CONVNEXT, "test_resnet", EFFICIENTNET]
TOTAL_STEPS, SAVED_AT = 25, 12
FIRST_BINARY, FIRST_HARD = 13, 17
FIRST_OF_LAST_ASSISTANT = FIRST_HARD
OVERRIDES = [
    "train.epochs=5",
    "first_phase.epochs=2.6",
    "first_phase.lr=2e-3",
    "first_phase.binary_weight_decay=0.01",
    f"run.save_every={SAVED_AT}",
    "eval.every_epochs=5",
    "model.name=bnext_t",
    "model.kwargs={channels: [8, 16, 16]}",
    "binary.method=bnext",
    "binary.activation=keep",
]


@pytest.fixture
def recipe_file(tmp_path, tiny_data):
    weights = {name: str(tmp_path / f"{name}.safetensors") for name in ASSISTANTS}
    for name, path in weights.items():
        save_file(network(name).state_dict(), path)
    distill = {"teacher": EFFICIENTNET, "assistants": ASSISTANTS, "amp": "fp32", "weights": weights}
    path = tmp_path / "tiny.yaml"
    tiny = TINY_RECIPE.format(run_dir=tmp_path / "killed", data=tiny_data)
    path.write_text(f"{tiny}distill: {json.dumps(distill)}\n")
    return path


def test_the_borders_are_where_the_next_test_kills(recipe_file):
    phases = build_phases(load_recipe(recipe_file, OVERRIDES), total_steps=TOTAL_STEPS, steps_per_epoch=5)
    moments = [phases.at(step) for step in range(TOTAL_STEPS)]
    assert [moment.first_phase for moment in moments].index(False) == FIRST_BINARY
    assert [METHODS["bnext"].phase_at(moment.progress) for moment in moments].index((0.0,)) == FIRST_HARD
    places = [assistant_index(step, total_steps=TOTAL_STEPS, num_assistants=3) for step in range(TOTAL_STEPS)]
    assert places.index(2) == FIRST_OF_LAST_ASSISTANT


def run_and_die(rank, size, path, step, doomed):
    """As ``run``; the ``doomed`` rank is killed in the backward pass of ``step``."""
    begin_step, backward = DDPEngine.begin_step, DDPEngine.backward
    steps = []

    def noted(self, number, **settings):
        steps.append(number)
        begin_step(self, number, **settings)

    def deadly(self, loss):
        if steps[-1] == step and rank == doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        backward(self, loss)

    DDPEngine.begin_step, DDPEngine.backward = noted, deadly
    return run(rank, size, path, OVERRIDES)


def test_killed_behind_phase_teachers_and_temperature_a_run_ends_as_the_undisturbed_one(
    ranks, tmp_path, recipe_file
):
    """All lives begin in the first phase; each is killed behind a border, before anything behind it is saved."""
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    assert ranks(2, run, recipe_file, [*OVERRIDES, f"run.dir={undisturbed}"]) == [0, 0]
    for life, first_behind in enumerate((FIRST_BINARY, FIRST_HARD)):
        outcomes = ranks.outcomes(2, run_and_die, recipe_file, first_behind + 1, life % 2)
        assert outcomes[life % 2][0] == "lost"
    assert ranks(2, run, recipe_file, OVERRIDES) == [0, 0]

    assert_same_final_state(undisturbed, killed)
    starts = [row["step"] for row in read_journal(killed) if row["event"] == "start"]
    assert len(starts) == 3
    assert max(starts) == SAVED_AT
    rows = [
        {row["step"]: row for row in read_journal(folder) if row["event"] == "train"}
        for folder in (undisturbed, killed)
    ]
    for name in ("assistant", "loss", "teacher_loss", "assistant_loss", "lr", "grad_norm"):
        values = [[of_run[step + 1][name] for step in range(TOTAL_STEPS)] for of_run in rows]
        assert values[0] == values[1], name
