"""What several tests share: a script run in this process, its refusals, and the exit rule worked out slowly."""

import math
import runpy
import sys

import pytest
import torch

from support import runtime


def call(monkeypatch, module, *args) -> None:
    """Run a script in this process, as from the command line."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, args)])
    if hasattr(module, "main"):
        runtime.run_cli(module.main)
    else:
        runpy.run_path(module.__file__, run_name="__main__")


def refused(monkeypatch, module, *args) -> str:
    """The one sentence that a script ends with, with exit status 1 and no traceback."""
    with pytest.raises(SystemExit) as error:
        call(monkeypatch, module, *args)
    message = str(error.value.code)
    assert message.startswith("error: "), f"not refused in a sentence: {message}"
    assert "\n" not in message
    return message.removeprefix("error: ")


def slow_exit(gates, threshold: float) -> int:
    """Loops that a token takes: the first (from 1) after which it has left with this probability, or all."""
    stayed = 1.0
    for loop, gate in enumerate(gates, 1):
        stayed *= 1 - 1 / (1 + math.exp(-torch.as_tensor(gate).item()))
        if loop == len(gates) or (threshold < 1 and 1 - stayed >= threshold):
            return loop
    raise AssertionError("no gate was given")
