"""Tiny random Llamas and small tokenizers, the same for ever."""

import json
from pathlib import Path

TOKENIZERS = Path(__file__).with_name("tokenizers")

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


def write_tokenizer(folder: Path, *, adds_bos: bool, byte_level: bool) -> None:
    """Llama-2's kind (blanks as ▁, byte fallback) or GPT's kind (byte level).

    Both were trained on invented.py's text, 700 tokens each, and are kept: golden ids outlive a change of the trainer.
    """
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(TOKENIZERS / ("bytes.json" if byte_level else "pieces.json")))
    start = f"{BOS} " if adds_bos else ""
    ids = [(BOS, tokenizer.token_to_id(BOS)), (EOS, tokenizer.token_to_id(EOS))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start}$A", pair=f"{start}$A {start}$B:1", special_tokens=ids
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


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
