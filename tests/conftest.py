from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # small tensors gain nothing from more


def pytest_addoption(parser):
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder of the reference cases: ouro_tiny/ and rl_step/",
    )
    parser.addoption("--mount", action="store_true", help="let the test of a full disk mount a small one (needs root)")


@pytest.fixture
def golden(request) -> Path:
    return request.config.getoption("golden")
