"""MMLU (Hendrycks et al. 2021, arXiv 2009.03300): rows to items, text for text as in lm_eval's group `mmlu`."""

from collections.abc import Sequence
from dataclasses import dataclass

from sft.errors import UserError
from sft.eval.tasks.item import Item

LETTERS = ("A", "B", "C", "D")

# lm_eval's tags; the original categories.py of hendrycks/test differs (anatomy is not stem there).
CATEGORIES: dict[str, tuple[str, ...]] = {
    "stem": (
        "abstract_algebra",
        "anatomy",
        "astronomy",
        "college_biology",
        "college_chemistry",
        "college_computer_science",
        "college_mathematics",
        "college_physics",
        "computer_security",
        "conceptual_physics",
        "electrical_engineering",
        "elementary_mathematics",
        "high_school_biology",
        "high_school_chemistry",
        "high_school_computer_science",
        "high_school_mathematics",
        "high_school_physics",
        "high_school_statistics",
        "machine_learning",
    ),
    "humanities": (
        "formal_logic",
        "high_school_european_history",
        "high_school_us_history",
        "high_school_world_history",
        "international_law",
        "jurisprudence",
        "logical_fallacies",
        "moral_disputes",
        "moral_scenarios",
        "philosophy",
        "prehistory",
        "professional_law",
        "world_religions",
    ),
    "social_sciences": (
        "econometrics",
        "high_school_geography",
        "high_school_government_and_politics",
        "high_school_macroeconomics",
        "high_school_microeconomics",
        "high_school_psychology",
        "human_sexuality",
        "professional_psychology",
        "public_relations",
        "security_studies",
        "sociology",
        "us_foreign_policy",
    ),
    "other": (
        "business_ethics",
        "clinical_knowledge",
        "college_medicine",
        "global_facts",
        "human_aging",
        "management",
        "marketing",
        "medical_genetics",
        "miscellaneous",
        "nutrition",
        "professional_accounting",
        "professional_medicine",
        "virology",
    ),
}


@dataclass(frozen=True)
class MmluRow:
    """One row of a subject's file."""

    question: str
    choices: tuple[str, str, str, str]
    answer: int


@dataclass(frozen=True)
class MmluSubject:
    """The two splits that are used: solved examples come from dev, questions from test."""

    name: str
    dev: Sequence[MmluRow]
    test: Sequence[MmluRow]


def category_of(subject: str) -> str | None:
    """lm_eval's category of a subject, or None for a subject that is not among the 57."""
    return next((category for category, subjects in CATEGORIES.items() if subject in subjects), None)


def build_items(subject: MmluSubject, shots: int, limit: int | None) -> list[Item]:
    """Items of one subject: the first `limit` test rows, each behind the first `shots` dev rows.

    Raises:
        UserError: the dev split has fewer than `shots` rows.
    """
    if len(subject.dev) < shots:
        raise UserError(
            f"MMLU {subject.name}: --shots.mmlu {shots}, but its dev split has {len(subject.dev)} rows; "
            "use fewer shots or complete the dev split"
        )
    topic = subject.name.replace("_", " ")
    solved = tuple((_question(row), LETTERS[row.answer]) for row in subject.dev[:shots])
    return [
        Item(
            task="mmlu",
            subject=subject.name,
            doc_id=doc_id,
            description=f"The following are multiple choice questions (with answers) about {topic}.\n\n",
            shots=solved,
            question=_question(row),
            choices=LETTERS,
            gold=row.answer,
            cluster=subject.name,
        )
        for doc_id, row in enumerate(subject.test[:limit])
    ]


def _question(row: MmluRow) -> str:
    """The question is stripped, the choices are not: 45 public rows have blanks at a choice's edge."""
    options = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, row.choices, strict=True))
    return f"{row.question.strip()}\n{options}Answer:"
