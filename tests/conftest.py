"""One tiny model and one prepared data set per session; no test may reach the network (tests/offline)."""

import os
import sys
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.offline import sitecustomize  # noqa: F401 (blocks sockets in this process, too)

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache folder of this process and of all that it starts, so that no test reads or writes the user's.

    But for what DeepSpeed compiles, which takes a minute: torch would look for that in the cache folder, too.
    """
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    device = "cpu" if torch.version.cuda is None else f"cu{torch.version.cuda.replace('.', '')}"
    build = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}_{device}"
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(user / "torch_extensions" / build))
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random tiny Llama with its tokenizer."""
    return tiny.make_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Path:
    """Prepared Alpaca rows: train/ and heldout/ with packs of at most 512 tokens and very unequal label counts."""
    from data_prep.build import main

    folder = tmp_path_factory.mktemp("data")
    rows = tiny.make_alpaca(folder / "alpaca.json")
    main(["--sources", str(rows), "--tokenizer", str(base_model), "--seq_len", "512", "--heldout", "6",
          "--workers", "1", "--out", str(folder / "out")])  # fmt: skip
    return folder / "out"


@pytest.fixture(scope="session")
def strategy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ZeRO-3 strategy file that releases parameters at once."""
    return tiny.make_strategy(tmp_path_factory.mktemp("ds") / "zero3.json")
