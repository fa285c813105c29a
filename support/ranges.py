"""Configurations: they check themselves, by ranges in a field's type (`steps: Positive = 500`); their JSON form."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

from support.runtime import UserError


@dataclass(frozen=True)
class Range:
    low: float
    high: float = math.inf
    above: bool = False  # whether `low` itself is outside

    def holds(self, x: float) -> bool:
        return (self.low < x if self.above else self.low <= x) and x <= self.high and x < 1e300

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


class Checked:
    """Base of a configuration, which is checked when it is made; its paths may be strings.    group: of its flags"""

    at_once = True  # but those of a command line, which come one by one

    def __init_subclass__(cls, group: str = "") -> None:
        cls.group = group

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if Path in type_parts(hint) and (value := getattr(self, name)) is not None:
                paths = tuple(map(Path, value)) if isinstance(value, tuple) else Path(value)
                object.__setattr__(self, name, paths)
        if Checked.at_once:
            self.check()

    def check(self) -> None:
        """Raise UserError for a field, here or in a configuration inside, that is outside its Range or Literal."""
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value, parts = getattr(self, name), type_parts(hint)
            values = () if value is None and type(None) in parts else (value,)
            values = value if Ellipsis in parts and isinstance(value, tuple | list | str) else values
            number = Real if float in parts else Integral
            names = [part for part in parts if isinstance(part, str)] or [True, False] * (bool in parts)
            for text in (str(x) for x in values if isinstance(x, str | Path)):
                if text != text.encode(errors="replace").decode():
                    raise UserError(f"{flag(self.group + name, repr(text))} is not UTF-8: give text that is")
            if isinstance(value, Checked):
                value.check()
            for limits in (part for part in parts if isinstance(part, Range)):
                if not all(isinstance(x, number) and limits.holds(x) for x in values):
                    what = "whole number" if number is Integral and float in map(type, values) else "number"
                    raise UserError(f"{flag(self.group + name, value)} is out of its range: give a {what} {limits}")
            if names and not all(x in names for x in values):
                raise UserError(f"{flag(self.group + name, value)} is unknown: give {', '.join(map(str, names))}")


@contextmanager
def unchecked() -> Iterator[None]:
    """For reading a command line, whose configuration is checked as a whole: by its `check`."""
    Checked.at_once = False
    try:
        yield
    finally:
        Checked.at_once = True


def type_parts(hint: object) -> list:
    """What a field's type is made of: of a Literal its names, of an Annotated the type and its Range."""
    return [part for inner in get_args(hint) for part in type_parts(inner)] or [hint]


def config_from_json(kind: type, values: dict):
    """A configuration from its JSON form. Raises UserError for one with flags of another version."""
    hints = get_type_hints(kind)
    if gone := ", ".join(sorted(values.keys() - hints.keys())):
        raise UserError(f"the run was started with flags of another version ({gone}): go on with that version")
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    nested = {name: config_from_json(hints[name], x) for name, x in values.items() if isinstance(x, dict)}
    return kind(**known | nested)  # a flag that came later has its default


def flatten_config(config: Checked) -> dict[str, object]:
    """Every flag's name and value."""
    flags = {}
    for f in fields(config):
        value = getattr(config, f.name)
        flags |= flatten_config(value) if isinstance(value, Checked) else {config.group + f.name: value}
    return flags


def require_same(given: Checked, known: Checked, owner: str, only: tuple[str, ...] = ("",)) -> None:
    """Raise UserError for a flag that contradicts what its owner, a run or a checkpoint, has.
    only  how the names begin that are compared (default: all)"""
    flags = flatten_config(given)
    for name, value in flatten_config(known).items():
        if name.startswith(only) and flags[name] != value:
            raise UserError(f"{flag(name, flags[name])} contradicts {owner}, which has {value}: leave the flag out")
