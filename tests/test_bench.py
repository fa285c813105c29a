"""The benchmarks: what their rows say, and what they refuse."""

import inspect
import json
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro
from helpers import call, refused
from torch.testing import assert_close

import data
import looprpt
import sample
from lab import bench, study
from model import LoopedTransformer, ModelConfig
from support import checkpoint, decoding, runtime, sizes, text

SHAPE = ModelConfig(layers=1, width=16, heads=2, vocab_size=259)


def test_decode_compares_each_threshold_with_all_loops(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.SHAPES, "medium", SHAPE)
    few = "--tokens 12 --prompt-tokens 4 --rounds 2 --batch 2 --thresholds 0 0.5".split()
    call(monkeypatch, bench, "decode", *few, "--out", tmp_path / "new" / "decode.json")
    found = json.loads((tmp_path / "new" / "decode.json").read_text())
    assert [r["threshold"] for r in found["rows"]] == [0, 0.5, 1]
    assert [r["loops"] for r in found["rows"][::2]] == [1, 4]
    assert 1 < found["rows"][1]["loops"] < 4, "random weights leave after every loop"
    for r in found["rows"]:
        assert r["ideal"] == pytest.approx(4 / r["loops"])
        assert r["of_ideal"] == pytest.approx(r["speedup"] / r["ideal"])
    assert found["rows"][-1]["speedup"] == 1
    assert found.keys() > {"argv", "commit", "torch", "device", "dtype"}
    assert "decoding, medium, batch 2, cache 'copy', verify 0" in capsys.readouterr().out


def test_decode_measures_what_it_says(monkeypatch, capsys):
    """With a clock that a loop moves on by a second, in the first prompts by a hundred, and a prompt by a thousand."""
    monkeypatch.setitem(bench.SHAPES, "medium", SHAPE)
    clock, passes, caches, decode, prefill = [0.0], Counter(), [], decoding.decode, decoding.prefill

    def timed_decode(*args):
        passes[id(args[2])] += 1
        clock[0] += 100 if passes[id(args[2])] <= 11 else 1
        return decode(*args)

    def timed_prefill(*args):
        clock[0] += 1000
        caches.append(args[2])
        return prefill(*args)

    monkeypatch.setattr(sample, "decode", timed_decode)
    monkeypatch.setattr(decoding, "prefill", timed_prefill)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    for batch, speeds in ((1, ("1.00", "0.25")), (2, ("2.00", "0.50"))):
        caches.clear()
        passes.clear()
        few = f"--tokens 12 --prompt-tokens 4 --rounds 2 --thresholds 0 --cache last --batch {batch}".split()
        call(monkeypatch, bench, "decode", *few)
        cells = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()][-2:]
        assert cells[0] == ["0.00", speeds[0], "1.00", "4.00", "4.00", "1.00"]
        assert cells[1] == ["1.00", speeds[1], "4.00", "1.00", "1.00", "1.00"]
        assert {(cache.loops, cache.rows) for cache in caches} == {(1, batch)}
        assert len(caches) == 2 * 3, "a prompt in each place that is not counted, and two that are"


def test_decode_takes_a_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a", text.byte_tokenizer())
    few = "--tokens 3 --prompt-tokens 2 --rounds 1 --thresholds 1 0.5".split()
    call(monkeypatch, bench, "decode", tmp_path / "a", *few, "--out", tmp_path / "decode.json")
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [r["threshold"] for r in rows] == [1, 0.5]
    assert rows[0]["speedup"] == 1, "full depth is the measure, wherever it stands"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("decode --batch 0", "--batch 0 is out of its range: give a number 1 or more"),
        ("decode --tokens 1", "--tokens 1 is out of its range: give a number 2 or more"),
        ("decode --prompt-tokens 65530", "are more than the model's 65536 positions"),
        ("decode --thresholds 0.5 2", "--thresholds 0.5 2.0 is out of its range: give a number from 0 to 1"),
        ("decode none", "none is not a checkpoint folder"),
        ("decode --device tpu", "--device tpu is not a device"),
        ("decode --out other.json", "--out other.json is there already"),
        ("plan --gpus 0", "--gpus 0 is out of its range: give a number from 1 to 1024"),
        ("plan --rows 0", "--rows 0 is out of its range"),
        ("rpt --rows -1", "--rows -1 is out of its range"),
        ("rpt --length 1", "--length 1 is out of its range: give a number 2 or more"),
        ("rpt --rounds 0", "--rounds 0 is out of its range"),
        ("decode --verify -1", "--verify -1 is out of its range"),
        ("gpu --out new.json --only all", "--only all: unknown, there are tests, rpt, "),
        ("gpu --out new.json --device tpu", "--device tpu is not a device"),
        ("rpt --out other.json", "--out other.json is there already"),
        ("rpt --out other.json/new.json", "other.json can't be a folder"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(args, message, tmp_path, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "medium", SHAPE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    assert message in refused(monkeypatch, bench, *args.split())
    assert (tmp_path / "other.json").read_text() == "{}"


def test_the_plan_shows_the_memory_of_a_step(monkeypatch, capsys):
    few = ["--shape", "ouro-1.4b", "--gpus", 1, 8, 1024]
    call(monkeypatch, bench, "plan", *few)
    shown = capsys.readouterr().out
    cells = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.strip()[:1].isdecimal()}
    cfg, how = looprpt.RECIPES["paper"], {"rows": 1, "length": 4096, "bf16": True}
    for gpus, shards in (("1", 1), ("8", 8), ("1024", 8)):
        parts = sizes.step_memory("rpt", bench.SHAPES["ouro-1.4b"], cfg, **how, recompute=True, shards=shards)
        assert cells[gpus] == [f"{x / 2**30:.1f}" for x in (*parts.values(), sum(parts.values()))]
    assert "768 KiB a token, 192 with" in " ".join(shown.split())
    call(monkeypatch, bench, "plan", *few[:2], "--per-machine", 1, "--gpus", 8, "--recipe", "dense")
    ddp = next(line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("8 "))
    assert ddp[1:3] == ["5.3", "5.3"], "copies don't shrink"
    assert float(ddp[6]) < float(cells["8"][5]), "without rollouts"


@pytest.mark.parametrize("rule", ["full", "copy", "last"])
@pytest.mark.parametrize("threshold", [0.3, 1.0])
def test_given_text_leaves_what_generated_text_leaves(rule, threshold):
    """Decoding what `generate` wrote finds its tokens and its loops again, whatever the rule for the cache."""
    net = LoopedTransformer(replace(SHAPE, layers=2, vocab_size=13, init_std=0.3)).double()
    torch.nn.init.normal_(net.early_exit_gate.weight)
    prompts, texts, tokens = [[1, 2, 3], [4], [5, 6, 7, 8, 9]], [[] for _ in range(3)], []
    how = {"exit": sample.Exit("gate", threshold), "cache": rule}
    for token in sample.generate(net, prompts, max_tokens=9, **how):
        texts[token.row].append(token.id)
        tokens.append(token)
    forced = [*sample.generate(net, prompts, given=texts, max_tokens=9, batch=2, **how)]
    assert len(forced) == 27
    assert all(token.id == token.likeliest for token in forced)
    pairs = [*zip(*(sorted(found, key=lambda t: t.row) for found in (forced, tokens)), strict=True)]  # stable
    assert all((a.row, a.id, a.loops, a.likeliest) == (b.row, b.id, b.loops, b.likeliest) for a, b in pairs)


# Training steps


@pytest.mark.parametrize("rollouts", [2, 3])
def test_the_naive_step_is_the_same_step(rollouts, monkeypatch):
    """The same loss and gradient as ours, for the same noise and the same drawn exits; in at most sixty lines."""
    assert len(inspect.getsource(bench.naive_step).splitlines()) <= 60
    draw = looprpt.draw_exits
    monkeypatch.setattr(looprpt, "draw_exits", lambda logpi, _: draw(logpi, runtime.seeded("exits")))
    ids = torch.randint(259, (3, 12), generator=runtime.seeded("ids"))
    mask = torch.rand(3, 11, generator=runtime.seeded("mask")) < 0.7
    batch, results = data.Batch(ids[:, :-1], ids[:, 1:], mask), []
    cfg = replace(looprpt.RPTConfig(), rollouts=rollouts, noise_std=0.3, rho=0.4, kl_weight=0.3, ent_weight=0.2)
    counts, _ = looprpt.count_tokens(batch, cfg.rho, torch.device("cpu"))
    for form in ("naive", "ours"):
        student, teacher = (
            LoopedTransformer(replace(SHAPE, init_std=0.3), generator=runtime.seeded(who)).double() for who in "st"
        )
        noise = runtime.seeded("noise")
        if form == "naive":
            loss = bench.naive_step(student, teacher, batch, cfg, noise)
        else:
            loss = looprpt.rpt_step(student, teacher, batch, cfg, counts=counts, generator=noise).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in student.parameters())])
        assert all(p.grad is None for p in teacher.parameters())
    for naive, ours in zip(*results, strict=True):
        assert_close(naive, ours, rtol=1e-9, atol=1e-11)


def test_speeds_are_written_to_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.SHAPES, "small", SHAPE)
    few = ["--no-compile", "--rows", "2", "--length", "8", "--rounds", "1", "--precision", "bf16"]
    call(monkeypatch, bench, "rpt", *few, "--out", tmp_path / "new" / "bench.json")
    runs = json.loads((tmp_path / "new" / "bench.json").read_text())["runs"]
    assert [r["precision"] for r in runs] == ["bf16"]
    for run in runs:
        assert (run["bench"], run["bf16"], run["recompute"]) == ("rpt", True, False)
        assert run.keys() > {"argv", "commit", "torch", "device", "shape", "rows", "length", "threads"}
        first = run["forms"][0]
        assert (first["form"], first["speedup"]) == ("naive", 1)
        assert all(r["tokens_per_s"] > 0 for r in run["forms"])
        assert all(r["mfu"] is r["peak_gib"] is None for r in run["forms"]), "of a GPU only"
        plans = [r["plan_gib"] for r in run["forms"]]
        how = {"rows": 2, "length": 8, "bf16": True, "recompute": False}
        expected = [sum(sizes.step_memory("rpt", SHAPE, bench.FORMS[r["form"]], **how).values()) for r in run["forms"]]
        assert plans == [None, *(x / 2**30 for x in expected[1:])]
        assert "–" in capsys.readouterr().out
        assert [r["form"] for r in run["forms"]] == ["naive", "paper", "exact", "dense"]


def test_speeds_say_what_the_clock_says(monkeypatch, capsys):
    """A naive step of 8 seconds, ours of 2 seconds; the first run of each takes a hundred more."""
    now, steps = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def step(seconds):
        now[0] += seconds + 100 * (seconds not in steps)
        steps.append(seconds)

    def naive_step(net, *_):
        step(8)
        return sum(p.sum() for p in net.parameters())

    def rpt_step(net, *_, **__):
        step(2)
        return looprpt.StepOutput(sum(p.sum() for p in net.parameters()), {})

    monkeypatch.setitem(bench.SHAPES, "small", SHAPE)
    monkeypatch.setattr(bench, "FORMS", {"naive": bench.PAPER, "paper": bench.PAPER})
    monkeypatch.setattr(bench, "naive_step", naive_step)
    monkeypatch.setattr(looprpt, "rpt_step", rpt_step)
    monkeypatch.setattr(bench.runtime, "vendor_flops", lambda *_: 16e12)
    monkeypatch.setattr(bench.runtime, "step_flops", lambda *_: 16e12)
    bench.compare_forms(bench.SpeedConfig(rows=4, length=16, compile=False))
    cells = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["naive", "8", "1.00", "–", "12", "%"] in cells
    assert ["paper", "32", "4.00", "–", "50", "%"] in cells
    row = {"form": "a", "tokens_per_s": 1000, "speedup": 1, "peak_gib": 3.456, "mfu": 0.5}
    assert bench.speed_cells(row) == ["a", "1,000", "1.00", "3.46", "50 %"]


def test_stage_one_is_timed_without_a_teacher_and_what_does_not_fit_is_a_row(tmp_path, monkeypatch, capsys):
    """The first form runs out of memory in its forward pass, the second one with its gradients there."""
    monkeypatch.setitem(bench.SHAPES, "small", SHAPE)
    few, made, steps = ["--no-compile", "--rows", "2", "--length", "8", "--rounds", "1"], [], []
    build, step = bench.random_model, looprpt.rpt_step
    monkeypatch.setattr(bench, "random_model", lambda *how: made.append(build(*how)) or made[-1])
    call(monkeypatch, bench, "rpt", *few, "--stage", "pretrain", "--recompute", "--out", tmp_path / "a.json")
    (run,) = json.loads((tmp_path / "a.json").read_text())["runs"]
    assert (run["bench"], [r["form"] for r in run["forms"]], len(made)) == ("pretrain", ["pretrain"], 1)
    assert made[0].recompute
    plan = sizes.step_memory("pretrain", SHAPE, None, rows=2, length=8, bf16=False, recompute=True)
    assert run["forms"][0]["plan_gib"] == sum(plan.values()) / 2**30

    def rpt_step(net, teacher, batch, cfg, **how):
        steps.append(cfg)
        if cfg is bench.DENSE:
            raise torch.OutOfMemoryError
        assert all(p.grad is None for p in net.parameters()), "nothing is left of a step that did not fit"
        return step(net, teacher, batch, cfg, **how)

    def clip(*_):
        if steps[-1] is bench.PAPER:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(looprpt, "rpt_step", rpt_step)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    monkeypatch.setattr(bench, "FORMS", {form: bench.FORMS[form] for form in ("dense", "paper", "exact")})
    call(monkeypatch, bench, "rpt", *few, "--out", tmp_path / "b.json")
    rows = json.loads((tmp_path / "b.json").read_text())["runs"][0]["forms"]
    assert [r.get("error") for r in rows] == ["out of memory", "out of memory", None]
    assert rows[2]["speedup"] == 1, "beside the first that fits"
    assert capsys.readouterr().out.count("out of memory") == 2


# The first hour on a GPU


TINY = {"-q": "tests/test_golden.py -k hard", "rpt": "--shape demo --rows 2 --length 8 --rounds 1 --no-compile"}
TINY |= {"decode": "--shape demo --rounds 1 --tokens 2 --thresholds 0.5", "run": "--track demo --seeds 1 --only dense"}


def test_the_gpu_hour_runs_scaled_down_and_goes_on(tmp_path, monkeypatch, capsys):
    """Every piece's command, in this process; the tests as they are started, and the study only read."""
    run, ran, generate = subprocess.run, [], sample.generate
    taken = inspect.signature(generate).parameters
    monkeypatch.setattr(
        sample, "generate", lambda *args, **how: generate(*args, **{k: x for k, x in how.items() if k in taken})
    )

    def here(command, **how):
        if command[0] != "timeout":
            return run(command, **how)
        assert command[:5] == ["timeout", "--foreground", "-k", "60", "480"]
        module, *args = command[7:]
        ran.append(module)
        if module == "lab.study":
            config = tyro.cli(study.StudyConfig, args=args[1:])
            assert (config.track, config.device, config.results) == ("demo", "cpu", tmp_path / "gpu")
            return subprocess.CompletedProcess(command, 124, "seed 0\n")
        if module == "lab.bench":
            call(monkeypatch, bench, *args)
            return subprocess.CompletedProcess(command, 0, "")
        return run(command, **how)

    monkeypatch.setattr(subprocess, "run", here)
    monkeypatch.chdir(Path(bench.__file__).parent.parent)
    small = {name: f"{piece} {TINY[piece.split()[2]]}" for name, piece in bench.PIECES.items()}
    monkeypatch.setattr(bench, "PIECES", small)
    few = ["gpu", "--device", "cpu", "--out", tmp_path / "gpu.json"]
    call(monkeypatch, bench, *few, "--only", "decode-8-verify", "tests")
    assert ran == ["lab.bench", "pytest"]
    call(monkeypatch, bench, *few)
    assert len(ran) == len(bench.PIECES), "what is there is not run again"
    call(monkeypatch, bench, *few)
    assert len(ran) == len(bench.PIECES), "nor what failed"
    call(monkeypatch, bench, *few, "--only", "study", "rpt")
    assert ran[len(bench.PIECES) :] == ["lab.study"], "but when it is asked for"
    pieces = json.loads((tmp_path / "gpu.json").read_text())["pieces"]
    assert pieces.keys() == bench.PIECES.keys()
    assert "1 passed" in pieces["tests"]["said"]
    assert [r["form"] for r in pieces["rpt"]["runs"][0]["forms"]] == [*bench.FORMS]
    assert [pieces[f"pretrain-{n}"]["runs"][0]["recompute"] for n in ("4", "4-recomputed")] == [False, True]
    decoded = [pieces[f"decode-32{end}"] for end in ("", "-verify")]
    assert [(d["batch"], d["verify"], len(d["rows"])) for d in decoded] == [(32, 0, 2), (32, 4, 2)]
    assert pieces["study"]["error"] == "not done after eight minutes"
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
    shown = capsys.readouterr().out
    assert "\nstudy: not done after eight minutes\n" in shown
    assert shown.splitlines()[-1] == f"{tmp_path / 'gpu.json'}: commit {runtime.git('rev-parse', 'HEAD')}"


def test_a_piece_that_fails_is_recorded_by_its_sentence_and_the_next_one_begins(tmp_path, monkeypatch, capsys):
    pieces = {"broken": "-c raise(SystemExit('error:_nothing_fits'))", "tests": "-c print(8)"}
    monkeypatch.setattr(bench, "PIECES", pieces)
    bench.gpu(tmp_path / "new" / "gpu.json", device="cpu")
    found = json.loads((tmp_path / "new" / "gpu.json").read_text())["pieces"]
    assert (found["broken"]["error"], found["tests"]["said"]) == ("error:_nothing_fits", "8")
