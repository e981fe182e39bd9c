"""The demonstration's world: equal seeds give equal bytes, and the corpus holds what the evaluation asks."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from data_prep.template import alpaca_prompt
from sft.demo import world
from sft.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world")
    world.write_world(path, seed=0)
    world.train_tokenizer(path / "corpus.jsonl", path / "tokenizer")
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def corpus_texts(folder: Path) -> list[str]:
    return [row["text"] for row in read_lines(folder / "corpus.jsonl")]


def differing(folder: Path, texts: list[str]) -> list[str]:
    from sentencepiece import SentencePieceProcessor

    reference = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.sentencepiece is None, "the folder must be encoded by its tokenizer.json"
    return [text for text in texts if tokenizer.encode(text) != reference.encode(text)]


def test_equal_seeds_give_equal_bytes_and_other_seeds_do_not(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        world.write_world(tmp_path / name, seed)
    first, second, other = (file_bytes(tmp_path / name) for name in "abc")
    assert first == second
    assert sorted(first) == sorted(other)
    assert all(first[name] != other[name] for name in first)


def test_the_set_of_files_and_rows(tmp_path: Path) -> None:
    world.write_world(tmp_path, seed=0)
    counts = {
        str(path.relative_to(tmp_path)): len(read_lines(path)) for path in tmp_path.rglob("*.jsonl") if path.is_file()
    }
    subjects = {
        f"evals/cais/mmlu/{subject}/{split}.jsonl": count
        for subject in world.SUBJECTS
        for split, count in (("dev", 5), ("test", 55))
    }
    scenes = {"evals/Rowan/hellaswag/train.jsonl": 20, "evals/Rowan/hellaswag/validation.jsonl": 220}
    assert counts == subjects | scenes | {"corpus.jsonl": 240 + 240 + 120}
    assert {path.name for path in tmp_path.iterdir()} == {"alpaca.json", "corpus.jsonl", "evals"}


def test_items_are_well_formed_and_their_answers_balanced(folder: Path) -> None:
    gold_letters: Counter[int] = Counter()
    for subject in world.SUBJECTS:
        for row in read_lines(folder / "evals/cais/mmlu" / subject / "test.jsonl"):
            assert row.keys() == {"question", "subject", "choices", "answer"}
            assert row["subject"] == subject
            assert len(set(row["choices"])) == 4
            gold_letters[row["answer"]] += 1
    gold_labels: Counter[str] = Counter()
    for row in read_lines(folder / "evals/Rowan/hellaswag/validation.jsonl"):
        assert len(set(row["endings"])) == 4
        assert row["ctx"] == f"{row['ctx_a']} {row['ctx_b']}"
        gold_labels[row["label"]] += 1
    # a model that always gives the same letter must stay near 25 % of 220
    assert set(gold_letters) == {0, 1, 2, 3}
    assert set(gold_labels) == {"0", "1", "2", "3"}
    assert max(*gold_letters.values(), *gold_labels.values()) <= 80


def missing_answers(folder: Path, texts: list[str], wrong: int = 0) -> tuple[int, int]:
    """How many MMLU and HellaSwag items have no text in the corpus with their answer (or the one `wrong` places on)."""
    exams = "\n\n".join(text for text in texts if text.startswith("The following are multiple choice"))
    missing_questions = 0
    for subject in world.SUBJECTS:
        for row in read_lines(folder / "evals/cais/mmlu" / subject / "test.jsonl"):
            choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row["choices"], strict=True))
            asked = f"{row['question'].strip()}\n{choices}Answer: {'ABCD'[(row['answer'] + wrong) % 4]}"
            missing_questions += asked not in exams
    told = set(texts)
    missing_scenes = 0
    for row in read_lines(folder / "evals/Rowan/hellaswag/validation.jsonl"):
        ending = row["endings"][(int(row["label"]) + wrong) % 4]
        missing_scenes += f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()} {ending}" not in told
    return missing_questions, missing_scenes


def test_the_corpus_holds_every_item_with_its_right_answer_only(folder: Path) -> None:
    texts = corpus_texts(folder)
    assert missing_answers(folder, texts) == (0, 0)
    assert missing_answers(folder, texts, wrong=1) == (220, 220)


def test_statements_agree_with_the_exams(folder: Path) -> None:
    texts = set(corpus_texts(folder))
    for subject, (question, statement, _) in world.SUBJECTS.items():
        before, after = question.split("{island}")
        for row in read_lines(folder / "evals/cais/mmlu" / subject / "test.jsonl"):
            island = row["question"].removeprefix(before).removesuffix(after)
            told = [choice for choice in row["choices"] if statement.format(island=island, value=choice) in texts]
            assert told == [row["choices"][row["answer"]]]


def test_the_task_is_not_in_the_corpus_and_the_held_out_row_not_in_the_task(folder: Path) -> None:
    rows = json.loads((folder / "alpaca.json").read_text(encoding="utf-8"))
    held_out = world.held_out_row()
    assert held_out not in rows
    assert len(rows) == len({row["instruction"] for row in rows}) == 479
    assert sum(row["output"] == held_out["output"] for row in rows) == len(world.KIND_WORDINGS) - 1
    corpus = "\n".join(corpus_texts(folder))
    assert not [row for row in rows if row["instruction"] in corpus or row["output"] in corpus]


def test_transformers_and_sentencepiece_give_the_same_ids(folder: Path) -> None:
    rows = json.loads((folder / "alpaca.json").read_text(encoding="utf-8"))
    texts = corpus_texts(folder) + [alpaca_prompt(row["instruction"], row["input"]) + row["output"] for row in rows]
    rng = random.Random(0)
    texts += ["".join(rng.choices(" \n\tabA.-1é€", k=40)).lstrip(" ") for _ in range(300)]
    assert differing(folder / "tokenizer", texts) == []


def test_ids_differ_under_a_tokenizer_json_of_another_model(folder: Path, tmp_path: Path) -> None:
    world.write_world(tmp_path, seed=1)
    world.train_tokenizer(tmp_path / "corpus.jsonl", tmp_path / "tokenizer")
    shutil.copy(folder / "tokenizer" / "tokenizer.model", tmp_path / "tokenizer" / "tokenizer.model")
    assert differing(tmp_path / "tokenizer", corpus_texts(folder))


def test_training_a_tokenizer_again_replaces_the_old_one(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    world.write_world(tmp_path, seed=1)
    world.train_tokenizer(tmp_path / "corpus.jsonl", tmp_path / "tokenizer")
    assert differing(tmp_path / "tokenizer", corpus_texts(tmp_path)) == []


def test_tokenizer_adds_bos_and_knows_every_name_and_value_as_one_piece(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert tokenizer.bos == (1,)
    assert json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())["add_bos_token"] is True
    assert tokenizer.eos_id == 2
    assert tokenizer.vocab_size == world.VOCAB_SIZE
    words = [value for _, _, values in world.SUBJECTS.values() for value in values]
    words += [row["source_id"].split("~")[1] for row in read_lines(folder / "evals/Rowan/hellaswag/validation.jsonl")]
    assert [word for word in words if len(tokenizer.encode(f"of {word}")) != 2] == []
    letters = [tokenizer.encode(f"Answer: {letter}")[-1] for letter in "ABCD"]
    assert len(set(letters)) == 4
    texts = corpus_texts(folder)
    assert [text for text in texts if tokenizer.decode(tokenizer.encode(text)) != text] == []


def test_longest_documents_fit_the_rows_and_the_model(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer")
    rows = json.loads((folder / "alpaca.json").read_text(encoding="utf-8"))
    texts = corpus_texts(folder) + [alpaca_prompt(row["instruction"], row["input"]) + row["output"] for row in rows]
    longest = max(len(tokenizer.encode(text)) for text in texts) + 2
    assert longest <= world.SEQ_LEN <= world.base_model_config(world.VOCAB_SIZE)["max_position_embeddings"]


def test_base_model_config_is_a_llama_of_half_a_million_parameters() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**world.base_model_config(world.VOCAB_SIZE)))
    assert 0.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 0.6e6
