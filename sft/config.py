"""Every option, once, typed, with its default's reason; those of the other commands: in files of their own.

`sft.settings` turns a YAML file and `--section.key value` flags into these frozen objects.
Rules that need more than one field are validators here, so that every problem shows in one message.
"""

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator


class Section(BaseModel):
    """A frozen group of options in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take true for 1: `patience: true` would stop a run after one measurement."""
        holds_yes = any(isinstance(one, bool) for one in (value if isinstance(value, list) else [value]))
        if holds_yes and _takes_numbers(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError("must be a number")
        return value


def split_commas(value: Any) -> Any:
    """A list of the parts of a text between commas; anything else as it is."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def fraction_or_whole(value: float, unit: str) -> float:
    """`value`, which is a fraction below 1 or a whole number of `unit`s."""
    if value >= 1 and value != int(value):
        raise ValueError(f"must be a fraction below 1 or a whole number of {unit}")
    return value


def _takes_numbers(annotation: Any) -> bool:
    return annotation in (int, float) or any(_takes_numbers(part) for part in get_args(annotation))


PositiveInt = Annotated[int, Field(gt=0)]
Steps = Annotated[int, Field(gt=0, le=10**12)]
"""More would be beyond the whole numbers of the arrays and files that steps are counted in."""
ShardGb = Annotated[float, Field(gt=0, le=1e9)]
Fraction = Annotated[float, Field(ge=0, le=1)]


# Training


class ModelSection(Section):
    path: str
    """Folder of the base model: config.json, safetensors weights and its tokenizer."""
    attention: Literal["auto", "flash_attention_2", "varlen", "sdpa"] = "auto"
    """flash_attention_2: the flash-attn package; varlen: PyTorch's own variable-length kernel; sdpa: one
    scaled-dot-product call per document, on any device; auto: the first of these that can run here."""
    activation_checkpointing: Literal["full", "none"] = "full"
    """full: keep one activation per layer, recompute the rest in backward (1/3 more compute, far less memory)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute dtype. auto: bf16 on GPUs and on CPUs with bf16 units, else fp32. Master weights are always fp32."""
    kernels: Literal["auto", "torch", "liger"] = "auto"
    """RMSNorm, SwiGLU and RoPE kernels. auto: liger-kernel on a GPU where it is installed, else torch."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Probability that training drops an attention weight; null: what config.json says, which is 0 for Llama."""
    mlp_tiles: PositiveInt = 1
    """Pieces of a micro-batch that each MLP computes one after the other (ALST, Bekman et al. 2025): less memory for
    long documents, at the price of one more forward of the MLPs. Never changes the update."""


class DataSection(Section):
    train: str
    """Shard folder written by `sft prep`: <prep out>/train."""
    heldout: str | None = None
    """Shard folder for held-out loss: <prep out>/heldout; null: none is measured."""
    seed: int = 0
    """Seed of the order of packs; each epoch has its own permutation."""


class BatchSection(Section):
    rows_per_step: Annotated[int, Field(gt=0, le=10_000_000)] = 128
    """GLOBAL packs per optimizer step; accumulation = rows_per_step / (ranks x micro_batch)."""
    micro_batch: PositiveInt | Literal["auto"] = 1
    """Packs in one forward of one rank, laid end to end. Changes memory and speed, never the update. auto: as many as
    fit, found by trial on the longest packs at the start."""
    sequence_parallel: PositiveInt = 1
    """Ranks that share each pack (DeepSpeed Ulysses, Jacobs et al. 2023): each takes a part of its tokens, and of the
    heads in attention. For documents too long for one GPU; must divide the ranks and the heads. Never changes the
    update."""


class EarlyStopSection(Section):
    patience: PositiveInt | None = None
    """End the run after this many measurements of the held-out loss in a row (one each eval.every steps) without a new
    lowest; null: never. The model with the lowest loss among the checkpoints is exported, however the run ends."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """A new lowest lies below the last by more than this, in nats per label."""


class TrainSection(Section):
    epochs: Annotated[int, Field(gt=0, le=1_000_000)] = 3
    """Passes over the packs; ignored where max_steps is set."""
    max_steps: Steps | None = None
    """Optimizer steps of the whole run (the schedule spans them); null: from epochs."""
    stop_after: PositiveInt | None = None
    """Save and leave after this step; the schedule still spans the whole run. Run again to go on."""
    early_stop: EarlyStopSection = EarlyStopSection()
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that goes to all tokens of the vocabulary alike (Szegedy et al. 2016); 0.1 is the classic. In
    the training loss only, not in held-out loss and probes."""
    neftune_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Uniform noise on the embeddings in training, at most alpha / sqrt(length of the document x hidden size) (NEFTune,
    Jain et al. 2024); 5 is the paper's choice."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the weights, too, exported as a model of its own; 0.999 looks back about
    1,000 steps. 4 bytes per parameter, spread over the ranks. null: none."""


class LrMultiplier(Section):
    match: str
    """Regular expression; it holds for every parameter in whose name it is found (re.search)."""
    factor: Annotated[float, Field(ge=0)] = 1.0
    """Learning rate of these parameters, as a multiple of the others'; 0 keeps them as they are."""
    start: Annotated[float, Field(ge=0)] = 0.0
    """Until then they are kept as they are (progressive unfreezing): a fraction of all steps below 1, else a step."""

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return value

    @field_validator("start")
    @classmethod
    def _whole_steps(cls, value: float) -> float:
        return fraction_or_whole(value, "steps")


class OptimSection(Section):
    name: Literal["adamw", "lion", "sgd"] = "adamw"
    """adamw (Loshchilov & Hutter 2019); lion (Chen et al. 2023; extra lowbit): one moment, at a third to a tenth of
    AdamW's lr, betas 0.9, 0.99; sgd with momentum betas[0]."""
    states: Literal["fp32", "bf16", "8bit"] = "fp32"
    """What the moments are held in; master weights are always fp32. bf16: 2 bytes each; 8bit: 1, in blocks with a scale
    (Dettmers et al. 2022; adamw and sgd; extra lowbit)."""
    lr: Annotated[float, Field(gt=0)] = 2.0e-5
    """Peak learning rate; 1e-5 to 2e-5 is usual for full-parameter SFT of 7B-13B models."""
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], BeforeValidator(split_commas)
    ] = (0.9, 0.95)
    """Decay of the first and second moment; 0.95 forgets a gradient spike sooner than the classic 0.999."""
    eps: Annotated[float, Field(gt=0)] = 1.0e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled decay per unit of learning rate, for matrices only; of sgd: a part of the gradient."""
    no_decay: Annotated[list[str], BeforeValidator(split_commas)] = ["embed", "norm", "bias"]
    """Parameters whose name holds one of these strings are not decayed; one-dimensional ones never are."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each layer's learning rate as a multiple of that of the layer above (Howard & Ruder 2018; as in ELECTRA, the head
    has 1 and the embedding is one below the first layer). 1: all the same."""
    multipliers: list[LrMultiplier] = []
    """Learning rates of parameters by name: {match: 'layers\\.[0-7]\\.', factor: 0.5, start: 0.3}; where several hold,
    their product."""
    l2_sp: Annotated[float, Field(ge=0)] = 0.0
    """Pull towards the base model's weights per unit of learning rate (L2-SP, Li et al. 2018), decoupled from the
    gradient like weight decay, which it is meant to replace: weights come to rest within about 1 / l2_sp of the base.
    4 more bytes per parameter, spread over the ranks."""
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


class ScheduleSection(Section):
    name: Literal["cosine", "linear", "constant", "cosine_restarts"] = "cosine"
    """Shape after the warm-up."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Linear warm-up: a fraction of all steps below 1, else a number of steps."""
    min_lr_ratio: Fraction = 0.1
    """The floor, as a fraction of lr."""
    cycles: PositiveInt = 1
    """Number of equal cosine cycles; cosine_restarts only."""

    @field_validator("warmup")
    @classmethod
    def _whole_steps(cls, value: float) -> float:
        return fraction_or_whole(value, "steps")


class CheckpointSection(Section):
    every: PositiveInt = 500
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep_last: PositiveInt = 2
    """Newest complete checkpoints kept."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest held-out loss."""
    keep_every: PositiveInt | None = None
    """Also keep every checkpoint whose step is a multiple of this, for ever; null: none."""


class GuardSection(Section):
    max_skipped: PositiveInt = 3
    """Steps in a row whose loss or gradient is not finite before the run stops; none of them changes the weights."""
    on_spike: Literal["record", "rollback"] = "record"
    """A loss far above the usual: written to events.jsonl; or also undone: back to the last checkpoint, and past the
    offending batches."""
    spike_window: Annotated[int, Field(ge=8, le=100_000)] = 100
    """Steps whose losses say what is usual."""
    spike_deviations: Annotated[float, Field(gt=0)] = 10.0
    """A spike lies this many robust standard deviations (1.4826 x median absolute deviation) above the median."""
    max_rollbacks: PositiveInt = 3
    """Rollbacks of one run before it stops."""
    arrive_after_s: Annotated[float, Field(ge=1, le=1e6)] = 600.0
    """At the start, ranks wait so long for the last one to come (a pod may have an image to load), then name it and
    stop."""
    lost_after_s: Annotated[float, Field(ge=1, le=1e6)] = 60.0
    """A rank without a sign of life for this long is lost, and the others stop."""
    hang_after_s: Annotated[float, Field(ge=1, le=1e6)] = 900.0
    """A rank that lives but does not get on with a forward, update or save for this long stops the run."""


class ProbeShotsSection(Section):
    mmlu: Annotated[int, Field(ge=0, le=5)] = 5
    """Solved examples before each MMLU question."""
    hellaswag: Annotated[int, Field(ge=0)] = 0
    """Solved examples before each HellaSwag item."""


class ProbeSection(Section):
    data: str | None = None
    """Folder that holds MMLU and HellaSwag, as for `sft eval`: a fixed part of them is asked before the first step and
    while training goes on; null: no probe."""
    tasks: Annotated[list[Literal["mmlu", "hellaswag"]], BeforeValidator(split_commas), Field(min_length=1)] = [
        "mmlu",
        "hellaswag",
    ]
    """Tasks, separated by commas."""
    shots: ProbeShotsSection = ProbeShotsSection()
    items: PositiveInt = 200
    """Items of each task, spread evenly over all it has. 200 show a drop of 6 points four times in five."""
    every: PositiveInt = 500
    """Optimizer steps between two probes (and at the last step)."""
    max_drop: Fraction | None = None
    """Save and stop, with exit code 3, once a task is shown to have dropped by more than this since the base model
    (0.02 = two points; one-sided 95 %); null: only measure."""


class SamplesSection(Section):
    prompts: str | None = None
    """File of prompts that are answered before the first step and while training goes on: .txt with an instruction per
    line, or .json or .jsonl with Alpaca rows; null: none."""
    every: PositiveInt = 500
    """Optimizer steps between two times (and at the last step)."""
    max_new_tokens: PositiveInt = 128
    """Longest answer in tokens. Each token is one forward of every rank."""


class EvalSection(Section):
    every: PositiveInt = 500
    """Optimizer steps between measurements of the held-out loss (and at the last step)."""
    probe: ProbeSection = ProbeSection()
    samples: SamplesSection = SamplesSection()


class TrackSection(Section):
    wandb: Literal["off", "offline", "online"] = "offline"
    """offline writes to <out>/wandb for a later `wandb sync`; online needs a network and WANDB_API_KEY."""
    project: str = "sft"
    """wandb project name."""
    tensorboard: bool = False
    """Also write TensorBoard events to <out>/tensorboard (extra: tensorboard)."""


class RunConfig(Section):
    model: ModelSection
    data: DataSection
    batch: BatchSection = BatchSection()
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    schedule: ScheduleSection = ScheduleSection()
    deepspeed: str = "zero3"
    """A DeepSpeed JSON file, or the name of a shipped one: zero1, zero2, zero3, zero3_offload_optimizer,
    zero3_offload_all."""
    checkpoint: CheckpointSection = CheckpointSection()
    guard: GuardSection = GuardSection()
    eval: EvalSection = EvalSection()
    track: TrackSection = TrackSection()
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Save and leave in time for this many hours after the start: the job's wall-clock limit; exit code 75."""
    lr_finder: bool = False
    """Instead of training: raise the learning rate step by step from 1e-8, record the loss, and suggest an optim.lr
    (Smith 2017). Writes <out>/lr-finder.json and .png, and leaves the weights as they were."""
    out: str
    """Folder of this run; running the same command again resumes from its newest complete checkpoint."""

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if isinstance(self.batch.micro_batch, int) and self.batch.rows_per_step % self.batch.micro_batch:
            raise ValueError(
                f"batch.rows_per_step {self.batch.rows_per_step} must be a multiple of "
                f"batch.micro_batch {self.batch.micro_batch}"
            )
        if self.schedule.cycles > 1 and self.schedule.name != "cosine_restarts":
            raise ValueError(f"schedule.cycles {self.schedule.cycles} needs schedule.name cosine_restarts")
        if self.train.early_stop.patience is not None and self.data.heldout is None:
            raise ValueError(
                f"train.early_stop.patience {self.train.early_stop.patience} needs data.heldout: the shards whose loss "
                "says when to stop"
            )
        if self.train.early_stop.min_delta and self.train.early_stop.patience is None:
            raise ValueError(
                f"train.early_stop.min_delta {self.train.early_stop.min_delta} needs train.early_stop.patience: how "
                "many measurements without a new lowest end the run"
            )
        if self.optim.lr * self.optim.l2_sp >= 1:
            raise ValueError(
                f"optim.l2_sp {self.optim.l2_sp:g} x optim.lr {self.optim.lr:g} is 1 or more: the pull would overshoot "
                "the base; lower l2_sp"
            )
        if self.eval.probe.max_drop is not None and self.eval.probe.data is None:
            raise ValueError(
                f"eval.probe.max_drop {self.eval.probe.max_drop} needs eval.probe.data: where MMLU and HellaSwag are"
            )
        return self


def defaults(identity: dict[str, Any]) -> dict[str, Any]:
    """Of the options of a run among the keys of its identity: what a version did that did not know them."""
    found = {}
    for key in identity:
        section, _, name = key.partition(".")
        if name:
            fields = RunConfig.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
            if not fields[name].is_required():
                found[key] = fields[name].get_default(call_default_factory=True)
    return found


class BlameConfig(Section):
    run: str
    """Run folder."""
    step: PositiveInt
    """Optimizer step, counted from 1 as in metrics.jsonl."""


# Export


class ExportConfig(Section):
    run: str
    """Run folder (its newest complete checkpoint), or one checkpoint folder."""
    ema: bool = False
    """The moving average of the weights (train.ema_decay) instead of the weights."""
    average: Annotated[int, Field(ge=2)] | None = None
    """The mean of the weights of the last so many complete checkpoints (Izmailov et al. 2018)."""
    out: str | None = None
    """Folder to create; default: <run>/export, -ema or -average-N behind it, and -step-… before the run's end."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """dtype of the exported weights; auto: the dtype the model was computed in."""
    max_shard_gb: ShardGb = 5.0
    """Largest safetensors file in GB (10^9 bytes); also bounds the host memory in use."""


# The demonstration


class DemoConfig(Section):
    out: str = "runs/demo"
    """Folder for everything the demonstration makes."""
    ranks: Annotated[int, Field(ge=1, le=2)] = 2
    """CPU ranks of the ZeRO-3 training, 1 or 2: its steps have 6 and 8 rows."""
