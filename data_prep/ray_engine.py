"""Blocks to the CPUs of a Ray cluster, and their results back in order (extra `ray`).

The driver reads the input and writes the output; the nodes need the tokenizer folder, and the template, refusal and
evaluation files where the options name some, under the same paths. RAY_ADDRESS names the cluster; without it Ray
starts on this host.
"""

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from data_prep.blocks import Block, Encoder, make_encoder
from data_prep.fast import load_fast
from data_prep.readers import RawBlock
from sft.config import PrepConfig
from sft.errors import UserError
from sft.tokenizer import load_tokenizer

BLOCKS_PER_WORKER = 3
"""In flight: one being encoded, one waiting there, one on its way."""


class _Worker:
    """A process on some node that encodes blocks."""

    def __init__(self, config: PrepConfig, digest: str, use_fast: bool) -> None:
        tokenizer = load_tokenizer(config.tokenizer)
        if tokenizer.digest != digest:
            raise UserError(
                f"tokenizer {config.tokenizer}: other files on node {os.uname().nodename} than where sft prep was "
                "started; give a folder that all nodes share"
            )
        self._encoder = replace(make_encoder(config, tokenizer), fast=load_fast(tokenizer) if use_fast else None)

    def encode(self, raw: RawBlock) -> Block | UserError:
        try:
            return self._encoder.encode(raw)
        except UserError as error:
            return error


def encode_blocks(raw_blocks: Iterator[RawBlock], encoder: Encoder, workers: int) -> Iterator[Block]:
    """Encode each block on `workers` actors and yield the results in order.

    Raises:
        UserError: Ray is not installed or its cluster cannot be reached; from `Encoder.encode`.
    """
    try:
        import ray
    except ImportError:
        raise UserError("engine ray: the package is not installed; pip install 'sft-pipeline[ray]'") from None
    try:
        ray.init(log_to_driver=False, ignore_reinit_error=True, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"engine ray: no cluster: {' '.join(str(error).split())[:200]}; check RAY_ADDRESS") from None
    try:
        yield from _in_turn(ray, raw_blocks, encoder, workers)
    finally:
        ray.shutdown()


def _in_turn(ray: Any, raw_blocks: Iterator[RawBlock], encoder: Encoder, workers: int) -> Iterator[Block]:
    remote = ray.remote(num_cpus=1)(_Worker)
    made_with = (encoder.config, encoder.tokenizer.digest, encoder.fast is not None)
    actors = [remote.remote(*made_with) for _ in range(workers)]
    waiting: deque[Any] = deque()
    for number, raw in enumerate(raw_blocks):
        waiting.append(actors[number % workers].encode.remote(raw))
        if len(waiting) >= BLOCKS_PER_WORKER * workers:
            yield _result(ray, waiting.popleft())
    while waiting:
        yield _result(ray, waiting.popleft())


def _result(ray: Any, reference: Any) -> Block:
    try:
        outcome = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
    except ray.exceptions.RayActorError as error:
        raise UserError(f"engine ray: a worker was lost: {' '.join(str(error).split())[:300]}; run again") from None
    if isinstance(outcome, UserError):
        raise outcome
    assert isinstance(outcome, Block)
    return outcome
