"""Every option, once, typed, with its default's reason; those of `sft augment`, `sft eval`, `sft drift`: beside them.

`sft.settings` turns a YAML file and `--section.key value` flags into these frozen objects.
Rules that need more than one field are validators here, so that every problem shows in one message.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """A frozen group of options in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def split_commas(value: Any) -> Any:
    """A list of the parts of a text between commas; anything else as it is."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _as_sources(value: Any) -> Any:
    entries = split_commas(value)
    if not isinstance(entries, list):
        return entries
    return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]


def _fraction_or_whole(value: float, unit: str) -> float:
    if value >= 1 and value != int(value):
        raise ValueError(f"must be a fraction below 1 or a whole number of {unit}")
    return value


PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


# Data preparation


class Source(Section):
    path: str
    """.json (one array of objects) or .jsonl (one object per line), each also .gz or .zst; .parquet; a folder or glob
    of these; or a folder that `datasets` saved."""
    name: str | None = None
    """Name in the report and the manifest; default: the stem of the path."""
    format: Literal["alpaca", "messages", "sharegpt", "text"] = "alpaca"
    """alpaca: instruction, input, output (or response), and perhaps system and history; messages: a list of {role,
    content}; sharegpt: conversations, a list of {from, value}; text: one field `text`, all of it supervised."""
    columns: dict[str, str] = {}
    """The source's own names of fields, by the format's names: {instruction: question, output: answer}."""
    train_on: Literal["all", "last"] = "all"
    """Which of the assistant's turns are supervised."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often each row is used: 2.0 = twice, 0.25 = a seeded quarter of the rows."""
    role: Literal["data", "replay"] = "data"
    """replay: rows that rehearse what the model already knows; `ratio` says how many of them are used."""
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Replay only: this source's share of the final training tokens; rows are sampled, or repeated, to reach it."""
    balance_by: str | None = None
    """Field whose values shall be equally frequent: rows of the more frequent ones are sampled down to the rarest."""

    @model_validator(mode="after")
    def _replay_needs_ratio(self) -> "Source":
        if (self.role == "replay") != (self.ratio is not None):
            raise ValueError("role: replay and ratio go together; give both, or neither")
        if self.role == "replay" and self.weight != 1:
            raise ValueError("weight: a replay source is used as often as its ratio says; leave weight out")
        return self


class FilterSection(Section):
    garbled: bool = True
    """Drop rows with U+FFFD, control characters, or text that was decoded with the wrong encoding (mojibake)."""
    refusals: str = "none"
    """none; default = drop responses that match the built-in list of refusals and boiler-plate; or a text file of your
    own, one regular expression per line."""
    max_repetition: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Drop responses of which a larger share than this is repeated n-grams; 0.3 is a common choice."""
    min_response_tokens: PositiveInt = 1
    """Drop rows with fewer supervised text tokens (stop tokens do not count)."""
    max_response_tokens: PositiveInt | None = None
    """Drop rows with more supervised text tokens."""


class NearSection(Section):
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Rows whose estimated Jaccard similarity is at least this are one cluster, of which the first row is kept."""
    ngram: PositiveInt = 5
    """Words per shingle; shorter finds more, longer fewer."""
    seed: int = 0
    """Seed of the MinHash permutations."""


class PrepConfig(Section):
    sources: Annotated[list[Source], BeforeValidator(_as_sources), Field(min_length=1)]
    """Input files; a bare path is short for {path: ...}."""
    tokenizer: str
    """Folder with tokenizer.json and/or tokenizer.model: the model's own tokenizer."""
    template: str = "alpaca"
    """Prompt template: alpaca; chat = the tokenizer's own chat template; or a .jinja file. Format text takes none."""
    seq_len: Annotated[int, Field(ge=8, le=2**24)] = 4096
    """Tokens per pack at most; the model's context length is a good choice."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """A row longer than seq_len: dropped and counted; cut, without a stop token to learn; or an error."""
    on_error: Literal["raise", "drop"] = "raise"
    """A malformed row: an error that says where it is, or a counted drop."""
    filters: FilterSection = FilterSection()
    heldout: Annotated[float, Field(ge=0)] = 0.0
    """Rows kept for held-out loss, chosen by a seeded hash: a fraction below 1, or a number of rows."""
    dedup: Literal["none", "exact", "near"] = "exact"
    """exact: of rows with equal text (Unicode form and white space aside) the first is kept; near: also of similar
    rows."""
    near: NearSection = NearSection()
    decontaminate: Annotated[list[str], BeforeValidator(split_commas)] = []
    """Files or folders of evaluation items (MMLU, HellaSwag); rows that overlap with one are dropped and listed."""
    decontaminate_ngram: Annotated[int, Field(ge=5)] = 13
    """Consecutive words that a row must share with an item to count as overlap (13: Brown et al. 2020)."""
    seed: int = 0
    """Seed of the held-out split, of fractional weights, replay and balancing."""
    workers: PositiveInt | Literal["auto"] = "auto"
    """Processes; auto = one per available core, or per CPU of the Ray cluster. The output does not depend on it."""
    engine: Literal["local", "ray"] = "local"
    """Where the workers run: on this host, or on a Ray cluster (extra `ray`; RAY_ADDRESS names the cluster)."""
    dry_run: bool = False
    """Do the whole computation, print the report with disk and time needed, and write nothing."""
    out: str
    """Folder to create: train/, heldout/ and report.json go here."""

    @field_validator("heldout")
    @classmethod
    def _whole_rows(cls, value: float) -> float:
        return _fraction_or_whole(value, "rows")

    @field_validator("template")
    @classmethod
    def _known_template(cls, value: str) -> str:
        if value not in ("alpaca", "chat") and not value.endswith(".jinja"):
            raise ValueError("must be alpaca, chat, or the path of a .jinja file")
        return value

    @model_validator(mode="after")
    def _ratios_leave_room(self) -> "PrepConfig":
        if sum(source.ratio or 0 for source in self.sources) >= 1 or all(s.role == "replay" for s in self.sources):
            raise ValueError("sources: the ratios of replay sources must leave room for a source of role data")
        return self


class VerifyConfig(Section):
    shards: str
    """Folder written by `sft prep`, or the folder of one split below it."""
    tokenizer: str | None = None
    """Tokenizer folder; default: the one the manifest names, where it is there."""


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
    micro_batch: PositiveInt = 1
    """Packs in one forward of one rank, laid end to end. Changes memory and speed, never the update."""


class TrainSection(Section):
    epochs: PositiveInt = 3
    """Passes over the packs; ignored where max_steps is set."""
    max_steps: PositiveInt | None = None
    """Optimizer steps of the whole run (the schedule spans them); null: from epochs."""
    stop_after: PositiveInt | None = None
    """Save and leave after this step; the schedule still spans the whole run. Run again to go on."""


class OptimSection(Section):
    name: Literal["adamw"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019), fp32 states."""
    lr: Annotated[float, Field(gt=0)] = 2.0e-5
    """Peak learning rate; 1e-5 to 2e-5 is usual for full-parameter SFT of 7B-13B models."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay of the first and second moment; 0.95 forgets a gradient spike sooner than the classic 0.999."""
    eps: Annotated[float, Field(gt=0)] = 1.0e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled decay per unit of learning rate, for matrices only."""
    no_decay: Annotated[list[str], BeforeValidator(split_commas)] = ["embed", "norm", "bias"]
    """Parameters whose name holds one of these strings are not decayed; one-dimensional ones never are."""
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
        return _fraction_or_whole(value, "steps")


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


class EvalSection(Section):
    every: PositiveInt = 500
    """Optimizer steps between measurements of the held-out loss (and at the last step)."""
    probe: ProbeSection = ProbeSection()


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
    out: str
    """Folder of this run; running the same command again resumes from its newest complete checkpoint."""

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if self.batch.rows_per_step % self.batch.micro_batch:
            raise ValueError(
                f"batch.rows_per_step {self.batch.rows_per_step} must be a multiple of "
                f"batch.micro_batch {self.batch.micro_batch}"
            )
        if self.schedule.cycles > 1 and self.schedule.name != "cosine_restarts":
            raise ValueError(f"schedule.cycles {self.schedule.cycles} needs schedule.name cosine_restarts")
        if self.eval.probe.max_drop is not None and self.eval.probe.data is None:
            raise ValueError(
                f"eval.probe.max_drop {self.eval.probe.max_drop} needs eval.probe.data: where MMLU and HellaSwag are"
            )
        return self


class BlameConfig(Section):
    run: str
    """Run folder."""
    step: PositiveInt
    """Optimizer step, counted from 1 as in metrics.jsonl."""


# Export


class ExportConfig(Section):
    run: str
    """Run folder (its newest complete checkpoint), or one checkpoint folder."""
    out: str | None = None
    """Folder to create; default: <run>/export, or <run>/export-step-… before the run's end."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """dtype of the exported weights; auto: the dtype the model was computed in."""
    max_shard_gb: Annotated[float, Field(gt=0)] = 5.0
    """Largest safetensors file in GB (10^9 bytes); also bounds the host memory in use."""


# Looking at packed rows, and the demonstration


class ShowConfig(Section):
    shards: str
    """Shard folder written by `sft prep` (<prep out>/train), or the folder above it."""
    rows: PositiveInt = 2
    """Packs to print."""
    start: Annotated[int, Field(ge=0)] = 0
    """First pack to print."""
    doc: Annotated[int, Field(ge=0)] | None = None
    """Print only the document with this id (the input row over all sources, from 0), wherever it is packed."""
    html: str | None = None
    """Write a self-contained page to this file instead, with every token and its id."""
    tokenizer: str | None = None
    """Tokenizer folder; default: the one the manifest names."""


class DemoConfig(Section):
    out: str = "runs/demo"
    """Folder for everything the demonstration makes."""
    ranks: Annotated[int, Field(ge=1, le=2)] = 2
    """CPU ranks of the ZeRO-3 training, 1 or 2: its steps have 6 and 8 rows."""
