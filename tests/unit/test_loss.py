"""Chunked summed cross-entropy against PyTorch's own. Run: pytest tests/unit/test_loss.py"""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from sft import loss as loss_module
from sft.loss import LossHead


def head_and_inputs(num=50, hidden=16, vocab=40, dtype=torch.float32):
    torch.manual_seed(0)
    head = LossHead(hidden, vocab, bias=False).to(dtype)
    return head, torch.randn(num, hidden, dtype=dtype, requires_grad=True), torch.randint(0, vocab, (num,))


def total_loss(head, hidden_NE, targets_N):
    return head(hidden_NE, targets_N, torch.zeros_like(targets_N), 1)[0]


@pytest.mark.parametrize("chunk_rows", [1, 7, 50, 1000])
def test_loss_and_gradients_equal_plain_cross_entropy(monkeypatch, chunk_rows):
    head, hidden_NE, targets_N = head_and_inputs()
    expected = cross_entropy(hidden_NE @ head.weight.T, targets_N, reduction="sum") * 0.25
    grads = torch.autograd.grad(expected, [hidden_NE, head.weight])
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk_rows * 40)
    total = total_loss(head, hidden_NE, targets_N) * 0.25
    total.backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(hidden_NE.grad, grads[0])
    torch.testing.assert_close(head.weight.grad, grads[1])


@pytest.mark.parametrize("chunk_rows", [7, 1000])
def test_label_smoothing_equals_pytorchs(monkeypatch, chunk_rows):
    head, hidden_NE, targets_N = head_and_inputs()
    expected = cross_entropy(hidden_NE @ head.weight.T, targets_N, reduction="sum", label_smoothing=0.1)
    grads = torch.autograd.grad(expected, [hidden_NE, head.weight])
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk_rows * 40)
    head.label_smoothing = 0.1
    total, by_source_S = head(hidden_NE, targets_N, targets_N % 2, 2)
    total.backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(by_source_S.sum(), expected.detach())
    torch.testing.assert_close(hidden_NE.grad, grads[0])
    torch.testing.assert_close(head.weight.grad, grads[1])


def test_label_smoothing_by_hand_and_in_training_only():
    """One token, logits ln 1, ln 3: p = 1/4, 3/4; with e = 0.2 the target is 0.9, 0.1."""
    head = LossHead(1, 2, bias=False)
    head.weight.data = torch.tensor([[0.0], [math.log(3)]])
    head.label_smoothing = 0.2
    loss = total_loss(head, torch.ones(1, 1), torch.zeros(1, dtype=torch.long))
    assert loss.item() == pytest.approx(0.9 * math.log(4) + 0.1 * math.log(4 / 3))
    plain = total_loss(head.eval(), torch.ones(1, 1), torch.zeros(1, dtype=torch.long))
    assert plain.item() == pytest.approx(math.log(4))


def test_a_mean_would_differ():
    head, hidden_NE, targets_N = head_and_inputs()
    mean = cross_entropy(hidden_NE @ head.weight.T, targets_N)
    assert abs(total_loss(head, hidden_NE, targets_N) - mean) > 1


def test_no_targets_give_a_connected_zero():
    head, hidden_NE, _ = head_and_inputs(num=0)
    total = total_loss(head, hidden_NE, torch.zeros(0, dtype=torch.long))
    total.backward()
    assert total.item() == 0
    assert head.weight.grad.abs().sum() == 0


def test_bf16_weight_gradient_is_summed_in_fp32(monkeypatch):
    """512 chunks: a bf16 sum would lose the small addends; the fp32 sum rounds once."""
    head, hidden_NE, targets_N = head_and_inputs(num=512, dtype=torch.bfloat16)
    logits = hidden_NE.float() @ head.weight.float().T
    reference = (logits.softmax(-1) - torch.nn.functional.one_hot(targets_N, 40)).T @ hidden_NE.float()
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 40)
    total_loss(head, hidden_NE, targets_N).backward()
    error = (head.weight.grad.float() - reference).norm() / reference.norm()
    in_bf16 = sum_in_bf16(logits, targets_N, hidden_NE)
    assert error < 5e-3 < (in_bf16.float() - reference).norm() / reference.norm()


def sum_in_bf16(logits, targets_N, hidden_NE):
    total = torch.zeros(40, 16, dtype=torch.bfloat16)
    for row, target, hidden in zip(logits, targets_N, hidden_NE, strict=True):
        grad = (row.softmax(-1) - torch.nn.functional.one_hot(target, 40)).bfloat16()
        total += torch.outer(grad, hidden.detach())
    return total


def test_without_targets_it_is_a_linear_layer():
    head, hidden_NE, _ = head_and_inputs()
    torch.testing.assert_close(head(hidden_NE), hidden_NE @ head.weight.T)


def test_no_gradient_work_without_grad_mode():
    head, hidden_NE, targets_N = head_and_inputs()
    with torch.no_grad():
        assert not total_loss(head, hidden_NE, targets_N).requires_grad


def head_by_hand():
    """Logits (0, h ln 3): where h is 1, target 0 costs ln 4 and target 1 ln 4/3; where it is 0, both ln 2."""
    head = LossHead(1, 2, bias=False)
    head.weight.data = torch.tensor([[0.0], [math.log(3)]])
    return head, torch.tensor([[1.0], [1.0], [0.0], [1.0], [0.0]]), torch.tensor([0, 1, 0, 1, 1])


@pytest.mark.parametrize("chunk_rows", [1, 2, 1000])
def test_losses_by_source_by_hand(monkeypatch, chunk_rows):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk_rows * 2)
    head, hidden_NE, targets_N = head_by_hand()
    total, by_source_S = head(hidden_NE, targets_N, torch.tensor([0, 2, 2, 0, 2]), 3)
    first, last = math.log(4) + math.log(4 / 3), math.log(4 / 3) + 2 * math.log(2)
    torch.testing.assert_close(by_source_S, torch.tensor([first, 0.0, last]))
    torch.testing.assert_close(total.detach(), torch.tensor(first + last))
    assert by_source_S.dtype == torch.float32
    _, alone_S = head(hidden_NE, targets_N, torch.zeros(5, dtype=torch.long), 1)
    torch.testing.assert_close(alone_S, torch.tensor([first + last]))


def test_control_other_sources_other_parts_same_total():
    head, hidden_NE, targets_N = head_by_hand()
    total, by_source_S = head(hidden_NE, targets_N, torch.tensor([0, 2, 2, 0, 2]), 3)
    same_total, others_S = head(hidden_NE, targets_N, torch.tensor([2, 0, 2, 0, 2]), 3)
    assert torch.equal(total, same_total)
    assert (by_source_S - others_S).abs()[[0, 2]].min() > 0.1


def test_sources_have_no_part_in_the_gradient():
    head, hidden_NE, targets_N = head_and_inputs()
    grads = []
    for num_sources in (1, 3):
        total, by_source_S = head(hidden_NE, targets_N, torch.arange(50) % num_sources, num_sources)
        assert total.requires_grad
        assert not by_source_S.requires_grad
        grads.append(torch.autograd.grad(total * 0.25, [hidden_NE, head.weight]))
    for one, three in zip(*grads, strict=True):
        assert torch.equal(one, three)


def test_no_targets_give_every_source_zero():
    head, hidden_NE, targets_N = head_and_inputs(num=0)
    total, by_source_S = head(hidden_NE, targets_N, targets_N, 3)
    total.backward()
    assert by_source_S.tolist() == [0, 0, 0]


def test_nothing_is_read_back_to_the_host(monkeypatch):
    """Meta tensors have no values: what would wait for a GPU fails on them."""
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 7 * 40)
    head, hidden_NE, targets_N = (each.to("meta") for each in head_and_inputs())
    total, by_source_S = head(hidden_NE.detach().requires_grad_(), targets_N, targets_N, 3)
    (total * 0.25).backward()
    assert by_source_S.shape == (3,)
    assert head.weight.grad.shape == (40, 16)
    with pytest.raises((RuntimeError, NotImplementedError)):
        total.item()
