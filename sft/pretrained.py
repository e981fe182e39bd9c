"""Loading a Hugging Face causal LM from a local folder, the same way for training, export checks and evaluation."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from sft.errors import UserError
from sft.tokenizer import folder_errors


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it natively, else fp32: emulated bf16 products are many times slower."""
    if wanted == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted]


def parameter_names(folder: str | Path) -> list[str]:
    """Names of all parameters of the architecture in config.json, tied ones once. Nothing is loaded.

    Raises:
        UserError: transformers cannot build it.
    """
    return [name for name, _ in empty_model(folder).named_parameters()]


def empty_model(folder: str | Path) -> Any:
    """transformers causal LM of the architecture in config.json, its parameters on the meta device. Nothing is loaded.

    Raises:
        UserError: transformers cannot build it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    errors: tuple[type[Exception], ...] = (*folder_errors(), RuntimeError)
    quiet_libraries()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except errors as error:
        raise UserError(f"model {folder}: cannot be built: {' '.join(str(error).split())[:300]}") from error


def load_causal_lm(folder: str | Path, *, dtype: torch.dtype, attention: str) -> Any:
    """transformers causal LM from local safetensors only; every tensor of the architecture must be there.

    Raises:
        UserError: weights are missing, torn, pickled, or do not fit the config (transformers would fill them randomly).
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not list(Path(folder).glob("*.safetensors")):
        raise UserError(f"model {folder}: holds no *.safetensors weights; convert other formats to safetensors first")
    errors: tuple[type[Exception], ...] = (*folder_errors(), RuntimeError, SafetensorError)
    quiet_libraries()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below by name; transformers would print a table
            output_loading_info=True,
        )
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise  # the machine's fault, not the folder's
    except errors as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"model {folder}: cannot be loaded: {reason}; check config.json and weights") from error
    finally:
        logging.set_verbosity(verbosity)
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"model {folder}: its weights lack {len(missing)} tensors of the architecture, first {missing[0]}"
        )
    if surplus := sorted(name for name in info["unexpected_keys"] if ".layers." in name and "inv_freq" not in name):
        raise UserError(
            f"model {folder}: its weights hold {len(surplus)} tensors that config.json leaves out, first {surplus[0]}; "
            "is num_hidden_layers right?"
        )
    if mismatched := sorted(map(tuple, info["mismatched_keys"])):
        name, stored, wanted = mismatched[0]
        raise UserError(f"model {folder}: {name} is {list(stored)} in the weights and {list(wanted)} by config.json")
    return model


def quiet_libraries() -> None:
    """transformers' loading bars only where somebody watches: on the first rank's terminal."""
    from transformers.utils import logging

    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
        logging.disable_progress_bar()
