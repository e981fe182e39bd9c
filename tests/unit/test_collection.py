"""Every test file is collected: pytest passes over folders named dist or build unless told otherwise."""

import sys

import pytest

from tests.tiny import REPO, run


def test_no_test_file_is_passed_over(request):
    """By the running session, where it was asked for everything; else by one that is: that imports everything anew."""
    files = {str(path.relative_to(REPO)) for path in (REPO / "tests").rglob("test_*.py")}
    whole = request.config.args_source is pytest.Config.ArgsSource.TESTPATHS
    collected = {item.nodeid.split("::")[0] for item in request.session.items} if whole else set()
    if collected != files:
        done = run([sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"], cwd=REPO)
        collected = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert collected == files
    assert any(name.startswith("tests/dist/") for name in files), "control: there is such a folder"
