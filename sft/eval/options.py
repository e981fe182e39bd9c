"""Every option of `sft eval` and `sft drift`: once, typed, with its unit and its default's reason."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from sft.config import PositiveInt, Section, split_commas


def _with_harness(value: Any) -> Any:
    """`>=0.4.9.2` is short for `lm_eval>=0.4.9.2`."""
    return f"lm_eval{value}" if isinstance(value, str) and value[:1] in "<>" else value


def _small_fraction(value: float) -> float:
    if not 0 <= value <= LARGEST_DROP:
        raise ValueError(f"must be a fraction from 0 to {LARGEST_DROP}: 0.01 is one point")
    return value


NonEmpty = Annotated[str, Field(min_length=1)]
LARGEST_DROP = 0.5
"""A gate that asks for no more than this would pass a model that lost everything."""


class ShotsSection(Section):
    mmlu: Annotated[int, Field(ge=0, le=5)] = 5
    """Solved examples before each MMLU question, the first of the subject's dev split."""
    hellaswag: Annotated[int, Field(ge=0)] = 0
    """Solved examples before each HellaSwag item, drawn from the train split as lm_eval draws them."""
    hellaswag_draw: Literal["lm_eval", "fixed"] = "lm_eval"
    """lm_eval: fresh examples for every item; fixed: the same for all, 21x fewer tokens at 10 shots, and as good for
    comparing two models, but no score that lm_eval would print."""
    hellaswag_world: PositiveInt = 1
    """Draw as lm_eval does on this many GPUs, where each rank has a generator of its own."""


class ScoreOptions(Section):
    """What two models must share to be compared."""

    tasks: Annotated[list[Literal["mmlu", "hellaswag"]], BeforeValidator(split_commas), Field(min_length=1)] = [
        "mmlu",
        "hellaswag",
    ]
    """Tasks, separated by commas."""
    data: NonEmpty
    """Folder that holds MMLU and HellaSwag in any public layout, found by content."""
    shots: ShotsSection = ShotsSection()
    limit: PositiveInt | None = None
    """Score the first N items of every MMLU subject and of HellaSwag."""
    chat: Literal["none", "multi_turn", "single_turn"] = "none"
    """none: plain text, as published scores; else the tokenizer's chat template (lm_eval's --apply_chat_template), the
    solved examples as turns of their own (--fewshot_as_multiturn true) or all within one user message (false)."""
    system_instruction: str | None = None
    """System message, or with chat none the text before everything else (lm_eval's --system_instruction)."""
    compat: Annotated[Literal["lm_eval>=0.4.9.2", "lm_eval<=0.4.9.1"], BeforeValidator(_with_harness)] = (
        "lm_eval>=0.4.9.2"
    )
    """Whose BOS: newer harnesses let the tokenizer decide, older ones scored Llama without; most published Llama
    numbers are of the older kind."""
    engine: Literal["packed", "plain"] = "packed"
    """packed: what requests share is computed once; compared with plain on the loaded model first. plain: lm_eval's
    order, one padded row per distinct input; for bisecting a difference."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute dtype. auto: bf16 on GPUs and on CPUs with bf16 units, else fp32."""
    score_dtype: Literal["fp32", "native"] = "fp32"
    """Softmax and sums: fp32 (lm_eval's softmax_dtype=float32), or native = the compute dtype, lm_eval's default, whose
    bf16 sums are rounded to 0.5 and more and so tie."""
    tokens_per_batch: PositiveInt = 16384
    """Padded tokens in one forward at most."""
    batch_size: PositiveInt | None = None
    """Engine plain only: rows of one forward, as lm_eval's --batch_size; null: as many as tokens_per_batch holds."""
    placement: Literal["auto", "replicas", "zero3"] = "auto"
    """With several ranks: the whole model on each, or its weights spread over all by ZeRO-3; auto: whole where it fits
    into the GPU's free memory."""
    out: NonEmpty
    """Folder for the results. An interrupted run goes on from the items it had finished."""

    @model_validator(mode="after")
    def _consistent(self) -> "ScoreOptions":
        if self.batch_size is not None and self.engine != "plain":
            raise ValueError(f"batch_size {self.batch_size}: only engine plain has rows; use tokens_per_batch")
        return self


class EvalConfig(ScoreOptions):
    model: NonEmpty
    """Folder of the model and its tokenizer."""


class GateSection(Section):
    max_drop: Annotated[float, AfterValidator(_small_fraction)] | None = None
    """Largest drop of a task's accuracy that is acceptable (0.01 = one point): exit code 3 otherwise; null: no gate,
    and the report takes one point for its verdicts."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """One-sided confidence of the gate's decision."""
    rule: Literal["non_inferiority", "degradation"] = "non_inferiority"
    """non_inferiority: fail unless every task's drop is shown to be smaller than max_drop; degradation: fail only
    where a task's drop is shown to be larger."""


class AnswersSection(Section):
    prompts: str = "default"
    """Instructions that both models answer in the report: default = a built-in dozen; none; or a file with one
    instruction per line (.txt), or with rows of instruction and input (.json, .jsonl)."""
    template: Literal["alpaca", "chat", "none"] = "alpaca"
    """What the instruction is put into: the template of the fine-tuning."""
    max_new_tokens: PositiveInt = 64
    """Length of an answer at most; decoding is greedy."""


class DriftConfig(ScoreOptions):
    data: NonEmpty | None = None  # type: ignore[assignment]  # not needed where both sides were scored before
    """Folder that holds MMLU and HellaSwag in any public layout; needed unless every side was scored before."""
    base: NonEmpty
    """The model before training: its folder, results of `sft eval`, or lm_eval's --log_samples output."""
    tuned: Annotated[list[str], BeforeValidator(split_commas), Field(min_length=1)]
    """The model after training, given the same way. More of them (checkpoints, merges), separated by commas, are
    compared in a table and a curve; the report's details are the first one's."""
    heldout: str | None = None
    """Held-out shards of the fine-tuning data (<prep out>/heldout): what each model gained stands beside what it
    lost."""
    gate: GateSection = GateSection()
    answers: AnswersSection = AnswersSection()
    noise_items: Annotated[int, Field(ge=0)] = 256
    """Items of each task that the base is asked once more in other batches: the flips that are numerical noise; 0:
    not measured."""
