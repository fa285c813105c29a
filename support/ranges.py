"""Configurations: ranges of numbers, written into a field's type (`steps: Positive = 500`), and their JSON form."""

import math
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, get_type_hints

from support.runtime import UserError


@dataclass(frozen=True)
class Range:
    low: float
    high: float = math.inf
    above: bool = False  # whether `low` itself is outside

    def holds(self, x: float) -> bool:
        return math.isfinite(x) and (self.low < x if self.above else self.low <= x) and x <= self.high

    def __str__(self) -> str:
        if self.above:
            return f"above {self.low:g}" + (f", at most {self.high:g}" if self.high < math.inf else "")
        return f"from {self.low:g} to {self.high:g}" if self.high < math.inf else f"{self.low:g} or more"


Positive = Annotated[int, Range(1)]
AtLeastTwo = Annotated[int, Range(2)]
NonNegative = Annotated[int, Range(0)]
PositiveFloat = Annotated[float, Range(0, above=True)]
NonNegativeFloat = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
LearningRate = Annotated[float | None, Range(0, above=True)]


def flag(name: str, value: object) -> str:
    """A field as it is typed: train.save_every, 3 -> --train.save-every 3"""
    return f"--{name.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def require_ranges(config: object, group: str = "") -> None:
    """Raise UserError for a field, of a configuration or of those inside it, whose number is outside its `Range`."""
    hints = get_type_hints(type(config), include_extras=True)
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            require_ranges(value, f"{group}{f.name}.")
        for limits in (m for m in getattr(hints[f.name], "__metadata__", ()) if isinstance(m, Range)):
            numbers = value if isinstance(value, tuple) else () if value is None else (value,)
            if not all(map(limits.holds, numbers)):
                raise UserError(f"{flag(group + f.name, value)} is out of its range: give a number {limits}")


def config_from_json(kind: type, values: dict):
    """A configuration from its JSON form. Raises UserError for one with flags of another version."""
    known, hints = {}, get_type_hints(kind)
    if gone := ", ".join(sorted(values.keys() - hints.keys())):
        raise UserError(f"the run was started with flags of another version ({gone}): go on with that version")
    for name, hint in hints.items():
        if name not in values and not is_dataclass(hint):
            continue  # a flag that came later
        value = values[name]
        if isinstance(value, dict):
            value = config_from_json(hint, value)
        elif isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, str) and "Path" in str(hint):
            value = Path(value)
        known[name] = value
    return kind(**known)


def flatten_config(config, group: str = "") -> dict[str, object]:
    """Every flag's name and value."""
    flags = {}
    for f in fields(config):
        value = getattr(config, f.name)
        flags |= flatten_config(value, f"{f.name}.") if is_dataclass(value) else {f"{group}{f.name}": value}
    return flags


def require_same(given: dict[str, object], known: dict[str, object], owner: str) -> None:
    """Raise UserError for a flag that contradicts what its owner, a run or a checkpoint, has."""
    for name, value in known.items():
        if given[name] != value:
            raise UserError(f"{flag(name, given[name])} contradicts {owner}, which has {value}: leave the flag out")
