"""A YAML file plus `--section.key value` flags become one frozen config; every problem is told at once."""

import argparse
import difflib
import json
import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sft.errors import UserError

Config = TypeVar("Config", bound=BaseModel)
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)
"""What PyYAML raises: its own errors, those of values it converts (a date of month 13), and on very deep nesting."""
YES_OR_NO = ("true", "false", "yes", "no", "on", "off", "y", "n", "t", "f", "1", "0")
SECRET_ENV = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's booleans (`off` and `no` stay text), and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for index, key in enumerate(keys) if key in keys[:index]]:
            raise yaml.YAMLError(f"key '{twice[0]}' is given twice in the section that starts{node.start_mark}")
        return super().construct_mapping(node, deep)


_Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


def load(model: type[Config], argv: Sequence[str], *, prog: str, positional: str | None = None) -> Config:
    """Build `model` from `--config FILE.yaml` and flags; flags win.

    `positional` names a top-level option that may also be given as a bare argument. Flags may have hyphens for
    underscores, and a yes-or-no flag without a value means yes. `--help`,
    `--print-config` and `--print-schema` print and leave with code 0.

    Raises:
        UserError: with every problem found, one per line; a typo names the nearest key.
    """
    parser = _build_parser(model, prog, positional)
    known = [name for name, _ in walk_options(model)]
    words = [_with_underscores(argument, known) for argument in argv]
    flags, unknown = parser.parse_known_args(words if positional is None else _with_yes(words, model))
    if flags.print_schema:
        print(json.dumps(model.model_json_schema(), indent=2))
        raise SystemExit(0)
    problems = _unknown_arguments(unknown, known)
    values = _read_yaml(flags.config) if flags.config else {}
    given = {name: text for name, text in vars(flags).items() if name in known and text is not None}
    for name, text in given.items():
        problem = _set_dotted(values, name, _parse_value(text, dict(walk_options(model))[name]))
        problems += [problem] if problem else []
    if "\\u0000" in _as_text(values, flags.config):
        problems += ["a value holds a NUL character, which no path and no name can have"]
    try:
        config = model.model_validate(values)
    except ValidationError as error:
        lines = [line for item in error.errors() for line in _describe(item, model, flags.config, given)]
        problems += _joined(lines)
    if problems:
        raise UserError(problems[0] if len(problems) == 1 else "\n  ".join([f"{len(problems)} problems", *problems]))
    if flags.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def to_yaml(config: BaseModel) -> str:
    """The resolved config as YAML with secrets redacted: what is printed and saved with every run."""
    return yaml.safe_dump(redact(config.model_dump(mode="json")), sort_keys=False)


def redact(value: Any) -> Any:
    """Replace credentials in URLs and the values of known secret environment variables by ***."""
    if isinstance(value, Mapping):
        return {key: redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if not isinstance(value, str):
        return value
    for name in SECRET_ENV:
        if secret := os.environ.get(name):
            value = value.replace(secret, "***")
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", value)


def walk_options(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield ("section.key", field) for every leaf option."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from walk_options(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _build_parser(model: type[BaseModel], prog: str, positional: str | None) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE.yaml", help="options as YAML; flags override it")
    parser.add_argument("--print-config", action="store_true", help="print the resolved options and leave")
    parser.add_argument("--print-schema", action="store_true", help="print the JSON schema of the YAML file and leave")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    for name, field in walk_options(model):
        help_text = " ".join((field.description or "").split()).replace("%", "%%")
        default = "required" if field.is_required() else f"default: {_show(field.get_default())}"
        value: dict[str, Any] = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
        parser.add_argument(f"--{name}", metavar=_metavar(field.annotation), help=f"{help_text} [{default}]", **value)
        if name == positional:
            parser.add_argument(
                name, nargs="?", metavar=name.upper(), help=argparse.SUPPRESS, default=argparse.SUPPRESS
            )
    return parser


def _with_underscores(argument: str, known: Sequence[str]) -> str:
    flag, equals, value = argument.partition("=")
    name = flag[2:].replace("-", "_")
    return f"--{name}{equals}{value}" if flag.startswith("--") and name in known else argument


def _with_yes(words: Sequence[str], model: type[BaseModel]) -> list[str]:
    """A yes-or-no flag in front of the positional argument means yes: that is not its value."""
    yes_or_no = {f"--{name}" for name, field in walk_options(model) if field.annotation is bool}
    return [
        f"{word}=true" if word in yes_or_no and after.lower() not in YES_OR_NO else word
        for word, after in zip(words, [*words, ""][1:], strict=True)
    ]


def _show(value: Any) -> str:
    return "null" if value is None else json.dumps(value) if isinstance(value, list | tuple | bool) else str(value)


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return "|".join(_metavar(part) for part in get_args(annotation))
    if annotation is type(None):
        return "null"
    if get_args(annotation) and hasattr(annotation, "__metadata__"):
        return _metavar(get_args(annotation)[0])
    return getattr(annotation, "__name__", str(annotation)).upper()


def _parse_value(text: str, field: FieldInfo) -> Any:
    """YAML rules for numbers, lists and null; text stays text where the option is text."""
    options = get_args(field.annotation) if get_origin(field.annotation) in (Union, types.UnionType) else ()
    is_choice = get_origin(field.annotation) is Literal
    if field.annotation is str or is_choice or (str in options and text not in ("null", "none", "~")):
        return text
    try:
        return yaml.load(text, _Yaml) if text else text
    except YAML_ERRORS:
        return text


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Yaml)
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read: {error}") from None
    except YAML_ERRORS as error:
        where = " ".join(str(error).split())
        raise UserError(f"--config {path}: not valid YAML: {where}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: must hold `key: value` lines, got a {type(values).__name__}")
    return values


def _as_text(values: dict[str, Any], file: str | None) -> str:
    try:
        return json.dumps(values, default=str)
    except (ValueError, RecursionError):
        raise UserError(f"--config {file}: refers to itself; remove the alias inside its own anchor") from None


def _set_dotted(values: dict[str, Any], name: str, value: Any) -> str | None:
    *sections, key = name.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            return f"--{name}: the file sets '{section}' to {values!r}, which is no section"
    values[key] = value
    return None


def _unknown_arguments(arguments: Sequence[str], known: Sequence[str]) -> list[str]:
    problems = []
    after_flag = False
    for argument in arguments:
        is_flag = argument.startswith("--")
        if is_flag:
            name = argument[2:].split("=")[0]
            near = difflib.get_close_matches(name, [*known, "config", "print-config", "print-schema"], n=1, cutoff=0)
            problems.append(f"unknown flag --{name}; did you mean --{near[0]}?")
        elif not after_flag:
            problems.append(f"unexpected argument '{argument}'")
        after_flag = is_flag and "=" not in argument  # what follows is the value of the unknown flag
    return problems


def _describe(item: Any, model: type[BaseModel], file: str | None, given: Mapping[str, Any]) -> list[str]:
    location = [
        str(part) for part in item["loc"] if not str(part).startswith(("constrained-", "literal[", "function-"))
    ]
    name = ".".join(location) or "config"
    by_flag = any(f"{name}.".startswith(f"{option}.") for option in given)
    where = f"'{name}' in {file}" if file and not by_flag else f"--{name}"
    if item["type"] == "missing":
        required = [option for option, field in walk_options(model) if field.is_required()]
        missing = [option for option in required if option == name or option.startswith(f"{name}.")]
        return [
            f"--{option} is missing: give the flag, or the key in --config FILE.yaml" for option in missing or [name]
        ]
    if item["type"] == "extra_forbidden":
        known = [option for option, _ in walk_options(model)] + list(model.model_fields)
        siblings = _keys_at(model, item["loc"][:-1]) or known
        near = difflib.get_close_matches(location[-1], siblings, n=1, cutoff=0)
        return [f"unknown key {where}; did you mean '{near[0]}'?"]
    if item["type"] == "model_type":
        return [f"{where}: got {item['input']!r}, must be a section of `key: value` lines, or be left out"]
    if item["type"] in ("too_short", "string_too_short"):
        return [f"{where}: is empty; give a value"]
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if item["type"] == "value_error" and not location:
        return [message]
    return [f"{where}: got {item['input']!r}, {message[0].lower()}{message[1:]}"]


def _joined(lines: Sequence[str]) -> list[str]:
    """One line for a value that fits none of several types: "must be a valid integer, or 'auto'"."""
    wishes: dict[str, list[str]] = {}
    for line in lines:
        got, must, wish = line.partition(", must be ")
        wishes.setdefault(got + must, []).append(wish)
    return [got + ", or ".join(wish) for got, wish in wishes.items()]


def _keys_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Names of the options beside the one at `location`, through sections and lists of sections."""
    current: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        annotation = current.model_fields[part].annotation
        current = next((arg for arg in get_args(annotation) if isinstance(arg, type)), annotation)
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []
