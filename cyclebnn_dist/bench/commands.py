"""The commands ``cyclebnn bench ...``: their arguments, and what runs them. Modules that do the work are imported when one is run."""

from __future__ import annotations

import argparse
import json
import signal
from pathlib import Path


def add_bench_commands(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` a subcommand a benchmark; ``run_bench`` of the options runs it and returns its exit status."""
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
    data.add_argument("--batch", type=int, default=64, help="images of a batch (default: 64)")
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

    mixbin = commands.add_parser(
        "mixbin",
        help="accuracy within one budget of the layers that the search chooses, and of other choices, paired by seed",
        description="Search the layers of a small network that stay real within a budget, from many seeds, by the search and "
        "by its baselines (random layers, the first, the last, one round of scores, plain loss); train each network "
        "from the start in the same way, on generated images: accuracy on images that no search has seen, differences to "
        "the search with 95 % t intervals, and whether it beats random layers.",
        epilog="examples:\n  cyclebnn bench mixbin --out mixbin_bench\n"
        "  cyclebnn bench mixbin --seeds 10 --budget 0.5 --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mixbin.set_defaults(run_bench=_bench_mixbin)
    mixbin.add_argument("--workers", type=int, default=2, help="processes to share the work (default: 2)")
    mixbin.add_argument("--seeds", type=int, default=5, help="how many (default: 5)")
    mixbin.add_argument(
        "--budget", type=float, default=0.4, help="of the real network's operations (default: 0.4)"
    )
    mixbin.add_argument(
        "--steps", type=int, default=400, help="steps that train a chosen network (default: 400)"
    )
    mixbin.add_argument(
        "--candidate-steps", type=int, default=40, help="steps that train a candidate (default: 40)"
    )
    mixbin.add_argument(
        "--choices",
        nargs="+",
        metavar="NAME",
        help="strategies to compare with (default: all); shrink and random always run",
    )
    mixbin.add_argument("--random", type=int, default=3, help="random choices of a seed (default: 3)")
    mixbin.add_argument(
        "--seconds", type=float, default=3600.0, help="begin no seed after so long (default: 3600)"
    )
    mixbin.add_argument(
        "--out", type=Path, metavar="DIR", help="keep all that is finished here; the same line then goes on"
    )
    mixbin.add_argument("--json", action="store_true", help="print one JSON object")
    engines = commands.add_parser(
        "engines",
        help="time, bytes and memory of a step under DDP and under DeepSpeed's ZeRO 0 to 2",
        description="Train the same binary network under DDP and under DeepSpeed at ZeRO 0, 1 and 2, with gradients in fp32 "
        "and at cycling widths, in turn in the same processes: seconds a step with ratios to DDP and their 95 % intervals, "
        "bytes sent, and bytes that a rank keeps of weights, gradients and the optimizer. Under torchrun or srun it "
        "measures between their ranks; on GPUs it also tells the peak of allocated memory.",
        epilog="examples:\n  cyclebnn bench engines --seconds 60\n"
        "  sudo cyclebnn bench engines --ranks 4 --rate 1gbit --json\n"
        "  cyclebnn bench engines --variants zero2_cyclic --model resnet50\n"
        "  srun --ntasks-per-node 8 cyclebnn bench engines --batch 64 --image-size 224",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    engines.set_defaults(run_bench=_bench_engines)
    engines.add_argument("--ranks", type=int, help="processes to start on this machine (default: 2)")
    engines.add_argument(
        "--rate",
        help="give each a network whose link has this rate, e.g. 1gbit; needs root (default: the loopback)",
    )
    engines.add_argument(
        "--variants", nargs="+", metavar="NAME", help="which ones (default: all); DDP's always run"
    )
    engines.add_argument("--model", default="resnet18", help="timm model (default: resnet18)")
    engines.add_argument("--batch", type=int, default=4, help="images of a rank and step (default: 4)")
    engines.add_argument(
        "--image-size", type=int, default=64, help="side of an image in pixels (default: 64)"
    )
    engines.add_argument(
        "--bucket-mb",
        type=float,
        default=25.0,
        help="size of a bucket in MiB, as engine.bucket_mb (default: 25)",
    )
    engines.add_argument(
        "--seconds", type=float, default=120.0, help="about how long to measure (default: 120)"
    )
    engines.add_argument("--json", action="store_true", help="print one JSON object")


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

    result = bench_data(
        path=options.data,
        threads=options.threads,
        image_size=options.image_size,
        batch=options.batch,
        model=options.model,
        seconds=options.seconds,
    )
    print(json.dumps(result) if options.json else render_data(result))
    return 0


def _bench_comm(options: argparse.Namespace) -> int:
    from cyclebnn_dist.bench.comm import bench_comm
    from cyclebnn_dist.bench.comm_plot import check_plot, plot_comm
    from cyclebnn_dist.bench.comm_text import render_comm

    if options.plot:
        check_plot(options.plot)
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
    if result is not None:
        print(json.dumps(result) if options.json else render_comm(result))
        if options.plot:
            plot_comm(result, options.plot)
    return 0


def _bench_engines(options: argparse.Namespace) -> int:
    from cyclebnn_dist.bench.engines import bench_engines, render_engines

    result = bench_engines(
        ranks=options.ranks,
        rate=options.rate,
        variants=options.variants,
        model=options.model,
        batch=options.batch,
        image_size=options.image_size,
        bucket_mb=options.bucket_mb,
        seconds=options.seconds,
    )
    if result is not None:
        print(json.dumps(result) if options.json else render_engines(result))
    return 0


def _bench_convergence(options: argparse.Namespace) -> int:
    from cyclebnn_dist.bench.comm_plot import check_plot
    from cyclebnn_dist.bench.convergence import bench_convergence
    from cyclebnn_dist.bench.convergence_plot import plot_convergence
    from cyclebnn_dist.bench.convergence_text import render_convergence

    if options.plot:
        check_plot(options.plot)
    result = bench_convergence(
        ranks=options.ranks,
        seeds=options.seeds,
        sets=options.sets,
        variants=options.variants,
        steps=options.steps,
        seconds=options.seconds,
        out=options.out,
    )
    print(json.dumps(result) if options.json else render_convergence(result))
    if options.plot:
        plot_convergence(result, options.plot)
    return 128 + signal.SIGINT if result["stopped"] == "interrupt" else 0


def _bench_mixbin(options: argparse.Namespace) -> int:
    from cyclebnn_dist.bench.mixbin import bench_mixbin
    from cyclebnn_dist.bench.mixbin_text import render_mixbin

    result = bench_mixbin(
        workers=options.workers,
        seeds=options.seeds,
        budget=options.budget,
        steps=options.steps,
        candidate_steps=options.candidate_steps,
        random_choices=options.random,
        choices=options.choices,
        seconds=options.seconds,
        out=options.out,
    )
    print(json.dumps(result) if options.json else render_mixbin(result))
    return 0
