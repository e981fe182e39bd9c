"""The model under training: a transformers causal LM whose forward takes a MicroBatch and returns a summed loss."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sft.batch import MicroBatch
from sft.config import ModelSection, TrainSection
from sft.errors import UserError
from sft.loss import LossHead
from sft.neftune import noise
from sft.pretrained import load_causal_lm

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""model_type values whose attention is plain causal attention with rotary positions: what sft.attention computes."""


class PackedCausalLM(nn.Module):
    """`hf` with packed documents in and summed losses out; parameter names are `hf.` + transformers' names."""

    neftune_alpha = 0.0
    """See sft.neftune; in training mode only."""

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = hf

    def forward(self, batch: MicroBatch, ask: Literal["loss", "hidden", "next"] = "loss") -> Any:
        """What is asked of the packed documents.

        Returns:
            loss: (total, by_source_S), sums of -log p(target) over the supervised positions: fp32 scalar to optimise,
            and its part from each data source, fp32, detached.
            hidden: the last hidden states [T, E].
            next: the most likely next token at each of predict_N, int64 [N].
        """
        embedded_1TE = self.hf.model.embed_tokens(batch.ids_1T)
        if self.training and self.neftune_alpha:
            embedded_1TE = embedded_1TE + noise(batch, self.neftune_alpha, embedded_1TE)
        hidden_TE = self.hf.model(
            inputs_embeds=embedded_1TE,
            position_ids=batch.pos_1T,
            attention_mask=None,  # with a mask or a cache transformers would mix the documents
            use_cache=False,
            layout=batch.layout,
        ).last_hidden_state[0]
        if ask == "hidden":
            return hidden_TE
        hidden_NE = hidden_TE.index_select(0, batch.predict_N)
        if ask == "next":
            return self.hf.lm_head(hidden_NE).argmax(dim=-1)
        return self.hf.lm_head(hidden_NE, batch.targets_N, batch.source_N, batch.num_sources)


def read_model_config(folder: str) -> dict[str, Any]:
    """config.json of a model folder, with everything checked that training relies on.

    Raises:
        UserError: folder, config or weights are missing, or the architecture is not one that is supported.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"model.path {folder}: no such folder; give a local folder with config.json and safetensors")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"model.path {folder}: holds no config.json; is it a Hugging Face model folder?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"model.path {folder}/config.json: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"model.path {folder}/config.json: must hold a JSON object")
    if not list(path.glob("*.safetensors")):
        raise UserError(
            f"model.path {folder}: holds no *.safetensors weights; convert other formats to safetensors first"
        )
    if config.get("model_type") not in FAMILIES:
        raise UserError(
            f"model.path {folder}/config.json: model_type '{config.get('model_type')}' is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "longrope" in (rope.get("rope_type"), rope.get("type")):  # frequencies depend on the longest document of a pack
        raise UserError(
            f"model.path {folder}/config.json: rope type longrope is not supported: documents of a pack would depend "
            "on each other's length; use a model with another one"
        )
    return config


def context_length(config: dict[str, Any]) -> int | None:
    """Tokens of the longest document that the model attends to as a whole; None where config.json does not say."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    limits = [limit for limit in (config.get("max_position_embeddings"), window) if limit]
    return min(limits, default=None)


def load_model(folder: str, *, dtype: torch.dtype, attention: str, checkpointing: bool, liger: bool) -> PackedCausalLM:
    """Load weights in `dtype` (partitioned on arrival where a ZeRO-3 HfDeepSpeedConfig is alive).

    Args:
        attention: name returned by sft.attention.register.
        checkpointing: recompute each decoder layer in backward.
        liger: replace RMSNorm, SwiGLU and RoPE by liger-kernel's (its loss is not used: ours is exact over chunks).

    Raises:
        UserError: the weights do not fit the config (missing or unexpected tensors).
    """
    if liger:
        _patch_with_liger(read_model_config(folder)["model_type"])
    hf = load_causal_lm(folder, dtype=dtype, attention=attention)
    hf.config.use_cache = False
    hf.lm_head.__class__ = LossHead
    if hf.lm_head.bias is not None:
        raise UserError(f"model.path {folder}: an LM head with bias is not supported")
    if checkpointing:
        hf.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return PackedCausalLM(hf)


def attention_dropout(settings: ModelSection, model_config: dict[str, Any]) -> float:
    """Of a run: the run file's, or that of config.json."""
    own = model_config.get("attention_dropout") or 0.0
    return own if settings.attention_dropout is None else settings.attention_dropout


def regularise(model: PackedCausalLM, settings: ModelSection, train: TrainSection) -> None:
    """Set what changes the loss in training mode alone: label smoothing, noise, dropout."""
    model.neftune_alpha = train.neftune_alpha
    model.hf.lm_head.label_smoothing = train.label_smoothing
    if settings.attention_dropout is not None:
        layers = [module for module in model.modules() if hasattr(module, "attention_dropout")]
        assert layers, "transformers' attention modules no longer have an attention_dropout"
        for module in layers:
            setattr(module, "attention_dropout", settings.attention_dropout)  # noqa: B010  mypy: modules hold tensors


def _patch_with_liger(model_type: str) -> None:
    from liger_kernel.transformers import monkey_patch

    patch = getattr(monkey_patch, f"apply_liger_kernel_to_{model_type}")
    patch(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False)
