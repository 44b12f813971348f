"""Resharding: residuals of one number of ranks made those of another, so that what is owed to the mean stays owed.

An averaged gradient is mean_i(g_i + e_i) + f, with e_i the residual of what rank i sends and f that of the mean, of which
every owner holds a slice. So the mean of e_i over ranks has to be conserved, not their sum, and the whole of f.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction

import torch

from cyclebnn_dist.comm.layout import Layout

ReadResiduals = Callable[[int, str], Mapping[str, torch.Tensor]]
"""Residuals by parameter name of an old rank and a phase, ``gradient`` or ``mean``; {} where it has none."""


def old_shares(old_size: int, new_size: int, rank: int) -> dict[int, Fraction]:
    """With which weights the residuals of old ranks add up to that of new ``rank``; the weights sum to 1.

    Old and new ranks cut the same unit interval. A rank reads its neighbours' files only, halving the world averages
    pairs, and doubling it copies: mean_j sum_i w_ji e_i = mean_i e_i.
    """
    shares = {}
    for old in range(old_size):
        start = max(Fraction(old, old_size), Fraction(rank, new_size))
        stop = min(Fraction(old + 1, old_size), Fraction(rank + 1, new_size))
        if start < stop:
            shares[old] = new_size * (stop - start)
    return shares


def reshard_gradient_errors(
    layout: Layout, *, rank: int, old_size: int, read: ReadResiduals
) -> dict[str, torch.Tensor]:
    """Residuals (fp32) of what ``rank`` sends, for all wide parameters of ``layout``."""
    sums = {p.name: torch.zeros(p.numel, dtype=torch.float64) for p in layout.parameters if not p.small}
    for old_rank, share in old_shares(old_size, layout.world_size, rank).items():
        for name, error in read(old_rank, "gradient").items():
            sums[name].add_(error.double(), alpha=float(share))
    return {name: total.float() for name, total in sums.items()}


def reshard_mean_errors(
    layout: Layout, *, rank: int, old_size: int, read: ReadResiduals
) -> dict[str, torch.Tensor]:
    """Residuals (fp32) of the slices of the mean that ``rank`` owns in an all-reduce, for all wide parameters of ``layout``."""
    wide = [replace(p, slot=None) for p in layout.parameters if not p.small]
    slices = {p.name: torch.zeros(len(p.owned_elements(rank))) for p in wide}
    for old_rank in range(old_size):
        errors = read(old_rank, "mean")
        for parameter in wide if errors else ():
            old = replace(parameter, world_size=old_size).owned_elements(old_rank)
            own = parameter.owned_elements(rank)
            start, stop = max(old.start, own.start), min(old.stop, own.stop)
            if start < stop:
                found = errors[parameter.name][start - old.start : stop - old.start]
                slices[parameter.name][start - own.start : stop - own.start] = found
    return slices
