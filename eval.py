"""Accuracy after every loop, and at what the gate chooses: checkpoints side by side on the same held-out tokens.

    python eval.py out/base out/rpt                                             the built-in task
    python eval.py out/base out/rpt --data.path val.jsonl --out results.json    a file
    python eval.py harness out/rpt --tasks gsm8k --exit-threshold 0.5           tasks of the lm-evaluation-harness
    python eval.py study --track demo                                           LoopRPT beside its controls, three seeds
    python eval.py table results/demo/*.json                                    what a study found, as Markdown
    python eval.py plot results/demo/*.json --out assets                        and as pictures

A token counts as right if its logit is the largest. Tokens are sorted into buckets once, by the first model.
"""

import contextlib
import itertools
import json
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from rich import box
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

import data
import model
import sample
from data import Batch, Chain, DataConfig, Documents
from model import KEPT, SLICE, LoopedTransformer, Precision, UserError, pick_device, report
from sample import CacheRule, Exit, at_exit, generate

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the gate, to be shown
FINE = tuple(sorted({*THRESHOLDS, *(1 / (1 + math.exp(-x / 2)) for x in range(-18, 19))}))  # of its curve, from 1e-4
DIFFICULTY = {"easy": (0.5, 1.0), "medium": (1.0, 1.5), "hard": (1.5, math.inf)}  # nats of the first model's last loop


@dataclass(frozen=True)
class EvalConfig:
    """Compare checkpoints on the same held-out tokens, after every loop and at every exit threshold."""

    models: Annotated[tuple[Path, ...], tyro.conf.Positional]  # checkpoint folders; the first one makes the buckets
    data: DataConfig
    out: Path | None = None  # where to write results.json
    batch: int = 64  # rows in a forward pass
    seed: int = 0  # seed of the rows of the built-in task
    device: str = "auto"  # cpu, cuda, cuda:1 (auto: a GPU if there is one)
    precision: Precision = "auto"  # of the matrix products (auto: bf16 on a GPU, fp32 on a CPU)
    compile: bool = False  # the layers, by torch.compile

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        self.data.check()
        if not self.models:
            raise UserError("no checkpoint was given: python eval.py out/base out/rpt")
        if self.data.val:
            raise UserError(f"--data.val {self.data.val} is for training: give the held-out file as --data.path")
        if self.batch < 1:
            raise UserError(f"--batch {self.batch} is below 1: give a positive number")
        if self.out and self.out.exists():
            raise UserError(f"--out {self.out} is there already: nothing saved is overwritten, give another name")


class Scores(NamedTuple):
    """What a model does with each token that counts, on the CPU."""

    correct: Tensor  # N L  whether the largest logit is the right token
    gate: Tensor  # N L  exit logits
    entropy: Tensor  # N L  of the distribution after each loop, nats
    logp: Tensor  # N L  log-probability of the right token
    top: Tensor  # N L  log-probability of the likeliest token
    turn: Tensor  # N L  KL(this loop || the one before), nats; infinite for the first
    move: Tensor  # N L  how far the state went in this loop, over the length of the one before; infinite for the first
    row: Tensor  # N  which document it is in
    depth: Tensor | None  # N  operands the answer depends on, for chain arithmetic


@torch.no_grad()
def score(
    m: LoopedTransformer, source: Chain | Documents, *, device: torch.device, precision: Precision = "auto"
) -> Scores:
    """Run a model over one pass of a source, with a progress bar on a terminal."""
    parts, depths, rows = [], [], 0
    size = max(1, (KEPT if device.type == "cuda" else SLICE) // (m.config.loops * m.config.vocab_size))
    for index in track(
        range(source.batches), "scoring", console=console, transient=True, disable=not console.is_terminal
    ):
        whole = source.batch(index)
        batch = counted(whole, device)
        with autocast(device, precision):
            out, where = m(batch.inputs), places(batch.mask, device)  # N
            chosen = (part.flatten(0, 1)[where] for part in (out.hidden, batch.targets, out.gate))  # N L D, N, N L
            found = [read(m, *slices) for slices in zip(*(part.split(size) for part in chosen), strict=True)]
        row = torch.arange(rows, rows + len(batch.mask))[:, None].expand_as(batch.mask)[batch.mask]  # N
        parts.append([*map(torch.cat, zip(*found, strict=True)), row])
        rows += len(batch.mask)
        if source.depth is not None:
            depths.append(source.depth.expand_as(whole.mask)[whole.mask])
    return Scores(*map(torch.cat, zip(*parts, strict=True)), torch.cat(depths) if depths else None)


def read(m: LoopedTransformer, hidden: Tensor, targets: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    """The first seven of the scores of some tokens.    N L D, N, N L -> each N L"""
    logits = m.logits(hidden)  # N L V
    correct = logits.argmax(-1) == targets[:, None]
    logits -= logits.logsumexp(-1, keepdim=True)  # log-probabilities, in place
    p = logits.exp()
    gold = logits.gather(-1, targets[:, None, None].expand(-1, logits.shape[1], 1))[..., 0]
    entropy = -(p * logits).sum(-1)
    turn = -entropy[:, 1:] - (p[:, 1:] * logits[:, :-1]).sum(-1)
    states = hidden.float()
    move = (states[:, 1:] - states[:, :-1]).norm(dim=-1) / states[:, :-1].norm(dim=-1)
    turn, move = (F.pad(x, (1, 0), value=math.inf) for x in (turn, move))
    return tuple(x.cpu() for x in (correct, gate, entropy, gold, logits.amax(-1), turn, move))


def buckets(first: Scores) -> dict[str, Tensor]:
    """Which tokens each bucket holds, by the first model.    -> each N"""
    last = first.entropy[:, -1]
    sets = {"all": torch.ones_like(last, dtype=torch.bool)}
    sets |= {name: (last >= low) & (last < high) for name, (low, high) in DIFFICULTY.items()}
    if first.depth is not None:
        sets |= {f"depth_{d}": first.depth == d for d in range(1, int(first.depth.max()) + 1)}
    return sets


# ---------------------------------------------------------------------------------------------------------------------
# Exit rules: each gives every loop of a token a number, and a token leaves after the first loop whose number reaches a
# threshold, or after the last


RULES = {
    "gate": lambda s: left_by(s.gate),  # cumulative exit probability
    "confidence": lambda s: s.top,  # probability of the likeliest token
    "entropy": lambda s: -s.entropy,
    "kl": lambda s: -s.turn,  # between successive loops
    "state": lambda s: -s.move,  # change of state
}


def left_by(gate: Tensor) -> Tensor:
    """Probability of having left after each loop.    N L -> N L"""
    return F.pad(-torch.expm1(F.logsigmoid(-gate[:, :-1]).cumsum(-1)), (0, 1), value=1.0)


def thresholds(reached: Tensor, rule: str) -> Tensor:
    """The gate's are fixed, another rule's are as many quantiles of its numbers before the last loop.    N L -> K

    They lie close, since a curve is read on straight lines: a chord would be below what a rival can do.
    """
    if rule == "gate":
        return torch.tensor(FINE)
    found = reached[:, :-1][reached[:, :-1].isfinite()].sort().values
    quantiles = torch.linspace(0, 1, len(FINE) + 2)[1:-1]
    return found[(quantiles * len(found)).long()] if len(found) else torch.zeros(len(FINE))


def exits(reached: Tensor, threshold: float) -> Tensor:
    """First loop (from 0) whose number reaches the threshold, the last if none does.    N L -> N"""
    return (reached[:, :-1] < threshold).cumprod(-1).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Sums over documents, of which everything that is reported is a ratio; documents are what the bootstrap draws


class Tally(NamedTuple):
    """Sums over the tokens of a document, or of all. D documents, K thresholds."""

    tokens: Tensor  # D
    correct: Tensor  # D L  after each loop
    logp: Tensor  # D L
    rules: Tensor  # D R K 2  for each exit rule and threshold: right where it leaves, and loops

    def over(self, weights: Tensor) -> "Tally":
        """Totals of documents drawn so often.    weights W D -> each with W for D"""
        return Tally(*(torch.tensordot(weights, x, 1) for x in self))

    def drawn(self, rounds: int = 2000, seed: int = 0) -> "Tally":
        """Totals of the documents themselves, then of as many drawn from them, the same for every model.    -> 1+W"""
        n, generator = len(self.tokens), data.seeded("bootstrap", seed)
        found = [self.over(torch.ones(1, n).double())]
        for start in range(0, rounds, 100):  # so many at once, that memory doesn't grow with the rounds
            chosen = torch.randint(n, (min(100, rounds - start), n), generator=generator)
            found.append(
                self.over(torch.zeros(chosen.shape).scatter_add_(1, chosen, torch.ones(chosen.shape)).double())
            )
        return Tally(*map(torch.cat, zip(*found, strict=True)))

    def by_loop(self) -> Tensor:
        """Accuracy after each loop.    -> D L"""
        return self.correct / self.tokens[:, None]

    def curve(self, rule: str) -> tuple[Tensor, Tensor]:
        """Average loops and accuracy over the thresholds, from the first loop for all to the last.    -> D K+2 twice"""
        accuracy, loops = (self.rules[:, [*RULES].index(rule)] / self.tokens[:, None, None]).unbind(-1)  # D K
        ends = self.by_loop()[:, [0, -1]]  # D 2
        first, last = torch.ones_like(loops[:, :1]), torch.full_like(loops[:, :1], self.correct.shape[1])
        return torch.cat((first, loops, last), -1), torch.cat((ends[:, :1], accuracy, ends[:, 1:]), -1)


def tally(s: Scores, tokens: Tensor) -> Tally:
    """tokens: N, those that count. A document without any stays, so that all tallies of a source draw the same ones."""
    n, row, correct = int(s.row.max()) + 1, s.row[tokens], s.correct[tokens]

    def total(x: Tensor) -> Tensor:  # N ... -> D ...
        return torch.zeros(n, *x.shape[1:], dtype=torch.float64).index_add_(0, row, x.double())

    rules = []
    for name, rule in RULES.items():
        reached, points = rule(s)[tokens], []
        for threshold in thresholds(reached, name):
            leaves = exits(reached, threshold)  # N
            points.append(total(torch.stack((correct.gather(1, leaves[:, None])[:, 0], leaves + 1), -1)))
        rules.append(torch.stack(points, 1))  # D K 2
    return Tally(total(torch.ones(len(row))), total(correct), total(s.logp[tokens]), torch.stack(rules, 1))


def summary(s: Scores, tokens: Tensor) -> dict:
    """Accuracy (0 to 1) and log-loss after each loop, what each exit rule makes of them, and how the gate's exits at
    threshold 0.5 are spread and what they are worth; null if there is no token."""
    n, loops = int(tokens.sum()), s.correct.shape[1]
    if not n:
        return {
            "tokens": 0,
            "by_loop": [None] * loops,
            "ce": [None] * loops,
            "sweep": [{"threshold": t, "accuracy": None, "loops": None} for t in THRESHOLDS],
        }
    each = tally(s, tokens)
    total = each.over(torch.ones(1, len(each.tokens), dtype=torch.float64))
    curves = {name: torch.stack(total.curve(name), -1)[0] for name in RULES}  # K+2 2
    sweep = [
        {"threshold": t, "accuracy": a, "loops": x}
        for t, (x, a) in zip(FINE, curves["gate"][1:-1].tolist(), strict=True)
        if t in THRESHOLDS
    ]
    correct, logp, gate = s.correct[tokens].double(), s.logp[tokens].double(), left_by(s.gate[tokens])
    drawn = []  # exits of the same spread as the gate's, but for any token
    for threshold in FINE:
        share = F.one_hot(exits(gate, threshold), loops).double().mean(0)  # L
        drawn.append([(share @ torch.arange(1.0, loops + 1).double()).item(), (share @ correct.mean(0)).item()])
    curves["random"] = torch.tensor([curves["gate"][0].tolist(), *drawn, curves["gate"][-1].tolist()])
    right = correct.argmax(-1)  # the first loop that is right, or the first
    leaves = exits(gate, 0.5)
    spread = []
    for loop in range(loops):
        here = leaves == loop
        gained, left = (logp[:, loop] - logp[:, 0])[here], (logp[:, -1] - logp[:, loop])[here]
        mean = [x.mean().item() if len(x) else None for x in (gained, left)]
        spread.append({"share": here.double().mean().item(), "gained": mean[0], "left": mean[1]})
    return {
        "tokens": n,
        "by_loop": total.by_loop()[0].tolist(),
        "ce": (-total.logp / n)[0].tolist(),
        "sweep": sweep,
        "curves": {name: curve.tolist() for name, curve in curves.items()},
        "area": {name: area(curve) for name, curve in curves.items()} if loops > 1 else {},
        "oracle": {"loops": (right + 1.0).mean().item(), "accuracy": correct.amax(-1).mean().item()},
        "exits": spread,
    }


def area(curve: Tensor) -> float:
    """Mean accuracy under a curve of loops and accuracy, over all numbers of loops.    K 2 -> 1"""
    loops, accuracy = curve.T
    return (torch.trapezoid(accuracy, loops) / (loops[-1] - loops[0])).item()


def compare(pairs: list[tuple[Tally, Tally]], each: bool = False) -> dict:
    """The first of each pair less the second, averaged over the pairs (seeds), with 95 % intervals by a bootstrap that
    draws documents, the same for all. The tallies are `drawn` ones, of as many rounds.

    by_loop  accuracy after each loop
    at_half  accuracy where the gates leave at threshold 0.5; loops_at_half: their average loops there
    peak     accuracy there less the second's after all loops
    matched  accuracy there less that of the second's curve of each exit rule, at the first's number of loops
    each     each pair's `matched gate`, where it is asked for
    """
    differences = []
    for a, b in pairs:
        if not torch.equal(a.tokens, b.tokens):
            raise UserError("two models were scored on different tokens: score them again, in one run")
        half = [tuple(x[:, FINE.index(0.5) + 1] for x in t.curve("gate")) for t in (a, b)]
        (loops, accuracy), (b_loops, b_accuracy) = half
        found = {f"by_loop {i + 1}": x for i, x in enumerate((a.by_loop() - b.by_loop()).T)}
        found |= {"at_half": accuracy - b_accuracy, "loops_at_half": loops - b_loops}
        found["peak"] = accuracy - b.by_loop()[:, -1]
        found |= {f"matched {rule}": accuracy - at(loops, *b.curve(rule)) for rule in RULES}
        differences.append(found)
    limits = torch.tensor([0.025, 0.975]).double()
    means = {name: sum(d[name] for d in differences) / len(pairs) for name in differences[0]}
    found = {name: [x[0].item(), *x[1:].quantile(limits).tolist()] for name, x in means.items()}
    return found | ({"each": [d["matched gate"][0].item() for d in differences]} if each else {})


def at(x: Tensor, loops: Tensor, accuracy: Tensor) -> Tensor:
    """Accuracy of curves at given numbers of loops, on straight lines between their points.    W, W K, W K -> W"""
    high = (loops <= x[:, None]).sum(-1, keepdim=True).clamp(1, loops.shape[1] - 1)  # W 1
    (x0, x1), (y0, y1) = ((t.gather(1, high - 1)[:, 0], t.gather(1, high)[:, 0]) for t in (loops, accuracy))
    share = ((x - x0) / (x1 - x0).clamp_min(1e-12)).clamp(0, 1)
    return y0 + share * (y1 - y0)


def results(scores: Mapping[str, Scores], *, device: torch.device, seed: int) -> dict:
    """What results.json holds. The buckets are those of the first model, and the others are compared with it."""
    first = next(iter(scores.values()))
    sets, loops = buckets(first), first.correct.shape[1]
    reference = tally(first, sets["all"]).drawn(seed=seed) if len(scores) > 1 and loops > 1 else None
    models = {}
    for name, s in scores.items():
        models[name] = {"buckets": {bucket: summary(s, tokens) for bucket, tokens in sets.items()}}
        if s is not first and s.correct.shape[1] == loops > 1:
            models[name]["beside_first"] = compare([(tally(s, sets["all"]).drawn(seed=seed), reference)])
    return {"models": models} | provenance(device) | {"seed": seed}


def show(found: dict) -> None:
    """Print accuracy by loop, the same by operand or by difficulty, and what each exit rule makes of the loops.

    q=0.5 is the gate's exit at threshold 0.5.
    """
    models = found["models"]
    names = list(next(iter(models.values()))["buckets"])
    depths = [name for name in names if name.startswith("depth_")]
    by = "operand" if depths else "difficulty"
    loops = max(len(m["buckets"]["all"]["by_loop"]) for m in models.values())
    for title, chosen in (("held-out tokens", ["all"]), (f"by {by}", depths or [*DIFFICULTY])):
        style = {"title_justify": "left", "box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
        table = Table(title=f"accuracy in %, {title}", **style)
        for head in ([by] if chosen != ["all"] else []) + ["model"]:
            table.add_column(head, no_wrap=True)
        for head in ["tokens", *(f"loop {i + 1}" for i in range(loops)), "q=0.5", "loops"]:
            table.add_column(head, justify="right", no_wrap=True)
        for bucket in chosen:
            for name, m in models.items():
                b = m["buckets"][bucket]
                half = next(s for s in b["sweep"] if s["threshold"] == 0.5)
                accuracies = [*b["by_loop"], *[None] * (loops - len(b["by_loop"])), half["accuracy"]]
                label = [bucket.removeprefix("depth_")] if chosen != ["all"] else []
                cells = ["–" if a is None else f"{100 * a:.1f}" for a in accuracies]
                mean = "–" if half["loops"] is None else f"{half['loops']:.2f}"
                table.add_row(*label, name, f"{b['tokens']:,}", *cells, mean)
            table.add_section()
        console.print(table)
    rules = [*RULES, "random"]
    table = Table(title="mean accuracy in % over all numbers of loops, by exit rule", **style)
    for head in ("model", *rules, "oracle", "loops"):
        table.add_column(head, justify="left" if head == "model" else "right", no_wrap=True)
    for name, m in models.items():
        b = m["buckets"]["all"]
        if b.get("area"):
            areas, oracle = (f"{100 * b['area'][rule]:.1f}" for rule in rules), b["oracle"]
            table.add_row(name, *areas, f"{100 * oracle['accuracy']:.1f}", f"{oracle['loops']:.2f}")
    if table.row_count:
        console.print(table)


def main() -> None:
    if sys.argv[1:2] == ["harness"]:
        return harness()
    if sys.argv[1:2] == ["study"]:
        return study()
    if sys.argv[1:2] == ["table"]:
        return tyro.cli(table, args=sys.argv[2:], prog="eval.py table")
    if sys.argv[1:2] == ["plot"]:
        return tyro.cli(plot, args=sys.argv[2:], prog="eval.py plot")
    config = tyro.cli(EvalConfig, description=__doc__)
    config.check()
    if config.out:
        make_folder(config.out.parent)
    device = pick_device(config.device)
    shapes = [model.load_config(folder) for folder in config.models]
    for folder, shape in zip(config.models, shapes, strict=True):
        if shape.vocab_size != shapes[0].vocab_size:
            raise UserError(
                f"{folder} has a vocabulary of {shape.vocab_size}, {config.models[0]} one of {shapes[0].vocab_size}: "
                "only models of one tokenizer can be compared token by token"
            )
    tokenizer = data.pick_tokenizer(config.data, config.models[0])
    rows = None
    if config.data.path:
        rows, notes = data.encode(config.data.path, tokenizer, config.data)
        print(*notes, sep="\n", end="\n" * bool(notes))
    source = data.source(rows, config.data, batch=config.batch, seed=config.seed, held_out=True)
    unique = len({folder.name for folder in config.models}) == len(config.models)
    scores = {}
    for folder in config.models:
        m = model.load(folder, device)
        if config.compile:
            m.compile()
        scores[folder.name if unique else str(folder)] = score(m, source, device=device, precision=config.precision)
    found = results(scores, device=device, seed=config.seed)
    show(found)
    if config.out:
        model.write_json(config.out, found)


if __name__ == "__main__":
    report(main)
