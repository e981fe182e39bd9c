"""drift.html: well-formed, escaped, loading nothing, and readable in a browser where one is installed."""

import copy
import re
from html import escape
from pathlib import Path
from typing import Any

import pytest

from sft.eval.report.page import to_html
from sft.eval.report.wording import MARKS, p_value
from tests import drift_report
from tests.pages import Page, browse, measure, needs_browser
from tests.unit.test_eval_report import read_png


@pytest.fixture(scope="module")
def full() -> dict[str, Any]:
    return drift_report.full()


@pytest.fixture(scope="module")
def page(full: dict[str, Any]) -> Page:
    return Page(to_html(full))


def test_the_checker_finds_faults() -> None:
    """The control of the tests below."""
    assert Page("<p><b>x</p></b>").faults
    assert Page("<p>x").faults
    assert Page('<p onclick="x">y</p>').faults
    assert Page('<a href="https://example.org">x</a>').loads
    assert Page('<img src="x">').faults
    assert not Page('<p class="a">x<br>y</p>').faults


@pytest.mark.parametrize("make", [drift_report.full, drift_report.small])
def test_page_is_well_formed_and_loads_nothing(make: Any) -> None:
    text = to_html(make())
    found = Page(text)
    assert found.faults == []
    assert found.loads == []
    assert found.anchors <= found.targets
    assert not re.search(r"url\(|@import|https?://|fetch|XMLHttp", text)
    assert "None" not in found.text
    assert "nan" not in found.text.split()


def test_texts_cannot_become_markup(full: dict[str, Any], page: Page) -> None:
    """Names, questions, choices and answers hold a script: it is shown, and only the page's own one is there."""
    assert page.scripts == 1
    assert page.text.count(drift_report.EVIL) >= 6
    report = copy.deepcopy(full)
    attack = '"><script>alert(1)</script><img src=x onerror="y">'
    for name in ("model", "data", "device", "engine"):
        report["tuned"][name] = attack
    report["models"][2]["name"] = report["models"][2]["path"] = report["names"]["base"] = attack
    subjects = report["tasks"]["mmlu"]["subjects"]
    subjects[attack] = subjects.pop("anatomy")
    report["gate"]["decisions"]["mmlu"] = report["gate"]["failed"][0] = attack
    report["tasks"]["mmlu"]["examples"][0] |= {"item": attack, "choices": [attack] * 4}
    report["answers"][0] = dict.fromkeys(("prompt", "base", "tuned"), attack)
    attacked = Page(to_html(report))
    assert (attacked.scripts, attacked.faults, attacked.loads) == (1, [], [])
    assert escape(attack) in to_html(report)


def test_figures_are_those_of_the_dictionary(full: dict[str, Any], page: Page) -> None:
    rows = {row[0]: row for row in page.rows if row}
    for task, name in (("mmlu", "MMLUaccuracy"), ("hellaswag", "HellaSwagaccuracy")):
        result = full["tasks"][task]
        row = next(row for row in page.rows if row and row[0].startswith(name))
        assert row[1:4] == [percent(result["base"]), percent(result["tuned"]), signed(result["delta"])]
        assert row[4] == f"{signed(result['interval'][0])} to {signed(result['interval'][1])}"
        assert row[6] == result["verdict"]
    statistics = {row[0]: row[1:] for row in page.rows if len(row) == 2}
    mmlu = full["tasks"]["mmlu"]
    assert statistics["SE, clustered by source (points)"] == [f"{100 * mmlu['se_clustered']:.3f}"]
    assert statistics["right→wrong"] == [f"{mmlu['right_to_wrong']:,}"]
    assert rows["KL(base‖tuned) over the choices"] == ["KL(base‖tuned) over the choices", "mean", "p95", "max"]
    assert rows["nats"][1:] == ["0.0341", "0.1477", "2.7130"]


def test_every_subject_is_there_sorted_and_marked(full: dict[str, Any], page: Page) -> None:
    subjects = full["tasks"]["mmlu"]["subjects"]
    assert len(subjects) == 57
    heads = [place for place, row in enumerate(page.rows) if row[-1:] == ["BH q"]]
    assert len(heads) == 1
    shown = page.rows[heads[0] + 1 : heads[0] + 58]
    names = {name.replace("_", " "): row for name, row in subjects.items()}
    found = {re.sub(r" (Holm|BH)$", "", cells[0]): cells for cells in shown}
    assert set(found) == set(names)
    marks = {"Holm": 0, "BH": 0, "": 0}
    for name, row in names.items():
        cells = found[name]
        mark = "Holm" if row["p_holm"] < 0.05 else "BH" if row["q_bh"] < 0.05 else ""
        marks[mark] += 1
        assert cells[0] == f"{name} {mark}".strip()
        assert cells[2] == signed(row["delta"])
        assert cells[5:] == [p_value(row["mcnemar_p"]), p_value(row["p_holm"]), p_value(row["q_bh"])]
    assert all(marks.values()), marks
    deltas = [names[re.sub(r" (Holm|BH)$", "", cells[0])]["delta"] for cells in shown]
    assert deltas == sorted(deltas)


@pytest.mark.parametrize("verdict", MARKS)
def test_every_verdict_is_shown_as_a_word_and_never_as_no_drift(verdict: str) -> None:
    report = drift_report.small()
    report["tasks"]["hellaswag"]["verdict"] = report["tasks"]["hellaswag"]["metrics"]["acc_norm"]["verdict"] = verdict
    text = to_html(report)
    assert verdict.capitalize() in Page(text).text
    assert "no drift" not in text.lower()
    assert f'data-mark="{MARKS[verdict]}"' in text


def test_curve_is_drawn_only_where_gains_are_known(full: dict[str, Any]) -> None:
    assert 'class="plot curve"' in to_html(full)
    report = copy.deepcopy(full)
    report["models"][0]["heldout_loss"] = None
    assert 'class="plot curve"' not in to_html(report)
    report = copy.deepcopy(full)
    for model in report["models"][2:]:
        model["heldout_loss"] = None
    assert 'class="plot curve"' not in to_html(report)


def test_two_models_without_texts_need_no_section_for_them() -> None:
    text = to_html(drift_report.small())
    for heading in ("<h2>Models", "<h2>Answers", "Answers that changed", "<h3>Subjects", "<h3>Categories"):
        assert heading not in text


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def signed(value: float) -> str:
    return f"{100 * value:+.2f}".replace("-", "−")


MEASURE = """<iframe id="f" src="drift.html" style="border:0;width:%dpx;height:900px"></iframe><pre id="found"></pre>
<script>
f.onload = () => {
  const view = f.contentWindow, page = f.contentDocument, edge = page.documentElement.clientWidth;
  const out = [...page.querySelectorAll("main *")].filter((node) => !node.closest(".box"))
    .filter((node) => node.getBoundingClientRect().right > edge + 0.5)
    .map((node) => node.tagName + "." + node.className);
  const search = page.querySelector("input");
  let rows = -1, first = "";
  if (search) {
    search.value = "LAW"; search.dispatchEvent(new view.Event("input"));
    const order = page.querySelector("select"); order.value = "name"; order.dispatchEvent(new view.Event("change"));
    const shown = [...page.querySelectorAll("tr[data-name]")].filter((row) => row.closest("table").rows.length > 50)
      .filter((row) => row.getClientRects().length);
    rows = shown.length; first = shown[0].dataset.name;
  }
  const requests = view.performance.getEntriesByType("resource").map((entry) => entry.name);
  const { scrollWidth: scroll, scrollHeight: height } = page.documentElement;
  found.textContent = JSON.stringify({ width: edge, scroll, height, out, rows, first, requests });
};
</script>"""


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_phone_and_desktop(full: dict[str, Any], tmp_path: Path, width: int) -> None:
    """Nothing reaches beyond the page's edge but what scrolls in its own box; nothing else is requested."""
    (tmp_path / "drift.html").write_text(to_html(full), encoding="utf-8")
    found = measure(tmp_path, MEASURE, width)
    assert (found["width"], found["scroll"], found["out"], found["requests"]) == (width, width, [], [])
    assert found["height"] > 3000
    laws = sorted(name.replace("_", " ") for name in full["tasks"]["mmlu"]["subjects"] if "law" in name)
    assert (found["rows"], found["first"]) == (len(laws), laws[0])


@needs_browser
def test_the_measurement_sees_what_is_too_wide(tmp_path: Path) -> None:
    """The control of the test before."""
    wide = '<main><p style="width:600px">x</p><img src="http://127.0.0.1:9/no.png" alt="no"></main>'
    (tmp_path / "drift.html").write_text(f"<!DOCTYPE html>{wide}")
    found = measure(tmp_path, MEASURE, 390)
    assert found["scroll"] > 390
    assert found["out"] == ["P."]
    assert [Path(name).name for name in found["requests"]] == ["no.png"]


@needs_browser
def test_screenshot_is_not_blank(full: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "drift.html").write_text(to_html(full), encoding="utf-8")
    (tmp_path / "blank.html").write_text("<!DOCTYPE html><p>")
    colours = {}
    for name in ("drift", "blank"):
        picture = tmp_path / f"{name}.png"
        browse(tmp_path, "--window-size=1280,900", f"--screenshot={picture}", (tmp_path / f"{name}.html").as_uri())
        colours[name] = read_png(picture)[1]
    assert colours["blank"] < 20 < colours["drift"], colours
