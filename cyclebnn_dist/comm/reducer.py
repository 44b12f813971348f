"""The reducer: the one all-reduce of gradients, at any width of 1 to 8, 16 or 32 bits.

Every parameter is cut into shares, one an owner. In the first phase each rank encodes all its shares and sends each to
its owner, which adds them up in rank order in fp32 and divides by the number of ranks. In the second phase the owner
encodes the mean once more and sends it to everyone. All ranks, the owner too, decode the same bytes, so the result is
the same everywhere to the last bit. All widths take this path: the value of an element depends on the seed, the step,
its parameter, its block and what the ranks held, never on the bucket it travelled in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from cyclebnn_dist.comm.codec import FORMAT_VERSION, WIDTHS, Codec, gpu_backend
from cyclebnn_dist.comm.counters import Counters
from cyclebnn_dist.comm.executor import build_executor
from cyclebnn_dist.comm.header import HEADER_BYTES, MAGIC, Header, MismatchError, describe_difference
from cyclebnn_dist.comm.layout import Layout
from cyclebnn_dist.comm.levels import MAX_CODE_BITS
from cyclebnn_dist.comm.plan import CHUNK_NUMEL, Plan, build_plan, cut_in_chunks
from cyclebnn_dist.comm.randomness import step_words
from cyclebnn_dist.comm.reshard import ReadResiduals
from cyclebnn_dist.comm.residuals import ErrorFeedback, Feedback, NoFeedback
from cyclebnn_dist.comm.scratch import Scratch
from cyclebnn_dist.comm.shares import decode_share, encode_share, mean_of_shares
from cyclebnn_dist.comm.transport import Transfer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """Gradients that travel together.

    Attributes:
        flat: gradients of ``parameters`` (indices in model order), one after the other.
        step, bits, loss_scale: as they were when the gradients were handed over.
        tag: this number and the next one are of this chunk's exchange alone.
    """

    flat: torch.Tensor
    parameters: tuple[int, ...]
    step: int
    bits: int
    loss_scale: float
    tag: int


class Reducer:
    """Averages gradients over the ranks of ``group``.

    Args:
        layout: how each parameter travels.
        codec: of all parameters that are not small.
        group: a process group that nothing else uses; None in a world of one.
        rank: of this process in ``group``.
        seed: of the codec's randomness; the same on all ranks.
        device: of the gradients.
        error_feedback: add what quantization lost to the gradient of the next step.
    """

    def __init__(
        self,
        layout: Layout,
        codec: Codec,
        *,
        group: dist.ProcessGroup | None,
        rank: int,
        seed: int,
        device: torch.device,
        error_feedback: bool = False,
    ) -> None:
        self.layout = layout
        self.codec = codec
        self.counters = Counters()
        self._group = group
        self._rank = rank
        self._seed = seed
        self._device = device
        self._executor = build_executor(device, world_size=layout.world_size)
        self._feedback: Feedback = NoFeedback()
        if error_feedback and layout.world_size > 1:
            self._feedback = ErrorFeedback(codec, layout, rank=rank, device=device)
        self._index = {parameter.name: parameter.index for parameter in layout.parameters}
        self._plans: dict[tuple[tuple[int, ...], int], Plan] = {}
        self._idle_scratch: list[Scratch] = []
        self._num_chunks = 0
        self._unverified: list[tuple[Header, torch.Tensor, Sequence[int]]] = []
        self._step, self._bits, self._loss_scale = -1, 32, 1.0
        self._last_submit = 0.0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group gradients travel in; None in a world of one."""
        return self._group

    @property
    def layout_digest(self) -> int:
        """63-bit number for the agreement check: parameters, shares, ranks."""
        return self.layout.digest

    @property
    def codec_digest(self) -> int:
        """63-bit number for the agreement check: codec, block size, format version."""
        return self.codec.digest

    @property
    def backend(self) -> str:
        """Text for the agreement check: what encodes, and what carries."""
        if self._group is None:
            return "none"
        encoder = self.codec.backend
        if encoder == "auto":
            encoder = "numba" if self._device.type == "cpu" else gpu_backend()
        return f"{encoder} over {dist.get_backend(self._group)}"

    def begin_step(self, step: int, bits: int, *, loss_scale: float = 1.0) -> None:
        """Say at which global step and width the gradients that follow are reduced, once those before them are.

        Args:
            bits: 1 to 8, 16 (bf16) or 32 (fp32).
            loss_scale: factor the gradients carry, which residuals do not.

        Raises:
            ValueError: for a width that does not exist.
            RuntimeError: what the previous step's exchange failed with.
        """
        if bits not in WIDTHS:
            raise ValueError(f"a gradient all-reduce of {bits} bits does not exist; widths are {WIDTHS}")
        self._executor.drain()
        self.check()
        self.finish_step()
        self._step, self._bits, self._loss_scale = step, bits, loss_scale

    def finish_step(self, *, applied: bool = True) -> None:
        """Say whether the step was applied: residuals stay as they were before one that was not.

        ``begin_step`` does it where nobody has, by whether what was reduced is finite.
        """
        self._executor.drain()
        self._feedback.finish_step(applied=applied)

    def reduce(
        self, tensors: Mapping[str, torch.Tensor], *, step: int, bits: int
    ) -> torch.futures.Future[Mapping[str, torch.Tensor]]:
        """Collective: every rank calls this, with the same names in the same order. Average tensors in place.

        Args:
            tensors: gradients (fp32, bf16 or fp16) by parameter name.

        Returns:
            a future of ``tensors``.
        """
        if (step, bits) != (self._step, self._bits):
            self.begin_step(step, bits)
        indices = tuple(self._index[name] for name in tensors)
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()])

        def write_back(future: torch.futures.Future[torch.Tensor]) -> Mapping[str, torch.Tensor]:
            parts = future.value().split([tensor.numel() for tensor in tensors.values()])
            for tensor, part in zip(tensors.values(), parts, strict=True):
                tensor.detach().copy_(part.view(tensor.shape))
            return tensors

        return self.reduce_flat(flat, parameters=indices).then(write_back)

    def reduce_flat(
        self, flat: torch.Tensor, *, parameters: Sequence[int]
    ) -> torch.futures.Future[torch.Tensor]:
        """Collective: every rank calls this, in the same order. Average a flat gradient in place, at this step's width.

        Args:
            flat: contiguous 1-D fp32, bf16 or fp16: the gradients of ``parameters``, one after the other.
            parameters: indices in model order.

        Returns:
            a future of ``flat``. On a CPU the exchange runs in a thread of its own and several may be under way.
        """
        indices = tuple(parameters)
        sizes = [self.layout.parameters[index].numel for index in indices]
        assert flat.is_contiguous()
        assert flat.numel() == sum(sizes)

        places = [range(len(indices))]
        if self._device.type == "cpu":
            places = cut_in_chunks(sizes, CHUNK_NUMEL)
        parts = flat.split([sum(sizes[place.start : place.stop]) for place in places])
        chunks = [
            Chunk(
                part,
                indices[place.start : place.stop],
                step=self._step,
                bits=self._bits,
                loss_scale=self._loss_scale,
                tag=2 * number,
            )
            for number, (part, place) in enumerate(zip(parts, places, strict=True), start=self._num_chunks)
        ]
        self._num_chunks += len(chunks)
        self._last_submit = perf_counter()
        return self._executor.submit([partial(self._explained, chunk) for chunk in chunks], flat)

    def _explained(self, chunk: Chunk) -> None:
        """Collective: every rank calls this. ``_exchange`` in scratch memory of its own, with errors that say where."""
        scratch = self._idle_scratch.pop() if self._idle_scratch else Scratch(self._device)
        try:
            self._exchange(chunk, scratch)
        except MismatchError:
            raise
        except Exception as error:
            raise RuntimeError(
                f"rank {self._rank} of {self.layout.world_size}: averaging gradients at step {chunk.step} "
                f"({chunk.bits} bits) failed: {error}. If a peer has ended, its own log says why."
            ) from error
        self._idle_scratch.append(scratch)

    def check(self) -> None:
        """Raise what an exchange failed with. On a GPU this is where messages are verified, and waits for them.

        Raises:
            MismatchError: naming the peers whose messages were not the expected ones, and what differs.
            RuntimeError: naming this rank and the step, if an exchange failed otherwise.
        """
        if self._executor.error is not None:
            raise self._executor.error
        unverified, self._unverified = self._unverified, []
        for expected, headers, senders in unverified:
            self._verify(expected, headers, senders)

    @contextmanager
    def reraising(self) -> Iterator[None]:
        """Around a backward pass: what DDP raises in place of an exchange's error becomes that error again."""
        handed_over = self._last_submit
        try:
            yield
        except Exception as error:
            if self._executor.error is not None and error is not self._executor.error:
                raise self._executor.error from error
            raise
        if self._last_submit != handed_over:
            self.counters.wait_seconds += perf_counter() - self._last_submit
        self.check()

    def state_dict(self) -> dict[str, Any]:
        """Counters and residuals of this rank. No exchange may be under way."""
        return {"counters": self.counters.state_dict(), "residuals": self._feedback.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what ``state_dict`` gave on the same rank of as many ranks."""
        self.counters.load_state_dict(state["counters"])
        self._feedback.load_state_dict(state["residuals"])

    def reshard_residuals(self, old_size: int, read: ReadResiduals) -> None:
        """Take over the residuals of ``old_size`` ranks, each as its ``state_dict`` gave them under ``residuals``."""
        self._feedback.reshard(old_size, read)

    def close(self) -> None:
        """Wait for exchanges under way, then end the communication threads and leave the group."""
        self._executor.close()
        if self._group is not None and self._executor.error is None:
            dist.destroy_process_group(self._group)
        self._group = None

    def _exchange(self, chunk: Chunk, scratch: Scratch) -> None:
        """Collective: every rank calls this. Both phases, for one chunk."""
        group = self._group
        assert group is not None
        flat, loss_scale = chunk.flat, chunk.loss_scale
        plan = self._plan(chunk.parameters, chunk.bits)
        answers = self._plan(chunk.parameters, self.layout.mean_width(chunk.bits))
        world_size = self.layout.world_size
        words = step_words(self._seed, chunk.step)
        codec, feedback, timing = self.codec, self._feedback, self.counters.timing

        with timing("wire"):
            gathered = scratch.get("gathered", world_size * answers.padded_size, torch.uint8)
            means = Transfer(gathered, rank=self._rank, group=group, tag=chunk.tag + 1)
        gradient, small, wide, gradients = self._collect(chunk, plan, scratch)

        with timing("encode"):
            feedback.add_to_mean(wide, answers, words=words, loss_scale=loss_scale)
            answer = scratch.get("answer", answers.padded_size, torch.uint8)
            encode_share(
                codec,
                (small, wide),
                answers.own_rows,
                answer,
                widths=answers.widths,
                words=words,
                phase=2,
                rotated=True,
            )
            header = self._header(bits=answers.bits, bucket=plan.digest, step=chunk.step, phase=2)
            answer[:HEADER_BYTES] = as_tensor(header, flat.device)
            feedback.keep_mean_errors(wide, answer, answers, words=words, loss_scale=loss_scale)

        with timing("wire"):
            means.send_all(answer)
        with self._waiting():
            means.wait()
        self._receive(header, gathered.view(world_size, answers.padded_size))

        with timing("decode"):
            decode_share(codec, gathered, answers.gathered, gradient, widths=answers.widths, words=words)
            if gradient is not flat:
                flat.copy_(gradient)
            feedback.see_result(flat)
        with self._waiting():
            gradients.finish()
            means.finish()
        self.counters.add_exchange(
            sent_bytes=gradients.sent_bytes + means.sent_bytes, numel=plan.numel, world_size=world_size
        )

    def _collect(
        self, chunk: Chunk, plan: Plan, scratch: Scratch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Transfer]:
        """Collective: every rank calls this. The first phase of one chunk.

        Returns:
            the flat gradient in fp32; the mean of this rank's small and wide pieces, fp32 ``[n, block_size]`` in the domain
            of the codes; the transfer, which is still to be finished.
        """
        flat, loss_scale = chunk.flat, chunk.loss_scale
        assert self._group is not None
        words = step_words(self._seed, chunk.step)
        codec, feedback, timing = self.codec, self._feedback, self.counters.timing

        with timing("wire"):
            incoming = scratch.get("incoming", self.layout.world_size * plan.sizes[self._rank], torch.uint8)
            gradients = Transfer(incoming, rank=self._rank, group=self._group, tag=chunk.tag)
        with timing("encode"):
            gradient = flat
            if flat.dtype != torch.float32:
                gradient = scratch.get("gradient", plan.numel, torch.float32).copy_(flat)
            feedback.add_to_gradients(gradient, plan, loss_scale=loss_scale)
            outgoing = scratch.get("outgoing", sum(plan.sizes), torch.uint8)
            encode_share(
                codec,
                (gradient, gradient),
                plan.outgoing,
                outgoing,
                widths=plan.widths,
                words=words,
                phase=1,
            )
            header = self._header(bits=plan.bits, bucket=plan.digest, step=chunk.step, phase=1)
            header_bytes = as_tensor(header, flat.device)
            for message in outgoing.split(list(plan.sizes)):
                message[:HEADER_BYTES] = header_bytes
            feedback.keep_gradient_errors(gradient, outgoing, plan, words=words, loss_scale=loss_scale)

        with timing("wire"):
            gradients.send_each(outgoing, plan.sizes)
        with self._waiting():
            gradients.wait()
        messages = incoming.view(self.layout.world_size, -1)
        self._receive(header, messages)

        with timing("decode"):
            small, wide = mean_of_shares(codec, messages, plan.own, widths=plan.widths, scratch=scratch)
        return gradient, small, wide, gradients

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Around waiting for the network: other exchanges go on meanwhile."""
        with self._executor.waiting():
            yield
        self.counters.wire_seconds += self._executor.take_idle_seconds()

    def _plan(self, indices: tuple[int, ...], bits: int) -> Plan:
        if (indices, bits) not in self._plans:
            self._plans[indices, bits] = build_plan(
                self.layout,
                indices,
                bits=bits,
                scale_bytes=self.codec.scale_bytes(bits),
                rank=self._rank,
                device=self._device,
                rotated=self.codec.name == "hadamard" and bits <= MAX_CODE_BITS,
            )
        return self._plans[indices, bits]

    def _header(self, *, bits: int, bucket: int, step: int, phase: int) -> Header:
        return Header(
            magic=MAGIC,
            version=FORMAT_VERSION,
            phase=phase,
            bits=bits,
            step=step,
            layout_and_codec=self.layout.digest ^ self.codec.digest,
            bucket=bucket,
        )

    def _receive(
        self, expected: Header, messages: torch.Tensor, *, ranks: Sequence[int] | None = None
    ) -> None:
        """Verify received messages ``[ranks, bytes]``, of all or of these ranks: at once on a CPU, in ``check`` on a GPU, whose host runs ahead."""
        headers, senders = messages[:, :HEADER_BYTES], ranks or range(self.layout.world_size)
        if headers.device.type == "cpu":
            self._verify(expected, headers, senders)
        else:
            self._unverified.append((expected, headers.clone(), senders))

    def _verify(self, expected: Header, headers: torch.Tensor, senders: Sequence[int]) -> None:
        raw = expected.to_bytes()
        received = [bytes(row) for row in headers.cpu().numpy()]
        wrong = [
            f"rank {rank} sent {describe_difference(expected, row)}"
            for rank, row in zip(senders, received, strict=True)
            if row != raw
        ]
        if wrong:
            raise MismatchError(
                f"rank {self._rank} at step {expected.step} ({expected.bits} bits) received gradients that do not "
                f"belong there: {'; '.join(wrong)}"
            )


def as_tensor(header: Header, device: torch.device) -> torch.Tensor:
    """The bytes of a header, uint8 on ``device``."""
    return torch.frombuffer(bytearray(header.to_bytes()), dtype=torch.uint8).to(device)
