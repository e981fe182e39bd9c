"""Both engines against one plain forward per request, and what is caught. Run: pytest tests/unit/test_eval_score.py"""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from sft.errors import UserError
from sft.eval import forward, prefix_keys, score, tree
from sft.eval.finished import Kept
from sft.eval.ranks import Ranks
from sft.eval.requests import Request
from sft.eval.results import make_records, summarize
from sft.eval.tasks.item import Item
from sft.eval.tree import distinct_rows, plan_packed, plan_plain

ALONE = Ranks(0, 1, torch.device("cpu"))
VOCABULARY = 90
MAX_LENGTH = 80
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # large enough that a leak between branches shows
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
}


def build(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def model():
    return build(CONFIGS["llama"])


@pytest.fixture(autouse=True)
def _small_trees(monkeypatch):
    """What a handful of ids reaches, so that prefixes are kept."""
    monkeypatch.setattr(tree, "TREE_TOKENS", 40)
    monkeypatch.setattr(tree, "MIN_PREFIX", 8)


def request(context, continuation):
    return Request(np.array(context, dtype=np.int32), np.array(continuation, dtype=np.int32))


def make_requests():
    """MMLU's shape and HellaSwag's: two subjects with shots in common; contexts with four endings, some too long."""
    rng = random.Random(0)

    def some(low, high):
        return rng.choices(range(3, VOCABULARY), k=rng.randint(low, high))

    requests = []
    for shots in ([1, *some(40, 40)], [1, *some(30, 30)]):
        for _ in range(6):
            context = shots + some(5, 15)
            requests += [request(context, [letter]) for letter in (70, 71, 72, 73)]
    for length in (3, 20, 35, 79, 130):
        context, start = [1, *some(length, length)], some(2, 2)
        requests += [request(context, ids) for ids in (start, start + some(4, 4), some(1, 1), some(8, 8))]
    return requests


def ask(model, requests, engine, tokens_per_batch=500, *, native=False, batch_size=None):
    rows = distinct_rows(requests, MAX_LENGTH)
    bins = plan_packed(rows, tokens_per_batch) if engine == "packed" else plan_plain(rows, tokens_per_batch, batch_size)
    kept = Kept(None, "test", 0)
    return score.score_requests(
        model, bins, len(requests), ranks=ALONE, native=native, lockstep=False, kept=kept, label="test"
    )


@torch.inference_mode()
def by_hand(model, requests, dtype=torch.float64):
    """(log-likelihoods, greedy): each text by itself, log-softmax at every position in `dtype`, float64 [requests]."""
    lls, greedy = [], []
    for one in requests:
        ids = [*one.ctx_ids.tolist(), *one.cont_ids.tolist()][-(MAX_LENGTH + 1) :]
        log_probs = model(input_ids=torch.tensor([ids[:-1]])).logits[0].to(dtype).log_softmax(-1)
        at = log_probs[-len(one.cont_ids) :]
        targets = torch.tensor(ids[-len(one.cont_ids) :])
        lls.append(float(at.gather(1, targets[:, None]).sum()))
        greedy.append(bool((at.argmax(-1) == targets).all()))
    return np.array(lls), np.array(greedy)


@torch.inference_mode()
def with_greedy_ending(model, requests):
    """Each fourth request's continuation is what the model itself would have written."""
    made = list(requests)
    for place in range(0, len(made), 4):
        ids = [*made[place].ctx_ids.tolist()]
        for _ in made[place].cont_ids:
            ids.append(int(model(input_ids=torch.tensor([ids[-MAX_LENGTH:]])).logits[0, -1].argmax()))
        made[place] = request(made[place].ctx_ids, ids[len(made[place].ctx_ids) :])
    return made


def decisions(scores):
    return scores.lls.argmax(-1).tolist()


@pytest.mark.parametrize("family", CONFIGS)
def test_both_engines_equal_one_forward_per_request(family):
    model = build(CONFIGS[family])
    requests = with_greedy_ending(model, make_requests())
    bins = plan_packed(distinct_rows(requests, MAX_LENGTH), 500)
    assert any(len(one.prefix) for one in bins)
    assert any((each.end != len(each.ids)).any() for one in bins for batch in one.batches for each in batch)
    lls, greedy = by_hand(model, requests)
    for engine in ("packed", "plain"):
        scores = ask(model, requests, engine)
        assert scores.lls.dtype == np.float64
        np.testing.assert_allclose(scores.lls.reshape(-1), lls, atol=1e-4)
        assert scores.greedy.reshape(-1).tolist() == greedy.tolist()
    assert len(greedy) // 8 < greedy.sum() < len(greedy)


@pytest.mark.parametrize("engine", ["packed", "plain"])
def test_batches_and_order_do_not_matter(model, engine):
    requests = make_requests()
    usual = ask(model, requests, engine, 16384)
    for tokens_per_batch in (1, 64, 500):
        scores = ask(model, requests, engine, tokens_per_batch)
        np.testing.assert_allclose(scores.lls, usual.lls, atol=1e-4)
        assert decisions(scores) == decisions(usual)
    items = random.Random(1).sample(range(len(requests) // 4), len(requests) // 4)
    shuffled = ask(model, [requests[4 * item + choice] for item in items for choice in range(4)], engine, 16384)
    np.testing.assert_array_equal(shuffled.lls, usual.lls[items])


def test_a_shifted_position_would_show(model):
    """Negative control: the scores of the tokens one place earlier are far away."""
    requests = make_requests()
    shifted = [Request(one.ctx_ids[:-1], one.cont_ids) for one in requests]
    assert np.abs(ask(model, requests, "packed").lls - ask(model, shifted, "packed").lls).mean() > 0.1


def test_native_softmax_and_sums_are_those_of_the_dtype():
    model = build(CONFIGS["llama"]).to(torch.bfloat16)
    requests = make_requests()[36:]
    lls, greedy = by_hand(model, requests, torch.bfloat16)
    scores = ask(model, requests, "plain", native=True, batch_size=1)
    assert scores.lls.reshape(-1).tolist() == lls.tolist()
    assert scores.greedy.reshape(-1).tolist() == greedy.tolist()
    in_fp32 = ask(model, requests, "plain", batch_size=1).lls.reshape(-1)
    assert 1e-3 < np.abs(in_fp32 - lls).max() < 0.5
    np.testing.assert_allclose(in_fp32, by_hand(model, requests)[0], atol=1e-4)  # bf16 logits, nothing else rounded
    packed = ask(model, requests, "packed", native=True).lls.reshape(-1)
    assert (packed.astype(np.float32) == torch.tensor(packed).bfloat16().float().numpy()).all()


def probe(model, requests=None):
    return score.compare_engines(model, requests or make_requests()[:40], MAX_LENGTH, 500, ALONE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_finds_the_engines_equal(dtype):
    difference, limit = probe(build(CONFIGS["llama"]).to(dtype))
    assert 0 < difference < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["causal mask", "positions", "prefix"])
def test_the_probe_finds_a_wrong_engine(monkeypatch, fault, dtype):
    if fault == "causal mask":
        right = forward._ancestors
        monkeypatch.setattr(forward, "_ancestors", lambda end, *more: right(torch.full_like(end, end.shape[1]), *more))
    elif fault == "positions":
        monkeypatch.setattr(score, "plan_packed", lambda *given: [_in_a_row(one) for one in plan_packed(*given)])
    else:
        whole = prefix_keys.compute_prefix
        monkeypatch.setattr(prefix_keys, "compute_prefix", lambda model, ids: whole(model, ids.roll(1, -1)))
    difference, limit = probe(build(CONFIGS["llama"]).to(dtype))
    assert difference > limit


def _in_a_row(one):
    """Positions that go on from branch to branch."""
    batches = [tuple(replace(each, depth=np.arange(len(each.ids))) for each in batch) for batch in one.batches]
    return replace(one, batches=tuple(batches))


def test_nan_that_only_the_packed_engine_gives_is_its_fault(model, monkeypatch):
    whole = prefix_keys.compute_prefix

    def torn(model, ids):
        cache = whole(model, ids)
        cache.layers[0].values.fill_(float("nan"))
        return cache

    monkeypatch.setattr(prefix_keys, "compute_prefix", torn)
    difference, limit = probe(model)
    assert difference > limit


def test_scores_that_are_not_finite_are_refused():
    broken = build(CONFIGS["llama"])
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    requests = make_requests()
    assert probe(broken)[0] == 0  # the engines agree
    with pytest.raises(UserError, match=rf"test: {len(requests)} of {len(requests)} scores are not finite.*dtype fp32"):
        ask(broken, requests, "packed")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        *((config, None) for config in CONFIGS.values()),
        (MistralConfig(**SHAPE, sliding_window=16), "its attention sees 16 tokens, the longest item has 40"),
        (MistralConfig(**SHAPE, sliding_window=40), None),
        (LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic"),
    ],
)
def test_models_that_cannot_be_packed_are_known_by_their_config(config, reason):
    found = score.why_not_packed(config, 40)
    assert found is None if reason is None else reason in found


def test_each_request_must_be_scored_exactly_once(model):
    requests = make_requests()[:8]
    bins = plan_packed(distinct_rows(requests, MAX_LENGTH), 500)
    for wrong in (bins[1:], [*bins, bins[0]]):
        with pytest.raises(RuntimeError, match=r"of 8 requests were not scored exactly once"):
            score.score_requests(
                model, wrong, 8, ranks=ALONE, native=False, lockstep=False, kept=Kept(None, "", 0), label="test"
            )


def test_ids_beyond_the_vocabulary_are_refused(model):
    score.check_vocabulary(model, [request([5, VOCABULARY - 1], [6])])
    for wild in (request([5, VOCABULARY], [6]), request([5], [VOCABULARY])):
        with pytest.raises(UserError, match=rf"gives id {VOCABULARY}, the model has {VOCABULARY} embeddings"):
            score.check_vocabulary(model, [wild])


def test_of_equal_maxima_the_first_is_the_greedy_one():
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 0.0, 0.5]])
    places = [np.array([0]), np.array([0]), np.array([1]), np.array([0, 1])]
    targets = [np.array([1]), np.array([2]), np.array([2]), np.array([1, 0])]
    lls, greedy = forward._log_likelihoods(logits, places, targets, native=False)
    assert greedy.tolist() == [True, False, False, True]
    assert lls[0] == lls[1] == pytest.approx(-np.log(2 + np.exp(-2.0)))


def item(task, choices, gold=0, subject="anatomy", doc_id=0):
    return Item(task, subject, doc_id, "", (), "context", choices, gold, "source")


def scores_of(*lls):
    return score.Scores(np.array(lls), np.zeros((len(lls), 4), dtype=bool))


def test_records_ties_lengths_and_empty_endings():
    first, second = make_records(
        [item("hellaswag", ("aaaa", "", "éé", "b"), 2), item("mmlu", ("A", "B", "C", "D"))],
        ["one", "two"],
        scores_of([-8.0, -1.0, -3.0, -2.5], [-2.0, -1.0, -1.0, -5.0]),
        24,
    )
    assert (first.pred, first.pred_norm) == (1, 2)  # -2, never, -1.5 per code point, -2.5
    assert (first.correct, first.correct_norm) == (False, True)
    assert (first.chars, first.utf8_bytes) == ((4, 0, 2, 1), (4, 0, 4, 1))
    assert (first.gap, first.near_tie) == (0.5, False)
    assert second.pred == second.pred_norm == 1  # the first of equals
    assert (second.gap, second.near_tie) == (0, True)
    blank, lone = make_records(
        [item("hellaswag", ("", "", "", "")), item("hellaswag", ("", "", "", "go"))],
        ["one", "two"],
        scores_of([-8.0, -1.0, -3.0, -2.5], [-8.0, -1.0, -3.0, -9.0]),
        24,
    )
    assert (blank.pred_norm, blank.gap, blank.near_tie) == (0, 0.0, True)  # four times -inf is a tie
    assert (lone.pred_norm, lone.near_tie) == (3, False)
    assert 1e300 < lone.gap < float("inf")  # strict JSON knows no infinity
    assert summarize("hellaswag", [first]) == {"acc": 0.0, "stderr": None, "acc_norm": 1.0, "stderr_norm": None, "n": 1}


def test_mmlu_means_are_over_items():
    items = [item("mmlu", ("A", "B", "C", "D"), gold, subject) for subject, gold in
             [("anatomy", 0), ("astronomy", 0), ("astronomy", 1), ("astronomy", 1), ("island_trade", 0)]]  # fmt: skip
    summary = summarize("mmlu", make_records(items, ["c"] * 5, scores_of(*[[0.0, -1, -1, -1]] * 5), 24))
    assert summary["acc"] == 3 / 5
    assert summary["n"] == 5
    assert list(summary["categories"]) == ["stem"]
    stem = summary["categories"]["stem"]
    assert (stem["acc"], stem["stderr"], stem["n"]) == (0.5, pytest.approx(np.sqrt(0.25 / 3)), 4)
    assert list(summary["subjects"]) == ["anatomy", "astronomy", "island_trade"]
