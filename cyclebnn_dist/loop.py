"""The loop: the order of things in a run. The only module that knows it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from cyclebnn_dist import saving
from cyclebnn_dist.agreement import Requests, compare_parameters, digest
from cyclebnn_dist.binary import set_progress, set_widths
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.data import Batch
from cyclebnn_dist.evaluate import evaluate
from cyclebnn_dist.guards.preempt import Preempted
from cyclebnn_dist.metrics import SlowRankReport
from cyclebnn_dist.metrics.own_time import OwnTime
from cyclebnn_dist.precision.schedule import Widths
from cyclebnn_dist.run import Run
from cyclebnn_dist.world import largest_over_ranks, mean_in_rank_order

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured on this rank; ``loss`` is a detached scalar tensor."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    lr: float
    widths: Widths
    real_weights: bool
    skipped: bool
    stop: bool
    writing: bool
    seconds: float
    data_seconds: float
    agreement_seconds: float
    own_seconds: float


def train(run: Run) -> Literal["finished", "preempted"]:
    """Collective: every rank calls this. Train from ``run.step`` to the end, or to an agreed stop.

    Raises:
        RecipeError: on every rank, naming the file, when one of them cannot read an image; the run can be resumed.
        SaveError: on every rank, when the checkpoint of the end or of a stop could not be written.
        RuntimeError: when ranks disagree, when one is lost, or after too many non-finite gradients in a row.
    """
    config = run.recipe.run
    window, slow_ranks = Window(run), SlowRankReport(run.world)
    run.health.begin(run.step)
    run.watchdog.saw(f"step {run.step}")
    if run.vote.take():
        return "preempted"
    if evaluation_due(run):  # an earlier life left it, to save in time
        if not evaluate_and_log(run):
            return "preempted"
        saving.save(run, wait=run.step == run.total_steps)
    while run.step < run.total_steps:
        try:
            result = train_step(run)
        except RecipeError:
            saving.settle(run)
            raise
        run.preemption.first_step_done()
        run.step += 1
        run.watchdog.saw(f"step {run.step}")
        last = run.step == run.total_steps
        saving.publish_if_written(run, writing=result.writing)
        run.totals.add_step(
            result.widths,
            real_weights=result.real_weights,
            images=run.recipe.train.global_batch_size,
            seconds=result.seconds,
            data_seconds=result.data_seconds,
            agreement_seconds=result.agreement_seconds,
            skipped=result.skipped,
        )
        skipped_in_a_row = run.totals.skipped_in_a_row
        if skipped_in_a_row >= run.recipe.train.max_skipped_steps:
            saving.settle(run)
            raise RuntimeError(
                f"non-finite gradients in {skipped_in_a_row} steps in a row, "
                f"{run.step - skipped_in_a_row} to {run.step - 1}: lower optim.lr, set train.clip_norm, "
                "or raise precision.*.low"
            )
        window.add(result)
        slow_ranks.add(own_seconds=result.own_seconds, data_seconds=result.data_seconds)
        if run.step % config.log_every == 0 or last:
            window.report(run, result, slow_ranks=slow_ranks)
            window = Window(run)
        if run.health.due(run.step):
            report_health(run, result)
        check_every = run.recipe.comm.check_every
        if check_every and run.step % check_every == 0:
            compare_parameters(run.model, world=run.world, step=run.step)
        stop = result.stop
        if not stop and evaluation_due(run):
            saving.settle(run)
            stop = not evaluate_and_log(run) or (run.vote.agreed and not last)
        if saving.due(run) or last or stop:
            saving.save(run, wait=last or stop)
        if stop:
            return "preempted"
    return "finished"


def evaluation_due(run: Run) -> bool:
    """Whether the run stands at a step that ends with an evaluation, and has not had it."""
    every = max(1, round(run.recipe.eval.every_epochs * run.steps_per_epoch))
    due = run.step > 0 and (run.step % every == 0 or run.step == run.total_steps)
    return due and run.totals.evaluation.get("step") != run.step


def train_step(run: Run) -> StepResult:
    """Collective: every rank calls this. One optimizer step at ``run.step``."""
    begun, agreed_before = time.perf_counter(), run.agreement.seconds
    own_time = OwnTime(run.world.device)
    own_time.begin()
    recipe, step = run.recipe, run.step
    widths = run.schedule.at(step)
    moment = run.phases.at(step)
    run.agreement.begin(step, widths=digest(widths), stop=run.preemption.requested, writing=run.saver.writing)
    if 0 < run.phases.first_steps == step:
        log.info("the first phase is over: weights are binary from step %d on", step)
    if moment.restarts_optimizer:
        run.engine.restart_optimizer()
    run.engine.begin_step(
        step,
        lr=moment.lr,
        communication_bits=widths.communication_bits,
        first_phase=moment.first_phase,
    )
    accumulation = recipe.train.accumulation
    total_loss = torch.zeros((), device=run.world.device)
    data_seconds = 0.0
    requests = Requests(stop=False, writing=False)
    refusal: RecipeError | None = None
    set_progress(run.model, moment.progress, real_weights=moment.first_phase)
    for micro_step in range(accumulation):
        last = micro_step == accumulation - 1
        set_widths(
            run.model,
            forward_bits=widths.forward_bits,
            backward_bits=widths.backward_bits,
            step=step * accumulation + micro_step,
            seed=recipe.run.seed * run.world.size + run.world.rank,
        )
        waiting = time.perf_counter()
        if refusal is None:
            batch, refusal = next_batch(run)
        data_seconds += time.perf_counter() - waiting
        forward: Callable[[torch.Tensor], torch.Tensor] = run.engine.forward
        if micro_step == 0 and run.health.due(step + 1):
            forward = run.health.watching(forward)
        with nullcontext() if last else run.engine.accumulating():
            images, targets = run.mixing(batch.images, batch.labels, step=step * accumulation + micro_step)
            logits = forward(images)
            loss = run.objective(run.model, images, logits, targets, step=step)
            if last:
                own_time.end()
                requests = run.agreement.finish()
            run.engine.backward(loss / accumulation)
        total_loss += loss.detach() / accumulation
    grad_norm = run.engine.clip(recipe.train.clip_norm)
    updated = run.agreement.all_finite(bool(torch.isfinite(grad_norm)), refusal=refusal)
    run.engine.step(skip=not updated)
    if run.ema and updated:
        run.ema.update(run.model, step=step)
    return StepResult(
        loss=total_loss,
        grad_norm=grad_norm,
        lr=moment.lr,
        widths=widths,
        real_weights=moment.first_phase,
        skipped=not updated,
        stop=requests.stop,
        writing=requests.writing,
        seconds=time.perf_counter() - begun,
        data_seconds=data_seconds,
        agreement_seconds=run.agreement.seconds - agreed_before,
        own_seconds=own_time.seconds(),
    )


def next_batch(run: Run) -> tuple[Batch, RecipeError | None]:
    """The next batch; where it cannot be read, a blank one and why.

    Others wait in this step's exchanges, which a blank batch lets end; the update is then left out.
    """
    try:
        return run.train_loader.next(), None
    except RecipeError as error:
        return run.train_loader.blank(), error


class Window:
    """What happened since the last progress line."""

    def __init__(self, run: Run) -> None:
        self._first_step = run.step
        self._loss = torch.zeros((), device=run.world.device)
        self._seconds = 0.0
        self._data_seconds = 0.0
        self._agreement_seconds = 0.0
        self._exchange_seconds = run.reducer.counters.seconds()

    def add(self, result: StepResult) -> None:
        self._loss += result.loss
        self._seconds += result.seconds
        self._data_seconds += result.data_seconds
        self._agreement_seconds += result.agreement_seconds

    def report(self, run: Run, result: StepResult, *, slow_ranks: SlowRankReport) -> None:
        """Collective: every rank calls this. Write one row about the window."""
        steps = run.step - self._first_step
        means = {"loss": self._loss / steps, **run.objective.take_means()}
        over_ranks = mean_in_rank_order(run.world, torch.stack(list(means.values())).cpu()).tolist()
        loss, *terms = over_ranks
        images = steps * run.recipe.train.global_batch_size
        row = {
            "loss": loss,
            **dict(zip(list(means)[1:], terms, strict=True)),
            **run.objective.place(run.step - 1),
            "lr": result.lr,
            "grad_norm": result.grad_norm.item(),
            "forward_bits": result.widths.forward_bits,
            "backward_bits": result.widths.backward_bits,
            "communication_bits": result.widths.communication_bits,
            "images_per_second": images / self._seconds,
            "data_wait_fraction": self._data_seconds / self._seconds,
            "sent_bytes": run.reducer.counters.sent_bytes,
            **{
                f"{name}_seconds": (total - self._exchange_seconds[name]) / steps
                for name, total in run.reducer.counters.seconds().items()
            },
            "agreement_seconds": self._agreement_seconds / steps,
            **slow_ranks.report(),
            "skipped_steps": run.totals.skipped_steps,
            "failed_checkpoints": run.totals.failed_checkpoints,
            "epoch": run.step / run.steps_per_epoch,
        }
        run.write_row("train", row)
        run.console.progress(
            run.step,
            loss=loss,
            lr=result.lr,
            widths=result.widths,
            images_per_second=images / self._seconds,
            seconds_left=(run.total_steps - run.step) * self._seconds / steps,
        )


def report_health(run: Run, result: StepResult) -> None:
    """Collective: every rank calls this. Write one row about the binary layers, and warn of what is clearly wrong."""
    saturated_inputs = mean_in_rank_order(run.world, run.health.take_saturated_inputs())
    forward_bits = result.widths.forward_bits
    row = run.health.measure(
        run.step,
        saturated_inputs=saturated_inputs,
        at_highest_width=forward_bits >= run.recipe.precision.forward.high,
    )
    run.write_row("health", {"forward_bits": forward_bits, **row})
    if run.world.is_main:
        for warning in run.health.warnings(lr=result.lr * run.recipe.optim.binary_lr_scale):
            log.warning("step %d: %s", run.step, warning)


def evaluate_and_log(run: Run) -> bool:
    """Collective: every rank calls this. Evaluate the model (and the averaged one) and write the result.

    Returns:
        False, on every rank and with nothing written, if a signal had the ranks leave it between two batches.
    """
    begun = time.perf_counter()
    models = {"": run.model, **({"ema_": run.ema.module} if run.ema else {})}
    (rounds,) = largest_over_ranks(run.world, [len(run.eval_loader)])
    weights = run.phases.weights_after(run.step)
    row: dict[str, float] = {}
    for prefix, model in models.items():
        batches = run.watchdog.over(run.eval_loader, what=f"step {run.step}, evaluation batch")
        try:
            result = evaluate(
                model,
                run.vote.over(batches, rounds=int(rounds)),
                world=run.world,
                forward_bits=run.eval_forward_bits,
                amp=run.recipe.train.amp,
                weights=weights,
            )
        except Preempted:
            log.warning("the evaluation at step %d is left; the next start does it again", run.step)
            return False
        row |= {f"{prefix}top1": result.top1, f"{prefix}top5": result.top5, f"{prefix}loss": result.loss}
    run.totals.eval_seconds += time.perf_counter() - begun
    labelled = {**row, **({"weights": weights} if run.phases.first_steps else {})}
    run.totals.add_evaluation(labelled, images=result.images, step=run.step, competes=weights == "binary")
    run.write_row("eval", {**labelled, "forward_bits": run.eval_forward_bits, "images": result.images})
    told = "; ".join(
        f"{'averaged weights ' if prefix else ''}top-1 {row[prefix + 'top1']:.2f} %, loss {row[prefix + 'loss']:.4f}"
        for prefix in models
    )
    real = ", real weights" if weights == "real" else ""
    log.info("evaluation at step %d, forward %d bits%s: %s", run.step, run.eval_forward_bits, real, told)
    return True
