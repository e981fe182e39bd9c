"""What the tests of pages share: a checker of markup, and headless Chromium where it is installed."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

VOID = {"meta", "input", "br", "hr", "img", "link", "base", "col", "source", "track", "embed", "area", "wbr"}
"""Elements without an end; <path/> and <polyline/> close themselves."""
LOADING = {"src", "srcset", "href", "action", "data", "poster", "xlink:href", "formaction", "background", "manifest"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BROWSER_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage",
                 "--disable-background-networking", "--no-first-run")  # fmt: skip


class Page(HTMLParser):
    """Checks nesting while it reads; keeps the text by section and table, and what would be loaded."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.loads: list[str] = []
        self.scripts = 0
        self.anchors: set[str] = set()
        self.targets: set[str] = set()
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> stays open" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        self.faults += [f"<{tag}> repeats {name}" for name in set(names) if names.count(name) > 1]
        self.faults += [f"<{tag}> handles {name}" for name in names if name.startswith("on")]
        values = {name: value or "" for name, value in attrs}
        self.targets |= {values["id"]} if "id" in values else set()
        for name in LOADING & values.keys():
            if values[name].startswith("#"):
                self.anchors.add(values[name][1:])
            else:
                self.loads.append(f"{tag} {name}={values[name]}")
        self.scripts += tag == "script"
        self.faults += [f"<{tag}> may load" for _ in [0] if tag in {"link", "img", "iframe", "object", "embed", "base"}]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        if self.open[-1:] and self.open[-1] in ("script", "style"):
            return
        self.text += data
        if self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")


def browse(folder: Path, *arguments: str) -> str:
    command = [str(BROWSER), *BROWSER_FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if ran.returncode:
        pytest.fail(f"{' '.join(command)}: {ran.stderr[-500:]}")
    return ran.stdout


def measure(folder: Path, script: str, width: int) -> dict[str, Any]:
    """What `script` finds in a page beside it, in a frame of this width; phones are narrower than windows may be."""
    (folder / "frame.html").write_text(script % width)
    address = (folder / "frame.html").as_uri()
    dom = browse(folder, "--allow-file-access-from-files", "--virtual-time-budget=4000", "--dump-dom", address)
    found: dict[str, Any] = json.loads(re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1])  # type: ignore[index]
    return found
