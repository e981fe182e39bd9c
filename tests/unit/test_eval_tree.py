"""Plans of both engines: every request once, its input along its branch. Run: pytest tests/unit/test_eval_tree.py"""

import random
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.eval import tree
from sft.eval.requests import Request
from sft.eval.tree import deal, distinct_rows, plan_packed, plan_plain

BUDGETS = st.sampled_from([1, 20, 64, 500])
ids_of = st.lists(st.integers(3, 5), max_size=8)  # three ids: rows often agree, and often begin one another


@st.composite
def request_sets(draw):
    """Requests whose contexts share beginnings, with continuations that share theirs."""
    stems = draw(st.lists(st.lists(st.integers(3, 4), max_size=12), min_size=1, max_size=3))
    contexts = draw(st.lists(st.tuples(st.sampled_from(stems), ids_of), min_size=1, max_size=7))
    requests = []
    for stem, rest in contexts:
        for continuation in draw(st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=4), min_size=1, max_size=4)):
            requests.append(request([2, *stem, *rest], continuation))
    return requests


def request(context, continuation):
    return Request(np.array(context, dtype=np.int32), np.array(continuation, dtype=np.int32))


@contextmanager
def small(**constants):
    """Limits that a handful of ids reaches."""
    with mock.patch.multiple(tree, **{"TREE_TOKENS": 12, "MIN_PREFIX": 4, "PREFIX_SHARE": 3, **constants}):
        yield


def trees_of(bins):
    return [(one, each) for one in bins for batch in one.batches for each in batch]


def assert_spells(requests, max_length, bins):
    """Every request is in one tree, and a token that sees itself and its ancestors sees the request's input."""
    assert sorted(number for one in bins for number in one.requests) == list(range(len(requests)))
    for one, each in trees_of(bins):
        order = np.arange(len(each.ids))
        for scored in each.scored:
            inputs, targets = requests[scored.request].clip(max_length)
            last = scored.positions[-1]
            seen = np.flatnonzero((order <= last) & (last < each.end))
            assert np.concatenate([one.prefix, each.ids[seen]]).tolist() == inputs.tolist()
            assert each.depth[seen].tolist() == list(range(len(seen)))
            assert scored.positions.tolist() == seen[-len(targets) :].tolist()
            assert scored.targets.tolist() == targets.tolist()


@settings(max_examples=80, deadline=None)
@given(request_sets(), BUDGETS, st.sampled_from([6, 9, 100]))
def test_every_branch_spells_its_request(requests, budget, max_length):
    rows = distinct_rows(requests, max_length)
    with small():
        packed = plan_packed(rows, budget)
    assert_spells(requests, max_length, packed)
    assert_spells(requests, max_length, plan_plain(rows, budget, None))
    assert sum(one.num_tokens for one in plan_plain(rows, budget, 3)) == sum(len(row.ids) for row in rows)


def test_a_wrong_branch_would_show():
    requests = [request([2, 3, 4], [3]), request([2, 3, 5], [3])]
    bins = plan_packed(distinct_rows(requests, 9), 64)
    assert_spells(requests, 9, bins)
    ((one, each),) = trees_of(bins)
    assert (each.ids.tolist(), each.depth.tolist(), each.end.tolist()) == ([2, 3, 4, 5], [0, 1, 2, 2], [4, 4, 3, 4])
    for wrong in (
        replace(each, end=np.full(4, 4)),
        replace(each, depth=np.arange(4)),
        replace(each, ids=each.ids[::-1]),
        replace(each, scored=each.scored[:1]),
    ):
        with pytest.raises(AssertionError):
            assert_spells(requests, 9, [replace(one, batches=((wrong,),))])


@settings(max_examples=30, deadline=None)
@given(request_sets(), st.randoms(use_true_random=False), BUDGETS)
def test_order_and_repetition_of_requests_do_not_matter(requests, rng, budget):
    shuffled = [*requests, *rng.choices(requests, k=3)]
    rng.shuffle(shuffled)
    with small():
        layouts = [
            [[part.tolist() for part in (one.prefix, each.ids, each.depth, each.end)] for one, each in trees_of(bins)]
            for bins in (plan_packed(distinct_rows(asked, 100), budget) for asked in (requests, shuffled))
        ]
    assert layouts[0] == layouts[1]


@settings(max_examples=30, deadline=None)
@given(request_sets(), BUDGETS, st.integers(1, 30))
def test_batches_keep_their_limits(requests, budget, scored_limit):
    rows = distinct_rows(requests, 100)
    with small(SCORED_PER_BATCH=scored_limit, KV_PER_TOKEN=2):
        for one in [*plan_packed(rows, budget), *plan_plain(rows, budget, None)]:
            for batch in one.batches:
                width = max(len(each.ids) for each in batch)
                if len(batch) > 1:  # a larger one runs by itself
                    assert len(batch) * width <= budget
                    assert len(batch) * (len(one.prefix) + width) <= 2 * budget
                    assert sum(each.num_scored for each in batch) <= scored_limit
    assert all(len(batch) <= 2 for one in plan_plain(rows, 1, 2) for batch in one.batches)


@settings(max_examples=30, deadline=None)
@given(request_sets(), BUDGETS, st.integers(1, 5))
def test_dealt_bins_are_all_bins_and_ranks_end_together(requests, budget, world):
    with small():
        bins = plan_packed(distinct_rows(requests, 100), budget)
    dealt = deal(bins, world)
    assert sorted(index for own in dealt for index in own) == list(range(len(bins)))
    loads = [sum(bins[index].num_tokens for index in own) for own in dealt]
    assert max(loads) - min(loads) <= max(one.num_tokens for one in bins)


def test_prefixes_are_kept_and_end_before_what_is_scored():
    rng = random.Random(0)
    stem = [3] * 30
    requests = [request([2, *stem, *rng.choices(range(3, 90), k=6)], [7]) for _ in range(10)]
    with small():
        bins = plan_packed(distinct_rows(requests, 100), 30)
    assert_spells(requests, 100, bins)
    assert {len(one.prefix) for one in bins} == {31}
    assert sum(len(one.batches) for one in bins) > 1
    # one more request, whose scored ids begin within what all share: the prefix ends before them
    requests.append(request([2, *stem[:20]], [3] * 11))
    with small():
        bins = plan_packed(distinct_rows(requests, 100), 64)
    assert_spells(requests, 100, bins)
    assert {len(one.prefix) for one in bins} == {20}


def test_rows_that_begin_one_another_share_a_branch():
    requests = [request([2, 3, 4], ids) for ids in ([5], [5, 6], [5, 6, 7], [5, 6, 7, 8])]
    bins = plan_packed(distinct_rows(requests, 100), 64)
    assert_spells(requests, 100, bins)
    assert sum(one.num_tokens for one in bins) == 6


def test_rows_longer_than_the_context_lose_their_beginning_and_share_what_is_left():
    requests = [request([*range(2, 32), last], [50, 51]) for last in (40, 41)]
    bins = plan_packed(distinct_rows(requests, 10), 64)
    assert_spells(requests, 10, bins)
    assert [len(requests[0].clip(10)[0]), sum(one.num_tokens for one in bins)] == [10, 12]


def random_ids(rng, length):
    return [rng.randrange(3, 30_000) for _ in range(length)]


def savings(requests, max_length=4096):
    """(tokens with one row per request, per distinct row, in trees)."""
    rows = distinct_rows(requests, max_length)
    bins = plan_packed(rows, 16384)
    assert_spells(requests, max_length, bins)
    asked = sum(len(one.ctx_ids) + len(one.cont_ids) - 1 for one in requests)
    return asked, sum(len(row.ids) for row in rows), sum(one.num_tokens for one in bins)


def test_what_sharing_saves():
    """The shapes of MMLU 5-shot, HellaSwag 10-shot and 0-shot; the counts are those of the tree, by hand."""
    rng = random.Random(0)
    mmlu, ten, zero = [], [], []
    for _ in range(2):
        shots = random_ids(rng, 600)
        for _ in range(40):
            context = shots + random_ids(rng, 90)
            mmlu += [request(context, [letter]) for letter in (65, 66, 67, 68)]
    for requests, length in ((ten, 1000), (zero, 60)):
        for _ in range(8):
            context = random_ids(rng, length)
            requests += [request(context, random_ids(rng, 30)) for _ in range(4)]
    assert savings(mmlu) == (80 * 4 * 690, 80 * 690, 2 * 600 + 80 * 90)  # 26x fewer, and 4 of it by equal rows
    assert savings(ten) == (8 * 4 * 1029, 8 * 4 * 1029, 8 * (1000 + 4 * 29))  # 3.7x
    assert savings(zero) == (8 * 4 * 89, 8 * 4 * 89, 8 * (60 + 4 * 29))  # 2x


def test_an_item_longer_than_a_tree_behind_a_prefix_still_shares_its_context():
    rng = random.Random(0)
    shots, requests = random_ids(rng, 100), []
    for _ in range(6):
        context = shots + random_ids(rng, 600)
        requests += [request(context, random_ids(rng, 10)) for _ in range(4)]
    assert savings(requests)[2] == 100 + 6 * (600 + 4 * 9)
