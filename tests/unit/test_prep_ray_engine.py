"""What the Ray engine decides by itself, without Ray: how many workers, who may encode, which address answers."""

import socket
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from data_prep import ray_engine
from data_prep.blocks import Block, Encoder, make_encoder
from data_prep.readers import read_blocks
from sft.errors import UserError
from sft.prep_options import PrepConfig
from sft.tokenizer import load_tokenizer
from tests.prep_support import alpaca_rows, write_json
from tests.tiny import make_tokenizer


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Encoder:
    """Of files under relative paths in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "")
    make_tokenizer(tmp_path / "tokenizer")
    write_json(tmp_path / "rows.json", alpaca_rows(20))
    (tmp_path / "refusals.txt").write_text("^No\n")
    config = PrepConfig(
        sources=[{"path": "rows.json"}],
        tokenizer="tokenizer",
        seq_len=1024,
        filters={"refusals": "refusals.txt"},
        out="out",
    )
    return make_encoder(config, load_tokenizer(config.tokenizer))


def first_outcome(encoder: Encoder, folder: Path, **changes: str) -> Block | UserError:
    """What a worker on a node with this folder makes of the first block."""
    expected = {**ray_engine._identity(encoder), **changes}
    worker = ray_engine._Worker(encoder.config, expected, False, str(folder))
    return worker.encode(next(iter(read_blocks(0, folder / "rows.json"))))


def test_a_node_with_the_same_files_encodes(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    outcome = first_outcome(encoder, tmp_path)
    assert isinstance(outcome, Block)
    assert len(outcome.rows) == 20


def test_a_node_without_the_tokenizer_is_named(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.uname", lambda: SimpleNamespace(nodename="node7"))
    (tmp_path / "tokenizer").rename(tmp_path / "gone")
    outcome = first_outcome(encoder, tmp_path)
    assert isinstance(outcome, UserError)
    assert str(outcome).startswith("node node7: tokenizer tokenizer: ")


def test_a_node_with_another_file_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "refusals.txt").write_text("^Never\n")
    outcome = first_outcome(encoder, tmp_path)
    assert isinstance(outcome, UserError)
    assert "filters.refusals is not what it is where sft prep was started (\"['^Never']\"" in str(outcome)


@pytest.mark.parametrize("what", ["version of gigatoken", "tokenizer", "template", "decontaminate", "code version"])
def test_a_node_with_another_version_is_refused(encoder: Encoder, tmp_path: Path, what: str) -> None:
    outcome = first_outcome(encoder, tmp_path, **{what: "another"})
    assert isinstance(outcome, UserError)
    assert f"{what} is not what it is where sft prep was started" in str(outcome)
    assert "\n" not in str(outcome)


@pytest.mark.parametrize(("asked", "workers"), [(None, 6), (6, 6), (1, 1)])
def test_auto_is_every_cpu_of_the_cluster(asked: int | None, workers: int) -> None:
    ray = Mock(**{"cluster_resources.return_value": {"CPU": 6.0}})
    assert ray_engine._num_actors(ray, asked) == workers


@pytest.mark.parametrize(("asked", "resources"), [(7, {"CPU": 6.0}), (None, {})])
def test_more_workers_than_cpus_would_wait_for_ever(asked: int | None, resources: dict[str, float]) -> None:
    ray = Mock(**{"cluster_resources.return_value": resources})
    with pytest.raises(UserError, match="the Ray cluster has"):
        ray_engine._num_actors(ray, asked)


def test_an_address_that_answers_passes_and_another_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ray_engine._check_answers(f"127.0.0.1:{port}")
        ray_engine._check_answers(f"ray://127.0.0.1:{port}")
    with pytest.raises(UserError, match=f"RAY_ADDRESS 127.0.0.1:{port}: no answer: .*; start Ray there"):
        ray_engine._check_answers(f"127.0.0.1:{port}")
    ray_engine._check_answers("auto")
