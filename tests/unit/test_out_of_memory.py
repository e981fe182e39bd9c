"""What a rank says that ran out of memory. Run: pytest tests/unit/test_out_of_memory.py"""

import json
from types import SimpleNamespace

import pytest
import torch

from sft.config import RunConfig
from sft.errors import UserError
from sft.out_of_memory import explained, figures, has_gaps, is_out_of_memory, remedies
from tests.dist.invented_memory import GPU_MESSAGE

WITHOUT_GAPS = GPU_MESSAGE.replace("16.50 GiB is reserved", "120.50 MiB is reserved")
CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "400000000000 bytes. Error code 12 (Cannot allocate memory)\nmore"
)


def asked(zero=None, world_size=8, heads=(32, 8), **options):
    """(config, inputs) of a run."""
    model = {"path": "m", "activation_checkpointing": "none"} | options.pop("model", {})
    batch = {"micro_batch": 8, "rows_per_step": 128} | options.pop("batch", {})
    config = RunConfig(model=model, data={"train": "d"}, batch=batch, out="o", **options)
    strategy = {"zero_optimization": zero or {"stage": 3}}
    data_ranks = world_size // config.batch.sequence_parallel
    model_config = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    facts = {"world_size": world_size, "data_ranks": data_ranks, "model_config": model_config}
    return config, SimpleNamespace(strategy=strategy, **facts)


def test_the_cheapest_change_comes_first():
    assert remedies(*asked(), 8, WITHOUT_GAPS) == [
        "batch.micro_batch 4 instead of 8 (the same update)",
        "model.activation_checkpointing full instead of none (a third more compute)",
        "deepspeed zero3_offload_optimizer instead of zero3 (slower updates)",
        "more GPUs (now 8)",
    ]


def test_what_is_in_force_is_left_out():
    offload = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    full = {"activation_checkpointing": "full"}
    assert remedies(*asked(offload, model=full, batch={"micro_batch": 1}), 1) == [
        "model.mlp_tiles 4 instead of 1 or batch.sequence_parallel 2 instead of 1 (for long documents)",
        "more GPUs (now 8)",
    ]
    all_taken = asked(offload, model={**full, "mlp_tiles": 4}, batch={"micro_batch": 1, "sequence_parallel": 2})
    assert remedies(*all_taken, 1) == ["more GPUs (now 8)"]
    assert remedies(*asked({"stage": 2}, deepspeed="zero2"), None)[-2].startswith("deepspeed zero3 instead of zero2")


@pytest.mark.parametrize(("world_size", "heads"), [(8, (9, 3)), (3, (32, 8)), (8, (6, 3))])
def test_packs_are_not_to_be_shared_where_that_would_be_refused(world_size, heads):
    full = {"activation_checkpointing": "full"}
    told = remedies(*asked(world_size=world_size, heads=heads, model=full, batch={"micro_batch": 1}), 1)
    assert told[0] == "model.mlp_tiles 4 instead of 1 (for long documents)"


def test_micro_batch_goes_to_a_divisor_of_what_a_rank_has():
    config, inputs = asked(batch={"rows_per_step": 72, "micro_batch": 9})
    assert remedies(config, inputs, 9)[0] == "batch.micro_batch 3 instead of 9 (the same update)"
    config, inputs = asked(batch={"micro_batch": "auto"})
    assert remedies(config, inputs, 16)[0] == "batch.micro_batch 8 instead of auto, which found 16 (the same update)"
    assert "micro_batch" not in remedies(config, inputs, None)[0], "auto has found none"


def test_a_model_that_does_not_load_needs_no_smaller_forwards():
    assert remedies(*asked(), 8, loading=True)[0].startswith("deepspeed zero3_offload_optimizer")


def test_gaps_come_first_where_they_are_large():
    assert has_gaps(GPU_MESSAGE)
    assert not has_gaps(WITHOUT_GAPS)
    assert remedies(*asked(), 8, GPU_MESSAGE)[0].startswith("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True")


def test_memory_of_the_host_is_not_won_by_moving_states_there():
    assert not any("offload" in change for change in remedies(*asked(), 8, CPU_MESSAGE))


def test_figures():
    assert figures(GPU_MESSAGE) == " (asked for 2.00 GiB more of 79.11 GiB)"
    assert figures(CPU_MESSAGE) == " (asked for 400000000000 bytes more)"
    assert figures("one pack takes 90 GiB\nand more") == " (one pack takes 90 GiB)"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(GPU_MESSAGE),
        RuntimeError(CPU_MESSAGE),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("NCCL error: ncclUnhandledCudaError\nLast error:\nCuda failure 2 'out of memory'"),
    ],
)
def test_one_line_with_rank_and_place(error, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    config, inputs = asked(batch={"micro_batch": "auto"})
    (tmp_path / "micro_batch.json").write_text(json.dumps({"micro_batch": 16}))
    watch = SimpleNamespace(progress=SimpleNamespace(phase="update", place="step 7, update"))
    assert is_out_of_memory(error)
    with pytest.raises(UserError) as told, explained(config, inputs, tmp_path, watch):
        raise error
    line = str(told.value)
    assert "\n" not in line
    assert line.startswith("rank 3 on ")
    assert ": out of memory at step 7, update (" in line
    assert "instead of auto, which found 16" in line


def test_other_errors_are_left_alone(tmp_path):
    for error in (RuntimeError("CUDA error: an illegal memory access was encountered"), ValueError("out of memory")):
        with pytest.raises(type(error)) as kept, explained(*asked(), tmp_path, None):
            raise error
        assert kept.value is error


def test_the_host_s_allocator_words_it_so():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
