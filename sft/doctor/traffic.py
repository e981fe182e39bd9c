"""How much a run sends, and whether its computation is long enough to hide that. Nothing is measured here.

Per micro-step (one forward and backward of one rank) and rank, with P parameters, c bytes of a weight in the compute
dtype, g bytes of a gradient as it is communicated, W ranks, A micro-steps per optimizer step:

    stage  all-gathered      reduce-scattered
    3      2 P c             P g                weights in forward and again in backward; gradients
    2      P g + P c / A     P g                gradients are all-reduced = reduce-scattered, then all-gathered
    1      P g / A + P c / A P g / A            the same, but once per optimizer step

each times (W - 1) / W. Stage 3 is the volume of Rajbhandari et al. 2020 ("ZeRO: Memory Optimizations Toward Training
Trillion Parameter Models"), section 7: 3 P elements. For stages 1 and 2 the paper has 2 P, a reduce-scatter and an
all-gather; DeepSpeed 0.19.8 all-reduces the gradients of stage 2, unless use_multi_rank_bucket_allreduce is false,
and those of stage 1, and gathers the new weights once per step. The computation is 6 P FLOPs per token, and 2 P more
where the forward is done again in backward (full activation checkpointing); attention is left out.
"""

import math
from dataclasses import dataclass
from typing import Any

from sft.doctor.finding import Finding
from sft.doctor.rates import GIB

ITEMSIZE = {"fp32": 4, "bf16": 2, "bfp16": 2, "fp16": 2}
"""Bytes by DeepSpeed's names of dtypes."""
CHECK = "communication of the run"


@dataclass(frozen=True)
class Workload:
    """What a run does in a micro-step of one rank."""

    num_parameters: int
    ranks: int
    strategy: dict[str, Any]
    """The DeepSpeed file."""
    weight_bytes: int
    """Of one weight in the compute dtype."""
    gradient_bytes: int
    """Of one gradient as it is communicated."""
    accumulation: int
    micro_batch: int
    seq_len: int
    recompute: bool
    """Full activation checkpointing."""
    sequence_parallel: int = 1
    """Ranks that share each pack. What they exchange for that within a layer is left out."""

    @property
    def tokens(self) -> int:
        """Of a micro-step of one rank, at most."""
        return self.micro_batch * self.seq_len // self.sequence_parallel

    @property
    def flops_per_token(self) -> int:
        """6 P, or 8 P with recomputation."""
        return (8 if self.recompute else 6) * self.num_parameters


def volume(work: Workload) -> tuple[float, float]:
    """Bytes per rank and micro-step that are all-gathered and reduce-scattered; see the module."""
    zero = work.strategy["zero_optimization"]
    weights = work.num_parameters * work.weight_bytes
    gradients = work.num_parameters * work.gradient_bytes
    share = (work.ranks - 1) / work.ranks
    if zero["stage"] == 3:
        return 2 * weights * share, gradients * share
    per_step = work.accumulation if zero["stage"] == 1 else 1
    all_reduced = zero["stage"] == 1 or zero.get("use_multi_rank_bucket_allreduce", True)
    gathered = gradients / per_step * all_reduced + weights / work.accumulation
    return gathered * share, gradients / per_step * share


def judge_traffic(work: Workload, all_gather_gib_s: float, reduce_scatter_gib_s: float, flop_s: float) -> Finding:
    """Can the computation of a micro-step hide its communication?

    Args:
        all_gather_gib_s, reduce_scatter_gib_s: bus bandwidth of all ranks (sft.doctor.rates.bus_bandwidth).
        flop_s: rate at which a rank trains.
    """
    gathered, reduced = volume(work)
    communication_s = gathered / all_gather_gib_s / GIB + reduced / reduce_scatter_gib_s / GIB
    compute_s = work.tokens * work.flops_per_token / flop_s
    tokens = math.ceil(communication_s * flop_s / work.flops_per_token)
    slowdown = 1 + communication_s / compute_s
    stage = work.strategy["zero_optimization"]["stage"]
    text = (
        f"ZeRO-{stage} of {_count(work.num_parameters)} parameters sends {_bytes(gathered + reduced)} per "
        f"micro-step and rank: {communication_s:.3g} s beside {compute_s:.3g} s of computation on {work.tokens} tokens "
        f"at {flop_s / 1e12:.3g} TFLOP/s; a step takes {slowdown:.2f} x as long where nothing overlaps"
    )
    figures = {
        "gathered_gib": gathered / GIB,
        "reduced_gib": reduced / GIB,
        "communication_s": communication_s,
        "compute_s": compute_s,
        "tokens": work.tokens,
        "tokens_that_hide_it": tokens,
        "slowdown_without_overlap": slowdown,
        "tflop_s": flop_s / 1e12,
    }
    if communication_s <= compute_s:
        return Finding(CHECK, "pass", "all ranks", f"{text}; it can be hidden", figures=figures)
    text += f", {communication_s / compute_s:.2f} x where all overlaps"
    return Finding(CHECK, "warn", "all ranks", text, _remedy(work, tokens), figures)


def _remedy(work: Workload, tokens: int) -> str:
    packs = math.ceil(tokens * work.sequence_parallel / work.seq_len)
    more = (
        f"{tokens:,} tokens per micro-step would hide it: raise batch.micro_batch ({work.micro_batch}) to "
        f"{packs:,}, or prepare a longer seq_len ({work.seq_len}), as far as memory allows"
    )
    stage = work.strategy["zero_optimization"]["stage"]
    fewer = {
        3: "; where the 16-bit weights fit on every GPU, deepspeed zero2 gathers none in forward and backward",
        2: "; where memory allows, deepspeed zero1 sends gradients once per step",
        1: "; more accumulation (batch.rows_per_step) sends less often",
    }
    halve = "; communication_data_type bf16 halves the gradients' part" if work.gradient_bytes == 4 else ""
    return more + fewer[stage] + halve


def _count(number: int) -> str:
    """13B, 350M, 35.2K."""
    unit, letter = next((step for step in ((1e9, "B"), (1e6, "M")) if number >= step[0]), (1e3, "K"))
    return f"{number / unit:.3g}{letter}"


def _bytes(count: float) -> str:
    return f"{count / GIB:.3g} GiB" if count >= GIB / 10 else f"{count / 2**20:.3g} MiB"
