"""Tiny random Llamas with tokenizers trained on the spot."""

import json
import random
from pathlib import Path

from tests.parity.invented import hellaswag_rows, mmlu_rows, sentence

BOS, EOS = "<s>", "</s>"
CHATML = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Brings its own BOS; ends in a line break, which moves to the continuation."""
REFUSES_SYSTEM = (
    "{% for message in messages %}{% if message.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% elif message.role == 'user' %}"
    "[INST] {{ message.content | trim }} [/INST]{% else %} {{ message.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
"""As Mistral's and Gemma's; BOS is the tokenizer's."""


def write_tokenizer(folder: Path, *, adds_bos: bool, byte_level: bool, adds_eos: bool = False) -> None:
    """Llama-2's kind (blanks as ▁, byte fallback) or GPT's kind (byte level)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=not byte_level))
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = list("▁ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.,:?'\n")
    rng = random.Random(3)
    rows = mmlu_rows(rng, "x", 40) + hellaswag_rows(rng, 40, 0)
    words = " ".join([json.dumps(rows, ensure_ascii=False), *(sentence(rng) for _ in range(50))]).split()
    special = [BOS, EOS, *([] if byte_level else [f"<0x{byte:02X}>" for byte in range(256)])]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special[:2], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f" {word}" for word in words], trainer)
    if not byte_level:
        tokenizer = _with_byte_tokens(tokenizer, special[2:])
    start, end = f"{BOS} " if adds_bos else "", f" {EOS}" if adds_eos else ""
    ids = [(BOS, tokenizer.token_to_id(BOS)), (EOS, tokenizer.token_to_id(EOS))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start}$A{end}", pair=f"{start}$A {start}$B:1", special_tokens=ids
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _with_byte_tokens(tokenizer: object, byte_tokens: list[str]) -> object:
    """Byte fallback needs its 256 tokens in the vocabulary, as ordinary pieces."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.to_str())
    vocab = state["model"]["vocab"]
    for token in byte_tokens:
        vocab.setdefault(token, len(vocab))
    return Tokenizer.from_str(json.dumps(state))


def write_model(folder: Path, *, max_length: int = 2048, seed: int = 0) -> None:
    """fp32 Llama of about 0.2M parameters; large initial weights, so that choices differ clearly.

    They come from numpy's RandomState, whose stream never changes (NEP 19): golden files depend on them.
    """
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
    )
    model = LlamaForCausalLM(config)
    random = np.random.RandomState(seed)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            is_norm = weight.ndim == 1
            drawn = random.standard_normal(tuple(weight.shape)).astype(np.float32)
            weight.copy_(torch.ones_like(weight) if is_norm else 0.3 * torch.from_numpy(drawn))
    model.save_pretrained(folder)
