"""Used as a library: configurations that check themselves, paths as strings, and a LoopRPT step by hand."""

import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import refused

import eval
import looprpt
from data import DataConfig
from lab import bench, study
from looprpt import Config, GateConfig, PretrainConfig, RPTConfig, TrainConfig
from model import ModelConfig
from support import ranges, runtime
from support.runtime import UserError

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (RPTConfig, {"rho": 5}, "--rpt.rho 5 is out of its range: give a number above 0, at most 1"),
        (RPTConfig, {"estimator": "foo"}, "--rpt.estimator foo is unknown: give sampled, exact"),
        (RPTConfig, {"estimator": None}, "--rpt.estimator None is unknown: give sampled, exact"),
        (RPTConfig, {"rollouts": 2.5}, "--rpt.rollouts 2.5 is out of its range: give a whole number 1 or more"),
        (RPTConfig, {"gate_only": "no"}, "--rpt.gate-only no is unknown: give True, False"),
        (RPTConfig, {"rollouts": 10**400}, "--rpt.rollouts 1000"),
        (RPTConfig, {"lr": "1e-3"}, "--rpt.lr 1e-3 is out of its range: give a number above 0"),
        (Config, {"objective": "rpt"}, "--objective rpt is unknown: give pretrain, gate, rpt"),
        (RPTConfig, {"rho": "a"}, "--rpt.rho a is out of its range"),
        (RPTConfig, {"rho": None}, "--rpt.rho None is out of its range"),
        (RPTConfig, {"lr": float("nan")}, "--rpt.lr nan is out of its range: give a number above 0"),
        (RPTConfig, {"rollouts": 1}, "--rpt.rollouts 1 gives no group to compare: give"),
        (TrainConfig, {"compile": "maybe"}, "--train.compile maybe is unknown: give auto, on, off"),
        (TrainConfig, {"save_every": 0}, "--train.save-every 0 is out of its range: give a number 1 or more"),
        (PretrainConfig, {"beta": -1}, "--pretrain.beta -1 is out of its range: give a number 0 or more"),
        (GateConfig, {"steps": -1}, "--gate.steps -1 is out of its range"),
        (ModelConfig, {"loops": 65}, "--model.loops 65 is out of its range: give a number from 1 to 64"),
        (DataConfig, {"length": 1}, "--data.length 1 is out of its range: give a number 2 or more"),
        (DataConfig, {"prompt_key": "a"}, "--data.prompt-key a came without --data.response-key: give that too"),
        (Config, {"objective": ()}, "--objective nothing: give each stage at most once, and at least one of pretrain"),
        (Config, {"objective": ("rpt", "sft")}, "--objective rpt sft is unknown: give pretrain, gate, rpt"),
        (Config, {"model": ModelConfig(loops=1)}, "--model.loops 1 leaves rpt no exit to learn: give 2 or more loops"),
        (
            Config,
            {"model": ModelConfig(width=65)},
            "--model.width 65 is not divisible by --model.heads 4: try --model.width",
        ),
        (Config, {"precision": "fp8"}, "--precision fp8 is unknown: give auto, bf16, fp32"),
        (eval.EvalConfig, {"models": ("a",), "data": DataConfig(), "batch": -1}, "--batch -1 is out of its range"),
        (bench.PlanConfig, {"gpus": (1, 0)}, "--gpus 1 0 is out of its range: give a number from 1 to 1024"),
        (study.StudyConfig, {"track": "sums"}, "--track sums is unknown: give demo, deep, text"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_configuration_checks_itself_when_it_is_made(kind, fields, message):
    with pytest.raises(UserError) as error:
        kind(**fields)
    assert isinstance(error.value, ValueError)
    assert str(error.value).startswith(message)


def test_a_change_of_a_configuration_is_checked_too():
    with pytest.raises(ValueError, match=r"^--rpt\.tau 2 is out of its range"):
        replace(RPTConfig(), tau=2)


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (bench, "rpt --rows 0", "--rows 0 is out of its range: give a number 1 or more"),
        (study, "run --seeds 0", "--seeds 0 is out of its range"),
        (eval, "a --data.val-rows 0", "--data.val-rows 0 is out of its range"),
        (looprpt, "--recipe dense --rpt.estimator sampled", "--rpt.rollouts 1 gives no group to compare"),
        (looprpt, "--model.loops 65", "--model.loops 65 is out of its range: give a number from 1 to 64"),
    ],
    ids=str,
)
def test_a_command_still_ends_in_one_sentence_about_flags(module, flags, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert refused(monkeypatch, module, *flags.split()).startswith(message)
    assert ranges.Checked.at_once, "what comes after a command checks itself again"


def test_flags_that_need_each_other_are_checked_when_all_are_known():
    assert looprpt.parse("--rpt.rollouts 1 --recipe dense".split()).rpt == looprpt.RECIPES["dense"]
    assert looprpt.parse("--model.loops 1 --objective pretrain".split()).model.loops == 1


def test_paths_may_be_strings():
    config = Config(init="out/base", data=DataConfig(path="a.jsonl", val="b.jsonl"))
    assert config.init == Path("out/base")
    assert (config.data.path, config.data.val) == (Path("a.jsonl"), Path("b.jsonl"))
    assert config.folder == Path("out/base-pretrain-rpt")
    assert Config(out="x").folder == Path("x")
    assert Config().init is None
    assert eval.EvalConfig(("a", "b"), DataConfig(), out="c").models == (Path("a"), Path("b"))


(BY_HAND,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_a_step_can_be_done_by_hand_in_a_few_lines(monkeypatch):
    seen, inner = [], looprpt.rpt_step
    monkeypatch.setattr(looprpt, "rpt_step", lambda *args, **how: seen.append(inner(*args, **how)) or seen[-1])
    found = {}
    torch.manual_seed(0)
    exec(BY_HAND.replace("batch=128", "batch=16"), found)
    assert len(seen) == 10
    assert all(output.loss.isfinite() for output in seen)
    assert found["counts"] == (96, 32), "two of a row's six target tokens are hard"
    pairs = [*zip(found["run"].student.parameters(), found["run"].teacher.parameters(), strict=True)]
    start = [
        p.detach() for p in looprpt.start_stage("rpt", found["student"], Config(rpt=found["cfg"])).teacher.parameters()
    ]
    assert any(not s.equal(t) for s, t in pairs), "the student learns, the teacher follows slowly"
    assert all(s.equal(x) for (s, _), x in zip(pairs, start, strict=True))


def test_the_docstring_of_the_step_says_what_its_caller_has_to_do():
    for word in ("count_tokens", "ema_update", "generator", "hard", "backward"):
        assert word in looprpt.rpt_step.__doc__


# Other systems


def test_without_the_module_resource_all_is_imported_and_memory_is_unknown():
    """As on Windows, which has no fcntl either."""
    script = (
        "import sys; sys.modules |= {'resource': None, 'fcntl': None}; import looprpt, eval, sample, lab.bench, torch"
    )
    script += "; from support import runs, runtime; from pathlib import Path; import tempfile"
    script += "; print(runtime.speed(0, 1, 1, 1, torch.device('cpu'))['memory_gib'])"
    script += "; lock = runs.locked(Path(tempfile.mkdtemp())); lock.__enter__(); print('in')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["None", "in"]


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_memory_is_in_the_unit_of_the_system(platform, unit, monkeypatch):
    usage = resource.getrusage(resource.RUSAGE_SELF)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: type("Usage", (), {"ru_maxrss": 2**31}))
    assert usage.ru_maxrss
    assert runtime.speed(0, 1, 1, 1, CPU)["memory_gib"] == 2 * unit
