from pathlib import Path
from typing import Any

import pytest

from tests.parity.jobs import JOBS


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hub/ and hub57/ with the data, and one model folder per variant."""
    from tests.parity.world import make_world

    return make_world(tmp_path_factory.mktemp("parity"), JOBS)


@pytest.fixture(scope="session")
def reference(world: Path) -> dict[str, Any]:
    """What lm_eval answers to every job; one process, no network."""
    from tests.parity.world import ask_lm_eval

    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install .[dev])")
    return ask_lm_eval(world, JOBS)
