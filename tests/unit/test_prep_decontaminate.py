"""Rows that overlap with evaluation items: planted leaks are found in every layout, near misses are not."""

import csv
import json
import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.decontaminate import Decontaminator, Item, load_items
from sft.errors import UserError
from tests.tiny import make_evals

QUESTION = (
    "Which of the following vessels carries the oxygenated blood of a foetus from the placenta towards its liver "
    "before birth?"
)
CHOICES = ["The umbilical vein", "Both of the umbilical arteries", "The ductus arteriosus", "The portal vein"]
CONTEXT_A = "A potter in a blue apron throws a lump of grey clay on the wheel and wets both of her hands."
CONTEXT_B = "then she"
ENDINGS = ["opens the clay with her thumbs.", "eats the wheel.", "sings a song to the clay.", "flies off at last."]


def mmlu_row(**changes: object) -> dict:
    return {"question": QUESTION, "subject": "anatomy", "choices": CHOICES, "answer": 0, **changes}


def hellaswag_row(**changes: object) -> dict:
    row = {"ind": 1, "activity_label": "Pottery", "ctx_a": CONTEXT_A, "ctx_b": CONTEXT_B, "label": "0"}
    return {**row, "ctx": f"{CONTEXT_A} {CONTEXT_B}", "endings": ENDINGS, "source_id": "x", **changes}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as stream:
            cells = [[row["question"], *row["choices"], "ABCD"[row["answer"]]] for row in rows]
            csv.writer(stream).writerows(cells)
    return path


def finder(*texts: str, ngram: int = 13) -> Decontaminator:
    return Decontaminator([Item(f"item#{number}", text) for number, text in enumerate(texts)], ngram)


OTHER = mmlu_row(question="What is it?", choices=["a", "b", "c", "d"])


@pytest.mark.parametrize(
    "place",
    [
        "cais/mmlu/anatomy/test.jsonl",
        "cais/mmlu/anatomy/test.json",
        "cais/mmlu/anatomy/test-00000-of-00001.parquet",
        "cais/mmlu/all/test-00000-of-00001.parquet",
        "data/test/anatomy_test.csv",
        "anatomy_test.csv",
    ],
)
@pytest.mark.parametrize("as_folder", [True, False])
def test_mmlu_in_every_layout(tmp_path, place, as_folder):
    file = write(tmp_path / place, [OTHER, mmlu_row()])
    checker = Decontaminator(load_items([str(tmp_path if as_folder else file)]), 13)
    hit = checker.find(f"Answer this!\n{QUESTION}\nThe umbilical vein.")
    assert hit == ("mmlu/anatomy/test#1", f"{QUESTION}\nThe umbilical vein")
    assert checker.find("Which of the following is a bone of the foot?") is None


@pytest.mark.parametrize("header", [["question", "A", "B", "C", "D", "answer"], ["question", *"wxyz", "answer"]])
def test_a_csv_header_is_no_item(tmp_path, header):
    file = tmp_path / "anatomy_test.csv"
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, [QUESTION, *CHOICES, "A"]])
    assert {item.name for item in load_items([str(file)])} == {"mmlu/anatomy/test#0"}


@pytest.mark.parametrize(
    "place", ["Rowan/hellaswag/validation.jsonl", "hellaswag_val.jsonl", "h/validation-00000-of-00001.parquet"]
)
def test_hellaswag_in_every_layout(tmp_path, place):
    write(tmp_path / place, [hellaswag_row(ctx_a="Short.", ctx=""), hellaswag_row()])
    checker = Decontaminator(load_items([str(tmp_path)]), 13)
    for ending in ENDINGS:
        text = f"{CONTEXT_A} Then she {ending}"
        assert checker.find(f"Go on: {text}") == ("hellaswag/validation#1", text.rstrip("."))
    tail = " ".join(CONTEXT_A.split()[-9:])
    for ending in (ENDINGS[0], ENDINGS[2]):
        assert checker.find(f"{tail} then she {ending}").item_name == "hellaswag/validation#1"
    assert checker.find(f"{CONTEXT_A.replace('grey', 'brown')} then she leaves") is None


def test_hellaswag_tags_may_stay_or_be_gone(tmp_path):
    title, step = "[header] How to retract a letter [title] Format it well.", "[step] Set it up as usual and sign it."
    write(tmp_path / "validation.jsonl", [hellaswag_row(activity_label="Work", ctx_a=f"{title} {step}", ctx_b="")])
    checker = Decontaminator(load_items([str(tmp_path)]), 13)
    for text in (f"{title} {step}", "How to retract a letter. Format it well. Set it up as usual and sign it."):
        assert checker.find(text).item_name == "hellaswag/validation#0"


def test_rows_are_numbered_as_the_drift_job_numbers_them(tmp_path):
    """Across shards, within a subject of the hub's `all`, and with the subject's own folder first."""
    numbered = [mmlu_row(question=f"{QUESTION} {word}") for word in ("one", "two", "three")]
    foreign = mmlu_row(subject="virology", question="Is it alive?")
    write(tmp_path / "split/anatomy/test-00000-of-00002.parquet", numbered[:2])
    write(tmp_path / "split/anatomy/test-00001-of-00002.parquet", numbered[2:])
    names = {item.name for item in load_items([str(tmp_path / "split")])}
    assert names == {f"mmlu/anatomy/test#{row}" for row in range(3)}
    write(tmp_path / "joint/all/test.jsonl", [foreign, *numbered])
    names = {item.name for item in load_items([str(tmp_path / "joint")])}
    assert names == {*(f"mmlu/anatomy/test#{row}" for row in range(3)), "mmlu/virology/test#0"}


def test_training_splits_of_a_folder_are_passed_over_but_not_a_file_that_is_named(tmp_path):
    make_evals(tmp_path)
    write(tmp_path / "cais/mmlu/auxiliary_train/train.jsonl", [mmlu_row(subject="")])
    names = {item.name for item in load_items([str(tmp_path)])}
    assert names == {
        *(f"hellaswag/validation#{row}" for row in range(4)),
        *(f"mmlu/{subject}/dev#{row}" for subject in ("anatomy", "virology") for row in range(5)),
        *(f"mmlu/{subject}/test#{row}" for subject in ("anatomy", "virology") for row in range(4)),
    }
    train = tmp_path / "Rowan/hellaswag/train.jsonl"
    assert {item.name for item in load_items([str(train)])} == {f"hellaswag/train#{row}" for row in range(4)}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_any_other_table_gives_its_strings(tmp_path, suffix):
    file = write(tmp_path / f"mine{suffix}", [{"id": 7, "q": {"text": "Short one."}, "a": ["no", QUESTION]}])
    assert Decontaminator(load_items([str(file)]), 13).find(QUESTION).item_name == f"mine{suffix}#0"


def test_another_csv_has_a_header(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text(f'prompt,target\n"{QUESTION}",yes\n')
    assert Decontaminator(load_items([str(file)]), 13).find(QUESTION).item_name == "mine.csv#0"


@pytest.mark.parametrize(
    "text",
    [
        QUESTION.upper(),
        QUESTION.replace(" ", "\n\t "),
        QUESTION.replace(" ", " - ").replace("?", "!?"),
        QUESTION.replace("oxygenated", "ｏｘｙｇｅｎａｔｅｄ"),
        "Prompt.\nResponse: " + QUESTION,
        QUESTION.replace(" the ", " _the_ "),
    ],
)
def test_case_white_space_punctuation_and_width_hide_nothing(text):
    hit = finder("Something else that is long enough to be checked here.", QUESTION).find(text + " Sure.")
    assert hit.item_name == "item#1"
    assert hit.overlap_text in text
    assert hit.overlap_text[-5:].lower() == "birth"


def test_an_overlap_begins_at_the_given_number_of_words():
    words = QUESTION.split()
    checker = finder(QUESTION)
    for start in range(len(words) - 12):
        inside = " ".join(["xx", *words[start : start + 13], "yy"])
        assert checker.find(inside) == ("item#0", " ".join(words[start : start + 13]).rstrip("?"))
        assert checker.find(" ".join(["xx", *words[start : start + 12], "yy"])) is None
    assert finder(QUESTION, ngram=12).find(" ".join(words[:12])) is not None


def test_near_misses_pass():
    words = QUESTION.split()
    changed = [*words]
    changed[6] = changed[13] = "other"
    checker = finder(QUESTION)
    assert checker.find(" ".join(changed)) is None
    assert checker.find(" ".join(reversed(words))) is None
    assert checker.find("What blood vessel brings blood rich in oxygen from the placenta to the liver?") is None
    assert checker.find("") is None


def test_an_overlap_does_not_cross_from_item_to_item():
    one, two = "a b c d e f g h i j", "k l m n o p q r s t"
    assert finder(one, two, ngram=12).find(f"xx {one} {two[:-2]} xx").overlap_text == one
    assert finder(f"{one} k", f"l {two}", ngram=11).find("b c d e f g h i j k l m n o p") is None


def test_short_items_match_as_a_whole_from_five_words_on():
    checker = finder("What is two plus two", "Is it so", "What is two plus three, then?")
    assert checker.find("Q: what is TWO plus two? Four.") == ("item#0", "what is TWO plus two")
    assert checker.find("what is two plus three then") == ("item#2", "what is two plus three then")
    assert checker.find("what is two plus three") is None
    assert checker.find("Is it so? Is it so?") is None
    assert checker.too_short == ["item#1"]
    assert checker.num_items == 3


def test_a_question_without_its_choices_is_an_item_from_eight_words_on(tmp_path):
    eight, seven = "Which gland lies on top of each kidney?", "Which gland sits on top of kidneys?"
    file = write(tmp_path / "anatomy_test.csv", [mmlu_row(question=eight), mmlu_row(question=seven)])
    checker = Decontaminator(load_items([str(file)]), 13)
    assert checker.find(f"Tell me: {eight} The adrenal.").item_name == "mmlu/anatomy/test#0"
    assert checker.find(f"Tell me: {seven} The adrenal.") is None
    lettered = "\n".join([seven, *(f"({letter}) {text}" for letter, text in zip("ABCD", CHOICES, strict=True))])
    assert checker.find(lettered).item_name == "mmlu/anatomy/test#1"


def test_the_longest_overlap_is_named():
    long, longer = "a b c d e f g h i j k l m n", "n o p q r s t u v w x y z a b"
    assert finder(long, longer).find(f"{long} xx {longer}") == ("item#1", longer)
    assert finder(long, longer).find(f"{longer} xx {long}") == ("item#1", longer)


@pytest.mark.parametrize(
    ("item", "row", "overlap"),
    [
        (
            "下列哪一项不是中华人民共和国的直辖市",
            "请问：下列哪一项不是中华人民共和国的直辖市？答",
            "下列哪一项不是中华人民共和国的直辖市",
        ),
        (
            "Le café est très chaud aujourd'hui",
            "LE CAFE\u0301 EST  TRÈS CHAUD aujourd’hui!",
            "LE CAFE\u0301 EST  TRÈS CHAUD aujourd’hui",
        ),
        (
            "Die Straße ist wirklich sehr lang",
            "x DIE STRASSE IST WIRKLICH SEHR LANG y",
            "DIE STRASSE IST WIRKLICH SEHR LANG",
        ),
        ("हिन्दी भारत की एक बड़ी भाषा है", "«हिन्दी भारत की एक बड़ी भाषा है»", "हिन्दी भारत की एक बड़ी भाषा है"),
        (
            "대한민국의 수도는 어디 입니까 서울 부산",
            "대한민국의 수도는 어디 입니까? 서울, 부산.",
            "대한민국의 수도는 어디 입니까? 서울, 부산",
        ),
    ],
)
def test_other_scripts(item, row, overlap):
    assert finder(item).find(row) == ("item#0", overlap)
    assert finder(item).find(row[: len(row) // 2]) is None


def test_against_a_plain_search():
    """Random texts over two words, so that overlaps of all lengths occur; the oracle compares all runs."""
    random = np.random.default_rng(0)
    ngram, found = 6, 0
    for _ in range(500):
        items = [random.integers(0, 2, size=random.integers(3, 12)).tolist() for _ in range(3)]
        row = random.integers(0, 2, size=random.integers(0, 20)).tolist()
        runs = {
            tuple(item[start : start + length])
            for item in items
            for length in range(min(ngram, len(item)) if len(item) >= 5 else 99, len(item) + 1)
            for start in range(len(item) - length + 1)
        }
        spell = [" ".join("no" if word else "yes" for word in words) for words in (*items, row)]
        overlaps = {" ".join("no" if word else "yes" for word in run) for run in runs}
        hit = finder(*spell[:-1], ngram=ngram).find(spell[-1])
        is_contaminated = any(f" {overlap} " in f" {spell[-1]} " for overlap in overlaps)
        assert (hit is not None) == is_contaminated
        if hit:
            assert f" {hit.overlap_text} " in f" {spell[-1]} "
            assert any(f" {overlap} " in f" {hit.overlap_text} " for overlap in overlaps)
        found += is_contaminated
    assert 100 < found < 400


def test_it_travels_to_other_processes():
    checker = pickle.loads(pickle.dumps(finder(QUESTION, "What is two plus two")))
    assert checker.find(QUESTION).item_name == "item#0"
    assert checker.find("what is two plus two").item_name == "item#1"


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("x.jsonl", b'{"q": "a"}\n{"q"\n', "line 2: not valid JSON"),
        ("x.jsonl", b"[1]\n", "line 1: is not a table"),
        ("x.json", b'{"model_type": "llama"}', "is not a table"),
        ("x.json", b"", "not valid JSON"),
        ("x.jsonl", b"\n", "holds no rows"),
        ("x.jsonl", b'{"n": 1}\n', "no row holds text"),
        ("x.jsonl", b'{"q": "\xff"}\n', "not UTF-8"),
        ("x.parquet", b"PAR1", "not a whole parquet file"),
        ("x.csv", b"a,b\n1\n", "1 columns"),
        ("x.csv", b'a,b\n"1', "not valid CSV"),
        ("README.md", b"hello", "a .md file"),
        ("x.jsonl", b'{"question": 5, "choices": []}\n', "field 'question' is 5"),
        ("x.jsonl", b'{"question": "q", "choices": "abcd"}\n', "field 'choices' is 'abcd'"),
    ],
)
def test_what_is_no_evaluation_data_is_one_line(tmp_path, name, content, part):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_items([str(tmp_path / name)])
    assert part in str(error.value)
    assert "decontaminate" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_empty_folders(tmp_path):
    for path, part in ((tmp_path, "holds no"), (tmp_path / "none", "no such file")):
        with pytest.raises(UserError, match=part):
            load_items([str(path)])
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(UserError, match="holds no"):
        load_items([str(tmp_path)])


def test_the_side_files_of_a_download_are_passed_over(tmp_path):
    write(tmp_path / "anatomy/test.jsonl", [mmlu_row()])
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/meta.json").write_text("{}")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert {item.name for item in load_items([str(tmp_path)])} == {"mmlu/anatomy/test#0"}
