"""Accuracy after every loop, and at what the gate chooses: checkpoints side by side on the same held-out tokens.

    python eval.py out/base out/rpt                                             the built-in task
    python eval.py out/base out/rpt --data.path val.jsonl --out results.json    a file

A token counts as right if its logit is the largest. Tokens are sorted into buckets once, by the first model.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import tyro
from torch import Tensor

import data
from data import Chain, DataConfig, Documents, Rows
from model import LoopedTransformer, chunked, exit_cdf, exit_logpdf, pick
from support import checkpoint, runtime
from support.ranges import Checked, NonNegative, unchecked
from support.runtime import Precision, UserError, print_table, progress_bar

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # to be shown
FINE = tuple(sorted({*THRESHOLDS, *(1 / (1 + math.exp(-x / 2)) for x in range(-18, 19))}))  # of a curve, from 1e-4
DIFFICULTY = {"easy": (0.5, 1.0), "medium": (1.0, 1.5), "hard": (1.5, math.inf)}  # nats of the first model's last loop
SATURATION_LOGIT = 6.2  # a gate's logit beyond which its sigmoid rounds to 0 or 1 in bfloat16


@dataclass(frozen=True)
class EvalConfig(Checked):
    models: Annotated[tuple[Path, ...], tyro.conf.Positional]  # checkpoint folders; the first one makes the buckets
    data: DataConfig
    out: Path | None = None  # where to write results.json
    batch: NonNegative = 0  # rows in a forward pass (0: 64, or as many as have 32,768 tokens)
    seed: int = 0  # seed of the rows of the built-in task
    device: str = "auto"  # cpu, cuda, cuda:1 (auto: a GPU if there is one)
    precision: Precision = "auto"  # of the matrix products (auto: bf16 on a GPU, fp32 on a CPU)


class Scores(NamedTuple):
    """What a model does with each target token, on the CPU."""

    correct: Tensor  # N L  whether the largest logit is the right token
    gate: Tensor  # N L  exit logits
    entropy: Tensor  # N  of the distribution after the last loop, nats
    logp: Tensor  # N L  log-probability of the right token
    max_logp: Tensor  # N L  log-probability of the likeliest token
    document: Tensor  # N  which document it is in
    depth: Tensor | None = None  # N  operands the answer depends on, for chain arithmetic


@torch.no_grad()
def score(
    net: LoopedTransformer, source: Chain | Documents, *, device: torch.device, precision: Precision = "auto"
) -> Scores:
    """Run a model over one pass of a source, with a progress bar on a terminal."""
    parts, documents, words = [], 0, net.config.loops * net.config.vocab_size
    for index in progress_bar(range(source.batches), "scoring"):
        batch = data.trim_and_move(source.batch(index), device)
        with runtime.autocast(device, precision):
            out, targets_at = net(batch.inputs), runtime.true_indices(batch.mask, device)  # N
            tokens = pick(targets_at, out.hidden, batch.targets, out.gate)  # N L D, N, N L
            scores = chunked(lambda *part: score_tokens(net, *part), *tokens, logits_per_token=words)
        row, column = batch.mask.nonzero(as_tuple=True)  # N
        depth = () if source.depth is None else (source.depth[column],)
        parts.append((*scores, documents + row, *depth))
        documents += len(batch.mask)
    return Scores(*map(torch.cat, zip(*parts, strict=True)))


def score_tokens(net: LoopedTransformer, hidden: Tensor, targets: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    """The first five of the scores of some tokens.    N L D, N, N L -> N L each, entropy N"""
    logits = net.logits(hidden)  # N L V
    correct = logits.argmax(-1) == targets[:, None]
    logits -= logits.logsumexp(-1, keepdim=True)  # log-probabilities, in place
    gold = logits.gather(-1, targets[:, None, None].expand(-1, logits.shape[1], 1))[..., 0]  # N L
    entropy = -(logits[:, -1].exp() * logits[:, -1]).sum(-1)  # N
    return tuple(x.cpu() for x in (correct, gate, entropy, gold, logits.amax(-1)))


def buckets(first: Scores) -> dict[str, Tensor]:
    """Which tokens each bucket holds, by the first model.    -> each N"""
    h = first.entropy
    sets = {"all": torch.ones_like(h, dtype=torch.bool)}
    sets |= {name: (h >= low) & (h < high) for name, (low, high) in DIFFICULTY.items()}
    if first.depth is not None:
        sets |= {f"depth_{d}": first.depth == d for d in range(1, int(first.depth.max()) + 1)}
    return sets


# Each gives every loop of a token a probability: of having left, or of the likeliest token. The token leaves after the
# first loop whose probability reaches a threshold, or after the last
EXIT_RULES = {"gate": lambda s: exit_cdf(s.gate), "confidence": lambda s: s.max_logp.exp()}


def exit_at(reached: Tensor, threshold: float) -> Tensor:
    """First loop (from 0) whose probability reaches the threshold, the last if none does.    N L -> N"""
    return (reached[:, :-1] < threshold).cumprod(-1).sum(-1)


def exit_stats(gate: Tensor, count: float) -> dict[str, Tensor]:
    """Mean loop (from 1), entropy, share of gates too sure for a bfloat16 gradient: sums over tokens (N L) / count."""
    logpi = exit_logpdf(gate.detach())  # N L
    loops = (logpi.exp() * torch.arange(1, logpi.shape[-1] + 1, device=logpi.device)).sum(-1)  # N
    saturated = (gate[:, :-1].abs() > SATURATION_LOGIT).double().mean(-1)  # N
    means = {"loops": loops, "entropy": -(logpi.exp() * logpi).sum(-1), "saturation": saturated}
    return {name: value.sum() / count for name, value in means.items()}


class Tally(NamedTuple):
    """Sums over the tokens of D documents, which the bootstrap draws, at K thresholds. Reported are their ratios."""

    tokens: Tensor  # D
    correct: Tensor  # D L  after each loop
    logp: Tensor  # D L
    exits: Tensor  # D R K 2  for each exit rule and threshold: right where it leaves, and loops

    def bootstrapped(self, rounds: int = 2000) -> "Tally":
        """Totals of the documents themselves, then of as many drawn from them, the same for every model.    -> 1+W"""
        n = len(self.tokens)
        chosen = torch.randint(n, (rounds, n), generator=runtime.seeded("bootstrap", 0))
        times = torch.zeros(chosen.shape).scatter_add_(1, chosen, torch.ones(chosen.shape))  # W D
        weights = torch.cat((torch.ones(1, n), times)).double()  # 1+W D
        return Tally(*(torch.tensordot(weights, x, 1) for x in self))

    def by_loop(self) -> Tensor:
        """Accuracy after each loop.    -> D L"""
        return self.correct / self.tokens[:, None]

    def curve(self, rule: str) -> tuple[Tensor, Tensor]:
        """Average loops and accuracy over the thresholds, from the first loop for all to the last.    -> D K twice"""
        accuracy, loops = (self.exits[:, [*EXIT_RULES].index(rule)] / self.tokens[:, None, None]).unbind(-1)  # D K
        return loops, accuracy


def tally(s: Scores, tokens: Tensor) -> Tally:
    """Sums over some tokens (a mask N). A document without any stays, so that all tallies draw the same documents."""
    n, document, correct = int(s.document.max()) + 1, s.document[tokens], s.correct[tokens]

    def total(x: Tensor) -> Tensor:  # N ... -> D ...
        return torch.zeros(n, *x.shape[1:], dtype=torch.float64).index_add_(0, document, x.double())

    rules = []
    for rule in EXIT_RULES.values():
        reached, points = rule(s)[tokens], []
        for threshold in (-math.inf, *FINE, math.inf):
            leaves = exit_at(reached, threshold)  # N
            points.append(total(torch.stack((correct.gather(1, leaves[:, None])[:, 0], leaves + 1), -1)))
        rules.append(torch.stack(points, 1))  # D K 2
    return Tally(total(torch.ones(len(document))), total(correct), total(s.logp[tokens]), torch.stack(rules, 1))


def summarize(s: Scores, tokens: Tensor) -> dict:
    """Accuracy (0 to 1) and log-loss after each loop, and what each exit rule makes of them; null without a token."""
    n, loops = int(tokens.sum()), s.correct.shape[1]
    if not n:
        sweep = [{"threshold": t, "accuracy": None, "loops": None} for t in THRESHOLDS]
        return {"tokens": 0, "by_loop": [None] * loops, "ce": [None] * loops, "sweep": sweep}
    total = tally(s, tokens).bootstrapped(rounds=0)
    curves = {name: torch.stack(total.curve(name), -1)[0] for name in EXIT_RULES}  # K 2
    swept = dict(zip(FINE, curves["gate"][1:-1].tolist(), strict=True))
    return {
        "tokens": n,
        "by_loop": total.by_loop()[0].tolist(),
        "ce": (-total.logp / n)[0].tolist(),
        "sweep": [{"threshold": t, "accuracy": swept[t][1], "loops": swept[t][0]} for t in THRESHOLDS],
        "curves": {name: curve.tolist() for name, curve in curves.items()},
        "area": {name: area(curve) for name, curve in curves.items()} if loops > 1 else {},
    }


def area(curve: Tensor) -> float:
    """Mean accuracy under a curve of loops and accuracy, over all numbers of loops.    K 2 -> 1"""
    loops, accuracy = curve.T
    return (torch.trapezoid(accuracy, loops) / (loops[-1] - loops[0])).item()


def compare(pairs: list[tuple[Tally, Tally]]) -> dict:
    """The first of each pair less the second, averaged over the pairs (seeds), with 95 % intervals by a bootstrap that
    draws documents, the same for all; and the "matched gate" of each pair. The tallies are `bootstrapped` ones, of as
    many rounds."""
    half, differences = FINE.index(0.5) + 1, []
    for a, b in pairs:
        if not torch.equal(a.tokens, b.tokens):
            raise UserError("two models were scored on different tokens: score them again, in one run")
        (loops, accuracy), (b_loops, b_accuracy) = ([x[:, half] for x in t.curve("gate")] for t in (a, b))
        difference = {f"by_loop {i + 1}": x for i, x in enumerate((a.by_loop() - b.by_loop()).T)}  # accuracy
        difference |= {"at_half": accuracy - b_accuracy, "loops_at_half": loops - b_loops}  # gates at threshold 0.5
        # The second on the curve of each of its exit rules, at the first's number of loops
        difference |= {f"matched {rule}": accuracy - interpolate(loops, *b.curve(rule)) for rule in EXIT_RULES}
        differences.append(difference)
    limits = torch.tensor([0.025, 0.975]).double()
    means = {name: sum(d[name] for d in differences) / len(pairs) for name in differences[0]}
    intervals = {name: [x[0].item(), *x[1:].quantile(limits).tolist()] for name, x in means.items()}
    return intervals | {"each": [d["matched gate"][0].item() for d in differences]}


def interpolate(x: Tensor, loops: Tensor, accuracy: Tensor) -> Tensor:
    """Accuracy of curves at given numbers of loops, on straight lines between their points.    W, W K, W K -> W"""
    high = (loops <= x[:, None]).sum(-1, keepdim=True).clamp(1, loops.shape[1] - 1)  # W 1
    (x0, x1), (y0, y1) = ((t.gather(1, high - 1)[:, 0], t.gather(1, high)[:, 0]) for t in (loops, accuracy))
    share = ((x - x0) / (x1 - x0).clamp_min(1e-12)).clamp(0, 1)
    return y0 + share * (y1 - y0)


def results(scores: dict[str, Scores], *, device: torch.device, seed: int) -> dict:
    """What results.json holds. The buckets are those of the first model."""
    sets = buckets(next(iter(scores.values()))).items()
    models = {name: {"buckets": {x: summarize(s, tokens) for x, tokens in sets}} for name, s in scores.items()}
    return {"models": models} | runtime.provenance(device) | {"seed": seed}


def at_threshold_half(scores: dict) -> tuple[float, float]:
    """Average loops and accuracy of a bucket at exit threshold 0.5."""
    return next((point["loops"], point["accuracy"]) for point in scores["sweep"] if point["threshold"] == 0.5)


def print_results(comparison: dict) -> None:
    """Print accuracy by loop and at exit threshold 0.5: of all tokens, then by operand or difficulty."""
    models = {name: model["buckets"] for name, model in comparison["models"].items()}
    first, rows, loops = next(iter(models.values())), [], max(len(m["all"]["by_loop"]) for m in models.values())
    named = [bucket for bucket in first if bucket.startswith("depth_")] or [*DIFFICULTY]
    for bucket in (bucket for bucket in ("all", *named) if first[bucket]["tokens"]):
        for name, summary in ((name, buckets[bucket]) for name, buckets in models.items()):
            mean_loops, accuracy = at_threshold_half(summary)
            accuracies = [*summary["by_loop"], *[None] * (loops - len(summary["by_loop"])), accuracy]
            percents = ["–" if a is None else f"{100 * a:.1f}" for a in accuracies]
            rows.append([bucket, name, f"{summary['tokens']:,}", *percents, f"{mean_loops:.2f}"])
        rows.append([])
    heads = ["", "model", "tokens", *(f"loop {i + 1}" for i in range(loops)), "exit 0.5", "loops"]
    print_table("accuracy in %, held-out tokens", heads, rows, left=2)


def compare_folders(config: EvalConfig, rows: Rows, device: torch.device) -> dict[str, float]:
    """Score checkpoints on the same rows; print how they compare, and write it.
    -> loops and accuracy at threshold 0.5 of each, by the name of its folder, or its path where two have one name"""
    longest = max((len(row.ids) for row in rows), default=2) if rows else 2
    batch, scores = config.batch or min(64, max(1, 2**15 // longest)), {}
    source = data.source(rows, config.data, batch=batch, seed=config.seed, held_out=True)
    unique = len({folder.name for folder in config.models}) == len(config.models)
    for folder in config.models:
        name = folder.name if unique else str(folder)
        scores[name] = score(checkpoint.load(folder, device), source, device=device, precision=config.precision)
    comparison = results(scores, device=device, seed=config.seed)
    if config.out:
        checkpoint.write_json(config.out, comparison)
    print_results(comparison)
    half = {name: at_threshold_half(model["buckets"]["all"]) for name, model in comparison["models"].items()}
    return {f"{name}/{what}": x for name in half for what, x in zip(("loops", "accuracy"), half[name], strict=True)}


@unchecked()
def main() -> None:
    config = tyro.cli(EvalConfig, description=__doc__)
    config.check()
    if not config.models:
        raise UserError("no checkpoint was given: python eval.py out/base out/rpt")
    if config.data.val:
        raise UserError(f"--data.val {config.data.val} is for training: give the held-out file as --data.path")
    runtime.require_new(config.out)
    device = runtime.pick_device(config.device)
    shapes, settings = [checkpoint.load_config(folder) for folder in config.models], config.data
    for folder, shape in zip(config.models, shapes, strict=True):
        settings = settings.within(shape.max_positions, folder)
        if shape.vocab_size != (first := shapes[0].vocab_size):
            problem = f"{folder} has a vocabulary of {shape.vocab_size}, {config.models[0]} one of {first}"
            raise UserError(f"{problem}: only models of one tokenizer can be compared token by token")
    tokenizer, rows = data.pick_tokenizer(config.data, config.models[0]), None
    if config.data.path:
        rows, notes = data.encode(config.data.path, tokenizer, settings)
        runtime.print_notes(notes)
    compare_folders(config, rows, device)


if __name__ == "__main__":
    runtime.run_cli(main)
