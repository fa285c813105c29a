"""The study: what is run, what is done again, what its files, tables and pictures say."""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import matplotlib.figure
import pytest
import torch
from helpers import call, refused

import data
import eval
import looprpt
from lab import study
from lab.study import LABELS, VARIANTS
from support import checkpoint, text

ROOT = Path(looprpt.__file__).parent
TINY = "--data.operands 3 --data.val-rows 200 --model.loops 3 --model.width 16 --model.heads 2 --train.batch 8"
DEMO = ("results/demo/base-0.json", "results/demo/dense-0.json")
STEPS = "--pretrain.steps 6 --rpt.steps 4 --gate.steps 4"


class InProcess(contextlib.nullcontext):
    """A child that has run to its end, in this process: it saves the seconds that a start takes."""

    returncode = 0

    def __init__(self, command):
        super().__init__(self)
        with pytest.MonkeyPatch.context() as patch:
            call(patch, looprpt, *command[2:])

    def poll(self):
        return self.returncode


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(study.TRACKS, "demo", f"{TINY} {STEPS}")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(eval.Tally, "bootstrapped", functools.partialmethod(eval.Tally.bootstrapped, rounds=100))
        yield


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(study, "Popen", InProcess)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Two seeds of three variants; the folders of runs and of results."""
    folder = tmp_path_factory.mktemp("study")
    folders = folder / "runs", folder / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "Popen", InProcess)
        call(patch, study, *arguments(folders))
    return folders


def arguments(folders, *args):
    where = ("--out", folders[0], "--results", folders[1], "--device", "cpu")
    return ("run", "--seeds", 2, "--only", "stage-1", "dense", *where, *args)


def files(folder):
    return sorted(folder.glob("*.json"))


def test_a_study_leaves_a_file_for_each_run_and_one_of_differences(done):
    results = done[1]
    expected = {f"{name}-{seed}.json" for name in ("base", "stage-1", "dense") for seed in (0, 1)} | {"against.json"}
    assert {path.name for path in files(results)} == expected
    found = json.loads((results / "dense-1.json").read_text())
    assert (found["variant"], found["seed"], found["track"]) == ("dense", 1, "demo")
    assert found["command"].startswith("python looprpt.py --objective rpt --init ")
    assert len(found["buckets"]["all"]["by_loop"]) == 3
    assert found["commit"] == study.runtime.git("rev-parse", "HEAD")
    pairs = json.loads((results / "against.json").read_text())["against"]["all"]
    assert pairs.keys() == {
        f"{a} - {b}" for a, b in
        (("base", "stage-1"), ("stage-1", "base"), ("dense", "base"), ("dense", "stage-1"))
    }  # fmt: skip


def test_all_variants_of_a_seed_start_from_its_base_and_see_the_same_rows(done):
    runs, results = done
    for seed in (0, 1):
        records = [json.loads((runs / f"seed-{seed}" / name / "run.json").read_text()) for name in ("stage-1", "dense")]
        assert {record["config"]["init"] for record in records} == {str(runs / f"seed-{seed}" / "base" / "base")}
        assert [record["config"]["seed"] for record in records] == [seed, seed]
    numbers = [json.loads(path.read_text())["buckets"] for path in files(results) if path.name != "against.json"]
    sizes = [{name: bucket["tokens"] for name, bucket in found.items()} for found in numbers]
    assert sizes[0] == sizes[2] == sizes[4], "one seed's tokens are sorted by its base, for all variants"
    base = json.loads((results / "base-0.json").read_text())["buckets"]["all"]
    again = eval.score(
        checkpoint.load(runs / "seed-0" / "base" / "base"),
        data.source(None, data.DataConfig(operands=3, val_rows=200), batch=64, seed="study", held_out=True),
        device=torch.device("cpu"),
    )
    assert base["by_loop"] == pytest.approx(eval.summarize(again, eval.buckets(again)["all"])["by_loop"], rel=1e-4)


def test_the_differences_are_those_of_the_accuracies_averaged_over_the_seeds(done):
    results = done[1]
    get = lambda name, seed: json.loads((results / f"{name}-{seed}.json").read_text())["buckets"]["all"]["by_loop"]  # noqa: E731
    found = json.loads((results / "against.json").read_text())["against"]["all"]["dense - stage-1"]
    for loop in range(3):
        mean = sum(get("dense", s)[loop] - get("stage-1", s)[loop] for s in (0, 1)) / 2
        assert found[f"by_loop {loop + 1}"][0] == pytest.approx(mean, abs=2e-5)
        assert found[f"by_loop {loop + 1}"][1] <= found[f"by_loop {loop + 1}"][2]


def test_what_is_there_is_not_done_again(done, monkeypatch):
    results = done[1]
    times = {path: path.stat().st_mtime_ns for path in files(results) if path.name != "against.json"}
    (results / "stage-1-1.json").unlink()
    monkeypatch.setattr(study, "Popen", lambda *_: pytest.fail("trained again"))
    call(monkeypatch, study, *arguments(done))
    for path, time_written in times.items():
        assert (path.stat().st_mtime_ns == time_written) == (path.name != "stage-1-1.json")


WAITING = """
import sys, time
sys.path.insert(0, {root!r})
import looprpt
train = looprpt.train
def waiting(run, *args, stopping, **how):
    def until_asked():
        deadline = time.monotonic() + 30
        while run.step == 1 and not stopping() and time.monotonic() < deadline:
            time.sleep(0.01)
        return stopping()
    train(run, *args, stopping=until_asked, **how)
looprpt.train = waiting
looprpt.main()
"""


def test_a_study_that_is_stopped_stops_its_run_and_goes_on_where_it_was(done, tmp_path, monkeypatch, capfd):
    """The run of dense waits in its second step for the signal that the study gets, and the study ends; the next call
    ends up where one without a stop does."""
    folders = tmp_path / "runs", tmp_path / "results"
    shutil.copytree(done[0], folders[0])
    shutil.copytree(done[1], folders[1])
    shutil.rmtree(folders[0] / "seed-0" / "dense")
    for path in (folders[1] / "dense-0.json", folders[1] / "against.json"):
        path.unlink()
    log = folders[0] / "seed-0" / "dense" / "log.jsonl"

    def stop():
        while not (log.exists() and log.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    script = tmp_path / "waiting.py"
    script.write_text(WAITING.format(root=str(ROOT)))
    with monkeypatch.context() as patch:
        patch.setattr(looprpt, "__file__", str(script))
        threading.Thread(target=stop, daemon=True).start()
        call(patch, study, *arguments(folders))
    shown = capfd.readouterr().out
    assert "stopped by SIGTERM" in shown
    assert shown.splitlines()[-1] == "stopped: the same command goes on"
    assert not (folders[1] / "dense-0.json").exists()
    assert not (folders[1] / "against.json").exists()
    assert [path.name for path in (folders[0] / "seed-0" / "dense" / "state").iterdir()] == ["rpt-000002"]
    monkeypatch.setattr(study, "Popen", InProcess)
    call(monkeypatch, study, *arguments(folders))
    assert "rpt goes on after step 2" in capfd.readouterr().out
    a, b = (json.loads((results / "dense-0.json").read_text()) for results in (folders[1], done[1]))
    assert a["buckets"] == b["buckets"]


def test_a_run_that_fails_ends_the_study_in_a_sentence(tmp_path, monkeypatch, capfd):
    script = tmp_path / "failing.py"
    script.write_text("import sys; sys.exit('error: no room')")
    monkeypatch.setattr(looprpt, "__file__", str(script))
    message = refused(monkeypatch, study, *arguments((tmp_path / "runs", tmp_path / "results")))
    assert message.endswith("base ended with exit status 1: mend what is said above, and go on")
    assert "error: no room" in capfd.readouterr().err


def test_a_run_with_other_flags_is_not_taken_for_one_of_these(done, monkeypatch):
    """Flags of a stage that a run lacks don't matter, nor does the precision, which the machine decides."""
    runs = done[0]
    monkeypatch.setitem(study.TRACKS, "demo", f"{TINY} {STEPS} --rpt.floor 0.5 --gate.steps 9 --precision bf16")
    message = refused(monkeypatch, study, *arguments(done))
    changed = "--rpt.floor 0.0 instead of 0.5"
    assert message == f"{runs / 'seed-0' / 'stage-1'} was trained with {changed}: move it away, or give another --out"
    changed = "--data.operands 3 instead of 4, --model.width 16 instead of 32, --train.batch 8 instead of 9"
    other = TINY.replace("operands 3", "operands 4").replace("width 16", "width 32").replace("batch 8", "batch 9")
    monkeypatch.setitem(study.TRACKS, "demo", f"{other} {STEPS}")
    message = refused(monkeypatch, study, *arguments(done))
    base = runs / "seed-0" / "base"
    for part in (f"{base} was trained with ", *changed.split(", ")):
        assert part in message


def test_differences_are_of_all_seeds_that_both_have_whatever_the_last_call_was_for(done, monkeypatch):
    monkeypatch.setattr(study, "Popen", lambda *_: pytest.fail("trained again"))
    where = ("--out", done[0], "--results", done[1], "--device", "cpu")
    call(monkeypatch, study, "run", "--start", 1, "--seeds", 1, "--only", "stage-1", *where)
    found = json.loads((done[1] / "against.json").read_text())["against"]["all"]
    assert found["dense - stage-1"]["seeds"] == [0, 1]


def test_a_table_takes_the_same_seeds_of_every_variant(done, monkeypatch):
    some = [path for path in files(done[1]) if path.name != "dense-1.json"]
    message = refused(monkeypatch, study, "table", *some)
    remedy = "give those of one folder, results/demo/*.json"
    assert message == f"the files are of demo, not one for each of the seeds [0, 1] (dense): {remedy}"
    twice = refused(monkeypatch, study, "table", *files(done[1]), done[1] / "base-0.json")
    assert "[0, 1] (base): " in twice
    assert "of the seeds [] (no run): " in refused(monkeypatch, study, "table", done[1] / "against.json")
    for command in ("table", "plot"):
        message = refused(monkeypatch, study, command, *files(done[1]), "--bucket", "best")
        assert "base-0.json is no result file of `python -m lab.study run` with curves in --bucket best" in message


def test_a_table_takes_the_files_of_one_track(done, monkeypatch):
    for other in ("base-0.json", "against.json"):
        message = refused(monkeypatch, study, "table", *files(done[1]), ROOT / "results" / "text" / other)
        assert message.startswith("the files are of demo and text, not one for each of the seeds [0, 1]")


@pytest.mark.parametrize(("track", "trained", "reported"), [("text", "gsm8k_train", "gsm8k_test_1019"),
                                                           ("shift", "omni_train", "omni_val")])  # fmt: skip
def test_text_is_trained_on_some_files_and_reported_on_another(
    track, trained, reported, tmp_path, monkeypatch, in_process
):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("gsm8k_train", "omni_train", "gsm8k_test_1019", "omni_val"):
        lines = [{"question": f"{name} {i}?", "answer": f"It is {i} times {name}."} for i in range(40)]
        (texts / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = "--data.tokenizer {0}/tokenizer.json --model.width 16 --model.heads 2 "
    monkeypatch.setitem(study.TRACKS, track, f"{flags} --train.batch 4 {STEPS}")
    folders = tmp_path / "runs", tmp_path / "results"
    where = ("--track", track, "--texts", texts, "--out", folders[0], "--results", folders[1], "--device", "cpu")
    (texts / "omni_train.jsonl").rename(texts / "elsewhere")
    assert "omni_train.jsonl is not there" in refused(monkeypatch, study, "run", *where)
    (texts / "elsewhere").rename(texts / "omni_train.jsonl")
    call(monkeypatch, study, "run", "--seeds", 1, "--only", "stage-2", *where)
    for name, source in (("base", "gsm8k_train"), ("stage-2", trained)):
        path = json.loads((folders[0] / "seed-0" / name / "run.json").read_text())["config"]["data"]["path"]
        assert [line.count(source) for line in Path(path).read_text().splitlines()] == [2] * 40
    assert len((folders[0] / "words.jsonl").read_text().splitlines()) == 80
    test = (folders[0] / "test.jsonl").read_text().splitlines()
    assert [line.count(reported) for line in test] == [2] * 40
    found = json.loads((folders[1] / "stage-2-0.json").read_text())
    tokenizer = text.load_tokenizer(str(folders[0] / "tokenizer.json"))
    rows, _ = data.encode(folders[0] / "test.jsonl", tokenizer, data.DataConfig())
    assert found["buckets"]["all"]["tokens"] == sum(len(row.ids) - row.prompt for row in rows)
    assert folders[0].name in found["command"]
    assert f"--precision {study.fast_precision()}" in found["command"]


def test_the_precision_of_text_is_the_one_that_multiplies_faster(monkeypatch):
    for fast, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        seconds = lambda product, dtype=dtype, **_: [3.0, 1.0 if product().dtype == dtype else 2.0]  # noqa: E731
        monkeypatch.setattr(study.timeit, "repeat", seconds)
        study.fast_precision.cache_clear()
        assert study.fast_precision() == fast
        for track in study.TRACKS:
            flags = study.command(study.StudyConfig(track=track, device="cpu"), Path("out"), 0, "base")
            assert ("--precision" in flags) == (track in ("text", "shift"))
    study.fast_precision.cache_clear()


@pytest.mark.parametrize("track", study.TRACKS)
def test_every_command_of_every_track_is_one_that_looprpt_takes(track, monkeypatch):
    config = study.StudyConfig(track=track)
    base = looprpt.parse(study.command(config, Path("out"), 0, "base"))
    assert (base.objective, base.init) == (("pretrain",), None)
    monkeypatch.setattr(looprpt.checkpoint, "load_config", lambda folder: base.model.resolved())
    for name in VARIANTS.keys() - {"base"}:
        asked = looprpt.parse(study.command(config, Path("out"), 0, name))
        assert (asked.objective, asked.init) == ((VARIANTS[name][0],), Path("out/seed-0/base/base"))


def test_the_controls_are_special_cases_of_the_representation_loss():
    """Next-token training is the last loop's likelihood alone; Stage I weighs each loop as often as it is the exit."""
    rpt = {
        name: looprpt.parse([flag for flag in flags.split() if flag]).rpt
        for name, (stage, _, flags) in VARIANTS.items()
        if stage == "rpt"
    }
    last = {name for name, config in rpt.items() if config.floor == 1}
    exits = {name for name, config in rpt.items() if config.rep_bonus == 0}
    assert (last, exits) == ({"next-token", "next-token-hard"}, {"stage-1", "stage-1-hard"})
    for name in exits:
        assert (rpt[name].floor, rpt[name].lambda_base, rpt[name].ent_weight) == (0, 0, 0.1)


def test_each_recipe_has_a_name_in_words():
    assert [LABELS.get(name, name) for name in ("base", "stage-1", "paper", "exact", "dense", "dense-no-floor")] == [
        "base", "stage-1", "LoopRPT (paper)", "LoopRPT (paper, exact)", "LoopRPT (dense)", "LoopRPT (dense), no-floor"
    ]  # fmt: skip
    recipes = {name: looprpt.parse(VARIANTS[name][2].split()).rpt for name in looprpt.RECIPES}
    assert recipes == looprpt.RECIPES


def test_a_table_has_the_mean_and_the_spread_over_the_seeds(done, monkeypatch, capsys):
    call(monkeypatch, study, "table", *files(done[1]))
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    assert lines[0][-1] == "LoopRPT (dense) ahead by"
    assert [line[0] for line in lines[2:]] == ["base", "stage-1", "LoopRPT (dense)"]
    parts = [json.loads((done[1] / f"base-{seed}.json").read_text())["buckets"]["all"] for seed in (0, 1)]
    a, b = (100 * part["by_loop"][2] for part in parts)
    assert lines[2][3] == f"{(a + b) / 2:.1f} ± {abs(a - b) / 2**0.5:.1f}"
    a, b = (next(p["loops"] for p in part["sweep"] if p["threshold"] == 0.5) for part in parts)
    assert lines[2][5] == f"{(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f}"
    ahead = json.loads((done[1] / "against.json").read_text())["against"]["all"]["dense - base"]
    mean, low, high = (100 * x for x in ahead["matched gate"])
    a, b = (100 * x for x in ahead["each"])
    assert (a + b) / 2 == pytest.approx(mean, abs=1e-3)
    assert lines[2][7] == f"{mean:+.2f} ± {abs(a - b) / 2**0.5:.2f} [{low:+.2f}, {high:+.2f}]"
    assert f"Seeds 0, 1; {parts[0]['tokens']:,} / {parts[1]['tokens']:,} tokens (all)" in out
    (done[1] / "against.json").rename(done[1] / "elsewhere")
    call(monkeypatch, study, "table", *files(done[1]))
    (done[1] / "elsewhere").rename(done[1] / "against.json")
    assert len(re.findall(r"[|] – [|]$", capsys.readouterr().out, re.MULTILINE)) == 2, "not compared"
    call(monkeypatch, study, "table", *files(done[1]), "--only", "dense", "--bucket", "hard")
    assert len(re.findall("^[|]", capsys.readouterr().out, re.MULTILINE)) == 3


def test_a_table_of_accuracy_at_numbers_of_loops(done, monkeypatch, capsys):
    call(monkeypatch, study, "table", *files(done[1]), "--at-loops", 1, 3, "--only", "base", "dense")
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if "|" in line]
    assert lines[0] == ["", "at 1", "at 3"]
    assert [line[0] for line in lines[2:]] == ["base", "LoopRPT (dense)"]
    parts = [json.loads((done[1] / f"dense-{seed}.json").read_text())["buckets"]["all"] for seed in (0, 1)]
    for column, loop in ((1, 0), (2, 2)):  # a curve begins and ends with all tokens at one loop
        a, b = (100 * part["by_loop"][loop] for part in parts)
        assert lines[3][column] == f"{(a + b) / 2:.1f} ± {abs(a - b) / 2**0.5:.1f}"
    assert f"Seeds 0, 1; {parts[0]['tokens']:,} / {parts[1]['tokens']:,} tokens (all)." in out


def test_a_table_of_loops_at_each_operand(monkeypatch, capsys, tmp_path):
    """Mean and spread over seeds, and Spearman's correlation of operand and average loops, ties included."""
    for seed, loops in enumerate(([1.0, 2.0, 2.0, 4.0], [2.0, 2.0, 2.0, 2.0])):
        found = json.loads((ROOT / f"results/demo/base-{seed}.json").read_text())
        found["buckets"] = {"all": found["buckets"]["all"]}
        for n, x in enumerate(loops, 1):
            found["buckets"][f"depth_{n}"] = {"sweep": [{"threshold": 0.5, "loops": x, "accuracy": 0.5}]}
        (tmp_path / f"base-{seed}.json").write_text(json.dumps(found))
    call(monkeypatch, study, "table", *files(tmp_path), "--operands")
    head, _, row, *_ = capsys.readouterr().out.splitlines()
    assert head == "|  | 1 | 2 | 3 | 4 | rank correlation |"
    first, second = 4.5 / (4.5 * 5) ** 0.5, 0  # of ranks 1 2.5 2.5 4 with 1 2 3 4, and of equal ones
    mean, spread = (first + second) / 2, abs(first - second) / 2**0.5
    cells = f"1.50 ± 0.71 | 2.00 ± 0.00 | 2.00 ± 0.00 | 3.00 ± 1.41 | {mean:.2f} ± {spread:.2f}"
    assert row == f"| base | {cells} |"


def test_each_seeds_curve_is_read_for_itself(done, monkeypatch, capsys, tmp_path):
    """Averaged before they are read, curves whose points lie elsewhere would give something else."""
    for seed, curve in enumerate(([[1, 0.2], [1.5, 0.6], [3, 0.6]], [[1, 0.4], [2.5, 0.4], [3, 0.8]])):
        found = json.loads((done[1] / f"base-{seed}.json").read_text())
        found["buckets"]["all"]["curves"]["gate"] = curve
        (tmp_path / f"base-{seed}.json").write_text(json.dumps(found))
    call(monkeypatch, study, "table", *files(tmp_path), "--at-loops", 1.25, 2.75)
    assert "| base | 40.0 ± 0.0 | 60.0 ± 0.0 |" in capsys.readouterr().out


def test_what_has_no_curves_is_refused_in_words(done, monkeypatch, tmp_path):
    for path in files(done[1]):
        found = json.loads(path.read_text())
        if path.name == "dense-1.json":
            del found["buckets"]["all"]["curves"]
        (tmp_path / path.name).write_text(json.dumps(found))
    for args in (["table", *files(tmp_path)], ["plot", *files(tmp_path), "--out", tmp_path / "a"]):
        message = refused(monkeypatch, study, *args)
        assert "dense-1.json is no result file" in message
        assert message.endswith("with curves in --bucket all: give results/demo/*.json, and all, easy, medium or hard")


def test_a_picture_holds_a_curve_for_each_variant(done, monkeypatch, tmp_path):
    figures, names, labels = {}, ["base", "stage-1", "dense"], ["base", "stage-1", "LoopRPT (dense)"]
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path, **_: figures.update({path: figure}))
    call(monkeypatch, study, "plot", *files(done[1]), "--out", tmp_path / "assets")
    assert [path.name for path in figures] == ["demo-pareto.png"]
    ((left, right),) = (figure.axes for figure in figures.values())
    assert left.get_ylabel() == "accuracy in %, tokens (all)"
    assert [label.get_text() for label in right.get_legend().get_texts()] == labels

    def mean(name, points):
        scores = [json.loads((done[1] / f"{name}-{seed}.json").read_text())["buckets"]["all"] for seed in (0, 1)]
        return torch.tensor([points(s) for s in scores]).mean(0).flatten().tolist()

    half = [mean(name, study.at_threshold_half) for name in names]
    for axes in (left, right):
        assert axes.get_xlabel().startswith("average loops")
        lines = {line.get_label(): line for line in axes.lines}
        assert len({(lines[label].get_color(), lines[label].get_marker()) for label in labels}) == 3
        for name, label in zip(names, labels, strict=True):
            points = [x for point in lines[label].get_xydata().tolist() for x in (point[0], point[1] / 100)]
            assert points == pytest.approx(mean(name, lambda s: s["curves"]["gate"]), rel=1e-5)
        marks = [line.get_xydata()[0].tolist() for line in axes.lines if len(line.get_xydata()) == 1]
        assert marks == [pytest.approx([loops, 100 * accuracy]) for loops, accuracy in half]
    left_low, left_high = left.get_xlim()
    assert left_low < 1 < 3 < left_high, "the left panel holds whole curves, the right one the best"
    loops, accuracy = zip(*marks, strict=True)
    assert right.get_xlim() == pytest.approx((min(loops) - 0.2, max(loops) + 0.2))
    assert right.get_ylim() == pytest.approx((max(accuracy) - 2.5, max(accuracy) + 0.5))


@pytest.mark.parametrize(("bucket", "nats"), [("easy", "0.5 to 1.0 nats"), ("hard", "1.5 nats or more")])
def test_a_picture_says_which_tokens_it_is_of(bucket, nats, monkeypatch, tmp_path):
    labels = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda f, _, **__: labels.append(f.axes[0].get_ylabel()))
    paths = sorted((ROOT / "results/text").glob("dense-?.json"))
    call(monkeypatch, study, "plot", *paths, "--bucket", bucket, "--out", tmp_path)
    assert labels == [f"accuracy in %, tokens of {nats}"]


def test_a_picture_is_written(monkeypatch, tmp_path):
    call(monkeypatch, study, "plot", *(ROOT / path for path in DEMO), "--out", tmp_path / "assets")
    assert [path.name for path in (tmp_path / "assets").iterdir()] == ["demo-pareto.png"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "--seeds", "0"], "--seeds 0 is out of its range: give a number 1 or more"),
        (["run", "--start", "-1"], "--start -1 is out of its range: give a number 0 or more"),
        (["run", "--only", "best"], "--only best: unknown, there are base"),
        (["table", *DEMO, "--only", "best"], "--only best: unknown, there are base, dense"),
        (["table", *DEMO, "--at-loops", "2", "--operands"], "--operands: give files of chain arithmetic"),
        (["table", *DEMO, "--bucket", "hard", "--operands"], "--operands: give files of chain arithmetic"),
        (["table", "results/text/base-0.json", "--operands"], "--operands: give files of chain arithmetic"),
        (["table", *DEMO, "--at-loops", "0.5", "2", "7"], "--at-loops 0.5 7.0: these models have between 1 and 4"),
        (["table"], "the files are of nothing, not one for each of the seeds [] (no run): give"),
        (["table", "results/bench.json"], "no result file of `python -m lab.study run`"),
        (["plot", "nowhere.json"], "nowhere.json is no result file"),
        (["plot", "results/demo/no-kl-0.json"], "nothing to draw: it takes runs of base"),
    ],
)
def test_refusals(monkeypatch, args, message):
    monkeypatch.chdir(ROOT)
    assert message in refused(monkeypatch, study, *args)
