"""The work folder: what is put there comes back, block by block; one job at a time; nothing torn counts."""

import fcntl
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep import spill
from data_prep.blocks import Block, Overlap
from data_prep.documents import Encoded
from data_prep.spill import Spill, remove_leftover, without_ids, work_folder
from data_prep.workers import WorkerLost
from sft.errors import UserError


def make_block(number: int, documents: int = 3) -> Block:
    lengths = np.arange(2, 2 + documents, dtype=np.int32)
    return Block(
        source_id=number % 2,
        num_rows=documents + 2,
        rows=np.arange(documents, dtype=np.int32),
        keys=np.arange(2 * documents, dtype=np.uint64).reshape(-1, 2) + number,
        encoded=Encoded(
            ids=np.arange(lengths.sum(), dtype=np.int32) + 100 * number,
            lengths=lengths,
            num_runs=np.ones(documents, dtype=np.int32),
            runs=np.stack([np.ones(documents, dtype=np.int32), lengths], axis=1),
        ),
        truncated=np.arange(documents) % 2 == 1,
        signatures=np.full((documents, 4), number, dtype=np.uint32) if number % 3 == 0 else None,
        groups=("é",) * documents if number % 2 else (),
        dropped=((documents, "empty_output"), (documents + 1, "malformed")),
        overlaps=(Overlap(documents, "item#1", "söme \u2028words"),),
    )


BLOCKS = [make_block(0), make_block(1, documents=0), make_block(2), make_block(3)]


def as_plain(block: Block) -> list[object]:
    arrays = (
        block.rows,
        block.keys,
        block.encoded.lengths,
        block.encoded.num_runs,
        block.encoded.runs,
        block.truncated,
    )
    return [
        *((array.dtype, array.shape, array.tolist()) for array in arrays),
        None if block.signatures is None else block.signatures.tolist(),
        (block.source_id, block.num_rows, block.groups, block.dropped, block.overlaps),
    ]


class DiskFull(OSError):
    """Ends a job of these tests with its work kept."""


def interrupted(out: Path, key: str, blocks: list[Block]) -> None:
    """A job that writes blocks and then stops as a full disk would stop it."""
    with suppress(DiskFull), work_folder(out, key) as work:
        assert list(work.finished()) == []
        for number, block in enumerate(blocks):
            assert as_plain(work.add(number, block)) == as_plain(block)
        raise DiskFull


def all_ids(work: Spill) -> list[int]:
    return work.ids()[0 : work.tokens.tell() // 4].tolist()


def finished(out: Path, key: str) -> tuple[list[Block], list[int]]:
    """(blocks, ids) that the next job finds; it stops again."""
    found: list[Block] = []
    ids: list[int] = []
    with suppress(DiskFull), work_folder(out, key) as work:
        found += work.finished()
        ids += all_ids(work)
        raise DiskFull
    return found, ids


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "out"


def test_blocks_come_back_as_they_were(out: Path) -> None:
    interrupted(out, "key", BLOCKS)
    found, ids = finished(out, "key")
    assert [as_plain(block) for block in found] == [as_plain(block) for block in BLOCKS]
    assert ids == [token for block in BLOCKS for token in block.encoded.ids.tolist()]
    assert all(len(block.encoded.ids) == 0 for block in found), "ids stay on disk"
    assert as_plain(found[0]) != as_plain(BLOCKS[2]), "control: the comparison tells blocks apart"


def test_ids_are_read_piece_by_piece(out: Path) -> None:
    with work_folder(out, "key") as work:
        for number, block in enumerate(BLOCKS):
            work.add(number, block)
        everything = [token for block in BLOCKS for token in block.encoded.ids.tolist()]
        assert work.ids()[2:5].tolist() == everything[2:5]
        assert work.ids()[0:0].tolist() == []


def test_a_file_cut_short_under_the_job_is_told(out: Path) -> None:
    with work_folder(out, "key") as work:
        work.add(0, BLOCKS[0])
        assert len(work.ids()[0:2]) == 2, "control: the whole file is read"
        os.truncate(work.folder / "tokens.bin", 4)
        with pytest.raises(OSError, match="cut short"):
            work.ids()[0:2]


def test_no_ids_at_all(out: Path) -> None:
    with work_folder(out, "key") as work:
        work.add(0, make_block(0, documents=0))
        assert all_ids(work) == []


def test_another_key_begins_anew(out: Path) -> None:
    interrupted(out, "key", BLOCKS)
    assert finished(out, "other") == ([], [])
    assert finished(out, "key") == ([], []), "and nothing of the first is left"


def test_a_torn_key_begins_anew(out: Path) -> None:
    interrupted(out, "longer key", BLOCKS)
    (out.parent / "out.work" / "key").write_text("longer k")
    assert finished(out, "longer key") == ([], [])


@pytest.mark.parametrize("first_bad", range(len(BLOCKS)))
@pytest.mark.parametrize("kind", ["missing", "empty", "half", "other format", "metadata"])
def test_blocks_count_up_to_the_first_that_is_not_whole(out: Path, kind: str, first_bad: int) -> None:
    interrupted(out, "key", BLOCKS)
    file = out.parent / "out.work" / "blocks" / f"{first_bad:08d}.safetensors"
    whole = file.read_bytes()
    damaged = {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "other format": b'{"a": 1}' * 100,
        "metadata": whole.replace(b'"block"', b'"black"'),
    }
    if kind == "missing":
        file.unlink()
    else:
        file.write_bytes(damaged[kind])
    found, ids = finished(out, "key")
    assert [as_plain(block) for block in found] == [as_plain(block) for block in BLOCKS[:first_bad]]
    assert ids == [token for block in BLOCKS[:first_bad] for token in block.encoded.ids.tolist()]


def test_after_a_torn_block_the_rest_is_written_again(out: Path) -> None:
    interrupted(out, "key", BLOCKS)
    (out.parent / "out.work" / "blocks" / f"{2:08d}.safetensors").unlink()
    with suppress(DiskFull), work_folder(out, "key") as work:
        assert len(list(work.finished())) == 2
        work.add(2, BLOCKS[2])
        raise DiskFull
    found, ids = finished(out, "key")
    assert len(found) == 3, "the tokens of block 3 were cut off with those of block 2"
    assert ids == [token for block in BLOCKS[: len(found)] for token in block.encoded.ids.tolist()]


@pytest.mark.parametrize("first_bad", [0, 2, 3])
def test_tokens_count_only_with_their_digest(out: Path, first_bad: int) -> None:
    interrupted(out, "key", BLOCKS)
    before = 4 * sum(len(block.encoded.ids) for block in BLOCKS[:first_bad])
    with open(out.parent / "out.work" / "tokens.bin", "r+b") as tokens:
        tokens.seek(before)
        tokens.write(b"\xff")
    found, ids = finished(out, "key")
    assert len(found) == first_bad
    assert 4 * len(ids) == before


def test_a_success_leaves_no_work_folder(out: Path) -> None:
    with work_folder(out, "key") as work:
        assert work.folder.name == "out.work"
        new = work.new_output()
        (new / "half").touch()
        assert list(work.new_output().iterdir()) == []
    assert list(out.parent.iterdir()) == []


def fail(out: Path, error: Exception) -> None:
    with work_folder(out, "key") as work:
        work.add(0, BLOCKS[0])
        raise error


def test_a_mistake_of_the_user_leaves_no_work_folder_and_a_lost_worker_does(out: Path) -> None:
    with pytest.raises(UserError, match="row 3"):
        fail(out, UserError("row 3"))
    assert list(out.parent.iterdir()) == []
    with pytest.raises(WorkerLost):
        fail(out, WorkerLost("memory"))
    assert len(finished(out, "key")[0]) == 1


def test_one_job_at_a_time(out: Path) -> None:
    with work_folder(out, "key") as work:
        work.add(0, BLOCKS[0])
        told = rf"another sft prep is writing it \(process {os.getpid()} on "
        with pytest.raises(UserError, match=told), work_folder(out, "other"):
            pytest.fail("two jobs in one folder")
        remove_leftover(out)
        assert all_ids(work) == BLOCKS[0].encoded.ids.tolist(), "the first is undisturbed"
    with work_folder(out, "other"):
        pass


def test_a_file_system_without_locks_is_used_all_the_same(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_locks(*_: object) -> None:
        raise OSError(spill.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    with work_folder(out, "key") as work:
        assert isinstance(work, Spill)
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(spill.errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"), work_folder(out, "key"):
        pytest.fail("a broken disk is no missing feature")


def test_a_leftover_is_removed(out: Path) -> None:
    remove_leftover(out)
    interrupted(out, "key", BLOCKS)
    remove_leftover(out)
    assert list(out.parent.iterdir()) == []


def test_without_ids_keeps_the_rest() -> None:
    assert as_plain(without_ids(BLOCKS[0])) == as_plain(BLOCKS[0])
    assert as_plain(without_ids(BLOCKS[0])) != as_plain(replace(BLOCKS[0], num_rows=1))
