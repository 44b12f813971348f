"""What a run measured, and where it is written: console, metrics.jsonl, Weights & Biases."""

from cyclebnn_dist.metrics.console import Console
from cyclebnn_dist.metrics.journal import Journal, read_journal
from cyclebnn_dist.metrics.slow_rank import SlowRankReport
from cyclebnn_dist.metrics.totals import Totals
from cyclebnn_dist.metrics.wandb_run import WandbRun
from cyclebnn_dist.metrics.worlds import begin_world, split_by_world

__all__ = [
    "Console",
    "Journal",
    "SlowRankReport",
    "Totals",
    "WandbRun",
    "begin_world",
    "read_journal",
    "split_by_world",
]
