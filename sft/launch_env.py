"""What the ranks of other hosts need of the launching shell: variables from an allow-list, and secrets apart from them.

DeepSpeed starts ranks with `ssh host 'export NAME=value; ...'`: whatever it exports, everyone on both hosts can read in
the list of processes. So it is given no secret: those go into a file that only the user may read, in a folder that all
hosts see. Each rank takes it in when it starts, and rank 0 deletes it when all have met.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from sft.errors import UserError

ALLOWED = (
    "NCCL_", "GLOO_", "WANDB_", "HF_", "HUGGING_FACE_", "CUDA_", "OMP_",  # what the work itself reads
    "TORCH_", "PYTORCH_", "TRITON_", "DS_", "UCX_", "FI_", "MLFLOW_", "TOKENIZERS_", "MALLOC_", "SFT_", "PYTHON",
)  # fmt: skip
"""Beginnings of the names that are handed on."""
ALSO = {"PATH", "LD_LIBRARY_PATH"}
NEVER = {"CUDA_VISIBLE_DEVICES", "DS_ENV_FILE"}
"""On another host the first would mean other devices."""
SECRET = re.compile("KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
NO_SECRET = ("TOKENIZERS_", "NCCL_")
ENV_FILE = "DS_ENV_FILE"
"""Names the file of NAME=value lines that DeepSpeed reads instead of .deepspeed_env, at home and in this folder."""
SECRETS_FILE = "SFT_SECRETS_FILE"
HOSTS = "SFT_HOSTS"
"""Of all ranks: `name:ranks,name:ranks`, so that one that never came can be named with its host."""
NAME = re.compile("[A-Za-z_][A-Za-z0-9_]*")


def hand_on(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Write what the ranks are to have into `folder`, and return the environment of the `deepspeed` that starts them.

    Lines of the user's own .deepspeed_env come last and win, as with DeepSpeed; blank lines and comments, which would
    end it, are passed over.

    Args:
        environment: of the launching shell, with what the caller adds.
        folder: seen by all hosts; should be readable by the user alone.

    Raises:
        UserError: a line of the user's file is no NAME=value.
    """
    wanted = {name: value for name, value in environment.items() if _is_allowed(name)}
    wanted["PYTHONPATH"] = ":".join(filter(None, [str(Path.cwd()), environment.get("PYTHONPATH")]))
    own = environment.get(ENV_FILE, ".deepspeed_env")
    for folder_of_own in (Path.home(), Path.cwd()):
        wanted |= _read(folder_of_own / own)
    secrets = {name: value for name, value in wanted.items() if is_secret(name)}
    if secrets:
        path = folder / "secrets.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps(secrets), encoding="utf-8")
        wanted[SECRETS_FILE] = str(path.absolute())
    lines = [f"{name}={_for_remote_shell(value)}\n" for name, value in wanted.items() if name not in secrets]
    listed = folder / "environment"
    listed.write_text("".join(lines), encoding="utf-8")
    kept = {name: value for name, value in environment.items() if not is_secret(name)}
    return {**kept, ENV_FILE: str(listed.absolute())}


def take_secrets() -> None:
    """In a rank: what the launcher put into its file, into this process's environment."""
    if path := os.environ.get(SECRETS_FILE):
        try:
            os.environ.update(json.loads(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UserError(
                f"{path}: {os.uname().nodename} does not see what the launcher wrote there; choose an --out on a file "
                "system that all hosts share"
            ) from None


def drop_secrets() -> None:
    """In rank 0, once all ranks have met and so have taken them: a launcher that is killed must leave none behind."""
    if path := os.environ.get(SECRETS_FILE):
        Path(path).unlink(missing_ok=True)


def for_pdsh(option: str) -> str:
    """An option as DeepSpeed must be given it, so that the rank behind pdsh and a remote shell sees it as it was.

    DeepSpeed puts double quotes around what holds a space, and escapes nothing in it but those; pdsh replaces %n, %h.
    """
    text = option.replace("%", "%%")
    if " " in text:
        return re.sub(r"([\\$`])", r"\\\1", text)
    return text if re.fullmatch(r"[\w@%+=:,./-]+", text) else "'" + text.replace("'", "'\\''") + "'"


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value is for nobody's eyes."""
    return bool(SECRET.search(name)) and not name.startswith(NO_SECRET)


def _is_allowed(name: str) -> bool:
    return (name in ALSO or name.startswith(ALLOWED)) and name not in NEVER and NAME.fullmatch(name) is not None


def _for_remote_shell(value: str) -> str:
    """DeepSpeed puts double quotes around what holds anything special, and escapes nothing in it."""
    return re.sub(r'([\\$`"])', r"\\\1", value).replace("%", "%%").replace("\n", " ")


def _read(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    found = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, equals, value = text.removeprefix("export ").partition("=")
        if not equals or not NAME.fullmatch(name.strip()):
            raise UserError(f"{path}, line {number}: is no NAME=value")  # the line may hold a secret
        found[name.strip()] = _unquoted(value.strip())
    return found


def _unquoted(value: str) -> str:
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    return value[1:-1] if is_quoted else value
