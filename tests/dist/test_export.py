"""The exported folder is the trained model: equal logits, tied and untied, and it stops."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.template import alpaca_prompt
from sft.checkpoint import newest_complete, read_meta, step_folder, write_json
from sft.errors import UserError
from sft.export import main as export_main
from sft.hf_folder import PROVENANCE, export_checkpoint
from tests import tiny
from tests.dist import forked
from tests.dist.training import train, weights

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def trained(request, tmp_path_factory, prepared, strategy):
    """(base, out) after two ZeRO-3 steps on two ranks."""
    folder = tmp_path_factory.mktemp("export")
    base = tiny.make_model(folder / "base", tie_word_embeddings=request.param)
    flags = {"model.path": base, "data.train": prepared / "train", "deepspeed": strategy, "out": folder / "run",
             "batch.rows_per_step": 4, "optim.lr": 0.01, "model.precision": "fp32", "track.wandb": "off"}  # fmt: skip
    done = forked.run_ranks(
        2, "tests.dist.export_worker", *[text for key, value in flags.items() for text in (f"--{key}", str(value))]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return base, folder / "run"


def logits_of(folder, engine):
    model = AutoModelForCausalLM.from_pretrained(folder)
    documents = engine["ids_T"].long().split(engine["seq_lens"].tolist())
    with torch.no_grad():
        return torch.cat([model(input_ids=ids[None]).logits[0] for ids in documents])


def test_exported_logits_equal_the_engines(trained, tmp_path):
    base, run = trained
    engine = load_file(run / "engine.safetensors")
    export_checkpoint(newest_complete(run / "checkpoints"), base, tmp_path / "out", max_shard_gb=2e-5)
    torch.testing.assert_close(logits_of(tmp_path / "out", engine), engine["logits_TV"], rtol=1e-4, atol=1e-4)
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 3, "several shards, so that the index is exercised"
    assert (logits_of(base, engine) - engine["logits_TV"]).abs().max() > 0.01, "control: the base must differ"


def test_the_folder_is_complete_and_nothing_else(trained, tmp_path):
    base, run = trained
    export_checkpoint(newest_complete(run / "checkpoints"), base, tmp_path / "out")
    small = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", PROVENANCE}
    expected = small | {"model.safetensors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 2
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    assert ("lm_head.weight" in names) != tied
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_chat_template_and_its_stop_token_come_along(trained, tmp_path):
    base, run = trained
    checkpoint = tmp_path / "step-00000002"
    shutil.copytree(newest_complete(run / "checkpoints"), checkpoint)
    meta = read_meta(checkpoint)
    meta["identity"] |= {"stop_id": 7, "chat_template": "{{ messages }}"}
    write_json(checkpoint / "COMPLETE", {"meta.json": write_json(checkpoint / "meta.json", meta)})
    export_checkpoint(checkpoint, base, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [7, 2]


def test_bf16_export_is_the_rounded_master(trained, tmp_path):
    base, run = trained
    checkpoint = newest_complete(run / "checkpoints")
    export_checkpoint(checkpoint, base, tmp_path / "bf16", dtype="bf16")
    export_checkpoint(checkpoint, base, tmp_path / "fp32", dtype="fp32")
    rounded, master = (load_file(tmp_path / name / "model.safetensors") for name in ("bf16", "fp32"))
    assert all(torch.equal(rounded[name], master[name].bfloat16()) for name in master)


def test_control_a_changed_tensor_is_not_published(trained, tmp_path, monkeypatch):
    base, run = trained

    def damaged(tensors, path, metadata):
        first = next(iter(tensors))
        save_file({**tensors, first: tensors[first] + 1e-3}, path, metadata=metadata)

    monkeypatch.setattr("sft.hf_folder.save_file", damaged)
    with pytest.raises(UserError, match="loads back different"):
        export_checkpoint(newest_complete(run / "checkpoints"), base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_exported(trained, tmp_path):
    base, run = trained
    copy = shutil.copytree(newest_complete(run / "checkpoints"), tmp_path / "step-00000002")
    file = copy / "rank-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="rank-00001-of-00002.safetensors has digest"):
        export_checkpoint(copy, base, tmp_path / "out")
    file.unlink()
    with pytest.raises(UserError, match="not complete"):
        export_checkpoint(copy, base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"], "nothing was begun"


def test_llama2s_generation_settings_are_exported(trained, tmp_path):
    """Sampling values without do_sample, which transformers refuses to save."""
    base, run = trained
    copy = shutil.copytree(base, tmp_path / "base")
    settings = {"temperature": 0.9, "top_p": 0.6, "do_sample": False, "max_length": 4096, "pad_token_id": 0}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    export_checkpoint(newest_complete(run / "checkpoints"), copy, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.max_length == 4096
    model.save_pretrained(tmp_path / "again")
    AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def test_generate_stops_at_eos(tmp_path, strategy):
    """A tiny model overfit on one answer gives that answer from the exported folder, and ends."""
    from data_prep.build import main as prep

    base = tiny.make_model(tmp_path / "base")
    rows = [{"instruction": "Name a colour.", "input": "", "output": "green"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    prep(
        [
            "--sources",
            str(tmp_path / "rows.json"),
            "--tokenizer",
            str(base),
            "--seq_len",
            "256",
            "--out",
            str(tmp_path / "data"),
        ]
    )
    out = tmp_path / "run"
    train(out, base, tmp_path / "data", strategy, 1, batch__rows_per_step=1, train__max_steps=40)
    tokenizer, model = (kind.from_pretrained(out / "export") for kind in (AutoTokenizer, AutoModelForCausalLM))
    prompt = tokenizer(alpaca_prompt("Name a colour."), return_tensors="pt")
    reply = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(reply) == "green</s>"
    untrained = AutoModelForCausalLM.from_pretrained(base)
    before = untrained.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(before) != "green</s>", "control"
    (out / "export").rename(tmp_path / "first")
    export_main([str(out)])
    assert torch.equal(
        weights(out)["lm_head.weight"], load_file(tmp_path / "first" / "model.safetensors")["lm_head.weight"]
    )


def test_the_moving_average_and_the_mean_of_a_real_run(prepared, base_model, strategy, tmp_path):
    """Two ranks under ZeRO-3; both recomputed from the weights after every step."""
    run, decay, steps = tmp_path / "run", 0.3, 4
    options = {"train__ema_decay": decay, "checkpoint__every": 1, "checkpoint__keep_last": steps}
    train(run, base_model, prepared, strategy, 2, train__max_steps=steps, **options)
    after = []
    for step in range(1, steps + 1):
        export_checkpoint(step_folder(run / "checkpoints", step), base_model, tmp_path / f"{step}")
        after.append(load_file(tmp_path / f"{step}" / "model.safetensors"))
    export_main([str(run), "--ema", "--out", str(tmp_path / "ema")])
    export_main([str(run), "--average", "3"])
    average, mean = (load_file(folder / "model.safetensors") for folder in (tmp_path / "ema", run / "export-average-3"))
    at_the_end = load_file(run / "export-ema" / "model.safetensors")
    assert all(torch.equal(at_the_end[name], average[name]) for name in average), "what the run itself exports"
    expected = {name: tensor.double() for name, tensor in load_file(base_model / "model.safetensors").items()}
    for step, weights_now in enumerate(after, start=1):
        keep = min(decay, (1 + step) / (10 + step))
        expected = {name: keep * expected[name] + (1 - keep) * weights_now[name].double() for name in expected}
    for name in expected:
        torch.testing.assert_close(average[name].double(), expected[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mean[name], sum(one[name] for one in after[1:]) / 3, rtol=1e-6, atol=1e-7)
    for found in (average, mean):
        distance = max(float((found[name] - after[-1][name]).abs().max()) for name in found)
        assert distance > 1e-4, "control: neither is the last checkpoint's weights"
