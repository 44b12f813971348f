"""The hierarchical all-reduce: 16 bits between the ranks of a node, the width of the step between nodes.

With G ranks on each of M nodes, a gradient is first averaged within its node: rank g of a node collects, at 16 bits, what
ranks g of all nodes own between them. These M ranks then do the two-phase exchange of ``reducer`` with their nodes'
means, and what they have decided is passed on within each node as the bytes it came in. So a rank sends 1/G of the
gradient to other nodes, in narrow codes, and all ranks of all nodes decode the same bytes. Sums run over the ranks of a
node in order, then over nodes in order: the result depends on G, as it does on the number of ranks, but on no bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from cyclebnn_dist.comm.header import HEADER_BYTES
from cyclebnn_dist.comm.layout import Layout
from cyclebnn_dist.comm.levels import MAX_CODE_BITS
from cyclebnn_dist.comm.plan import concatenate_shares, parameter_starts, share_of_owner
from cyclebnn_dist.comm.randomness import step_words
from cyclebnn_dist.comm.reducer import Chunk, Reducer, as_tensor
from cyclebnn_dist.comm.scratch import Scratch
from cyclebnn_dist.comm.shares import Share, decode_share, encode_share, mean_of_shares
from cyclebnn_dist.comm.transport import Transfer


@dataclass(frozen=True)
class Nodes:
    """Where a rank stands: rank ``place`` of node ``index``; node n holds ranks n * G to n * G + G - 1.

    ``near`` is the group of the ranks of its node, ``far`` that of the ranks in its place on all nodes.
    """

    index: int
    place: int
    near: dist.ProcessGroup
    far: dist.ProcessGroup


@dataclass(frozen=True)
class HierarchicalPlan:
    """How one bucket travels at one width; shares as in ``plan``.

    Attributes:
        near_out, near_starts: pieces of the messages for all owners, one after the other, owners in the order of
            their places and then of their nodes; where each message begins.
        near_sizes: bytes for each place of the node.
        near_own: pieces of what this rank gets from each rank of its node: a message for its place on every node.
        far_out, far_starts, far_sizes: the same pieces, from rows that hold the node's mean, to each node.
        far_own, answer: pieces of this rank's own share, as received and, from rows, as answered with.
        gathered: pieces of all answers, ``padded_size`` apart, in the order of near_out.
        owners: ranks in the order of near_out.
    """

    numel: int
    bits: int
    near_bits: int
    mean_bits: int
    small_bits: int
    digest: int
    near_out: Share
    near_starts: tuple[int, ...]
    near_sizes: tuple[int, ...]
    near_own: Share
    far_out: Share
    far_starts: tuple[int, ...]
    far_sizes: tuple[int, ...]
    far_own: Share
    answer: Share
    gathered: Share
    padded_size: int
    owners: tuple[int, ...]


def near_width(bits: int) -> int:
    """Width within a node in a step of ``bits``."""
    return max(16, bits)


def build_nodes(layout: Layout, *, rank: int, backend: str, timeout: timedelta | None) -> Nodes:
    """Collective: every rank calls this. The groups of this rank; every rank takes part in making all of them."""
    size, world_size = layout.ranks_per_node, layout.world_size
    index, place = divmod(rank, size)
    near = [
        dist.new_group(list(range(first, first + size)), backend=backend, timeout=timeout)
        for first in range(0, world_size, size)
    ]
    far = [
        dist.new_group(list(range(first, world_size, size)), backend=backend, timeout=timeout)
        for first in range(size)
    ]
    return Nodes(index=index, place=place, near=near[index], far=far[place])


def build_hierarchical_plan(
    layout: Layout,
    indices: Sequence[int],
    *,
    bits: int,
    scale_bytes: dict[int, int],
    rank: int,
    rotated: bool,
    device: torch.device,
) -> HierarchicalPlan:
    """The plan of the parameters with these indices, concatenated in this order, on ``device``.

    Args:
        scale_bytes: of each wide block beside its codes, by width.
        rotated: whether sums of what nodes send are in the domain of a rotation.
    """
    size, num_nodes = layout.ranks_per_node, layout.world_size // layout.ranks_per_node
    place = rank % size
    near_bits, mean_bits = near_width(bits), layout.mean_width(bits)
    parameters = [layout.parameters[index] for index in indices]
    starts = parameter_starts(parameters)
    owners = [node * size + place for place in range(size) for node in range(num_nodes)]
    mine = owners[place * num_nodes : (place + 1) * num_nodes]

    def shares(width: int, of: Sequence[int]) -> tuple[list[Share], list[int]]:
        built = [
            share_of_owner(parameters, starts, owner, layout, bits=width, scale_bytes=scale_bytes[width])
            for owner in of
        ]
        return [share for share, _ in built], [nbytes for _, nbytes in built]

    near, near_bytes = shares(near_bits, owners)
    near_mine, near_mine_bytes = shares(near_bits, mine)
    far, far_bytes = shares(bits, mine)
    answers, answer_bytes = shares(mean_bits, owners)
    padded = max(answer_bytes)
    near_starts, far_starts = (tuple(accumulate(n, initial=0))[:-1] for n in (near_bytes, far_bytes))
    near_mine_starts = tuple(accumulate(near_mine_bytes, initial=0))[:-1]
    own = rank // size
    block = layout.block_size
    return HierarchicalPlan(
        numel=starts[-1],
        bits=bits,
        near_bits=near_bits,
        mean_bits=mean_bits,
        small_bits=layout.small_width(bits),
        digest=layout.bucket_digest(indices),
        near_out=concatenate_shares(near, near_starts).to(device),
        near_starts=near_starts,
        near_sizes=tuple(sum(near_bytes[p * num_nodes : (p + 1) * num_nodes]) for p in range(size)),
        near_own=concatenate_shares(near_mine, near_mine_starts).to(device),
        far_out=concatenate_shares(far, far_starts).as_rows(block, rotated=False).to(device),
        far_starts=far_starts,
        far_sizes=tuple(far_bytes),
        far_own=far[own].to(device),
        answer=answers[owners.index(rank)].as_rows(block, rotated=rotated).to(device),
        gathered=concatenate_shares(answers, [n * padded for n in range(len(owners))]).to(device),
        padded_size=padded,
        owners=tuple(owners),
    )


class HierarchicalReducer(Reducer):
    """A ``Reducer`` whose exchange goes within nodes first. It keeps no residuals."""

    def __init__(self, layout: Layout, *args: Any, nodes: Nodes, **kwargs: Any) -> None:
        super().__init__(layout, *args, **kwargs)
        self._nodes = nodes
        self._hierarchical_plans: dict[tuple[tuple[int, ...], int], HierarchicalPlan] = {}

    def _exchange(self, chunk: Chunk, scratch: Scratch) -> None:
        """Collective: every rank calls this. All phases, for one chunk."""
        flat, bits = chunk.flat, chunk.bits
        plan, nodes, layout = self._hierarchical_plan(chunk.parameters, bits), self._nodes, self.layout
        size, num_nodes = layout.ranks_per_node, layout.world_size // layout.ranks_per_node
        words, timing, codec = step_words(self._seed, chunk.step), self.counters.timing, self.codec
        headers = [
            self._header(bits=bits, bucket=plan.digest, step=chunk.step, phase=phase) for phase in range(3)
        ]
        near, far, mean = ((plan.small_bits, wide) for wide in (plan.near_bits, bits, plan.mean_bits))

        near_size, far_size = plan.near_sizes[nodes.place], plan.far_sizes[nodes.index]
        with timing("wire"):
            near_incoming = scratch.get("incoming", size * near_size, torch.uint8)
            far_incoming = scratch.get("far incoming", num_nodes * far_size, torch.uint8)
            from_nodes = scratch.get("from nodes", num_nodes * plan.padded_size, torch.uint8)
            gathered = scratch.get("gathered", size * len(from_nodes), torch.uint8)
            within = Transfer(near_incoming, rank=nodes.place, group=nodes.near, tag=chunk.tag)
            between = Transfer(far_incoming, rank=nodes.index, group=nodes.far, tag=chunk.tag)
            means = Transfer(from_nodes, rank=nodes.index, group=nodes.far, tag=chunk.tag + 1)
            passed_on = Transfer(gathered, rank=nodes.place, group=nodes.near, tag=chunk.tag + 1)
        with timing("encode"):
            gradient = flat
            if flat.dtype != torch.float32:
                gradient = scratch.get("gradient", plan.numel, torch.float32).copy_(flat)
            outgoing = scratch.get("outgoing", sum(plan.near_sizes), torch.uint8)
            encode_share(
                codec, (gradient, gradient), plan.near_out, outgoing, widths=near, words=words, phase=1
            )
            for start in plan.near_starts:
                outgoing[start : start + HEADER_BYTES] = as_tensor(headers[0], flat.device)
        with timing("wire"):
            within.send_each(outgoing, plan.near_sizes)
        with self._waiting():
            within.wait()
        messages = near_incoming.view(size, near_size)
        first = plan.near_starts[nodes.place * num_nodes]
        near_ranks = range(nodes.index * size, (nodes.index + 1) * size)
        for start in plan.near_starts[nodes.place * num_nodes : (nodes.place + 1) * num_nodes]:
            self._receive(headers[0], messages[:, start - first :], ranks=near_ranks)
        with timing("decode"):
            small, wide = mean_of_shares(
                codec, messages, plan.near_own, widths=near, scratch=scratch, name="near "
            )

        with timing("encode"):
            far_outgoing = scratch.get("far outgoing", sum(plan.far_sizes), torch.uint8)
            encode_share(codec, (small, wide), plan.far_out, far_outgoing, widths=far, words=words, phase=1)
            for start in plan.far_starts:
                far_outgoing[start : start + HEADER_BYTES] = as_tensor(headers[1], flat.device)
        with timing("wire"):
            between.send_each(far_outgoing, plan.far_sizes)
        with self._waiting():
            between.wait()
        messages = far_incoming.view(num_nodes, far_size)
        self._receive(headers[1], messages, ranks=range(nodes.place, layout.world_size, size))
        with timing("decode"):
            small, wide = mean_of_shares(codec, messages, plan.far_own, widths=far, scratch=scratch)

        with timing("encode"):
            answer = scratch.get("answer", plan.padded_size, torch.uint8)
            encode_share(
                codec,
                (small, wide),
                plan.answer,
                answer,
                widths=mean,
                words=words,
                phase=2,
                rotated=True,
            )
            answer[:HEADER_BYTES] = as_tensor(headers[2], flat.device)
        with timing("wire"):
            means.send_all(answer)
        with self._waiting():
            means.wait()
        with timing("wire"):
            passed_on.send_all(from_nodes)
        with self._waiting():
            passed_on.wait()
        self._receive(headers[2], gathered.view(-1, plan.padded_size), ranks=plan.owners)
        with timing("decode"):
            decode_share(codec, gathered, plan.gathered, gradient, widths=mean, words=words)
            if gradient is not flat:
                flat.copy_(gradient)
        transfers = (within, between, means, passed_on)
        with self._waiting():
            for transfer in transfers:
                transfer.finish()
        self.counters.add_exchange(
            sent_bytes=sum(transfer.sent_bytes for transfer in transfers),
            far_bytes=between.sent_bytes + means.sent_bytes,
            numel=plan.numel,
            world_size=layout.world_size,
        )

    def _hierarchical_plan(self, indices: tuple[int, ...], bits: int) -> HierarchicalPlan:
        if (indices, bits) not in self._hierarchical_plans:
            widths = {bits, near_width(bits), self.layout.mean_width(bits)}
            self._hierarchical_plans[indices, bits] = build_hierarchical_plan(
                self.layout,
                indices,
                bits=bits,
                scale_bytes={width: self.codec.scale_bytes(width) for width in widths},
                rank=self._rank,
                rotated=self.codec.name == "hadamard" and bits <= MAX_CODE_BITS,
                device=self._device,
            )
        return self._hierarchical_plans[indices, bits]
