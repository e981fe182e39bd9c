"""Which documents each split uses, and that every row has exactly one fate."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import filters
from data_prep.blocks import Block, Overlap
from data_prep.corpus import Corpus, choose, describe_clusters, gather, targets_of
from data_prep.documents import Encoded
from data_prep.mixture import keys_to_array, text_key
from data_prep.near import Signer
from data_prep.report import SourceFate
from sft.errors import UserError
from sft.prep_options import PrepConfig

WORDS = 40
"""Words of a long text: enough that one changed word leaves it similar."""


def make_block(texts: Sequence[str], source_id: int = 0, **options: Any) -> Block:
    """A document of one supervised run for each text, as long as the text, on the rows that are not dropped."""
    lengths = np.array([max(len(text), 2) for text in texts], dtype=np.int32)
    encoded = Encoded(
        ids=np.zeros(int(lengths.sum()), dtype=np.int32),
        lengths=lengths,
        num_runs=np.ones(len(texts), dtype=np.int32),
        runs=np.stack([np.ones_like(lengths), lengths], axis=1).reshape(-1, 2),
    )
    dropped = options.get("dropped", ())
    gone = {row for row, _ in dropped}
    rows = [row for row in range(len(texts) + len(dropped)) if row not in gone]
    return Block(
        source_id=source_id,
        num_rows=len(texts) + len(dropped),
        rows=np.array(rows, dtype=np.int32),
        keys=keys_to_array([text_key(text) for text in texts]),
        encoded=encoded,
        truncated=np.zeros(len(texts), dtype=np.bool_),
        signatures=options.get("signatures"),
        groups=tuple(options.get("groups", ())),
        dropped=tuple(dropped),
        overlaps=tuple(options.get("overlaps", ())),
    )


def make_config(*sources: dict[str, Any], **options: Any) -> PrepConfig:
    entries = [{"path": f"{number}.json", **source} for number, source in enumerate(sources or ({},))]
    return PrepConfig(sources=entries, tokenizer="t", out="o", **options)


def run(config: PrepConfig, blocks: Sequence[Block]) -> tuple[dict[str, np.ndarray], Corpus, list[SourceFate]]:
    """Gather and choose; every source's rows must add up."""
    fates = [SourceFate(f"s{number}", source) for number, source in enumerate(config.sources)]
    corpus = gather(blocks, fates)
    splits, _ = choose(config, corpus, fates)
    all_tokens = sum(fate.train_tokens for fate in fates)
    told = [fate.describe(all_tokens) for fate in fates]
    assert sum(item["tokens_train"] for item in told) == int(corpus.lengths[splits["train"]].sum()) == all_tokens
    assert sum(item["documents_train"] for item in told) == len(splits["train"])
    for item in told:
        assert item["rows_in"] == item["rows_train"] + item["rows_heldout"] + dropped_rows(item)
    return splits, corpus, fates


def dropped_rows(item: dict[str, Any]) -> int:
    return sum(reason["count"] for reason in item["dropped"].values())


def texts(count: int, tag: str = "row") -> list[str]:
    return [f"{tag} {number} " + "x" * (number * 37 % 101) for number in range(count)]


def test_blocks_are_joined_in_order_and_their_rows_counted() -> None:
    config = make_config({}, {})
    blocks = [
        make_block(["a", "b"], dropped=[(1, filters.GARBLED)]),
        make_block([], dropped=[(0, filters.GARBLED), (1, filters.OVERLONG)]),
        make_block(["c"], dropped=[(0, filters.CONTAMINATED)], overlaps=[Overlap(0, "mmlu:1", "words")]),
        make_block(["d"], source_id=1),
    ]
    _, corpus, fates = run(config, blocks)
    assert corpus.source_ids.tolist() == [0, 0, 0, 1]
    assert corpus.rows.tolist() == [0, 2, 6, 0]
    assert [fate.rows for fate in fates] == [7, 1]
    assert fates[0].dropped[filters.GARBLED].first_rows == [2, 4]
    assert fates[0].dropped[filters.OVERLONG].first_rows == [5]
    assert fates[0].overlaps == [{"row": 6, "item": "mmlu:1", "text": "words"}]
    assert fates[1].dropped == {}


def test_a_job_without_a_document_says_why() -> None:
    config = make_config()
    fates = [SourceFate("s", config.sources[0])]
    with pytest.raises(UserError, match=r"none of the 2 rows is left .*2 garbled") as caught:
        gather([make_block([], dropped=[(0, filters.GARBLED), (1, filters.GARBLED)])], fates)
    assert "\n" not in str(caught.value)


def test_control_a_lost_row_is_a_defect_that_stops_the_job() -> None:
    _, _, [fate] = run(make_config(), [make_block(["a", "b", "c"])])
    fate.train_rows -= 1
    with pytest.raises(RuntimeError, match="do not add up"):
        fate.describe(9)


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_every_row_has_one_fate(data: st.DataObject) -> None:
    """With any weights, duplicates over sources, drops, balance, replay and held-out rows."""
    num_sources = data.draw(st.integers(1, 3))
    sources: list[dict[str, Any]] = []
    blocks: list[Block] = []
    for source_id in range(num_sources):
        replay = source_id > 0 and data.draw(st.booleans())
        weight = data.draw(st.sampled_from([0.5, 1, 1.5, 2]))
        grouped = data.draw(st.booleans())
        sources.append({"role": "replay", "ratio": 0.2} if replay else {"weight": weight})
        sources[-1] |= {"balance_by": "kind"} if grouped else {}
        for _ in range(data.draw(st.integers(1, 2))):
            chosen = data.draw(st.lists(st.sampled_from(texts(30)), max_size=25))
            reasons = data.draw(st.lists(st.sampled_from([filters.GARBLED, filters.OVERLONG]), max_size=4))
            first = data.draw(st.integers(0, len(chosen)))
            dropped = [(first + row, reason) for row, reason in enumerate(reasons)]
            groups = [data.draw(st.sampled_from("ab")) for _ in chosen] if grouped else ()
            blocks.append(make_block(chosen, source_id, dropped=dropped, groups=groups))
    heldout, dedup = data.draw(st.sampled_from([0, 0.2, 3])), data.draw(st.sampled_from(["none", "exact"]))
    config = make_config(*sources, heldout=heldout, dedup=dedup)
    refused = ""
    try:
        splits, corpus, _ = run(config, blocks)
    except UserError as error:
        refused = str(error)
    if refused:
        assert "is left" in refused or "keeps none" in refused
        return
    train, held = set(splits["train"].tolist()), set(splits.get("heldout", np.empty(0, int)).tolist())
    keys = [row.tobytes() for row in corpus.keys]
    assert not {keys[document] for document in train} & {keys[document] for document in held}
    used = sorted(train | held)
    assert dedup == "none" or len({keys[document] for document in used}) == len(used)
    assert (np.diff(splits["train"]) >= 0).all()


def test_reasons_apply_in_order_and_weights_repeat_rows() -> None:
    """A row that the weight leaves out is no duplicate, and the first of equal rows that is left is kept."""
    rows = texts(400)
    config = make_config({"weight": 0.5}, {"weight": 2})
    splits, corpus, fates = run(config, [make_block(rows), make_block(rows, 1)])
    first, second = fates
    sampled = 400 - first.count(filters.NOT_SAMPLED)
    assert 150 < sampled < 250
    assert first.count(filters.DUPLICATE) == 0
    assert second.count(filters.DUPLICATE) == sampled == first.train_documents
    assert second.train_rows == 400 - sampled
    assert second.train_documents == 2 * second.train_rows
    counts = np.bincount(splits["train"], minlength=len(corpus))
    assert set(counts[:400].tolist()) == {0, 1}
    assert set(counts[400:].tolist()) == {0, 2}


def test_without_dedup_equal_rows_stay() -> None:
    rows = [*texts(10), *texts(10)]
    assert len(run(make_config(dedup="none"), [make_block(rows)])[0]["train"]) == 20
    assert len(run(make_config(), [make_block(rows)])[0]["train"]) == 10


def test_held_out_rows_stay_when_a_source_is_added_before_or_behind() -> None:
    def held(*sources: tuple[int, list[str]], mine: int) -> set[int]:
        config = make_config(*({} for _ in sources), heldout=0.2)
        splits, corpus, _ = run(config, [make_block(rows, source_id) for source_id, rows in sources])
        chosen = splits["heldout"]
        return set(corpus.rows[chosen[corpus.source_ids[chosen] == mine]].tolist())

    rows, others = texts(500), texts(700, "other")
    alone = held((0, rows), mine=0)
    assert 60 < len(alone) < 140
    assert held((0, rows), (1, others), mine=0) == alone
    assert held((0, others), (1, rows), mine=1) == alone
    config = make_config(heldout=0.2, seed=1)
    splits, _, _ = run(config, [make_block(rows)])
    assert set(splits["heldout"].tolist()) != alone, "control: another seed holds out other rows"


def test_a_held_out_split_that_stays_empty_is_an_error() -> None:
    with pytest.raises(UserError, match=r"heldout 1e-09: keeps none of the 3 rows"):
        run(make_config(heldout=1e-9), [make_block(["a", "b", "c"])])


def test_balance_counts_what_is_left_in_training() -> None:
    groups = ["a"] * 300 + ["b"] * 40
    config = make_config({}, {"balance_by": "kind"}, heldout=0.25)
    splits, corpus, fates = run(config, [make_block(texts(50)), make_block(texts(340, "other"), 1, groups=groups)])
    train = splits["train"]
    chosen = corpus.rows[train[corpus.source_ids[train] == 1]]
    assert (chosen < 300).sum() == (chosen >= 300).sum() > 20
    assert fates[0].count(filters.NOT_BALANCED) == 0
    assert fates[1].count(filters.NOT_BALANCED) == 340 - fates[1].heldout_rows - len(chosen)
    held = splits["heldout"]
    assert (corpus.rows[held[corpus.source_ids[held] == 1]] < 300).sum() > 40, "held-out rows are not balanced"


@pytest.mark.parametrize("ratios", [(0.1,), (0.5,), (0.2, 0.3)])
@pytest.mark.parametrize("count", [300, 30_000])
def test_replay_reaches_its_share_of_the_final_tokens(ratios: tuple[float, ...], count: int) -> None:
    """From too few rows, which repeat, and from too many, which are sampled; the data's weight counts."""
    data = {"weight": 1.5}
    config = make_config(data, *({"role": "replay", "ratio": ratio} for ratio in ratios))
    blocks = [make_block(texts(4000))]
    blocks += [make_block(texts(count, f"old{number}"), number) for number in range(1, len(ratios) + 1)]
    _, _, fates = run(config, blocks)
    total = sum(fate.train_tokens for fate in fates)
    for fate, ratio in zip(fates[1:], ratios, strict=True):
        assert fate.train_tokens / total == pytest.approx(ratio, rel=0.01)
        assert (fate.count(filters.REPLAY_NOT_NEEDED) > 0) == (count == 30_000)
    alone = run(make_config(data), blocks[:1])[2][0]
    assert fates[0].train_tokens == alone.train_tokens, "replay does not change what is fresh"


def test_control_without_a_role_the_share_is_another() -> None:
    _, _, fates = run(make_config({}, {}), [make_block(texts(400)), make_block(texts(3000, "old"), 1)])
    assert fates[1].train_tokens / sum(fate.train_tokens for fate in fates) > 0.8


def test_a_replay_source_of_which_nothing_is_left_is_an_error() -> None:
    config = make_config({}, {"role": "replay", "ratio": 0.1})
    with pytest.raises(UserError, match=r"1\.json: role replay, but none of its rows is left"):
        run(config, [make_block(["a", "b"]), make_block(["b"], 1)])


def test_near_duplicates_are_dropped_and_listed_by_cluster() -> None:
    random = np.random.default_rng(0)
    long = [" ".join(f"w{word}" for word in random.integers(0, 9999, size=WORDS)) for _ in range(6)]
    near = [*long, f"{long[0]} more", f"{long[0]} again", f"{long[3]} more", long[1]]
    config = make_config(dedup="near")
    signatures = Signer(config.near).signatures(near)
    fates = [SourceFate("s", config.sources[0])]
    corpus = gather([make_block(near, signatures=signatures)], fates)
    splits, clusters = choose(config, corpus, fates)
    assert splits["train"].tolist() == [0, 1, 2, 3, 4, 5]
    assert (fates[0].count(filters.DUPLICATE), fates[0].count(filters.NEAR_DUPLICATE)) == (1, 3)
    assert clusters is not None
    assert describe_clusters(clusters, corpus, fates) == {
        "clusters": 2,
        "rows_dropped": 3,
        "largest_rows": 3,
        "largest": [{"kept": "s:1", "dropped": ["s:7", "s:8"]}, {"kept": "s:4", "dropped": ["s:9"]}],
    }
    exact, none = run(make_config(), [make_block(near)])[0], run(make_config(dedup="none"), [make_block(near)])[0]
    assert (len(exact["train"]), len(none["train"])) == (9, 10), "control"


def test_targets_leave_out_the_first_token_of_a_document() -> None:
    encoded = Encoded(
        ids=np.zeros(12, dtype=np.int32),
        lengths=np.array([4, 5, 3], dtype=np.int32),
        num_runs=np.array([1, 2, 0], dtype=np.int32),
        runs=np.array([[0, 4], [1, 2], [3, 5]], dtype=np.int32),
    )
    block = make_block(["aaaa", "bbbbb", "ccc"])
    fates = [SourceFate("s", make_config().sources[0])]
    corpus = gather([Block(**{**vars(block), "encoded": encoded})], fates)
    assert targets_of(corpus).tolist() == [3, 3, 0]
