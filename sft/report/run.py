"""`sft report RUN`: one HTML page of a run, running or ended, from its own files; no server, no request."""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sft.config import Section
from sft.errors import UserError, run_command
from sft.report.files import read_run
from sft.report.page import to_html
from sft.settings import load


class ReportConfig(Section):
    run: str
    """Run folder."""
    out: str | None = None
    """HTML file to write; default: <run>/report.html."""


def main(argv: Sequence[str]) -> None:
    """Entry of `sft report` and `python -m sft.report.run`.

    Raises:
        UserError: bad options, no run folder, or the page cannot be written.
    """
    config = load(ReportConfig, argv, prog="sft report", positional="run")
    folder = Path(config.run)
    if not folder.is_dir():
        raise UserError(f"--run {folder}: no such folder; give the folder that sft train wrote as --out")
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise UserError(
            f"--run {folder}: is no run folder (no config.yaml, no metrics.jsonl); give the folder that sft train "
            "wrote as --out"
        )
    out = folder / "report.html" if config.out is None else Path(config.out)
    write(out, to_html(read_run(folder), time.time()))
    print(out)


def write(out: Path, page: str) -> None:
    """Put the page where it belongs, whole or not at all.

    Raises:
        UserError: it cannot be written there.
    """
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name an .html file in it")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.write_text(page, encoding="utf-8", errors="replace")
        os.replace(partial, out)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another file") from None


if __name__ == "__main__":
    sys.exit(run_command(main))
