import functools
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import tyro

from support.runtime import UserError, pick_device

torch.set_num_threads(1)  # small tensors gain nothing from more

with suppress(AttributeError):  # tyro reads the sources of all configurations again in every call: half of its time
    sources = tyro._docstrings._ClassTokenization
    sources.make = staticmethod(functools.cache(sources.make))


def pytest_addoption(parser):
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder of the reference cases: ouro_tiny/ and rl_step/",
    )
    parser.addoption("--mount", action="store_true", help="let the test of a full disk mount a small one (needs root)")
    parser.addoption("--device", default="cpu", help="where the tests marked device run: cpu, cuda, cuda:1")


def pytest_configure(config):
    config.addinivalue_line("markers", "device: takes --device and is fast there; only these: --device cuda -m device")
    try:
        pick_device(config.getoption("--device"))
    except UserError as error:
        raise pytest.UsageError(error.args[0]) from error


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in items:
        if "device" in item.fixturenames and not item.get_closest_marker("slow"):
            item.add_marker("device")


@pytest.fixture
def golden(request) -> Path:
    return request.config.getoption("golden")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return pick_device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def near(device) -> float:
    """How near float64 comes to a CPU's: the rotary angles are float32, and a GPU's cosine is another."""
    return 1e-10 if device.type == "cpu" else 1e-6


@pytest.fixture
def same_noise(monkeypatch):
    """Noise is drawn on the CPU and moved, so that a step on a device and a slow reading on the CPU draw the same."""
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, device="cpu", **how: randn(*size, **how).to(device))
