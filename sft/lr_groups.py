"""Learning rates by parameter: layer-wise decay, multipliers by regular expression, progressive unfreezing.

Every one of them is a factor on the step's learning rate, known from a parameter's name and the step alone.
"""

import re
from collections.abc import Sequence

from sft.config import LrMultiplier, OptimSection
from sft.errors import UserError
from sft.schedule import as_steps

LAYER = re.compile(r"\blayers\.(\d+)\.")
EMBEDDING = re.compile(r"\bembed_tokens\b")

Factors = tuple[tuple[float, float], ...]
"""(factor, start) of everything that holds for a parameter; start as in LrMultiplier."""


def factors_of(name: str, optim: OptimSection, num_layers: int) -> Factors:
    """What the learning rate of the parameter `name` is multiplied with.

    Layer i of L (from 0) has layer_decay ** (L - i), the embedding layer_decay ** (L + 1), the final norm and the head
    1 (Clark et al. 2020, ELECTRA). A tied head is the embedding.
    """
    below = 0
    if layer := LAYER.search(name):
        below = num_layers - int(layer[1])
    elif EMBEDDING.search(name):
        below = num_layers + 1
    decayed: Factors = ((optim.layer_decay**below, 0.0),) if below and optim.layer_decay < 1 else ()
    return decayed + tuple((entry.factor, entry.start) for entry in optim.multipliers if re.search(entry.match, name))


def factor_at(step: int, total_steps: int, factors: Factors) -> float:
    """The product at optimizer step `step`, from 1: of nothing 1, before a start 0."""
    product = 1.0
    for factor, start in factors:
        product *= factor if step > as_steps(start, total_steps) else 0.0
    return product


def count_layers(names: Sequence[str]) -> int:
    """Decoder layers of a model with these parameters; 0 where the names do not tell."""
    return max((int(layer[1]) + 1 for name in names if (layer := LAYER.search(name))), default=0)


def check_names(optim: OptimSection, model: str) -> None:
    """Refuse what does not fit the model's parameters, before any of them is loaded.

    Raises:
        UserError: an expression matches no parameter, or layers cannot be told and are to be decayed.
    """
    if not optim.multipliers and optim.layer_decay == 1:
        return
    from sft.pretrained import parameter_names

    names = parameter_names(model)
    if optim.layer_decay < 1 and not count_layers(names):
        raise UserError(
            f"optim.layer_decay {optim.layer_decay}: the parameters of model.path {model} have no layers in their "
            f"names (the first is {names[0]}); use optim.multipliers"
        )
    for entry in optim.multipliers:
        _check_match(entry, names, model)


def check_starts(optim: OptimSection, total_steps: int) -> None:
    """Refuse what would never be trained.

    Raises:
        UserError: parameters are to begin after the run's last step.
    """
    for entry in optim.multipliers:
        if as_steps(entry.start, total_steps) >= total_steps:
            raise UserError(
                f"optim.multipliers: match '{entry.match}' starts after step {as_steps(entry.start, total_steps)}, and "
                f"the run has {total_steps}; lower start (below 1: a fraction of all steps), or set factor: 0"
            )


def _check_match(entry: LrMultiplier, names: Sequence[str], model: str) -> None:
    if not any(re.search(entry.match, name) for name in names):
        raise UserError(
            f"optim.multipliers: match '{entry.match}' is found in no parameter of model.path {model}; names look like "
            f"{names[len(names) // 2]}"
        )
