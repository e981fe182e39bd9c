"""Does overlap_comm give the same gradients on this cluster, and how much faster is it?

Open reports of zero losses and NaN norms stand against it (DeepSpeed issues 4298, 5242, 7188), and such a race depends
on GPUs, driver, NCCL and network: so a small random Llama is trained here with the run's own DeepSpeed file, optimizer
and kernels, three times from the same seed on the same data: without, without again, with. The second run is the
control: what two runs differ by that should be equal (kernels that add in no fixed order) is no fault of overlap_comm.
"""

import copy
import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from sft import batch, zero_state
from sft.config import RunConfig
from sft.doctor.finding import Finding
from sft.doctor.group import Group
from sft.doctor.network import bounded
from sft.doctor.options import DoctorSection
from sft.doctor.overlap_verdict import CHECK, Difference, Trained, judge, largest_relative
from sft.engine import Numerics, build_engine, choose_numerics, data_parallel_size, read_strategy
from sft.errors import UserError

WARM_UP = 2
"""Steps whose time is not counted: DeepSpeed records the order of the layers in the first."""
MICRO_BATCHES = 2
"""Of a step: gradients are also added to what is there."""


@dataclass(frozen=True)
class Size:
    """Of the model that is trained, and of its data."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    document: int
    """Tokens; a micro-batch is two documents."""
    steps: int

    @property
    def layer_parameters(self) -> int:
        """Elements of a decoder layer's matrices."""
        return 4 * self.hidden**2 + 3 * self.hidden * self.intermediate


ON_CPU = Size(hidden=64, intermediate=128, layers=2, heads=4, vocabulary=256, document=32, steps=3)
ON_GPU = Size(hidden=2048, intermediate=5632, layers=8, heads=16, vocabulary=8192, document=1024, steps=12)
"""4.4e8 parameters: layers as wide as those of a 1B model, so that a layer's gather lasts as long as its product."""


def measure(group: Group, config: RunConfig, device: torch.device, options: DoctorSection) -> list[Finding]:
    """Train three times and compare. Collective; the process group exists, and every rank of a host sees its files.

    Raises:
        RankLost: a rank did not come along within options.limit_s, or a connection broke.
    """
    strategy, problem = _strategy(config, group.world_size, device)
    problems = group.gather("overlap: is there something to measure", None if problem is None else vars(problem))
    first_problem = next((told for told in problems if told is not None), None)
    if first_problem is not None:
        return [Finding(**first_problem)]
    assert strategy is not None
    size = ON_GPU if device.type == "cuda" else ON_CPU
    with _model_folder(group, size) as folder:
        if folder is None:
            return [_no_room(group)]
        small = config.model_copy(update={"model": config.model.model_copy(update={"path": folder})})
        numerics = choose_numerics(small, device, {})
        with bounded(group, "training a small model"):
            return [_compare(group, small, numerics, strategy, size, options.limit_s)]


def _strategy(config: RunConfig, world_size: int, device: torch.device) -> tuple[dict[str, Any] | None, Finding | None]:
    """The run's DeepSpeed file, or why there is nothing to measure."""
    if world_size == 1:
        return None, Finding(CHECK, "skip", "all ranks", "there is one rank: nothing to overlap")
    try:
        strategy = read_strategy(config.deepspeed)
        choose_numerics(config, device, {})
    except UserError as error:
        return None, Finding(CHECK, "skip", "all ranks", f"cannot be told: {error}")
    zero = strategy["zero_optimization"]
    if zero["stage"] == 1 and zero.get("overlap_comm"):
        text = f"overlap_comm is true in {config.deepspeed}, and DeepSpeed refuses it for ZeRO-1"
        return None, Finding(CHECK, "fail", "all ranks", text, "set zero_optimization.overlap_comm to false")
    if zero["stage"] == 1:
        return None, Finding(CHECK, "skip", "all ranks", "DeepSpeed refuses overlap_comm for ZeRO-1")
    return strategy, None


def _compare(
    group: Group, config: RunConfig, numerics: Numerics, strategy: dict[str, Any], size: Size, limit_s: float
) -> Finding:
    zero = strategy["zero_optimization"]
    wanted = zero.get("overlap_comm")
    wanted = zero["stage"] == 3 if wanted is None else bool(wanted)  # DeepSpeed's default
    off, first, start = _train(config, scaled(strategy, size, overlap_comm=False), numerics, size, limit_s)
    again, second, _ = _train(config, scaled(strategy, size, overlap_comm=False), numerics, size, limit_s)
    on, third, _ = _train(config, scaled(strategy, size, overlap_comm=True), numerics, size, limit_s)
    own = [_squared(first, second), _squared(first, third), _squared(first, start)]
    control, with_it, change = np.sum(group.gather("overlap: weights apart", own), axis=0)
    return judge(
        wanted=wanted,
        off=Trained(off.losses, off.norms, (off.step_s + again.step_s) / 2),
        on=on,
        control=_difference(off, again, control, change),
        difference=_difference(off, on, with_it, change),
        dtype=numerics.dtype,
        file=config.deepspeed,
        has_streams=numerics.device.type == "cuda",
    )


def scaled(strategy: dict[str, Any], size: Size, *, overlap_comm: bool) -> dict[str, Any]:
    """The file with overlap_comm as given, and portions in proportion to the small model's layers.

    With the portions of a large model the small one would be gathered once and reduced at once: nothing to overlap.
    """
    scaled_strategy = copy.deepcopy(strategy)
    zero = scaled_strategy["zero_optimization"]
    zero["overlap_comm"] = overlap_comm
    portions = {"reduce_bucket_size": 1}
    if zero["stage"] == 3:
        portions |= {
            "stage3_prefetch_bucket_size": 1,
            "stage3_max_live_parameters": 3,
            "stage3_max_reuse_distance": 3,
        }
        persistent = zero.get("stage3_param_persistence_threshold", 100_000)
        zero["stage3_param_persistence_threshold"] = min(persistent, size.hidden)
    for name, layers in portions.items():
        zero[name] = min(zero.get(name, 10**9), layers * size.layer_parameters)
    return scaled_strategy


def _train(
    config: RunConfig, strategy: dict[str, Any], numerics: Numerics, size: Size, limit_s: float
) -> tuple[Trained, list[torch.Tensor], list[torch.Tensor]]:
    """Train from the seed; (what was seen, this rank's part of the fp32 weights after it, and before it)."""
    engine = build_engine(config, strategy, numerics)
    # a hang is one of the faults that are looked for: it must end with this check's limit, not a run's
    for process_group in {dist.group.WORLD, engine.optimizer.dp_process_group, engine.seq_data_parallel_group}:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=limit_s), process_group)
    start = _own_weights(engine)
    losses, norms, times_s = [], [], []
    engine.train()
    for step in range(size.steps):
        parts = [_micro_batch(size, step, index, numerics.device) for index in range(MICRO_BATCHES)]
        labels = dist.get_world_size() * sum(len(part.targets_N) for part in parts)
        dist.barrier()
        started_s = time.perf_counter()
        total = torch.zeros((), device=numerics.device)
        for part in parts:
            loss, _ = engine(part)
            engine.backward(loss * (data_parallel_size(engine) / labels), scale_wrt_gas=False)
            total += loss.detach()
        engine.step()
        dist.all_reduce(total)
        losses.append(total.item() / labels)
        norms.append(float(engine.get_global_grad_norm()) if engine.was_step_applied() else float("inf"))
        times_s.append(time.perf_counter() - started_s)
    end = _own_weights(engine)
    engine.destroy()
    del engine
    gc.collect()
    if numerics.device.type == "cuda":
        torch.cuda.empty_cache()
    return Trained(losses, norms, median(times_s[WARM_UP:])), end, start


def _micro_batch(size: Size, step: int, index: int, device: torch.device) -> batch.MicroBatch:
    """Two random documents, other ones for every rank, step and micro-batch."""
    generator = np.random.RandomState([dist.get_rank(), step, index])
    documents = [generator.randint(0, size.vocabulary, size.document) for _ in range(2)]
    return batch.build([(ids, ids) for ids in documents], device)


def _own_weights(engine: Any) -> list[torch.Tensor]:
    return [flat.detach().float().to("cpu", copy=True) for flat in zero_state.flat_tensors(engine.optimizer)]


def _squared(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Squared L2 distance of this rank's weights."""
    return sum(float((a - b).double().square().sum()) for a, b in zip(one, other, strict=True))


def _difference(one: Trained, other: Trained, weights: float, change: float) -> Difference:
    return Difference(
        losses=largest_relative(one.losses, other.losses),
        norms=largest_relative(one.norms, other.norms),
        weights=float((weights / change) ** 0.5) if change else float("inf"),
    )


@contextmanager
def _model_folder(group: Group, size: Size) -> Iterator[str | None]:
    """A folder with the random model, one per host, gone afterwards; None where a host had no room for it."""
    if group.local_rank != 0:
        yield _shared_folder(group, None)
        group.gather("overlap: done with the model", None)
        return
    with tempfile.TemporaryDirectory(prefix="sft-doctor-", ignore_cleanup_errors=True) as folder:
        try:
            _write_model(Path(folder), size)
            written: str | None = folder
        except OSError:
            written = None
        yield _shared_folder(group, written)
        group.gather("overlap: done with the model", None)


def _shared_folder(group: Group, written: str | None) -> str | None:
    told = group.gather("overlap: model", [group.local_rank == 0, written])
    places = group.meeting.places
    folders = {places[rank].host: folder for rank, (wrote, folder) in enumerate(told) if wrote}
    return folders[group.host] if None not in folders.values() else None


def _no_room(group: Group) -> Finding:
    text = "not measured: the small model could not be written to the temporary folder of every host"
    return Finding(CHECK, "warn", "all ranks", text, f"free 2 GiB in {tempfile.gettempdir()}, or set TMPDIR")


def _write_model(folder: Path, size: Size) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.document,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(settings)
    model.to(torch.bfloat16)
    # model.save_pretrained writes on global rank 0 alone where a process group exists
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
