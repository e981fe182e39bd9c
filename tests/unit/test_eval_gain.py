"""Held-out loss of a scored model: training's own figure, whatever the batches and the neighbours of a pack."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Mistral3Config

from data_prep.shards import open_shards
from sft import attention, batch
from sft.errors import UserError
from sft.eval.gain import heldout_loss, open_heldout
from sft.eval.ranks import Ranks
from sft.model import load_model as load_packed
from sft.pretrained import load_causal_lm
from sft.tokenizer import load_tokenizer
from tests import tiny

ALONE = Ranks(0, 1, torch.device("cpu"))


def measure(model, folder, tokenizer, tokens_per_batch=2048):
    return heldout_loss(model, str(folder), ALONE, tokenizer, tokens_per_batch=tokens_per_batch)


@pytest.fixture(scope="module")
def model(base_model):
    return load_causal_lm(base_model, dtype=torch.float32, attention="sdpa").eval()


@pytest.fixture(scope="module")
def tokenizer(base_model):
    return load_tokenizer(base_model)


def trained_loss(base_model, folder):
    """What training's held-out loss sums: its model, its kernel, its micro-batches of flattened packs."""
    name = attention.register("sdpa")
    packed = load_packed(str(base_model), dtype=torch.float32, attention=name, checkpointing=False, liger=False).eval()
    shards = open_shards(folder)
    rows = np.arange(len(shards))
    with torch.no_grad():
        total = sum(packed(batch.from_shards(shards, rows[[row]], ALONE.device))[0].double() for row in rows)
    return float(total) / batch.num_labels(shards, rows)


def mean_by_document(base_model, folder, isolated):
    """One document, or one whole pack, at a time through transformers' own loss."""
    reference = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval()
    shards = open_shards(folder)
    total, count = 0.0, 0
    for row in range(len(shards)):
        pack = shards.pack(row)
        starts = np.cumsum(pack.seq_lens)[:-1]
        labels = pack.labels.copy()
        labels[starts] = batch.IGNORE
        parts = (
            zip(np.split(pack.input_ids, starts), np.split(labels, starts), strict=True)
            if isolated
            else [(pack.input_ids, labels)]
        )
        for ids, targets in parts:
            ids_1T, targets_1T = (torch.from_numpy(part.astype(np.int64))[None] for part in (ids, targets))
            targets_1T[:, 0] = batch.IGNORE
            number = int((targets_1T != batch.IGNORE).sum())
            with torch.no_grad():
                total += float(reference(input_ids=ids_1T, labels=targets_1T).loss) * number
            count += number
    return total / count


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_it_is_trainings_loss_and_documents_do_not_see_each_other(base_model, prepared, model, tokenizer, split):
    ours = measure(model, prepared / split, tokenizer)
    assert ours == pytest.approx(trained_loss(base_model, prepared / split), rel=1e-6)
    assert ours == pytest.approx(mean_by_document(base_model, prepared / split, isolated=True), rel=1e-6)
    assert ours != pytest.approx(mean_by_document(base_model, prepared / split, isolated=False), rel=1e-3)


@pytest.mark.parametrize("tokens_per_batch", [1, 300, 100_000])
def test_batches_do_not_matter(prepared, model, tokenizer, tokens_per_batch):
    usual = measure(model, prepared / "train", tokenizer)
    assert measure(model, prepared / "train", tokenizer, tokens_per_batch) == pytest.approx(usual, rel=1e-6)


def test_shards_of_another_tokenizer_are_refused(prepared, tmp_path, base_model):
    other = load_tokenizer(tiny.make_tokenizer(tmp_path / "other", merges=[("t", "h")]))
    with pytest.raises(UserError, match="heldout .* was prepared with another tokenizer"):
        open_heldout(str(prepared / "heldout"), other, AutoConfig.from_pretrained(base_model))


def test_packs_longer_than_the_models_context_are_refused(prepared, tmp_path):
    short = tiny.make_model(tmp_path / "short", max_position_embeddings=256)
    with pytest.raises(UserError, match="heldout: packs of 512 tokens, but .* attends to 256"):
        open_heldout(str(prepared / "heldout"), load_tokenizer(short), AutoConfig.from_pretrained(short))


def test_a_config_whose_language_model_is_one_part_is_read(prepared, tmp_path, base_model, tokenizer):
    """Vocabulary and context stand in its text_config."""
    for context, fits in ((512, True), (256, False)):
        text = AutoConfig.from_pretrained(base_model, max_position_embeddings=context)
        config = Mistral3Config(text_config=text.to_dict())
        assert "vocab_size" not in config.to_dict()
        if fits:
            assert len(open_heldout(str(prepared / "heldout"), tokenizer, config))
        else:
            with pytest.raises(UserError, match="attends to 256"):
                open_heldout(str(prepared / "heldout"), tokenizer, config)


def test_the_folder_above_the_shards_is_named(prepared, base_model, tokenizer):
    with pytest.raises(UserError, match="no manifest.json"):
        open_heldout(str(prepared), tokenizer, AutoConfig.from_pretrained(base_model))


def test_a_loss_that_is_not_finite_is_an_error(prepared, base_model, tokenizer):
    broken = load_causal_lm(base_model, dtype=torch.float32, attention="sdpa").eval()
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    with pytest.raises(UserError, match="is not finite"):
        measure(broken, prepared / "heldout", tokenizer)
