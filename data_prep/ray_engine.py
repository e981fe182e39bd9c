"""Blocks to the CPUs of a Ray cluster, and their results back in order (extra `ray`).

The driver reads the input and writes the output. The nodes need the same software, and the tokenizer folder and the
template, refusal and evaluation files that the options name under the same paths. RAY_ADDRESS names the cluster;
without it Ray starts on this host and ends with the job.
"""

import logging
import os
import signal
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from data_prep.blocks import Block, Encoder, make_encoder
from data_prep.fast import load_fast
from data_prep.identity import CODE_VERSION, PACKAGES, template_text
from data_prep.readers import RawBlock
from data_prep.workers import WorkerLost
from sft.errors import UserError
from sft.prep_options import PrepConfig
from sft.tokenizer import load_tokenizer

BLOCKS_PER_WORKER = 3
"""In flight: one being encoded, one waiting there, one on its way."""
CONNECT_S = 10.0


class _Worker:
    """A process on some node that encodes blocks.

    What the user can mend is returned, not raised: Ray would wrap it in a traceback, and take an error in the
    constructor for a lost worker.
    """

    def __init__(self, config: PrepConfig, expected: dict[str, str], use_fast: bool, folder: str) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one CPU per worker
        with suppress(OSError):  # relative paths mean what they mean to the driver
            os.chdir(folder)
        self._outcome: Encoder | UserError
        try:
            self._outcome = _same_encoder(config, expected, use_fast)
        except UserError as error:
            self._outcome = UserError(f"node {os.uname().nodename}: {error}")

    def encode(self, raw: RawBlock) -> Block | UserError:
        if isinstance(self._outcome, UserError):
            return self._outcome
        try:
            return self._outcome.encode(raw)
        except UserError as error:
            return error


def encode_blocks(raw_blocks: Iterator[RawBlock], encoder: Encoder, workers: int) -> Iterator[Block]:
    """Encode each block on an actor per CPU of the cluster, or on `workers` where the options name a number, and yield
    the results in order. Ray that is started here has `workers` CPUs.

    Raises:
        UserError: Ray is not installed, its cluster cannot be reached or has too few CPUs, or a node has other files
            or software; from `Encoder.encode`.
        WorkerLost: a worker, its node or the cluster was lost.
    """
    try:
        import ray
    except ImportError:
        raise UserError("engine ray: the package is not installed; pip install 'sft-pipeline[ray]'") from None
    with _connected(ray, workers):
        asked = None if encoder.config.workers == "auto" else workers
        yield from _in_turn(ray, raw_blocks, encoder, _num_actors(ray, asked))


@contextmanager
def _connected(ray: Any, cpus: int) -> Iterator[None]:
    is_own = "RAY_ADDRESS" not in os.environ
    if not is_own:
        _check_answers(os.environ["RAY_ADDRESS"])
    logging.getLogger("ray").setLevel(logging.ERROR)  # it announces that its processes use an authentication token
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address="local" if is_own else None,
            num_cpus=cpus if is_own else None,
            include_dashboard=False if is_own else None,
            log_to_driver=False,
            configure_logging=False,
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"engine ray: no cluster: {reason}; check RAY_ADDRESS and that its nodes run") from None
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own would end the process at once, with its work half-done
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Refuse an address that nothing answers at, for which Ray itself would try for a quarter of an hour."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return  # auto
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"engine ray: RAY_ADDRESS {address}: no answer: {error}; start Ray there, or correct it"
        ) from None


def _num_actors(ray: Any, asked: int | None) -> int:
    """One per CPU of the cluster, or as many as were asked for: more would wait for a CPU for ever."""
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if not 0 < (asked or cpus) <= cpus:
        raise UserError(f"workers {asked or 'auto'}: the Ray cluster has {cpus} CPUs; lower it, or set it to auto")
    return asked or cpus


def _in_turn(ray: Any, raw_blocks: Iterator[RawBlock], encoder: Encoder, workers: int) -> Iterator[Block]:
    remote = ray.remote(num_cpus=1)(_Worker)
    made_with = (encoder.config, _identity(encoder), encoder.fast is not None, os.getcwd())
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
    except ray.exceptions.RayTaskError:
        raise  # a defect of this program
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[:200]
        raise WorkerLost(f"engine ray: a worker was lost: {reason}; run again: finished blocks are kept") from None
    if isinstance(outcome, UserError):
        raise outcome
    assert isinstance(outcome, Block)
    return outcome


def _same_encoder(config: PrepConfig, expected: dict[str, str], use_fast: bool) -> Encoder:
    """The encoder, made of this node's files.

    Raises:
        UserError: a file is missing here, or gives another encoder than the driver's.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    encoder = make_encoder(config, tokenizer)
    found = _identity(encoder)
    for what, value in expected.items():
        if found[what] != value:
            raise UserError(
                f"{what} is not what it is where sft prep was started ({found[what][:40]!r}, there {value[:40]!r}); "
                "all nodes need the same files and packages"
            )
    return replace(encoder, fast=load_fast(tokenizer) if use_fast else None)


def _identity(encoder: Encoder) -> dict[str, str]:
    """What must be equal on every node so that it does not matter where a block is encoded."""
    return {
        "code version": str(CODE_VERSION),
        **{f"version of {name}": version(name) for name in PACKAGES},
        "tokenizer": encoder.tokenizer.digest,
        "template": str(template_text(encoder)),
        "filters.refusals": str([pattern.pattern for pattern in encoder.text_reason.refusals]),
        "decontaminate": encoder.items_digest,
    }
