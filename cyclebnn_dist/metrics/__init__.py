"""What a run measured, and where it is written: console, metrics.jsonl, Weights & Biases."""

from cyclebnn_dist.metrics.console import Console
from cyclebnn_dist.metrics.journal import Journal, read_journal
from cyclebnn_dist.metrics.totals import Totals
from cyclebnn_dist.metrics.wandb_run import WandbRun

__all__ = ["Console", "Journal", "Totals", "WandbRun", "read_journal"]
