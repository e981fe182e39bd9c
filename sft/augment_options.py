"""Every option of `sft augment`."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from sft.config import PositiveInt, Section, split_commas


class AugmentConfig(Section):
    input: str
    """One file of rows: .json, .jsonl (also .gz or .zst) or .parquet."""
    method: Literal["paraphrase", "back_translation", "hook"] = "paraphrase"
    """paraphrase: one seq2seq model rewrites the text; back_translation: one translates it away, another back; hook:
    a function of your own."""
    models: Annotated[list[str], BeforeValidator(split_commas)] = []
    """Folders of encoder-decoder models (T5, Marian, BART, …): one for paraphrase; for back_translation two, out and
    back. Safetensors weights only."""
    hook: str | None = None
    """Method hook: module:function, imported from the current folder; it takes a list of rows and returns for each a
    list of its variants."""
    fields: Annotated[list[str], BeforeValidator(split_commas), Field(min_length=1)] = ["instruction"]
    """Fields that the models rewrite; the others are copied. A blank field stays blank."""
    prefix: str | None = None
    """Put before each text of the first model; default: "paraphrase: " for method paraphrase, else nothing. Marian
    models of several target languages want the language here: ">>fr<< "."""
    variants: PositiveInt = 1
    """Variants of each row."""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """Of sampling; lower stays closer to the original; 0 = no sampling: the likeliest text, or with beams the likeliest
    ones. Sampled back-translations teach more than the likeliest (Edunov et al. 2018)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Sample from the likeliest tokens that together have this probability."""
    beams: PositiveInt = 1
    """Width of beam search; 1 = none. Variants without sampling need as many beams."""
    max_new_tokens: PositiveInt = 256
    """Longest rewriting, in the model's tokens; a text that has not ended by then is dropped."""
    batch_size: PositiveInt = 32
    """Rows in one call of the model, or of the hook."""
    seed: int = 0
    """Seed of the sampling; also of the generators a hook finds in random, numpy and torch."""
    out: str
    """.jsonl file to create; <out>.job beside it records how it was made."""

    @model_validator(mode="after")
    def _fits_the_method(self) -> "AugmentConfig":
        wanted = {"paraphrase": 1, "back_translation": 2, "hook": 0}[self.method]
        if len(self.models) != wanted:
            raise ValueError(f"models: method {self.method} takes {wanted} model folders, got {len(self.models)}")
        if (self.method == "hook") != (self.hook is not None):
            raise ValueError("hook: method hook and --hook module:function go together; give both, or neither")
        of_models = ("fields", "prefix", "variants", "temperature", "top_p", "beams", "max_new_tokens")
        changed = [name for name in of_models if getattr(self, name) != type(self).model_fields[name].default]
        if self.method == "hook" and changed:
            raise ValueError(f"{changed[0]}: method hook does not use it, the function decides; leave it out")
        if self.variants > self.beams and (self.beams > 1 or self.temperature == 0):
            raise ValueError(
                f"variants: got {self.variants}, needs as many beams; or sample: beams 1, temperature above 0"
            )
        return self

    @field_validator("out")
    @classmethod
    def _json_lines(cls, value: str) -> str:
        if not value.endswith(".jsonl"):
            raise ValueError("must be the name of a .jsonl file")
        return value
