"""report.html: well-formed, escaped, asking for nothing, true to the files, and readable in a browser."""

import json
import re
from html import escape
from pathlib import Path
from typing import Any

import pytest

from sft.errors import UserError
from sft.report.files import read_run
from sft.report.page import duration, to_html
from sft.report.run import main
from tests.drift_report import EVIL
from tests.pages import Page, measure, needs_browser
from tests.run_files import BEGAN_S, PROMPTS, event, invented

NOW_S = BEGAN_S + 10**6
MAX_BYTES = 2_000_000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An invented run of 3,000 steps."""
    return invented(tmp_path_factory.mktemp("runs") / "invented", steps=3000, every=250)


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    return to_html(read_run(run), NOW_S)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def data_of(text: str) -> dict[str, Any]:
    """What the page's script reads out."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_page_is_well_formed_and_loads_nothing(text: str, page: Page) -> None:
    assert (page.faults, page.loads) == ([], [])
    assert page.anchors == {"curves", "events", "samples", "checkpoints", "settings"} <= page.targets
    assert not re.search(r"url\(|@import|https?://|fetch|XMLHttp", text)
    assert {"None", "nan", "inf"}.isdisjoint(page.text.split())
    assert "Content-Security-Policy" in text


def test_texts_cannot_become_markup(run: Path, text: str, page: Page) -> None:
    """Prompts, answers, settings and reasons hold markup: it is shown, and only the page's own scripts are there."""
    assert page.scripts == 2
    assert page.text.count(EVIL) >= 2
    assert "<script>alert('config')</script>" in page.text
    assert "are passed over <b>" in page.text
    attacked = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    attack = '"></script><script>alert(1)</script><img src=x onerror="y">'
    attacked["loss_by_source"][attack] = 1.0
    folder = run.parent / "attacked"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps(attacked))
    lines = [event(attack, 1, 0.0, reason=attack), event("error", 1, 1.0, reason=attack)]
    (folder / "events.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "config.yaml").write_text(f"model: {{path: '{attack}'}}\n")
    result = to_html(read_run(folder), NOW_S)
    found = Page(result)
    assert (found.scripts, found.faults, found.loads) == (2, [], [])
    assert escape(attack) in result
    assert attack in [line["name"] for line in data_of(result)["charts"]["sources"]]


def test_figures_are_those_of_the_files(run: Path, text: str, page: Page) -> None:
    lines = {line["step"]: line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    heldout = {step: line["heldout_loss"] for step, line in lines.items() if "heldout_loss" in line}
    best = min(heldout, key=lambda step: heldout[step])
    for words in (
        f"lowest held-out loss{heldout[best]:.4f}after step {best:,}",
        f"last held-out loss{heldout[3000]:.4f}after step 3,000",
        f"final loss{lines[3000]['loss']:.4f}",
        f"tokens270 million{sum(line['tokens'] for line in lines.values()):,}",
        "restarts2", "rollbacks1", "spikes3", "skipped3", "peak memory61.2 GiB", "All 3,000 steps taken.",
    ):  # fmt: skip
        assert words in page.text, words
    rows = {row[0]: row[1:] for row in page.rows if row}
    assert rows["alpaca"][0] == "80.0 %"
    loss, mean, held = data_of(text)["charts"]["loss"]
    assert (loss["name"], mean["name"], held["name"]) == ("loss", "mean", "held-out")
    assert dict(zip(held["steps"], held["values"], strict=True)) == heldout
    drawn = dict(zip(loss["steps"], loss["values"], strict=True))
    highest = max((step for step in lines if lines[step]["loss"]), key=lambda step: lines[step]["loss"])
    assert {1, highest, 3000} <= drawn.keys()
    for step, value in drawn.items():
        assert value == pytest.approx(lines[step]["loss"], rel=1e-4)


def test_checkpoints_and_events_are_listed(page: Page) -> None:
    tables = [row for row in page.rows if len(row) == 5 and row[4] in ("complete", "not complete")]
    assert tables == [
        ["2,750", "1.1092 (lowest)", "10.00", "8", "complete"],
        ["3,000", "1.1100", "10.00", "8", "complete"],
    ]
    kinds = [row[2] for row in page.rows if len(row) == 4 and row[0].endswith("UTC")]
    assert kinds.count("rollback") == 1
    assert kinds.count("spike") == 3
    assert kinds.count("evaluate") == 12
    assert kinds[0] == "start"
    assert "documents 0, 1, 2" in page.text
    assert "and 280 more" in page.text


def test_samples_stand_side_by_side(text: str) -> None:
    articles = re.findall(r'<article class="answer">.*?</article>', text, re.DOTALL)
    assert len(articles) == len(PROMPTS)
    for prompt, article in zip(PROMPTS, articles, strict=True):
        sides, between = article.split("<details>")
        assert escape(prompt) in sides
        assert re.findall(r"<b>(.*?)</b>", sides) == ["before the first step", "after step 3,000"]
        assert "11 in between, 8 of them" in between
        assert between.count("<b>after step") == 8


LITTLE: dict[str, dict[str, str]] = {
    "nothing but settings": {"config.yaml": "train: {max_steps: 5}\n"},
    "no step yet": {"config.yaml": "", "events.jsonl": json.dumps(event("start", 0, 0.0, world_size=1))},
    "one step": {"metrics.jsonl": '{"step": 1, "loss": 2.5, "lr": 1e-5, "grad_norm": 0.0, "tokens_per_s": 10}'},
    "nothing finite": {"metrics.jsonl": '{"step": 1, "loss": null, "grad_norm": null}\n{"step": 2, "loss": null}'},
    "cut short": {"metrics.jsonl": '{"step": 1, "loss": 2.5}\n{"step": 2, "lo', "events.jsonl": '{"event": "sta'},
    "odd events": {
        "metrics.jsonl": '{"step": 3, "loss": 2.5, "heldout_loss": 2}',
        "events.jsonl": '{"event": "spike", "step": 2, "time": 1e300, "loss": "high"}\n'
        '{"event": "probe", "tasks": [1]}\n'
        '{"event": "probe", "step": 2, "tasks": {"mmlu": {"delta": null}}}\n{"event": "save", "step": 1, "gib": null}\n'
        '{"event": "skip", "step": 9, "doc_ids": 3, "more": {"a": [1, null]}}\n{"event": 5}\n[]\n',
        "config.yaml": "optim: {grad_clip: high}\nguard: 3\nbatch: [1, 2",
        "samples.jsonl": '{"step": 0, "prompt": 1, "answer": 2}\n{"step": 0, "prompt": "a", "answer": ""}\n',
    },
    "a loss that stays": {"metrics.jsonl": "\n".join(f'{{"step": {step}, "loss": 0.5}}' for step in range(1, 60))},
    "beyond all bounds": {
        "metrics.jsonl": '{"step": 1, "loss": 1e308}\n{"step": 2, "loss": -1e308, "grad_norm": 1e300}'
    },
}


@pytest.mark.parametrize("name", LITTLE)
def test_page_of_little_or_odd_files(tmp_path: Path, name: str) -> None:
    for file, content in LITTLE[name].items():
        (tmp_path / file).write_text(content)
    text = to_html(read_run(tmp_path), NOW_S)
    found = Page(text)
    assert (found.faults, found.loads) == ([], [])
    assert {"None", "nan", "inf"}.isdisjoint(found.text.split())
    assert not re.search(r"NaN|Infinity|left:nan|bottom:nan|left:inf", text)
    data_of(text)


def test_a_long_run_makes_no_large_page(tmp_path: Path) -> None:
    text = to_html(read_run(invented(tmp_path, steps=30_000, every=100)), NOW_S)
    assert len(text.encode()) < MAX_BYTES
    assert "are only in events.jsonl" in text


def test_command_writes_the_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run)])
    main(["--run", str(run), "--out", str(tmp_path / "own.html")])
    assert capsys.readouterr().out.split() == [str(run / "report.html"), str(tmp_path / "own.html")]
    assert Page((tmp_path / "own.html").read_text()).faults == []
    assert [path.name for path in tmp_path.iterdir()] == ["own.html"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["{tmp}/none"], "none: no such folder"),
        (["{tmp}"], "is no run folder (no config.yaml, no metrics.jsonl)"),
        (["{run}", "--out", "{run}/config.yaml/report.html"], "cannot be written (Not a directory); choose another"),
        (["{run}", "--out", "{tmp}/none/report.html"], "cannot be written (No such file or directory)"),
        (["{run}", "--out", "{tmp}"], "is a folder; name an .html file in it"),
        (["{run}", "--out", ""], "--out .: is a folder"),
        (["{run}", "--out", "/"], "--out /: is a folder"),
        ([], "--run is missing"),
    ],
)
def test_bad_input_is_one_line(run: Path, tmp_path: Path, options: list[str], part: str) -> None:
    with pytest.raises(UserError) as told:
        main([option.format(run=run, tmp=tmp_path) for option in options])
    assert part in str(told.value)
    assert "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_durations() -> None:
    said = [duration(seconds) for seconds in (0.0, 4.25, 59.4, 61.0, 3600.0, 90_000.0)]
    assert said == ["0 s", "4.2 s", "59 s", "1 min 1 s", "1 h 0 min", "1 d 1 h"]


MEASURE = """<iframe id="f" src="report.html" style="border:0;width:%dpx;height:900px"></iframe><pre id="found"></pre>
<script>
f.onload = () => {
  const view = f.contentWindow, page = f.contentDocument, edge = page.documentElement.clientWidth;
  for (const fold of page.querySelectorAll("details")) fold.open = true;
  const isOut = ({ left, right }) => right > edge + 0.5 || left < -0.5;
  const out = [...page.querySelectorAll("main *")].filter((node) => !node.closest(".box"))
    .filter((node) => isOut(node.getBoundingClientRect()))
    .map((node) => node.tagName + "." + node.className);
  const plot = page.querySelector(".plot.steps"), reads = {};
  const said = () => page.querySelector(".read")?.textContent;
  if (plot) {
    const { left, width, top } = plot.getBoundingClientRect();
    plot.dispatchEvent(new view.PointerEvent("pointermove", { clientX: left + width / 4, clientY: top + 5 }));
    reads.pointer = said();
    for (const key of ["Home", "ArrowRight", "End"]) {
      plot.dispatchEvent(new view.KeyboardEvent("keydown", { key, cancelable: true }));
      reads[key] = said();
    }
    reads.aria = plot.getAttribute("aria-valuetext");
    reads.role = plot.getAttribute("role");
  }
  const refused = [];
  page.addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
  const script = page.createElement("script");
  script.textContent = "window.owned = true";
  page.body.append(script);
  const picture = page.createElement("img");
  picture.src = "http://127.0.0.1:9/no.png";
  const requests = view.performance.getEntriesByType("resource").map((entry) => entry.name);
  const { scrollWidth: scroll } = page.documentElement;
  setTimeout(() => {
    found.textContent = JSON.stringify({ width: edge, scroll, out, requests, reads, refused, owned: !!view.owned });
  }, 200);
};
</script>"""


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_phone_and_desktop_and_reads_out_values(run: Path, text: str, tmp_path: Path, width: int) -> None:
    """Nothing reaches beyond the page's edges, nothing is requested, and no script runs but the page's own."""
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    found = measure(tmp_path, MEASURE, width)
    assert (found["width"], found["scroll"], found["out"], found["requests"]) == (width, width, [], [])
    assert (sorted(found["refused"]), found["owned"]) == (["img-src", "script-src-elem"], False)
    losses = {line["step"]: line["loss"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    reads = found["reads"]
    for key, step in (("Home", 1), ("End", 3000)):
        assert reads[key].startswith(f"step {step:,}  ·  loss {float(f'{losses[step]:.5g}'):g}"), reads[key]
    assert (reads["aria"], reads["role"]) == (reads["End"], "slider")
    at = int(re.match(r"step ([\d,]+)", reads["pointer"])[1].replace(",", ""))  # type: ignore[index]
    assert abs(at - 750) <= 3000 / width * 2
    assert reads["ArrowRight"] != reads["Home"]


@needs_browser
def test_the_measurement_sees_what_is_too_wide_and_what_runs(tmp_path: Path) -> None:
    """The control of the test before."""
    wide = '<main><p style="width:600px">x</p><img src="http://127.0.0.1:9/no.png" alt="no"></main>'
    (tmp_path / "report.html").write_text(f"<!DOCTYPE html>{wide}")
    found = measure(tmp_path, MEASURE, 390)
    assert found["scroll"] > 390
    assert found["out"] == ["P."]
    assert [Path(name).name for name in found["requests"]] == ["no.png"]
    assert (found["refused"], found["owned"]) == ([], True)
