"""Token requests: where continuations begin, truncation, guards. Run: pytest tests/unit/test_eval_requests.py"""

import json
from dataclasses import replace

import numpy as np
import pytest

from sft.errors import UserError
from sft.eval.requests import Prompting, Request, build_requests, count_truncated, digest_requests
from sft.eval.tasks.item import Item
from sft.tokenizer import load_tokenizer
from tests import tiny

ITEM = Item("hellaswag", "hellaswag", 7, "", (), "Hi: it", ("is", " so", "", "é"), 0, "source")
PLAIN = Prompting()
BOS = 1


@pytest.fixture
def tokenizer(tmp_path):
    return load_tokenizer(tiny.make_tokenizer(tmp_path / "tok"))


def ids(text):
    """The tiny tokenizer's ids are byte + 3."""
    return [byte + 3 for byte in text.encode()]


def edit(folder, change):
    state = json.loads((folder / "tokenizer.json").read_text())
    change(state)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return load_tokenizer(folder)


def pairs(requests):
    return [(request.ctx_ids.tolist(), request.cont_ids.tolist()) for request in requests]


def test_continuations_begin_with_the_blank(tokenizer):
    context = [BOS, *ids("Hi: it")]
    assert pairs(build_requests([ITEM], tokenizer, 100, PLAIN).requests) == [
        (context, ids(" is")),
        (context, ids("  so")),
        (context, ids(" ")),
        (context, ids(" é")),
    ]


@pytest.mark.parametrize("blanks", [" ", "\u00a0", " \n\t"])
def test_trailing_blanks_move_to_the_continuation(tokenizer, blanks):
    moved = build_requests([replace(ITEM, question=f"Hi: it{blanks}")], tokenizer, 100, PLAIN).requests
    assert pairs(moved)[0] == ([BOS, *ids("Hi: it")], ids(f"{blanks} is"))


def test_bos_is_the_tokenizers_decision(tmp_path, tokenizer):
    without = edit(tiny.make_tokenizer(tmp_path / "plain"), lambda state: state.update(post_processor=None))
    assert pairs(build_requests([ITEM], without, 100, PLAIN).requests)[0] == (ids("Hi: it"), ids(" is"))
    assert digest_requests(build_requests([ITEM], without, 100, PLAIN).requests) != digest_requests(
        build_requests([ITEM], tokenizer, 100, PLAIN).requests
    )


def test_a_text_that_brings_its_own_bos_gets_no_second_one(tokenizer):
    assert pairs(build_requests([replace(ITEM, question="<s>Hi")], tokenizer, 100, PLAIN).requests)[0][0] == [
        BOS,
        *ids("Hi"),
    ]


def test_many_items_keep_their_order(tokenizer):
    items = [replace(ITEM, doc_id=number, question=f"Hi {number}") for number in range(300)]
    requests = build_requests(items, tokenizer, 100, PLAIN).requests
    assert len(requests) == 1200
    assert requests[4 * 299].ctx_ids.tolist() == [BOS, *ids("Hi 299")]


def test_truncation_keeps_the_last_tokens_plus_one():
    request = Request(np.arange(10, 20, dtype=np.int32), np.arange(20, 23, dtype=np.int32))
    read, scored = request.clip(max_length=5)
    assert read.tolist() == [17, 18, 19, 20, 21]  # six tokens are kept, the last is only predicted
    assert scored.tolist() == [20, 21, 22]
    read, _ = request.clip(max_length=12)
    assert read.tolist() == list(range(10, 22))
    assert request.clip(max_length=500)[0].tolist() == list(range(10, 22))


def test_items_that_lose_tokens_are_counted_once():
    def request(num_ctx, num_cont):
        return Request(np.zeros(num_ctx, dtype=np.int32), np.ones(num_cont, dtype=np.int32))

    short, fits, long = request(5, 1), request(8, 3), request(8, 4)
    assert (fits.clip(10)[0].size, long.clip(10)[0].size) == (10, 10)
    requests = [short, fits, fits, fits, *[short, long, short, long], *[long] * 4]
    assert count_truncated(requests, 10) == 2
    assert count_truncated(requests, 11) == 0


def test_a_tokenizer_that_appends_eos_is_refused(tmp_path):
    def append_eos(state):
        processor = state["post_processor"]
        processor["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
        processor["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}

    tokenizer = edit(tiny.make_tokenizer(tmp_path / "eos"), append_eos)
    with pytest.raises(UserError, match=r"tokenizer .*/eos: adds </s> after every text.*add_eos_token"):
        build_requests([ITEM], tokenizer, 100, PLAIN)


def test_a_tokenizer_that_merges_across_the_seam_is_refused(tmp_path):
    def merge_t_and_blank(state):  # "Ġ" is the byte-level stand-in of a blank
        state["model"]["vocab"]["tĠ"] = 259
        state["model"]["merges"].append(["t", "Ġ"])

    tokenizer = edit(tiny.make_tokenizer(tmp_path / "merge"), merge_t_and_blank)
    with pytest.raises(UserError, match=r"hellaswag item 7, choice 0: the tokenizer merges the end of the context"):
        build_requests([ITEM], tokenizer, 100, PLAIN)


def test_continuations_that_cannot_be_scored_are_refused(tokenizer):
    with pytest.raises(UserError, match=r"choice 1: 4 tokens to score; need 1 to 3"):
        build_requests([ITEM], tokenizer, 3, PLAIN)
    with pytest.raises(UserError, match=r"hellaswag item 7: its context is blank"):
        build_requests([replace(ITEM, question=" \n")], tokenizer, 100, PLAIN)


def test_digest_sees_where_the_continuation_begins():
    whole = np.arange(6, dtype=np.int32)
    assert digest_requests([Request(whole[:3], whole[3:])]) != digest_requests([Request(whole[:4], whole[4:])])
    assert digest_requests([Request(whole[:3], whole[3:])]) == digest_requests([Request(whole[:3], whole[3:])])
