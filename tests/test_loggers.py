"""Where a run's numbers go besides its log: one axis, also after a kill; with the real packages."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers import call, refused
from test_faults import ENVIRONMENT, ROOT, SMALL, Cut, cut_at, log_of

import looprpt

FEW = [*SMALL, "--pretrain.steps", "10", "--rpt.steps", "6", "--train.save-every", "4"]
RUN = [*range(1, 17)]  # the steps of both stages
HALF = {f"comparison/{model}/{what}" for model in ("base", "rpt") for what in ("accuracy", "loops")}


def cut_and_resumed(monkeypatch, out, logger):
    """A run that dies in step 7 of pre-training, after a save at step 4, and one that dies in LoopRPT; then its end."""
    for step in (8, 9):
        with monkeypatch.context() as patch:
            cut_at(patch, "count_tokens", step)
            with pytest.raises(Cut):
                call(patch, looprpt, *FEW, "--out", out, "--logger", logger, "--resume")
    call(monkeypatch, looprpt, *FEW, "--out", out, "--logger", logger, "--resume")


def half_of(out):
    found = {}
    for name, model in json.loads((out / "results.json").read_text())["models"].items():
        point = next(x for x in model["buckets"]["all"]["sweep"] if x["threshold"] == 0.5)
        found |= {f"comparison/{name}/{what}": point[what] for what in ("accuracy", "loops")}
    return found


class FakeRun:
    """What W&B does of a run: a step that is not above the last one is left out."""

    def __init__(self):
        self.starts, self.history = [], {}

    def init(self, **how):
        self.starts.append(how)

    def log(self, named, step):
        if step > max(self.history, default=0):
            self.history[step] = named


def test_a_run_is_one_run_on_one_axis_and_the_comparison_is_its_end(tmp_path, monkeypatch):
    run = FakeRun()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=run.init, log=run.log))
    cut_and_resumed(monkeypatch, tmp_path / "out", "wandb")
    (run_id,) = {how["id"] for how in run.starts}
    assert run_id == json.loads((tmp_path / "out" / "run.json").read_text())["id"]
    assert [how["resume"] for how in run.starts] == ["allow"] * 3
    lines = log_of(tmp_path / "out")
    for step, line in zip(RUN, lines, strict=True):
        named = {f"{line['stage']}/{key}": x for key, x in line.items() if key not in ("stage", "step")}
        assert run.history[step].items() >= named.items()
        assert f"{line['stage']}/lr" in named
    assert run.history.keys() - {*RUN} == {17}
    assert run.history[17] == half_of(tmp_path / "out")


def test_the_comparison_of_a_run_that_was_finished_is_at_its_end_again(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=dict, log=lambda named, step: seen.append(step)))
    for resume in ([], ["--resume"]):
        call(monkeypatch, looprpt, *FEW, "--out", tmp_path / "out", "--logger", "wandb", *resume)
    assert seen == [*RUN, 17, 17]


def test_a_logger_that_is_not_installed_is_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = refused(monkeypatch, looprpt, *FEW, "--out", tmp_path / "out", "--logger", "wandb")
    assert message.startswith("--logger wandb needs a package (")
    assert message.endswith("): pip install wandb")


def test_tensorboard_has_every_step_on_one_axis(tmp_path, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "out"
    cut_and_resumed(monkeypatch, out, "tensorboard")
    found = reader.EventAccumulator(str(out / "tensorboard"))
    found.Reload()
    scalars = {tag: {x.step: x.value for x in found.Scalars(tag)} for tag in found.Tags()["scalars"]}
    lines = log_of(out)
    for stage, steps in (("pretrain", RUN[:10]), ("rpt", RUN[10:])):
        mine = [line for line in lines if line["stage"] == stage]
        for key in ("loss", "lr", "grad_norm"):
            assert scalars[f"{stage}/{key}"] == pytest.approx(
                {step: line[key] for step, line in zip(steps, mine, strict=True)}, rel=1e-5
            )
    assert {tag: scalars[tag] for tag in HALF} == {
        tag: {17: pytest.approx(x, rel=1e-6)} for tag, x in half_of(out).items()
    }


def records(file):
    """What W&B wrote, record by record: the blocks of a LevelDB log after a head of seven bytes."""
    content, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 2**15 - place % 2**15 < 7:  # no record begins in the last bytes of a block
            place += 2**15 - place % 2**15
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


KILLED = """
import itertools, os, sys, looprpt
inner, calls = looprpt.count_tokens, itertools.count(1)
looprpt.count_tokens = lambda *args: os._exit(9) if next(calls) == 8 else inner(*args)
looprpt.main()
"""


def test_wandb_has_one_run_on_one_axis_after_a_kill(tmp_path):
    pytest.importorskip("wandb")
    record = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record
    out, env = tmp_path / "out", ENVIRONMENT | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    flags = [*FEW, "--out", str(out), "--logger", "wandb", "--resume"]
    assert subprocess.run([sys.executable, "-c", KILLED, *flags], env=env, check=False).returncode == 9
    subprocess.run([sys.executable, ROOT / "looprpt.py", *flags], env=env, check=True)
    history, end = {}, time.monotonic() + 30
    while 17 not in history and time.monotonic() < end:  # a process of W&B's writes it
        time.sleep(0.1)
        files = sorted(out.glob("wandb/offline-run-*/run-*.wandb"))
        for file in files:
            lines, steps = map(record.FromString, records(file)), []
            for line in (x.history for x in lines if x.WhichOneof("record_type") == "history"):
                items = {x.key or "/".join(x.nested_key): json.loads(x.value_json) for x in line.item}
                steps.append(items["_step"])
                history[steps[-1]] = items
            assert steps == sorted({*steps}), "upwards, each once"
    assert {file.stem for file in files} == {f"run-{json.loads((out / 'run.json').read_text())['id']}"}, "one run"
    assert len(files) == 2
    assert sorted(history)[-13:] == [*RUN[4:], 17], "W&B may lose what it held when the first process died"
    for step, line in enumerate(log_of(out), 1):
        assert step not in history or history[step][f"{line['stage']}/lr"] == pytest.approx(line["lr"])
    assert history[17].items() >= half_of(out).items()
