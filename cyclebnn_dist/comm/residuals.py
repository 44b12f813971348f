"""The residuals: what quantization lost of a gradient, to be added to the next one (error feedback).

Each rank keeps the error of the gradients it sent (a full tensor a parameter) and of the mean it sent as owner (its
slice of a parameter). They are keyed by parameter and kept in units of the unscaled gradient, so they survive changes
of width, loss scale and bucket. What an exchange leaves behind counts only once the step has turned out finite in
every bucket: on a step that is skipped, the residuals stay as they were before it.

A scattered layout has no mean that is sent, and residuals of gradients alone. Where a run goes from an all-reduce to it,
each rank adds what it owes to its slice of the mean, times the number of ranks, to what it owes to its own gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch

from cyclebnn_dist.comm.codec import Codec
from cyclebnn_dist.comm.layout import Layout
from cyclebnn_dist.comm.plan import Plan
from cyclebnn_dist.comm.reshard import ReadResiduals, reshard_gradient_errors, reshard_mean_errors
from cyclebnn_dist.comm.scratch import Scratch

State = dict[str, dict[str, torch.Tensor]]


class Feedback(Protocol):
    """What the reducer does about errors, around the encoding of either phase."""

    def add_to_gradients(self, flat: torch.Tensor, plan: Plan, *, loss_scale: float) -> None: ...

    def keep_gradient_errors(
        self,
        flat: torch.Tensor,
        message: torch.Tensor,
        plan: Plan,
        *,
        words: tuple[int, int],
        loss_scale: float,
    ) -> None: ...

    def add_to_mean(
        self, rows: torch.Tensor, plan: Plan, *, words: tuple[int, int], loss_scale: float
    ) -> None: ...

    def keep_mean_errors(
        self,
        rows: torch.Tensor,
        message: torch.Tensor,
        plan: Plan,
        *,
        words: tuple[int, int],
        loss_scale: float,
    ) -> None: ...

    def see_result(self, flat: torch.Tensor) -> None: ...

    def finish_step(self, *, applied: bool = True) -> None: ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None: ...

    def reshard(self, old_size: int, read: ReadResiduals) -> None: ...


class NoFeedback:
    """Errors are forgotten; right for unbiased scales."""

    def add_to_gradients(self, flat: torch.Tensor, plan: Plan, *, loss_scale: float) -> None:
        pass

    def keep_gradient_errors(
        self,
        flat: torch.Tensor,
        message: torch.Tensor,
        plan: Plan,
        *,
        words: tuple[int, int],
        loss_scale: float,
    ) -> None:
        pass

    def add_to_mean(
        self, rows: torch.Tensor, plan: Plan, *, words: tuple[int, int], loss_scale: float
    ) -> None:
        pass

    def keep_mean_errors(
        self,
        rows: torch.Tensor,
        message: torch.Tensor,
        plan: Plan,
        *,
        words: tuple[int, int],
        loss_scale: float,
    ) -> None:
        pass

    def see_result(self, flat: torch.Tensor) -> None:
        pass

    def finish_step(self, *, applied: bool = True) -> None:
        pass

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        pass

    def reshard(self, old_size: int, read: ReadResiduals) -> None:
        pass


class ErrorFeedback:
    """Errors of both phases come back in the next step. Small tensors, which are only cast, have none."""

    def __init__(self, codec: Codec, layout: Layout, *, rank: int, device: torch.device) -> None:
        wide = [p for p in layout.parameters if not p.small]
        self._codec = codec
        self._layout = layout
        self._rank = rank
        self._errors: State = {
            "gradient": {p.name: torch.zeros(p.numel, device=device) for p in wide},
            "mean": {
                p.name: torch.zeros(len(p.owned_elements(rank)), device=device)
                for p in wide
                if not layout.scattered
            },
        }
        # What the present step leaves behind is written beside, and takes their place when the step is applied.
        self._next: State = {
            kind: {name: torch.empty_like(error) for name, error in errors.items()}
            for kind, errors in self._errors.items()
        }
        self._noted: list[tuple[str, str]] = []
        self._finite: list[torch.Tensor] = []
        self._scratch = Scratch(device)

    def add_to_gradients(self, flat: torch.Tensor, plan: Plan, *, loss_scale: float) -> None:
        """Add the residuals to the flat gradient (fp32), in place."""
        start = 0
        for parameter in plan.parameters:
            if not parameter.small:
                flat[start : start + parameter.numel].add_(
                    self._errors["gradient"][parameter.name], alpha=loss_scale
                )
            start += parameter.numel

    def keep_gradient_errors(
        self,
        flat: torch.Tensor,
        message: torch.Tensor,
        plan: Plan,
        *,
        words: tuple[int, int],
        loss_scale: float,
    ) -> None:
        """Note what the outgoing messages lack of ``flat``."""
        decoded = self._scratch.get("decoded", flat.numel(), torch.float32)
        self._codec.decode_pieces(message, plan.outgoing.wide, decoded, bits=plan.bits, words=words)
        start = 0
        for parameter in plan.parameters:
            if not parameter.small:
                part = slice(start, start + parameter.numel)
                self._note(
                    "gradient", parameter.name, wanted=flat[part], sent=decoded[part], loss_scale=loss_scale
                )
            start += parameter.numel

    def add_to_mean(
        self, rows: torch.Tensor, plan: Plan, *, words: tuple[int, int], loss_scale: float
    ) -> None:
        """Add the residuals to this rank's rows of the mean, which are in the domain of the codes, in place."""
        errors = self._scratch.get("rows", rows.numel(), torch.float32).view_as(rows).zero_()
        for owned in plan.owned:
            errors[owned.rows].view(-1)[: owned.numel] = self._errors["mean"][owned.parameter.name]
        self._codec.rotate_rows(errors, plan.own.wide, bits=plan.bits, words=words)
        rows.add_(errors, alpha=loss_scale)

    def keep_mean_errors(
        self,
        rows: torch.Tensor,
        message: torch.Tensor,
        plan: Plan,
        *,
        words: tuple[int, int],
        loss_scale: float,
    ) -> None:
        """Note what the message to everyone lacks of ``rows``."""
        decoded = self._scratch.get("rows", rows.numel(), torch.float32).view_as(rows).zero_()
        self._codec.add_pieces(message, plan.own.wide, decoded, bits=plan.bits)
        # Rotation is linear, so what is lost may be taken in the domain of the codes.
        errors = torch.sub(rows, decoded, out=decoded)
        self._codec.rotate_rows(errors, plan.own.wide, bits=plan.bits, words=words, inverse=True)
        for owned in plan.owned:
            error = errors[owned.rows].view(-1)[: owned.numel]
            self._note("mean", owned.parameter.name, wanted=error, sent=None, loss_scale=loss_scale)

    def see_result(self, flat: torch.Tensor) -> None:
        """Look at a reduced bucket, which is the same on all ranks."""
        self._finite.append(_all_finite(flat))

    def finish_step(self, *, applied: bool = True) -> None:
        """Keep the errors of a step that was applied and in which all that was reduced is finite, forget them otherwise."""
        if applied and all(bool(finite) for finite in self._finite):
            for kind, name in self._noted:
                errors, others = self._errors[kind], self._next[kind]
                errors[name], others[name] = others[name], errors[name]
        self._noted, self._finite = [], []

    def state_dict(self) -> State:
        """The residuals, as ``{"gradient" | "mean": {parameter name: fp32 tensor}}``."""
        self.finish_step()
        return {kind: dict(errors) for kind, errors in self._errors.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Take what ``state_dict`` gave on the same rank of as many ranks.

        Raises:
            RuntimeError: if a residual is missing or has another length.
        """
        for kind, errors in self._errors.items():
            if kind == "mean" and not state.get(kind):  # written by a run that was scattered: nothing is owed
                for error in errors.values():
                    error.zero_()
                continue
            for name, error in errors.items():
                loaded = state.get(kind, {}).get(name)
                if loaded is None or loaded.shape != error.shape:
                    found = "is missing" if loaded is None else f"has {loaded.numel()} elements"
                    raise RuntimeError(
                        f"residual of {name} ({kind}) {found}, this rank needs {error.numel()}: the checkpoint was "
                        "written with another number of ranks or other comm settings"
                    )
                error.copy_(loaded)
        if self._layout.scattered:
            self._take_over_mean_errors(state.get("mean", {}))

    def reshard(self, old_size: int, read: ReadResiduals) -> None:
        """Take over what ``old_size`` ranks kept: what is owed to the averaged gradient stays the same."""
        settings: dict[str, Any] = {"rank": self._rank, "old_size": old_size, "read": read}
        self.load_state_dict(
            {
                "gradient": reshard_gradient_errors(self._layout, **settings),
                "mean": reshard_mean_errors(self._layout, **settings),
            }
        )

    def _take_over_mean_errors(self, errors: Mapping[str, torch.Tensor]) -> None:
        """Owe to this rank's gradient what it owed to its slices of the mean, as an all-reduce cuts them."""
        for parameter in self._layout.parameters:
            error = errors.get(parameter.name)
            if error is not None and not parameter.small:
                owned = replace(parameter, slot=None).owned_elements(self._rank)
                own = self._errors["gradient"][parameter.name][owned.start : owned.stop]
                own.add_(error.to(own.device), alpha=self._layout.world_size)

    def _note(
        self, kind: str, name: str, *, wanted: torch.Tensor, sent: torch.Tensor | None, loss_scale: float
    ) -> None:
        """Keep ``wanted - sent`` in unscaled units for the next step; where it is not finite, what was kept before."""
        error = self._next[kind][name]
        if sent is None:
            error.copy_(wanted)
        else:
            torch.sub(wanted, sent, out=error)
        if loss_scale != 1.0:
            error.div_(loss_scale)
        if error.device.type != "cpu" or not _all_finite(error):
            error.copy_(torch.where(torch.isfinite(error), error, self._errors[kind][name]))
        self._noted.append((kind, name))


def _all_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether all elements are finite, a bool scalar; on a CPU a sum, where it is finite, says so in one pass."""
    if tensor.device.type == "cpu":
        finite = torch.isfinite(tensor.sum())
        if finite:
            return finite
    return torch.isfinite(tensor).all()
