"""The commands ``cyclebnn search ...``: their arguments, and what runs them. Modules that do the work are imported then."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from cyclebnn_dist.config import load_recipe
from cyclebnn_dist.config.pattern import Pattern, plain_pattern
from cyclebnn_dist.guards.exit_status import INTERRUPTED
from cyclebnn_dist.guards.preempt import listening

LEAVING = "in a search: leaving; finished candidates stay"


def add_search_commands(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` a subcommand a search; ``run_search`` of the options runs it and returns its exit status."""
    commands = parser.add_subparsers(required=True, metavar="SEARCH")
    mixbin = commands.add_parser(
        "mixbin",
        help="which layers stay real so that the network costs at most a share of the real one (MixBin)",
        description="Choose which layers of a recipe's model stay real, so that it costs at most search.budget of the real "
        "model's operations; stem and classifier are real. Budgeted greedy mixing, after MixBin: its authors' code is not "
        "public, and the score of a candidate, its short training and the fine-tuning between rounds are reconstructed. "
        "Candidates are shared out among all processes that run the same line: ranks of torchrun or srun, tasks of a Slurm "
        "array, on any machines that see the folder of the search. Killed, it goes on with the candidates that are missing.",
        epilog="examples:\n  cyclebnn search mixbin recipes/quickstart.yaml search.budget=0.25\n"
        "  cyclebnn search mixbin recipes/quickstart.yaml search.strategy=grow search.steps=200\n"
        "  torchrun --nproc_per_node 8 -m cyclebnn_dist search mixbin RECIPE search.budget=0.25\n"
        "  sbatch --array=0-15 --wrap 'cyclebnn search mixbin RECIPE search.budget=0.25'\n"
        "  cyclebnn train RECIPE binary.pattern=runs/quickstart-mixbin/pattern.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mixbin.set_defaults(run_search=_search_mixbin)
    mixbin.add_argument("recipe", type=Path, help="a recipe file (YAML)")
    mixbin.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe keys to change, e.g. search.budget=0.5"
    )
    mixbin.add_argument("--json", action="store_true", help="print the pattern")


def _search_mixbin(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    try:
        with listening(at_start=LEAVING) as preemption:  # importing torch takes a while
            from cyclebnn_dist.search import mixbin

            def show(pattern: Pattern) -> str:
                return json.dumps(plain_pattern(pattern))

            return mixbin.main(recipe, preemption=preemption, show=show if options.json else None)
    except KeyboardInterrupt:
        print("interrupted; finished candidates stay", file=sys.stderr)
        return INTERRUPTED
