"""One optimizer step is the same update for any ranks x accumulation x micro-batch x packing x ZeRO stage.

Twenty steps of every layout against plain single-process PyTorch, in fp32. Weight decay and clipping are on and act;
the learning rate is 1e-3: Adam divides by the root of the second moment, so a much larger one would blow the rounding
of gradients near 0 up in the weights. Run: pytest tests/dist/test_gradient_contract.py
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from safetensors.torch import load_file

from data_prep.shards import open_shards
from sft.batch import num_labels
from sft.config import OptimSection
from sft.order import FILLER, cut, step_rows
from tests import tiny
from tests.dist import contract_data
from tests.dist.training import (
    Mistake,
    Trained,
    largest_difference,
    largest_relative,
    largest_share_of_change,
    reference,
    run_cases,
)

pytestmark = pytest.mark.dist

STEPS = 20
OPTIM = OptimSection(lr=1e-3, weight_decay=0.1, grad_clip=2.33)
TOLERANCE = 1e-5
OF_CHANGE = 1e-4
"""Of what training changed in a parameter: far stricter than TOLERANCE of the parameter itself."""

PROMPT_ROWS = {3: (1, 5), 4: (2, 3), 5: (0, 1, 2, 3), 7: range(8)}
"""Rows without labels by step (0-based): of one rank alone, of one micro-step, of all ranks in a micro-step, all."""
UNLABELLED = [16 * step + 2 * row + half for step, rows in PROMPT_ROWS.items() for row in rows for half in (0, 1)]
"""The documents of those rows: prompts only."""

DOCS_PER_ROW = {"packed": 2, "shuffled": 4, "unpacked": 1}
ROWS_PER_STEP = {name: contract_data.DOCS_PER_STEP // docs for name, docs in DOCS_PER_ROW.items()}
ON_CPU = {"device": "cpu"}


@dataclass(frozen=True)
class Case:
    """One run; the ranks of a group train their cases one after the other."""

    ranks: int
    stage: int
    micro_batch: int
    data: str = "packed"
    offload: tuple[str, ...] = ()
    model: str = "untied"
    checkpointing: str = "none"

    @property
    def name(self) -> str:
        """As a test and a file are named."""
        parts = [f"{self.ranks}-ranks", f"zero{self.stage}", f"micro{self.micro_batch}", self.data, *self.offload]
        return "-".join([*parts, self.model, *(["recomputed"] if self.checkpointing == "full" else [])])


OPTIMIZER = ("offload_optimizer",)
EVERYTHING = ("offload_optimizer", "offload_param")

CASES = [
    *[Case(1, stage, micro) for stage in (1, 2, 3) for micro in (1, 8)],
    *[Case(2, stage, micro) for stage in (1, 2, 3) for micro in (1, 4)],
    *[Case(4, stage, 1) for stage in (1, 2, 3)],
    *[Case(2, stage, 1, "shuffled") for stage in (1, 2, 3)],
    *[Case(2, stage, 2, "unpacked") for stage in (1, 2, 3)],
    Case(1, 3, 1, "shuffled"),
    Case(1, 2, 4, "unpacked"),
    Case(4, 3, 1, "shuffled"),
    Case(4, 1, 4, "unpacked"),
    *[Case(2, stage, 2, offload=OPTIMIZER) for stage in (1, 2, 3)],
    Case(1, 3, 2, offload=OPTIMIZER),
    Case(4, 2, 2, offload=OPTIMIZER),
    *[Case(ranks, 3, 2, offload=EVERYTHING) for ranks in (1, 2, 4)],
    *[Case(2, stage, 2, model="tied") for stage in (1, 2, 3)],
    Case(4, 3, 2, model="tied"),
    Case(2, 3, 2, checkpointing="full"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models by name, shards by arrangement."""
    work = tmp_path_factory.mktemp("contract")
    tiny.make_model(work / "untied", num_hidden_layers=1)
    tiny.make_model(work / "tied", num_hidden_layers=1, tie_word_embeddings=True)
    documents = contract_data.make_documents(STEPS, UNLABELLED)
    for name, docs_per_row in DOCS_PER_ROW.items():
        rows = contract_data.in_rows(documents, docs_per_row, shuffle_seed=1 if name == "shuffled" else None)
        contract_data.write(work / name, documents, rows, work / "untied")
    return work


@pytest.fixture(scope="module")
def expected(folder):
    return {model: reference(folder / model, folder / "packed", STEPS, 8, OPTIM) for model in ("untied", "tied")}


@pytest.fixture(scope="module")
def trained(folder):
    """All cases of one number of ranks, by name: trained in one launch, when the first of them is asked for."""

    @functools.cache
    def of_ranks(ranks: int) -> dict[str, Trained]:
        return run_cases(folder, ranks, [planned(case, folder) for case in CASES if case.ranks == ranks])

    return of_ranks


def planned(case: Case, folder: Path) -> dict[str, Any]:
    """The case as contract_worker takes it."""
    strategy = folder / f"{case.name}-strategy.json"
    options = {
        "model.path": str(folder / case.model),
        "model.activation_checkpointing": case.checkpointing,
        "model.precision": "fp32",
        "data.train": str(folder / case.data / "train"),
        "batch.rows_per_step": ROWS_PER_STEP[case.data],
        "batch.micro_batch": case.micro_batch,
        "train.max_steps": STEPS,
        "optim.lr": OPTIM.lr,
        "optim.weight_decay": OPTIM.weight_decay,
        "optim.grad_clip": OPTIM.grad_clip,
        "schedule.warmup": 0,
        "deepspeed": str(tiny.make_strategy(strategy, case.stage, **{part: ON_CPU for part in case.offload})),
        "track.wandb": "off",
    }
    return {"name": case.name, "steps": STEPS, "options": options}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_norms_and_weights_equal_plain_pytorch(trained, folder, expected, case):
    run = trained(case.ranks)[case.name]
    losses, norms, weights = expected[case.model]
    assert largest_relative(run.losses, losses) < TOLERANCE
    assert largest_relative(run.norms, norms) < TOLERANCE
    assert largest_difference(run.weights, weights) < TOLERANCE
    base = load_file(folder / case.model / "model.safetensors")
    assert largest_share_of_change(run.weights, weights, base) < OF_CHANGE


def test_every_factor_is_in_the_matrix():
    for ranks in (1, 2, 4):
        own = [case for case in CASES if case.ranks == ranks]
        assert {case.stage for case in own} == {1, 2, 3}
        assert {case.data for case in own} == set(DOCS_PER_ROW)
        assert {case.offload for case in own} >= {(), OPTIMIZER, EVERYTHING}
        accumulation = {ROWS_PER_STEP[case.data] // (ranks * case.micro_batch) for case in own}
        assert len(accumulation) >= 2
        assert len({case.micro_batch for case in own}) >= 2


def test_the_data_can_tell(folder, expected):
    """Unequal labels, ranks and micro-steps without any, a step without any, a tail of filler; decay and clipping."""
    shards = open_shards(folder / "packed" / "train")
    assert len(shards) == 19 * 8 + 5
    counts = shards.num_labels[shards.num_labels > 0]
    assert counts.max() > 2 * counts.min()

    def labels(step: int, ranks: int, micro_batch: int) -> list[list[int]]:
        rows = step_rows(0, step, len(shards), 8)
        return [[num_labels(shards, part) for part in cut(rows, rank, ranks, micro_batch)] for rank in range(ranks)]

    assert [not any(micro) for micro in labels(3, ranks=4, micro_batch=1)] == [False, True, False, False]
    assert [micro[0] == 0 for micro in labels(4, ranks=2, micro_batch=2)] == [False, True]
    assert [micro[0] for micro in labels(5, ranks=2, micro_batch=2)] == [0, 0]
    assert not np.any(labels(7, ranks=1, micro_batch=1))
    assert [sum(micro) for micro in labels(19, ranks=4, micro_batch=2)][3] == 0
    losses, norms, _ = expected["untied"]
    assert [step for step, loss in enumerate(losses) if loss is None] == [7]
    clipped = [norm > OPTIM.grad_clip for norm in norms if norm is not None]
    assert 5 <= sum(clipped) <= 15, "clipping acts on some steps and not on others"


def test_the_arrangements_hold_the_same_documents_in_each_step(folder):
    documents = {}
    for name, rows_per_step in ROWS_PER_STEP.items():
        shards = open_shards(folder / name / "train")
        steps = [step_rows(0, step, len(shards), rows_per_step) for step in range(STEPS)]
        packs = [[shards.pack(int(row)).doc_ids.tolist() for row in rows if row != FILLER] for rows in steps]
        documents[name] = [sorted(sum(step, [])) for step in packs]
    assert documents["packed"] == documents["shuffled"] == documents["unpacked"]
    assert sum(documents["packed"], []) == list(range(19 * 16 + 10))


@pytest.mark.parametrize("mistake", get_args(Mistake))
def test_control_mistakes_are_noticed(folder, expected, mistake):
    """What `equal` means above: each of these lies at least ten times outside, in losses or norms and in weights."""
    right_losses, right_norms, right_weights = expected["untied"]
    losses, norms, weights = reference(folder / "untied", folder / "packed", STEPS, 8, OPTIM, mistake)
    assert max(largest_relative(losses, right_losses), largest_relative(norms, right_norms)) > 10 * TOLERANCE
    assert largest_difference(weights, right_weights) > 10 * TOLERANCE


def test_control_a_swap_of_one_document_between_steps_is_noticed(folder, expected, tmp_path):
    """The arrangements differ within steps only: across steps it is another run."""
    documents = contract_data.make_documents(STEPS, UNLABELLED)
    rows = contract_data.in_rows(documents, 2)
    rows[0][0][0], rows[1][0][0] = rows[1][0][0], rows[0][0][0]
    contract_data.write(tmp_path / "swapped", documents, rows, folder / "untied")
    losses, _, weights = reference(folder / "untied", tmp_path / "swapped", STEPS, 8, OPTIM)
    assert largest_relative(losses, expected["untied"][0]) > 10 * TOLERANCE
    assert largest_difference(weights, expected["untied"][2]) > 10 * TOLERANCE
