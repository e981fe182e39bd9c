"""Folders to be staged, and what a copy of one must be."""

import filecmp
import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from sft import staging
from sft.stage import main
from sft.staging import RECORD
from tests import tiny


def make_model(folder: Path, num_bytes: int = 20_000, files: int = 2) -> Path:
    """Looks like a model folder, with what real ones hold besides."""
    (folder / "original").mkdir(parents=True)
    random = np.random.default_rng(0)
    weight_map = {}
    for number in range(files):
        name = f"model-{number}-of-{files}.safetensors"
        save_file({f"w{number}": random.integers(0, 255, num_bytes // files, dtype=np.uint8)}, folder / name)
        weight_map[f"w{number}"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "generation_config.json").write_text("{}")
    for name in ("optimizer.bin", "consolidated.safetensors", "README.md", "original/params.json"):
        (folder / name).write_text("x" * 100)
    return tiny.make_tokenizer(folder)


def make_world(tmp_path: Path, prepared: Path) -> list[str]:
    """Flags of a run on a folder that looks like a model and on shards that may be damaged."""
    model = make_model(tmp_path / "model")
    shutil.copytree(prepared, tmp_path / "prep")
    return ["--model.path", str(model), "--data.train", str(tmp_path / "prep" / "train"), "--out", "runs/x"]


def staged(flags, to, capsys):
    """(copies by option, all of stderr) of a successful call."""
    capsys.readouterr()
    main([*flags, "--to", str(to)])
    printed = capsys.readouterr()
    words = shlex.split(printed.out)
    assert printed.out.count("\n") == 1
    return {option: Path(path) for option, path in zip(words[::2], words[1::2], strict=True)}, printed.err


def assert_equal(source: Path, copy: Path) -> None:
    """Byte by byte, of all that the copy holds; a model's must hold what is needed, and shards' everything."""
    names = {path.name for path in copy.iterdir()}
    assert RECORD in names, f"{copy} has the name of a copy, and no {RECORD}"
    names.remove(RECORD)
    if "config.json" in names:
        needed = {"model-0-of-2.safetensors", "config.json"}
    else:  # readers of the same folder may have left caches of `datasets` in it
        needed = {path.name for path in source.iterdir() if not path.name.startswith("cache-")}
    assert needed <= names, f"{copy} lacks {needed - names}"
    _, different, unreadable = filecmp.cmpfiles(source, copy, names, shallow=False)
    assert (different, unreadable) == ([], []), f"{copy}: {different} differ, {unreadable} cannot be read"


def assert_nothing_half(source: Path, to: Path) -> None:
    """Whatever has a copy's name is one."""
    for path in to.iterdir() if to.exists() else []:
        if path.name != staging.LOCK and staging.PARTIAL not in path.name:
            assert_equal(source, path)


def touched(path: Path) -> None:
    """As if it had been written again, later."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
