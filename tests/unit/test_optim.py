"""Which parameters decay. Run: pytest tests/unit/test_optim.py"""

import torch
from torch import nn

from sft.config import OptimSection
from sft.optim import build_optimizer, parameter_groups


def names_by_decay(named, **options):
    groups = parameter_groups(named, OptimSection(weight_decay=0.1, **options))
    names = {id(parameter): name for name, parameter in named}
    return {group["weight_decay"]: sorted(names[id(p)] for p in group["params"]) for group in groups}


NAMED = [
    ("hf.model.embed_tokens.weight", nn.Parameter(torch.zeros(4, 2))),
    ("hf.model.layers.0.self_attn.q_proj.weight", nn.Parameter(torch.zeros(2, 2))),
    ("hf.model.layers.0.self_attn.q_proj.bias", nn.Parameter(torch.zeros(2))),
    ("hf.model.norm.weight", nn.Parameter(torch.zeros(2))),
    ("hf.lm_head.weight", nn.Parameter(torch.zeros(4, 2))),
]


def test_matrices_decay_but_embeddings_norms_and_biases_do_not():
    decayed = names_by_decay(NAMED)
    assert decayed[0.1] == ["hf.lm_head.weight", "hf.model.layers.0.self_attn.q_proj.weight"]
    assert len(decayed[0.0]) == 3


def test_exemptions_are_the_users_but_vectors_never_decay():
    assert "hf.model.embed_tokens.weight" in names_by_decay(NAMED, no_decay=[])[0.1]
    assert names_by_decay(NAMED, no_decay=["weight"])[0.0] == sorted(name for name, _ in NAMED)


def test_partitioned_parameters_count_by_their_true_shape():
    """Under ZeRO-3 a matrix is stored flat and empty: by ndim nothing would decay."""
    flat = nn.Parameter(torch.zeros(0))
    flat.ds_shape = torch.Size([8, 4])
    assert names_by_decay([("w", flat)])[0.1] == ["w"]


def test_frozen_parameters_and_empty_groups_are_left_out():
    frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    assert parameter_groups([("w", frozen)], OptimSection()) == []
    assert len(parameter_groups([("w", nn.Parameter(torch.zeros(2, 2)))], OptimSection())) == 1


def test_the_optimizer_has_the_options():
    optim = OptimSection(lr=0.5, betas=(0.8, 0.9), eps=1e-5)
    built = build_optimizer(nn.Linear(2, 2), optim, on_cpu_beside_gpu=False)
    assert isinstance(built, torch.optim.AdamW)
    assert (built.defaults["lr"], built.defaults["betas"], built.defaults["eps"]) == (0.5, (0.8, 0.9), 1e-5)
