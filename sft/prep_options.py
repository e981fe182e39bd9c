"""Every option of data preparation and of the commands that look at prepared shards, with its default's reason."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from sft.config import PositiveInt, Section, fraction_or_whole, split_commas


def _as_sources(value: Any) -> Any:
    entries = split_commas(value)
    if not isinstance(entries, list):
        return entries
    return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]


class Source(Section):
    path: str
    """.json (one array of objects) or .jsonl (one object per line), each also .gz or .zst; .parquet; a folder or glob
    of these; or a folder that `datasets` saved."""
    name: str | None = None
    """Name in the report and the manifest; default: the stem of the path."""
    format: Literal["alpaca", "messages", "sharegpt", "text"] = "alpaca"
    """alpaca: instruction, input, output (or response), and perhaps system and history; messages: a list of {role,
    content}; sharegpt: conversations, a list of {from, value}; text: one field `text`, all of it supervised."""
    columns: dict[str, str] = {}
    """The source's own names of fields, by the format's names: {instruction: question, output: answer}."""
    train_on: Literal["all", "last"] = "all"
    """Which of the assistant's turns are supervised."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often each row is used: 2.0 = twice, 0.25 = a seeded quarter of the rows."""
    role: Literal["data", "replay"] = "data"
    """replay: rows that rehearse what the model already knows; `ratio` says how many of them are used."""
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Replay only: this source's share of the final training tokens; rows are sampled, or repeated, to reach it."""
    balance_by: str | None = None
    """Field whose values shall be equally frequent: rows of the more frequent ones are sampled down to the rarest."""

    @model_validator(mode="after")
    def _replay_needs_ratio(self) -> "Source":
        if (self.role == "replay") != (self.ratio is not None):
            raise ValueError("role: replay and ratio go together; give both, or neither")
        if self.role == "replay" and self.weight != 1:
            raise ValueError("weight: a replay source is used as often as its ratio says; leave weight out")
        return self


class FilterSection(Section):
    garbled: bool = True
    """Drop rows with U+FFFD, control characters, or text that was decoded with the wrong encoding (mojibake)."""
    refusals: str = "none"
    """none; default = drop responses that match the built-in list of refusals and boiler-plate; or a text file of your
    own, one regular expression per line."""
    max_repetition: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Drop responses of which a larger share than this is repeated n-grams; 0.3 is a common choice."""
    min_response_tokens: PositiveInt = 1
    """Drop rows with fewer supervised text tokens (stop tokens do not count)."""
    max_response_tokens: PositiveInt | None = None
    """Drop rows with more supervised text tokens."""


class NearSection(Section):
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Rows whose estimated Jaccard similarity is at least this are one cluster, of which the first row is kept."""
    ngram: PositiveInt = 5
    """Words per shingle; shorter finds more, longer fewer."""
    seed: int = 0
    """Seed of the MinHash permutations."""


class PrepConfig(Section):
    sources: Annotated[list[Source], BeforeValidator(_as_sources), Field(min_length=1)]
    """Input files; a bare path is short for {path: ...}."""
    tokenizer: str
    """Folder with tokenizer.json and/or tokenizer.model: the model's own tokenizer."""
    template: str = "alpaca"
    """Prompt template: alpaca; chat = the tokenizer's own chat template; or a .jinja file. Format text takes none."""
    seq_len: Annotated[int, Field(ge=8, le=2**24)] = 4096
    """Tokens per pack at most; the model's context length is a good choice."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """A row longer than seq_len: dropped and counted; cut, without a stop token to learn; or an error."""
    on_error: Literal["raise", "drop"] = "raise"
    """A malformed row: an error that says where it is, or a counted drop."""
    filters: FilterSection = FilterSection()
    heldout: Annotated[float, Field(ge=0)] = 0.0
    """Rows kept for held-out loss, chosen by a seeded hash: a fraction below 1, or a number of rows."""
    dedup: Literal["none", "exact", "near"] = "exact"
    """exact: of rows with equal text (Unicode form and white space aside) the first is kept; near: also of similar
    rows."""
    near: NearSection = NearSection()
    decontaminate: Annotated[list[str], BeforeValidator(split_commas)] = []
    """Files or folders of evaluation items (MMLU, HellaSwag); rows that overlap with one are dropped and listed."""
    decontaminate_ngram: Annotated[int, Field(ge=5)] = 13
    """Consecutive words that a row must share with an item to count as overlap (13: Brown et al. 2020)."""
    seed: int = 0
    """Seed of the held-out split, of fractional weights, replay and balancing."""
    workers: PositiveInt | Literal["auto"] = "auto"
    """Processes; auto = one per available core, or per CPU of the Ray cluster. The output does not depend on it."""
    engine: Literal["local", "ray"] = "local"
    """Where the workers run: on this host, or on a Ray cluster (extra `ray`; RAY_ADDRESS names the cluster)."""
    dry_run: bool = False
    """Do the whole computation, print the report with disk and time needed, and write nothing."""
    out: str
    """Folder to create: train/, heldout/ and report.json go here."""

    @field_validator("heldout")
    @classmethod
    def _whole_rows(cls, value: float) -> float:
        return fraction_or_whole(value, "rows")

    @field_validator("template")
    @classmethod
    def _known_template(cls, value: str) -> str:
        if value not in ("alpaca", "chat") and not value.endswith(".jinja"):
            raise ValueError("must be alpaca, chat, or the path of a .jinja file")
        return value

    @model_validator(mode="after")
    def _ratios_leave_room(self) -> "PrepConfig":
        if sum(source.ratio or 0 for source in self.sources) >= 1 or all(s.role == "replay" for s in self.sources):
            raise ValueError("sources: the ratios of replay sources must leave room for a source of role data")
        return self


class VerifyConfig(Section):
    shards: str
    """Folder written by `sft prep`, or the folder of one split below it."""
    tokenizer: str | None = None
    """Tokenizer folder; default: the one the manifest names, where it is there."""


class ShowConfig(Section):
    shards: str
    """Shard folder written by `sft prep` (<prep out>/train), or the folder above it."""
    rows: PositiveInt = 2
    """Packs to print."""
    start: Annotated[int, Field(ge=0)] = 0
    """First pack to print."""
    doc: Annotated[int, Field(ge=0)] | None = None
    """Print only the document with this id (the input row over all sources, from 0), wherever it is packed."""
    html: str | None = None
    """Write a self-contained page to this file instead, with every token and its id."""
    tokenizer: str | None = None
    """Tokenizer folder; default: the one the manifest names."""
