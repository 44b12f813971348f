"""The checkpoint: a folder that is either complete or not there.

    run_dir/checkpoints/
      step_000000500/
        meta.json              step, world size, evaluation, size and SHA-256 of every file and of itself
        recipe.yaml            the resolved recipe
        model.safetensors      weights, and buffers averaged over ranks: what evaluation uses
        ema.safetensors        the same of the averaged weights, where a recipe asks for them
        shared.safetensors     optimizer, loss scale, meters: equal on all ranks
        rank_0.safetensors     a rank's own: buffers, data position, random states, residuals of the all-reduce
        rank_1.safetensors
      .partial_step_000001000_4be1d27a/ being written, or left by a kill; never read, removed by the next save
      .removed_step_000000400_90a3c551/ being removed, likewise

All ranks copy their state at the same step and write their files beside the others, each in a thread of its own that
communicates with nobody; when all have written, rank 0 adds meta.json and publishes the folder by renaming it.
"""

from cyclebnn_dist.checkpoint.layout import (
    best_checkpoint,
    complete_checkpoints,
    damaged_parts,
    has_real_weights,
    missing_parts,
    newest_checkpoint,
    read_meta,
    read_own,
    read_shared,
)
from cyclebnn_dist.checkpoint.retention import kept_steps
from cyclebnn_dist.checkpoint.saver import Saver, SaveResult
from cyclebnn_dist.checkpoint.snapshot import Snapshot

__all__ = [
    "SaveResult",
    "Saver",
    "Snapshot",
    "best_checkpoint",
    "complete_checkpoints",
    "damaged_parts",
    "has_real_weights",
    "kept_steps",
    "missing_parts",
    "newest_checkpoint",
    "read_meta",
    "read_own",
    "read_shared",
]
