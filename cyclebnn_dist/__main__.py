"""The ``cyclebnn`` command."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cyclebnn_dist.config import RecipeError, load_recipe

FAILED, REFUSED = 1, 2
CONVENTION_NAMES = ("bireal", "elementwise", "bnext", "fvbitcore")
OVERRIDES = "recipe keys to change, e.g. optim.lr=3e-4 precision.communication.low=2"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 refused, 75 pre-empted with a checkpoint."""
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
        "  cyclebnn evaluate runs/quickstart/checkpoints/step_000000500 data.path=/data/imagenet",
    )
    evaluate.add_argument(
        "checkpoint", type=Path, help="a checkpoint folder, or a run folder for its newest one"
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
        default=CONVENTION_NAMES[0],
        help="how operations are added up: bireal (BOPs / 64 + FLOPs); elementwise (normalizations, activations and "
        "additions too); bnext (stem, classifier and gates at 8 bits); fvbitcore (BOPs / 32)",
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

    config = command(
        "config",
        _config,
        "every recipe key with its type, default and meaning",
        "  cyclebnn config\n  cyclebnn config --markdown",
    )
    config.add_argument("--markdown", action="store_true", help="print Markdown tables")

    bench = command(
        "bench",
        lambda options: options.run_bench(options),
        "measure on this machine what the project claims",
        "  cyclebnn bench layers\n  cyclebnn bench data\n  cyclebnn bench comm --ranks 4 --rate 1gbit\n"
        "  cyclebnn bench convergence --out runs.jsonl",
    )
    _add_bench_commands(bench)

    data = command(
        "data",
        lambda options: options.run_data(options),
        "make or inspect data sets",
        "  cyclebnn data sample sample_data\n  cyclebnn data check /data/imagenet --out bad.txt",
    )
    _add_data_commands(data)
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


def _add_bench_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    layers = commands.add_parser(
        "layers",
        help="time and memory of a training step with binary layers",
        description="One training step of a model with binary layers of every method, beside the real model and beside "
        "a CycleBNN layer composed of ordinary operations: ratios of times measured in turn, and bytes kept.",
        epilog="examples:\n  cyclebnn bench layers\n"
        "  cyclebnn bench layers --methods cyclebnn bnn --seconds 60 --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    layers.set_defaults(run_bench=_bench_layers)
    layers.add_argument("--methods", nargs="+", metavar="METHOD", help="binarization methods (default: all)")
    layers.add_argument("--model", default="resnet18", help="timm model (default: resnet18)")
    layers.add_argument("--batch", type=int, default=16, help="images of a step (default: 16)")
    layers.add_argument(
        "--image-size", type=int, default=224, help="side of an image in pixels (default: 224)"
    )
    layers.add_argument(
        "--seconds", type=float, default=200.0, help="about how long to measure (default: 200)"
    )
    layers.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)"
    )
    layers.add_argument("--json", action="store_true", help="print one JSON object")

    data = commands.add_parser(
        "data",
        help="images a second of the data pipeline beside timm's loader, and how long training waits",
        description="Read the same JPEG files with this project's loader (DALI) and with timm's (Pillow in worker "
        "processes) by number of threads, decoding only, plain and with RandAugment, in turn: images a second, ratios "
        "with 95 % intervals, and the share of a training step that waits for data.",
        epilog="examples:\n  cyclebnn bench data\n  cyclebnn bench data --data /data/imagenet --threads 4 8 --json\n"
        "  cyclebnn bench data --seconds 60 --model none",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data.set_defaults(run_bench=_bench_data)
    data.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with train/<class>/* (default: generated photographs)",
    )
    data.add_argument(
        "--threads",
        type=int,
        nargs="+",
        metavar="N",
        help="decoding threads (default: 1, 2, 4 ... all cores)",
    )
    data.add_argument("--image-size", type=int, default=224, help="side of an image in pixels (default: 224)")
    data.add_argument("--batch", type=int, default=32, help="images of a batch (default: 32)")
    data.add_argument(
        "--model", default="resnet18", help="timm model to train, or none to leave it out (default: resnet18)"
    )
    data.add_argument("--seconds", type=float, default=300.0, help="about how long to measure (default: 300)")
    data.add_argument("--json", action="store_true", help="print one JSON object")

    comm = commands.add_parser(
        "comm",
        help="time, bytes and error of the gradient all-reduce at every width",
        description="Average the gradients of a ResNet-50 at 32, 16 and 8 to 1 bits, with plain codecs, with error "
        "feedback and with torch's own all-reduce, in turn: seconds, bytes sent, error, ratios with 95 % intervals, "
        "what the wire and the codec alone would take, and the widths that pay on this network. Under torchrun or srun "
        "it measures the network between their ranks.",
        epilog="examples:\n  sudo cyclebnn bench comm --ranks 4 --rate 1gbit --plot comm.png\n"
        "  cyclebnn bench comm --ranks 2 --unshaped --seconds 60 --json\n"
        "  cyclebnn bench comm --ranks 2 --unshaped --variants torch_fp32 q4 q2\n"
        "  srun --ntasks-per-node 1 cyclebnn bench comm\n"
        "  torchrun --nnodes 2 --nproc-per-node 1 ... -m cyclebnn_dist bench comm",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    comm.set_defaults(run_bench=_bench_comm)
    comm.add_argument("--ranks", type=int, help="processes to start on this machine (default: 4)")
    comm.add_argument(
        "--rate", help="give each a network whose link has this rate, e.g. 1gbit, 100mbit; needs root"
    )
    comm.add_argument("--unshaped", action="store_true", help="let them meet on this machine's loopback")
    comm.add_argument(
        "--variants", nargs="+", metavar="NAME", help="which ones (default: all); fp32 and bf16 always run"
    )
    comm.add_argument(
        "--numel", type=int, default=25_557_032, help="gradients (default: a ResNet-50's, 25557032)"
    )
    comm.add_argument(
        "--bucket-mb",
        type=float,
        default=25.0,
        help="size of a bucket in MiB, as engine.bucket_mb (default: 25)",
    )
    comm.add_argument("--launches", type=int, default=3, help="how often to start anew (default: 3)")
    comm.add_argument("--seconds", type=float, default=600.0, help="about how long to measure (default: 600)")
    comm.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it, too")
    comm.add_argument("--json", action="store_true", help="print one JSON object")

    convergence = commands.add_parser(
        "convergence",
        help="accuracy of a binary network trained with narrow gradients, paired by seed",
        description="Train a small binary network from many seeds on ranks of this machine, with the gradient all-reduce "
        "in fp32, bf16, constant 8, 4 and 2 bits and the 2-8 cycle, each of these with error feedback and without: "
        "accuracy, differences to fp32 with 95 % t intervals, bytes sent, and whether it is non-inferior.",
        epilog="examples:\n  cyclebnn bench convergence --out runs.jsonl --plot convergence.png\n"
        "  cyclebnn bench convergence --seeds 10 --variants q4 cycle --json\n"
        "  cyclebnn bench convergence --sets shapes digits --out runs.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convergence.set_defaults(run_bench=_bench_convergence)
    convergence.add_argument("--ranks", type=int, default=2, help="processes to start (default: 2)")
    convergence.add_argument("--seeds", type=int, default=20, help="how many, from 0 on (default: 20)")
    convergence.add_argument(
        "--sets",
        nargs="+",
        metavar="NAME",
        default=["shapes"],
        help="images: shapes, drawn here (default), digits, from scikit-learn, or both",
    )
    convergence.add_argument(
        "--variants", nargs="+", metavar="NAME", help="which ones (default: all); fp32 always runs"
    )
    convergence.add_argument("--steps", type=int, default=400, help="optimizer steps of a run (default: 400)")
    convergence.add_argument(
        "--seconds", type=float, default=3600.0, help="begin no run that would end later (default: 3600)"
    )
    convergence.add_argument(
        "--out",
        type=Path,
        metavar="FILE.jsonl",
        help="keep finished runs here; the same line then goes on from them",
    )
    convergence.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it, too")
    convergence.add_argument("--json", action="store_true", help="print one JSON object")


def _add_data_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sample = commands.add_parser(
        "sample",
        help="generate the sample data set",
        description="Generate a seeded set of JPEG files in the ImageNet folder layout: "
        "10 classes of textured shapes in clutter. A complete set is left as it is.",
        epilog="examples:\n  cyclebnn data sample sample_data\n  cyclebnn data sample /tmp/tiny --train 200 --val 50",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sample.set_defaults(run_data=_data_sample)
    sample.add_argument("path", type=Path, help="folder to make")
    sample.add_argument("--train", type=int, default=None, help="number of training images")
    sample.add_argument("--val", type=int, default=None, help="number of validation images")
    sample.add_argument("--size", type=int, default=None, help="side of an image in pixels")
    sample.add_argument("--seed", type=int, default=0, help="seed of the images")

    pack = commands.add_parser(
        "pack",
        help="turn class folders into WebDataset shards",
        description="Pack SRC/<split>/<class>/* into shuffled tar shards DST/<split>/*.tar, byte for byte, with an index "
        "beside each. Complete shards are left as they are; an interrupted packing leaves none and can be run again.",
        epilog="examples:\n  cyclebnn data pack /data/imagenet /data/imagenet_shards\n"
        "  cyclebnn data pack sample_data sample_shards --shard-size 500 --split train\n"
        "  cyclebnn data pack /data/imagenet /data/imagenet_shards --shard-size 256MB",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pack.set_defaults(run_data=_data_pack)
    pack.add_argument("source", metavar="SRC", type=Path, help="folder with class folders")
    pack.add_argument("target", metavar="DST", type=Path, help="folder to make")
    pack.add_argument(
        "--shard-size", default="1000", help="images of a shard, or bytes as 256MB (default: 1000 images)"
    )
    pack.add_argument(
        "--split", nargs="+", default=[], metavar="SPLIT", help="which ones (default: train and val)"
    )
    pack.add_argument("--seed", type=int, default=0, help="seed of the shuffle before packing (default: 0)")
    check = commands.add_parser(
        "check",
        help="find every file and folder that training would stumble over",
        description="Decode every image of train/ and val/ with DALI, as training will, and list files that cannot be "
        "read, empty classes, classes that train and val do not share, files and folders that are not read, and "
        "broken links. Exit status: 0 nothing found, 1 problems found, 2 refused.",
        epilog="examples:\n  cyclebnn data check /data/imagenet\n"
        "  cyclebnn data check /data/imagenet --threads 16 --out bad.txt\n"
        "  cyclebnn train recipes/imagenet_resnet18.yaml data.path=/data/imagenet data.skip_list=bad.txt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.set_defaults(run_data=_data_check)
    check.add_argument("path", type=Path, metavar="DIR", help="folder with train/<class>/* and val/<class>/*")
    check.add_argument(
        "--threads", type=int, default=0, help="images decoded at the same time (default: one per core)"
    )
    check.add_argument(
        "--out", type=Path, metavar="FILE", help="write the images that cannot be read as a data.skip_list"
    )
    check.add_argument("--json", action="store_true", help="print one JSON object")


def _train(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    from cyclebnn_dist import train

    return train.main(recipe)


def _evaluate(options: argparse.Namespace) -> int:
    from cyclebnn_dist import evaluate

    result = evaluate.main(options.checkpoint, overrides=options.overrides)
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


def _bench_layers(options: argparse.Namespace) -> int:
    from cyclebnn_dist.bench.layers import bench_layers, render

    result = bench_layers(
        methods=options.methods,
        model=options.model,
        batch=options.batch,
        image_size=options.image_size,
        seconds=options.seconds,
        device=options.device,
    )
    print(json.dumps(result) if options.json else render(result))
    return 0


def _bench_data(options: argparse.Namespace) -> int:
    from cyclebnn_dist.bench.data import bench_data
    from cyclebnn_dist.bench.data_text import render_data

    try:
        result = bench_data(
            path=options.data,
            threads=options.threads,
            image_size=options.image_size,
            batch=options.batch,
            model=options.model,
            seconds=options.seconds,
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    print(json.dumps(result) if options.json else render_data(result))
    return 0


def _bench_comm(options: argparse.Namespace) -> int:
    from cyclebnn_dist.bench.comm import bench_comm
    from cyclebnn_dist.bench.comm_plot import check_plot, plot_comm
    from cyclebnn_dist.bench.comm_text import render_comm

    if options.plot:
        check_plot(options.plot)
    try:
        result = bench_comm(
            ranks=options.ranks,
            rate=options.rate,
            unshaped=options.unshaped,
            variants=options.variants,
            numel=options.numel,
            bucket_mb=options.bucket_mb,
            launches=options.launches,
            seconds=options.seconds,
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    if result is not None:
        print(json.dumps(result) if options.json else render_comm(result))
        if options.plot:
            plot_comm(result, options.plot)
    return 0


def _bench_convergence(options: argparse.Namespace) -> int:
    from cyclebnn_dist.bench.comm_plot import check_plot
    from cyclebnn_dist.bench.convergence import bench_convergence
    from cyclebnn_dist.bench.convergence_plot import plot_convergence
    from cyclebnn_dist.bench.convergence_text import render_convergence

    if options.plot:
        check_plot(options.plot)
    try:
        result = bench_convergence(
            ranks=options.ranks,
            seeds=options.seeds,
            sets=options.sets,
            variants=options.variants,
            steps=options.steps,
            seconds=options.seconds,
            out=options.out,
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    print(json.dumps(result) if options.json else render_convergence(result))
    if options.plot:
        plot_convergence(result, options.plot)
    return 128 + signal.SIGINT if result["stopped"] == "interrupt" else 0


def _config(options: argparse.Namespace) -> int:
    from cyclebnn_dist.config.reference import render_reference

    print(render_reference("markdown" if options.markdown else "text"), end="")
    return 0


def _data_sample(options: argparse.Namespace) -> int:
    from cyclebnn_dist.data.sample import generate_sample

    given = {"num_train": options.train, "num_val": options.val, "image_size": options.size}
    generate_sample(
        options.path, seed=options.seed, **{name: value for name, value in given.items() if value is not None}
    )
    return 0


def _data_pack(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from cyclebnn_dist.data.pack import pack_folder, parse_shard_size

    size = parse_shard_size(options.shard_size)
    with Progress(
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task("images", total=None)
        written = pack_folder(
            options.source,
            options.target,
            shard_size=size,
            splits=options.split,
            seed=options.seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{'wrote' if written else 'complete already:'} {options.target}")
    return 0


def _data_check(options: argparse.Namespace) -> int:
    if options.threads < 0:
        raise RecipeError("--threads", f"{options.threads} is out of range", "it must be 0 or more")
    if options.out and not options.out.absolute().parent.is_dir():
        raise RecipeError("--out", f"folder {options.out.absolute().parent} does not exist")
    from cyclebnn_dist.data.check import check_folder, render
    from cyclebnn_dist.data.check_progress import check_progress
    from cyclebnn_dist.data.skip import write_skip_list

    try:
        with check_progress() as progress:
            report = check_folder(options.path, threads=options.threads, progress=progress)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    print(json.dumps(report.to_dict()) if options.json else render(report))
    if options.out:
        bad = report.skippable()
        write_skip_list(
            options.out, bad, heading=[f"{len(bad)} images of {options.path} that cannot be read"]
        )
        if bad and not options.json:
            print(f"\nto train without these images: data.skip_list={options.out}")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
