"""The benchmarks: what their rows say, and what they refuse."""

import inspect
import json
import sys
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import bench
import data
import eval
import looprpt
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


def test_decode_measures_what_it_says(monkeypatch, capsys):
    """With a clock that a loop moves on by one second, the first run of each threshold by a hundred."""
    monkeypatch.setitem(bench.SHAPES, "medium", SHAPE)
    clock, runs, caches, inner = [0.0], [0], [], bench.generate

    def timed(net, prompts, **how):
        runs[0] += 1
        caches.append(how["cache"])
        for token in inner(net, prompts, **how):
            clock[0] += token.loops * (100 if runs[0] <= 2 else 1)
            yield token

    monkeypatch.setattr(bench, "generate", timed)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    few = "--tokens 12 --prompt-tokens 4 --rounds 2 --thresholds 0 --cache last".split()
    call(monkeypatch, "decode", *few)
    cells = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()][-2:]
    assert cells[0] == ["0.0", "1.0", "1.00", "4.00", "4.00", "1.00"]
    assert cells[1][2:] == ["0.2", "4.00", "1.00", "1.00", "1.00"]
    assert {*caches} == {"last"}


def test_decode_takes_a_checkpoint(tmp_path, monkeypatch, capsys):
    model.save(LoopedTransformer(SHAPE), tmp_path / "a", data.byte_tokenizer())
    call(monkeypatch, "decode", tmp_path / "a", "--tokens", 3, "--prompt-tokens", 2, "--rounds", 1, "--thresholds", 1)
    assert "all loops" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch 0", "--batch 0 is below 1"),
        ("--tokens 1", "--tokens 1 is below 2: the first one comes from the prompt"),
        ("--prompt-tokens 65530", "are more than the model's 65536 positions"),
        ("--thresholds 0.5 2", "--thresholds 0.5 2.0: give numbers from 0 to 1"),
        ("none", "none is not a checkpoint folder"),
        ("--device tpu", "--device tpu is not a device"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(monkeypatch, flags, message):
    monkeypatch.setitem(bench.SHAPES, "medium", SHAPE)
    with pytest.raises(SystemExit, match=message):
        call(monkeypatch, "decode", *flags.split())


def test_what_a_loop_keeps_is_what_real_tensors_keep():
    """The plan's tensors without memory, against a forward pass that is really run."""
    net, kept = LoopedTransformer(bench.replace(SHAPE, layers=2, vocab_size=8)), {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        held.append(x)  # so that no address is used twice
        return x

    held, state = [], torch.zeros(3, 10, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        net(state, loops=1)
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    expected = sum(size for at, size in kept.items() if at not in weights)
    found = bench.saved_bytes(bench.replace(SHAPE, layers=2), 3, 10)
    assert found == pytest.approx(expected, rel=0.02)
    more = bench.saved_bytes(bench.replace(SHAPE, layers=2), 6, 10)
    assert found < more < 2 * found, "the copies of the weights in bfloat16 stay the same"


def test_the_plan_adds_up(monkeypatch, capsys):
    config = bench.PlanConfig(shape="ouro-1.4b", dist="ddp")
    n = 1_434_652_673
    one = bench.memory(config, 1)
    assert (one["weights"], one["grads"], one["moments"], one["teacher"]) == (4 * n, 4 * n, 8 * n, 4 * n)
    assert one == bench.memory(config, 8), "copies don't shrink"
    fsdp = bench.memory(bench.PlanConfig(shape="ouro-1.4b"), 8)
    assert [fsdp[k] * 8 for k in ("weights", "grads", "moments", "teacher")] == [4 * n, 4 * n, 8 * n, 4 * n]
    assert fsdp["gathered"] == 4 * n + 4 * n + 2 * n
    assert bench.memory(bench.PlanConfig(shape="ouro-1.4b", objective="gate"), 1)["moments"] == 8 * 2049
    whole = bench.memory(bench.PlanConfig(shape="ouro-1.4b", checkpoint=False), 8)["layers"]
    assert whole > 10 * fsdp["layers"]
    call(monkeypatch, "plan", "--shape", "ouro-1.4b", "--gpus", 1, 1024)
    shown = capsys.readouterr().out
    assert "768 KiB a token, 192 with" in " ".join(shown.split())
    for flags, message in (
        ("--gpus 0", "--gpus 0: give numbers from 1 to 1024"),
        ("--mfu 0", "--mfu 0.0 is out of its range"),
        ("--rows 0", "--rows 0 is below 1"),
    ):
        with pytest.raises(SystemExit, match=message):
            call(monkeypatch, "plan", *flags.split())


@pytest.mark.parametrize("rule", ["full", "copy", "last"])
@pytest.mark.parametrize("threshold", [0.3, 1.0])
def test_given_text_leaves_what_generated_text_leaves(rule, threshold):
    """Decoding what `generate` wrote finds its tokens and its loops again, whatever the rule for the cache."""
    net = LoopedTransformer(bench.replace(SHAPE, layers=2, vocab_size=13, init_std=0.3)).double()
    torch.nn.init.normal_(net.early_exit_gate.weight)
    prompts, rows, loops = [[1, 2, 3], [4], [5, 6, 7, 8, 9]], [], 0
    texts = [[] for _ in prompts]
    for token in bench.generate(net, prompts, max_tokens=9, exit=bench.Exit("gate", threshold), cache=rule):
        loops += token.loops * bool(texts[token.row])
        texts[token.row].append(token.id)
    for prompt, text in zip(prompts, texts, strict=True):
        rows.append(data.Row(prompt + text, len(prompt)))
    assert bench.forced(net, rows, threshold, rule) == (24, 24, loops)


def test_cache_compares_the_three_rules(tmp_path, monkeypatch, capsys):
    model.save(LoopedTransformer(SHAPE), tmp_path / "a", data.byte_tokenizer())
    lines = [json.dumps({"question": f"{i} + {i}?", "answer": str(2 * i)}) + "\n" for i in range(40)]
    (tmp_path / "val.jsonl").write_text("".join(lines))
    args = [tmp_path / "a", "--data.path", tmp_path / "val.jsonl", "--rows", 5, "--thresholds", 0.5, 1]
    call(monkeypatch, "cache", *args, "--out", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [(r["cache"], r["threshold"]) for r in found] == [(c, t) for c in ("full", "copy", "last") for t in (0.5, 1)]
    exact, copied = (next(r for r in found if r["cache"] == c and r["threshold"] == 1) for c in ("full", "copy"))
    assert exact["accuracy"] == copied["accuracy"]
    assert exact["loops"] == 4
    assert "accuracy in % at average loops" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match=r"no --data.path was given"):
        call(monkeypatch, "cache", tmp_path / "a")


# Training and scoring


@pytest.mark.parametrize("rollouts", [2, 3])
def test_the_yardstick_is_the_same_step(rollouts, monkeypatch):
    """The same loss and gradient as ours, for the same noise and the same drawn exits; in at most sixty lines."""
    assert len(inspect.getsource(bench.yardstick).splitlines()) <= 60
    draw = looprpt.draw_exits
    monkeypatch.setattr(looprpt, "draw_exits", lambda logpi, _: draw(logpi, data.seeded("exits")))
    ids = torch.randint(259, (3, 12), generator=data.seeded("ids"))
    mask = torch.rand(3, 11, generator=data.seeded("mask")) < 0.7
    batch, found = data.Batch(ids[:, :-1], ids[:, 1:], mask), []
    cfg = replace(looprpt.PAPER, rollouts=rollouts, noise_std=0.3, rho=0.4, kl_weight=0.3, ent_weight=0.2)
    counts, _ = looprpt.count(batch, cfg.rho, torch.device("cpu"))
    for form in ("plain", "ours"):
        student, teacher = (
            LoopedTransformer(replace(SHAPE, init_std=0.3), generator=data.seeded(who)).double() for who in "st"
        )
        generator = data.seeded("noise")
        if form == "plain":
            loss = bench.yardstick(student, teacher, batch, cfg, generator)
        else:
            loss = looprpt.rpt_step(student, teacher, batch, cfg, counts=counts, generator=generator).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in student.parameters())])
        assert all(p.grad is None for p in teacher.parameters())
    for plain, ours in zip(*found, strict=True):
        assert_close(plain, ours, rtol=1e-9, atol=1e-11)


def test_plain_pretraining_and_scoring_are_the_same():
    net = LoopedTransformer(replace(SHAPE, init_std=0.3), generator=data.seeded("net"))
    source = data.Documents(
        [data.Row(torch.randint(259, (n,), generator=data.seeded(n)).tolist(), 1) for n in (9, 9)], batch=2, seed=0
    )
    batch, cfg = source.batch(0), looprpt.PretrainConfig(beta=0.3)
    counts, _ = looprpt.count(batch, 0.2, torch.device("cpu"))
    ours = looprpt.pretrain_step(net, batch, cfg, counts=counts).loss
    assert_close(bench.plain_pretrain(net, batch, cfg.beta), ours)
    found = eval.score(net, source, device=torch.device("cpu"))
    assert_close(bench.plain_score(net, batch), tuple(found)[:7])


@pytest.mark.parametrize("name", ["rpt", "pretrain", "eval"])
def test_speeds_are_gathered_in_one_file(name, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(bench.SHAPES, "small", SHAPE)
    out, few = tmp_path / "new" / "bench.json", ["--no-compile", "--rows", "2", "--length", "8", "--rounds", "1"]
    for precision in ("fp32", "bf16"):
        call(monkeypatch, name, *few, "--precision", precision, "--out", out)
    shown = capfd.readouterr()
    assert shown.err == "", "the profiler's own words stay away"
    runs = json.loads(out.read_text())["runs"]
    assert [r["precision"] for r in runs] == ["fp32", "bf16"]
    for run in runs:
        assert run["bench"] == name
        assert run.keys() > {"argv", "commit", "torch", "device", "shape", "rows", "length", "threads", "peak_tflops"}
        first = run["forms"][0]
        assert (first["form"], first["speedup"], first["memory"]) == ("plain", 1, 1)
        assert all(r["tokens_per_s"] > 0 and r["peak_gib"] > 0 and r["mfu"] > 0 for r in run["forms"])
    if name == "rpt":
        assert [r["form"] for r in runs[0]["forms"]] == ["plain", "sampled", "exact", "looprpt"]
    call(monkeypatch, "speeds", out)
    table = capfd.readouterr().out
    assert f"`python bench.py {name} --no-compile --rows 2 --length 8 --rounds 1 --precision bf16`" in table
    assert table.count("| plain |") == 2


def test_speeds_say_what_the_clock_and_the_memory_say(monkeypatch, capsys):
    """A plain step of 8 seconds and 4 GiB, ours of 2 seconds and 1 GiB."""
    now, sizes = [0.0], {"plain": 4 * 2**30, "ours": 2**30}
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def setup(device, net, source):
        def step(seconds):
            now[0] += seconds

        return {"plain": bench.Form(lambda: step(8), 16e12), "ours": bench.Form(lambda: step(2), 16e12)}, (net,), 0

    def peak(step, standing, device):
        start = now[0]
        step()
        return sizes["plain" if now[0] - start == 8 else "ours"]

    monkeypatch.setitem(bench.SHAPES, "small", SHAPE)
    monkeypatch.setattr(bench, "peak_bytes", peak)
    monkeypatch.setattr(bench, "peak_flops", lambda *_: 16e12)
    bench.race("rpt", bench.SpeedConfig(rows=4, length=16, compile=False), setup)
    cells = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["plain", "8", "1.00", "4.00", "1.00", "12", "%"] in cells
    assert ["ours", "32", "4.00", "1.00", "0.25", "50", "%"] in cells


def test_peak_memory_counts_what_lives_at_once():
    def step():
        for _ in range(3):
            torch.zeros(2**20)  # 4 MiB, gone at once
        kept = [torch.zeros(2**20) for _ in range(3)]
        del kept

    assert bench.peak_bytes(step, 1000, torch.device("cpu")) - 1000 == pytest.approx(3 * 2**22, rel=0.01)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["rpt", "--rows", "-1"], "--rows -1 is too small"),
        (["pretrain", "--length", "1"], "--length 1 is too small"),
        (["eval", "--rounds", "0"], "--rounds 0 is too small"),
        (["rpt", "--out", "other.json"], "other.json holds no results of these benchmarks"),
        (["rpt", "--out", "half.json"], "half.json holds no results of these benchmarks"),
        (["eval", "--out", "."], "holds no results of these benchmarks"),
        (["rpt", "--out", "other.json/new.json"], "other.json can't be a folder"),
        (["speeds", "none.json"], "none.json is not a file"),
    ],
)
def test_speeds_refuse_what_they_cannot_do(args, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "half.json").write_text('{"runs": [{"forms": [{}]}]}')
    with pytest.raises(SystemExit, match=said):
        call(monkeypatch, *args)
    assert (tmp_path / "other.json").read_text() == "{}"
