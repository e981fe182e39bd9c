"""HellaSwag prompts and draws, asserted literally. Run: pytest tests/unit/test_eval_hellaswag.py"""

import random

import pytest

from sft.errors import UserError
from sft.eval.tasks.hellaswag import HellaswagRow, build_items, preprocess

PLAIN = ("one.", "two.", "three.", "four.")


def row(label="Topic", ctx_a="It begins.", ctx_b="", endings=PLAIN, gold=0, source="", rest="{}"):
    return HellaswagRow(label, ctx_a, ctx_b, endings, gold, source, rest)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("  plain  ", "plain"),
        ("in a tag [substeps]", "in a tag "),  # strip came before the tag was removed
        ("[title] Dig.", " Dig."),
        ("One [title] Two", "One. Two"),
        ("a [www.x.org] b", "a b"),
        ("a   b", "a  b"),  # one pass: three blanks become two
        ("a    b", "a  b"),
        ("[open [inner] rest]", " rest]"),  # the shortest match
        ("[two\nlines]", "[two\nlines]"),  # the dot does not match a newline
        ("\u00a0nbsp\u00a0[x]", "nbsp\u00a0"),
        ("[substeps]", ""),
    ],
)
def test_preprocess(raw, expected):
    assert preprocess(raw) == expected


def test_query_lower_cases_the_rest_of_ctx_b():
    assert row(ctx_b="then SHE Adds NASA salt").query == "Topic: It begins. Then she adds nasa salt"
    assert row(ctx_b="éCOLE").query == "Topic: It begins. École"
    assert row(ctx_b="").query == "Topic: It begins."


def test_zero_shot_item_keeps_edge_blanks():
    endings = ("[title] Dig.", "twice  done", "same.", "same.")
    (item,) = build_items([row(ctx_a="Begin. [step]", endings=endings, gold=3, source="wikihow~1")], [], 0, None)
    assert item.context == "Topic: Begin. "
    assert item.choices == (" Dig.", "twice done", "same.", "same.")
    assert (item.gold, item.cluster, item.doc_id) == (3, "wikihow~1", 0)


def test_rows_without_a_source_are_their_own_clusters():
    items = build_items([row(), row(ctx_a="Other.")], [], 0, None)
    assert [item.cluster for item in items] == ["row 0", "row 1"]


def test_two_shot_prompt_literally():
    train = [row(ctx_a=f"Train {number}.", gold=number % 4) for number in range(5)]
    items = build_items([row(ctx_a="Asked."), row(ctx_a="Again.")], train, 2, None)
    # random.Random(1234).sample(range(5), 3) gives [3, 0, 4] and then [0, 4, 2]
    assert items[0].context == "Topic: Train 3. four.\n\nTopic: Train 0. one.\n\nTopic: Asked."
    assert items[1].context == "Topic: Train 0. one.\n\nTopic: Train 4. one.\n\nTopic: Again."


def test_one_more_row_is_drawn_than_shown():
    """Drawing k instead of k + 1 gives the same first item and other ones from then on."""
    train = [row(ctx_a=f"Train {number}.") for number in range(200)]
    asked = [row(ctx_a=f"Asked {number}.") for number in range(6)]
    items = build_items(asked, train, 10, None)

    def shown(count):
        rng = random.Random(1234)
        return [
            "".join(f"Topic: Train {index}. one.\n\n" for index in rng.sample(range(200), count)[:10]) for _ in asked
        ]

    ours = [item.context[: item.context.index("Topic: Asked")] for item in items]
    assert ours == shown(11)
    assert ours[1:] != shown(10)[1:]


def test_the_tested_row_itself_is_never_an_example():
    asked = row(ctx_a="Asked.", gold=2)
    train = [row(ctx_a=f"Train {number}.") for number in range(4)] + [asked] * 12
    for item in build_items([asked] * 20, train, 3, None):
        assert item.context.count("Asked.") == 1
        assert item.context.count("Train") == 3


def test_a_row_that_differs_in_another_field_only_is_an_example():
    asked = row(ctx_a="Asked.")
    train = [row(ctx_a="Asked.", rest='{"ind": 7}')] * 3
    (item,) = build_items([asked], train, 2, None)
    assert item.context.count("Asked.") == 3


def test_limit_keeps_the_draws():
    train = [row(ctx_a=f"Train {number}.") for number in range(50)]
    asked = [row(ctx_a=f"Asked {number}.") for number in range(6)]
    assert build_items(asked, train, 5, 3) == build_items(asked, train, 5, None)[:3]


@pytest.mark.parametrize("train", [[row()] * 2, [row(ctx_a="Asked.")] * 9])
def test_too_small_a_pool_is_an_error(train):
    with pytest.raises(UserError, match=r"--shots.hellaswag (2|is 2)"):
        build_items([row(ctx_a="Asked.")], train, 2, None)


def test_ranks_have_generators_of_their_own():
    """Document i of a run on W ranks has the draw that document i // W has on one."""
    train = [row(ctx_a=f"Train {number}.") for number in range(200)]
    asked = [row(ctx_a=f"Asked {number}.") for number in range(7)]
    alone = [item.shots for item in build_items(asked, train, 5, None)]
    for world in (2, 3):
        items = build_items(asked, train, 5, None, world=world)
        assert [item.shots for item in items] == [alone[number // world] for number in range(7)]
        assert build_items(asked, train, 5, 4, world=world) == items[:4]
    assert len(set(alone)) == 7


def test_a_fixed_draw_is_one_for_all_and_never_asked():
    asked = [row(ctx_a=f"Asked {number}.") for number in range(6)]
    train = [*asked[3:] * 30, *(row(ctx_a=f"Train {number}.") for number in range(5))]
    items = build_items(asked, train, 5, None, draw="fixed")
    assert len({item.shots for item in items}) == 1
    assert sorted(question for question, _ in items[0].shots) == [f"Topic: Train {number}." for number in range(5)]
    assert build_items(asked, train, 5, 2, draw="fixed") == items[:2]  # though row 3 is not asked then
    assert build_items(asked, train, 5, None, draw="fixed", world=2) == items
    with pytest.raises(UserError, match=r"only 5 rows that differ from the tested ones, --shots.hellaswag is 6"):
        build_items(asked, train, 6, None, draw="fixed")
