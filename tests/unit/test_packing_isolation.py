"""Packed documents give the losses, states and gradients of each document alone.

Run: pytest tests/unit/test_packing_isolation.py
"""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from sft.attention import choose_kernel, register
from sft.batch import build
from sft.errors import UserError
from sft.isolation import prove_isolation
from sft.model import load_model

CPU = torch.device("cpu")


def documents(lengths=(7, 12, 3, 1, 20), seed=0):
    random = np.random.RandomState(seed)
    made = []
    for length in lengths:
        ids = random.randint(3, 259, length)
        labels = ids.copy()
        labels[: length // 2] = -100
        made.append((ids, labels))
    return made


def load(folder, checkpointing):
    return load_model(
        str(folder), dtype=torch.float32, attention=register("sdpa"), checkpointing=checkpointing, liger=False
    )


def alone(folder, docs):
    """Summed loss, logits and gradients of an ordinary transformers model, one document at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    total, logits = 0.0, []
    for ids, labels in docs:
        out = model(input_ids=torch.tensor(ids)[None]).logits[0]
        total = total + cross_entropy(out[:-1], torch.tensor(labels)[1:], ignore_index=-100, reduction="sum")
        logits.append(out.detach())
    total.backward()
    return total.item(), torch.cat(logits), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [True, False])
def test_packed_equals_alone(base_model, checkpointing):
    docs = documents()
    expected_loss, expected_logits, expected_grads = alone(base_model, docs)
    model = load(base_model, checkpointing).train()
    batch = build(docs, CPU)
    loss, _ = model(batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    for name, parameter in model.hf.named_parameters():
        difference = (parameter.grad - expected_grads[name]).norm() / expected_grads[name].norm()
        assert difference < 1e-5, name
    with torch.no_grad():
        logits = model.hf.lm_head(model.eval()(batch, ask="hidden"))
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)


def test_control_a_plain_causal_mask_differs(base_model):
    docs = documents()
    expected_loss, expected_logits, _ = alone(base_model, docs)
    joined = build([tuple(np.concatenate(part) for part in zip(*docs, strict=True))], CPU)
    model = load(base_model, checkpointing=False)
    with torch.no_grad():
        assert abs(model(joined)[0].item() - expected_loss) / expected_loss > 1e-3
        logits = model.hf.lm_head(model(joined, ask="hidden"))
    assert (logits - expected_logits).abs().max() > 0.1


def test_a_forward_without_layout_is_an_error(base_model):
    model = load(base_model, checkpointing=False)
    with pytest.raises(ValueError, match="layout"):
        model.hf(input_ids=torch.tensor([[5, 6, 7]]))


def test_the_probe_passes_and_names_its_control(base_model):
    line = prove_isolation(load(base_model, checkpointing=True).eval(), 259, CPU)
    assert "packed against alone" in line
    assert "without boundary" in line


def test_the_probe_refuses_a_leaking_kernel(base_model, monkeypatch):
    from sft import attention

    def leaks(query, key, value, layout, scaling, dropout):
        whole = type(layout)((sum(layout.seq_lens),), layout.cu_seqlens[[0, -1]])
        return attention._sdpa(query, key, value, whole, scaling, dropout)

    monkeypatch.setitem(attention._KERNELS, "sdpa", leaks)
    model = load(base_model, checkpointing=False)
    monkeypatch.undo()
    with pytest.raises(UserError, match="see each other"):
        prove_isolation(model, 259, CPU)
    register("sdpa")


def test_the_probe_refuses_to_pass_when_it_could_not_see_a_leak(base_model):
    model = load(base_model, checkpointing=False)
    for layer in model.hf.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)  # attention has no effect: nothing to isolate
    with pytest.raises(UserError, match="cannot tell"):
        prove_isolation(model, 259, CPU)


def test_kernels_that_cannot_run_here_are_refused_by_name():
    assert choose_kernel("auto", CPU, torch.float32) == "sdpa"
    for name in ("flash_attention_2", "varlen"):
        with pytest.raises(UserError, match=name):
            choose_kernel(name, CPU, torch.float32)
