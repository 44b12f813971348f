"""The index of a tar shard: where each sample's image and class lie in it, from its ``.idx`` file or from the tar.

The file is the one that DALI's ``wds2idx`` writes (v1.2): a line ``v1.2 <samples>``, then one line a sample, of
``<extension> <offset> <size> <member>`` for each of its members; offsets are those of a member's data. A sample is a
run of members whose names are equal up to the first dot behind the last slash, which is its key.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

from cyclebnn_dist.config import RecipeError

BLOCK = 512
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
CLASS_EXTENSION = "cls"
_VERSION = "v1.2"
_MOST_DIGITS = 9


@dataclass(frozen=True)
class Member:
    """A file in a shard: ``size`` bytes at ``offset``."""

    extension: str
    offset: int
    size: int
    name: str


@dataclass(frozen=True)
class Sample:
    """An image and its class in a shard."""

    key: str
    image: Member
    label: int


def index_path(shard: Path) -> Path:
    """Where the index of ``shard`` is, if it has one."""
    return shard.with_suffix(".idx")


def read_shard(shard: Path) -> list[Sample]:
    """The samples of a shard in the order in which they lie there.

    Raises:
        RecipeError: the shard is cut short, its index does not fit it, or a sample has no image or no class, two of
            one, or the key of another; the message names shard and key.
    """
    indexed = os.path.exists(index_path(shard))
    groups = read_index(shard) if indexed else list_members(shard)
    samples, keys = [], set()
    try:
        with open(shard, "rb", buffering=0) as file:
            _check_end(shard, file.fileno(), groups, indexed=indexed)
            for members in groups:
                key = split_member(members[0].name)[0]
                if key in keys:
                    raise RecipeError("data.path", f"{shard} holds two samples {key}", "make it again")
                keys.add(key)
                image = _only(shard, key, members, IMAGE_EXTENSIONS, "image")
                number = _only(shard, key, members, (CLASS_EXTENSION,), "class")
                label = _read_label(shard, key, file.fileno(), number, indexed=indexed)
                samples.append(Sample(key, image, label))
    except OSError as error:
        raise RecipeError("data.path", f"cannot read {shard}: {error.strerror}") from None
    return samples


def list_members(shard: Path) -> list[list[Member]]:
    """Members of each sample, from the headers in the tar file itself; folders and hidden files aside.

    Raises:
        RecipeError: it is no tar file, or cut short.
    """
    groups: list[list[Member]] = []
    last = None
    try:
        with tarfile.open(shard, "r:") as archive:
            end = 0
            for entry in archive:
                end = entry.offset_data + _padded(entry.size)
                key, extension = split_member(entry.name)
                if not entry.isreg() or not extension or key.rpartition("/")[2] == "":
                    continue
                member = Member(extension.lower(), entry.offset_data, entry.size, entry.name)
                if key == last:
                    groups[-1].append(member)
                else:
                    groups.append([member])
                last = key
    except (tarfile.TarError, EOFError) as error:
        raise _truncated(shard, str(error)) from None
    except OSError as error:
        raise RecipeError("data.path", f"cannot read {shard}: {error.strerror}") from None
    if shard.stat().st_size < end + BLOCK:
        raise _truncated(shard, "it does not end as a tar file does")
    return groups


def read_index(shard: Path) -> list[list[Member]]:
    """Members of each sample, from the ``.idx`` file beside ``shard``.

    Raises:
        RecipeError: it is not of the known form.
    """
    path = index_path(shard)
    try:
        header, *lines = path.read_text().removesuffix("\n").split("\n")
        version, count = header.split()
        if version != _VERSION or int(count) != len(lines):
            raise ValueError(f"{header} over {len(lines)} lines")
        return [_parse_line(line) for line in lines]
    except (ValueError, IndexError) as error:
        raise RecipeError(
            "data.path",
            f"index {path} cannot be read: {error}",
            f"delete it, or make it again: wds2idx {shard}",
        ) from None
    except OSError as error:
        raise RecipeError("data.path", f"cannot read {path}: {error.strerror}") from None


def write_index(shard: Path, groups: list[list[Member]]) -> None:
    """Write the ``.idx`` file of ``shard``."""
    lines = [f"{_VERSION} {len(groups)}"]
    lines += [
        " ".join(f"{member.extension} {member.offset} {member.size} {member.name}" for member in members)
        for members in groups
    ]
    index_path(shard).write_text("\n".join(lines) + "\n")


def split_member(name: str) -> tuple[str, str]:
    """Key and extension of a member: what is before and behind the first dot of its base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def _parse_line(line: str) -> list[Member]:
    words = line.split(" ")
    if not words or len(words) % 4:
        raise ValueError(f"line {line!r}")
    fields = zip(*[iter(words)] * 4, strict=True)
    return [
        Member(extension.lower(), int(offset), int(size), name) for extension, offset, size, name in fields
    ]


def _only(shard: Path, key: str, members: list[Member], extensions: tuple[str, ...], what: str) -> Member:
    found = [member for member in members if member.extension in extensions]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f".{extension}" for extension in extensions)
    raise RecipeError(
        "data.path",
        f"sample {key} of {shard} has {'no' if not found else len(found)} {what} ({listed})",
        f"every sample needs one {what}",
    )


def _read_label(shard: Path, key: str, descriptor: int, member: Member, *, indexed: bool) -> int:
    """The number in a class member, behind its header, which tells whether the index fits the shard."""
    block = os.pread(descriptor, BLOCK + min(member.size, BLOCK), member.offset - BLOCK)
    if indexed and not _is_header_of(block[:BLOCK], member):
        raise _stale(shard, f"there is no {member.name} at {member.offset}")
    text = block[BLOCK:].decode(errors="replace").strip()
    if len(block) < BLOCK + member.size or not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise RecipeError(
            "data.path",
            f"the class of sample {key} of {shard} is {text[:40]!r}",
            "a .cls member holds the class's number, from 0",
        )
    return int(text)


def _is_header_of(block: bytes, member: Member) -> bool:
    """Whether a tar header is that of ``member``; long names are cut there, letters beyond ASCII may be replaced."""
    try:
        size = int(block[124:136].split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return False
    recorded = block[:100].rstrip(b"\0")
    if size != member.size or not recorded:
        return False
    plain = member.name.encode("ascii", "replace")
    return recorded in member.name.encode(errors="surrogateescape") or recorded in plain


def _check_end(shard: Path, descriptor: int, groups: list[list[Member]], *, indexed: bool) -> None:
    """The last member must be followed by the empty block that ends a tar file, and by nothing else."""
    if not groups:
        raise RecipeError("data.path", f"{shard} holds no samples", "remove it")
    if not indexed:
        return
    if any(member.offset < BLOCK or member.size < 0 for members in groups for member in members):
        raise _stale(shard, "a member lies before its beginning")
    end = max(member.offset + _padded(member.size) for members in groups for member in members)
    size = os.fstat(descriptor).st_size
    if size < end + BLOCK:
        raise _stale(shard, f"which has {size} bytes; the index needs more than {end}")
    if any(os.pread(descriptor, BLOCK, end)):
        raise _stale(shard, f"which goes on at {end}, where the index ends")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _stale(shard: Path, reason: str) -> RecipeError:
    return RecipeError(
        "data.path",
        f"index {index_path(shard)} does not fit {shard.name}: {reason}",
        f"copy the shard again if it is cut short; else delete the index, or make it again: wds2idx {shard}",
    )


def _truncated(shard: Path, reason: str) -> RecipeError:
    return RecipeError("data.path", f"{shard} is cut short or no tar file: {reason}", "copy or make it again")
