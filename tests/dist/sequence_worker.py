"""Started on real ranks: one forward and backward of a model whose packs are shared, against the whole on one rank.

    sequence_worker PLAN.json OUT

The plan is a list of cases: {"name", "model": folder, "size": ranks that share a pack, "lengths": of the documents} and
perhaps "checkpointing": true, "tiles": of the MLPs, "supervised": places of documents that have targets (default: all),
"mistake": one of MISTAKES. Rank 0 writes OUT: {name: {"loss", "gradient", "hidden", "by_source": relative differences,
"targets": of each rank}}.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sft.attention import register
from sft.batch import IGNORE, MicroBatch, build
from sft.errors import UserError
from sft.isolation import prove_isolation
from sft.model import PackedCausalLM, load_model
from sft.sequence import NOT_SHARED, Shares, all_tokens, own_part, share_packs
from sft.tiled_mlp import tile_mlps

CPU = torch.device("cpu")


def main(argv: list[str]) -> None:
    """Every case of the plan, in order."""
    plan, out = map(Path, argv[-2:])
    dist.init_process_group("gloo")
    found = {case["name"]: run_case(case) for case in json.loads(plan.read_text())}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """How far the shared computation is from the whole one."""
    shares = share_packs(case["size"])
    model = load(case)
    whole = make_batch(case, shares)
    expected_loss, expected_by_source, expected_grads = step(model, whole)
    expected_hidden = hidden(model, whole, NOT_SHARED)

    if case.get("tiles"):
        tile_mlps(model.hf, case["tiles"])
    own = MISTAKES[case["mistake"]](whole, shares) if "mistake" in case else own_part(whole, shares)
    loss, by_source, grads = step(model, own)
    if shares.size > 1:
        for value in (loss, by_source, *grads.values()):
            dist.all_reduce(value, group=shares.group)
    return {
        "loss": relative(loss, expected_loss),
        "by_source": relative(by_source, expected_by_source),
        "gradient": max(relative(grads[name], expected_grads[name]) for name in grads),
        "hidden": relative(hidden(model, own, shares)[: len(expected_hidden)], expected_hidden),
        "targets": gathered(len(own.targets_N)),
        "isolation": prove(model, shares, case.get("mistake")),
    }


def load(case: dict[str, Any]) -> PackedCausalLM:
    """In training mode, for activation checkpointing acts in it alone."""
    return load_model(
        case["model"],
        dtype=torch.float32,
        attention=register("sdpa"),
        checkpointing=case.get("checkpointing", False),
        liger=False,
    ).train()


def make_batch(case: dict[str, Any], shares: Shares) -> MicroBatch:
    """The same on the ranks that share it, another one for every group; each document from a source of its own."""
    random = np.random.RandomState(shares.data_rank)
    documents = []
    for place, length in enumerate(case["lengths"]):
        ids = random.randint(3, 259, length)
        is_target = place in case.get("supervised", range(length)) and np.arange(length) >= length // 3
        documents.append((ids, np.where(is_target, ids, IGNORE)))
    return build(documents, CPU, range(len(documents)), len(documents))


def step(model: PackedCausalLM, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(summed loss, of each source, gradients)."""
    model.zero_grad()
    loss, by_source_S = model(batch)
    loss.backward()
    return loss.detach(), by_source_S, {name: weight.grad.clone() for name, weight in model.named_parameters()}


def hidden(model: PackedCausalLM, batch: MicroBatch, shares: Shares) -> torch.Tensor:
    """[T, E] of all tokens."""
    with torch.no_grad():
        return all_tokens(model(batch, ask="hidden"), shares)


def prove(model: PackedCausalLM, shares: Shares, mistake: str | None) -> str:
    """What the isolation probe says; its tokens are shared, with the mistake, as the case's are."""
    import sft.isolation

    sft.isolation.own_part = MISTAKES[mistake] if mistake else own_part
    try:
        return prove_isolation(model, 259, CPU, shares)
    except UserError as error:
        return f"refused: {error}"


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """L2; 0 where both are 0."""
    return float((one - other).norm() / other.norm().clamp(min=1e-30))


def gathered(value: int) -> list[int]:
    """Every rank's."""
    found = [0] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


# What could be wrong


def layout_dropped(batch: MicroBatch, shares: Shares) -> MicroBatch:
    """All documents of the pack as one (what transformers' attention under DeepSpeed's Ulysses does)."""
    own = own_part(batch, shares)
    total = own.layout.num_tokens
    return replace(own, layout=replace(own.layout, seq_lens=(total,), cu_seqlens=torch.tensor([0, total])))


def parts_alone(batch: MicroBatch, shares: Shares) -> MicroBatch:
    """No exchange: a document is cut where a part ends."""
    own = own_part(batch, shares)
    cuts = np.unique([0, *np.clip(own.layout.cu_seqlens - own.start, 0, own.ids_1T.shape[1])]).astype(np.int32)
    layout = replace(own.layout, group=None, seq_lens=tuple(np.diff(cuts)), cu_seqlens=torch.from_numpy(cuts))
    return replace(own, layout=layout)


def targets_within_parts(batch: MicroBatch, shares: Shares) -> MicroBatch:
    """Labels shifted after the cut: what a part's last token predicts, the next part's first token, is lost."""
    own = own_part(batch, shares)
    kept = own.predict_N < own.ids_1T.shape[1] - 1
    return replace(own, predict_N=own.predict_N[kept], targets_N=own.targets_N[kept], source_N=own.source_N[kept])


def parts_swapped(batch: MicroBatch, shares: Shares) -> MicroBatch:
    """The group's ranks in another order than their parts."""
    return own_part(batch, replace(shares, rank=shares.size - 1 - shares.rank))


MISTAKES: dict[str, Callable[[MicroBatch, Shares], MicroBatch]] = {
    "layout dropped": layout_dropped,
    "parts alone": parts_alone,
    "targets within parts": targets_within_parts,
    "parts swapped": parts_swapped,
}

if __name__ == "__main__":
    main(sys.argv[1:])
