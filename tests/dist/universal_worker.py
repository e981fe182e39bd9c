"""Started by test_universal_checkpoint.py: the same engine saved twice, by DeepSpeed and by us, and loaded both ways.

    universal_worker OUT UPDATES RATES --run.options ...

Two parameter groups, each with a learning rate (of RATES, a JSON list) and a weight decay of its own, are updated
UPDATES times before the save. Writes OUT/told.json: of the engine that
goes on ("whole") and of the two that load, the settings of each group and Adam's count of updates, before and after
one more update, and how far the weights are from those of the one that went on.
"""

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal

from data_prep.shards import open_shards
from sft import batch, checkpoint, resume, zero_state
from sft.config import RunConfig
from sft.engine import build_engine, choose_numerics, join, read_strategy
from sft.rendezvous import meet
from sft.saver import Saver
from sft.settings import load


def main(argv: list[str]) -> None:
    """Train and save, then load with DeepSpeed and with ours."""
    out, updates, rates, *flags = argv
    folder = Path(out)
    config = load(RunConfig, [*flags, "--out", out], prog="universal_worker")
    device = join(meet(60.0))
    engine = build(config, {}, json.loads(rates), device)
    for _ in range(int(updates)):
        update(engine, config, device)
    save_both(engine, config, int(updates), folder)
    told, expected = tell(engine, config, device, None)
    engine.destroy()
    result = {"version": deepspeed.__version__, "whole": told}
    for name, section in (("universal", {"checkpoint": {"load_universal": True}}), ("ours", {})):
        engine = build(config, section, json.loads(rates), device)
        if name == "universal":
            found, _ = engine.load_checkpoint(str(folder), tag="universal")
            assert found is not None, "DeepSpeed did not find its own checkpoint"
        else:
            resume.load(engine, checkpoint.step_folder(folder / "checkpoints", int(updates)))
        result[name], _ = tell(engine, config, device, expected)
        engine.destroy()
        gc.collect()
    (folder / "told.json").write_text(json.dumps(result))


def build(config: RunConfig, section: dict[str, Any], rates: list[float], device: torch.device) -> Any:
    """A new engine on the base model, each of whose groups learns at a rate of its own."""
    strategy = read_strategy(config.deepspeed) | section
    engine = build_engine(config, strategy, choose_numerics(config, device, {}))
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return engine


def update(engine: Any, config: RunConfig, device: torch.device) -> None:
    """One optimizer step, always on the same pack: whatever differs afterwards comes from the optimizer."""
    micro = batch.from_shards(open_shards(config.data.train), np.array([0]), device)
    engine.train()
    loss, _ = engine(micro)
    engine.backward(loss / len(micro.targets_N), scale_wrt_gas=False)
    engine.step()


def save_both(engine: Any, config: RunConfig, step: int, folder: Path) -> None:
    """Ours, and DeepSpeed's own converted to a universal one."""
    saver = Saver(engine, folder / "checkpoints", {}, config.checkpoint, 1, lambda *_, **__: None)
    saver.begin(step, None)
    saver.finish()
    saver.wait_for_deletions()
    engine.save_checkpoint(str(folder), tag="native")
    arguments = argparse.Namespace(
        input_folder=str(folder / "native"), output_folder=str(folder / "universal"), num_extract_workers=1,
        num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=False,
    )  # fmt: skip
    ds_to_universal.main(arguments)


def tell(
    engine: Any, config: RunConfig, device: torch.device, expected: dict[str, torch.Tensor] | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What this engine is set to, and where one more update leads it: (facts, weights)."""
    facts: dict[str, Any] = {"settings": settings(engine), "updates": counts(engine)}
    before = weights(engine)
    update(engine, config, device)
    after = weights(engine)
    facts["updates_after_one_more"] = counts(engine)
    if expected is not None:
        facts["loaded_equal"] = all(torch.equal(before[name], expected[f"before|{name}"]) for name in before)
        facts["off_by"] = max(
            float((after[name] - expected[name]).norm() / (expected[name] - expected[f"before|{name}"]).norm())
            for name in after
        )
    return facts, after | {f"before|{name}": weight for name, weight in before.items()}


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """Copies of the whole weights."""
    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: weight.detach().clone() for name, weight in named.items()}


def settings(engine: Any) -> list[list[float]]:
    """Learning rate and weight decay of each group."""
    return [[group["lr"], group["weight_decay"]] for group in engine.optimizer.param_groups]


def counts(engine: Any) -> list[float]:
    """Updates that Adam has counted, for each flat tensor."""
    optimizer = engine.optimizer
    return [float(optimizer.optimizer.state[flat]["step"]) for flat in zero_state.flat_tensors(optimizer)]


if __name__ == "__main__":
    main(sys.argv[1:])
    dist.destroy_process_group()
