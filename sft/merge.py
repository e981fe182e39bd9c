"""A model between two: `python -m sft.merge --base A --tuned B --alpha 0.7 --out DIR`, or a sweep over alphas."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from sft.config import Fraction, Section, ShardGb, split_commas
from sft.errors import UserError, run_command
from sft.interpolation import check_room, open_pair, write_merged
from sft.settings import load


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else split_commas(value)


class MergeConfig(Section):
    base: str
    """Folder of the model that training started from."""
    tuned: str
    """Folder of the fine-tuned model: the same architecture and vocabulary."""
    alpha: Annotated[list[Fraction], BeforeValidator(_as_list), Field(min_length=1)]
    """Weights of the merged model: (1 - alpha) base + alpha tuned (WiSE-FT, Wortsman et al. 2022). 0 is the base, 1 the
    tuned model; 0.5 is the paper's choice where nothing is known. Several, separated by commas, make a model each."""
    out: str
    """Folder to create: the merged model, or with several alphas <out>/alpha-0.2 and so on."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """dtype of the merged weights; auto: the tuned model's. Always computed in fp32."""
    max_shard_gb: ShardGb = 5.0
    """Largest safetensors file in GB (10^9 bytes)."""

    @field_validator("alpha")
    @classmethod
    def _once_each(cls, alphas: list[float]) -> list[float]:
        if twice := [alpha for index, alpha in enumerate(alphas) if alpha in alphas[:index]]:
            raise ValueError(f"holds {twice[0]} twice")
        return alphas


def main(argv: Sequence[str]) -> None:
    """Merge for each alpha, and print the commands that show what came of it."""
    config = load(MergeConfig, argv, prog="sft merge")
    outs = [_out(config, alpha) for alpha in config.alpha]
    for out in outs:
        if out.exists():
            raise UserError(f"--out {out}: exists; remove it or choose another --out")
    pair = open_pair(Path(config.base), Path(config.tuned), config.dtype)
    check_room(pair, Path(config.out), len(outs))
    for alpha, out in zip(config.alpha, outs, strict=True):
        write_merged(pair, alpha, out, config.max_shard_gb)
        print(
            f"merged {1 - alpha:.6g} x {config.base} + {alpha:.6g} x {config.tuned} into {out}: loaded back with "
            "transformers, every tensor equal"
        )
    models = ",".join(map(str, outs))
    what = ["--base", config.base, "--tuned", f"{models},{config.tuned}", "--out", f"{Path(config.out)}-drift"]
    print("next, what each of them forgot and still gains:")
    print(f"  sft drift {shlex.join(what)} --data EVALS --heldout DATA/heldout")
    print("and the scores of one alone:")
    print(f"  sft eval {shlex.join(['--model', str(outs[0]), '--out', f'{Path(config.out)}-eval'])} --data EVALS")


def _out(config: MergeConfig, alpha: float) -> Path:
    name = str(alpha).removesuffix(".0")
    return Path(config.out) if len(config.alpha) == 1 else Path(config.out) / f"alpha-{name}"


if __name__ == "__main__":
    sys.exit(run_command(main))
