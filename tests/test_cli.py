"""What a person types, sees and is refused: the whole run, the files it leaves, and every README command."""

import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import call, refused

import data
import eval
import looprpt
from model import LoopedTransformer
from support import checkpoint, ranges, runs, runtime, text

ROOT = Path(__file__).parent.parent
SMALL = "--data.operands 3 --model.loops 3 --data.val-rows 1000 --train.batch 64".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small complete run: pre-training, then LoopRPT."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        steps = "--pretrain.steps 500 --pretrain.lr 3e-3 --rpt.steps 150 --rpt.lr 2e-3".split()
        call(patch, looprpt, *SMALL, *steps, "--out", folder / "out")
    return folder / "out"


# The whole run


def assert_learned_to_leave(base, rpt):
    base_half, rpt_half = (next(s for s in b["sweep"] if s["threshold"] == 0.5) for b in (base, rpt))
    assert rpt_half["accuracy"] > base["by_loop"][-1] - 0.03
    assert rpt_half["loops"] < 0.85 * base_half["loops"]


def test_training_raises_accuracy_and_then_lowers_the_loops(run):
    base, rpt = (m["buckets"]["all"] for m in json.loads((run / "results.json").read_text())["models"].values())
    assert base["by_loop"][0] < 0.85 < base["by_loop"][-1], "the base needs its loops"
    assert_learned_to_leave(base, rpt)


def test_the_dense_recipe_lowers_the_loops_too(run, tmp_path, monkeypatch):
    few = [*SMALL[:2], *SMALL[4:], "--init", run / "base", "--objective", "rpt", "--rpt.steps", 150, "--rpt.lr", 2e-3]
    call(monkeypatch, looprpt, *few, "--recipe", "dense", "--out", tmp_path / "out")
    models = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    assert_learned_to_leave(*(m["buckets"]["all"] for m in models.values()))


def test_results_json_has_what_eval_promises(run):
    found = json.loads((run / "results.json").read_text())
    assert found.keys() == {"models", "argv", "commit", "torch", "device", "seed"}
    assert list(found["models"]) == ["base", "rpt"]
    for m in found["models"].values():
        assert list(m["buckets"]) == ["all", "easy", "medium", "hard", "depth_1", "depth_2", "depth_3"]
        for name, bucket in m["buckets"].items():
            assert bucket.keys() >= {"tokens", "by_loop", "ce", "sweep"}
            assert len(bucket["by_loop"]) == 3
            assert [s["threshold"] for s in bucket["sweep"]] == [i / 10 for i in range(1, 10)]
            if name.startswith("depth_"):
                assert bucket["tokens"] == 1000
            for point in bucket["sweep"] * bool(bucket["tokens"]):
                assert point.keys() == {"threshold", "accuracy", "loops"}
                assert 0 <= point["accuracy"] <= 1 <= point["loops"] <= 3
    sizes = [[b["tokens"] for b in m["buckets"].values()] for m in found["models"].values()]
    assert sizes[0] == sizes[1], "the buckets are fixed by the first model"


def test_the_log_has_a_line_for_every_step(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [(x["stage"], x["step"]) for x in lines] == [
        (stage, step + 1) for stage, n in (("pretrain", 500), ("rpt", 150)) for step in range(n)
    ]
    terms = {"loss", "pg", "rep", "ent", "kl", "distill", "reward"}
    every = {"stage", "step", "loss", "loops", "entropy", "saturation", "grad_norm", "lr", "skipped", "tokens_per_s"}
    assert lines[-1].keys() == terms | every | {"memory_gib", "mfu"}
    assert lines[0].keys() == every | {"last_ce", "memory_gib", "mfu"}
    assert lines[0]["loss"] > 1.3 > lines[499]["loss"]
    rates = [lines[i]["lr"] for i in (0, 19, 20, 499, 500, 519, 520)]  # 20 steps of warm-up, then as many of 150
    falls = [3e-3 * (0.5 + 0.5 * math.cos(math.pi * n / 481)) for n in (1, 480)]
    assert rates[:4] == pytest.approx([3e-3 / 20, 3e-3, *falls])
    assert rates[4:] == pytest.approx([2e-3 / 20, 2e-3, 2e-3 * (0.5 + 0.5 * math.cos(math.pi / 131))])
    assert 0 < lines[-1]["lr"] < 1e-6


def test_run_json_says_what_was_run(run):
    found = json.loads((run / "run.json").read_text())
    assert found.keys() == {"id", "config", "chosen", "parameters", "sha256", "starts", "finished"}
    assert found["finished"]
    assert found["config"]["rpt"]["steps"] == 150
    assert found["parameters"] == sum(p.numel() for p in checkpoint.load(run / "base").parameters())
    (start,) = found["starts"]
    known = {"time", "processes", "dirty", "argv", "commit", "torch", "device", "python", "versions", "seed"}
    assert start.keys() == known
    assert ranges.config_from_json(looprpt.Config, found["config"]).data.operands == 3


def test_eval_repeats_the_runs_own_numbers(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "results.json"
    call(monkeypatch, eval, run / "base", run / "rpt", *SMALL[:2], *SMALL[4:6], "--out", out)
    assert json.loads(out.read_text())["models"] == json.loads((run / "results.json").read_text())["models"]
    shown = capsys.readouterr().out
    assert "held-out tokens" in shown
    models = json.loads(out.read_text())["models"]
    for bucket in ("all", "depth_3"):
        x = models["rpt"]["buckets"][bucket]
        loops, accuracy = eval.at_threshold_half(x)
        cells = [f"{100 * a:.1f}" for a in (*x["by_loop"], accuracy)]
        row = [bucket, "rpt", f"{x['tokens']:,}", *cells, f"{loops:.2f}"]
        assert row in [line.split() for line in shown.splitlines()]


def test_scores_agree_with_a_plain_count(run):
    net, config = checkpoint.load(run / "rpt"), data.DataConfig(operands=3, val_rows=50)
    source = data.source(None, config, batch=16, seed=0, held_out=True)
    s = eval.score(net, source, device=torch.device("cpu"))
    found = eval.summarize(s, eval.buckets(s)["depth_3"])
    right, loops, n = [0, 0, 0], 0, 0
    for i in range(source.batches):
        batch = source.batch(i)
        out = net(batch.inputs)
        for b in range(len(batch.inputs)):
            n += 1
            for loop in range(3):
                right[loop] += net.logits(out.hidden[b, 4, loop]).argmax() == batch.targets[b, 4]
            left = torch.sigmoid(out.gate[b, 4, 0])
            both = left + (1 - left) * torch.sigmoid(out.gate[b, 4, 1])
            loops += 1 if left >= 0.3 else 2 if both >= 0.3 else 3
    assert found["tokens"] == n == 50
    assert found["by_loop"] == pytest.approx([r.item() / n for r in right])
    assert found["sweep"][2]["loops"] == pytest.approx(loops / n)


def test_buckets_are_those_of_the_first_model_at_its_own_limits():
    last, zeros = torch.tensor([0.4, 0.5, 0.9, 1.0, 1.5, 3.0]), torch.zeros(6, 3)
    correct = torch.ones(6, 3, dtype=torch.bool)
    first = eval.Scores(correct, zeros, last, zeros, zeros, torch.arange(6), None)
    other = first._replace(entropy=last.flip(0) * 2, correct=last[:, None].expand(6, 3) > 1)
    found = eval.results({"a": first, "b": other}, device=torch.device("cpu"), seed=0)["models"]
    for name in ("a", "b"):
        sizes = {bucket: b["tokens"] for bucket, b in found[name]["buckets"].items()}
        assert sizes == {"all": 6, "easy": 2, "medium": 1, "hard": 2}
    assert [found["b"]["buckets"][x]["by_loop"][0] for x in ("easy", "medium", "hard")] == [0, 0, 1]


def test_a_stage_starts_from_a_checkpoint_and_takes_its_shape(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = [*SMALL[:2], *SMALL[4:], "--rpt.steps", 2, "--gate.steps", 2]
    call(monkeypatch, looprpt, "--init", run / "base", "--objective", "gate", "rpt", *few)
    out = tmp_path / "out" / "base-gate-rpt"
    assert list(json.loads((out / "results.json").read_text())["models"]) == ["base", "gate", "rpt"]
    base, gate = checkpoint.load(run / "base"), checkpoint.load(out / "gate")
    changed = [n for (n, p), q in zip(base.named_parameters(), gate.parameters(), strict=True) if not p.equal(q)]
    assert changed == ["early_exit_gate.weight", "early_exit_gate.bias"]


def test_fewer_loops_may_be_asked_of_a_checkpoint_but_no_other_shape(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = [*SMALL[:2], *SMALL[4:], "--rpt.steps", 1, "--init", run / "base", "--objective", "rpt"]
    call(monkeypatch, looprpt, *few, "--model.loops", 2, "--out", "two")
    assert checkpoint.load_config(tmp_path / "two" / "rpt").loops == 2
    message = refused(monkeypatch, looprpt, *few, "--model.width", 128, "--out", "wide")
    assert message.startswith("--model.width 128 contradicts the checkpoint")
    assert not (tmp_path / "wide").exists()


def test_more_loops_than_the_checkpoint_was_trained_with_get_a_note(run, tmp_path, monkeypatch, capsys):
    few = [*SMALL[:2], *SMALL[4:], "--rpt.steps", 1, "--init", run / "base", "--objective", "rpt"]
    note = f"{run / 'base'} was trained with 3 loops, --model.loops is 5"
    for loops, shown in ((2, False), (3, False), (5, True)):
        call(monkeypatch, looprpt, *few, "--model.loops", loops, "--out", tmp_path / str(loops))
        found = capsys.readouterr().out
        assert (note in found.splitlines()) == ("was trained with" in found) == shown
    assert checkpoint.load_config(tmp_path / "5" / "rpt").loops == 5


@pytest.mark.parametrize("name", ["[lr=1e-3]", "[/x]", ":cat: [red]"])
def test_a_path_is_printed_as_it_is(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path(f"{name}.jsonl").parent.mkdir(exist_ok=True)
    Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": 40 * str(i)}) + "\n" for i in range(40)))
    few = "--pretrain.steps 1 --rpt.steps 1 --model.width 16 --train.batch 4 --data.length 32".split()
    call(monkeypatch, looprpt, *few, "--data.path", f"{name}.jsonl", "--out", name, "--objective", "pretrain")
    shown = capsys.readouterr().out
    assert f"; the run goes to {name}\n" in shown
    call(
        monkeypatch,
        looprpt,
        *few,
        "--data.path",
        f"{name}.jsonl",
        "--init",
        f"{name}/base",
        "--out",
        "b",
        "--objective",
        "rpt",
    )
    call(monkeypatch, eval, f"{name}/base", "b/rpt", f"{name}/base", "--data.path", f"{name}.jsonl")
    shown = capsys.readouterr().out
    assert f" {name}/base " in shown, "in a table"
    assert name in refused(monkeypatch, looprpt, "--out", name)
    call(monkeypatch, looprpt, "--out", name, "--resume")


@pytest.mark.parametrize(
    "flags",
    [
        "--recipe dense",
        "--recipe dense --rpt.estimator sampled --rpt.rollouts 8 --rpt.floor 1",
        "--precision bf16",
        "--model.layers 2 --model.kv-heads 2 --model.loops 2",
    ],
)
def test_the_other_forms_train_too(tmp_path, monkeypatch, flags):
    few = "--pretrain.steps 2 --rpt.steps 2 --data.val-rows 20 --train.batch 8".split()
    call(monkeypatch, looprpt, *few, *flags.split(), "--out", tmp_path / "out")
    config = looprpt.parse([*few, *flags.split()]).rpt
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in log] == [(s, n) for s in ("pretrain", "rpt") for n in (1, 2)]
    assert all(line["skipped"] == 0 and line["grad_norm"] > 0 for line in log)
    loops = checkpoint.load_config(tmp_path / "out" / "rpt").loops
    assert log[0]["last_ce"] == pytest.approx(math.log(8), rel=0.05), "random weights know nothing of eight symbols"
    assert 0 < log[0]["entropy"] <= math.log(loops)
    for line in log[2:]:
        weights = {"pg": 1, "rep": 1, "distill": config.distill_weight, "ent": config.ent_weight}
        total = sum(weight * line[name] for name, weight in (weights | {"kl": config.kl_weight}).items())
        assert line["loss"] == pytest.approx(total, rel=1e-4, abs=1e-5)


# Refusals


def test_another_run_is_never_overwritten(run, monkeypatch):
    assert refused(monkeypatch, looprpt, "--out", run) == (
        f"--out {run} holds another run (base, rpt, state, results.json): give another, or --resume this one"
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(run, tmp_path, monkeypatch):
    few = [*SMALL[:2], *SMALL[4:], "--pretrain.steps", 20, "--rpt.steps", 3, "--out", tmp_path / "out"]
    message = refused(monkeypatch, looprpt, *few, "--init", run / "base", "--objective", "rpt", "--rpt.lr", "1e38")
    assert message.startswith("the weights are not finite after rpt step")
    assert f"the last good checkpoint is {run / 'base'}; try a smaller --rpt.lr" in message
    assert {p.name for p in (tmp_path / "out").iterdir()} <= {".lock", "log.jsonl", "run.json", "state"}
    assert not [*(tmp_path / "out").glob("state/*")]
    checkpoint.load(run / "base")


RANGES = """--model.width 65 | --model.width 65 is not divisible by --model.heads 4: try --model.width 68
--model.heads 4 --model.kv-heads 3 | --model.heads 4 is not divisible by --model.kv-heads 3
--model.loops 1 | --model.loops 1 leaves rpt no exit to learn: give 2 or more loops
--model.loops 0 --objective pretrain | --model.loops 0 is out of its range: give a number from 1 to 64
--model.loops 65 | --model.loops 65 is out of its range: give a number from 1 to 64
--rpt.rollouts 1 | --rpt.rollouts 1 gives no group to compare: give --rpt.rollouts 8
--rpt.rollouts 0 | --rpt.rollouts 0 is out of its range: give a number 1 or more
--rpt.rho 0 | --rpt.rho 0.0 is out of its range: give a number above 0, at most 1
--rpt.rho 1.1 | --rpt.rho 1.1 is out of its range
--rpt.tau 2 | --rpt.tau 2.0 is out of its range: give a number above 0, at most 1
--rpt.ema-decay 1.5 | --rpt.ema-decay 1.5 is out of its range: give a number from 0 to 1
--rpt.noise-std -0.1 | --rpt.noise-std -0.1 is out of its range: give a number 0 or more
--rpt.lr nan | --rpt.lr nan is out of its range: give a number above 0
--rpt.lr inf | --rpt.lr inf is out of its range
--train.warmup -1 | --train.warmup -1.0 is out of its range
--rpt.lr 0 | --rpt.lr 0.0 is out of its range: give a number above 0
--train.batch -1 | --train.batch -1 is out of its range: give a number 0 or more
--pretrain.steps -1 | --pretrain.steps -1 is out of its range
--data.length 1 | --data.length 1 is out of its range: give a number 2 or more
--objective rpt rpt | --objective rpt rpt: give each stage at most once
--objective gate rpt | --objective gate has nothing to start from: give --init, or put pretrain before it
--out text.txt | --out: text.txt can't be a folder (File exists): give another place
--out text.txt/deeper | --out: text.txt/deeper can't be a folder (Not a directory): give another place
--objective | --objective nothing: give each stage at most once
--device tpu9 | --device tpu9 is not a device: give auto, cpu, cuda or cuda:1
--device cuda:77 | --device cuda:77 is not there
--data.path none.jsonl | none.jsonl is not there, or of an unknown kind
--data.val none.jsonl | --data.val none.jsonl came without --data.path
--data.tokenizer bytes | --data.tokenizer bytes came without --data.path: give that too
--data.tokenizer none.json --data.path text.txt | none.json is not a tokenizer (No such file
--data.path text.txt | text.txt has 0 training rows for 1 processes: give more or --data.val
--data.path text.txt --data.val text.txt --data.chat --data.tokenizer plain.json | the tokenizer has none of (
--init none | none is not a checkpoint folder: it has no config.json (to download one: hf download
--init text.txt | text.txt is not a checkpoint folder: it has no config.json"""


@pytest.mark.parametrize("case", RANGES.splitlines(), ids=lambda c: c.partition(" |")[0])
def test_a_mistake_is_refused_in_a_sentence_before_anything_is_written(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some text")
    data.chain_tokenizer().save("plain.json")
    flags, _, message = case.partition(" | ")
    assert refused(monkeypatch, looprpt, *flags.split()).startswith(message)
    assert not Path("out").exists()


def test_more_processes_than_rows_are_refused_and_each_leaves_by_itself(tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr(runtime, "exit_process", left.append)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(sys, "argv", ["looprpt.py", "--train.batch", "4", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "looprpt.py"), run_name="__main__")
    assert left == ["error: --train.batch 4 is less than the 8 processes: each needs a row"]


def test_a_checkpoint_of_the_built_in_task_and_a_text_do_not_mix(run, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    message = refused(monkeypatch, looprpt, "--init", run / "base", "--data.path", tmp_path / "a.txt")
    assert message.endswith(": give another, or a checkpoint trained on text")


def test_a_row_longer_than_the_checkpoints_positions_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    short = looprpt.ModelConfig(vocab_size=259, max_positions=64)
    checkpoint.save(LoopedTransformer(short), tmp_path / "a", text.byte_tokenizer())
    flags = ["--init", tmp_path / "a", "--objective", "rpt", "--data.path", tmp_path / "a.txt"]
    message = refused(monkeypatch, looprpt, *flags, "--data.length", 65)
    assert message == f"--data.length 65 is more than the 64 positions of {tmp_path / 'a'}: give a smaller one"


def test_eval_refuses_what_it_cannot_compare(run, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    few = "--pretrain.steps 1 --rpt.steps 1 --data.length 32 --train.batch 2".split()
    call(monkeypatch, looprpt, *few, "--data.path", tmp_path / "a.txt", "--out", tmp_path / "text")
    folder = tmp_path / "text" / "base"
    for args, expected in (
        ([tmp_path / "none"], "none is not a checkpoint folder"),
        ([run / "base", folder], "only models of one tokenizer can be compared"),
        ([folder], "was trained on text, not on the built-in chain arithmetic: give --data.path"),
        ([folder, "--data.path", tmp_path / "a.txt", "--data.val", tmp_path / "a.txt"], "is for training"),
        ([run / "base", "--batch", -1], "--batch -1 is out of its range: give a number 0 or more"),
        ([run / "base", "--out", tmp_path / "a.txt" / "b.json"], "can't be a folder"),
        ([run / "base", "--out", tmp_path / "a.txt"], "is there already: nothing saved is overwritten"),
        ([], "no checkpoint was given"),
    ):
        assert expected in refused(monkeypatch, eval, *args)
    out = tmp_path / "results.json"
    call(monkeypatch, eval, folder, tmp_path / "text" / "rpt", "--data.path", tmp_path / "a.txt", "--out", out)
    assert "depth_1" not in json.loads(out.read_text())["models"]["rpt"]["buckets"]


def test_without_git_a_result_just_has_no_commit(tmp_path, monkeypatch):
    if (ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", runtime.provenance(torch.device("cpu"))["commit"])
    monkeypatch.setenv("PATH", "/nonexistent")
    assert runtime.provenance(torch.device("cpu"))["commit"] is None
    config = looprpt.Config()
    student = LoopedTransformer(looprpt.ModelConfig(vocab_size=11))
    start = runs.open_run(tmp_path, config, student, 1, [])["starts"][0]
    assert start["dirty"] is None


def test_a_mistake_ends_the_script_with_one_line_and_a_status():
    script = [sys.executable, ROOT / "looprpt.py", "--model.width", "65"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: --model.width 65 is not divisible by --model.heads 4: try --model.width 68\n"


def test_every_flag_has_a_line_of_help(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")  # wider, it stands in columns
    with pytest.raises(SystemExit):
        call(monkeypatch, looprpt, "--help")
    shown = re.sub(r"\x1b\[[0-9;]*m|[│╭╰─╮╯]", "", capsys.readouterr().out)
    _, *parts = re.split(r"^\W*(--[a-z][a-z.-]*)", shown, flags=re.MULTILINE)
    flags = dict(zip(parts[::2], parts[1::2], strict=True))
    assert 35 <= len(flags) <= 61
    for flag, rest in flags.items():
        assert re.search(r"[a-z]{2,} .*\(default: ", " ".join(rest.split())), f"{flag} has no help: {rest}"
    for flag in """--model.loops --data.path --pretrain.steps --pretrain.lr --gate.steps --rpt.steps --rpt.rollouts
        --rpt.noise-std --rpt.lr --model.width --seed --out --init --objective --device""".split():
        assert flag in flags


def test_a_run_with_flags_of_another_version_is_not_resumed_as_something_else(run, tmp_path, monkeypatch):
    record = json.loads((run / "run.json").read_text())
    record["config"]["rpt"]["rep_loops"] = "exits"
    (tmp_path / "run.json").write_text(json.dumps(record))
    message = refused(monkeypatch, looprpt, "--out", tmp_path, "--resume")
    assert message == "the run was started with flags of another version (rep_loops): go on with that version"
    for wrong in ({}, {"config": None}, {"config": 5}, {"config": {"rpt": {"lr": {"a": 1}}}}):
        (tmp_path / "run.json").write_text(json.dumps(wrong))
        assert "is not the record of a run" in refused(monkeypatch, looprpt, "--out", tmp_path, "--resume")
