"""Every test file is collected: pytest passes over folders named dist or build unless told otherwise."""

import sys

from tests.tiny import REPO, run


def test_no_test_file_is_passed_over():
    done = run([sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"], cwd=REPO)
    collected = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    files = {str(path.relative_to(REPO)) for path in (REPO / "tests").rglob("test_*.py")}
    assert collected == files
    assert any(name.startswith("tests/dist/") for name in files), "control: there is such a folder"
