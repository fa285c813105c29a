"""README and docs: every command runs, every table is that of the results, every link leads somewhere."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch
import tyro
from helpers import call

import eval
import looprpt
import sample
from lab import bench, harness, study
from model import LoopedTransformer
from support import checkpoint, text

ROOT = Path(__file__).parent.parent


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [part.strip() for line in lines if line for part in line.split("&&")]


@pytest.mark.slow
def test_every_command_of_the_docs_runs(tmp_path, monkeypatch):
    """As written and in their order, only with fewer steps, and two processes for eight. The tables have a test."""
    questions = [{"question": f"{i} + {i}?", "answer": f"The sum is {2 * i}."} for i in range(40)]
    ouro = replace(looprpt.ModelConfig(), vocab_size=259, layers=1, width=32, heads=2)
    checkpoint.save(LoopedTransformer(ouro), tmp_path / "Ouro-1.4B", text.byte_tokenizer(), dtype=torch.bfloat16)
    for name in ("small", "medium", "ouro-2.6b"):
        monkeypatch.setitem(bench.SHAPES, name, ouro)
    for name in ("train", "val"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    few = "--pretrain.steps 2 --gate.steps 2 --rpt.steps 2 --data.val-rows 64 --train.batch 8".split()
    short = {"rpt": "--no-compile --rounds 1 --rows 1 --length 64", "decode": "--rounds 1 --tokens 8"}
    monkeypatch.chdir(tmp_path)
    seen = []
    modules = {"support.text": text, "support.checkpoint": checkpoint, "lab.bench": bench, "lab.study": study}
    modules |= {"looprpt.py": looprpt, "eval.py": eval, "sample.py": sample}
    for command in commands():
        program, *args = shlex.split(command)
        seen.append(program)
        if program == "python":
            script, args = (args[1], args[2:]) if args[0] == "-m" else (args[0], args[1:])
            seen[-1] = script
            if script == "lab.harness":  # its tasks are on a hub: the flags are read, no more
                assert tyro.cli(harness.HarnessConfig, args=args).exit_threshold == 0.5
            elif script == "lab.study" and args[0] == "run":  # hours; tests/test_study.py runs it
                tyro.cli(study.StudyConfig, args=args[1:])
            elif [script, *args[:1]] != ["lab.study", "table"]:
                args += few if script == "looprpt.py" else short.get(args[0], "").split()
                call(monkeypatch, modules[script], *expanded(args))
        elif program == "torchrun" and "--nnodes" not in args:  # of two machines, tests/test_faults.py makes two
            count, script, rest = args[:2], args[2], args[3:]
            assert count == ["--nproc-per-node", "8"]
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", count[0], "2"]
            alone = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([*launcher, ROOT / script, *rest, *few], check=True, env=alone)
            assert (tmp_path / "eight" / "results.json").exists()
        elif program != "torchrun":
            assert command in ("pip install -r requirements.txt", "pytest", "pytest -m slow"), command
    assert {*seen} >= {*modules, "torchrun", "lab.harness"}


def expanded(args: list[str]) -> list[str]:
    """With what a shell makes of a *, as seen from the project's folder."""
    return [*itertools.chain(*(sorted(map(str, ROOT.glob(arg))) if "*" in arg else [arg] for arg in args))]


def test_the_docs_have_what_their_table_commands_print(monkeypatch, capsys):
    tables = [shlex.split(c)[3:] for c in commands() if c.startswith("python -m lab.study table ")]
    assert len(tables) >= 5
    for args in tables:
        call(monkeypatch, study, *expanded(args))
        printed = capsys.readouterr().out.strip()
        assert not [line for line in printed.split("\n") if line not in TEXT.split("\n")], args  # the odd rows
        assert printed in TEXT, args


@pytest.mark.parametrize("track", ["text", "shift"])
def test_the_readme_table_of_five_rows_is_that_of_the_results(track):
    tables, results = (ROOT / "README.md").read_text().split("| **Omni-MATH** |"), ROOT / "results" / track
    ahead = json.loads((results / "against.json").read_text())["against"]["hard"]
    labels = study.LABELS | {"next-token": "next-token training", "stage-1": "continued Stage I"}
    for name in ("base", "next-token", "stage-1", "paper", "dense"):
        buckets = [json.loads((results / f"{name}-{seed}.json").read_text())["buckets"]["hard"] for seed in range(3)]
        loops, accuracy = zip(*map(study.at_threshold_half, buckets), strict=True)
        cells = [[100 * b["by_loop"][-1] for b in buckets], [100 * a for a in accuracy]]
        row = [labels.get(name, name), *(study.mean_std(values, 1) for values in cells), study.mean_std([*loops], 2)]
        if name != "dense":
            middle, low, high = (100 * x for x in ahead[f"dense - {name}"]["matched gate"])
            row.append(f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]")
        assert f"| {' | '.join(row)} |" in tables[track == "shift"], name


def test_every_link_leads_to_a_file_of_the_project():
    for page in PAGES:
        links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
        assert links
        for link in links:
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_readme_is_short_and_knows_how_long_the_files_are():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 200
    files = re.findall(r"\[`([a-z/]+\.py)`\]\([^)]*\)\*{0,2} \| (\d+) \|", readme)
    assert len(files) >= 5
    for name, lines in files:
        assert int(lines) == (ROOT / name).read_text().count("\n"), name


def test_the_readme_table_of_loops_by_operand_is_that_of_the_results():
    for name in ("base", "dense"):
        found = [
            json.loads(path.read_text())["buckets"] for path in sorted((ROOT / "results/demo").glob(f"{name}-?.json"))
        ]
        assert len(found) == 3
        depths = [mean(study.at_threshold_half(b[f"depth_{d}"])[0] for b in found) for d in range(1, 7)]
        assert f"| {study.LABELS.get(name, name)} | {' | '.join(f'{x:.2f}' for x in depths)} |" in TEXT


def test_the_docs_tables_of_generation_are_those_of_the_results():
    for name in ("decode", "decode-batch-8", "decode-batch-32"):
        found = json.loads((ROOT / "results" / f"{name}.json").read_text())
        assert f"commit {found['commit'][:7]}" in TEXT
        for r in found["rows"]:
            label = "all loops" if r["threshold"] == 1 else r["threshold"]
            speeds = f"{r['speedup']:.2f} | {r['ideal']:.2f} | {r['of_ideal']:.2f}"
            assert f"| {label} | {r['tokens_per_s']:.1f} | {r['loops']:.2f} | {speeds} |" in TEXT
    for drafts in (4, 8):
        rows = json.loads((ROOT / "results" / f"decode-verify-{drafts}.json").read_text())["rows"]
        speeds = " | ".join(f"{r['speedup']:.2f}" for r in rows[:-1])
        assert f"| K = {drafts} | {speeds} |" in TEXT
    rows = json.loads((ROOT / "results" / "cache.json").read_text())["rows"]
    for rule in ("full", "copy", "last"):
        cells = [f"{100 * r['accuracy']:.1f} at {r['loops']:.2f}" for r in rows if r["cache"] == rule]
        assert f"| `{rule}` | {' | '.join(cells)} |" in TEXT


def speeds_markdown(runs: list[dict]) -> str:
    lines = ["|  | tokens/s | speed-up |", "|---|---|---|"]
    for run in runs:
        args = run["argv"][1 : run["argv"].index("--out")]
        lines.append(f"| **`{shlex.join(['python', '-m', 'lab.bench', *args])}`** ({run['precision']}) | | |")
        for row in run["forms"]:
            form, *compiled = row["form"].split(", ")
            name = ", ".join([study.LABELS.get(form, form), *compiled])
            lines.append(f"| {name} | {' | '.join(bench.speed_cells(row)[1:3])} |")
    return "\n".join(lines)


def test_the_docs_table_of_speeds_is_that_of_the_results():
    runs = json.loads((ROOT / "results" / "bench.json").read_text())["runs"]
    assert speeds_markdown(runs) in TEXT
    (commit,) = {run["commit"] for run in runs}
    assert f"commit {commit[:7]}" in TEXT


def test_results_hold_no_path_of_the_machine_that_made_them():
    for path in (ROOT / "results").rglob("*.json"):
        assert not re.findall(r"""["'\s=]/[^\s/"]+""", path.read_text()), path
