"""Distillation: how far a model is from what its teachers say, as one number. Pure functions of logits and the step."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["per_sample", "released", "equal"]


def assistant_index(step: int, *, total_steps: int, num_assistants: int) -> int:
    """Which assistant teaches at ``step``: floor(step / total_steps * num_assistants), the last one from the end on.

    Source: consecutive knowledge distillation of BNext (2211.12933), whose code counts whole epochs.
    """
    return min(num_assistants - 1, step * num_assistants // total_steps)


def cross_entropies(logits: Tensor, of_teachers: Tensor, *, temperature: float = 1.0) -> Tensor:
    """For each teacher i and image b, -sum_c softmax(t_ib / T)_c log_softmax(s_b / T)_c.

    Args:
        logits: of the model, float32 [B, C].
        of_teachers: float32 [n, B, C]; no gradient goes there.

    Returns:
        float32 [n, B].
    """
    said = torch.softmax(of_teachers.detach() / temperature, dim=-1)
    return -(said * torch.log_softmax(logits / temperature, dim=-1)).sum(dim=-1)


def weighted_mean(losses: Tensor, *, weighting: Weighting = "per_sample") -> Tensor:
    """One number of the losses of n teachers about B images, by weights alpha without gradient that add up to 1.

    ``per_sample``: mean_b[1/n sum_i alpha_ib l_ib] with alpha_.b = softmax_i(l_ib), so that of two teachers the one a model
    agrees less with counts more. With one teacher it is the mean of its losses.

    ``released``: 1/n sum_i mean_b(alpha_ib) mean_b(l_ib), and alpha = 1/2 for a single teacher.

    ``equal``: per_sample with alpha = 1/n.

    Source: BNext (2211.12933): per_sample is its diversified weighting; released is what its training script computes,
    where two spellings of one option make the losses batch means while the weights stay one an image.

    Args:
        losses: float32 [n, B].
    """
    num_teachers = len(losses)
    if weighting == "equal":
        alpha = torch.full_like(losses, 1.0 / num_teachers)
    else:
        alpha = torch.softmax(losses.detach(), dim=0)
    if weighting == "released":
        alpha = alpha if num_teachers > 1 else torch.full_like(alpha, 0.5)
        return (alpha.mean(dim=1) * losses.mean(dim=1)).mean()
    return (alpha * losses).mean()
