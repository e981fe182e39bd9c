"""Where the weights of a model folder come from: a checkpoint, the moving average in it, or several checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sft.checkpoint import Pieces, check_undamaged, digests, is_complete, list_checkpoints, read_meta, step_of
from sft.config import defaults
from sft.errors import UserError
from sft.zero_state import EMA, STATES


@dataclass(frozen=True)
class Source:
    """Weights that a folder is written from and compared with, one tensor at a time."""

    name: str
    """For messages."""
    shapes: Mapping[str, list[int]]
    """Of every parameter and persistent buffer, by transformers' names, tied ones once; files hold them in this
    order."""
    read: Callable[[str], torch.Tensor]
    """A whole tensor on the CPU, not yet rounded to the folder's dtype."""
    made_of: Mapping[str, Any]
    """The same for machines; sft.hf_folder.PROVENANCE records it."""


def from_checkpoint(checkpoint: Path, *, ema: bool = False) -> Source:
    """The fp32 weights of a checkpoint, or their moving average; what is not trained is the same for both.

    Raises:
        UserError: the checkpoint is incomplete or damaged, or holds no average.
    """
    check_undamaged(checkpoint)
    shapes, pieces = read_meta(checkpoint)["shapes"], Pieces(checkpoint)
    if ema and not pieces.holds(EMA):
        raise UserError(
            f"--ema: checkpoint {checkpoint} holds no moving average; train with train.ema_decay, or leave out --ema"
        )
    state = EMA if ema else STATES[0]
    name = f"the moving average in {checkpoint}" if ema else str(checkpoint)
    return Source(
        name,
        shapes,
        lambda tensor: pieces.weights(tensor, shapes[tensor], state),
        _made_of("moving average" if ema else "weights", [checkpoint]),
    )


def from_mean(checkpoints: Sequence[Path]) -> Source:
    """The mean of the weights of several checkpoints of a run (Izmailov et al. 2018), computed in fp64.

    What is no floating-point tensor is the last checkpoint's.

    Raises:
        UserError: one is incomplete, damaged, or of another run or model than the last.
    """
    for checkpoint in checkpoints:
        check_undamaged(checkpoint)
    metas = [read_meta(checkpoint) for checkpoint in checkpoints]
    shapes, identity = metas[-1]["shapes"], metas[-1]["identity"]
    for checkpoint, meta in zip(checkpoints, metas, strict=True):
        if meta["shapes"] != shapes or defaults(identity) | meta["identity"] != identity:
            what, key = ("run", "identity") if meta["shapes"] == shapes else ("model", "shapes")
            raise UserError(
                f"--average: {checkpoint} has another {what} behind it than {checkpoints[-1]} ({key} in meta.json "
                "differs); move it away, or lower --average"
            )
    *earlier, last = (Pieces(checkpoint) for checkpoint in checkpoints)

    def read(name: str) -> torch.Tensor:
        newest = last.weights(name, shapes[name])
        if not newest.is_floating_point():
            return newest
        total_fp64 = newest.double()
        for pieces in earlier:
            total_fp64 += pieces.weights(name, shapes[name])
        return total_fp64.div_(len(checkpoints)).to(newest.dtype)

    steps = ", ".join(str(meta["step"]) for meta in metas)
    return Source(f"the mean of the weights after steps {steps}", shapes, read, _made_of("mean", checkpoints))


def last_complete(newest: Path, count: int) -> list[Path]:
    """The `count` newest complete checkpoints of a run up to and with `newest`, oldest first.

    Raises:
        UserError: there are fewer.
    """
    step = read_meta(newest)["step"]
    found = [path for path in list_checkpoints(newest.parent) if step_of(path) <= step and is_complete(path)]
    if len(found) < count:
        steps = ", ".join(str(step_of(path)) for path in found)
        raise UserError(
            f"--average {count}: {newest.parent} has {len(found)} complete checkpoints up to step {step} "
            f"(of steps {steps}); train with checkpoint.keep_last {count} or more, or lower --average"
        )
    return found[-count:]


def _made_of(what: str, checkpoints: Sequence[Path]) -> dict[str, Any]:
    """Names and digests, no paths: a folder that is given away tells nothing of the disk it was made on."""
    return {
        "what": what,
        "run": checkpoints[-1].absolute().parents[1].name,
        "checkpoints": [
            {"step": read_meta(checkpoint)["step"], "xxh3_128": digests(checkpoint)["meta.json"]}
            for checkpoint in checkpoints
        ],
    }
