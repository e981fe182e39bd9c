"""Batched scores against one plain forward per request, and refusals. Run: pytest tests/unit/test_eval_score.py"""

import json
import random
import shutil

import numpy as np
import pytest
import torch

from sft.errors import UserError
from sft.eval import score
from sft.eval.ranks import Ranks, merge
from sft.eval.requests import Request
from sft.eval.results import make_records, summarize
from sft.eval.run import prepare
from sft.eval.tasks.item import Item
from tests import tiny

ALONE = Ranks(0, 1, torch.device("cpu"))
MAX_LENGTH = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("score") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return score.load_model(str(folder), torch.float32, ALONE.device)


def make_requests(num=12, seed=0):
    """Contexts of 3 to 60 ids, each with four one-token and one four-token continuation; some need truncation."""
    rng = random.Random(seed)
    requests = []
    for _ in range(num):
        ctx = np.array([rng.randrange(3, 259) for _ in range(rng.randint(3, 60))], dtype=np.int32)
        requests += [Request(ctx, np.array([letter], dtype=np.int32)) for letter in (70, 71, 72, 73)]
        requests.append(Request(ctx, np.array([70, 80, 90, 100], dtype=np.int32)))
    return requests


def run(model, requests, tokens_per_batch=200):
    return score.score_requests(
        model, requests, max_length=MAX_LENGTH, tokens_per_batch=tokens_per_batch, ranks=ALONE, label="test"
    )


@torch.inference_mode()
def plainly(model, request):
    """Every position's log-softmax of the whole text, no batch, no padding."""
    ids = [*request.ctx_ids.tolist(), *request.cont_ids.tolist()][-(MAX_LENGTH + 1) :]
    log_probs = model(input_ids=torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    first = len(ids) - len(request.cont_ids)
    return sum(float(log_probs[place - 1, ids[place]]) for place in range(first, len(ids)))


@pytest.mark.parametrize("tokens_per_batch", [1, 200, 100000])
def test_scores_equal_plain_forwards(model, tokens_per_batch):
    requests = make_requests()
    scores = run(model, requests, tokens_per_batch)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, [plainly(model, request) for request in requests], atol=1e-4)


def test_scores_do_not_depend_on_the_order_of_requests(model):
    requests = make_requests()
    shuffled = random.Random(1).sample(range(len(requests)), len(requests))
    scores = run(model, requests)
    np.testing.assert_array_equal(run(model, [requests[number] for number in shuffled]), scores[shuffled])


def test_a_shifted_position_would_show(model):
    """Negative control: the scores of the tokens one place earlier are far away."""
    requests = make_requests()
    shifted = [Request(request.ctx_ids[:-1], request.cont_ids) for request in requests]
    assert np.abs(run(model, requests) - run(model, shifted)).mean() > 0.1


def test_equal_inputs_share_one_forward():
    requests = make_requests(num=1)
    forwards = score.group_forwards(requests, MAX_LENGTH)
    assert sorted(len(forward.scored) for forward in forwards) == [
        1,
        4,
    ]  # the four letters share, the long one reads more
    assert sorted(number for forward in forwards for number, _ in forward.scored) == [0, 1, 2, 3, 4]


def test_batches_keep_to_the_budget():
    forwards = score.group_forwards(make_requests(), MAX_LENGTH)
    batches = score.make_batches(forwards, 100)
    assert [forward for batch in batches for forward in batch] == forwards
    for batch in batches:
        padded = max(len(forward.ids) for forward in batch) * len(batch)
        assert padded <= 100
    assert len(score.make_batches(forwards, 1)) == len(forwards)


def test_each_score_is_written_exactly_once():
    sums = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"1 of 3 requests were not scored exactly once"):
        merge(sums, torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64), ALONE)
    with pytest.raises(RuntimeError, match=r"1 of 3"):
        merge(sums, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64), ALONE)


def test_scores_that_are_not_finite_are_refused(folder):
    broken = score.load_model(str(folder), torch.float32, ALONE.device)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match=r"test: 60 of 60 scores are not finite.*--dtype fp32"):
        run(broken, make_requests())


def test_ids_beyond_the_vocabulary_are_refused(model):
    wild = Request(np.array([5, 259], dtype=np.int32), np.array([6], dtype=np.int32))
    with pytest.raises(UserError, match=r"the tokenizer gives id 259, the model has 259 embeddings"):
        run(model, [wild])


def test_model_folders_that_cannot_be_used(folder, tmp_path):
    def load(path):
        return score.load_model(str(path), torch.float32, ALONE.device)

    with pytest.raises(UserError, match=r"model .*/absent: no such folder"):
        load(tmp_path / "absent")
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(UserError, match=r"model .*/bare: holds no config.json"):
        load(bare)
    shutil.copy(folder / "config.json", bare)
    with pytest.raises(UserError, match=r"model .*/bare: holds no \*.safetensors weights"):
        load(bare)
    (bare / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"model .*/bare: cannot be loaded"):
        load(bare)
    (bare / "config.json").write_text('{"model_type": "no_such_architecture"}')
    with pytest.raises(UserError, match=r"model .*/bare/config.json: cannot be used"):
        load(bare)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "cannot be used"),
        ("1", "cannot be used"),
        ('{"model_type": "llama", ', "cannot be used: .*not a valid JSON file"),
        ({"hidden_size": "x"}, "cannot be used: .*'hidden_size'"),
        ({"num_attention_heads": 3}, "cannot be used: .*not a multiple of the number of attention heads"),
        ({"num_attention_heads": 0}, "cannot be used"),
        ({"dtype": "float99"}, "cannot be used: .*float99"),
        ({"max_position_embeddings": -5}, "max_position_embeddings is -5; need at least 1 token"),
    ],
)
def test_a_bad_config_is_one_line_and_not_the_tokenizers_fault(folder, tmp_path, content, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = copy / "config.json"
    whole = json.loads(config.read_text())
    config.write_text(content if isinstance(content, str) else json.dumps(whole | content))
    with pytest.raises(UserError, match=f"^model .*copy/config.json: {message}") as caught:
        prepare(str(copy), {})
    assert "\n" not in str(caught.value)
    config.write_text(json.dumps(whole))
    assert prepare(str(copy), {}).max_length == 512


def test_a_model_path_that_no_file_system_takes_is_one_line():
    with pytest.raises(UserError, match="cannot be used: .*too long"):
        score.read_config("a" * 300)


def test_weights_that_lack_a_tensor_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    torn = shutil.copytree(folder, tmp_path / "torn")
    tensors = load_file(torn / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, torn / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"torn: its weights lack 1 tensors of the architecture, first model.layers.1"):
        score.load_model(str(torn), torch.float32, ALONE.device)


def test_max_length_is_the_configs_then_the_tokenizers(folder, tmp_path):
    class Limit:
        model_max_length = int(1e30)

    assert score.read_max_length(score.read_config(str(folder)), Limit()) == 512
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"model_type": "mamba"}
    del config["max_position_embeddings"], config["architectures"]
    (other / "config.json").write_text(json.dumps(config))
    assert score.read_max_length(score.read_config(str(other)), Limit()) == 2048
    Limit.model_max_length = 77
    assert score.read_max_length(score.read_config(str(other)), Limit()) == 77


def test_records_ties_lengths_and_empty_endings():
    item = Item("hellaswag", "hellaswag", 3, "context", ("aaaa", "", "éé", "b"), 2, "source")
    tie = Item("mmlu", "anatomy", 0, "context", ("A", "B", "C", "D"), 0, "anatomy")
    first, second = make_records([item, tie], np.array([[-8.0, -1.0, -3.0, -2.5], [-2.0, -1.0, -1.0, -5.0]]))
    assert (first.pred, first.pred_norm) == (1, 2)  # -2, never, -1.5 per code point, -2.5
    assert (first.correct, first.correct_norm) == (False, True)
    assert second.pred == second.pred_norm == 1  # the first of equals
    assert summarize("hellaswag", [first]) == {"acc": 0.0, "stderr": None, "acc_norm": 1.0, "stderr_norm": None, "n": 1}


def test_mmlu_means_are_over_items():
    items = [Item("mmlu", subject, 0, "c", ("A", "B", "C", "D"), gold, subject) for subject, gold in
             [("anatomy", 0), ("astronomy", 0), ("astronomy", 1), ("astronomy", 1), ("island_trade", 0)]]  # fmt: skip
    summary = summarize("mmlu", make_records(items, np.array([[0.0, -1, -1, -1]] * 5)))
    assert summary["acc"] == 3 / 5
    assert summary["n"] == 5
    assert summary["categories"] == {"stem": {"acc": 0.5, "stderr": pytest.approx(np.sqrt(0.25 / 3)), "n": 4}}
    assert list(summary["subjects"]) == ["anatomy", "astronomy", "island_trade"]
