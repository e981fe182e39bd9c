"""Scoring on a GPU: both engines in bf16, kernels, memory, the whole command. Run on a GPU host: pytest tests/gpu"""

import json
import random
import sys

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig

from sft.eval import forward, score
from sft.eval.finished import Kept
from sft.eval.ranks import Ranks
from sft.eval.requests import Request
from sft.eval.results import tie_width
from sft.eval.tree import distinct_rows, plan_packed, plan_plain
from tests import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]

ALONE = Ranks(0, 1, torch.device("cuda"))
VOCABULARY = 32_000
MAX_LENGTH = 2048
TOKENS_PER_BATCH = 16_384
BF16_BITS = 8
GIB = 2**30


def build(dtype, **overrides):
    """Grouped heads of size 64, as large Llamas have; weights large enough that a leak between branches shows."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_LENGTH,
        "initializer_range": 0.05,
        **overrides,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), attn_implementation="sdpa")
    return model.to(ALONE.device, dtype).eval()


@pytest.fixture(scope="module")
def model():
    return build(torch.bfloat16)


def some(rng, low, high):
    return rng.choices(range(3, VOCABULARY), k=rng.randint(low, high))


def request(context, continuation):
    return Request(np.array(context, dtype=np.int32), np.array(continuation, dtype=np.int32))


def mmlu_like():
    """Two subjects of 32 questions behind 600 tokens in common; one token is scored."""
    rng = random.Random(0)
    requests = []
    for _ in range(2):
        shots = [1, *some(rng, 600, 600)]
        for _ in range(32):
            context = shots + some(rng, 30, 150)
            requests += [request(context, [letter]) for letter in (319, 350, 315, 360)]
    return requests


def hellaswag_like(items=64):
    """Contexts of their own, four endings each."""
    rng = random.Random(1)
    requests = []
    for _ in range(items):
        context = [1, *some(rng, 20, 120)]
        requests += [request(context, some(rng, 5, 40)) for _ in range(4)]
    return requests


REQUESTS = {"mmlu": mmlu_like, "hellaswag": hellaswag_like}


def plan(requests, engine):
    rows = distinct_rows(requests, MAX_LENGTH)
    return plan_packed(rows, TOKENS_PER_BATCH) if engine == "packed" else plan_plain(rows, TOKENS_PER_BATCH, None)


def ask(model, requests, engine, *, native=False):
    """Log-likelihoods, float64 [items, choices]."""
    return score.score_requests(
        model, plan(requests, engine), len(requests), ranks=ALONE, native=native, lockstep=False,
        kept=Kept(None, "", 0), label="test",
    ).lls  # fmt: skip


def limits(requests, dtype):
    """What the probe allows, [items, choices]."""
    constant, per_token = score.PROBE_LIMIT[dtype]
    return constant + per_token * np.array([len(one.cont_ids) for one in requests]).reshape(-1, 4)


@pytest.mark.parametrize("task", REQUESTS)
def test_engines_agree_in_bf16_within_the_limits_of_the_probe(model, task):
    requests = REQUESTS[task]()
    difference, limit = score.compare_engines(model, requests, MAX_LENGTH, TOKENS_PER_BATCH, ALONE)
    assert difference < limit
    packed, plain = ask(model, requests, "packed"), ask(model, requests, "plain")
    assert (np.abs(packed - plain) < limits(requests, torch.bfloat16)).all()


@pytest.mark.parametrize("task", REQUESTS)
def test_decisions_in_bf16_differ_on_near_ties_only(model, task):
    requests = REQUESTS[task]()
    packed, plain = ask(model, requests, "packed"), ask(model, requests, "plain")
    best, second = np.sort(plain, axis=1)[:, :-3:-1].T
    is_clear = best - second > [tie_width(ll, BF16_BITS) for ll in best]
    assert is_clear.sum() > len(plain) / 2
    assert (packed.argmax(1) == plain.argmax(1))[is_clear].all()


def test_control_branches_that_see_their_neighbours_are_found_in_bf16(model, monkeypatch):
    right = forward._ancestors
    monkeypatch.setattr(forward, "_ancestors", lambda end, *more: right(torch.full_like(end, end.shape[1]), *more))
    difference, limit = score.compare_engines(model, hellaswag_like(), MAX_LENGTH, TOKENS_PER_BATCH, ALONE)
    assert difference > limit


@pytest.mark.parametrize("task", REQUESTS)
def test_engines_agree_in_fp32(task):
    """No TF32: its products would be off by 1e-3 and more."""
    requests = REQUESTS[task]()
    model = build(torch.float32)
    packed, plain = ask(model, requests, "packed"), ask(model, requests, "plain")
    assert np.abs(packed - plain).max() < score.PROBE_LIMIT[torch.float32][0]
    assert (packed.argmax(1) == plain.argmax(1)).all()
    assert any(len(one.prefix) for one in plan(requests, "packed")) == (task == "mmlu"), "kept prefixes are covered"


@pytest.mark.parametrize("engine", ["packed", "plain"])
def test_native_scores_are_bf16_numbers_near_those_in_fp32(model, engine):
    requests = hellaswag_like()
    native, wide = ask(model, requests, engine, native=True), ask(model, requests, engine)
    assert (torch.tensor(native).bfloat16().double().numpy() == native).all()
    assert (torch.tensor(wide).bfloat16().double().numpy() != wide).any(), "control: fp32 sums are finer"
    tokens = np.array([len(one.cont_ids) for one in requests]).reshape(-1, 4)
    # each token's log-probability is rounded (by 0.0625 at most where it is above -32), and the sum once more
    allowed = 0.0625 * tokens + np.abs(wide) * 2.0**-BF16_BITS
    assert (np.abs(native - wide) <= allowed).all()


@pytest.mark.parametrize("task", REQUESTS)
def test_the_mask_keeps_to_the_memory_efficient_kernel(model, task):
    """The math kernel would hold the weights of every pair of tokens."""
    requests = REQUESTS[task]()
    with sdpa_kernel(SDPBackend.MATH):
        plain = ask(model, requests, "packed")
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):
        efficient = ask(model, requests, "packed")
    assert (np.abs(efficient - plain) < limits(requests, torch.bfloat16)).all()
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), pytest.raises(RuntimeError):  # control: it takes no mask
        ask(model, requests, "packed")


def test_memory_is_bounded_by_the_scored_positions():
    """Llama-3's vocabulary: logits at all 16,384 positions of a batch would take 4 GiB in bf16 alone."""
    vocabulary = 128_256
    model = build(torch.bfloat16, vocab_size=vocabulary, hidden_size=256, num_hidden_layers=2, num_attention_heads=4)
    requests = hellaswag_like(items=400)
    assert max(one.num_tokens for one in plan(requests, "packed")) > TOKENS_PER_BATCH / 4
    assert peak_gib(lambda: ask(model, requests, "packed")) < 2.5
    ids = torch.zeros((TOKENS_PER_BATCH // MAX_LENGTH, MAX_LENGTH), dtype=torch.long, device=ALONE.device)
    with torch.inference_mode():
        assert peak_gib(lambda: model(input_ids=ids, use_cache=False).logits) > 3.5, "control: it can be measured"


def peak_gib(work):
    """What `work` takes beside what is there already."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def test_the_whole_command_on_one_gpu(tmp_path):
    folder = tiny.make_model(tmp_path / "model", hidden_size=128, intermediate_size=256, max_position_embeddings=2048)
    data = tiny.make_evals(tmp_path / "evals")
    records = {}
    for engine in ("packed", "plain"):
        out = tmp_path / engine
        flags = {"model": folder, "data": data, "shots.mmlu": 5, "engine": engine, "out": out}
        command = [
            sys.executable,
            "-m",
            "sft.eval",
            *[t for key, value in flags.items() for t in (f"--{key}", str(value))],
        ]
        done = tiny.run(command, environment=tiny.gpu_environment())
        assert done.returncode == 0, done.stdout + done.stderr
        header = json.loads((out / "results.json").read_text())["header"]
        assert header["device"] == torch.cuda.get_device_name()
        assert (header["engine"], header["fallback"], header["ranks"]) == (engine, None, 1)
        assert header["dtype"] == "bfloat16"
        records[engine] = [*tiny.read_jsonl(out / "items-mmlu.jsonl"), *tiny.read_jsonl(out / "items-hellaswag.jsonl")]
    assert len(records["packed"]) == 12
    for packed, plain in zip(records["packed"], records["plain"], strict=True):
        key = "pred" if plain["task"] == "mmlu" else "pred_norm"
        assert packed["doc_id"] == plain["doc_id"]
        assert packed[key] == plain[key] or plain["near_tie"]
