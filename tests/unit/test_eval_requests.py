"""Token requests: where continuations begin, truncation, guards. Run: pytest tests/unit/test_eval_requests.py"""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from sft.errors import UserError
from sft.eval.requests import Prompting, Request, build_requests, count_truncated, digest_requests, digest_template
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


SHOTS = (("One?", "B"), ("Two? ", "D"))
SOLVED = Item("mmlu", "anatomy", 3, "About it.\n\n", SHOTS, "Which?", ("A", "B", "C", "D"), 0, "anatomy")
TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[go]{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.fixture
def chat(tmp_path):
    """A tokenizer by its chat template."""

    def load(template):
        folder = tiny.make_tokenizer(tmp_path / "chat")
        (folder / "chat_template.jinja").write_text(template)
        return load_tokenizer(folder)

    return load


def prompt_of(tokenizer, item=SOLVED, **prompting):
    return build_requests([item], tokenizer, 500, Prompting(**prompting)).prompts[0]


@pytest.mark.parametrize(
    ("instruction", "start"),
    [
        (None, "About it.\n\n"),
        ("", "About it.\n\n"),
        ("Be good.", "Be good.\n\nAbout it.\n\n"),
        ("Be good.\n", "Be good.\nAbout it.\n\n"),
        ("Be good.\u00a0", "Be good.\u00a0About it.\n\n"),
    ],
)
def test_plain_prompts_begin_with_the_system_instruction(tokenizer, instruction, start):
    assert prompt_of(tokenizer, system_instruction=instruction) == f"{start}One? B\n\nTwo?  D\n\nWhich?"


def test_without_a_description_nothing_parts_instruction_and_question(tokenizer):
    assert prompt_of(tokenizer, replace(SOLVED, description=""), system_instruction="Hm.") == (
        "Hm.One? B\n\nTwo?  D\n\nWhich?"
    )


def test_turns_of_a_chat_literally(chat):
    tokenizer = chat(TURNS)
    system = "[system]Hm.\n\nAbout it.\n\n"
    assert prompt_of(tokenizer, chat="multi_turn", system_instruction="Hm.") == (
        f"{system}[user]One?[assistant]B[user]Two? [assistant]D[user]Which?[go]"
    )
    assert prompt_of(tokenizer, chat="single_turn", system_instruction="Hm.") == (
        f"{system}[user]One? B\n\nTwo?  D\n\nWhich?[go]"
    )
    bare = replace(SOLVED, description="", shots=())
    assert prompt_of(tokenizer, bare, chat="multi_turn") == prompt_of(tokenizer, bare, chat="single_turn")
    assert prompt_of(tokenizer, bare, chat="multi_turn") == "[user]Which?[go]"


def test_a_chats_answer_has_no_delimiter_but_the_templates_own(chat):
    asked = build_requests([SOLVED], chat(TURNS + " \n"), 500, Prompting(chat="single_turn"))
    assert pairs(asked.requests)[1][1] == ids(" B")  # jinja keeps all but the last line break
    asked = build_requests([SOLVED], chat(TURNS), 500, Prompting(chat="single_turn"))
    assert pairs(asked.requests)[1][1] == ids("B")
    with pytest.raises(UserError, match=r"hellaswag item 7, choice 2: 0 tokens to score"):
        build_requests([ITEM], chat(TURNS), 500, Prompting(chat="single_turn"))


def test_a_template_that_refuses_system_loses_it_and_says_so(chat):
    tokenizer = chat(NO_SYSTEM + TURNS)
    asked = build_requests([SOLVED], tokenizer, 500, Prompting(chat="single_turn", system_instruction="Hm."))
    assert asked.system_dropped
    assert asked.prompts == ["[user]One? B\n\nTwo?  D\n\nWhich?[go]"]
    without = build_requests([replace(SOLVED, description="")], tokenizer, 500, Prompting(chat="single_turn"))
    assert not without.system_dropped
    assert not build_requests([SOLVED], tokenizer, 500, PLAIN).system_dropped


def test_a_chat_brings_its_own_bos_or_gets_the_tokenizers(chat):
    for template in (TURNS, "{{ bos_token }}" + TURNS):
        for kind in ("multi_turn", "single_turn"):
            [(ctx, _), *_] = pairs(build_requests([SOLVED], chat(template), 500, Prompting(chat=kind)).requests)
            assert ctx[0] == BOS
            assert ctx.count(BOS) == 1


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('never') }}", "never"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{% for %}", "Expected an expression"),
        ("{{ nothing.at.all }}", "undefined"),
    ],
)
def test_a_template_that_fails_is_told_in_one_line(chat, template, reason):
    with pytest.raises(UserError, match=r"tokenizer .*/chat: its chat template fails on anatomy item 3: ") as caught:
        prompt_of(chat(template), chat="multi_turn")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_template_cannot_chat(tokenizer):
    with pytest.raises(UserError, match=r"tokenizer .*/tok: has no chat template.*--chat none"):
        prompt_of(tokenizer, chat="multi_turn")
    assert digest_template(tokenizer) is None


def test_several_templates_need_a_default(tmp_path, tokenizer):
    file = tokenizer.path / "tokenizer_config.json"

    def with_templates(*names):
        templates = [{"name": name, "template": f"{name}{TURNS}"} for name in names]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": templates}))
        return load_tokenizer(tokenizer.path)

    assert prompt_of(with_templates("rag", "default"), chat="single_turn").startswith("default[system]About")
    assert digest_template(with_templates("rag", "default")) == hashlib.sha256(f"default{TURNS}".encode()).hexdigest()
    with pytest.raises(UserError, match=r"its chat templates are rag, tools; need one named default"):
        prompt_of(with_templates("rag", "tools"), chat="single_turn")


def test_a_bare_sentencepiece_model_cannot_chat(chat):
    bare = replace(chat(TURNS), sentencepiece=object())
    with pytest.raises(UserError, match=r"bare tokenizer\.model does not recognise the special tokens"):
        prompt_of(bare, chat="multi_turn")


def test_older_harnesses_add_no_special_token(tmp_path, tokenizer):
    old = Prompting(compat="lm_eval<=0.4.9.1")
    assert pairs(build_requests([ITEM], tokenizer, 100, old).requests)[0] == (ids("Hi: it"), ids(" is"))
    marked = replace(ITEM, question="<s>Hi")  # a text that spells BOS still has it
    assert pairs(build_requests([marked], tokenizer, 100, old).requests)[0][0] == [BOS, *ids("Hi")]


def test_the_choices_of_an_item_share_one_context(tokenizer):
    requests = build_requests([ITEM, SOLVED], tokenizer, 500, PLAIN).requests
    assert len({id(request.ctx_ids) for request in requests}) == 2


def test_digest_does_not_depend_on_shared_arrays(tokenizer):
    requests = build_requests([ITEM, SOLVED, SOLVED], tokenizer, 500, PLAIN).requests
    apart = [Request(request.ctx_ids.copy(), request.cont_ids.copy()) for request in requests]
    assert digest_requests(apart) == digest_requests(requests)
    apart[5].ctx_ids[0] += 1
    assert digest_requests(apart) != digest_requests(requests)
