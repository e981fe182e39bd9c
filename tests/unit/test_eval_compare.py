"""The dictionary of drift.json: verdicts, gate, examples. Run: pytest tests/unit/test_eval_compare.py"""

import json

import numpy as np
import pytest

from sft.eval import compare as module
from sft.eval.compare import Side, compare, decide, verdict
from sft.eval.options import GateSection
from sft.eval.results import HEADLINE, Asked, Scored
from sft.eval.stats import compare_pairs, holm
from sft.eval.tasks.mmlu import CATEGORIES
from tests.eval_records import invented_record

SUBJECTS = [subject for subjects in CATEGORIES.values() for subject in subjects]
COMPARISON = {
    "n", "base", "tuned", "delta", "drop", "se_iid", "se_stratified", "se_clustered", "se", "interval",
    "interval_wald", "interval_tango", "interval_bootstrap", "interval_bootstrap_clustered", "lower_one_sided",
    "upper_one_sided", "right_to_wrong", "wrong_to_right", "wrong_to_other", "changed", "mcnemar_p", "mcnemar_midp",
    "verdict",
}  # fmt: skip
VERDICTS = {
    "degraded beyond margin", "degraded within margin", "degraded", "non-inferior", "improved", "inconclusive",
    "identical",
}  # fmt: skip


def record(task, subject, doc_id, gold, lls, cluster):
    return invented_record(lls, gold, task=task, subject=subject, doc_id=doc_id, chars=(2, 2, 2, 2), cluster=cluster)


def answer(choice, doubt=0.0):
    return [-1.0 + doubt * 0.01 if place == choice else -4.0 - doubt * 0.01 for place in range(4)]


def mmlu(choices, subjects=None):
    """Item i of gold 0 is answered with choices[i]; i % len(subjects) tells its subject."""
    subjects = subjects or SUBJECTS
    names = [subjects[number % len(subjects)] for number in range(len(choices))]
    return [
        record("mmlu", name, number, 0, answer(choice), name)
        for number, (choice, name) in enumerate(zip(choices, names, strict=True))
    ]


def hellaswag(choices):
    return [
        record("hellaswag", "hellaswag", number, 0, answer(choice), f"video~{number // 2}")
        for number, choice in enumerate(choices)
    ]


def side(name, with_texts=False, heldout_loss=None, **tasks):
    asked = {
        task: [Asked(f"question {one.doc_id}", ("a", "b", "c", "d")) for one in records]
        for task, records in tasks.items()
    }
    return Side(name, Scored({"model": f"models/{name}"}, tasks, asked if with_texts else {}), heldout_loss)


def flipped(n, lost, won, other=0):
    """(base, tuned) choices: right to wrong, wrong to right, wrong to other wrong; the rest stays right."""
    base = [0] * lost + [1] * (won + other) + [0] * (n - lost - won - other)
    tuned = [2] * lost + [0] * won + [3] * other + [0] * (n - lost - won - other)
    order = np.random.default_rng(0).permutation(n)
    return np.array(base)[order].tolist(), np.array(tuned)[order].tolist()


def report_of(n, lost, won, other=0, max_drop=0.01, with_texts=False, **gate):
    """Of MMLU alone. Where both choices are the same the log-likelihoods still differ, in one item."""
    base, tuned = (mmlu(choices) for choices in flipped(n, lost, won, other))
    tuned[0] = record("mmlu", tuned[0].subject, 0, 0, [ll - 0.001 for ll in tuned[0].lls], tuned[0].cluster)
    sides = [side("base", with_texts, mmlu=base), side("tuned", with_texts, mmlu=tuned)]
    return compare(sides[0], sides[1:], GateSection(max_drop=max_drop, **gate), None, None)


@pytest.fixture(scope="module")
def full():
    """Both tasks, two tuned models, all extras."""
    base_m, tuned_m = flipped(1140, 40, 20, 10)
    base_h, tuned_h = flipped(600, 12, 30, 3)
    base = side("base", True, 2.0, mmlu=mmlu(base_m), hellaswag=hellaswag(base_h))
    tuned = side("tuned", True, 1.0, mmlu=mmlu(tuned_m), hellaswag=hellaswag(tuned_h))
    merged = side("merged", True, None, mmlu=mmlu(base_m), hellaswag=hellaswag(tuned_h))
    noise = {"mmlu": {"items": 256, "flips": 1, "rate": 1 / 256, "max_abs_ll": 0.01}}
    return compare(base, [tuned, merged], GateSection(), noise, [{"prompt": "p", "base": "a", "tuned": "b"}])


def test_it_is_json_without_holes(full):
    assert json.loads(json.dumps(full, allow_nan=False)) == full


def test_all_keys_of_the_schema(full):
    assert set(full) == {
        "schema", "level", "margin", "names", "base", "tuned", "tasks", "any_degradation", "gate", "models", "answers",
    }  # fmt: skip
    assert (full["schema"], full["level"], full["margin"]) == (2, 0.95, 0.01)
    assert full["names"] == {"base": "base", "tuned": "tuned"}
    extras = {"metric", "metrics", "power", "noise", "scores", "margin_histogram", "examples"}
    assert set(full["tasks"]["mmlu"]) == COMPARISON | extras | {"categories", "subjects"}
    assert set(full["tasks"]["hellaswag"]) == COMPARISON | extras
    for task, row in full["tasks"].items():
        assert row["metric"] == HEADLINE[task] == next(iter(row["metrics"]))
        assert {key: row[key] for key in COMPARISON} == row["metrics"][row["metric"]]
        assert set(row["scores"]) == {"margin", "p_gold", "brier", "bits_per_byte", "kl"}
        assert set(row["power"]) == {"flip_rate", "mde", "margin", "power_non_inferior", "items_needed"}
    assert list(full["tasks"]["hellaswag"]["metrics"]) == ["acc_norm", "acc"]
    assert set(full["tasks"]["mmlu"]["categories"]) == set(CATEGORIES)
    assert set(full["tasks"]["mmlu"]["subjects"]) == set(SUBJECTS)
    assert full["tasks"]["mmlu"]["noise"]["flips"] == 1
    assert full["tasks"]["hellaswag"]["noise"] is None
    assert full["answers"] == [{"prompt": "p", "base": "a", "tuned": "b"}]


def test_figures_are_those_of_the_statistics(full):
    base, tuned = (np.array(choices) == 0 for choices in flipped(1140, 40, 20, 10))
    names = np.array([SUBJECTS[number % 57] for number in range(1140)])
    pair = compare_pairs(base, tuned, names, strata=names, draws=module.DRAWS)
    row = full["tasks"]["mmlu"]
    assert (row["n"], row["delta"], row["drop"]) == (1140, pair.delta, pair.drop)
    assert (row["right_to_wrong"], row["wrong_to_right"], row["wrong_to_other"]) == (40, 20, 10)
    assert row["changed"] == 70 / 1140
    assert row["interval"] == row["interval_wald"] == list(pair.interval)
    assert row["interval_bootstrap_clustered"] == list(pair.interval_bootstrap_clustered)
    errors = (row["se_iid"], row["se_stratified"], row["se_clustered"])
    assert errors == (pair.errors.iid, pair.errors.stratified, pair.errors.clustered)
    assert row["se"] == max(errors)
    assert full["tasks"]["hellaswag"]["se_stratified"] is None
    assert row["power"]["flip_rate"] == 60 / 1140


def test_groups_add_up(full):
    row = full["tasks"]["mmlu"]
    for part in ("categories", "subjects"):
        for key in ("n", "right_to_wrong", "wrong_to_right", "wrong_to_other"):
            assert sum(group[key] for group in row[part].values()) == row[key]
    p = [subject["mcnemar_p"] for subject in row["subjects"].values()]
    assert [subject["p_holm"] for subject in row["subjects"].values()] == holm(p)
    assert all(subject["q_bh"] <= subject["p_holm"] for subject in row["subjects"].values())
    assert {subject["interval_bootstrap"] for subject in row["subjects"].values()} == {None}
    assert all(category["interval_bootstrap"] for category in row["categories"].values())


def test_models_base_first(full):
    base, tuned, merged = full["models"]
    assert [one["name"] for one in full["models"]] == ["base", "tuned", "merged"]
    assert [one["heldout_loss"] for one in full["models"]] == [2.0, 1.0, None]
    assert base["path"] == "models/base"
    assert set(base["tasks"]["mmlu"]) == {"metric", "n", "value"}
    row = full["tasks"]["mmlu"]
    for key in ("delta", "interval", "verdict", "right_to_wrong", "wrong_to_right"):
        assert tuned["tasks"]["mmlu"][key] == row[key]
    assert tuned["tasks"]["mmlu"]["value"] == row["tuned"]
    assert base["tasks"]["mmlu"]["value"] == row["base"]
    assert merged["tasks"]["mmlu"]["verdict"] == "identical"
    assert merged["tasks"]["hellaswag"] == tuned["tasks"]["hellaswag"]


def test_any_degradation_is_one_sided_and_adjusted(full):
    """MMLU lost 40 and won 20; HellaSwag lost 12 and won 30, which is no degradation."""
    mmlu_row, hellaswag_row = full["any_degradation"]
    assert (mmlu_row["task"], mmlu_row["metric"], hellaswag_row["metric"]) == ("mmlu", "acc", "acc_norm")
    assert mmlu_row["p"] < 0.01
    assert hellaswag_row["p"] > 0.99
    assert [mmlu_row["p_holm"], hellaswag_row["p_holm"]] == holm([mmlu_row["p"], hellaswag_row["p"]])


def test_no_gate_no_decision(full):
    assert full["gate"] == {
        "max_drop": None, "confidence": 0.95, "rule": "non_inferiority", "passed": None, "failed": [], "decisions": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("n", "lost", "won", "word"),
    [
        (2280, 100, 20, "degraded beyond margin"),
        (2280, 60, 30, "degraded"),
        (11400, 120, 80, "degraded within margin"),
        (2280, 30, 60, "improved"),
        (2280, 20, 20, "non-inferior"),
        (1140, 40, 40, "inconclusive"),
        (1140, 0, 0, "non-inferior"),
        (114, 0, 0, "inconclusive"),
        (114, 6, 0, "degraded"),
        (114, 5, 0, "inconclusive"),
    ],
)
def test_verdicts(n, lost, won, word):
    """Six one-way changes are the least that exact McNemar takes for a change."""
    row = report_of(n, lost, won)["tasks"]["mmlu"]
    assert row["verdict"] == word
    assert word in VERDICTS


def test_verdicts_agree_with_their_own_figures():
    """1,200 random outcomes: what each word promises holds, and McNemar never contradicts it."""
    rng, seen = np.random.default_rng(0), set()
    for _ in range(1200):
        n = int(rng.choice([8, 60, 400, 3000, 14000]))
        lost, won = (int(rng.integers(0, max(2, n // int(rng.choice([4, 20, 100]))))) for _ in range(2))
        base, tuned = np.ones(n, dtype=bool), np.ones(n, dtype=bool)
        tuned[:lost] = False
        base[lost : lost + won] = False
        pair = compare_pairs(base, tuned, rng.integers(0, 30, n).astype(str))
        word = verdict(pair, 0.01)
        seen.add(word)
        low, high = pair.interval
        if word.startswith("degraded"):
            assert high < 0
            assert lost > won
            assert pair.mcnemar_p < 0.05
        if word == "degraded beyond margin":
            assert high < -0.01
        if word in ("non-inferior", "degraded within margin"):
            assert pair.lower_one_sided > -0.01
        if word in ("inconclusive", "degraded"):
            assert pair.lower_one_sided <= -0.01
        if word == "improved":
            assert low > 0
            assert pair.mcnemar_p < 0.05
        if word in ("inconclusive", "non-inferior"):
            assert pair.mcnemar_p >= 0.05 or low <= 0 <= high
    assert seen == VERDICTS - {"identical"}


def test_losses_of_one_source_are_no_degradation():
    """20 losses, all in one subject of 20: McNemar alone would see a change."""
    subjects = SUBJECTS[:20]
    spread = [2] * 20 + [0] * 380
    gathered = [2 if number % 20 == 0 else 0 for number in range(400)]
    found = {}
    for name, choices in (("spread", spread), ("gathered", gathered)):
        sides = [side("base", mmlu=mmlu([0] * 400, subjects)), side("tuned", mmlu=mmlu(choices, subjects))]
        found[name] = compare(sides[0], sides[1:], GateSection(), None, None)["tasks"]["mmlu"]
    assert found["spread"]["mcnemar_p"] == found["gathered"]["mcnemar_p"] < 0.001
    assert found["spread"]["verdict"] == "degraded beyond margin"
    assert found["gathered"]["verdict"] == "inconclusive"


def test_identical_models_pass_whatever_their_number():
    """Twelve items can show nothing, not even that a model equals itself; that not one score differs is enough."""
    same = side("base", mmlu=mmlu([0, 1] * 6))
    report = compare(same, [side("tuned", mmlu=mmlu([0, 1] * 6))], GateSection(max_drop=0.01), None, None)
    assert report["tasks"]["mmlu"]["verdict"] == "identical"
    assert report["tasks"]["mmlu"]["lower_one_sided"] < -0.01
    assert report["gate"]["passed"] is True
    assert "not one score differs" in report["gate"]["decisions"]["mmlu"]
    almost = report_of(12, 0, 0)
    assert almost["tasks"]["mmlu"]["verdict"] == "inconclusive"
    assert almost["gate"]["passed"] is False


@pytest.mark.parametrize(
    ("lost", "won", "rule", "passed", "parts"),
    [
        (40, 40, "non_inferiority", True, ["a drop of 1.00 points is ruled out", "at worst -0."]),
        (60, 35, "non_inferiority", False, ["not ruled out", "more items would not help"]),
        (60, 40, "non_inferiority", False, ["not ruled out", "about ", "items could rule it out"]),
        (150, 30, "non_inferiority", False, ["more than a drop of 1.00 points is shown", "at best -"]),
        (150, 30, "degradation", False, ["more than a drop of 1.00 points is shown", "at best -"]),
        (60, 35, "degradation", True, ["is not shown"]),
        (40, 40, "degradation", True, ["is ruled out"]),
    ],
)
def test_gate(lost, won, rule, passed, parts):
    gate = report_of(2280, lost, won, rule=rule)["gate"]
    assert gate["passed"] is passed
    line = gate["decisions"]["mmlu"]
    assert gate["failed"] == ([] if passed else [line])
    delta = 100 * (won - lost) / 2280
    for part in [f"mmlu acc changed by {delta:+.2f} points on 2,280 items: ", "at 95 % confidence", *parts]:
        assert part in line
    assert "\n" not in line


def test_the_gate_goes_by_its_own_confidence():
    """Ruled out at 80 %, not at 99.9 %."""
    assert report_of(2280, 40, 30, confidence=0.8)["gate"]["passed"] is True
    strict = report_of(2280, 40, 30, confidence=0.999)["gate"]
    assert strict["passed"] is False
    assert "99.9 % confidence" in strict["failed"][0]
    shown = report_of(2280, 70, 30, rule="degradation")  # one-sided at 95 %; the two-sided interval reaches farther
    assert shown["tasks"]["mmlu"]["upper_one_sided"] < -0.01 < shown["tasks"]["mmlu"]["interval"][1]
    assert shown["gate"]["passed"] is False
    assert report_of(2280, 70, 30, rule="degradation", confidence=0.999)["gate"]["passed"] is True


def test_every_task_must_pass():
    """No correction for their number, and none fails for another."""
    passing, failing = (report_of(2280, lost, 20)["tasks"]["mmlu"] for lost in (20, 200))
    gate = decide({"mmlu": passing, "hellaswag": failing | {"metric": "acc_norm"}}, GateSection(max_drop=0.01))
    assert gate["passed"] is False
    assert [line.split(" changed")[0] for line in gate["failed"]] == ["hellaswag acc_norm"]
    assert set(gate["decisions"]) == {"mmlu", "hellaswag"}


def test_the_margin_is_the_gates():
    """A drop of about 2 points: beyond one point, within five."""
    assert report_of(11400, 300, 60, max_drop=0.01)["tasks"]["mmlu"]["verdict"] == "degraded beyond margin"
    wide = report_of(11400, 300, 60, max_drop=0.05)
    assert wide["tasks"]["mmlu"]["verdict"] == "degraded within margin"
    assert wide["margin"] == wide["tasks"]["mmlu"]["power"]["margin"] == 0.05
    assert wide["gate"]["passed"] is True


def test_no_drop_allowed_at_all():
    report = report_of(2280, 20, 20, max_drop=0.0)
    assert report["gate"]["passed"] is False
    assert report_of(2280, 10, 60, max_drop=0.0)["gate"]["passed"] is True
    json.dumps(report, allow_nan=False)


def test_examples_spread_over_kinds_and_subjects():
    report = report_of(1140, 40, 20, 10, with_texts=True)
    examples = report["tasks"]["mmlu"]["examples"]
    assert len(examples) == module.NUM_EXAMPLES
    kinds = [one["kind"] for one in examples]
    assert [kinds.count(kind) for kind in module.KINDS] == [4, 4, 4]
    for kind in module.KINDS:
        subjects = [one["item"].split(" item ")[0] for one in examples if one["kind"] == kind]
        assert len(set(subjects)) == 4
    for one in examples:
        before, after = one["base_pred"] == one["gold"], one["tuned_pred"] == one["gold"]
        assert one["base_pred"] != one["tuned_pred"]
        assert (before, after) == {
            "right_to_wrong": (True, False), "wrong_to_right": (False, True), "wrong_to_other": (False, False),
        }[one["kind"]]  # fmt: skip
        assert one["question"] == f"question {one['item'].split()[-1]}"
        assert sum(one["base_p"]) == pytest.approx(1.0)
        assert int(np.argmax(one["tuned_p"])) == one["tuned_pred"]


def test_examples_are_the_most_confident_changes():
    """Of 30 changes in one subject, those whose p(right) changed most."""
    subject = SUBJECTS[:1]
    base = mmlu([0] * 40, subject)
    tuned = [record("mmlu", one.subject, one.doc_id, 0, answer(1, one.doc_id), one.cluster) for one in base[:30]]
    sides = [side("base", True, mmlu=base), side("tuned", True, mmlu=tuned + base[30:])]
    examples = compare(sides[0], sides[1:], GateSection(), None, None)["tasks"]["mmlu"]["examples"]
    assert [one["item"].split()[-1] for one in examples] == [str(number) for number in range(29, 17, -1)]


def test_no_texts_no_examples():
    assert report_of(114, 10, 5)["tasks"]["mmlu"]["examples"] == []


def test_sides_that_are_not_beside_each_other_are_refused():
    base = side("base", mmlu=mmlu([0] * 20))
    turned = side("tuned", mmlu=mmlu([0] * 20)[::-1])
    for other in (turned, side("tuned", mmlu=mmlu([0] * 19)), side("tuned", hellaswag=hellaswag([0] * 20))):
        with pytest.raises(ValueError, match=r"tuned"):
            compare(base, [other], GateSection(), None, None)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_handful_of_items(n):
    """--limit 1: figures that cannot be had are null, none is NaN."""
    base, tuned = mmlu([0] * n, SUBJECTS[:1]), mmlu([1] * n, SUBJECTS[:1])
    report = compare(side("base", mmlu=base), [side("tuned", mmlu=tuned)], GateSection(max_drop=0.01), {}, None)
    json.dumps(report, allow_nan=False)
    assert report["tasks"]["mmlu"]["verdict"] == "inconclusive"


def test_subjects_without_a_category():
    """A data set with a subject of its own, and fewer than ten: neither strata of one item nor clusters."""
    records = mmlu([0, 1] * 6, ["anatomy", "our_own_subject"])
    report = compare(side("base", mmlu=records), [side("tuned", mmlu=mmlu([1, 0] * 6, ["anatomy", "our_own_subject"]))],
                     GateSection(), None, None)  # fmt: skip
    assert set(report["tasks"]["mmlu"]["categories"]) == {"stem"}
    assert set(report["tasks"]["mmlu"]["subjects"]) == {"anatomy", "our_own_subject"}
    assert report["tasks"]["mmlu"]["se_clustered"] is None
