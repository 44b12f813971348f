"""Distillation's equations. Without these a student would learn from its teachers by other weights than the paper's."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cyclebnn_dist.config.recipe import DistillConfig, LossConfig, Recipe, TrainConfig
from cyclebnn_dist.losses import Objective
from cyclebnn_dist.losses.distillation import assistant_index, cross_entropies, weighted_mean


def softmax(row):
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def cross_entropy(teacher_row, student_row, temperature):
    said = softmax([value / temperature for value in teacher_row])
    believed = softmax([value / temperature for value in student_row])
    return -sum(p * math.log(q) for p, q in zip(said, believed, strict=True))


def paper_loss(losses):
    """mean_b[1/n sum_i alpha_ib l_ib] of a list of teachers, each a list of images."""
    total = 0.0
    for of_image in zip(*losses, strict=True):
        alpha = softmax(list(of_image))
        total += sum(a * loss for a, loss in zip(alpha, of_image, strict=True)) / len(losses)
    return total / len(losses[0])


def released_loss(losses):
    """As the authors' script runs: losses of a teacher are their batch mean, alphas are of images; 1/2 for one teacher."""
    means = [sum(of_teacher) / len(of_teacher) for of_teacher in losses]
    total = 0.0
    for of_image in zip(*losses, strict=True):
        alpha = softmax(list(of_image)) if len(losses) > 1 else [0.5]
        total += sum(a * mean for a, mean in zip(alpha, means, strict=True)) / len(losses)
    return total / len(losses[0])


def equal_loss(losses):
    return sum(map(sum, losses)) / len(losses) ** 2 / len(losses[0])


def logits(num_teachers, *, seed=0, batch=5, classes=7):
    generator = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(batch, classes, generator=generator)
    return student, 3 * torch.randn(num_teachers, batch, classes, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("num_teachers", [1, 2, 3])
def test_the_losses_follow_their_definitions(num_teachers, temperature):
    student, said = logits(num_teachers)
    losses = cross_entropies(student, said, temperature=temperature)
    expected = [
        [cross_entropy(*rows, temperature) for rows in zip(teacher.tolist(), student.tolist(), strict=True)]
        for teacher in said
    ]
    torch.testing.assert_close(losses, torch.tensor(expected))
    for weighting, definition in {
        "per_sample": paper_loss,
        "released": released_loss,
        "equal": equal_loss,
    }.items():
        assert weighted_mean(losses, weighting=weighting).item() == pytest.approx(
            definition(expected), rel=1e-5
        )


def test_one_teacher_is_plain_distillation_unless_released():
    student, said = logits(1)
    plain = nn.functional.cross_entropy(student, said[0].softmax(dim=1))
    losses = cross_entropies(student, said)
    assert weighted_mean(losses).item() == pytest.approx(plain.item(), rel=1e-6)
    assert weighted_mean(losses, weighting="released").item() == pytest.approx(plain.item() / 2, rel=1e-6)


def test_weights_of_an_image_are_constants_to_the_gradient():
    """Else a model would lower its loss by agreeing less with the teacher it agrees with more."""
    student, said = logits(2)
    student.requires_grad_()
    losses = cross_entropies(student, said)
    (found,) = torch.autograd.grad(weighted_mean(losses), student, retain_graph=True)
    alpha = losses.detach().softmax(dim=0)
    believed = student.detach().softmax(dim=1)
    expected = (alpha[:, :, None] * (believed - said.softmax(dim=2))).mean(dim=0) / len(student)
    torch.testing.assert_close(found, expected)


@given(
    total=st.integers(1, 10**7),
    assistants=st.integers(1, 9),
    place=st.floats(0, 1, exclude_max=True),
)
def test_every_assistant_has_its_share_of_the_steps_in_order(total, assistants, place):
    step = int(place * total)
    index = assistant_index(step, total_steps=total, num_assistants=assistants)
    assert 0 <= index < assistants
    assert index * total <= step * assistants < (index + 1) * total
    following = assistant_index(step + 1, total_steps=total, num_assistants=assistants)
    assert following - index in range(max(2, assistants))
    assert assistant_index(total, total_steps=total, num_assistants=assistants) == assistants - 1


class Say:
    """Stands where teachers would; notes what it was asked."""

    description = "two who say what they are told to"

    def __init__(self, said):
        self.said, self.asked = said, []

    def logits(self, images, *, step):
        self.asked.append((images, step))
        return self.said

    def place(self, step):
        return {"assistant": step // 4}


def test_the_objective_adds_labels_and_teachers_and_notes_their_means():
    recipe = Recipe(
        train=TrainConfig(label_smoothing=0.1),
        distill=DistillConfig(teacher="a", assistants=("b",), label_loss=0.5, temperature=2.0),
    )
    student, said = logits(2)
    images, labels = torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4])
    teachers = Say(said)
    objective = Objective(recipe, teachers=teachers)
    model = nn.Linear(2, 2)
    found = objective(model, images, student, labels, step=3)
    losses = cross_entropies(student, said, temperature=2.0)
    with_labels = nn.functional.cross_entropy(student, labels, label_smoothing=0.1)
    torch.testing.assert_close(found, 4 * weighted_mean(losses) + 0.5 * with_labels)
    ((given, step),) = teachers.asked
    assert given is images
    assert step == 3

    objective(model, images, 2 * student, labels, step=4)
    second = cross_entropies(2 * student, said, temperature=2.0)
    means = objective.take_means()
    assert list(means) == ["assistant_loss", "teacher_loss", "label_loss"]
    torch.testing.assert_close(means["assistant_loss"], (losses[0].mean() + second[0].mean()) / 2)
    torch.testing.assert_close(means["teacher_loss"], (losses[1].mean() + second[1].mean()) / 2)
    assert objective.take_means() == {}
    assert objective.place(5) == {"assistant": 1}


def test_without_teachers_the_objective_is_the_cross_entropy_to_the_last_bit():
    student, _ = logits(1)
    labels = torch.tensor([0, 1, 2, 3, 4])
    objective = Objective(Recipe(train=TrainConfig(label_smoothing=0.1), loss=LossConfig()))
    found = objective(nn.Linear(2, 2), torch.zeros(5, 3, 8, 8), student, labels, step=0)
    assert torch.equal(found, nn.functional.cross_entropy(student, labels, label_smoothing=0.1))
    assert objective.take_means() == {}
    assert objective.place(0) == {}
    assert objective.teachers == "none"
