"""The only assembler of a DeepSpeed engine: the user's strategy file plus what the run config owns."""

import importlib.util
import json
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfigError

from sft import ema, l2_sp
from sft.attention import choose_kernel, register
from sft.config import RunConfig
from sft.errors import UserError
from sft.model import PackedCausalLM, attention_dropout, load_model, regularise
from sft.optim import MOMENTS_DTYPE, build_optimizer
from sft.pretrained import choose_dtype, load_causal_lm
from sft.rendezvous import Meeting
from sft.tiled_mlp import tile_mlps
from sft.zero_state import flat_tensors, make_states

OWNED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "managed_gradient_accumulation",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "torch_autocast",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "wandb",
    "tensorboard",
    "csv_monitor",
)
"""Keys of a DeepSpeed file whose value follows from the run config; in the file they are an error."""

GROUP_TIMEOUT = timedelta(hours=2)
"""Longer than anything that sft.watchdog waits for: it names the rank, and a group's own timeout aborts every rank."""


@dataclass(frozen=True)
class Numerics:
    """What a run computes in and with."""

    device: torch.device
    dtype: torch.dtype
    attention: str
    liger: bool


def read_strategy(name: str) -> dict[str, Any]:
    """A DeepSpeed JSON file, by path or by the name of a shipped one.

    Raises:
        UserError: no such file, not JSON, holds "auto" or a key that the run config owns, or is no ZeRO
            in GPU and host memory.
    """
    path = _find_strategy(name)
    try:
        strategy = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"deepspeed {path}: not valid JSON: {error}") from None
    if not isinstance(strategy, dict):
        raise UserError(f"deepspeed {path}: must hold a JSON object")
    if owned := [key for key in OWNED_KEYS if key in strategy]:
        raise UserError(f"deepspeed {path}: remove {', '.join(owned)}: the run config decides it")
    if autos := sorted(_paths_of_auto(strategy)):
        raise UserError(f'deepspeed {path}: {", ".join(autos)} is "auto"; write the number (see ds_configs/README.md)')
    zero = strategy.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        raise UserError(f"deepspeed {path}: zero_optimization.stage must be 1, 2 or 3")
    for part in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(part) or {}, dict):
            raise UserError(f'deepspeed {path}: {part} must be an object, as in {{"device": "cpu"}}')
        if (device := (zero.get(part) or {}).get("device", "none")) not in ("none", "cpu"):
            raise UserError(f"deepspeed {path}: {part}.device '{device}' is not supported; use cpu")
        if other := [key for key in ("ratio", "super_offload") if key in (zero.get(part) or {})]:
            raise UserError(f"deepspeed {path}: {part}.{other[0]} is not supported: its checkpoints would be wrong")
    if "zenflow" in zero:
        raise UserError(f"deepspeed {path}: zenflow is not supported: it changes the update")
    return strategy


def choose_device() -> torch.device:
    """This rank's device, made the current one.

    Raises:
        UserError: there are fewer GPUs than ranks on this host, or this one cannot be used.
    """
    # not torch.cuda.is_available(): on a GPU host the launcher makes the GPUs visible to ranks that were asked for CPU
    if get_accelerator().device_name() != "cuda":
        # what DeepSpeed's launcher sets; without it, DeepSpeed looks for numactl at every step to count CPUs
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    try:
        torch.cuda.set_device(device)
    except RuntimeError as error:
        raise UserError(
            f"rank {os.environ.get('RANK', '0')} on {os.uname().nodename}: cannot use GPU {device.index} of the "
            f"{torch.cuda.device_count()} that are visible there ({' '.join(str(error).split())[:160]}); compare the "
            "number of ranks, and look with nvidia-smi"
        ) from error
    return device


def join(meeting: Meeting) -> torch.device:
    """Make the process group of ranks that have met; returns this rank's device.

    Raises:
        UserError: no such device; or the hosts do not reach each other over TCP.
    """
    _prepare_deepspeed()
    device = choose_device()
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=meeting.store,
            rank=meeting.rank,
            world_size=meeting.world_size,
            timeout=GROUP_TIMEOUT,
        )
    except RuntimeError as error:
        if "gloo" not in str(error).lower():
            raise
        raise UserError(
            f"rank {meeting.rank} on {os.uname().nodename}: no TCP connection with the others "
            f"({str(error).splitlines()[0][:160]}); unless one of them has ended, name the network interface in "
            "GLOO_SOCKET_IFNAME"
        ) from error
    deepspeed.init_distributed(verbose=False)  # takes the group that is there
    return device


def choose_numerics(config: RunConfig, device: torch.device, model_config: dict[str, Any]) -> Numerics:
    """Device, dtype, attention kernel and layer kernels; `auto` resolved, explicit wishes checked.

    Raises:
        UserError: a wish cannot be met on this device.
    """
    dtype = choose_dtype(config.model.precision, device)
    dropout = attention_dropout(config.model, model_config)
    attention = choose_kernel(config.model.attention, device, dtype, dropout)
    has_liger = device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    if config.model.kernels == "liger" and not has_liger:
        raise UserError("model.kernels liger: needs a GPU and the liger-kernel package; use torch")
    liger = has_liger and config.model.kernels != "torch"  # it has kernels for each of sft.model.FAMILIES
    return Numerics(device, dtype, attention, liger)


def build_engine(config: RunConfig, strategy: dict[str, Any], numerics: Numerics) -> deepspeed.DeepSpeedEngine:
    """Load the base model and wrap it: partitioned, with optimizer and its state, ready for `engine(micro_batch)`."""
    settings = engine_settings(config, strategy, numerics)
    model = _load(config, settings, numerics)
    offload = settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    optimizer = build_optimizer(
        model, config.optim, on_cpu_beside_gpu=offload == "cpu" and numerics.device.type == "cuda"
    )
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    except (DeepSpeedConfigError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"deepspeed {config.deepspeed}: DeepSpeed refuses it: {reason}") from error
    make_states(engine.optimizer, MOMENTS_DTYPE[config.optim.states])
    if config.optim.l2_sp:
        l2_sp.attach(engine.optimizer, config.optim.l2_sp)
    if config.train.ema_decay is not None:
        ema.attach(engine.optimizer)  # behind the pull: it averages what an update has made
    # DeepSpeed's own groups are clones of the world's that do not inherit its timeout
    for group in {engine.optimizer.dp_process_group, engine.seq_data_parallel_group}:
        dist.distributed_c10d._set_pg_timeout(GROUP_TIMEOUT, group)
    wrong = [
        name for name, buffer in engine.module.named_buffers() if "inv_freq" in name and buffer.dtype != torch.float32
    ]
    assert not wrong, f"rotary frequencies must stay fp32, got {wrong}"
    return engine


def partition_for_inference(folder: str, *, dtype: torch.dtype, attention: str) -> deepspeed.DeepSpeedEngine:
    """A transformers causal LM whose weights are spread over the ranks of the group that has been joined.

    Its `module` is called like any other, by all ranks equally often: every layer is gathered for each forward.
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    _prepare_deepspeed()
    deepspeed.init_distributed(verbose=False)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": 3},
        "steps_per_print": 10**9,
    }
    alive = HfDeepSpeedConfig(settings)
    model = load_causal_lm(folder, dtype=dtype, attention=attention)
    del alive
    unset_hf_deepspeed_config()
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    return engine


def engine_settings(config: RunConfig, strategy: dict[str, Any], numerics: Numerics) -> dict[str, Any]:
    """The complete DeepSpeed config. Accumulation is ours, one step() per optimizer step: nothing divides behind us."""
    return {
        "data_types": {"grad_accum_dtype": "fp32"},  # left out, DeepSpeed would add bf16 gradients up in bf16
        "communication_data_type": "fp32",
        **strategy,
        "train_micro_batch_size_per_gpu": 1,  # one row of packs laid end to end: what DeepSpeed only reports
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": float(config.optim.grad_clip),  # left out, DeepSpeed 0.19 would clip at 1.0
        "bf16": {"enabled": numerics.dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": numerics.device.type == "cuda",
        "steps_per_print": 10**9,
    }


def data_parallel_size(engine: deepspeed.DeepSpeedEngine) -> int:
    """W of the gradient average that ZeRO takes; the loss is multiplied by it, so that the sum remains."""
    return dist.get_world_size(engine.optimizer.dp_process_group)


def dtype_table(engine: deepspeed.DeepSpeedEngine) -> dict[str, str]:
    """What is held in which precision: compute weights, gradients, communication, master weights, optimizer."""
    model_dtype, accumulation = engine.get_data_types()
    return {
        "weights (compute)": str(model_dtype),
        "gradient accumulation": str(accumulation),
        "gradient communication": str(engine.communication_data_type),
        "master weights": str(flat_tensors(engine.optimizer)[0].dtype),
        "optimizer": type(engine.optimizer.optimizer).__name__,
    }


def _load(config: RunConfig, settings: dict[str, Any], numerics: Numerics) -> PackedCausalLM:
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    partitioned = settings["zero_optimization"]["stage"] == 3
    # transformers partitions weights on arrival while this object is alive
    alive = HfDeepSpeedConfig(settings) if partitioned else None
    model = load_model(
        config.model.path,
        dtype=numerics.dtype,
        attention=register(numerics.attention),
        checkpointing=config.model.activation_checkpointing == "full",
        liger=numerics.liger,
    )
    regularise(model, config.model, config.train)
    if config.model.mlp_tiles > 1:
        for mlp in tile_mlps(model.hf, config.model.mlp_tiles):
            deepspeed.utils.set_z3_leaf_module(mlp, True)  # gathered as a whole, once for all pieces
    if alive is not None:
        unset_hf_deepspeed_config()
        whole = [name for name, parameter in model.named_parameters() if not hasattr(parameter, "ds_id")]
        assert not whole, f"not partitioned on load: {whole[:3]}"
        return model
    return model.to(numerics.device)


def _prepare_deepspeed() -> None:
    # DeepSpeed 0.19.8 calls collectives that torch 2.13 has renamed
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor).*")
    # the shared-memory op would be compiled on first use; a build that is killed leaves a lock that hangs later starts
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _find_strategy(name: str) -> Path:
    given = Path(name)
    if given.is_file():
        return given
    here = Path(__file__).parent
    folders = [here / "ds_configs", here.parent / "ds_configs"]  # installed, or run from the repository
    shipped = {file.stem: file for folder in folders for file in sorted(folder.glob("*.json"))}
    if given.stem in shipped and given.parent.name in ("", "ds_configs"):
        return shipped[given.stem]
    raise UserError(f"deepspeed {name}: no such file; shipped: {', '.join(shipped)}")


def _paths_of_auto(value: Any, prefix: str = "") -> list[str]:
    if isinstance(value, dict):
        return [path for key, item in value.items() for path in _paths_of_auto(item, f"{prefix}{key}.")]
    if isinstance(value, list):
        return [path for index, item in enumerate(value) for path in _paths_of_auto(item, f"{prefix}{index}.")]
    return [prefix.rstrip(".")] if value == "auto" else []
