"""Invented benchmark rows in the public layouts, with every oddity that the public files have."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SUBJECTS = ("anatomy", "high_school_us_history")  # real names: lm_eval knows no others
WORDS = (
    "the",
    "a",
    "red",
    "old",
    "lamp",
    "river",
    "walks",
    "sings",
    "under",
    "seven",
    "boats",
    "Mara's",
    "café",
    "北京",
)


def sentence(rng: random.Random, low: int = 4, high: int = 14) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def mmlu_rows(rng: random.Random, subject: str, num: int) -> list[dict[str, Any]]:
    odd = [
        ("  Which one\nspans two lines? \n", ["None", " edge", "edge ", "  both  "]),
        ('A "quoted", comma-laden question, is it?', ['"yes"', "no, never", "a\nb", ""]),
        ("Wie heißt das? 你好\u00a0", ["größer", "更小", "naïve\u00a0", "🙂🙂"]),
    ]
    rows: list[dict[str, Any]] = [{"question": question, "choices": choices} for question, choices in odd]
    rows = rows[:num] + [
        {"question": sentence(rng) + "?", "choices": [sentence(rng, 1, 5) for _ in range(4)]}
        for _ in range(num - len(odd))
    ]
    return [row | {"subject": subject, "answer": rng.randrange(4)} for row in rows]


def odd_hellaswag_rows() -> list[dict[str, Any]]:
    plain = [" and sits down.", "and leaves.", "and laughs, loudly.", "and sings."]
    texts = [
        ("Cooking", "A cook stirs.", "then SHE Adds NASA salt", plain),
        (
            "Gardens",
            "[header] How to dig [title] Begin. [step] Take a spade [substeps]",
            "",
            ["[title] Dig.", *plain[1:]],
        ),
        ("Blanks", "One   two    three. ", "", ["  a   b", "c [title] d", "[x] e", "f [step]"]),
        ("Größe", "Ein Mädchen geht.", "ÉCOLE das", ["über 7 Brücken.", "北京 schläft.", "🙂🙂.", "naïve."]),
        ("Non-breaking", "It ends here\u00a0[step]", "", ["\u00a0one", "two\u00a0", "three", "four"]),
        ("Twins", "Two are equal.", "they", ["go home.", "go home.", "go", "go home. now"]),
        ("Empty", "An ending vanishes.", "it", ["[substeps]", "is [gone] gone.", "stays.", "was 12345."]),
        ("<s> marker", "The label begins like BOS.", "he", plain),
        ("[all] of it", "[step] leading", "", plain),
    ]
    return [
        {"activity_label": label, "ctx_a": ctx_a, "ctx_b": ctx_b, "endings": endings}
        for label, ctx_a, ctx_b, endings in texts
    ]


def hellaswag_rows(rng: random.Random, num: int, first_ind: int) -> list[dict[str, Any]]:
    rows = odd_hellaswag_rows()
    rows += [
        {
            "activity_label": sentence(rng, 1, 3),
            "ctx_a": sentence(rng),
            "ctx_b": rng.choice(["", "she", "The Other"]),
            "endings": [sentence(rng, 2, 8) for _ in range(4)],
        }
        for _ in range(num - len(rows))
    ]
    return [
        row | {"ind": first_ind + number, "source_id": f"video~{number // 2}", "label": str(rng.randrange(4))}
        for number, row in enumerate(rows)
    ]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_hub(folder: Path, subjects: Sequence[str], num_test: int) -> None:
    """cais/mmlu and Rowan/hellaswag as the hub has them: the README's `configs` make `load_dataset` find the files."""
    rng = random.Random(7)
    mmlu, hellaswag = folder / "cais" / "mmlu", folder / "Rowan" / "hellaswag"
    readme = "---\nconfigs:\n"
    for subject in subjects:
        write_lines(mmlu / subject / "dev.jsonl", mmlu_rows(rng, subject, 5))
        write_lines(mmlu / subject / "test.jsonl", mmlu_rows(rng, subject, num_test))
        readme += f"- config_name: {subject}\n  data_files:\n"
        readme += "".join(f"  - split: {split}\n    path: {subject}/{split}.jsonl\n" for split in ("dev", "test"))
    (mmlu / "README.md").write_text(readme + "---\n")
    train, validation = hellaswag_rows(rng, 100, 0), hellaswag_rows(rng, 24, 1000)
    # 30 train rows are the second validation row itself: a draw of 11 loses several, so lm_eval draws again.
    train[50:80] = [validation[1]] * 30
    write_lines(hellaswag / "train.jsonl", train)
    write_lines(hellaswag / "validation.jsonl", validation)
    readme = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    readme += "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in ("train", "validation"))
    (hellaswag / "README.md").write_text(readme + "---\n")
