"""Invented MMLU and HellaSwag rows in every public layout."""

import csv
import json
from pathlib import Path

LETTERS = "ABCD"
ROWS = {
    "anatomy": [
        ('A comma, a "quote" and\na newline?', ["None", " edge ", "NaN", "1,5"], 0),
        ("Größe \u2028 你好\u00a0?", ["", "null", "b\nc", "🙂"], 3),
        ("question", ["A", "B", "C", "D"], 2),
    ],
    "island_trade": [(f"Question {number}?", ["w", "x", "y", "z"], number % 4) for number in range(4)],
}
HELLASWAG = [
    {
        "ind": number,
        "activity_label": "Fishing",
        "ctx_a": f"Cast {number}. [title] Wait",
        "ctx_b": "they SIT",
        "ctx": "not used",
        "endings": ["a", "b\u2028c", "ü", " d "],
        "source_id": f"wikihow~{number // 2}",
        "split": "val",
        "split_type": "indomain",
        "label": number % 4,
    }
    for number in range(5)
]


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    escaped = "\\ud" in json.dumps(rows)  # halves of surrogate pairs have no bytes of their own
    path.write_text("".join(json.dumps(row, ensure_ascii=escaped) + "\n" for row in rows), encoding="utf-8")


def parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def table(path, rows, header, letters):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        if header:
            writer.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
        writer.writerows([question, *choices, LETTERS[gold] if letters else gold] for question, choices, gold in rows)


def hub_rows(subject, rows):
    return [{"question": text, "subject": subject, "choices": choices, "answer": gold} for text, choices, gold in rows]


def write_hub_jsonl(folder: Path):
    for subject, rows in ROWS.items():
        for split in ("dev", "test", "validation"):
            lines(folder / "cais" / "mmlu" / subject / f"{split}.jsonl", hub_rows(subject, rows))


def write_hub_parquet(folder: Path):
    for subject, rows in ROWS.items():
        for split in ("dev", "test"):
            parquet(folder / "mmlu" / subject / f"{split}-00000-of-00001.parquet", hub_rows(subject, rows))
    parquet(folder / "mmlu" / "auxiliary_train" / "train-00000-of-00001.parquet", hub_rows("", ROWS["anatomy"]))


def write_hub_all(folder: Path):
    everything = [row for subject, rows in ROWS.items() for row in hub_rows(subject, rows)]
    interleaved = everything[::2] + everything[1::2]
    for subject, rows in ROWS.items():  # keep the order inside each subject
        places = [place for place, row in enumerate(interleaved) if row["subject"] == subject]
        for place, row in zip(places, hub_rows(subject, rows), strict=True):
            interleaved[place] = row
    for split in ("dev", "test"):
        parquet(folder / "all" / f"{split}-00000-of-00002.parquet", interleaved[:3])
        parquet(folder / "all" / f"{split}-00001-of-00002.parquet", interleaved[3:])


def write_hub_twice(folder: Path):
    write_hub_parquet(folder)
    write_hub_all(folder / "mmlu")


def write_hendrycks(folder: Path):
    for subject, rows in ROWS.items():
        for split in ("dev", "test", "val"):
            table(folder / "data" / split / f"{subject}_{split}.csv", rows, header=False, letters=True)
    table(folder / "data" / "auxiliary_train" / "mc_test.csv", ROWS["anatomy"], header=False, letters=True)


def write_csv_with_header(folder: Path):
    for subject, rows in ROWS.items():
        for split in ("dev", "test"):
            table(folder / split / f"{subject}_{split}.csv", rows, header=True, letters=False)
