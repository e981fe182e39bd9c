"""A closed world of invented islands: all that the demonstration's models ever read.

Random weights score 25 % before and after any training, so they cannot show forgetting. Here a seeded
generator writes facts, and a tiny base model reads them until it answers clearly above chance. What is
measured is closed-world memory: the questions of the evaluation, with their choices in the same order and
their answers, stand in the base model's corpus. A high score says that the base remembers, a drop after
fine-tuning that it forgot; neither says anything about generalisation, and neither compares with real
MMLU or HellaSwag scores. Only the layouts and the request formats are those of the real benchmarks.
"""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.template import alpaca_prompt

NUM_ISLANDS = 60
"""Each island has one fact per subject and one scene per activity: 240 questions and 240 scenes."""
NUM_DEV_ISLANDS = 5
"""MMLU has five solved questions per subject; they come from the first islands, which are not tested."""
NUM_TRAIN_ISLANDS = 5
"""HellaSwag's train split (20 rows) is the pool of solved examples for k-shot runs."""
QUESTIONS_PER_EXAM = 6
"""A 5-shot request is five solved questions and one open one: exams in the corpus have the same length."""
EXAM_ORDERS = 3
"""Every question stands in this many exams, among other neighbours each time. With 2, 400 steps reached 87 % and 91 %
of the questions (two seeds), with 3 all of them; the scenes, which stand in the corpus once, lost ten points."""

VOCAB_SIZE = 1024
"""The smallest power of two at which every island and every value is one piece; at 768 names take three pieces,
and documents are a seventh longer."""
TEMPLATE_COPIES = 20
"""Times that the fine-tuning prompts enter the tokenizer's training text; the corpus never holds them."""
CONTEXT_TOKENS = 512
"""The longest request has 188 tokens; the rest leaves room for sampling."""

# Training sizes, found by trial in fp32 on CPU cores of 90 GFLOP/s; bf16 ended as high.
SEQ_LEN = 256
"""Tokens per pack: one exam and a few facts. Rows of 512 held one kind of document each: noisier steps."""
BASE_ROWS_PER_STEP = 6
"""About 1,500 tokens. More steps of few tokens beat fewer steps of many: 8 rows reached less from nearly as many."""
BASE_STEPS = 440
"""660,000 tokens, 22 readings of the corpus, about 45 core-seconds; the letters are learned suddenly, by step 400."""
BASE_LR = 5.0e-3
"""4e-3 and 6e-3 end alike; at 8e-3 the scenes are learned worse."""
BASE_WARMUP_STEPS = 20
"""A twentieth of the steps: the rate is high and the weights are random."""
TUNE_ROWS_PER_STEP = 8
"""An even number for 2 ranks; 48 rows of the task per step, so ten steps read all of them."""
TUNE_STEPS = 140
"""264,000 tokens, about 14 core-seconds. By step 80 one base had learned the task and another had not."""
TUNE_LR = 7.0e-4
"""At 5e-4 the task needs more steps, at 2e-3 HellaSwag falls near chance: here the loss is clear but partial."""
TUNE_WARMUP_STEPS = 5
"""Enough for Adam's second moment (beta 0.95) to have seen some steps."""
HELDOUT = 0.05
"""Part of the rows that no fine-tuning reads: on them the report measures what was learned."""
REPLAY_RATIO = 0.61
"""Part of the fine-tuning tokens that comes from the corpus: all of it that is not held out. What is not replayed is
forgotten: with 0.25 two bases lost 9 and 19 of 220 scenes, with 0.5 one lost 4."""
REPLAY_STEPS = 240
"""About 24 core-seconds: 190,000 tokens of the task beside the replay. At 140 one base still mixed up words, at 180
another."""
MAX_DROP = 0.05
"""With 220 items the gate can show a drop to be smaller than five points, not one: three net losses pass."""

SUBJECTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "island_trade": (
        "What do the people of {island} sell?",
        "The people of {island} sell {value}.",
        ("amber", "silk", "salt", "wool", "iron", "honey", "paper", "glass", "copper", "pepper", "linen", "cedar"),
    ),
    "island_animals": (
        "Which animal guards the gate of {island}?",
        "The gate of {island} is guarded by the {value}.",
        ("otter", "heron", "lynx", "raven", "tiger", "badger", "falcon", "turtle", "goat", "camel", "wolf", "beetle"),
    ),
    "island_music": (
        "What is played at night in {island}?",
        "At night the {value} is played in {island}.",
        ("harp", "drum", "flute", "gong", "organ", "fiddle", "horn", "bell", "lute", "piano", "cello", "zither"),
    ),
    "island_trees": (
        "Which tree grows on the hill of {island}?",
        "On the hill of {island} grows the {value}.",
        ("maple", "birch", "willow", "olive", "walnut", "cherry", "poplar", "almond", "ebony", "spruce", "fig", "elm"),
    ),
}
"""Subject: question, statement, values. Choices are four neighbours of the list in this order, so a letter goes with
a value. With choices drawn and shuffled the same training reached 82 % and 72 % instead of 98 % and more."""

SCENES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "Fishing": (
        "Two fishers of {island} cast a net.",
        "they",
        (
            "catch nine red crabs and laugh.",
            "pull up an old boot.",
            "lift a heavy chest into the boat.",
            "fall asleep in the sun.",
            "find only green weed.",
            "lose the net in a storm.",
            "sing until a whale comes near.",
            "row home with forty fish.",
        ),
    ),
    "Cooking": (
        "A cook of {island} heats a pot.",
        "he",
        (
            "boils some rice with lemon.",
            "cuts seven onions and cries.",
            "burns the soup again.",
            "adds a lot of cold milk.",
            "bakes bread for the whole street.",
            "drops his ring into the stew.",
            "asks a child to stir.",
            "fries mushrooms in butter.",
        ),
    ),
    "Building": (
        "The masons of {island} meet at dawn.",
        "they",
        (
            "raise a tall white tower.",
            "repair the long bridge.",
            "dig a deep well behind the inn.",
            "paint the school blue.",
            "tear down the ruined wall.",
            "carve a lion out of stone.",
            "argue about the plan all day.",
            "cover the market with a roof.",
        ),
    ),
    "Racing": (
        "The riders of {island} wait for the sign.",
        "one rider",
        (
            "takes the short way through the river.",
            "jumps over a fence and wins.",
            "waves to the queen.",
            "starts too early.",
            "stops to pick a flower.",
            "turns back to fetch a hat.",
            "gets lost in thick fog.",
            "shares the prize with everyone.",
        ),
    ),
}
"""Activity: ctx_a, ctx_b, and the endings among which the right one and the three wrong ones are drawn."""

KINDS = {
    "island_trade": "a thing that people sell",
    "island_animals": "an animal",
    "island_music": "an instrument",
    "island_trees": "a tree",
}
KIND_WORDINGS = (
    "What is the {word}?",
    "What kind of thing is the {word}?",
    "Say what the {word} is.",
    "Explain the word {word}.",
    "Tell a child what the {word} is.",
    "Sort the {word} into its kind.",
    "Define the {word} in one sentence.",
    "To which kind does the {word} belong?",
    "Is the {word} a tree, an animal, an instrument or a thing that people sell?",
    "Describe the {word}.",
)
"""The fine-tuning task, in ten wordings: name the kind of a word."""


def held_out_row() -> dict[str, str]:
    """The row that `write_world` leaves out of alpaca.json, for a sample answer before and after fine-tuning.

    Only this wording of this word is left out: the word stands in the other nine wordings.
    """
    return _kind_row(KIND_WORDINGS[0], "otter", "island_animals")


def write_world(folder: Path, seed: int) -> None:
    """Write corpus.jsonl, alpaca.json and evals/ under `folder`; equal seeds give equal bytes.

    corpus.jsonl: one object per line with the field `text` (source format `text`).
    alpaca.json: one array of instruction, input, output.
    evals/cais/mmlu/<subject>/{dev,test}.jsonl and evals/Rowan/hellaswag/{train,validation}.jsonl: the
    fields of the public data sets.
    """
    rng = random.Random(seed)
    islands = _island_names(rng)
    questions = {subject: [_question(rng, subject, island) for island in islands] for subject in SUBJECTS}
    places = [(island, activity) for island in islands for activity in SCENES]
    scenes = [_scene(rng, activity, island, index) for index, (island, activity) in enumerate(places)]
    for subject, items in questions.items():
        target = folder / "evals" / "cais" / "mmlu" / subject
        _write_lines(target / "dev.jsonl", items[:NUM_DEV_ISLANDS])
        _write_lines(target / "test.jsonl", items[NUM_DEV_ISLANDS:])
    num_train = NUM_TRAIN_ISLANDS * len(SCENES)
    hellaswag = folder / "evals" / "Rowan" / "hellaswag"
    _write_lines(hellaswag / "train.jsonl", [row | {"split": "train"} for row in scenes[:num_train]])
    _write_lines(hellaswag / "validation.jsonl", [row | {"split": "val"} for row in scenes[num_train:]])
    _write(folder / "alpaca.json", json.dumps(_kind_rows(rng), indent=1) + "\n")
    documents = [*_statements(questions, islands), *_told_scenes(scenes), *_exams(rng, questions)]
    rng.shuffle(documents)
    # last: a folder with a corpus is a whole world
    _write_lines(folder / "corpus.jsonl", [{"text": text} for text in documents])


def train_tokenizer(corpus: Path, folder: Path) -> None:
    """Train SentencePiece on corpus.jsonl and write a tokenizer folder of Llama's shape.

    tokenizer.model, and the tokenizer.json and tokenizer_config.json that transformers makes of it. The text is
    left as it is and no piece consists of spaces alone: both tokenizers then give the same ids (pieces of several
    spaces are where the conversion in transformers 5 departs from sentencepiece). The exception is a text that
    starts with a space, of which the conversion drops one; the world has no such text.
    """
    from sentencepiece import SentencePieceTrainer
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    with corpus.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    # Every fine-tuning row repeats the template: its words must be pieces, or the prompt is mostly single letters.
    texts += [alpaca_prompt(wording.format(word="amber")) for wording in KIND_WORDINGS] * TEMPLATE_COPIES
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=False,
        split_digits=True,
        character_coverage=1.0,
        required_chars="-",
        max_sentence_length=1_000_000,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer.json").unlink(missing_ok=True)  # transformers would load an older one instead of the model
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_TOKENS,
    }
    _write(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    converted = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    converted.backend_tokenizer.save(str(folder / "tokenizer.json"))


def base_model_config(vocab_size: int) -> dict[str, Any]:
    """Fields of the base model's transformers.LlamaConfig: 0.56M parameters.

    Two layers are the least that can look up "which island" and then "what about it"; with three or four, or with
    192 wide, the same core-seconds bought less.
    """
    return {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": CONTEXT_TOKENS,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _island_names(rng: random.Random) -> list[str]:
    starts = [consonant + vowel for consonant in "BDFGKLMNPRSTVZ" for vowel in "aeiou"]
    ends = [consonant + vowel + last for consonant in "bdfgklmnprstvz" for vowel in "aeiou" for last in ("", "n", "r")]
    names: set[str] = set()
    while len(names) < NUM_ISLANDS:
        names.add(rng.choice(starts) + rng.choice(ends))
    return rng.sample(sorted(names), NUM_ISLANDS)


def _question(rng: random.Random, subject: str, island: str) -> dict[str, Any]:
    question, _, values = SUBJECTS[subject]
    start = rng.randrange(0, len(values), 4)
    return {
        "question": question.format(island=island),
        "subject": subject,
        "choices": list(values[start : start + 4]),
        "answer": rng.randrange(4),
    }


def _scene(rng: random.Random, activity: str, island: str, index: int) -> dict[str, Any]:
    ctx_a, ctx_b, endings = SCENES[activity]
    ctx_a = ctx_a.format(island=island)
    return {
        "ind": index,
        "activity_label": activity,
        "ctx_a": ctx_a,
        "ctx_b": ctx_b,
        "ctx": f"{ctx_a} {ctx_b}",
        "endings": rng.sample(endings, 4),
        "label": str(rng.randrange(4)),
        "source_id": f"world~{island}~{activity}",
        "split_type": "indomain",
    }


def _statements(questions: dict[str, list[dict[str, Any]]], islands: list[str]) -> Iterator[str]:
    for subject, items in questions.items():
        for item, island in zip(items, islands, strict=True):
            yield SUBJECTS[subject][1].format(island=island, value=item["choices"][item["answer"]])


def _told_scenes(scenes: list[dict[str, Any]]) -> Iterator[str]:
    for row in scenes:
        # The evaluation capitalizes ctx_b; the corpus must hold the text that is scored.
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        yield f"{context} {row['endings'][int(row['label'])]}"


def _exams(rng: random.Random, questions: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    for subject, items in questions.items():
        title = subject.replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {title}.\n\n"
        for _ in range(EXAM_ORDERS):
            order = rng.sample(items, len(items))
            for start in range(0, len(order), QUESTIONS_PER_EXAM):
                yield head + "\n\n".join(_solved(item) for item in order[start : start + QUESTIONS_PER_EXAM])


def _solved(item: dict[str, Any]) -> str:
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", item["choices"], strict=True))
    return f"{item['question']}\n{choices}\nAnswer: {'ABCD'[item['answer']]}"


def _kind_rows(rng: random.Random) -> list[dict[str, str]]:
    words = [(value, subject) for subject, (_, _, values) in SUBJECTS.items() for value in values]
    rows = [_kind_row(wording, word, subject) for wording in KIND_WORDINGS for word, subject in words]
    rows.remove(held_out_row())
    return rng.sample(rows, len(rows))


def _kind_row(wording: str, word: str, subject: str) -> dict[str, str]:
    return {"instruction": wording.format(word=word), "input": "", "output": f"The {word} is {KINDS[subject]}."}


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(row) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)
