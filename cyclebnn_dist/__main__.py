"""The ``cyclebnn`` command."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cyclebnn_dist.bench.commands import add_bench_commands
from cyclebnn_dist.config import RecipeError, load_recipe
from cyclebnn_dist.data.commands import add_data_commands
from cyclebnn_dist.guards.exit_status import FAILED, INTERRUPTED, REFUSED
from cyclebnn_dist.guards.preempt import listening
from cyclebnn_dist.search.commands import add_search_commands

CONVENTION_NAMES = ("bireal", "elementwise", "bnext", "fvbitcore")
OVERRIDES = "recipe keys to change, e.g. optim.lr=3e-4 precision.communication.low=2"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status, one of ``exit_status``."""
    options = build_parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except RecipeError as error:
        if (
            os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
        ):  # every rank meets the same error
            print(f"error: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # a reader such as head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``cyclebnn``."""
    parser = argparse.ArgumentParser(
        prog="cyclebnn", description="Train binary neural networks under a cyclic precision schedule."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, example: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"examples:\n{example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    train = command(
        "train",
        _train,
        "train a recipe, from wherever its run folder stands",
        "  cyclebnn train recipes/quickstart.yaml\n"
        "  cyclebnn train recipes/quickstart.yaml optim.lr=1e-3 run.dir=runs/second\n"
        "  torchrun --nproc_per_node 2 -m cyclebnn_dist train recipes/quickstart.yaml",
    )
    _add_recipe(train)

    evaluate = command(
        "evaluate",
        _evaluate,
        "accuracy of a checkpoint, at the forward width stored in it",
        "  cyclebnn evaluate runs/quickstart\n"
        "  cyclebnn evaluate runs/quickstart --checkpoint best\n"
        "  cyclebnn evaluate runs/quickstart/checkpoints/step_000000500 data.path=/data/imagenet",
    )
    evaluate.add_argument(
        "path", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run folder, or the folder of one checkpoint"
    )
    evaluate.add_argument(
        "--checkpoint",
        default="newest",
        metavar="WHICH",
        help="of a run folder: newest (default), best (by its validation top-1), or a step",
    )
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    summary = command(
        "summary",
        _summary,
        "table of a recipe's layers: swapped or not and why, parameters, operations, size",
        "  cyclebnn summary recipes/quickstart.yaml\n"
        "  cyclebnn summary recipes/quickstart.yaml model.name=resnet34 binary.method=bireal --json",
    )
    _add_recipe(summary)
    summary.add_argument("--json", action="store_true", help="print one JSON object")
    summary.add_argument(
        "--convention",
        choices=CONVENTION_NAMES,
        help="how operations are added up: bireal (BOPs / 64 + FLOPs, the default); elementwise (normalizations, "
        "activations and additions too); bnext (stem, classifier and gates at 8 bits, the default where they have them); "
        "fvbitcore (BOPs / 32)",
    )

    schedule = command(
        "schedule",
        _schedule,
        "what a recipe's schedule will do: bits against step, bytes sent, operations saved",
        "  cyclebnn schedule recipes/quickstart.yaml --plot schedule.png\n"
        "  cyclebnn schedule recipes/imagenet_resnet18.yaml --images 1281167 --ranks 16\n"
        "  cyclebnn schedule recipes/quickstart.yaml precision.forward.shape=triangular --steps 5000 --json",
    )
    _add_recipe(schedule)
    _add_length(schedule)
    schedule.add_argument(
        "--ranks", type=int, default=2, help="ranks that bytes are counted for (default: 2)"
    )
    schedule.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it, too")
    schedule.add_argument("--json", action="store_true", help="print one JSON object")

    plan = command(
        "plan",
        _plan,
        "how a recipe scales: step time, exposed communication, efficiency and bytes on clusters of any size",
        "  cyclebnn plan recipes/quickstart.yaml --nodes 1,2,4 --gpus-per-node 1 --network 1gbit\n"
        "  cyclebnn plan recipes/imagenet_resnet18.yaml --nodes 1,2,8,64,512 --network 100gbit --intra nvlink \\\n"
        "      --compute-seconds 0.12 --codec 200 --images 1281167",
    )
    _add_recipe(plan)
    plan.add_argument("--nodes", default="1,2,8,64,512", help="numbers of nodes (default: 1,2,8,64,512)")
    plan.add_argument(
        "--network",
        default="100gbit",
        help="a node's link in each direction: 100gbit, 25gbit, 1gbit, 100mbit ... or bytes a second (default: 100gbit)",
    )
    plan.add_argument(
        "--intra",
        default="nvlink",
        help="from one rank to the others of its node: nvlink, pcie, or as --network (default: nvlink)",
    )
    plan.add_argument("--gpus-per-node", type=int, default=8, help="ranks of a node (default: 8)")
    plan.add_argument(
        "--message-us", type=float, default=10.0, help="latency of one message in microseconds (default: 10)"
    )
    plan.add_argument(
        "--compute-seconds",
        default="measured",
        help="forward and backward passes of one rank and step, or measured: on this machine (default)",
    )
    plan.add_argument("--batch", type=int, help="images of a rank and pass to measure with")
    plan.add_argument(
        "--codec",
        default="measured",
        help="GB of fp32 gradients a second that a rank encodes and decodes, or measured: on this machine (default)",
    )
    _add_length(plan)
    plan.add_argument("--json", action="store_true", help="print one JSON object")

    recipes = command(
        "recipes",
        _recipes,
        "what the recipes of a folder train, what they reach, and what they need",
        "  cyclebnn recipes\n  cyclebnn recipes my/recipes --markdown",
    )
    recipes.add_argument("folder", nargs="?", type=Path, default=Path("recipes"), help="(default: recipes)")
    recipes.add_argument("--markdown", action="store_true", help="print a Markdown table")

    config = command(
        "config",
        _config,
        "every recipe key with its type, default and meaning",
        "  cyclebnn config\n  cyclebnn config --markdown",
    )
    config.add_argument("--markdown", action="store_true", help="print Markdown tables")

    search = command(
        "search",
        lambda options: options.run_search(options),
        "choose which layers of a recipe's model stay real within a budget of operations",
        "  cyclebnn search mixbin recipes/quickstart.yaml search.budget=0.25",
    )
    add_search_commands(search)

    bench = command(
        "bench",
        lambda options: options.run_bench(options),
        "measure on this machine what the project claims",
        "  cyclebnn bench layers\n  cyclebnn bench data\n  cyclebnn bench comm --ranks 4 --rate 1gbit\n"
        "  cyclebnn bench convergence --out runs.jsonl",
    )
    add_bench_commands(bench)

    data = command(
        "data",
        lambda options: options.run_data(options),
        "make or inspect data sets",
        "  cyclebnn data sample sample_data\n  cyclebnn data check /data/imagenet --out bad.txt",
    )
    add_data_commands(data)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="a recipe file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)


def _add_length(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, help="number of training images, where data.path is not here")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of the whole run, instead of counting images"
    )
    parser.add_argument("--steps-per-epoch", type=int, help="optimizer steps of an epoch")


def _train(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    try:
        with listening() as preemption:  # importing torch takes a while
            from cyclebnn_dist import train

            return train.main(recipe, preemption=preemption)
    except KeyboardInterrupt:
        print("interrupted; what was saved stays", file=sys.stderr)
        return INTERRUPTED


def _evaluate(options: argparse.Namespace) -> int:
    from cyclebnn_dist import evaluate

    result = evaluate.main(options.path, which=options.checkpoint, overrides=options.overrides)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:>14}  {value if not isinstance(value, float) else round(value, 4)}")
    return 0


def _summary(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    from cyclebnn_dist.models.summary import summarize_recipe

    print(summarize_recipe(recipe, as_json=options.json, convention=options.convention))
    return 0


def _schedule(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    from cyclebnn_dist.preview import preview, render_preview, run_length

    length = run_length(
        recipe, images=options.images, steps=options.steps, epoch_steps=options.steps_per_epoch
    )
    schedule, described = preview(recipe, length=length, ranks=options.ranks)
    print(json.dumps(described) if options.json else render_preview(schedule, described))
    if options.plot:
        from cyclebnn_dist.preview.plot import plot_preview

        plot_preview(described, options.plot, title=str(options.recipe))
    return 0


def _plan(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    from cyclebnn_dist.preview import run_length
    from cyclebnn_dist.preview.cluster import parse_clusters, parse_positive
    from cyclebnn_dist.preview.scaling import plan_scaling
    from cyclebnn_dist.preview.scaling_text import render_scaling

    clusters = parse_clusters(
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        network=options.network,
        intra=options.intra,
        message_us=options.message_us,
    )
    compute, codec = (
        None if given == "measured" else parse_positive(flag, given)
        for flag, given in (("--compute-seconds", options.compute_seconds), ("--codec", options.codec))
    )
    length = run_length(
        recipe, images=options.images, steps=options.steps, epoch_steps=options.steps_per_epoch
    )
    described = plan_scaling(
        recipe,
        clusters,
        length=length,
        compute_seconds=compute,
        batch=options.batch,
        codec_gb_per_second=codec,
    )
    print(json.dumps(described) if options.json else render_scaling(described))
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from cyclebnn_dist.config.header import find_recipes, read_header, render_headers

    headers, problems = [], []
    for path in find_recipes(options.folder):
        try:
            headers.append(read_header(path))
        except RecipeError as error:
            problems.append(f"{error.key}: {error.problem}")
    print(render_headers(headers, markdown=options.markdown), end="")
    if problems:
        print("\n".join(problems), file=sys.stderr)
    return 0


def _config(options: argparse.Namespace) -> int:
    from cyclebnn_dist.config.reference import render_reference

    print(render_reference("markdown" if options.markdown else "text"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
