"""The benchmarks: what their rows say, and what they refuse."""

import json
import sys

import pytest

import bench
import data
import model
from model import LoopedTransformer, ModelConfig

SHAPE = ModelConfig(layers=1, width=16, heads=2, vocab_size=259)


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, args)])
    model.report(bench.main)


def test_decode_compares_each_threshold_with_all_loops(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.SHAPES, "medium", SHAPE)
    few = "--tokens 12 --prompt-tokens 4 --rounds 2 --batch 2 --thresholds 0 0.5".split()
    call(monkeypatch, "decode", *few, "--out", tmp_path / "new" / "found.json")
    found = json.loads((tmp_path / "new" / "found.json").read_text())
    assert [r["threshold"] for r in found["rows"]] == [0, 0.5, 1]
    assert [r["loops"] for r in found["rows"][::2]] == [1, 4]
    assert 1 < found["rows"][1]["loops"] < 4, "random weights leave after every loop"
    for r in found["rows"]:
        assert r["ideal"] == pytest.approx(4 / r["loops"])
        assert r["of_ideal"] == pytest.approx(r["speedup"] / r["ideal"])
    assert found["rows"][-1]["speedup"] == 1
    assert found.keys() > {"argv", "commit", "torch", "device", "dtype"}
    assert "all loops" in capsys.readouterr().out


def test_decode_takes_a_checkpoint(tmp_path, monkeypatch, capsys):
    model.save(LoopedTransformer(SHAPE), tmp_path / "a", data.byte_tokenizer())
    call(monkeypatch, "decode", tmp_path / "a", "--tokens", 3, "--prompt-tokens", 2, "--rounds", 1, "--thresholds", 1)
    assert "all loops" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch 0", "--batch 0 is below 1"),
        ("--tokens 1", "--tokens 1 is below 2: the first one comes from the prompt"),
        ("--thresholds 0.5 2", "--thresholds 0.5 2.0: give numbers from 0 to 1"),
        ("none", "none is not a checkpoint folder"),
        ("--device tpu", "--device tpu is not a device"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(monkeypatch, flags, message):
    with pytest.raises(SystemExit, match=message):
        call(monkeypatch, "decode", *flags.split())
