"""The commands ``cyclebnn data ...``: their arguments, and what runs them. Modules that do the work are imported when one is run."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from cyclebnn_dist.config import RecipeError


def add_data_commands(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` its subcommands; ``run_data`` of the options runs one and returns its exit status."""
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
        description="Decode every image of train/ and val/, in class folders or tar shards, with DALI, as training will, "
        "and list images that cannot be read, damaged shards, empty classes, classes that train and val do not share, "
        "files and folders that are not read, and broken links; of CIFAR's files, sizes and classes. Exit status: 0 nothing found, 1 problems found, 2 refused.",
        epilog="examples:\n  cyclebnn data check /data/imagenet\n"
        "  cyclebnn data check /data/imagenet --threads 16 --out bad.txt\n"
        "  cyclebnn train recipes/imagenet_resnet18.yaml data.path=/data/imagenet data.skip_list=bad.txt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.set_defaults(run_data=_data_check)
    check.add_argument("path", type=Path, metavar="DIR", help="what would be data.path")
    check.add_argument(
        "--threads", type=int, default=0, help="images decoded at the same time (default: one per core)"
    )
    check.add_argument(
        "--out", type=Path, metavar="FILE", help="write the images that cannot be read as a data.skip_list"
    )
    check.add_argument("--json", action="store_true", help="print one JSON object")


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
    if options.out and not os.access(
        options.out if options.out.exists() else options.out.absolute().parent, os.W_OK
    ):
        raise RecipeError("--out", f"may not write {options.out}")
    if options.out and options.out.is_dir():
        raise RecipeError("--out", f"{options.out} is a folder", "name a file")
    from cyclebnn_dist.data.check import render
    from cyclebnn_dist.data.check_packed import check_data
    from cyclebnn_dist.data.check_progress import check_progress
    from cyclebnn_dist.data.skip import write_skip_list

    with check_progress() as progress:
        report = check_data(options.path, threads=options.threads, progress=progress)
    print(json.dumps(report.to_dict()) if options.json else render(report))
    if options.out:
        bad = report.skippable()
        write_skip_list(
            options.out, bad, heading=[f"{len(bad)} images of {options.path} that cannot be read"]
        )
        if bad and not options.json:
            print(f"\nto train without these images: data.skip_list={options.out}")
    return 1 if report.problems else 0
