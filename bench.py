"""How fast it is: ratios within one run, with random weights of a known shape or a checkpoint.

python bench.py decode                       what exits that stop save, one prompt
python bench.py decode out/rpt --batch 16    a checkpoint's own gate, sixteen prompts at once
"""

import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

import data
import eval
import model
import sample
from model import LoopedTransformer, ModelConfig, Precision, UserError, pick_device, report
from sample import CacheRule, Exit, generate

console = Console()
OURO = {"width": 2048, "heads": 16, "ffn": 5632, "vocab_size": 49152}
SHAPES = {
    "medium": ModelConfig(layers=12, width=512, heads=8, vocab_size=8192),
    "ouro-1.4b": ModelConfig(layers=24, **OURO),
    "ouro-2.6b": ModelConfig(layers=48, **OURO),
}
Shape = Literal["medium", "ouro-1.4b", "ouro-2.6b"]


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> LoopedTransformer:
    """Random weights, wide enough that the gate finds tokens to leave after every loop."""
    wide = replace(SHAPES[shape], init_std=0.06)
    with torch.device(device):
        net = LoopedTransformer(wide, generator=data.seeded(shape, device=device)).to(dtype)
        gate = net.early_exit_gate.weight.data
        gate.normal_(std=1.5 * wide.width**-0.5, generator=data.seeded("gate", device=device))
    return net.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


@dataclass(frozen=True)
class DecodeConfig:
    folder: Annotated[Path | None, tyro.conf.Positional] = None  # checkpoint folder (none: random weights)
    shape: Shape = "medium"  # of the random weights
    thresholds: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the gate's cumulative exit probability
    batch: int = 1  # prompts side by side
    prompt_tokens: int = 64  # tokens of each prompt, drawn at random
    tokens: int = 64  # new tokens of each
    rounds: int = 5  # alternating runs of each threshold; the first one more is not counted
    cache: CacheRule = "copy"  # as in sample.py
    device: str = "auto"  # cpu, cuda, cuda:1 (auto: a GPU if there is one)
    dtype: Precision = "auto"  # of weights and cache (auto: as stored, random weights bf16 on a GPU and fp32 on a CPU)
    out: Path | None = None  # where to write the table as JSON

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        for name in ("batch", "prompt_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 1: give a positive number")
        if self.tokens < 2:
            raise UserError(f"--tokens {self.tokens} is below 2: the first one comes from the prompt, give 2 or more")
        if not all(0 <= t <= 1 for t in self.thresholds):
            raise UserError(f"--thresholds {' '.join(map(str, self.thresholds))}: give numbers from 0 to 1")
        if self.out and self.out.exists():
            raise UserError(f"--out {self.out} is there already: nothing saved is overwritten, give another name")


def decode(config: Annotated[DecodeConfig, tyro.conf.arg(name="")]) -> None:
    """Tokens per second at each exit threshold beside full depth; the runs alternate, medians are shown.

    Ideal is L / average loops: a loop that isn't run costs nothing, and all else is free.
    """
    config.check()
    device = pick_device(config.device)
    if config.folder:
        net, _ = sample.load(config.folder, device, config.dtype)
    else:
        dtype = config.dtype if config.dtype != "auto" else "bf16" if device.type == "cuda" else "fp32"
        net = random_model(config.shape, device, model.DTYPES[dtype])
    generator = data.seeded("prompts")
    prompts = torch.randint(net.config.vocab_size, (config.batch, config.prompt_tokens), generator=generator).tolist()

    def once(threshold: float) -> tuple[float, float]:
        """Tokens per second and average loops of the decoded tokens; the first of each row is the prompt's."""
        how = {"exit": Exit("gate", threshold), "cache": config.cache, "temperature": 1.0}
        tokens = generate(net, prompts, max_tokens=config.tokens, **how)
        for _ in prompts:
            next(tokens)
        start = time.perf_counter()
        loops = [token.loops for token in tokens]
        return len(loops) / (time.perf_counter() - start), statistics.mean(loops)

    thresholds = [*dict.fromkeys((*config.thresholds, 1.0))]
    rounds = [[once(t) for t in thresholds] for _ in range(1 + config.rounds)][1:]
    depth, rows = net.config.loops, []
    for i, threshold in enumerate(thresholds):
        speed, loops = (statistics.median(r[i][j] for r in rounds) for j in (0, 1))
        speedup = statistics.median(r[i][0] / r[-1][0] for r in rounds)
        row = {
            "threshold": threshold,
            "tokens_per_s": speed,
            "loops": loops,
            "speedup": speedup,
            "ideal": depth / loops,
        }
        rows.append(row | {"of_ideal": speedup * loops / depth})
    name = str(config.folder or config.shape)
    table = Table(title=f"decoding, {name}, batch {config.batch}, cache '{config.cache}'", title_justify="left")
    table.box = box.SIMPLE_HEAD
    for head in ("threshold", "tokens/s", "loops", "speed-up", "ideal", "of ideal"):
        table.add_column(head, justify="right")
    for r in rows:
        label = "all loops" if r["threshold"] == 1 else str(r["threshold"])
        speeds = f"{r['tokens_per_s']:.1f}", f"{r['loops']:.2f}", f"{r['speedup']:.2f}", f"{r['ideal']:.2f}"
        table.add_row(label, *speeds, f"{r['of_ideal']:.2f}")
    console.print(table)
    if config.out:
        found = {
            "decode": name,
            "batch": config.batch,
            "cache": config.cache,
            "dtype": str(net.embed_tokens.weight.dtype),
        }
        found |= {"rows": rows} | eval.provenance(device)
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    tyro.extras.subcommand_cli_from_dict({"decode": decode})


if __name__ == "__main__":
    report(main)
