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
console = Console()


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


def make_folder(folder: Path) -> None:
    """Raises UserError if there can be no such folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {folder} can't be a folder ({error.strerror}): give another place") from error


def products(device: torch.device, precision: Precision) -> str:
    """What the matrix products are in: bf16 or fp32."""
    return precision if precision != "auto" else "bf16" if device.type == "cuda" else "fp32"


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager:
    """A fresh context for one forward pass; its cached weights go stale after an optimiser step."""
    low = products(device, precision) == "bf16"
    return torch.autocast(device.type, torch.bfloat16) if low else contextlib.nullcontext()


def put(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for what the device still does."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def places(mask: Tensor, device: torch.device) -> Tensor:
    """Where a mask on the CPU is True, as places in its flattened form, on a device.    B T -> N"""
    return put(mask.flatten().nonzero()[:, 0], device)


def counted(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, without the columns after the last token that counts: nothing reads them.

    A batch in which nothing counts becomes two tokens that don't: other processes may wait for this one's passes.
    """
    if not batch.mask.any():
        idle = torch.zeros(1, 2, dtype=torch.long, device=device)
        return Batch(idle, idle, torch.zeros(1, 2, dtype=torch.bool))
    length = int(batch.mask.any(0).nonzero().max()) + 1
    return Batch(*(put(part[:, :length], device) for part in batch[:2]), batch.mask[:, :length])


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


def git(*args: str) -> str | None:
    """What git says of this code; None where there is no git, or this is no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *args]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance(device: torch.device) -> dict:
    """What made a result."""
    return {
        "argv": sys.argv,
        "commit": git("rev-parse", "HEAD"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


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


# ---------------------------------------------------------------------------------------------------------------------
# The lm-evaluation-harness


@dataclass(frozen=True)
class HarnessConfig:
    """Run tasks of the lm-evaluation-harness (pip install lm_eval). Text is generated with exits that stop; a score of
    given text is read at each token's exit, after all loops. Average loops stand beside the scores."""

    folder: Annotated[Path, tyro.conf.Positional]  # checkpoint folder, of this program or of Hugging Face
    tasks: str  # names, with commas between them: gsm8k,arc_challenge
    include_path: Path | None = None  # folder of task files of one's own
    num_fewshot: int | None = None  # solved examples before each question (none: the task's)
    limit: int | None = None  # only so many questions of each task
    chat: bool = False  # prompts as ChatML
    exit_threshold: float | None = None  # leave when the gate's cumulative probability reaches it (none: checkpoint's)
    exit: str | None = None  # another rule: confidence:0.9 leaves when a token is that probable
    loops: int | None = None  # the most loops for a token (none: the checkpoint's)
    cache: CacheRule = "copy"  # as in sample.py
    batch: int = 16  # rows side by side
    max_tokens: int = 256  # most new tokens of an answer, where the task sets none
    seed: int = 0  # of the draws, where a task draws
    device: str = "auto"  # cpu, cuda, cuda:1 (auto: a GPU if there is one)
    dtype: Precision = "auto"  # of weights and cache (auto: as stored)
    out: Path | None = None  # where to write scores and loops as JSON

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(f"--num-fewshot {self.num_fewshot} is below 0: give a number of examples")
        for name in ("batch", "max_tokens", "limit", "loops"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} is below 1: give a positive number")
        if self.out and self.out.exists():
            raise UserError(f"--out {self.out} is there already: nothing saved is overwritten, give another name")
        if self.out:
            make_folder(self.out.parent)
        if self.include_path and not self.include_path.is_dir():
            raise UserError(f"--include-path {self.include_path} is not a folder: give one that holds task files")


def harness_model(net: LoopedTransformer, tokenizer: Tokenizer, exit: Exit, config: HarnessConfig):
    """The model as the harness asks for it (lm_eval.api.model.TemplateLM), counting the loops of each task's tokens."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    stops, device, most = sample.stop_ids(net, tokenizer), net.embed_tokens.weight.device, net.config.max_positions

    class Looped(TemplateLM):
        eot_token_id = data.eos_id(tokenizer)
        tokenizer_name = str(config.folder)

        def __init__(self):
            super().__init__()
            self.loops: dict[str, list[int]] = {}  # of every token scored or generated, by task

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
            return data.ids(tokenizer, [string], special=True)[0]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            turns = [f"{data.IM_START}{m['role']}\n{m['content']}{data.IM_END}\n" for m in chat_history]
            if add_generation_prompt:
                return "".join(turns) + f"{data.IM_START}assistant\n"
            return "".join(turns).removesuffix(f"{data.IM_END}\n")  # the last turn goes on

        def chat_template(self, chat_template: bool | str = False) -> str:
            return "ChatML" if chat_template else ""

        def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            self.asked = [request.task_name for request in requests]
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            owners, windows = [], []
            for i, request in enumerate(requests):
                ids = self.tok_encode(request.args[0])
                for window in get_rolling_token_windows(ids, self.prefix_token_id, most, 1):
                    owners.append(i)
                    windows.append((None, *make_disjoint_window(window)))
            self.asked = [requests[i].task_name for i in owners]
            totals = [0.0] * len(requests)
            for i, (logp, _) in zip(
                owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm), strict=True
            ):
                totals[i] += logp
            return totals

        @torch.no_grad()
        def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
            """Log-probability of each continuation, and whether it is greedy's; a long context loses its start."""
            rows = [((context + new)[-most - 1 :], min(len(new), most)) for _, context, new in requests]
            order, found = sorted(range(len(rows)), key=lambda i: -len(rows[i][0])), [(0.0, True)] * len(rows)
            for start in track(range(0, len(rows), config.batch), "scoring", disable=disable_tqdm):
                chosen = order[start : start + config.batch]
                ids = torch.zeros(len(chosen), len(rows[chosen[0]][0]) - 1, dtype=torch.long)  # B T
                mask, targets = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids)
                for b, i in enumerate(chosen):
                    row, n = rows[i]
                    ids[b, : len(row) - 1], targets[b, : len(row) - 1] = torch.tensor(row[:-1]), torch.tensor(row[1:])
                    mask[b, len(row) - 1 - n : len(row) - 1] = True
                out = net(ids.to(device), loops=config.loops)
                mask, targets = mask.to(device), targets.to(device)
                pieces = (part[mask].split(1024) for part in (out.hidden, out.gate, targets))
                scored = []  # N 3: log-probability, whether it is the likeliest, loops
                for hidden, gate, target in zip(*pieces, strict=True):
                    logits, loops = at_exit(net, exit, hidden, gate)  # N V, N
                    logp = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
                    scored.append(torch.stack((logp.double(), logits.argmax(-1) == target, loops), -1).cpu())
                for i, part in zip(chosen, torch.cat(scored).split([rows[i][1] for i in chosen]), strict=True):
                    found[i] = part[:, 0].sum().item(), bool(part[:, 1].all())
                    self.loops.setdefault(self.asked[i], []).extend(part[:, 2].long().tolist())
            return found

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            asked = [normalize_gen_kwargs(request.args[1], config.max_tokens) for request in requests]
            for how in asked:
                if how.get("top_k"):
                    raise UserError(
                        f"a task asks for top_k {how['top_k']}, which is not known here: leave the task out"
                    )
                if how["do_sample"] and not how.get("temperature"):
                    how["temperature"] = 1.0
            prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
            room = [max(1, most - how["max_gen_toks"]) for how in asked]
            if cut := sum(len(p) > n for p, n in zip(prompts, room, strict=True)):
                console.print(f"{cut} of {len(prompts)} prompts lose their start: {most} positions hold no more")
            prompts = [p[-n:] for p, n in zip(prompts, room, strict=True)]
            groups: dict[str, list[int]] = {}  # what may be generated side by side
            for i, how in enumerate(asked):
                groups.setdefault(repr(how), []).append(i)
            found = [""] * len(requests)
            with Progress(console=console, disable=disable_tqdm) as bar:
                task = bar.add_task("generating", total=len(requests))
                for group in groups.values():
                    group.sort(key=lambda i: -len(prompts[i]))
                    how, texts = asked[group[0]], [[] for _ in group]
                    until = [text for text in how["until"] if text]
                    tail = 8 + 4 * max(map(len, until), default=0)  # tokens that may hold the end of a stop text

                    def done(row: int, text: list[int], until=until, tail=tail, most=how["max_gen_toks"]) -> bool:
                        end = tokenizer.decode(text[-tail:], skip_special_tokens=False)
                        ended = text[-1] in stops or any(stop in end for stop in until) or len(text) == most
                        bar.advance(task, ended)
                        return ended

                    for token in generate(
                        net,
                        [prompts[i] for i in group],
                        max_tokens=how["max_gen_toks"],
                        exit=exit,
                        loops=config.loops,
                        cache=config.cache,
                        temperature=how.get("temperature") or 0.0,
                        top_p=how.get("top_p") or 1.0,
                        batch=config.batch,
                        seeds=[f"{config.seed}/{i}" for i in group],
                        done=done,
                    ):
                        texts[token.row].append(token.id)
                        self.loops.setdefault(requests[group[token.row]].task_name, []).append(token.loops)
                    for i, ids in zip(group, texts, strict=True):
                        text = tokenizer.decode(ids, skip_special_tokens=True)
                        found[i] = min((text.partition(stop)[0] for stop in until), key=len, default=text)
            return found

    return Looped()


def harness() -> None:
    config = tyro.cli(HarnessConfig, args=sys.argv[2:], prog="eval.py harness")
    config.check()
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"the harness is not installed ({error}): pip install lm_eval") from error
    net, tokenizer = sample.load(config.folder, pick_device(config.device), config.dtype)
    if data.eos_id(tokenizer) is None:
        raise UserError(f"{config.folder} was not trained on text: its tokenizer has no end of text, give another")
    if config.chat:
        data.chat_prompts(tokenizer, [""])  # refuses a tokenizer without its tokens
    exit = sample.parse_exit(config.exit, config.exit_threshold, net.config.exit_threshold)
    names = [name.strip() for name in config.tasks.split(",") if name.strip()]
    manager = TaskManager(include_path=config.include_path and str(config.include_path))
    unknown, names = [name for name in names if not manager.match_tasks([name])], manager.match_tasks(names)
    if unknown or not names:
        raise UserError(
            f"--tasks {config.tasks}: no task is called {', '.join(unknown) or 'that'}; see lm-eval ls tasks"
        )
    lm = harness_model(net, tokenizer, exit, config)
    how = {"num_fewshot": config.num_fewshot, "limit": config.limit, "apply_chat_template": config.chat}
    try:
        found = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, log_samples=False, **how)["results"]
    except OSError as error:  # the base of what the datasets package raises
        raise UserError(f"--tasks {config.tasks}: a task's data can't be had ({error})") from error
    table = Table(
        title=f"{config.folder}, exit {exit.rule}:{exit.threshold:g}", title_justify="left", box=box.SIMPLE_HEAD
    )
    for head in ("task", "score", "loops"):
        table.add_column(head, justify="left" if head == "task" else "right")
    scores = {}
    for task, metrics in found.items():
        loops = lm.loops.get(task, [])
        mean = sum(loops) / len(loops) if loops else None
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        scores[task] = numbers | {"loops": mean, "tokens": len(loops)}
        for name, value in numbers.items():
            metric, _, filtered = name.partition(",")
            if not metric.endswith("_stderr") and "," in name:
                spread = numbers.get(f"{metric}_stderr,{filtered}")
                spread = f" ± {spread:.4f}" if spread is not None else ""
                what = metric if filtered == "none" else f"{metric} ({filtered})"
                table.add_row(f"{task}: {what}", f"{value:.4f}{spread}", "–" if mean is None else f"{mean:.2f}")
    console.print(table)
    if config.out:
        what = {"harness": scores, "exit": f"{exit.rule}:{exit.threshold:g}", "cache": config.cache}
        device = net.embed_tokens.weight.device
        model.write_json(config.out, what | provenance(device) | {"seed": config.seed})


# ---------------------------------------------------------------------------------------------------------------------
# The study: every control and every ablation from one base, with the same rows and steps

EXACT = "--paper --rpt.estimator exact --rpt.rollouts 1"
NEXT_TOKEN = f"{EXACT} --rpt.rep-loops last --rpt.pg-weight 0 --rpt.kl-weight 0 --rpt.ent-weight 0"
STAGE_I = f"{EXACT} --rpt.rep-loops exits --rpt.noise-std 0 --rpt.lambda-base 0 --rpt.kl-weight 0 --rpt.ent-weight 0.1"
VARIANTS = {  # stage, whose learning rate of the track, and flags
    "base": ("pretrain", "ours", ""),
    "next-token": ("rpt", "control", f"{NEXT_TOKEN} --rpt.rho 1"),
    "next-token-hard": ("rpt", "paper", NEXT_TOKEN),
    "stage-1": ("rpt", "control", f"{STAGE_I} --rpt.rho 1"),
    "stage-1-hard": ("rpt", "paper", STAGE_I),
    "stage-2": ("gate", "ours", ""),
    "sampled": ("rpt", "paper", "--paper"),
    "exact": ("rpt", "paper", EXACT),
    "gate-only": ("rpt", "gate", f"{EXACT} --rpt.rep-weight 0 --rpt.gate-only"),
    "rep-only": ("rpt", "paper", f"{EXACT} --rpt.pg-weight 0"),
    "no-rep-no-entropy": ("rpt", "paper", f"{EXACT} --rpt.rep-weight 0 --rpt.ent-weight 0"),
    "no-selection": ("rpt", "paper", f"{EXACT} --rpt.rho 1"),
    "no-noise": ("rpt", "paper", f"{EXACT} --rpt.noise-std 0"),
    "no-kl": ("rpt", "paper", f"{EXACT} --rpt.kl-weight 0"),
    "no-price": ("rpt", "paper", f"{EXACT} --rpt.lambda-base 0"),
    "looprpt": ("rpt", "ours", ""),
    "looprpt-no-distill": ("rpt", "ours", "--rpt.distill-weight 0"),
    "looprpt-no-floor": ("rpt", "ours", "--rpt.floor 0"),
    "looprpt-no-policy": ("rpt", "ours", "--rpt.pg-weight 0"),
    "looprpt-no-price": ("rpt", "ours", "--rpt.lambda-base 0"),
}
TEXT = "--data.path {0}/train.jsonl --data.tokenizer {0}/tokenizer.json"  # in the folder of the study
TRACKS = {  # flags of all runs
    "demo": "--gate.steps 500",
    "text": f"{TEXT} --data.length 256 --model.layers 2 --model.width 192 --train.batch 8 --precision bf16 "
    "--train.compile on --pretrain.steps 2000 --rpt.steps 200 --gate.steps 200",
    "gpu": f"{TEXT} --data.length 512 --model.layers 8 --model.width 768 --model.heads 12 --train.batch 64 "
    "--pretrain.steps 2000 --pretrain.lr 1e-3 --rpt.steps 200 --gate.steps 200",
}
RATES = {  # learning rates, where not the defaults; LOG.md says how those of text were chosen
    "demo": {"gate": "1e-2"},
    "text": {"gate": "1e-2", "control": "3e-4", "paper": "1e-4"},
    "gpu": {"gate": "1e-2", "control": "3e-4", "paper": "1e-4", "ours": "3e-4"},
}
FILES = {  # of --texts: what is trained on, what the tokenizer is learned from, what is reported
    "text": {"train": ("gsm8k_train",), "words": ("gsm8k_train", "omni_train"), "test": ("gsm8k_test_1019",)},
    "gpu": {"train": ("gsm8k_train", "omni_train"), "words": ("gsm8k_train", "omni_train", "books_train")}
    | {"test": ("gsm8k_test_1019",)},
}


@dataclass(frozen=True)
class StudyConfig:
    """Train a base for each seed and every variant from it, and score them all on rows that nothing was chosen by.
    A file of results for each; what is there already is not done again."""

    track: Literal["demo", "text", "gpu"] = "demo"  # the built-in task, text on two cores, text on a GPU
    seeds: int = 3  # number of bases
    start: int = 0  # the first one's seed; several processes can share a study, each with seeds of its own
    only: tuple[str, ...] = ()  # of the variants (none: all)
    texts: Path = Path("../shared/data")  # folder of gsm8k_train, gsm8k_test_1019, omni_train (and books_train) .jsonl
    out: Path | None = None  # folder of the runs (none: out/study-TRACK)
    results: Path | None = None  # folder of the files of results (none: results/TRACK)
    device: str = "auto"  # cpu, cuda, cuda:1 (auto: a GPU if there is one)

    @property
    def of(self) -> range:
        """The seeds."""
        return range(self.start, self.start + self.seeds)

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        if self.seeds < 1:
            raise UserError(f"--seeds {self.seeds} is below 1: give a positive number")
        if unknown := [name for name in self.only if name not in VARIANTS]:
            raise UserError(f"--only {' '.join(unknown)}: no such variant, the variants are {', '.join(VARIANTS)}")


def study() -> None:
    """`python eval.py study`: see StudyConfig."""
    import looprpt

    config = tyro.cli(StudyConfig, args=sys.argv[2:], prog="eval.py study")
    config.check()
    folder = config.out or Path("out") / f"study-{config.track}"
    results = config.results or Path("results") / config.track
    make_folder(folder)
    make_folder(results)
    gather_texts(config, folder)
    names = [name for name in VARIANTS if name == "base" or name in config.only or not config.only]
    for seed in config.of:
        first = None
        for name in names:
            run, result = folder / f"seed-{seed}" / name, results / f"{name}-{seed}.json"
            checkpoint = run / looprpt.FOLDER[VARIANTS[name][0]]
            if not train_variant(config, folder, seed, name, checkpoint):
                console.print("stopped: the same command goes on", soft_wrap=True)
                return
            if result.exists() and (run / "tally.safetensors").exists():
                continue
            console.print(f"scoring {name}, seed {seed}")
            first = first or score_variant(config, folder, folder / f"seed-{seed}" / "base" / "base")
            s = first if name == "base" else score_variant(config, folder, checkpoint)
            sets = buckets(first)
            found = {key: summary(s, tokens) for key, tokens in sets.items()}
            for key in found.keys() - {"all", *DIFFICULTY}:
                found[key].pop("curves", None)  # by operand they are many, and nobody draws them
            sums = {f"{side}.{key}": x for side in SIDES for key, x in tally(s, sets[side])._asdict().items()}
            save_file({key: x.contiguous() for key, x in sums.items()}, run / "tally.safetensors")
            log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
            every, record = max(1, len(log) // 50), model.read_json(run / "run.json")
            write_result(
                result,
                {"track": config.track, "variant": name, "seed": seed}
                | {"command": shlex.join(["python", "looprpt.py", *command(config, folder, seed, name)])}
                | {"trained": record["starts"][-1], "buckets": found}
                | {"training": [{k: now[k] for k in ("step", "loss", "loops")} for now in log[every - 1 :: every]]}
                | provenance(pick_device(config.device)),
            )
    against(config, folder, results)


def gather_texts(config: StudyConfig, folder: Path) -> None:
    """The files of a track of text, and its tokenizer.

    Raises UserError for a file that is not there.
    """
    for name, files in FILES.get(config.track, {}).items():
        if not (folder / f"{name}.jsonl").exists():
            pairs = [pair for file in files for pair in data.read(config.texts / f"{file}.jsonl")]
            lines = [json.dumps({"prompt": prompt or "", "response": text}) + "\n" for prompt, text in pairs]
            model.write_whole(folder / f"{name}.jsonl", "".join(lines))
    if config.track in FILES and not (folder / "tokenizer.json").exists():
        vocab = 2048 if config.track == "text" else 8192
        data.train_tokenizer(folder / "words.jsonl", vocab, folder / "tokenizer.json")


def command(config: StudyConfig, folder: Path, seed: int, name: str) -> list[str]:
    """Flags of looprpt.py for a run of the study."""
    stage, whose, flags = VARIANTS[name]
    rate = f"--rpt.lr {RATES[config.track][whose]}" if whose in RATES[config.track] else ""
    start = ["--init", str(folder / f"seed-{seed}" / "base" / "base")] if name != "base" else []
    shared = [flag.format(folder) for flag in TRACKS[config.track].split()]
    shared += ["--seed", str(seed), "--device", config.device, *flags.split(), *rate.split()]
    return ["--objective", stage, *start, *shared, "--out", str(folder / f"seed-{seed}" / name)]


def train_variant(config: StudyConfig, folder: Path, seed: int, name: str, checkpoint: Path) -> bool:
    """One run, if it isn't there, from its last state if it was cut off. False if somebody asked for an end.

    Raises UserError if what is there was trained with other flags.
    """
    import looprpt

    flags, record = command(config, folder, seed, name), folder / f"seed-{seed}" / name / "run.json"
    asked = looprpt.parse(flags)
    asked.check()
    if record.exists():
        saved = looprpt.revive(looprpt.Config, model.read_json(record)["config"])
        given, found = looprpt.flags(asked), looprpt.flags(saved)
        mute = {"out", "init", "resume", "device", "paper"}
        mute |= {key for key in given if key.split(".")[0] in {*looprpt.FOLDER} - {*asked.objective}}  # of other stages
        if other := [key for key in given if given[key] != found[key] and key not in mute]:
            what = ", ".join(f"--{key.replace('_', '-')} {found[key]} for {given[key]}" for key in other)
            raise UserError(f"{record.parent} was trained with {what}: move it away, or give another --out")
    if checkpoint.exists():
        return True
    console.rule(f"{name}, seed {seed}")
    asked = looprpt.parse([*flags, "--resume"]) if record.exists() else asked
    tokenizer = data.pick_tokenizer(asked.data, asked.init)
    rows, _, _ = data.split(asked.data, tokenizer, seed=seed)
    with looprpt.stop_signals() as stop:
        where = {"device": pick_device(config.device), "rank": 0, "world": 1}
        done = looprpt.run_stages(asked, tokenizer, rows, stopping=lambda: bool(stop), **where)
    return done is not None


def score_variant(config: StudyConfig, folder: Path, checkpoint: Path) -> Scores:
    """On the rows that the track reports on, as long as those it trains on; in float32 on a CPU, bfloat16 on a GPU."""
    import looprpt

    rows, settings = None, DataConfig()
    if config.track in FILES:
        length = looprpt.parse(TRACKS[config.track].split()).data.length
        settings = DataConfig(path=folder / "test.jsonl", length=length)
        rows, notes = data.encode(settings.path, data.pick_tokenizer(settings, checkpoint), settings)
        console.print(*notes, sep="\n", end="\n" * bool(notes), soft_wrap=True)
    source = data.source(rows, settings, batch=EvalConfig.batch, seed="study", held_out=True)
    device = pick_device(config.device)
    return score(model.load(checkpoint, device), source, device=device)


SIDES = ("all", "hard")  # buckets on which variants are compared
BESIDE = ("base", "stage-1", "sampled", "exact")  # what each variant is compared with; looprpt is with every other


def against(config: StudyConfig, folder: Path, results: Path) -> None:
    """Differences between all variants that are scored, averaged over the seeds that both have, with intervals from
    drawing documents."""
    seeds: dict[str, set[int]] = {}
    for path in sorted(results.glob("*-*.json")):
        name, _, seed = path.stem.rpartition("-")
        if (folder / f"seed-{seed}" / name / "tally.safetensors").exists():
            seeds.setdefault(name, set()).add(int(seed))

    pairs = [(a, b) for a in seeds for b in seeds if a != b and (b in BESIDE or a == "looprpt")]
    pairs = [(a, b, sorted(seeds[a] & seeds[b])) for a, b in pairs]
    found: dict[str, dict] = {}
    for bucket in SIDES:
        drawn = {}
        places = [(name, seed) for name in seeds for seed in seeds[name]]
        for name, seed in track(places, bucket, console=console, transient=True, disable=not console.is_terminal):
            sums = load_file(folder / f"seed-{seed}" / name / "tally.safetensors")
            drawn[name, seed] = Tally(*(sums[f"{bucket}.{key}"] for key in Tally._fields)).drawn()
        found[bucket] = {
            f"{a} - {b}": {"seeds": of} | compare([(drawn[a, seed], drawn[b, seed]) for seed in of], each=True)
            for a, b, of in pairs
            if of and all(drawn[a, seed].tokens.all() for seed in of)
        }
    what = {"track": config.track, "against": found}
    write_result(results / "against.json", what | provenance(pick_device(config.device)))


def write_result(path: Path, found: dict) -> None:
    """As JSON, numbers with five digits."""

    def short(x):
        if isinstance(x, dict):
            return {name: short(value) for name, value in x.items()}
        if isinstance(x, list | tuple):
            return [short(value) for value in x]
        return float(f"{x:.5g}") if isinstance(x, float) else x

    model.write_whole(path, json.dumps(short(found)) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Tables and pictures of a study, from its files alone


def load_study(paths: Sequence[Path], bucket: str = "all") -> tuple[dict[str, list[dict]], dict]:
    """The runs of each variant in the order of VARIANTS, and the differences between variants in a bucket.

    Raises UserError for files that are not of one study, or not of the same seeds for every variant.
    """
    runs: dict[str, list[dict]] = {}
    found, tracks = {}, set()
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is not a file: give the files of one folder, results/demo/*.json")
        file = model.read_json(path)
        if "track" not in file or not file.keys() & {"variant", "against"}:
            raise UserError(
                f"{path} is no result of `eval.py study`: give the files of one folder, results/demo/*.json"
            )
        tracks.add(file["track"])
        if "against" in file:
            found = file["against"].get(bucket, {})
            continue
        if bucket not in file["buckets"]:
            raise UserError(f"{path} has no bucket {bucket}: it has {', '.join(file['buckets'])}")
        runs.setdefault(file["variant"], []).append(file)
    if not runs or len(tracks) > 1:
        what = (
            f"the files are of {' and '.join(sorted(tracks))}" if runs else "there is no run's file among those given"
        )
        raise UserError(f"{what}: give the files of one folder, results/demo/*.json")
    seeds = {name: sorted(run["seed"] for run in each) for name, each in runs.items()}
    first = next(iter(seeds))
    for name, given in seeds.items():
        if given != seeds[first] or len({*given}) < len(given):
            raise UserError(
                f"{name} has the seeds {given}, {first} has {seeds[first]}: give one file for each seed of each"
            )
    return {name: runs[name] for name in [*VARIANTS, *sorted(runs.keys() - VARIANTS)] if name in runs}, found


def at_half(part: dict) -> tuple[float, float]:
    """Average loops and accuracy of a bucket, left at the gate's threshold 0.5."""
    return next((point["loops"], point["accuracy"]) for point in part["sweep"] if point["threshold"] == 0.5)


def study_table(paths: Sequence[Path], bucket: str = "all", only: Sequence[str] = ()) -> str:
    """Markdown: a row for each variant, mean and standard deviation over the seeds."""
    runs, found = load_study(paths, bucket)
    names = chosen(only, runs, "--only")
    first = next(iter(runs.values()))
    seeds, loops = sorted(run["seed"] for run in first), len(first[0]["buckets"][bucket]["by_loop"])
    heads = ["", *(f"loop {i + 1}" for i in range(loops)), "at q = 0.5", "loops there", "area", "looprpt ahead by"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]

    def percent(x: float | None) -> float | None:
        return None if x is None else 100 * x

    for name in names:
        parts = [run["buckets"][bucket] for run in runs[name]]
        left, accuracy = zip(*map(at_half, parts), strict=True)
        cells = [cell([percent(part["by_loop"][i]) for part in parts], 1) for i in range(loops)]
        cells += [cell([*map(percent, accuracy)], 1), cell([*left], 2)]
        cells.append(cell([percent(part.get("area", {}).get("gate")) for part in parts], 1))
        ahead = found.get(f"looprpt - {name}", {})
        if ahead.get("seeds") == seeds:
            _, low, high = map(percent, ahead["matched gate"])
            cells.append(f"{'+' if sum(ahead['each']) >= 0 else ''}{cell([*map(percent, ahead['each'])], 2)}")
            cells[-1] += f" [{low:+.2f}, {high:+.2f}]"
        else:
            cells.append("" if name == "looprpt" else "–")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join([*lines, "", what_was_run({name: runs[name] for name in names}, bucket)])


def what_was_run(runs: dict[str, list[dict]], bucket: str) -> str:
    """Seeds, tokens and commits of the runs of a table."""
    first = next(iter(runs.values()))
    tokens = " / ".join(f"{run['buckets'][bucket]['tokens']:,}" for run in first)
    ran = [run for found in runs.values() for run in found]
    trained, scored = (
        ", ".join(sorted({at["commit"][:7] for at in each if at["commit"]})) or "unknown"
        for each in ([run["trained"] for run in ran], ran)
    )
    seeds = ", ".join(str(run["seed"]) for run in first)
    return f"Seeds {seeds}; {tokens} tokens ({bucket}); trained at commit {trained}, scored at {scored}."


def loops_table(
    paths: Sequence[Path], at_loops: Sequence[float], bucket: str = "all", only: Sequence[str] = (), rules=()
) -> str:
    """Markdown: accuracy at given average numbers of loops, a row for each variant and exit rule.

    Mean and standard deviation over the seeds, read off each one's curve on straight lines.
    """
    runs, _ = load_study(paths, bucket)
    names = chosen(only, runs, "--only")
    curves = need_curves({name: runs[name] for name in names}, bucket)
    rules = chosen(rules, curves, "--rules")
    most = max(x for x, _ in curves["gate"])
    if wrong := [x for x in at_loops if not 1 <= x <= most]:
        raise UserError(f"--at-loops {' '.join(map(str, wrong))}: these models have between 1 and {most:g} loops")
    heads = ["", "leaves by", *(f"at {x:g}" for x in at_loops)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, rule in itertools.product(names, rules):
        found = torch.tensor([run["buckets"][bucket]["curves"][rule] for run in runs[name]])  # seeds K 2
        each = [100 * at(torch.full((len(found),), x), *found.unbind(-1)) for x in at_loops]
        cells = [cell(values.tolist(), 1) for values in each]
        lines.append("| " + " | ".join([name, rule, *cells]) + " |")
    return "\n".join([*lines, "", what_was_run({name: runs[name] for name in names}, bucket)])


def need_curves(runs: dict[str, list[dict]], bucket: str) -> dict[str, list]:
    """The curves of the first run. Raises UserError if a run has none in this bucket."""
    parts = [run["buckets"][bucket] for found in runs.values() for run in found]
    if not all(part["tokens"] and part.get("curves") for part in parts):
        raise UserError(
            f"--bucket {bucket} has no curves in these runs: it takes all, easy, medium or hard, with tokens"
        )
    return parts[0]["curves"]


def cell(values: list, digits: int) -> str:
    """Mean and standard deviation."""
    if None in values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def chosen(names: Sequence[str], among: Collection[str], flag: str) -> list[str]:
    """Those of the names, or all if there are none. Raises UserError for one that isn't there."""
    if unknown := [name for name in names if name not in among]:
        raise UserError(f"{flag} {' '.join(unknown)}: these runs have {', '.join(among)}")
    return [*(names or among)]


def table(
    files: Annotated[tuple[Path, ...], tyro.conf.Positional],
    bucket: str = "all",
    only: tuple[str, ...] = (),
    at_loops: tuple[float, ...] = (),
    rules: tuple[str, ...] = (),
) -> None:
    """A study as Markdown: accuracy in % after each loop and where the gate leaves at threshold 0.5, mean loops there,
    mean accuracy under the curve, and how far looprpt is ahead at its own number of loops (95 % interval).

    Args:
        files: what `eval.py study` wrote.
        bucket: all, easy, medium or hard.
        only: these variants (none: all).
        at_loops: instead, accuracy at these average numbers of loops, by every exit rule.
        rules: with at_loops, by these exit rules only (none: all).
    """
    if rules and not at_loops:
        raise UserError("--rules is for accuracy at numbers of loops: give --at-loops too, --at-loops 1.5 2 3")
    print(loops_table(files, at_loops, bucket, only, rules) if at_loops else study_table(files, bucket, only))


STYLES = {  # colours that differ for everybody, and marks that differ in print
    "base": ("#000000", "o", "-"),
    "next-token": ("#999999", "v", ":"),
    "stage-1": ("#0072B2", "s", "--"),
    "stage-2": ("#56B4E9", "D", "-."),
    "gate-only": ("#CC79A7", "X", ":"),
    "sampled": ("#E69F00", "^", "--"),
    "exact": ("#009E73", "P", "-."),
    "looprpt": ("#D55E00", "*", "-"),
}


def plot(
    files: Annotated[tuple[Path, ...], tyro.conf.Positional], out: Path = Path("assets"), bucket: str = "all"
) -> None:
    """Four pictures of a study, means over the seeds: accuracy over average loops, accuracy by loop, where tokens
    leave, and average loops in training.

    Args:
        files: what `eval.py study` wrote.
        out: folder of the pictures.
        bucket: all, easy, medium or hard.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"pictures need matplotlib ({error}): pip install -r requirements.txt") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs, _ = load_study(files, bucket)
    runs = {name: found for name, found in runs.items() if name in STYLES}
    if not runs:
        raise UserError(f"nothing to draw: it takes runs of {', '.join(STYLES)}")
    need_curves(runs, bucket)
    make_folder(out)
    track = next(iter(runs.values()))[0]["track"]

    def mean(values: list) -> Tensor:
        return torch.tensor(values).mean(0)

    def picture(name: str, xlabel: str, ylabel: str, draw: Callable, panels: int = 1) -> None:
        figure, every = pyplot.subplots(1, panels, figsize=(2 + 5 * panels, 4), layout="constrained", squeeze=False)
        for axes in every[0]:
            for variant, found in runs.items():
                colour, mark, line = STYLES[variant]
                parts = [run["buckets"][bucket] for run in found]
                draw(axes, found, parts, {"color": colour, "marker": mark, "linestyle": line, "label": variant})
            axes.set_xlabel(xlabel)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
        if panels > 1:  # the second one: around where the gates leave at threshold 0.5
            x, y = torch.tensor([at_half(run["buckets"][bucket]) for found in runs.values() for run in found]).T
            every[0, 1].set_xlim(x.min().item() - 0.2, x.max().item() + 0.2)
            every[0, 1].set_ylim(100 * y.min().item() - 0.5, 100 * y.max().item() + 0.5)
        every[0, 0].set_ylabel(ylabel)
        every[0, -1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        figure.savefig(out / f"{track}-{name}.png", dpi=150)
        pyplot.close(figure)
        console.print(out / f"{track}-{name}.png")

    def pareto(axes, found, parts, style) -> None:
        x, y = mean([part["curves"]["gate"] for part in parts]).T
        axes.plot(x, 100 * y, markersize=3, **style)
        half = mean([at_half(part) for part in parts])
        axes.plot(half[0], 100 * half[1], markersize=10, **style | {"label": None})

    def by_loop(axes, found, parts, style) -> None:
        y = mean([part["by_loop"] for part in parts])
        axes.plot(range(1, len(y) + 1), 100 * y, **style)
        axes.set_xticks(range(1, len(y) + 1))

    def leave(axes, found, parts, style) -> None:
        y = mean([[e["share"] for e in part["exits"]] for part in parts])
        axes.plot(range(1, len(y) + 1), 100 * y, **style)
        axes.set_xticks(range(1, len(y) + 1))

    def training(axes, found, parts, style) -> None:
        steps = [now["step"] for now in found[0]["training"]]
        if found[0]["variant"] != "base":
            axes.plot(steps, mean([[now["loops"] for now in run["training"]] for run in found]), markersize=3, **style)

    picture("pareto", "average loops (large mark: threshold 0.5)", f"accuracy in %, {bucket} tokens", pareto, panels=2)
    picture("by-loop", "loop", f"accuracy in %, {bucket} tokens", by_loop)
    picture("exits", "loop", "tokens that leave after it, in %, threshold 0.5", leave)
    picture("training", "step", "average loops of the tokens trained on", training)


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
