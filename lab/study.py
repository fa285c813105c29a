"""The study: LoopRPT beside its controls and its ablations, each trained from the same base on the same rows.

python -m lab.study run --track demo                        train and score every variant, three seeds
python -m lab.study table results/demo/*.json               the results as Markdown
python -m lab.study plot results/demo/*.json --out assets   and as a picture
"""

import functools
import itertools
import json
import shlex
import statistics
import sys
import time
import timeit
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import Popen
from typing import Annotated, Literal

import torch
import tyro
from safetensors.torch import load_file, save_file

import data
import eval
import looprpt
from eval import at_threshold_half
from support import checkpoint, runtime, text
from support.processes import stop_signals
from support.ranges import Checked, NonNegative, Positive, flag, flatten_config, unchecked
from support.runs import FOLDER
from support.runtime import Precision, UserError, console

EXACT = "--rpt.estimator exact --rpt.rollouts 1"
NEXT_TOKEN = f"{EXACT} --rpt.floor 1 --rpt.pg-weight 0 --rpt.kl-weight 0 --rpt.ent-weight 0"
STAGE_I = f"{EXACT} --rpt.rep-bonus 0 --rpt.noise-std 0 --rpt.lambda-base 0 --rpt.kl-weight 0 --rpt.ent-weight 0.1"
DENSE = "--recipe dense"
VARIANTS = {  # stage, which of the learning rates, and flags
    "base": ("pretrain", None, ""),
    "next-token": ("rpt", "control", f"{NEXT_TOKEN} --rpt.rho 1"),
    "next-token-hard": ("rpt", "paper", NEXT_TOKEN),
    "stage-1": ("rpt", "control", f"{STAGE_I} --rpt.rho 1"),
    "stage-1-hard": ("rpt", "paper", STAGE_I),
    "stage-2": ("gate", None, "--gate.lr 1e-2"),
    "paper": ("rpt", "paper", ""),
    "exact": ("rpt", "paper", EXACT),
    "gate-only": ("rpt", None, f"{EXACT} --rpt.rep-weight 0 --rpt.gate-only --rpt.lr 1e-2"),
    "rep-only": ("rpt", "paper", f"{EXACT} --rpt.pg-weight 0"),
    "no-rep-no-entropy": ("rpt", "paper", f"{EXACT} --rpt.rep-weight 0 --rpt.ent-weight 0"),
    "no-selection": ("rpt", "paper", f"{EXACT} --rpt.rho 1"),
    "no-noise": ("rpt", "paper", f"{EXACT} --rpt.noise-std 0"),
    "no-kl": ("rpt", "paper", f"{EXACT} --rpt.kl-weight 0"),
    "no-price": ("rpt", "paper", f"{EXACT} --rpt.lambda-base 0"),
    "dense": ("rpt", "dense", DENSE),
    "dense-no-distill": ("rpt", "dense", f"{DENSE} --rpt.distill-weight 0"),
    "dense-no-floor": ("rpt", "dense", f"{DENSE} --rpt.floor 0"),
    "dense-no-policy": ("rpt", "dense", f"{DENSE} --rpt.pg-weight 0"),
    "dense-no-price": ("rpt", "dense", f"{DENSE} --rpt.lambda-base 0"),
}
LABELS = {"paper": "LoopRPT (paper)", "exact": "LoopRPT (paper, exact)", "dense": "LoopRPT (dense)"}
LABELS |= {name: f"LoopRPT (dense), {name.removeprefix('dense-')}" for name in VARIANTS if name.startswith("dense-")}
RATES = {  # LOG.md says how they were chosen
    "demo": {"control": "1e-3", "paper": "1e-3", "dense": "1e-3"},
    "deep": {"control": "1e-3", "paper": "1e-3", "dense": "1e-3"},
    "text": {"control": "3e-3", "paper": "3e-4", "dense": "3e-3"},
    "shift": {"control": "3e-3", "paper": "1e-3", "dense": "3e-3"},
}
TEXT = (
    "--data.tokenizer {0}/tokenizer.json --data.length 256 --model.layers 2 --model.width 192 --train.batch 8 "
    "--train.compile on --pretrain.steps 2000"
)
TRACKS = {  # flags of all runs; {0}: folder of the study
    "demo": "--gate.steps 500 --rpt.steps 500",
    "deep": "--gate.steps 250 --rpt.steps 250 --data.operands 10 --model.loops 6",
    "text": f"{TEXT} --rpt.steps 1000 --gate.steps 1000",  # more than an epoch of GSM8K
    "shift": f"{TEXT} --rpt.steps 300 --gate.steps 300",  # more than an epoch of Omni-MATH, which no base has seen
}
FILES = ("data.path", "data.tokenizer")  # a base may be copied from the folder of another track
NOT_COMPARED = ("out", "init", "resume", "device", "precision", "model.vocab_size", "model.eos_token_id", *FILES)
COMPARED_BUCKETS = ("all", "hard")  # in which variants are compared with each other
BASELINES = ("base", "stage-1", "paper", "exact")  # what each variant is compared with; dense is with every other


@dataclass(frozen=True)
class StudyConfig(Checked):
    # the built-in task, with 6 operands and 4 loops or 10 and 6 (deep); GSM8K; from its bases, Omni-MATH (shift)
    track: Literal["demo", "deep", "text", "shift"] = "demo"
    seeds: Positive = 3  # number of bases
    start: NonNegative = 0  # seed of the first; several processes can share a study, each with seeds of its own
    only: tuple[str, ...] = ()  # of the variants (none: all)
    texts: Path = Path("../shared/data")  # folder of gsm8k_train, gsm8k_test_1019, omni_train, omni_val .jsonl
    out: Path | None = None  # folder of the runs (none: out/study-TRACK)
    results: Path | None = None  # folder of the result files (none: results/TRACK)
    device: str = "auto"  # cpu, cuda, cuda:1 (auto: a GPU if there is one)


def run(config: Annotated[StudyConfig, tyro.conf.arg(name="")]) -> None:
    """Train a base for each seed and every variant from it, and score all on rows that nothing was chosen by. Each gets
    a result file; what is done already is not done again."""
    config.check()
    names = select(config.only and ("base", *config.only), VARIANTS, "--only")
    folder = config.out or Path("out") / f"study-{config.track}"
    results = config.results or Path("results") / config.track
    runtime.make_folder(folder)
    runtime.make_folder(results)
    if config.track in ("text", "shift"):
        prepare_texts(config.track, config.texts, folder)
    for seed in range(config.start, config.start + config.seeds):
        base_scores = None  # they say which tokens each bucket holds
        for name in names:
            run_folder, result = folder / f"seed-{seed}" / name, results / f"{name}-{seed}.json"
            if not train_variant(config, folder, seed, name):
                console.print("stopped: the same command goes on", soft_wrap=True)
                return
            if result.exists() and (run_folder / "tallies.safetensors").exists():
                continue
            console.print(f"scoring {name}, seed {seed}")
            base_scores = base_scores or score_variant(config, folder, seed, "base")
            scores = base_scores if name == "base" else score_variant(config, folder, seed, name)
            sets = eval.buckets(base_scores)
            summaries = {bucket: eval.summarize(scores, tokens) for bucket, tokens in sets.items()}
            for bucket in summaries.keys() - {"all", *eval.DIFFICULTY}:
                summaries[bucket].pop("curves", None)  # by operand they are many, and nothing reads them
            tallies = {bucket: eval.tally(scores, sets[bucket])._asdict() for bucket in COMPARED_BUCKETS}
            sums = {f"{bucket}.{key}": x.contiguous() for bucket in tallies for key, x in tallies[bucket].items()}
            save_file(sums, run_folder / "tallies.safetensors")
            flags, starts = command(config, folder, seed, name), checkpoint.read_json(run_folder / "run.json")["starts"]
            made = {"variant": name, "seed": seed, "command": shlex.join(["python", "looprpt.py", *flags])}
            write_result(result, config, **made, trained=starts[-1], buckets=summaries)
    compare_variants(config, folder, results)


def prepare_texts(track: str, texts: Path, folder: Path) -> None:
    """Write what bases and variants are trained on, what the tokenizer is learned from, what is reported, and the
    tokenizer itself."""
    files = {"train": ("gsm8k_train",), "words": ("gsm8k_train", "omni_train"), "test": ("gsm8k_test_1019",)}
    if track == "shift":
        files |= {"shift": ("omni_train",), "test": ("omni_val",)}
    for name, sources in files.items():
        if not (folder / f"{name}.jsonl").exists():
            pairs = [pair for file in sources for pair in text.read_documents(texts / f"{file}.jsonl")]
            lines = [json.dumps({"prompt": prompt or "", "response": answer}) + "\n" for prompt, answer in pairs]
            checkpoint.write_atomic(folder / f"{name}.jsonl", "".join(lines))
    if not (folder / "tokenizer.json").exists():
        text.train_tokenizer(folder / "words.jsonl", 2048, folder / "tokenizer.json")


@functools.cache
def fast_precision() -> Precision:
    """The precision in which this CPU multiplies small matrices faster: not every CPU has instructions for bf16."""
    x = {name: torch.ones(256, 256, dtype=dtype) for name, dtype in runtime.DTYPES.items()}
    return min(x, key=lambda name: min(timeit.repeat(lambda: x[name] @ x[name], number=2, repeat=5)))


def command(config: StudyConfig, folder: Path, seed: int, name: str) -> list[str]:
    """Flags of looprpt.py for a run of the study."""
    stage, rate, flags = VARIANTS[name]
    start = ["--init", str(folder / f"seed-{seed}" / "base" / "base")] if name != "base" else []
    shared = [*(x.format(folder) for x in TRACKS[config.track].split()), "--seed", str(seed), "--device", config.device]
    if config.track in ("text", "shift"):
        rows = "shift" if config.track == "shift" and name != "base" else "train"
        shared += ["--data.path", str(folder / f"{rows}.jsonl")]
        if runtime.pick_device(config.device).type == "cpu":
            shared += ["--precision", fast_precision()]
    lr = ["--rpt.lr", RATES[config.track][rate]] if rate else []
    return ["--objective", stage, *start, *shared, *flags.split(), *lr, "--out", str(folder / f"seed-{seed}" / name)]


def train_variant(config: StudyConfig, folder: Path, seed: int, name: str) -> bool:
    """Train a variant by looprpt.py, from its last state if it was cut off. False if it was stopped. Raises UserError
    if the run in its folder was trained with other flags; those of other stages don't matter."""
    flags = command(config, folder, seed, name)
    asked = looprpt.parse(flags)
    if (asked.folder / "run.json").exists():
        recorded = looprpt.parse(["--out", str(asked.folder), "--resume"])
        given, saved = (flatten_config(replace(c, model=c.model.resolved())) for c in (asked, recorded))
        ignored = (*NOT_COMPARED, *(f"{stage}." for stage in FOLDER if stage not in asked.objective))
        chosen = checkpoint.read_json(asked.folder / "run.json").get("chosen", [])  # by size, now as then
        ignored += tuple(key for key in chosen if given[key] in (None, 0, "auto"))
        if changed := [key for key in given if given[key] != saved[key] and not key.startswith(ignored)]:
            others = ", ".join(f"{flag(key, saved[key])} instead of {given[key]}" for key in changed)
            raise UserError(f"{asked.folder} was trained with {others}: move it away, or give another --out")
        flags.append("--resume")
    trained = asked.folder / FOLDER[VARIANTS[name][0]]
    if trained.exists():
        return True
    console.rule(f"{name}, seed {seed}")
    with stop_signals() as stop, Popen([sys.executable, looprpt.__file__, *flags]) as child:
        while child.poll() is None and not stop:
            time.sleep(0.1)
        if stop:
            child.terminate()
    if child.returncode and not stop:
        raise UserError(f"{asked.folder} ended with exit status {child.returncode}: mend what is said above, and go on")
    return trained.exists() and not stop


def score_variant(config: StudyConfig, folder: Path, seed: int, name: str) -> eval.Scores:
    """Score a model on the rows that the track reports on; in float32 on a CPU, in bfloat16 on a GPU."""
    trained, rows = folder / f"seed-{seed}" / name / FOLDER[VARIANTS[name][0]], None
    settings, device = looprpt.parse(command(config, folder, seed, "base")).data, runtime.pick_device(config.device)
    if settings.path:
        rows, notes = data.encode(folder / "test.jsonl", data.pick_tokenizer(settings, trained), settings)
        runtime.print_notes(notes)
    source = data.source(rows, settings, batch=64, seed="study", held_out=True)
    return eval.score(checkpoint.load(trained, device), source, device=device)


def compare_variants(config: StudyConfig, folder: Path, results: Path) -> None:
    """Write the differences between variants, averaged over the seeds that both have, with bootstrap intervals."""
    paths, differences = sorted(folder.glob("seed-*/*/tallies.safetensors")), {}
    for bucket in COMPARED_BUCKETS:
        tallies, differences[bucket] = defaultdict(dict), {}
        for path in runtime.progress_bar(paths, f"comparing {bucket}"):
            name, seed = path.parts[-2], int(path.parts[-3].removeprefix("seed-"))
            if (results / f"{name}-{seed}.json").exists():
                sums = load_file(path)
                tallies[name][seed] = eval.Tally(*(sums[f"{bucket}.{k}"] for k in eval.Tally._fields)).bootstrapped()
        for a, b in itertools.permutations(tallies, 2):
            shared = sorted(tallies[a].keys() & tallies[b].keys())
            drawn = [(tallies[a][seed], tallies[b][seed]) for seed in shared]
            if drawn and (b in BASELINES or a == "dense") and all(tally.tokens.all() for tally, _ in drawn):
                differences[bucket][f"{a} - {b}"] = {"seeds": shared} | eval.compare(drawn)
    write_result(results / "against.json", config, against=differences)


def write_result(path: Path, config: StudyConfig, **content) -> None:
    """Write JSON with what made it, numbers with five digits."""
    content = {"track": config.track} | content | runtime.provenance(runtime.pick_device(config.device))
    rounded = json.loads(json.dumps(content), parse_float=lambda x: float(f"{float(x):.5g}"))
    checkpoint.write_atomic(path, json.dumps(rounded) + "\n")


# Tables and pictures, from the result files alone

Files = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(help="what `python -m lab.study run` wrote")]
Bucket = Annotated[str, tyro.conf.arg(help="all, easy, medium or hard")]


def load_study(paths: Sequence[Path], bucket: str) -> tuple[dict[str, list[dict]], dict]:
    """Each variant's runs (what a result file holds, and the scores in a bucket), and the differences between variants.
    Raises UserError for a file without curves in the bucket, and for files of several studies or other seeds."""
    results, differences, tracks = defaultdict(list), {}, set()
    for path in paths:
        content = checkpoint.read_json(path) if path.is_file() else {}
        tracks.add(content.get("track"))
        scores = content.get("buckets", {}).get(bucket, {})
        if "curves" in scores:
            results[content["variant"]].append(content | scores)
        elif "against" in content:
            differences = content["against"].get(bucket, {})
        else:
            problem = f"{path} is no result file of `python -m lab.study run` with curves in --bucket {bucket}"
            raise UserError(f"{problem}: give results/demo/*.json, and all, easy, medium or hard")
    seeds = {name: sorted(run["seed"] for run in each) for name, each in results.items()}
    every = sorted({seed for some in seeds.values() for seed in some})
    odd = [name for name, some in seeds.items() if some != every]
    if len(tracks) != 1 or odd or not results:
        problem = f"the files are of {' and '.join(sorted(tracks)) or 'nothing'}, not one for each of the seeds {every}"
        raise UserError(f"{problem} ({', '.join(odd) or 'no run'}): give those of one folder, results/demo/*.json")
    return {name: results[name] for name in dict.fromkeys([*VARIANTS, *results]) if name in results}, differences


def select(names: Sequence[str], among: Collection[str], option: str) -> list[str]:
    """The names given, or all if there are none. Raises UserError for an unknown one."""
    if unknown := [name for name in names if name not in among]:
        raise UserError(f"{option} {' '.join(unknown)}: unknown, there are {', '.join(among)}")
    return [*(names or among)]


def mean_std(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Mean and standard deviation over the seeds."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{spread}"


def table(
    files: Files,
    bucket: Bucket = "all",
    only: Annotated[tuple[str, ...], tyro.conf.arg(help="these variants (none: all)")] = (),
    at_loops: Annotated[tuple[float, ...], tyro.conf.arg(help="instead, accuracy at these average loops")] = (),
    operands: Annotated[bool, tyro.conf.arg(help="instead, average loops at each operand, threshold 0.5")] = False,
) -> None:
    """A study as Markdown: accuracy in % after each loop and at exit threshold 0.5, average loops, mean accuracy under
    the curve, and how far LoopRPT (dense) is ahead at its own average loops (95 % interval); means over the seeds."""
    results, differences = load_study(files, bucket)
    results = {name: results[name] for name in select(only, results, "--only")}
    first, rows = next(iter(results.values())), []
    loops = len(first[0]["by_loop"])
    if wrong := [x for x in at_loops if not 1 <= x <= loops]:
        raise UserError(f"--at-loops {' '.join(map(str, wrong))}: these models have between 1 and {loops} loops")
    if operands and (at_loops or bucket != "all" or "depth_1" not in first[0]["buckets"]):
        raise UserError("--operands: give files of chain arithmetic, results/demo/*.json, without other columns")
    for name, each in results.items():
        cells = [operand_cells(run) if operands else table_cells(run, at_loops) for run in each]
        digits = {head: 2 if operands or head == "average loops" else 1 for head in cells[0]}
        row = {"": LABELS.get(name, name)} | {head: mean_std([x[head] for x in cells], digits[head]) for head in digits}
        lead, cell = differences.get(f"dense - {name}", {}), "" if name == "dense" else "–"
        if lead.get("seeds") == sorted(run["seed"] for run in each):
            (_, low, high), ahead = ([100 * x for x in lead[key]] for key in ("matched gate", "each"))
            cell = f"{mean_std(ahead, 2, '+')} [{low:+.2f}, {high:+.2f}]"
        rows.append(row if at_loops or operands else row | {f"{LABELS['dense']} ahead by": cell})
    lines = [f"| {' | '.join(cells)} |" for cells in (rows[0], *(row.values() for row in rows))]
    print(lines[0], f"|{'---|' * len(rows[0])}", *lines[1:], sep="\n")
    seeds, tokens = ", ".join(str(run["seed"]) for run in first), " / ".join(f"{run['tokens']:,}" for run in first)
    print(f"\nSeeds {seeds}; {tokens} tokens ({bucket}).")


def table_cells(run: dict, at_loops: Sequence[float]) -> dict[str, float]:
    """What a table says of one run, by column, accuracy in %; the gate's curve is read on straight lines."""
    if at_loops:
        curve = torch.tensor(run["curves"]["gate"]).expand(len(at_loops), -1, -1).unbind(-1)
        at = eval.interpolate(torch.tensor(at_loops), *curve).tolist()
        return {f"at {x:g}": 100 * accuracy for x, accuracy in zip(at_loops, at, strict=True)}
    average_loops, accuracy = at_threshold_half(run)
    cells = {f"loop {i}": 100 * x for i, x in enumerate(run["by_loop"], 1)} | {"threshold 0.5": 100 * accuracy}
    return cells | {"average loops": average_loops, "area": 100 * run["area"]["gate"]}


def operand_cells(run: dict) -> dict[str, float]:
    """Average loops at each operand, the depth of its problem, and their rank correlation (0: all are equal)."""
    loops = [at_threshold_half(scores)[0] for name, scores in run["buckets"].items() if name.startswith("depth_")]
    x = torch.tensor(loops, dtype=torch.double)
    ranks = (x[:, None] > x).sum(1) + (x[:, None] == x).sum(1) / 2
    correlation = torch.corrcoef(torch.stack((ranks, torch.arange(len(x)))))[0, 1].nan_to_num().item()
    return {str(n): mean for n, mean in enumerate(loops, 1)} | {"rank correlation": correlation}


# Of lines: colours that the colour-blind tell apart, markers that differ in print
STYLES = {"base": "#000000 o-", "next-token": "#999999 v:", "stage-1": "#0072B2 s--", "paper": "#E69F00 ^--"}
STYLES |= {"dense": "#D55E00 *-"}


def plot(files: Files, out: Path = Path("assets"), bucket: Bucket = "all") -> None:
    """A picture of a study, means over the seeds: accuracy over average loops, whole, and the best 2.5 points of it."""
    from matplotlib.figure import Figure

    results = {name: each for name, each in load_study(files, bucket)[0].items() if name in STYLES}
    if not results:
        raise UserError(f"nothing to draw: it takes runs of {', '.join(STYLES)}")
    runtime.make_folder(out)
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 2, subplot_kw={"xlabel": "average loops (large mark: threshold 0.5)"})
    marks = torch.tensor([[at_threshold_half(run) for run in each] for each in results.values()]).mean(1)  # variants 2
    for ax in axes:
        for (name, each), marked in zip(results.items(), marks, strict=True):
            color, line = STYLES[name].split()
            loops, accuracy = torch.tensor([run["curves"]["gate"] for run in each]).mean(0).T
            ax.plot(marked[0], 100 * marked[1], line, color=color, markersize=10)
            ax.plot(loops, 100 * accuracy, line, color=color, markersize=3, label=LABELS.get(name, name))
        ax.grid(visible=True, alpha=0.3)
    (low, _), (high, best) = marks.amin(0).tolist(), marks.amax(0).tolist()
    axes[1].set(xlim=(low - 0.2, high + 0.2), ylim=(100 * best - 2.5, 100 * best + 0.5))
    sort = "of {} to {} nats".format(*eval.DIFFICULTY[bucket]) if bucket in eval.DIFFICULTY else f"({bucket})"
    axes[0].set_ylabel(f"accuracy in %, tokens {sort}".replace("to inf nats", "nats or more"))
    axes[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    path = out / f"{next(iter(results.values()))[0]['track']}-pareto.png"
    figure.savefig(path, dpi=150)
    console.print(path, soft_wrap=True)


@unchecked()
def main() -> None:
    tyro.extras.subcommand_cli_from_dict({"run": run, "table": table, "plot": plot}, prog="python -m lab.study")


if __name__ == "__main__":
    runtime.run_cli(main)
