"""Accuracy after every loop, and at what the gate chooses: checkpoints side by side on the same held-out tokens.

    python eval.py out/base out/rpt                                             the built-in task
    python eval.py out/base out/rpt --data.path val.jsonl --out results.json    a file

A token counts as right if its logit is the largest. Tokens are sorted into buckets once, by the first model.
"""

import contextlib
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import data
import model
from data import Batch, Chain, DataConfig, Documents
from model import LoopedTransformer, UserError, exit_loop, pick_device, report

Precision = Literal["auto", "float32", "bfloat16"]
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
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
    precision: Precision = "auto"  # of the matrix products (auto: bfloat16 on a GPU, float32 on a CPU)

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


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager:
    """A fresh context for one forward pass; its cached weights go stale after an optimiser step."""
    bfloat16 = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext()


def counted(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, without the columns after the last token that counts: nothing reads them."""
    length = int(batch.mask.any(0).nonzero().max()) + 1 if batch.mask.any() else 0
    return Batch(*(part[:, :length].to(device) for part in batch))


class Scores(NamedTuple):
    """What a model does with each token that counts, on the CPU."""

    correct: Tensor  # N L  whether the largest logit is the right token
    gate: Tensor  # N L  exit logits
    entropy: Tensor  # N  nats, of the last loop
    depth: Tensor | None  # N  operands the answer depends on, for chain arithmetic


@torch.no_grad()
def score(
    m: LoopedTransformer, source: Chain | Documents, *, device: torch.device, precision: Precision = "auto"
) -> Scores:
    """Run a model over one pass of a source."""
    parts = []
    for index in range(source.batches):
        batch = counted(source.batch(index), device)
        with autocast(device, precision):
            out = m(batch.inputs)
            hidden, targets = out.hidden[batch.mask], batch.targets[batch.mask]  # N L D, N
            pieces = (part.split(1024) for part in (hidden, targets, out.gate[batch.mask]))
            for h, target, gate in zip(*pieces, strict=True):
                logits = m.logits(h)  # N L V
                entropy = torch.distributions.Categorical(logits=logits[:, -1]).entropy()  # N
                parts.append([(logits.argmax(-1) == target[:, None]).cpu(), gate.cpu(), entropy.cpu()])
    correct, gate, entropy = map(torch.cat, zip(*parts, strict=True))
    if source.depth is None:
        return Scores(correct, gate, entropy, None)
    masks = [source.batch(index).mask for index in range(source.batches)]
    return Scores(correct, gate, entropy, torch.cat([source.depth.expand_as(mask)[mask] for mask in masks]))


def buckets(first: Scores) -> dict[str, Tensor]:
    """Which tokens each bucket holds, by the first model.    -> each N"""
    sets = {"all": torch.ones_like(first.entropy, dtype=torch.bool)}
    sets |= {name: (first.entropy >= low) & (first.entropy < high) for name, (low, high) in DIFFICULTY.items()}
    if first.depth is not None:
        sets |= {f"depth_{d}": first.depth == d for d in range(1, int(first.depth.max()) + 1)}
    return sets


def summary(s: Scores, tokens: Tensor) -> dict:
    """Accuracy (0 to 1) after each loop, and accuracy and mean loops (from 1) at each exit threshold; null if empty."""
    correct, gate, n = s.correct[tokens].double(), s.gate[tokens], int(tokens.sum())

    def mean(x: Tensor) -> float | None:
        return x.double().mean().item() if n else None

    sweep = []
    for threshold in THRESHOLDS:
        exits = exit_loop(gate, threshold)  # N
        accuracy = mean(correct.gather(1, exits[:, None]))
        sweep.append({"threshold": threshold, "accuracy": accuracy, "loops": mean(exits + 1)})
    return {"tokens": n, "by_loop": [mean(column) for column in correct.T], "sweep": sweep}


def results(scores: Mapping[str, Scores], *, device: torch.device, seed: int) -> dict:
    """What results.json holds. The buckets are those of the first model."""
    sets = buckets(next(iter(scores.values())))
    models = {
        name: {"buckets": {bucket: summary(s, tokens) for bucket, tokens in sets.items()}} for name, s in scores.items()
    }
    return {"models": models} | provenance(device) | {"seed": seed}


def provenance(device: torch.device) -> dict:
    """What made a result."""
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "argv": sys.argv,
        "commit": git.stdout.strip() or None,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def show(found: dict) -> None:
    """Print the table, and a second one by operand or by difficulty; q=0.5 is the gate's exit at threshold 0.5."""
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


def main() -> None:
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
        scores[folder.name if unique else str(folder)] = score(m, source, device=device, precision=config.precision)
    found = results(scores, device=device, seed=config.seed)
    show(found)
    if config.out:
        config.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    report(main)
