"""The study: what is run, what is done again, what its files, tables and pictures say."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import data
import eval
import looprpt
import model
from eval import VARIANTS
from model import UserError

TINY = "--data.operands 3 --data.val-rows 1000 --model.loops 3 --model.width 16 --model.heads 2 --train.batch 8"
DEMO = ("results/demo/base-0.json", "results/demo/looprpt-0.json")
STEPS = "--pretrain.steps 6 --rpt.steps 4 --gate.steps 4"


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, args)])
    eval.main()


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(eval.TRACKS, "demo", f"{TINY} {STEPS}")
        patch.setattr(eval, "DataConfig", lambda **how: data.DataConfig(**{"operands": 3, "val_rows": 1000} | how))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Two seeds of three variants; the folders of runs and of results."""
    folder = tmp_path_factory.mktemp("study")
    folders = folder / "runs", folder / "results"
    with pytest.MonkeyPatch.context() as patch:
        study(patch, folders)
    return folders


def study(monkeypatch, folders, *args):
    where = ("--out", folders[0], "--results", folders[1], "--device", "cpu")
    call(monkeypatch, "study", "--seeds", 2, "--only", "stage-1", "looprpt", *where, *args)


def files(folder):
    return sorted(folder.glob("*.json"))


def test_a_study_leaves_a_file_for_each_run_and_one_of_differences(done):
    results = done[1]
    expected = {f"{name}-{seed}.json" for name in ("base", "stage-1", "looprpt") for seed in (0, 1)} | {"against.json"}
    assert {path.name for path in files(results)} == expected
    found = json.loads((results / "looprpt-1.json").read_text())
    assert (found["variant"], found["seed"], found["track"]) == ("looprpt", 1, "demo")
    assert found["command"].startswith("python looprpt.py --objective rpt --init ")
    assert len(found["buckets"]["all"]["by_loop"]) == 3
    assert [now["step"] for now in found["training"]] == [1, 2, 3, 4]
    assert found["commit"] == eval.git("rev-parse", "HEAD")
    pairs = json.loads((results / "against.json").read_text())["against"]["all"]
    assert pairs.keys() == {
        f"{a} - {b}" for a, b in
        (("base", "stage-1"), ("stage-1", "base"), ("looprpt", "base"), ("looprpt", "stage-1"))
    }  # fmt: skip


def test_all_variants_of_a_seed_start_from_its_base_and_see_the_same_rows(done):
    runs, results = done
    for seed in (0, 1):
        records = [
            json.loads((runs / f"seed-{seed}" / name / "run.json").read_text()) for name in ("stage-1", "looprpt")
        ]
        assert {record["config"]["init"] for record in records} == {str(runs / f"seed-{seed}" / "base" / "base")}
        assert [record["config"]["seed"] for record in records] == [seed, seed]
    numbers = [json.loads(path.read_text())["buckets"] for path in files(results) if path.name != "against.json"]
    sizes = [{name: bucket["tokens"] for name, bucket in found.items()} for found in numbers]
    assert sizes[0] == sizes[2] == sizes[4], "one seed's tokens are sorted by its base, for all variants"
    base = json.loads((results / "base-0.json").read_text())["buckets"]["all"]
    again = eval.score(
        model.load(runs / "seed-0" / "base" / "base"),
        data.source(None, data.DataConfig(operands=3, val_rows=1000), batch=64, seed="study", held_out=True),
        device=torch.device("cpu"),
    )
    assert base["by_loop"] == pytest.approx(eval.summary(again, eval.buckets(again)["all"])["by_loop"], rel=1e-4)


def test_the_differences_are_those_of_the_accuracies_averaged_over_the_seeds(done):
    results = done[1]
    get = lambda name, seed: json.loads((results / f"{name}-{seed}.json").read_text())["buckets"]["all"]["by_loop"]  # noqa: E731
    found = json.loads((results / "against.json").read_text())["against"]["all"]["looprpt - stage-1"]
    for loop in range(3):
        mean = sum(get("looprpt", s)[loop] - get("stage-1", s)[loop] for s in (0, 1)) / 2
        assert found[f"by_loop {loop + 1}"][0] == pytest.approx(mean, abs=2e-5)
        assert found[f"by_loop {loop + 1}"][1] <= found[f"by_loop {loop + 1}"][2]


def test_what_is_there_is_not_done_again(done, monkeypatch):
    results = done[1]
    times = {path: path.stat().st_mtime_ns for path in files(results) if path.name != "against.json"}
    (results / "stage-1-1.json").unlink()
    monkeypatch.setattr(looprpt, "train", lambda *_, **__: pytest.fail("trained again"))
    study(monkeypatch, done)
    for path, time in times.items():
        assert (path.stat().st_mtime_ns == time) == (path.name != "stage-1-1.json")


def test_a_study_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    """The third run gets its stop signal after two steps; the study ends, and the next call ends up where one without
    a stop does."""
    folders, whole = (tmp_path / "runs", tmp_path / "results"), (tmp_path / "whole", tmp_path / "whole-results")
    train = looprpt.train

    def stopping(run, config, rows, **how):
        if config.folder.name == "looprpt":
            how["stopping"] = lambda: run.step >= 1
        return train(run, config, rows, **how)

    with monkeypatch.context() as patch:
        patch.setattr(looprpt, "train", stopping)
        study(patch, folders)
    assert not (folders[1] / "looprpt-0.json").exists()
    assert (folders[0] / "seed-0" / "looprpt" / "state").exists()
    study(monkeypatch, folders)
    study(monkeypatch, whole)
    for name in ("looprpt-0", "stage-1-1"):
        a, b = (json.loads((results / f"{name}.json").read_text()) for results in (folders[1], whole[1]))
        assert (a["buckets"], a["training"]) == (b["buckets"], b["training"])


def test_a_run_with_other_flags_is_not_taken_for_one_of_these(done, monkeypatch):
    monkeypatch.setitem(eval.TRACKS, "demo", f"{TINY} {STEPS} --rpt.lambda-base 0.5 --gate.steps 9")
    with pytest.raises(
        UserError, match=r"stage-1|looprpt was trained with --rpt.lambda-base 0.05 for 0.5: move it away"
    ):
        study(monkeypatch, done)


def test_differences_are_of_all_seeds_that_both_have_whatever_the_last_call_was_for(done, monkeypatch):
    where = ("--out", done[0], "--results", done[1], "--device", "cpu")
    call(monkeypatch, "study", "--start", 1, "--seeds", 1, "--only", "stage-1", *where)
    found = json.loads((done[1] / "against.json").read_text())["against"]["all"]
    assert found["looprpt - stage-1"]["seeds"] == [0, 1]


def test_a_table_takes_the_same_seeds_of_every_variant(done, monkeypatch):
    some = [path for path in files(done[1]) if path.name != "looprpt-1.json"]
    with pytest.raises(UserError, match=r"looprpt has the seeds \[0\], base has \[0, 1\]"):
        call(monkeypatch, "table", *some)
    with pytest.raises(UserError, match="base has the seeds"):
        call(monkeypatch, "table", *files(done[1]), done[1] / "base-0.json")
    for program in ("table", "plot"):
        with pytest.raises(UserError, match=r"base-0\.json has no bucket best: it has all, easy"):
            call(monkeypatch, program, *files(done[1]), "--bucket", "best")


def test_a_bucket_without_tokens_is_no_end_of_a_study(done, tmp_path, monkeypatch, capsys):
    for path in files(done[1]):
        found = json.loads(path.read_text())
        if "buckets" in found:
            scores = found["buckets"]["all"]
            empty = {"tokens": 0, "by_loop": [None] * 3, "ce": [None] * 3, "sweep": [dict(scores["sweep"][4])]}
            empty["sweep"][0] |= {"accuracy": None, "loops": None}
            found["buckets"]["hard"] = empty
        (tmp_path / path.name).write_text(json.dumps(found))
    call(monkeypatch, "table", *files(tmp_path), "--bucket", "hard")
    assert "| base | – | – | – | – | – | – |" in capsys.readouterr().out
    with pytest.raises(UserError, match="--bucket hard has no curves"):
        call(monkeypatch, "plot", *files(tmp_path), "--bucket", "hard", "--out", tmp_path / "assets")


def test_text_is_trained_on_some_files_and_reported_on_another(tmp_path, monkeypatch):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("gsm8k_train", "omni_train", "gsm8k_test_1019"):
        lines = [{"question": f"{name} {i}?", "answer": f"It is {i} times {name}."} for i in range(40)]
        (texts / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = "--data.path {0}/train.jsonl --data.tokenizer {0}/tokenizer.json --model.width 16 --model.heads 2 "
    monkeypatch.setitem(eval.TRACKS, "text", f"{flags} --train.batch 4 {STEPS}")
    folders = tmp_path / "runs", tmp_path / "results"
    where = ("--out", folders[0], "--results", folders[1], "--device", "cpu")
    (texts / "omni_train.jsonl").rename(texts / "elsewhere")
    with pytest.raises(UserError, match=r"omni_train\.jsonl is not a file"):
        call(monkeypatch, "study", "--track", "text", "--texts", texts, *where)
    (texts / "elsewhere").rename(texts / "omni_train.jsonl")
    call(monkeypatch, "study", "--track", "text", "--texts", texts, "--seeds", 1, "--only", "stage-2", *where)
    train, test = ((folders[0] / f"{name}.jsonl").read_text() for name in ("train", "test"))
    assert len(train.splitlines()) == 40
    assert len((folders[0] / "words.jsonl").read_text().splitlines()) == 80
    assert "gsm8k_test_1019" not in train
    assert len(test.splitlines()) == 40
    found = json.loads((folders[1] / "stage-2-0.json").read_text())
    tokenizer = data.load_tokenizer(str(folders[0] / "tokenizer.json"))
    rows, _ = data.encode(folders[0] / "test.jsonl", tokenizer, data.DataConfig())
    assert found["buckets"]["all"]["tokens"] == sum(len(row.ids) - row.prompt for row in rows)
    assert folders[0].name in found["command"]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("track", eval.TRACKS)
def test_every_command_of_every_track_is_one_that_looprpt_takes(track, name):
    flags = eval.command(eval.StudyConfig(track=track), Path("out"), 0, name)
    at = flags.index("--init") if "--init" in flags else None
    config = looprpt.parse(flags[:at] + flags[at + 2 :] if at else flags)
    assert config.objective == (VARIANTS[name][0],)
    if at:
        config = looprpt.replace(config, init=Path(flags[at + 1]))
    config.check()


def test_the_published_values_are_one_flag(tmp_path):
    assert looprpt.parse(["--paper"]).rpt == looprpt.PAPER
    config = looprpt.parse(["--paper", "--rpt.rollouts", "4"])
    assert config.rpt == looprpt.replace(looprpt.PAPER, rollouts=4)
    assert looprpt.parse([]).rpt == looprpt.RPTConfig()


def test_a_table_has_the_mean_and_the_spread_over_the_seeds(done, monkeypatch, capsys):
    call(monkeypatch, "table", *files(done[1]))
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    assert [line[0] for line in lines[2:]] == ["base", "stage-1", "looprpt"]
    parts = [json.loads((done[1] / f"base-{seed}.json").read_text())["buckets"]["all"] for seed in (0, 1)]
    a, b = (100 * part["by_loop"][2] for part in parts)
    assert lines[2][3] == f"{(a + b) / 2:.1f} ± {abs(a - b) / 2**0.5:.1f}"
    a, b = (next(p["loops"] for p in part["sweep"] if p["threshold"] == 0.5) for part in parts)
    assert lines[2][5] == f"{(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f}"
    ahead = json.loads((done[1] / "against.json").read_text())["against"]["all"]["looprpt - base"]
    mean, low, high = (100 * x for x in ahead["matched gate"])
    a, b = (100 * x for x in ahead["each"])
    assert (a + b) / 2 == pytest.approx(mean, abs=1e-3)
    assert lines[2][7] == f"{mean:+.2f} ± {abs(a - b) / 2**0.5:.2f} [{low:+.2f}, {high:+.2f}]"
    assert f"Seeds 0, 1; {parts[0]['tokens']:,} / {parts[1]['tokens']:,} tokens (all)" in out
    (done[1] / "against.json").rename(done[1] / "elsewhere")
    call(monkeypatch, "table", *files(done[1]))
    (done[1] / "elsewhere").rename(done[1] / "against.json")
    assert len(re.findall(r"[|] – [|]$", capsys.readouterr().out, re.MULTILINE)) == 2, "not compared"
    call(monkeypatch, "table", *files(done[1]), "--only", "looprpt", "--bucket", "hard")
    assert len(re.findall("^[|]", capsys.readouterr().out, re.MULTILINE)) == 3


def test_a_table_of_what_each_exit_rule_makes_of_a_number_of_loops(done, monkeypatch, capsys):
    call(monkeypatch, "table", *files(done[1]), "--at-loops", 1, 3, "--only", "base", "looprpt")
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if "|" in line]
    assert lines[0] == ["", "leaves by", "at 1", "at 3"]
    assert [line[:2] for line in lines[2:]] == [[n, r] for n in ("base", "looprpt") for r in (*eval.RULES, "random")]
    parts = [json.loads((done[1] / f"looprpt-{seed}.json").read_text())["buckets"]["all"] for seed in (0, 1)]
    for column, loop in ((2, 0), (3, 2)):  # a curve begins and ends with all tokens at one loop
        a, b = (100 * part["by_loop"][loop] for part in parts)
        assert {line[column] for line in lines[8:]} == {f"{(a + b) / 2:.1f} ± {abs(a - b) / 2**0.5:.1f}"}
    assert f"Seeds 0, 1; {parts[0]['tokens']:,} / {parts[1]['tokens']:,} tokens (all); trained at" in out
    call(monkeypatch, "table", *files(done[1]), "--at-loops", 2, "--rules", "gate")
    assert len(capsys.readouterr().out.splitlines()) == 7


def test_each_seeds_curve_is_read_for_itself(done, monkeypatch, capsys, tmp_path):
    """Averaged before they are read, curves whose points lie elsewhere would give something else."""
    for seed, curve in enumerate(([[1, 0.2], [1.5, 0.6], [3, 0.6]], [[1, 0.4], [2.5, 0.4], [3, 0.8]])):
        found = json.loads((done[1] / f"base-{seed}.json").read_text())
        found["buckets"]["all"]["curves"]["gate"] = curve
        (tmp_path / f"base-{seed}.json").write_text(json.dumps(found))
    call(monkeypatch, "table", *files(tmp_path), "--at-loops", 1.25, 2.75, "--rules", "gate")
    assert "| base | gate | 40.0 ± 0.0 | 60.0 ± 0.0 |" in capsys.readouterr().out


def test_what_has_no_curves_is_refused_in_words(done, monkeypatch, tmp_path):
    for path in files(done[1]):
        found = json.loads(path.read_text())
        if path.name == "looprpt-1.json":
            del found["buckets"]["all"]["curves"]
        (tmp_path / path.name).write_text(json.dumps(found))
    for args in (["table", *files(tmp_path), "--at-loops", 2], ["plot", *files(tmp_path), "--out", tmp_path / "a"]):
        with pytest.raises(UserError, match="--bucket all has no curves in these runs"):
            call(monkeypatch, *args)
        with pytest.raises(UserError, match="--bucket depth_1 has no curves"):
            call(monkeypatch, *args, "--bucket", "depth_1")


def test_pictures_of_a_study(done, monkeypatch, tmp_path):
    call(monkeypatch, "plot", *files(done[1]), "--out", tmp_path / "assets")
    pictures = {path.name: path.stat().st_size for path in (tmp_path / "assets").iterdir()}
    assert pictures.keys() == {f"demo-{name}.png" for name in ("pareto", "by-loop", "exits", "training")}
    assert min(pictures.values()) > 10_000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["study", "--seeds", "0"], "below 1"),
        (["study", "--only", "best"], "no such variant, the variants are base"),
        (["table", *DEMO, "--only", "best"], "--only best: these runs have base, looprpt"),
        (["table", *DEMO, "--at-loops", "2", "--rules", "best"], "--rules best: these runs have gate, confidence"),
        (["table", *DEMO, "--rules", "gate"], "give --at-loops too"),
        (["table", *DEMO, "--at-loops", "0.5", "2", "7"], "--at-loops 0.5 7.0: these models have between 1 and 4"),
        (["table"], "no run's file among those given: give the files of one folder"),
        (["table", "results/bench.json"], "no result of `eval.py study`"),
        (["plot", "nowhere.json"], "nowhere.json"),
    ],
)
def test_refusals(monkeypatch, args, message):
    monkeypatch.chdir(Path(eval.__file__).parent)
    with pytest.raises((UserError, SystemExit), match=message):
        call(monkeypatch, *args)
