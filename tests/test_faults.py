"""Runs that are cut off, and what is lost: nothing that had been saved."""

import atexit
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import call as call_script
from helpers import forked, forking
from helpers import refused as refused_script
from safetensors.torch import load_file

import looprpt
from model import LoopedTransformer
from support import checkpoint, processes, runs, runtime, text

ROOT = Path(__file__).parent.parent
SMALL = """--data.operands 3 --model.loops 3 --model.width 16 --model.heads 2 --data.val-rows 64 --train.batch 8
    --pretrain.steps 30 --rpt.steps 20 --train.save-every 4 --rpt.rollouts 3""".split()
TIMES = {"tokens_per_s", "mfu", "memory_gib"}  # what two equal runs may differ in


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def forked_run(out, *args, rank=None, world=1, port=""):
    """A run in a process of its own, under way; and the file of what it says."""
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    env = {} if rank is None else {key: str(x) for key, x in env.items()} | {"MASTER_ADDR": "127.0.0.1"}
    said, flags = Path(f"{out}.{port}.{rank or 0}.txt"), [*SMALL, "--out", str(out), *map(str, args)]
    process = forking().Process(target=run_here, args=(str(said), flags, env | {"MASTER_PORT": port}))
    process.start()
    return process, said


def run_here(said, flags, env):
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(env)
    sys.argv = ["looprpt.py", *flags]
    runtime.run_cli(looprpt.main, distributed="RANK" in env)


def call(monkeypatch, out, *args):
    """Run in this process, which is faster."""
    call_script(monkeypatch, looprpt, *SMALL, "--out", out, *args)


def refused(monkeypatch, out, *args) -> str:
    return refused_script(monkeypatch, looprpt, *SMALL, "--out", out, *args)


def states(out, objective=("pretrain", "rpt")):
    return runs.saved_states(out, objective)


def names(out, objective=("pretrain", "rpt")):
    return [state.name for state in states(out, objective)]


def log_of(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def same(out, straight, but="none"):
    """Weights, teacher, moments and metrics, bit for bit; but: a state that was damaged."""
    files = [f.relative_to(straight) for f in straight.rglob("*.safetensors") if but not in f.parts]
    assert len(files) > 6
    for file in files:
        found, expected = load_file(out / file), load_file(straight / file)
        assert found.keys() == expected.keys(), file
        assert all(found[name].equal(expected[name]) for name in expected), file
    assert log_of(out) == log_of(straight)
    assert (
        json.loads((out / "results.json").read_text())["models"]
        == json.loads((straight / "results.json").read_text())["models"]
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("straight") / "out"
    with pytest.MonkeyPatch.context() as patch:
        call(patch, out)
    return out


class Cut(BaseException):
    """The process dies here."""


def cut_at(monkeypatch, name, calls, owner=looprpt):
    """Make the n-th call of a function the last thing that happens."""
    inner, left = getattr(owner, name), [calls]

    def wrapped(*args, **how):
        left[0] -= 1
        if left[0] == 0:
            raise Cut
        return inner(*args, **how)

    monkeypatch.setattr(owner, name, wrapped)


# What is saved


def test_a_saved_state_holds_all_that_a_run_needs_and_only_the_newest_stay(straight):
    assert names(straight) == ["rpt-000020", "rpt-000016", "pretrain-000030"]
    state = straight / "state" / "rpt-000020"
    assert {p.name for p in state.iterdir()} == {"state.json", "student", "teacher", "moments"}
    student, teacher, final = (checkpoint.load(x) for x in (state / "student", state / "teacher", straight / "rpt"))
    assert all(a.equal(b) for a, b in zip(student.parameters(), final.parameters(), strict=True))
    assert not all(a.equal(b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
    moments = load_file(state / "moments" / "model.safetensors")
    assert moments.keys() == {
        f"{kind}.{n}" for kind in ("exp_avg", "exp_avg_sq") for n, _ in student.named_parameters()
    }
    info = json.loads((state / "state.json").read_text())
    assert (info["stage"], info["step"], info["skipped"]) == ("rpt", 20, 0)
    assert runs.damage_of(state) is None


# Going on


@pytest.mark.parametrize("step", [1, 13, 31])
def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(straight, tmp_path, monkeypatch, step):
    """At several steps of both stages, before the first save and between two of them; bit for bit."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        cut_at(patch, "count_tokens", step)
        with pytest.raises(Cut):
            call(patch, out)
    call(monkeypatch, out, "--resume")
    same(out, straight)


@pytest.mark.parametrize("stop", [1, 2, 4, 7])
def test_a_run_that_was_cut_while_it_saved_goes_on_too(straight, tmp_path, monkeypatch, stop):
    """At every rename and every file of the first saves."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        cut_at(patch, "fsync" if stop % 2 else "save_file", stop * 3, owner=checkpoint)
        with pytest.raises(Cut):
            call(patch, out)
    call(monkeypatch, out, "--resume")
    same(out, straight)
    assert not [*out.rglob(".*.tmp")], "what was half-written is gone"


def test_a_run_on_the_device_goes_on_from_what_it_saved(tmp_path, monkeypatch, device):
    """As straight as it is exact: a GPU adds up in no fixed order."""
    few, runs = "--pretrain.steps 3 --rpt.steps 4 --train.save-every 2 --device".split(), ("straight", "cut")
    straight, out = (tmp_path / name for name in runs)
    call(monkeypatch, straight, *few, device)
    with monkeypatch.context() as patch:
        cut_at(patch, "count_tokens", 6)
        with pytest.raises(Cut):
            call(patch, out, *few, device)
    assert names(out) == ["rpt-000002", "pretrain-000003"]
    call(monkeypatch, out, *few, device, "--resume")
    if device.type == "cpu":
        same(out, straight)
    for mine, expected in zip(log_of(out), log_of(straight), strict=True):
        assert (mine["stage"], mine["step"]) == (expected["stage"], expected["step"])
        assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-2, abs=1e-2)


def test_resuming_needs_no_other_flag_and_refuses_another_run(straight, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        cut_at(patch, "count_tokens", 20)
        with pytest.raises(Cut):
            call(patch, out)
    assert refused(monkeypatch, out).startswith(f"--out {out} holds another run (state): give another")
    message = refused(monkeypatch, out, "--resume", "--model.width", 32)
    assert message == f"--model.width 32 contradicts the run in {out}, which has 16: leave the flag out"
    assert "--data.operands 4 contradicts" in refused(monkeypatch, out, "--resume", "--data.operands", 4)
    assert "--seed 1 contradicts" in refused(monkeypatch, out, "--resume", "--seed", 1)
    assert "--train.batch 16 contradicts" in refused(monkeypatch, out, "--resume", "--train.batch", 16)
    assert "--pretrain.steps 10 is less than the 16" in refused(monkeypatch, out, "--resume", "--pretrain.steps", 10)
    monkeypatch.setattr(sys, "argv", ["looprpt.py", "--out", str(out), "--resume", "--pretrain.steps", "30"])
    record = (out / "run.json").read_text()
    (out / "run.json").unlink()
    assert "but no run.json: restore it, or begin anew" in refused(monkeypatch, out, "--resume")
    (out / "run.json").write_text(record)
    monkeypatch.setattr(sys, "argv", ["looprpt.py", "--out", str(out), "--resume"])
    runtime.run_cli(looprpt.main)
    same(out, straight)
    starts = json.loads((out / "run.json").read_text())["starts"]
    assert [len(s["argv"]) for s in starts][-1] == 4, "every start is there, with its flags"


def test_resuming_where_nothing_was_run_starts_a_run(straight, tmp_path, monkeypatch):
    call(monkeypatch, tmp_path / "out", "--resume")
    same(tmp_path / "out", straight)


def test_a_finished_run_resumed_changes_nothing(straight, tmp_path, monkeypatch):
    shutil.copytree(straight, tmp_path / "out")
    call(monkeypatch, tmp_path / "out", "--resume")
    same(tmp_path / "out", straight)


def test_a_checkpoint_in_bf16_does_not_cost_the_next_stage_its_precision(straight, tmp_path, monkeypatch):
    for cut in (False, True):
        out = tmp_path / f"out{cut}"
        with monkeypatch.context() as patch:
            if cut:
                cut_at(patch, "count_tokens", 32)
                with pytest.raises(Cut):
                    call(patch, out, "--save-dtype", "bf16")
        call(monkeypatch, out, *["--resume"] * cut, "--save-dtype", "bf16")
    for name in ("student", "teacher"):
        files = [x / "state" / "rpt-000020" / name / "model.safetensors" for x in (straight, *tmp_path.glob("out*"))]
        assert len({f.read_bytes() for f in files}) == 1
    base = load_file(tmp_path / "outTrue" / "base" / "model.safetensors")
    assert {x.dtype for x in base.values()} == {torch.bfloat16}


# Damaged and foreign states


def partial_run(monkeypatch, out, steps):
    with monkeypatch.context() as patch:
        cut_at(patch, "count_tokens", steps)
        with pytest.raises(Cut):
            call(patch, out)


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: os.truncate(s / "student" / "model.safetensors", 100),
        lambda s: os.truncate(s / "moments" / "model.safetensors", 0),
        lambda s: (s / "state.json").write_text("{"),
        lambda s: (s / "state.json").unlink(),
        lambda s: (s / "student" / "config.json").unlink(),
        lambda s: flip(s / "teacher" / "model.safetensors"),
    ],
    ids=["student cut", "moments empty", "state not JSON", "no state", "no config", "one bit"],
)
def test_a_damaged_newest_state_is_skipped(straight, tmp_path, monkeypatch, capsys, damage):
    out = tmp_path / "out"
    partial_run(monkeypatch, out, 43)
    first, second, _ = states(out)
    damage(first)
    capsys.readouterr()
    call(monkeypatch, out, "--resume")
    shown = capsys.readouterr().out
    assert f"{first} is skipped (" in shown
    assert f"rpt goes on after step 8, from {second}" in shown
    same(out, straight)


def flip(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def test_a_state_damaged_twice_is_renamed_twice(straight, tmp_path, monkeypatch):
    out = tmp_path / "out"
    partial_run(monkeypatch, out, 43)
    for again in range(2):
        flip(out / "state" / "rpt-000012" / "student" / "model.safetensors")
        if not again:
            with monkeypatch.context() as patch:
                cut_at(patch, "count_tokens", 6)
                with pytest.raises(Cut):
                    call(patch, out, "--resume")
    call(monkeypatch, out, "--resume")
    same(out, straight)
    assert len([*(out / "state").glob("rpt-000012.damaged-*")]) == 2


def test_a_damaged_last_state_of_a_finished_stage_gives_way_to_its_checkpoint(straight, tmp_path, monkeypatch):
    """Not to an older state of that stage."""
    out = tmp_path / "out"
    partial_run(monkeypatch, out, 32)
    assert names(out) == ["pretrain-000030", "pretrain-000028"]
    flip(states(out)[0] / "student" / "model.safetensors")
    call(monkeypatch, out, "--resume")
    same(out, straight, but="pretrain-000030")


def test_a_disk_error_is_not_taken_for_damage(tmp_path, monkeypatch):
    out = tmp_path / "out"
    partial_run(monkeypatch, out, 43)

    def broken(file):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "checksum", broken)
        message = refused(patch, out, "--resume")
    assert message.startswith("the run can't go on ([Errno 5] Input/output error): mend that")
    assert names(out)[0] == "rpt-000012"


def test_if_every_state_is_damaged_the_stage_starts_again(straight, tmp_path, monkeypatch):
    out = tmp_path / "out"
    partial_run(monkeypatch, out, 45)
    for state in states(out):
        (state / "state.json").write_text("{}")
    call(monkeypatch, out, "--resume")
    same(out, straight, but="pretrain-000030")


def test_a_finished_stage_without_its_state_is_taken_from_its_checkpoint_which_names_more_ends(tmp_path, monkeypatch):
    """A checkpoint says that a turn's end may end a text, too; the states of the run don't."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(20)))
    out, few = tmp_path / "out", ["--train.batch", 2, "--data.path", tmp_path / "a.jsonl"]
    with monkeypatch.context() as patch:
        cut_at(patch, "count_tokens", 43)
        with pytest.raises(Cut):
            call(patch, out, *few)
    assert checkpoint.load_config(out / "base").eos_token_id == (0, 2)
    (out / "state" / "pretrain-000030" / "state.json").write_text("{}")
    call(monkeypatch, out, *few, "--resume")
    assert (out / "results.json").exists()


def test_a_state_of_another_model_is_refused_by_name(tmp_path, monkeypatch):
    out = tmp_path / "out"
    partial_run(monkeypatch, out, 43)
    state = states(out)[0]
    shutil.rmtree(state / "student")
    checkpoint.save(LoopedTransformer(replace(checkpoint.load_config(out / "base"), width=24)), state / "student")
    info = json.loads((state / "state.json").read_text())
    info["sha256"] = {name: runs.checksum(state / name) for name in info["sha256"]}
    (state / "state.json").write_text(json.dumps(info))
    message = refused(monkeypatch, out, "--resume")
    owner = f"{state} (remove it if it is another run's)"
    assert message == f"--model.width 16 contradicts {owner}, which has 24: leave the flag out"


def test_states_are_ordered_by_the_stages_of_the_run_and_by_number(tmp_path):
    steps = ("gate-000004", "pretrain-999996", "pretrain-1000000", "rpt-000009", "copy-000001", "rpt-000010.damaged-0a")
    for name in steps:
        (tmp_path / "state" / name).mkdir(parents=True)
    expected = ["gate-000004", "rpt-000009", "pretrain-1000000", "pretrain-999996"]
    assert names(tmp_path, ("pretrain", "rpt", "gate")) == expected


def test_stages_in_another_order_keep_their_states(tmp_path, monkeypatch):
    """The gate last: its state, with the moments of the gate alone, goes on bit for bit."""
    order = ["--objective", "pretrain", "rpt", "gate", "--gate.steps", 12]
    for out in (tmp_path / "straight", tmp_path / "out"):
        with monkeypatch.context() as patch:
            if out.name == "out":
                cut_at(patch, "count_tokens", 30 + 20 + 7)
                with pytest.raises(Cut):
                    call(patch, out, *order)
                assert names(out, ("pretrain", "rpt", "gate")) == ["gate-000004", "rpt-000020"]
            else:
                call(patch, out, *order)
    call(monkeypatch, tmp_path / "out", "--resume")
    same(tmp_path / "out", tmp_path / "straight")


# Steps that go wrong


def poison(monkeypatch, bad):
    """Make the loss of these calls of the RL step not finite."""
    inner, calls = looprpt.rpt_step, iter(range(1, 10_000))

    def poisoned(*args, **how):
        found = inner(*args, **how)
        return found._replace(loss=found.loss * float("nan")) if next(calls) in bad else found

    monkeypatch.setattr(looprpt, "rpt_step", poisoned)


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch):
    poison(monkeypatch, {3, 4, 9})
    seen, inner = [], looprpt.ema_update
    monkeypatch.setattr(looprpt, "ema_update", lambda *a: seen.append(1) or inner(*a))
    call(monkeypatch, tmp_path / "out")
    rpt = [line for line in log_of(tmp_path / "out") if line["stage"] == "rpt"]
    assert [line["skipped"] for line in rpt] == [0, 0, 1, 2, 2, 2, 2, 2] + [3] * 12
    assert [line["step"] for line in rpt if line["grad_norm"] is None] == [3, 4, 9]
    assert len(seen) == 17
    assert all(p.isfinite().all() for p in checkpoint.load(tmp_path / "out" / "rpt").parameters())
    info = json.loads((tmp_path / "out" / "state" / "rpt-000020" / "state.json").read_text())
    assert info["skipped"] == 3


def test_a_run_with_skipped_steps_goes_on_the_same(tmp_path, monkeypatch):
    for name in ("straight", "cut"):
        out = tmp_path / name
        with monkeypatch.context() as patch:
            poison(patch, {3, 9})
            if name == "cut":
                cut_at(patch, "count_tokens", 30 + 13)
                with pytest.raises(Cut):
                    call(patch, out)
            else:
                call(patch, out)
    call(monkeypatch, tmp_path / "cut", "--resume")
    same(tmp_path / "cut", tmp_path / "straight")


def test_too_many_bad_steps_in_a_row_stop_the_run_at_its_last_good_state(tmp_path, monkeypatch):
    poison(monkeypatch, {2, 6, 7, 8, 9})
    message = refused(monkeypatch, tmp_path / "out", "--train.max-bad-steps", 3)
    state = tmp_path / "out" / "state" / "rpt-000004"
    assert message == (
        "the loss or its gradient was not finite in 3 steps in a row, up to rpt step 8: "
        f"the last good checkpoint is {state}; try a smaller --rpt.lr than 0.0038"
    )
    assert runs.damage_of(state) is None
    assert not (tmp_path / "out" / "state" / "rpt-000008").exists(), "a bad step's weights are not saved"


def test_a_state_under_another_name_is_not_taken_and_nobody_elses_folder_is_removed(tmp_path, monkeypatch):
    out = tmp_path / "out"
    call(monkeypatch, out, "--objective", "pretrain", "--pretrain.steps", 8)
    newest, before = states(out)
    newest.rename(newest.with_name("pretrain-000009"))
    assert runs.damage_of(out / "state" / "pretrain-000009") == "its state.json is another's"
    assert runs.latest_state(out, "pretrain") == before
    empty = json.loads((before / "state.json").read_text()) | {"sha256": {}}
    (before / "state.json").write_text(json.dumps(empty))
    assert runs.damage_of(before), "a state without files"
    for name in (".mine.x.tmp", ".base.x.tmp"):
        (tmp_path / "new" / name).mkdir(parents=True)
    call(monkeypatch, tmp_path / "new", "--objective", "pretrain", "--pretrain.steps", 1)
    assert [path.name for path in (tmp_path / "new").glob(".*.tmp")] == [".mine.x.tmp"]


def test_a_stage_that_ends_in_bad_steps_is_no_success_when_resumed(tmp_path, monkeypatch):
    poison(monkeypatch, range(1, 1000))
    few = ["--rpt.steps", 5, "--train.max-bad-steps", 5]
    for resume in ([], ["--resume"]):
        assert "not finite in 5 steps in a row" in refused(monkeypatch, tmp_path / "out", *few, *resume)
    assert not (tmp_path / "out" / "rpt").exists()


def test_an_echo_of_a_signal_is_not_a_second_one():
    with processes.stop_signals() as asked:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert asked == ["SIGTERM"]


def test_a_full_disk_anywhere_ends_in_a_sentence(tmp_path, monkeypatch):
    def full(*args, **how):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "Progress", full)
    message = refused(monkeypatch, tmp_path / "out")
    assert message.startswith("the run can't go on ([Errno 28] No space left on device): mend that, or make room")


# Another length, other data, another process


def test_more_steps_than_a_finished_stage_had_are_refused_and_others_go_on(tmp_path, monkeypatch):
    out = tmp_path / "out"
    partial_run(monkeypatch, out, 43)
    record = (out / "run.json").read_text()
    message = refused(monkeypatch, out, "--resume", "--pretrain.steps", 40)
    assert message == f"--pretrain.steps 40 contradicts the run in {out}, which has 30: leave the flag out"
    assert "--pretrain.beta 9.0 contradicts" in refused(monkeypatch, out, "--resume", "--pretrain.beta", 9)
    assert (out / "run.json").read_text() == record, "nothing was begun"
    call(monkeypatch, out, "--resume", "--rpt.steps", 24)
    assert names(out) == ["rpt-000024", "rpt-000020", "pretrain-000030"]
    assert [line["step"] for line in log_of(out)] == [*range(1, 31), *range(1, 25)]
    assert json.loads((out / "run.json").read_text())["config"]["rpt"]["steps"] == 24
    assert "--rpt.steps 28 contradicts" in refused(monkeypatch, out, "--resume", "--rpt.steps", 28)
    call(monkeypatch, out, "--resume", "--rpt.steps", 24)


@pytest.mark.parametrize("name", ["path", "val", "tokenizer"])
def test_a_data_file_that_changed_since_the_run_began_is_refused(tmp_path, monkeypatch, name):
    files = {flag: tmp_path / f"{flag}.jsonl" for flag in ("path", "val")}
    for flag, file in files.items():
        file.write_text("".join(json.dumps({"text": f"{flag} {i}"}) + "\n" for i in range(20)))
    files["tokenizer"] = tmp_path / "tokenizer.json"
    text.byte_tokenizer().save(str(files["tokenizer"]))
    flags = [x for flag, file in files.items() for x in (f"--data.{flag}", file)]
    out, few = tmp_path / "out", ["--train.batch", 2, *flags]
    with monkeypatch.context() as patch:
        cut_at(patch, "count_tokens", 6)
        with pytest.raises(Cut):
            call(patch, out, *few)
    found = json.loads((out / "run.json").read_text())["sha256"]
    assert found == {flag: hashlib.sha256(file.read_bytes()).hexdigest() for flag, file in files.items()}
    content, record = files[name].read_text(), (out / "run.json").read_text()
    files[name].write_text(content + "\n")
    message = refused(monkeypatch, out, *few, "--resume")
    expected = f"--data.{name} {files[name]} has changed since the run began: restore it, or begin anew"
    assert message == expected
    assert (out / "run.json").read_text() == record
    files[name].write_text(content)
    call(monkeypatch, out, *few, "--resume")


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_process_is_kept_out_of_a_run_until_the_first_one_ends_however_it_does(
    tmp_path, monkeypatch, capsys, count
):
    out, many = tmp_path / "out", ["--pretrain.steps", 100_000, "--train.save-every", 5]
    problem = f"--out {out} is in use by another run: wait for its end, or give another"
    programs = start(out, *many, count=count)
    try:
        wait_for(out, "pretrain", 6, *programs[0])
        if count == 1:
            assert refused(monkeypatch, out, *many, "--resume") == problem
        else:
            (second, said), (other, _) = others = start(out, *many, "--resume", count=count)
            programs += others
            second.join(60)
            other.join(60)
            assert (second.exitcode, other.exitcode) == (1, 1)
            assert f"error: {problem}" in said.read_text().splitlines()
        assert programs[0][0].is_alive()
    finally:
        for program, _ in programs:
            program.kill()
            program.join()
    done = names(out)[0]
    step = int(done.partition("-")[2])
    capsys.readouterr()
    call(monkeypatch, out, "--resume", "--pretrain.steps", step + 1, "--rpt.steps", 1)
    assert f"pretrain goes on after step {step}, from {out / 'state' / done}" in capsys.readouterr().out


def test_a_run_that_has_not_saved_anything_keeps_others_out_too(tmp_path, monkeypatch):
    with runs.locked(tmp_path / "out"):
        assert refused(monkeypatch, tmp_path / "out").endswith(
            "is in use by another run: wait for its end, or give another"
        )
    call(monkeypatch, tmp_path / "out", "--pretrain.steps", 1, "--rpt.steps", 1)


# Signals, disks


def start(out, *args, count):
    """The processes of a run, each with the file of what it says."""
    port = str(random.randrange(20_000, 60_000))
    return [forked_run(out, *args, rank=rank if count > 1 else None, world=count, port=port) for rank in range(count)]


def wait_for(out, stage, step, process, said, seconds=60):
    """Until the log has this step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.is_alive():
        log = out / "log.jsonl"
        if log.exists() and f'"stage": "{stage}", "step": {step},' in log.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"{stage} step {step} was not seen: {said.read_text()}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_with_a_save_and_status_0(tmp_path, number):
    out = tmp_path / "out"
    many = ["--pretrain.steps", 100_000, "--train.save-every", 100_000]
    run, said = forked_run(out, *many)
    wait_for(out, "pretrain", 5, run, said)
    os.kill(run.pid, number)
    run.join(60)
    assert run.exitcode == 0, said.read_text()
    (state,) = states(out)
    assert f"stopped by {number.name}, saved in {state}: --resume goes on" in " ".join(said.read_text().split())
    assert runs.damage_of(state) is None
    assert log_of(out)[-1]["step"] == int(state.name.partition("-")[2]), "the last step is in the log and in the state"
    assert json.loads((out / "run.json").read_text())["finished"] is None


def test_a_full_disk_ends_the_run_in_a_sentence_and_leaves_what_was_saved(straight, tmp_path, monkeypatch, request):
    """A system call that says it is full; with --mount, a disk of a few hundred KiB."""
    disk, out = tmp_path / "disk", tmp_path / "disk" / "out"
    disk.mkdir()
    mounted = request.config.getoption("--mount")
    if mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], check=True)
    try:
        with monkeypatch.context() as patch:
            if not mounted:
                inner, left = checkpoint.save_file, [9]

                def full(*args, **how):
                    left[0] -= 1
                    if left[0] < 0:
                        raise OSError(28, "No space left on device")
                    inner(*args, **how)

                patch.setattr(checkpoint, "save_file", full)
            message = refused(patch, out, "--train.keep", 100)
        assert "can't be written" in message
        assert "what was saved before is intact" in message
        assert states(out)
        assert all(runs.damage_of(state) is None for state in states(out))
        assert not [p for p in (out / "state").iterdir() if p.name.startswith(".")], "nothing half-written stays"
        shutil.copytree(out, tmp_path / "out")
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)
    call(monkeypatch, tmp_path / "out", "--resume", "--train.keep", 2)
    same(tmp_path / "out", straight)


# Processes


def agents(out, *args):
    """Two agents of torchrun with a process each, as on two machines."""
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
    meet += ["--master-port", str(random.randrange(20_000, 60_000)), "--node-rank"]
    flags = [*SMALL, "--out", str(out), "--objective", "pretrain", "--data.val-rows", "8", "--train.timeout", "20"]
    script = [str(ROOT / "looprpt.py"), *flags, *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    begin = [sys.executable, "-m", "torch.distributed.run", *meet]
    return [subprocess.Popen([*begin, rank, *script], **pipes) for rank in "01"]


@pytest.mark.slow
def test_a_machine_that_dies_ends_the_other_in_a_sentence_and_both_go_on(tmp_path):
    out = tmp_path / "out"
    programs = agents(out, "--pretrain.steps", 100_000, "--train.save-every", 5)
    try:
        end, log = time.monotonic() + 60, out / "log.jsonl"
        while time.monotonic() < end and not (log.exists() and '"step": 12,' in log.read_text()):
            time.sleep(0.1)
        one = programs[1].pid
        workers = Path(f"/proc/{one}/task/{one}/children").read_text().split()
        assert len(workers) == 1
        for pid in (one, *workers):
            os.kill(int(pid), signal.SIGKILL)
        start = time.monotonic()
        _, error = programs[0].communicate(timeout=60)
        assert time.monotonic() - start < 40
    finally:
        for program in programs:
            program.terminate()  # an agent passes it on
            program.communicate()
    assert programs[0].returncode == 1, error[-3000:]
    (last,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert last.startswith("error: another process is gone (")
    state = states(out)[0]
    assert last.endswith(f"--resume goes on from {state}")
    assert "Traceback" not in error.partition(last)[0]  # after it, torchrun has its own
    assert runs.damage_of(state) is None
    done = int(state.name.partition("-")[2])
    ends = [
        (*program.communicate(timeout=60), program.returncode)
        for program in agents(out, "--resume", "--pretrain.steps", done + 2)
    ]
    assert [code for *_, code in ends] == [0, 0], ends
    assert f"pretrain goes on after step {done}, from {state}" in ends[0][0]
    assert [line["step"] for line in log_of(out) if line["stage"] == "pretrain"] == [*range(1, done + 3)]


class Late:
    """Lets the other threads run in the midst of Python's end."""

    def __init__(self):
        self.me = self  # so that only the end frees it

    def __del__(self):
        time.sleep(1)


def end_early(rank, folder):
    """A process that ends while a thread of gloo waits to free a tensor, as it may for a moment after a collective."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    dist.barrier()
    atexit.register(Path(f"{folder}/atexit-{rank}").touch)

    def main():
        time.sleep(rank / 2)  # so that the first has let go of its tensor when the second joins
        gc.set_threshold(10**6)
        Late()
        sys.setswitchinterval(1000)  # from here on the threads wait for this one
        dist.all_reduce(torch.ones(1), async_op=True)
        until = time.monotonic() + 2
        while time.monotonic() < until:
            pass

    runtime.run_cli(main, distributed=True)


def test_a_process_ends_well_while_gloo_holds_a_tensor(tmp_path):
    """Python's own end would abort it, and a run that is done looks failed."""
    mp.spawn(end_early, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "atexit-1").exists()  # a logger's last lines, say


def go_on(rank, world, out, kind, meet):
    """One of several processes that take up a run; without noise, which depends on the process."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=meet)
    sys.argv = ["looprpt.py", *SMALL, *QUIET, "--out", out, "--resume", "--dist", kind]
    runtime.run_cli(looprpt.main, distributed=True)


def close(folder, other):
    found, expected = (load_file(x / "model.safetensors") for x in (folder, other))
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


QUIET = "--rpt.noise-std 0 --rpt.estimator exact".split()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, monkeypatch, kind):
    """One process, then two, then one: as one process alone would have done, up to rounding."""
    with monkeypatch.context() as patch:
        call(patch, tmp_path / "straight", *QUIET)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        cut_at(patch, "count_tokens", 20)
        with pytest.raises(Cut):
            call(patch, out, *QUIET)
    forked(go_on, 2, str(out), kind, str(random.randrange(20_000, 60_000)), count=2)
    assert [s["processes"] for s in json.loads((out / "run.json").read_text())["starts"]] == [1, 2]
    for name in (
        "rpt/model.safetensors",
        "state/rpt-000020/teacher/model.safetensors",
        "state/rpt-000020/moments/model.safetensors",
    ):
        found, expected = load_file(out / name), load_file(tmp_path / "straight" / name)
        assert found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(
                found[key], expected[key], rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
            )
    shutil.rmtree(out / "rpt")
    (out / "results.json").unlink()
    shutil.rmtree(states(out)[0])
    assert names(out)[0] == "rpt-000016"
    call(monkeypatch, out, *QUIET, "--resume")
    close(out / "rpt", tmp_path / "straight" / "rpt")


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing(straight, tmp_path, monkeypatch):
    """SIGKILL, again and again; what was saved is sound each time, and the end is the straight run's, bit for bit."""
    out, moments = tmp_path / "out", random.Random(0)
    kills, fresh, started = 0, 0, time.monotonic()  # fresh: kills since the run began from nothing
    while kills < 20:
        steps = (out / "log.jsonl").read_text().count("\n") if (out / "log.jsonl").exists() else 0
        run, _ = forked_run(out, "--train.save-every", 1, "--resume")  # so that many kills fall into a save
        wait = time.monotonic() + 30
        while time.monotonic() < wait and run.is_alive():  # it is under way
            if (out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count("\n") > steps:
                break
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.15))
        run.kill()
        run.join()
        kills, fresh = kills + 1, fresh + 1
        before = states(out)
        assert len(before) <= 4
        sound = [state for state in before if runs.damage_of(state) is None]
        assert sound or fresh < 3, "a sound state is there after every kill"
        if (out / "results.json").exists():
            shutil.rmtree(out)  # it got to its end: once more from the start
            fresh = 0
    call(monkeypatch, out, "--resume")
    same(out, straight, but="rpt-000016")  # whether that is kept depends on where the last kill fell
    assert time.monotonic() - started < 600
