"""Exact and near duplicates: which rows are found alike, against exact similarities and planted copies."""

import os
import pickle

import numpy as np
import pytest

from data_prep import near
from data_prep.dedup import first_occurrences
from data_prep.near import Signer, algorithm, bands_for, near_duplicates, shingles
from sft.prep_options import NearSection

RECORDED = [[3227799074, 3414526352, 3528032977], [3316394919, 4113287838, 3970622743]]


def texts(count: int, words: int, seed: int = 0) -> list[list[str]]:
    random = np.random.default_rng(seed)
    return [[f"w{word}" for word in random.integers(0, 3000, size=words)] for _ in range(count)]


def edited(words: list[str], edits: int, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    changed = [*words]
    for at in random.choice(len(words), size=edits, replace=False):
        changed[at] = f"edit{random.integers(10**9)}"
    return changed


def jaccard(one: str, other: str, ngram: int) -> float:
    a, b = set(shingles(one, ngram)), set(shingles(other, ngram))
    return len(a & b) / len(a | b)


def clusters(rows: list[str], **options: object) -> list[int]:
    section = NearSection(**options)
    return near_duplicates(Signer(section).signatures(rows), section).tolist()


def with_similarity(equal: list[int]) -> np.ndarray:
    """Signatures that agree with the first one, which is all zeros, in so many values; no two others agree there."""
    made = 1 + np.arange(len(equal) * 128, dtype=np.uint32).reshape(len(equal), 128)
    for row, count in zip(made, equal, strict=True):
        row[:count] = 0
    return made


def test_exact_keeps_the_first_of_equal_keys():
    keys = np.array([[1, 2], [1, 3], [1, 2], [4, 2], [1, 3], [1, 2]], dtype=np.uint64)
    assert first_occurrences(keys).tolist() == [True, True, False, True, False, False]
    assert first_occurrences(keys[:0]).tolist() == []


def test_planted_copies_with_few_edits_are_found_and_nothing_else():
    """1 edit per 100 words leaves (100 - 5) / (100 + 5 - 4) = 0.9 of the 5-word shingles; 3 leave about 0.73."""
    originals = texts(300, words=200)
    copies = [edited(words, edits=2, seed=number) for number, words in enumerate(originals[:100])]
    far = [edited(words, edits=40, seed=number) for number, words in enumerate(originals[100:200])]
    rows = [" ".join(words) for words in (*originals, *copies, *far)]
    found = clusters(rows)
    assert found[:300] == list(range(300))
    assert sum(cluster == number for number, cluster in enumerate(found[300:400])) >= 99
    assert found[400:] == list(range(400, 500))


def test_three_percent_of_edits_need_a_lower_threshold():
    originals = texts(100, words=200)
    copies = [edited(words, edits=6, seed=number) for number, words in enumerate(originals)]
    rows = [" ".join(words) for words in (*originals, *copies)]
    similar = [jaccard(rows[number], rows[number + 100], 5) for number in range(100)]
    assert 0.70 < min(similar) <= max(similar) < 0.80
    assert sum(cluster == number for number, cluster in enumerate(clusters(rows, threshold=0.6)[100:])) >= 98
    assert sum(cluster == number for number, cluster in enumerate(clusters(rows, threshold=0.9)[100:])) == 0


def test_a_shared_template_does_not_make_rows_alike():
    head = "Write a short story for children about the following topic and explain its moral at the end:"
    rows = [f"{head} {' '.join(words)}" for words in texts(200, words=30)]
    assert clusters(rows) == list(range(200))


def test_the_estimate_is_the_jaccard_similarity():
    """Mean error 0, and no more spread than 128 independent draws have, sqrt(s (1 - s) / 128), over 400 pairs."""
    originals = texts(400, words=120)
    signer = Signer(NearSection())
    rows = [" ".join(words) for words in originals]
    changed = [" ".join(edited(words, edits=1 + number % 12, seed=number)) for number, words in enumerate(originals)]
    estimate = (signer.signatures(rows) == signer.signatures(changed)).mean(axis=1)
    exact = np.array([jaccard(row, other, 5) for row, other in zip(rows, changed, strict=True)])
    errors = (estimate - exact) / np.sqrt(exact * (1 - exact) / 128)
    assert abs(errors.mean()) < 4 / np.sqrt(400)
    assert 0.5 < errors.std() < 1.1


def test_equal_up_to_case_width_and_white_space_is_alike():
    text = "The Quick  brown fox jumps over the ﬁne dog, twice."
    rows = [text, "the quick brown\nfox JUMPS over the fine dog, twice.", "something else entirely, and of some length"]
    assert clusters(rows) == [0, 0, 2]


def test_short_texts_are_compared_whole():
    assert clusters(["1+1", "1-1", "1 + 1", "1+1", "", " ", "Yes.", "yes.", "yes"]) == [0, 1, 2, 0, 4, 4, 6, 6, 8]


def test_scripts_without_spaces_are_cut_into_characters():
    text = "中华人民共和国的首都是北京，而最大的城市是上海，它们都是直辖市，各有两千多万的常住人口和悠久的历史。"
    other = "二十世纪的物理学有两大支柱：相对论讨论时间与空间，量子力学讨论原子和光，二者至今仍未统一成一个理论。"
    assert len(shingles(text, 5)) == len(text) - 4
    assert clusters([text, text.replace("两千", "三千"), other], threshold=0.7) == [0, 0, 2]
    thai = "ประเทศไทยมีเมืองหลวงคือกรุงเทพมหานครซึ่งเป็นเมืองที่ใหญ่ที่สุด"
    assert len(shingles(thai, 5)) > 30


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.99])
def test_bands_find_pairs_at_the_threshold(threshold):
    bands, rows = bands_for(threshold)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= 0.99
    more = rows + 1
    assert 1 - (1 - threshold**more) ** (128 // more) < 0.99


def test_a_pair_needs_as_many_equal_values_as_the_threshold_says():
    section = NearSection(threshold=0.8)
    for count, expected in ((103, [0, 0]), (102, [0, 1])):
        assert near_duplicates(with_similarity([128, count]), section).tolist() == expected
    assert near_duplicates(with_similarity([128, 64]), NearSection(threshold=0.5)).tolist() == [0, 0]
    assert near_duplicates(with_similarity([128, 63]), NearSection(threshold=0.5)).tolist() == [0, 1]


def test_clusters_are_transitive_and_named_after_their_first_row():
    """c is like b and b like a, but c is not like a; d is like nothing."""
    random = np.random.default_rng(1)
    a = random.integers(0, 2**32, 128, dtype=np.uint32)
    b, c, d = a.copy(), a.copy(), random.integers(0, 2**32, 128, dtype=np.uint32)
    b[:20] += 1
    c[:40] += 1
    c[20:40] += 1
    c[:20] = b[:20]
    assert [(a == b).mean() > 0.8, (b == c).mean() > 0.8, (a == c).mean() > 0.8] == [True, True, False]
    rows = np.stack([d, c, a, b, a])
    assert near_duplicates(rows, NearSection()).tolist() == [0, 1, 1, 1, 1]
    assert near_duplicates(rows[[0, 1, 2]], NearSection()).tolist() == [0, 1, 2]


def test_clusters_do_not_depend_on_the_order_of_rows():
    base = texts(40, words=100)
    words = [edited(base[number % 40], edits=number // 40 * 2, seed=number) for number in range(160)]
    rows = [" ".join(row) for row in words]
    order = np.random.default_rng(2).permutation(len(rows))
    found, shuffled = np.array(clusters(rows)), np.array(clusters([rows[index] for index in order]))
    assert 40 < len(set(found.tolist())) < 160
    alike = found[order][:, None] == found[order][None]
    assert (alike == (shuffled[:, None] == shuffled[None])).all()


def test_no_rows_and_one_row():
    assert clusters([]) == []
    assert clusters(["a"]) == [0]


def test_many_equal_rows_are_cheap():
    signatures = np.repeat(with_similarity([128, 0]), 20000, axis=0)
    assert near_duplicates(signatures, NearSection()).tolist() == [0] * 20000 + [20000] * 20000


def test_one_long_instruction_in_all_rows_costs_no_square(monkeypatch):
    """Similarity 0.6 of all pairs: most rows share most bands, and only the planted copies are alike."""
    compared = []
    similar = near._similar
    monkeypatch.setattr(near, "PATIENCE", 8)
    monkeypatch.setattr(near, "LARGE_BUCKET", 32)
    monkeypatch.setattr(near, "_similar", lambda *args: compared.append(len(args[2])) or similar(*args))
    head = " ".join(texts(1, words=120, seed=9)[0])
    bodies = texts(1500, words=30)
    bodies += [edited(words, edits=1, seed=number) for number, words in enumerate(bodies[:50])]
    found = clusters([f"{head} {' '.join(words)}" for words in bodies])
    assert found == [*range(1500), *range(50)]
    cheap, compared[:] = sum(compared), []
    monkeypatch.setattr(near, "PATIENCE", -1)
    assert clusters([f"{head} {' '.join(words)}" for words in bodies]) == found
    assert sum(compared) > 3 * cheap


def test_signatures_depend_on_seed_and_ngram_and_on_nothing_else():
    rows = [" ".join(words) for words in texts(300, words=60)]
    section = NearSection()
    signed = Signer(section).signatures(rows)
    assert signed.dtype == np.uint32
    assert signed.shape == (300, 128)
    again = pickle.loads(pickle.dumps(Signer(section)))
    assert (np.concatenate([again.signatures(rows[:1]), again.signatures(rows[1:])]) == signed).all()
    assert (Signer(NearSection(seed=1)).signatures(rows) != signed).mean() > 0.99
    assert (Signer(NearSection(ngram=4)).signatures(rows) != signed).mean() > 0.99
    assert (Signer(NearSection(seed=-1)).signatures(rows) != signed).mean() > 0.99


def test_signatures_are_those_of_the_recorded_algorithm():
    """Stored signatures of another version must not be compared with these: a change has to show in `algorithm`."""
    assert algorithm() == "rensa R-MinHash 2, 128 permutations"
    signed = Signer(NearSection()).signatures(["the quick brown fox jumps over the lazy dog", "短い"])
    assert signed[:, :3].tolist() == RECORDED


def test_signing_starts_no_threads():
    """A worker is forked, often from a process that has signed before: threads would be lost and waited for."""
    rows = [" ".join(words) for words in texts(1000, words=10)]
    before = len(os.listdir("/proc/self/task"))
    Signer(NearSection()).signatures(rows)
    assert len(os.listdir("/proc/self/task")) == before
