"""Greedy answers for the report: the same alone and in a batch, and deaf to the folder's sampling."""

import json

import pytest
import torch

from data_prep.template import alpaca_prompt
from sft.errors import UserError
from sft.eval.answers import DEFAULT_PROMPTS, PROMPTS_PER_BATCH, Prompt, answer, load_prompts
from sft.eval.options import AnswersSection
from sft.eval.ranks import Ranks
from sft.pretrained import load_causal_lm
from sft.tokenizer import load_tokenizer
from tests import tiny

ALONE = Ranks(0, 1, torch.device("cpu"))
PROMPTS = [Prompt(f"Say item {number}", "x" * (7 * number % 23)) for number in range(PROMPTS_PER_BATCH + 3)]


@pytest.fixture
def model(base_model):
    return load_causal_lm(base_model, dtype=torch.float32, attention="sdpa").eval()


@pytest.fixture(scope="module")
def tokenizer(base_model):
    return load_tokenizer(base_model)


def section(**options):
    return AnswersSection(max_new_tokens=12, **options)


def greedy_ids(model, ids, steps=12):
    """Argmax after argmax, without cache, padding or `generate`."""
    ids = list(ids)
    start = len(ids)
    for _ in range(steps):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


def test_a_batch_answers_as_each_prompt_alone(model, tokenizer):
    together = answer(model, tokenizer, PROMPTS, section(), ALONE)
    assert together == [answer(model, tokenizer, [prompt], section(), ALONE)[0] for prompt in PROMPTS]
    assert len(set(together)) > len(PROMPTS) // 2, "answers that are all alike would prove nothing"


def test_an_answer_is_argmax_after_argmax_behind_the_alpaca_prompt(model, tokenizer):
    for prompt in PROMPTS[:3]:
        ids = [tiny.BOS, *tokenizer.encode(alpaca_prompt(prompt.instruction, prompt.input))]
        wanted = greedy_ids(model, ids)
        assert tiny.EOS not in wanted
        assert answer(model, tokenizer, [prompt], section(), ALONE) == [
            tokenizer.hf.decode(wanted, skip_special_tokens=True)
        ]


def test_the_folders_sampling_beams_and_penalties_are_set_aside_and_put_back(model, tokenizer):
    plain = answer(model, tokenizer, PROMPTS, section(), ALONE)
    model.generation_config.update(
        do_sample=True, temperature=5.0, top_k=50, num_beams=3, repetition_penalty=5.0, min_new_tokens=3, max_length=5
    )
    torch.manual_seed(1)
    assert answer(model, tokenizer, PROMPTS, section(), ALONE) == plain
    assert (model.generation_config.do_sample, model.generation_config.num_beams) == (True, 3)


def test_it_ends_at_the_folders_stop_tokens_and_at_the_tokenizers_eos(model, tokenizer):
    ids = [tiny.BOS, *tokenizer.encode(alpaca_prompt(PROMPTS[1].instruction, PROMPTS[1].input))]
    wanted = greedy_ids(model, ids)
    stop = next(token for token in wanted if token != wanted[0])
    end = wanted.index(stop)
    model.generation_config.eos_token_id = [stop, 258]
    short = answer(model, tokenizer, [PROMPTS[1], *PROMPTS], section(), ALONE)[0]
    assert short == tokenizer.hf.decode(wanted[:end], skip_special_tokens=True)
    model.generation_config.eos_token_id = None  # base models may leave it out
    with torch.no_grad():  # </s> takes the place of that token
        model.lm_head.weight[tiny.EOS] = model.lm_head.weight[stop] * 1.01
        model.lm_head.weight[stop] = 0
    assert answer(model, tokenizer, [PROMPTS[1], *PROMPTS], section(), ALONE)[0] == short


def test_templates(model, tokenizer, base_model, tmp_path):
    prompt = Prompt("Say it", "twice")
    plain = greedy_ids(model, [tiny.BOS, *tokenizer.encode("Say it\n\ntwice")])
    assert answer(model, tokenizer, [prompt], section(template="none"), ALONE) == [
        tokenizer.hf.decode(plain, skip_special_tokens=True)
    ]
    with pytest.raises(UserError, match="no chat template"):
        answer(model, tokenizer, [prompt], section(template="chat"), ALONE)
    chatty = with_chat_template(
        tmp_path / "chat", "<s>Q:{{ messages[0]['content'] }}{% if add_generation_prompt %}A:{% endif %}"
    )
    chat = greedy_ids(model, [tiny.BOS, *tokenizer.encode("Q:Say it\n\ntwiceA:")])
    assert chat != plain
    assert answer(model, chatty, [prompt], section(template="chat"), ALONE) == [
        tokenizer.hf.decode(chat, skip_special_tokens=True)
    ]
    strict = with_chat_template(tmp_path / "strict", "{{ raise_exception('no user turns') }}")
    with pytest.raises(UserError, match="does not render a question: no user turns"):
        answer(model, strict, [prompt], section(template="chat"), ALONE)


def with_chat_template(folder, template):
    tiny.make_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


def test_only_the_first_of_replicas_answers(model, tokenizer):
    assert answer(model, tokenizer, PROMPTS, section(), Ranks(1, 2, ALONE.device)) == []


def test_a_prompt_that_leaves_no_room_is_named(model, tokenizer):
    with pytest.raises(UserError, match="prompt 2 has .* attends to 512; shorten"):
        answer(model, tokenizer, [Prompt("short"), Prompt("long " * 120)], section(), ALONE)


def test_the_built_in_dozen():
    assert load_prompts(AnswersSection()) == list(DEFAULT_PROMPTS)
    assert len({prompt.shown for prompt in DEFAULT_PROMPTS}) == 12
    assert load_prompts(AnswersSection(prompts="none")) == []


def test_files_of_prompts(tmp_path):
    rows = [{"instruction": "Name a river."}, {"instruction": "Translate.", "input": "good\nmorning", "output": "-"}]
    wanted = [Prompt("Name a river."), Prompt("Translate.", "good\nmorning")]
    contents = {
        "a.json": json.dumps(rows),
        "a.jsonl": "\ufeff" + "".join(json.dumps(row) + "\r\n\n" for row in rows),
        "a.txt": "Name a river.\r\n\n  Translate. \n",
    }
    for name, text in contents.items():
        (tmp_path / name).write_bytes(text.encode())
    assert load_prompts(AnswersSection(prompts=str(tmp_path / "a.json"))) == wanted
    assert load_prompts(AnswersSection(prompts=str(tmp_path / "a.jsonl"))) == wanted
    assert load_prompts(AnswersSection(prompts=str(tmp_path / "a.txt"))) == [wanted[0], Prompt("Translate.")]
    assert wanted[1].shown == "Translate.\n\ngood\nmorning"


MISTAKES = {
    "missing.txt": (None, "no such file"),
    "prompts.csv": (b"a", "no known kind"),
    "empty.txt": (b" \n", "holds no instruction"),
    "latin.txt": ("Größe".encode("latin-1"), "byte 2 is not UTF-8"),
    "torn.json": (b'[{"instruction": "a"', "not valid JSON"),
    "torn.jsonl": (b'{"instruction": "a"}\n{"instru', "line 2: not valid JSON"),
    "object.json": (b'{"instruction": "a"}', "no array"),
    "text.json": (b'[{"instruction": "a"}, "b"]', "row 2: is no object"),
    "number.jsonl": (b'{"instruction": 7}', "line 1: instruction is 7"),
    "blank.json": (b'[{"instruction": " ", "input": "x"}]', "row 1: has no instruction"),
    "half.json": (b'[{"instruction": "\\ud83d"}]', "half of a surrogate pair"),
    "deep.json": (b"[" * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_file_are_one_line(tmp_path, name):
    content, message = MISTAKES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        load_prompts(AnswersSection(prompts=str(tmp_path / name)))
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        load_prompts(AnswersSection(prompts=str(tmp_path / "a.txt")))
