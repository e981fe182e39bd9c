"""The course of a training run: start-up, the loop, saving, going back, the end."""

import math
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from sft import auto_batch, checkpoint, early_stop, lr_finder, probe, resume, rollback, sampling
from sft.config import RunConfig
from sft.early_stop import Stalled
from sft.engine import GROUP_TIMEOUT, Numerics, build_engine, choose_device, choose_numerics, dtype_table, join
from sft.errors import GateFailed, GuardStop, Preempted
from sft.guard import Guard, Spike
from sft.hf_folder import prove_export
from sft.inputs import RunInputs, batch_arithmetic, find_resume, identity, open_inputs
from sft.isolation import prove_isolation
from sft.launch_env import drop_secrets
from sft.metrics import Recorder
from sft.out_of_memory import explained
from sft.preemption import StopRequest
from sft.rendezvous import Meeting, meet
from sft.run_folder import await_config, lock, run_folder, write_config
from sft.saver import Saver
from sft.sequence import share_packs
from sft.signals import Inbox
from sft.step import SLOW_LIMIT_S, Run, heldout_loss, train_step, training_flops_per_token
from sft.watchdog import Watchdog

LAUNCHERS = {"sft", "sft.launch", "deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch"}
"""Names of the commands and modules that start ranks."""


@dataclass(frozen=True)
class Ended:
    """How far a run is."""

    out: Path
    step: int
    total_steps: int
    already: bool
    """It had been finished before this command."""
    stalled: Stalled | None
    """It ended before its last step, because the held-out loss no longer fell."""


def run_training(config: RunConfig, inbox: Inbox) -> Ended | None:
    """Train, or resume, the run that `config` describes.

    Returns:
        On rank 0, how far the run is; None where only a learning rate was looked for. The process group is gone then:
        what follows is rank 0's alone, and nobody waits for it in a collective.
    """
    inputs = open_inputs(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    out = run_folder(config)
    if config.lr_finder:
        lr_finder.refuse_begun(out)
    numerics = choose_numerics(config, choose_device(), inputs.model_config)
    meeting = meet(config.guard.arrive_after_s, lambda: inbox.received is not None)
    is_first = meeting.rank == 0
    if is_first:
        drop_secrets()
    meeting.on_first_rank("lock", lambda: lock(out))
    recorder = Recorder(config, out, is_first, inputs.total_steps)
    with recorder, watch_over(meeting, config, out, recorder) as watch, explained(config, inputs, out, watch):
        watch.mark("connecting", 0)
        join(meeting)
        watch.mark("looking for a checkpoint", 0, SLOW_LIMIT_S)
        newest = undamaged(config, inputs, recorder)
        recorder.step = checkpoint.step_of(newest)
        stalled = early_stop.stalled(measured_before(recorder), config.eval.every, config.train.early_stop)
        finished = recorder.step == inputs.total_steps or stalled is not None
        if not finished:
            resume.on_first_rank(lambda: write_config(config, out))
            await_config(out)
            stop = StopRequest(inbox, ends_at_s(config.max_hours))
            run = start_up(config, inputs, numerics, out, recorder, watch, stop)
            if config.lr_finder:
                lr_finder.find(run)
            else:
                stalled = train(run, newest)
    dist.destroy_process_group()
    last_step = inputs.last_step if stalled is None else stalled.step
    is_told = is_first and not config.lr_finder
    return Ended(out, last_step, inputs.total_steps, finished, stalled) if is_told else None


def train(run: Run, newest: Path | None) -> Stalled | None:
    """From the base model, or the checkpoint `newest`, to the last step, or until the run is asked to stop.

    Returns:
        Why it ended before its last step, where it was the held-out loss.
    """
    config, inputs, recorder = run.config, run.inputs, run.recorder
    base = probe.measure_base(run, newest)
    sampling.begin(run, newest)
    step = start_from(run, newest)
    drift = probe.look(run, base, step)
    sampling.look(run, step)
    guard = Guard(config.guard, inputs.steps_per_epoch, resume.on_first_rank(recorder.history))
    passed_over = rollback.passed_over(run.out, run.identity)
    measure_late(run, step)
    measured: list[tuple[int, float | None]] = [*measured_before(recorder)]
    stalled = early_stop.stalled(measured, config.eval.every, config.train.early_stop)
    while step < inputs.last_step and run.stop.reason is None and drift.over_budget is None and stalled is None:
        metrics = train_step(run, step, passed_over.get(step + 1))
        if metrics is None:
            break
        step += 1
        saving = step == inputs.last_step or step % config.checkpoint.every == 0
        if inputs.heldout is not None and (saving or step % config.eval.every == 0):
            metrics["heldout_loss"] = heldout_loss(run, step)
            measured.append((step, metrics["heldout_loss"]))
            stalled = early_stop.stalled(measured, config.eval.every, config.train.early_stop)
        is_last = step == inputs.total_steps or stalled is not None
        drift = probe.look(run, base, step, is_last=is_last)
        recorder.metrics(metrics | drift.metrics)
        spike = judge(run, guard, metrics)
        if spike is not None and (earlier := undo(run, spike)) is not None:
            step, drift, stalled, is_last = earlier, probe.NOT_DUE, None, False
            measured = [*measured_before(recorder)]
            guard.forget_after(step)
            passed_over = rollback.passed_over(run.out, run.identity)
        elif saving or stalled is not None:
            run.watch.mark("saving", step, SLOW_LIMIT_S)
            run.saver.begin(step, metrics.get("heldout_loss"))
        sampling.look(run, step, is_last=is_last)
    leave(run, step, drift.over_budget, stalled)
    return stalled


def measured_before(recorder: Recorder) -> list[tuple[int, float]]:
    """(step, held-out loss) of what this run has measured up to the recorder's step. Collective.

    NaN where it was not finite, or measuring was cut short.
    """
    history = resume.on_first_rank(recorder.heldout_history)
    return [(step, loss) for step, loss in history if step <= recorder.step]


def measure_late(run: Run, step: int) -> None:
    """Measure the held-out loss after `step` where a request to stop has cut that short. Collective.

    Without it, that the run was interrupted would show in when it stops early, and in which checkpoint is its best.
    """
    measured = measured_before(run.recorder)[-1:]
    if run.inputs.heldout is None or not measured or measured[0][0] != step or math.isfinite(measured[0][1]):
        return
    loss = heldout_loss(run, step)
    if loss is None:
        return
    resume.on_first_rank(lambda: run.recorder.amend(step, {"heldout_loss": loss}))
    if step % run.config.checkpoint.every == 0:
        run.saver.begin(step, loss)  # what was saved does not hold it


def start_up(
    config: RunConfig,
    inputs: RunInputs,
    numerics: Numerics,
    out: Path,
    recorder: Recorder,
    watch: Watchdog,
    stop: StopRequest,
) -> Run:
    """Load the model, say what is about to happen, and prove that packs are isolated.

    Raises:
        Preempted: the run was asked to stop meanwhile.
    """
    if not config.lr_finder:  # neither its trackers nor its bar: the run has not begun
        resume.on_first_rank(recorder.start)
    leave_if_asked(stop)
    watch.mark("loading the model", 0, SLOW_LIMIT_S)
    engine = build_engine(config, inputs.strategy, numerics)
    leave_if_asked(stop)
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    identities = identity(config, inputs)
    saver = Saver(engine, out / "checkpoints", identities, config.checkpoint, local_ranks, recorder.event)
    stop.allow_for(saver.seconds_needed)
    flops_per_token = training_flops_per_token(engine, inputs)
    shares = share_packs(config.batch.sequence_parallel, GROUP_TIMEOUT)
    run = Run(config, inputs, identities, numerics, engine, out, recorder, watch, stop, saver, shares, flops_per_token)
    run = auto_batch.resolve(run, lambda: leave_if_asked(stop))
    announce(run)
    watch.mark("isolation probe", 0, SLOW_LIMIT_S)
    recorder.say(prove_isolation(engine, inputs.model_config["vocab_size"], numerics.device, shares))
    resume.on_first_rank(lambda: prove_export(Path(config.model.path), identities))
    return run


def leave_if_asked(stop: StopRequest) -> None:
    """End before the first step where a rank was asked to stop. Collective.

    Raises:
        Preempted: it was.
    """
    if stop.settle():
        raise Preempted(f"{stop.reason} before the first step of this start; run the same command again to go on")


def start_from(run: Run, newest: Path | None) -> int:
    """Load the checkpoint to go on from, if there is one; returns the number of steps already taken."""
    recorder = run.recorder
    for torn in resume.on_first_rank(lambda: checkpoint.list_torn(run.checkpoints)):
        recorder.warn("torn", f"checkpoint {torn} is not complete and will not be used", checkpoint=str(torn))
    step = checkpoint.step_of(newest)
    if newest is not None:
        run.watch.mark("loading the checkpoint", step, SLOW_LIMIT_S)
        resume.load(run.engine, newest)
        recorder.say(f"resumed from {newest}")
    recorder.forget_after(step)
    run.saver.step = step
    facts = {"checkpoint": str(newest)} if newest else {"identity": run.identity}
    recorder.event("resume" if newest else "start", step, world_size=run.inputs.world_size, **facts)
    return step


def undo(run: Run, spike: Spike) -> int | None:
    """Record a loss spike and, where the run is set to, go back before it; returns the step that was gone back to."""
    run.recorder.warn("spike", str(spike), **asdict(spike))
    if run.config.guard.on_spike == "record":
        return None
    run.saver.finish()
    run.saver.wait_for_deletions()
    run.watch.mark("loading the checkpoint", spike.step, SLOW_LIMIT_S)
    limit = run.config.guard.max_rollbacks
    if not rollback.prepare(run.out, run.checkpoints, spike, limit, run.identity):
        run.recorder.warn("no_rollback", "no checkpoint from before the spike: training goes on", step=spike.step)
        return None
    saved = undamaged(run.config, run.inputs, run.recorder)
    assert saved is not None
    resume.load(run.engine, saved)
    run.recorder.warn(
        "rollback", f"back to {saved}; steps {spike.step - 1} and {spike.step} are passed over", step=spike.step
    )
    run.saver.step = checkpoint.step_of(saved)
    run.recorder.forget_after(run.saver.step)
    sampling.forget_after(run, run.saver.step)
    return run.saver.step


def judge(run: Run, guard: Guard, metrics: dict[str, Any]) -> Spike | None:
    """The guard's verdict on a step. A checkpoint that is under way, of an earlier one, is finished before a stop.

    Raises:
        GuardStop: training must not go on; on every rank.
    """
    try:
        return guard.judge(metrics["step"], metrics["loss"], metrics["grad_norm"], metrics["applied"])
    except GuardStop:
        run.saver.finish()
        raise


def leave(run: Run, step: int, over_budget: str | None, stalled: Stalled | None) -> None:
    """Save what is not saved yet, and record why the run ends here.

    Raises:
        GateFailed: the drift budget is exceeded.
        Preempted: it was asked to stop before its last step.
    """
    run.watch.mark("saving", step, SLOW_LIMIT_S)
    if step != run.saver.step:
        run.saver.begin(step, None)
    run.saver.finish()
    run.stop.close()
    if over_budget is not None:
        rest = "raise it to go on" if step < run.inputs.total_steps else "run again to export the model all the same"
        raise GateFailed(
            f"probe after step {step}: {over_budget}; the step is saved: {rest}, or begin anew with less drift (a "
            "lower optim.lr, replay data)"
        )
    if stalled is not None:
        run.saver.wait_for_deletions()
        run.recorder.say(str(stalled))
        facts = {"best_step": stalled.best_step, "best_loss": stalled.best_loss}
        run.recorder.event("early_stop", step, reason=str(stalled), **facts)
        return
    if step < run.inputs.last_step:
        saved = f"step {step} of {run.inputs.total_steps} is saved" if step else "no step was taken"
        raise Preempted(f"{run.stop.reason}; {saved}; run the same command again to go on")
    run.saver.wait_for_deletions()
    run.recorder.event("finish" if step == run.inputs.total_steps else "stop", step)


def watch_over(meeting: Meeting, config: RunConfig, out: Path, recorder: Recorder) -> Watchdog:
    """The watchdog of this run."""
    lost_after_s, hang_after_s = config.guard.lost_after_s, config.guard.hang_after_s
    stacks = out / "stacks"
    return Watchdog(
        meeting.rank, meeting.world_size, lost_after_s, hang_after_s, recorder.last_words, stacks, meeting.store
    )


def ends_at_s(max_hours: float | None) -> float | None:
    """time.monotonic() of the end of the job's time, which began with the command that started this process."""
    if max_hours is None:
        return None
    own = psutil.Process()
    launchers = [parent for parent in own.parents() if _is_launcher(parent)]
    age_s = time.time() - min(process.create_time() for process in [own, *launchers])
    return time.monotonic() - age_s + max_hours * 3600


def _is_launcher(process: psutil.Process) -> bool:
    """sft train, sft.launch, or one of DeepSpeed's."""
    with suppress(psutil.Error):
        return not LAUNCHERS.isdisjoint(Path(word).name for word in process.cmdline())
    return False


def undamaged(config: RunConfig, inputs: RunInputs, recorder: Recorder) -> Path | None:
    """The newest checkpoint of this run, if there is one, each byte as it was written. Collective."""

    def tell(what: str, aside: Path) -> None:
        recorder.warn("damaged", what, checkpoint=str(aside))

    return resume.choose(lambda: find_resume(config, inputs), tell)


def announce(run: Run) -> None:
    """Say what is about to happen: the batch arithmetic, and what is held in which precision."""
    numerics = run.numerics
    lines = batch_arithmetic(run.config, run.inputs)
    lines += [f"{what:<24} {dtype}" for what, dtype in dtype_table(run.engine).items()]
    kernels = "liger" if numerics.liger else "torch"
    lines += [f"device {numerics.device.type}, attention {numerics.attention}, kernels {kernels}"]
    lines += [f"checkpoints     {run.saver.describe()}"]
    for line in lines:
        run.recorder.say(line)
