"""What requests share is computed once: rows of ids become token trees, trees become bins.

Two rows `a b c d e f` and `a b c d g h` are one tree, laid out depth first:

    ids     a b c d e f g h
    depth   0 1 2 3 4 5 4 5      position of the token in its own row
    end     8 8 8 8 6 6 8 8      where its descendants end

A token sees itself and its ancestors: i sees j where j <= i < end[j]. Sharing goes by ids, never by text: tokenizers
merge across the seams of strings. All of it is a function of the requests and the budget: not of the number of ranks,
nor of the order in which the requests came.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sft.eval.requests import Request

TREE_TOKENS = 256
"""Trees grow up to this, behind what all their rows begin with: larger ones share more, but attention inside a tree is
dense."""
MIN_PREFIX = 48
"""A shorter common beginning is computed again in every tree rather than by a forward of its own."""
KV_PER_TOKEN = 8
"""Keys and values of a shared prefix are copied beside each tree of a batch: at most this many per token of the
budget (2 GB in a layer of a 7B model)."""
SCORED_PER_BATCH = 4096
"""Positions whose logits one forward gives: 2 GB in fp32 at a vocabulary of 128k."""
WORTH_A_FORWARD = 16
"""A batch that holds this part of the budget ends where the next tree is a quarter shorter: padding it would cost more
than one forward more."""
PREFIX_SHARE = 16
"""A bin holds at least this many times its prefix, so that computing the prefix in every bin costs 6 % at most."""


@dataclass(frozen=True)
class Scored:
    """A request in a tree: after the token at positions[i], targets[i] is scored."""

    request: int
    positions: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Tree:
    """Rows with a common beginning, depth first; int32 arrays of equal length T."""

    ids: np.ndarray
    depth: np.ndarray
    """Positions, counted from the end of the bin's prefix."""
    end: np.ndarray
    scored: tuple[Scored, ...]

    @property
    def num_scored(self) -> int:
        """Positions with logits, a shared one counted for every request."""
        return sum(len(scored.positions) for scored in self.scored)


@dataclass(frozen=True)
class Bin:
    """The unit of work: a prefix (perhaps empty) that is computed once, and batches of trees that continue it."""

    prefix: np.ndarray
    batches: tuple[tuple[Tree, ...], ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed, without padding."""
        return len(self.prefix) + sum(len(tree.ids) for batch in self.batches for tree in batch)

    @property
    def num_forwards(self) -> int:
        """Calls of the model."""
        return len(self.batches) + (len(self.prefix) > 0)

    @property
    def requests(self) -> list[int]:
        """Numbers of the requests that are scored here."""
        return [scored.request for batch in self.batches for tree in batch for scored in tree.scored]


@dataclass(frozen=True)
class Row:
    """One distinct input, and the requests whose scored tokens are predicted at its end."""

    ids: np.ndarray
    scored: tuple[tuple[int, np.ndarray], ...]
    """(request number, its scored ids): they end one position after the last input id."""

    @property
    def num_scored(self) -> int:
        """Positions at the end that predict scored tokens."""
        return max(len(targets) for _, targets in self.scored)


def distinct_rows(requests: Sequence[Request], max_length: int) -> list[Row]:
    """One row per distinct input (MMLU's four letters share one), in the order of their ids.

    Args:
        requests: what to score.
        max_length: input tokens at most; longer inputs lose their beginning.
    """
    groups: dict[bytes, list[tuple[int, np.ndarray]]] = defaultdict(list)
    for number, request in enumerate(requests):
        ids, targets = request.clip(max_length)
        groups[ids.astype(">i4").tobytes()].append((number, targets))
    return [Row(np.frombuffer(key, dtype=">i4").astype(np.int32), tuple(groups[key])) for key in sorted(groups)]


def plan_plain(rows: Sequence[Row], tokens_per_batch: int, batch_size: int | None) -> list[Bin]:
    """Every row by itself, in lm_eval's order: longest first, then by ids; one batch per bin.

    `batch_size` rows to a batch, or without it as many as have `tokens_per_batch` padded tokens.
    """
    ordered = sorted(rows, key=lambda row: (-len(row.ids), row.ids.astype(">i4").tobytes()))
    trees = [grow([row], 0) for row in ordered]
    if batch_size is None:
        return [Bin(NO_IDS, (batch,)) for batch in _batches(trees, tokens_per_batch, 0)]
    return [Bin(NO_IDS, (tuple(trees[i : i + batch_size]),)) for i in range(0, len(trees), batch_size)]


def plan_packed(rows: Sequence[Row], tokens_per_batch: int) -> list[Bin]:
    """Rows, in the order of their ids, as trees; of a long common beginning the keys and values are kept.

    The largest bins come first: dealt out in this order, each to the rank with the least work, ranks end together.
    """
    shared = np.array([0, *(_common(a.ids, b.ids) for a, b in zip(rows, rows[1:], strict=False))], dtype=np.int64)
    family = _Family([row.ids for row in rows], [len(row.ids) - row.num_scored for row in rows], shared)
    alone: list[Tree] = []
    bins: list[Bin] = []
    for prefix, pieces in _families(family, 0, len(rows)):
        trees = [grow(rows[low:high], prefix) for low, high in pieces]
        if prefix:
            bins += _prefix_bins(rows[pieces[0][0]].ids[:prefix], trees, tokens_per_batch)
        else:
            alone += trees
    bins += [Bin(NO_IDS, (batch,)) for batch in _batches(_longest_first(alone), tokens_per_batch, 0)]
    return sorted(bins, key=lambda bin: (-bin.num_tokens, bin.prefix.tobytes(), bin.batches[0][0].ids.tobytes()))


def grow(rows: Sequence[Row], prefix: int) -> Tree:
    """The tree of rows that are sorted by their ids and agree in the first `prefix` of them, which it leaves out."""
    ids, depth, starts, branches = [], [], [], []
    path = np.zeros(0, dtype=np.int32)  # of the current row: the place in the tree of its token at each depth
    scored: list[Scored] = []
    size = 0
    previous: np.ndarray | None = None
    for row in rows:
        own = row.ids[prefix:]
        branch = 0 if previous is None else _common(previous, own)
        starts.append(size)
        branches.append((branch, len(own)))
        ids.append(own[branch:])
        depth.append(np.arange(branch, len(own), dtype=np.int32))
        path = np.concatenate([path[:branch], np.arange(size, size + len(own) - branch, dtype=np.int32)])
        size += len(own) - branch
        scored += [Scored(number, path[len(own) - len(targets) :], targets) for number, targets in row.scored]
        previous = own
    end = np.full(size, size, dtype=np.int32)
    for index, (branch, length) in enumerate(branches):
        open_to = length  # this row's own tokens from here on have ended
        for later in range(index + 1, len(rows)):
            cut = branches[later][0]
            if cut < open_to:
                end[starts[index] + max(cut - branch, 0) : starts[index] + open_to - branch] = starts[later]
                open_to = cut
            if open_to <= branch:
                break
    return Tree(np.concatenate(ids), np.concatenate(depth), end, tuple(scored))


def deal(bins: Sequence[Bin], world: int) -> list[list[int]]:
    """Indices of each rank's bins: in order, each goes to the rank with the fewest tokens so far."""
    load, dealt = [0] * world, [[] for _ in range(world)]  # type: tuple[list[int], list[list[int]]]
    for index, bin in enumerate(bins):
        rank = load.index(min(load))
        load[rank] += bin.num_tokens
        dealt[rank].append(index)
    return dealt


NO_IDS = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True)
class _Family:
    """Sorted rows as the planner needs them."""

    ids: list[np.ndarray]
    sharable: list[int]
    """Ids of each row before the first scored position: a prefix may hold these only."""
    shared: np.ndarray
    """Of each row: ids in common with the row before it."""

    def size(self, low: int, high: int, prefix: int) -> int:
        """Tokens of the tree of rows low to high, behind a prefix."""
        tokens = sum(len(self.ids[row]) for row in range(low, high)) - int(self.shared[low + 1 : high].sum())
        return tokens - prefix

    def common(self, low: int, high: int) -> int:
        """Ids that all these rows begin with, as far as a prefix may go."""
        between = int(self.shared[low + 1 : high].min()) if high - low > 1 else len(self.ids[low])
        return min(between, *self.sharable[low:high])

    def is_tree(self, low: int, high: int, prefix: int) -> bool:
        """Whether these rows are one tree behind a prefix. What all of them begin with does not count: it would be
        computed again in each part of a tree that is cut."""
        return high - low == 1 or self.size(low, high, max(prefix, self.common(low, high))) <= TREE_TOKENS

    def branches(self, low: int, high: int, depth: int) -> list[tuple[int, int]]:
        """Runs of rows that stay together beyond `depth`."""
        cuts = [low, *(low + 1 + np.flatnonzero(self.shared[low + 1 : high] <= depth)).tolist(), high]
        return list(zip(cuts, cuts[1:], strict=False))


def _families(family: _Family, low: int, high: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """(length of the prefix whose keys are kept, rows of each tree behind it), covering rows low to high."""
    found: list[tuple[int, list[tuple[int, int]]]] = []
    waiting = [(low, high)]
    while waiting:
        low, high = waiting.pop()
        if low == high:
            continue
        prefix = family.common(low, high)
        if family.is_tree(low, high, 0):
            found.append((0, [(low, high)]))
        elif prefix >= MIN_PREFIX:
            found.append((prefix, _pieces(family, low, high, prefix)))
        else:
            depth = int(family.shared[low + 1 : high].min())
            waiting += family.branches(low, high, depth)
    return found


def _pieces(family: _Family, low: int, high: int, prefix: int) -> list[tuple[int, int]]:
    """Cut rows behind a prefix into trees of at most TREE_TOKENS, at the places where they have least in common."""
    depth = int(family.shared[low + 1 : high].min()) if high - low > 1 else 0
    pieces: list[tuple[int, int]] = []
    for start, stop in family.branches(low, high, depth):
        if not family.is_tree(start, stop, prefix):
            pieces += _pieces(family, start, stop, prefix)
        elif pieces and pieces[-1][1] == start and family.size(pieces[-1][0], stop, prefix) <= TREE_TOKENS:
            pieces[-1] = (pieces[-1][0], stop)
        else:
            pieces.append((start, stop))
    return pieces


def _prefix_bins(prefix: np.ndarray, trees: Sequence[Tree], tokens_per_batch: int) -> list[Bin]:
    limit = max(tokens_per_batch, PREFIX_SHARE * len(prefix))
    bins: list[list[tuple[Tree, ...]]] = [[]]
    size = 0
    for batch in _batches(_longest_first(trees), tokens_per_batch, len(prefix)):
        tokens = sum(len(tree.ids) for tree in batch)
        if bins[-1] and size + tokens > limit:
            bins.append([])
            size = 0
        bins[-1].append(batch)
        size += tokens
    return [Bin(prefix, tuple(batches)) for batches in bins]


def _longest_first(trees: Sequence[Tree]) -> list[Tree]:
    return sorted(trees, key=lambda tree: (-len(tree.ids), tree.ids.tobytes()))


def _batches(trees: Sequence[Tree], tokens_per_batch: int, prefix: int) -> list[tuple[Tree, ...]]:
    """Cut trees, longest first, so that a batch keeps the limits on padded tokens, keys and logits."""
    batches: list[list[Tree]] = []
    scored = 0
    for tree in trees:
        if batches:
            count, width = len(batches[-1]) + 1, len(batches[-1][0].ids)
            fits = count * width <= tokens_per_batch and count * (prefix + width) <= KV_PER_TOKEN * tokens_per_batch
            is_full = (count - 1) * width >= tokens_per_batch // WORTH_A_FORWARD and 4 * len(tree.ids) < 3 * width
            if fits and not is_full and scored + tree.num_scored <= SCORED_PER_BATCH:
                batches[-1].append(tree)
                scored += tree.num_scored
                continue
        batches.append([tree])
        scored = tree.num_scored
    return [tuple(batch) for batch in batches]


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the common beginning."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length
