"""How fast it is: ratios within one run, with random weights of a known shape or a checkpoint.

python bench.py rpt                                  a LoopRPT step beside a plain reading of the paper
python bench.py pretrain --shape ouro-1.4b           a Stage I step beside a plain one
python bench.py eval                                 scoring beside plain scoring
python bench.py decode                       what exits that stop save, one prompt
python bench.py decode out/rpt --batch 16    a checkpoint's own gate, sixteen prompts at once
python bench.py cache text/rpt --data.path val.jsonl     what the cache of early exits costs in accuracy
python bench.py plan --shape ouro-2.6b --gpus 8      memory and time of training, before it is tried
"""

import contextlib
import copy
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from einops import rearrange, repeat
from rich import box
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile

import data
import eval
import looprpt
import model
import sample
from eval import console
from model import Cache, LoopedTransformer, ModelConfig, Precision, UserError, pick_device, report
from sample import CacheRule, Exit, generate

OURO = {"width": 2048, "heads": 16, "ffn": 5632, "vocab_size": 49152}
SHAPES = {
    "demo": ModelConfig(vocab_size=8),
    "small": ModelConfig(layers=4, width=256, vocab_size=8192),
    "medium": ModelConfig(layers=12, width=512, heads=8, vocab_size=8192),
    "ouro-1.4b": ModelConfig(layers=24, **OURO),
    "ouro-2.6b": ModelConfig(layers=48, **OURO),
}
Shape = Literal["demo", "small", "medium", "ouro-1.4b", "ouro-2.6b"]
ROWS = {"demo": (128, 11), "small": (8, 256), "medium": (4, 512), "ouro-1.4b": (1, 4096), "ouro-2.6b": (1, 4096)}


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> LoopedTransformer:
    """Random weights, wide enough that the gate finds tokens to leave after every loop."""
    wide = replace(SHAPES[shape], init_std=0.06)
    with torch.device(device):
        net = LoopedTransformer(wide, generator=data.seeded(shape, device=device)).to(dtype)
        gate = net.early_exit_gate.weight.data
        gate.normal_(std=1.5 * wide.width**-0.5, generator=data.seeded("gate", device=device))
        net.early_exit_gate.bias.data.fill_(-2.5)
    return net.eval()


def check_thresholds(thresholds: tuple[float, ...]) -> None:
    if not all(0 <= t <= 1 for t in thresholds):
        raise UserError(f"--thresholds {' '.join(map(str, thresholds))}: give numbers from 0 to 1")


def check_out(out: Path | None) -> None:
    if out and out.exists():
        raise UserError(f"--out {out} is there already: nothing saved is overwritten, give another name")
    if out:
        eval.make_folder(out.parent)


def write(out: Path | None, found: dict, device: torch.device) -> None:
    """A result as JSON, with what made it."""
    if out:
        out.write_text(json.dumps(found | eval.provenance(device), indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


@dataclass(frozen=True)
class DecodeConfig:
    folder: Annotated[Path | None, tyro.conf.Positional] = None  # checkpoint folder (none: random weights)
    shape: Shape = "medium"  # of the random weights
    thresholds: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the gate's cumulative exit probability
    batch: int = 1  # prompts side by side; above 1, four times as many take their turns
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
        check_thresholds(self.thresholds)
        check_out(self.out)


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
    if config.prompt_tokens + config.tokens > net.config.max_positions:
        raise UserError(
            f"--prompt-tokens {config.prompt_tokens} and --tokens {config.tokens} are more than the model's "
            f"{net.config.max_positions} positions: give less"
        )
    generator = data.seeded("prompts")
    n = 4 * config.batch if config.batch > 1 else 1
    prompts = torch.randint(net.config.vocab_size, (n, config.prompt_tokens), generator=generator).tolist()

    on_prompts, prefill = [0.0], net.prefill  # seconds that are no decoding

    def timed_prefill(*args) -> torch.Tensor:
        start = time.perf_counter()
        state = prefill(*args)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        on_prompts[0] += time.perf_counter() - start
        return state

    net.prefill = timed_prefill

    def once(threshold: float) -> tuple[float, float]:
        """Tokens per second, and average loops of the decoded ones: the first of each prompt comes from the prompt."""
        how = {"exit": Exit("gate", threshold), "cache": config.cache, "temperature": 1.0, "batch": config.batch}
        tokens = generate(net, prompts, max_tokens=config.tokens, **how)
        begun = {next(tokens).row for _ in range(config.batch)}
        start, loops, count, on_prompts[0] = time.perf_counter(), [], 0, 0.0
        for token in tokens:
            count += 1
            if token.row in begun:
                loops.append(token.loops)
            begun.add(token.row)
        return count / (time.perf_counter() - start - on_prompts[0]), statistics.mean(loops)

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
    dtype = str(net.embed_tokens.weight.dtype)
    found = {"decode": name, "batch": config.batch, "cache": config.cache, "dtype": dtype, "rows": rows}
    write(config.out, found, device)


# ---------------------------------------------------------------------------------------------------------------------
# What the cache of early exits costs


@dataclass(frozen=True)
class CacheConfig:
    folder: Annotated[Path, tyro.conf.Positional]  # checkpoint folder
    data: data.DataConfig  # a file that was not trained on
    thresholds: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 1.0)  # of the gate's cumulative exit probability
    rows: int = 200  # documents at most, evenly by length
    batch: int = 32  # of them side by side
    device: str = "auto"  # cpu, cuda, cuda:1 (auto: a GPU if there is one)
    dtype: Precision = "auto"  # of weights and cache (auto: as stored)
    out: Path | None = None  # where to write the table as JSON

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        self.data.check()
        if not self.data.path:
            raise UserError("no --data.path was given: the caches are compared on documents, give a file of them")
        for name in ("rows", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} is below 1: give a positive number")
        check_thresholds(self.thresholds)
        check_out(self.out)


@torch.no_grad()
def forced(net: LoopedTransformer, rows: list[data.Row], threshold: float, rule: CacheRule) -> tuple[int, int, int]:
    """Decode given responses token by token. Returns tokens, how many were the likeliest where they left, and loops."""
    device, dtype, depth = net.embed_tokens.weight.device, net.embed_tokens.weight.dtype, net.config.loops
    prompts, ends = [row.prompt for row in rows], [len(row.ids) - 1 for row in rows]
    ids = torch.zeros(len(rows), max(ends) + 1, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, : len(row.ids)] = torch.tensor(row.ids)
    ids = ids.to(device)
    slots = 1 if rule == "last" else depth
    cache = Cache(net.config, len(rows), max(ends), slots=slots, device=device, dtype=dtype)
    net.prefill(ids[:, : max(prompts)], cache, list(range(len(rows))), depth)
    tokens = right = loops = 0
    for i in range(max(end - prompt for end, prompt in zip(ends, prompts, strict=True))):
        live = [b for b in range(len(rows)) if prompts[b] + i < ends[b]]
        at = [prompts[b] + i for b in live]
        state = net.embed_tokens(ids[live, at])  # R D
        answer, took, log_stay = torch.empty_like(state), [0] * len(live), torch.zeros(len(live), device=device)
        for loop in range(depth):
            on = [k for k in range(len(live)) if rule == "full" or not took[k]]
            where = ([live[k] for k in on], [loop] * len(on), [at[k] for k in on])
            if on:
                state[on] = net.decode(state[on], cache, *where)
            log_stay = log_stay + F.logsigmoid(-net.gate(state))
            enough = ((-torch.expm1(log_stay) >= threshold) & (threshold < 1)).tolist()
            for k in on:
                if not took[k] and (enough[k] or loop == depth - 1):
                    took[k], answer[k] = loop + 1, state[k]
        if rule == "copy":
            cache.fill(live, took, at)
        logits = net.logits(answer)  # R V
        right += (logits.argmax(-1) == ids[live, [p + 1 for p in at]]).sum().item()
        tokens, loops = tokens + len(live), loops + sum(took)
    return tokens, right, loops


def cache(config: Annotated[CacheConfig, tyro.conf.arg(name="")]) -> None:
    """Accuracy of next tokens of given responses, decoded step by step, with each rule for what an early exit leaves in
    the cache; 'full' is exact."""
    config.check()
    device = pick_device(config.device)
    net, tokenizer = sample.load(config.folder, device, config.dtype)
    rows, notes = data.encode(config.data.path, tokenizer, config.data)
    rows = sorted((r for r in rows if len(r.ids) > r.prompt + 1), key=lambda r: len(r.ids))
    rows = rows[:: -(-len(rows) // config.rows)]
    console.print(*notes, sep="\n", end="\n" * bool(notes), soft_wrap=True)
    found = []
    for rule in ("full", "copy", "last"):
        for threshold in track(config.thresholds, f"cache '{rule}'"):
            parts = [rows[i : i + config.batch] for i in range(0, len(rows), config.batch)]
            counts = [forced(net, part, threshold, rule) for part in parts]
            tokens, right, loops = (sum(x) for x in zip(*counts, strict=True))
            found.append(
                {
                    "cache": rule,
                    "threshold": threshold,
                    "tokens": tokens,
                    "accuracy": right / tokens,
                    "loops": loops / tokens,
                }
            )
    table = Table(title=f"accuracy in % at average loops, {config.folder}", title_justify="left", box=box.SIMPLE_HEAD)
    for head in ("cache", *(f"q={t:g}" for t in config.thresholds)):
        table.add_column(head, justify="right")
    for rule in ("full", "copy", "last"):
        table.add_row(rule, *(f"{100 * r['accuracy']:.1f} at {r['loops']:.2f}" for r in found if r["cache"] == rule))
    console.print(table)
    write(config.out, {"cache": str(config.folder), "rows": found}, device)


# ---------------------------------------------------------------------------------------------------------------------
# What training will need


@dataclass(frozen=True)
class PlanConfig:
    shape: Shape = "ouro-2.6b"  # of the model
    gpus: tuple[int, ...] = (1, 2, 4, 8, 16, 64, 256, 1024)  # a row of the table for each number
    per_machine: int = 8  # GPUs of a machine, the most that share one copy of the model
    objective: looprpt.Stage = "rpt"  # what is trained
    dist: Literal["ddp", "fsdp"] = "fsdp"  # each GPU a whole copy, or a shard of it
    checkpoint: bool = True  # keep no layer's inside for the backward pass, as --train.checkpoint
    rows: int = 1  # rows of a forward pass of one GPU, as --train.micro-batch
    batch: int = 64  # rows in a step, over all GPUs
    length: int = 4096  # tokens in a row
    rollouts: int = 0  # noisy rollouts (0: no noise; LoopRPT as published: 8)
    rho: float = 1.0  # share of the tokens that is hard (LoopRPT as published: 0.2)
    peak: float = 989.0  # a GPU's bfloat16 teraflops, by its vendor (989: H100, H200)
    mfu: float = 0.4  # share of it that is reached: measure it, log.jsonl has it; this is a guess

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        for name, least in (("per_machine", 1), ("rows", 1), ("batch", 1), ("length", 1), ("rollouts", 0)):
            if getattr(self, name) < least:
                flag = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise UserError(f"{flag} is below {least}: give a positive number" + " or 0" * (not least))
        if not self.gpus or not all(1 <= n <= 1024 for n in self.gpus):
            raise UserError(f"--gpus {' '.join(map(str, self.gpus))}: give numbers from 1 to 1024")
        for name, most in (("mfu", 1), ("rho", 1), ("peak", math.inf)):
            if not 0 < getattr(self, name) <= most:
                raise UserError(f"--{name} {getattr(self, name)} is out of its range: give a number above 0, to {most}")


def saved_bytes(shape: ModelConfig, rows: int, length: int) -> int:
    """What one loop keeps for the backward pass, under bfloat16 autocast: by running it on tensors without memory."""
    kept = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with FakeTensorMode():
        net = LoopedTransformer(replace(shape, vocab_size=8))
        state = torch.zeros(rows, length, shape.width, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            out = net(state, loops=1)
        weights = {p.untyped_storage()._cdata for p in net.parameters()}
        assert out.hidden.requires_grad
        return sum(size for key, size in kept.items() if key not in weights)


def memory(config: PlanConfig, gpus: int) -> dict[str, float]:
    """Bytes on each GPU at the peak of a step, by what they hold."""
    c = SHAPES[config.shape].resolved()
    with torch.device("meta"):
        n = sum(p.numel() for p in LoopedTransformer(c).parameters())
        layer = sum(p.numel() for p in LoopedTransformer(replace(c, layers=1)).layers.parameters())
    shards = min(gpus, config.per_machine) if config.dist == "fsdp" else 1
    tokens, rpt = config.rows * config.length, config.objective == "rpt"
    one, two = (saved_bytes(replace(c, layers=k), config.rows, config.length) for k in (1, 2))
    inside, state = two - one - 2 * layer, 4 * tokens * c.width  # of a layer in one loop, without its bfloat16 weights
    loops = {"pretrain": c.loops, "gate": 0, "rpt": c.loops + config.rollouts * max(0, c.loops - 2)}[config.objective]
    kept = c.layers * loops * state + inside if config.checkpoint else c.layers * loops * inside
    words = tokens * (config.rho if rpt else 1) * c.loops * c.vocab_size
    trained = c.width + 1 if config.objective == "gate" else n
    return {
        "weights": 4 * n / shards,
        "grads": 4 * trained / shards,
        "moments": 8 * trained / shards,
        "teacher": 4 * n / shards if rpt else 0.0,
        "gathered": (4 * n + 4 * trained) * (shards > 1) + 2 * n,  # and the weights in bfloat16
        "layers": kept + 3 * loops * state,  # each loop's state, before and after its norm, and stacked
        "head": 3 * 4 * min(words, looprpt.KEPT),  # logits, their log-probabilities, a gradient
    }


def plan(config: Annotated[PlanConfig, tyro.conf.arg(name="")]) -> None:
    """GiB on each GPU at the peak of a training step, and the seconds that a step takes.

    Computed, not measured: what a layer keeps comes from running it on tensors without memory, the time from --mfu;
    torch.compile keeps less.
    """
    config.check()
    c, gib = SHAPES[config.shape].resolved(), 2**30
    ids = torch.zeros(config.batch, config.length, dtype=torch.long)
    noise = 0.1 if config.rollouts else 0.0
    cfg = looprpt.RPTConfig(rollouts=config.rollouts, rho=config.rho, noise_std=noise)
    flops = looprpt.step_flops(config.objective, c, cfg, data.Batch(ids, ids, torch.ones_like(ids, dtype=torch.bool)))
    table = Table(title=f"{config.objective}, {config.shape}, {config.dist}: GiB per GPU", title_justify="left")
    table.box, table.pad_edge, table.collapse_padding = box.SIMPLE_HEAD, False, True
    parts = {gpus: memory(config, gpus) for gpus in config.gpus}
    for head in ("GPUs", *parts[config.gpus[0]], "all", "s/step"):
        table.add_column(head, justify="right", no_wrap=True)
    for gpus, sizes in parts.items():
        at_once = gpus * config.rows
        turns = -(-config.batch // at_once) * at_once / config.batch  # above 1 if some GPUs idle
        seconds = flops * turns / (gpus * config.peak * 1e12 * config.mfu)
        cells = [f"{size / gib:.1f}" for size in (*sizes.values(), sum(sizes.values()))]
        table.add_row(str(gpus), *cells, f"{seconds:.2f}")
    console.print(table)
    cache = 2 * c.layers * c.loops * c.kv_heads * c.head_dim * 2 // 2**10
    console.print(
        f"{config.batch} rows of {config.length} tokens a step, {config.rows} at once. --mfu {config.mfu} is a guess "
        f"until it is measured. Generation's cache in bf16: {cache} KiB a token, {cache // c.loops} with --cache last."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training and scoring, beside plain forms of the same


@dataclass(frozen=True)
class SpeedConfig:
    shape: Shape = "small"  # of the random weights
    rows: int = 0  # rows in a step, all at once (0: what suits the shape)
    length: int = 0  # tokens in a row (0: what suits the shape)
    rounds: int = 3  # alternating runs of each form; two more, before them, are not counted
    precision: Precision = "auto"  # of the matrix products (auto: bf16 on a GPU, fp32 on a CPU)
    plain: bool = True  # time the plain form too, which may need more memory than there is
    compile: bool = True  # time ours with torch.compile too
    checkpoint: bool = False  # ours as with --train.checkpoint
    device: str = "auto"  # cpu, cuda, cuda:1 (auto: a GPU if there is one)
    out: Path | None = None  # JSON file to add the result to

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        for name, least in (("rows", 0), ("length", 0), ("rounds", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)} is too small: give {least} or more")
        if self.length == 1:
            raise UserError("--length 1 is too small: a row needs 2 or more tokens")
        gathered(self.out)
        if self.out:
            eval.make_folder(self.out.parent)


def yardstick(student, teacher, batch: data.Batch, cfg: looprpt.RPTConfig, generator: torch.Generator) -> Tensor:
    """The loss of a LoopRPT step, read from the paper line by line: every pass is one of its own at full depth, and
    every loop of every position of each goes through the vocabulary."""
    n_loops, vocab = student.config.loops, student.config.vocab_size
    targets, mask = batch.targets, batch.mask.to(batch.inputs.device)

    def run(net: LoopedTransformer, ids: Tensor, noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out = net(ids, noise_std=noise, generator=generator)
        logits = net.logits(out.hidden).log_softmax(-1)  # B T L V
        gold = repeat(targets, "b t -> (b g) t l 1", g=len(ids) // len(targets), l=n_loops)
        leave, stay = torch.sigmoid(out.gate), torch.sigmoid(-out.gate)  # B T L
        reached = F.pad(stay[..., :-1].cumprod(-1), (1, 0), value=1.0)
        pi = torch.cat((leave[..., :-1], torch.ones_like(leave[..., :1])), -1) * reached
        return logits.gather(-1, gold)[..., 0], pi, logits, -(logits[:, :, -1].exp() * logits[:, :, -1]).sum(-1)

    with torch.no_grad():
        ref_logp, ref_pi, _, entropy = run(teacher, batch.inputs)
        hard = torch.zeros_like(mask)
        for b in range(len(mask)):
            counted = mask[b].nonzero()[:, 0]
            k = math.ceil(cfg.rho * len(counted) - 1e-9)
            hard[b, counted[entropy[b, counted].topk(k).indices]] = True
        ref_loop = (ref_pi.cumsum(-1)[..., :-1] < cfg.tau).sum(-1)  # B T
        baseline = ref_logp.gather(-1, ref_loop[..., None])
        difficulty = (entropy / math.log(vocab)).clamp(0, 1)
        price = cfg.lambda_base * (1 + cfg.lambda_scale * (1 - difficulty))
        late = torch.arange(n_loops, device=mask.device) - ref_loop[..., None]
        reward = run(student, batch.inputs)[0] - baseline - price[..., None] * late  # B T L
    logp, pi, _, _ = run(student, batch.inputs)
    _, noisy_pi, _, _ = run(student, batch.inputs.repeat_interleave(cfg.rollouts, 0), cfg.noise_std)
    noisy_pi = rearrange(noisy_pi, "(b g) t l -> b t g l", g=cfg.rollouts)[hard]  # N G L
    logp, pi, ref_logp, reward = (x[hard] for x in (logp, pi, ref_logp, reward))  # N L
    exits = looprpt.draw_exits(noisy_pi.detach().log(), generator)[..., None]  # N G 1
    earned = repeat(reward, "n l -> n g l", g=cfg.rollouts).gather(-1, exits)[..., 0]  # N G
    advantage = (earned - earned.mean(-1, keepdim=True)) / (earned.std(-1, keepdim=True) + 1e-6)
    pg = -(advantage * noisy_pi.gather(-1, exits)[..., 0].log()).mean()
    better = (reward - reward.mean(-1, keepdim=True)) / (reward.std(-1, keepdim=True) + 1e-6)
    rep = -((pi * (1 + better.relu())).detach() * logp).sum(-1).mean()
    ent = (pi * pi.log()).sum(-1).mean()
    ratio = ref_logp - logp
    kl = (ratio.exp() - ratio - 1).mean()
    return cfg.pg_weight * pg + cfg.rep_weight * rep + cfg.ent_weight * ent + cfg.kl_weight * kl


def plain_pretrain(student: LoopedTransformer, batch: data.Batch, beta: float) -> Tensor:
    """Stage I with all logits at once."""
    out = student(batch.inputs)
    gold = repeat(batch.targets, "b t -> b t l 1", l=student.config.loops)
    logp = student.logits(out.hidden).log_softmax(-1).gather(-1, gold)[..., 0]  # B T L
    logpi = model.exit_logpdf(out.gate)
    loss = (logpi.exp() * (beta * logpi - logp)).sum(-1)  # B T
    return loss[batch.mask.to(loss.device)].mean()


@torch.no_grad()
def plain_score(net: LoopedTransformer, batch: data.Batch) -> tuple[Tensor, ...]:
    """What eval.score finds, with all logits at once."""
    out = net(batch.inputs)
    return eval.read(net, out.hidden.flatten(0, 1), batch.targets.flatten(), out.gate.flatten(0, 1))


def peak_bytes(step: Callable[[], None], standing: int, device: torch.device) -> int:
    """Most memory in a step: what a GPU says, or on a CPU what stands before it and the tensors that it makes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    with silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = sorted(
        (e.start_ns(), e.nbytes()) for e in record.profiler.kineto_results.events() if e.name() == "[memory]"
    )
    now = most = 0
    for _, size in events:
        now += size
        most = max(most, now)
    return standing + most


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing on standard error, to which the profiler writes in C."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_flops(device: torch.device, precision: Precision) -> float:
    """The vendor's figure of a GPU; of any other device, what a large matrix product reaches."""
    if peak := looprpt.peak_flops(device):
        return peak
    a, seconds = torch.randn(2048, 2048, device=device), []
    for _ in range(5):
        with eval.autocast(device, precision), torch.no_grad():
            start = time.perf_counter()
            (a @ a).sum().item()
            seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds)


def gathered(out: Path | None) -> list[dict]:
    """The results that a file holds already. Raises UserError if it is something else."""
    if not (out and out.exists()):
        return []
    found = model.read_json(out).get("runs") if out.is_file() else None
    keys = {"bench", "argv", "precision", "forms"}
    if not isinstance(found, list) or not all(isinstance(r, dict) and keys <= r.keys() for r in found):
        raise UserError(f"--out {out} holds no results of these benchmarks: give another name")
    return found


class Form(NamedTuple):
    step: Callable[[], None]
    flops: float  # operations that it needs


def race(name: str, config: SpeedConfig, setup: Callable) -> None:
    """Time the forms of a step side by side, and print how they compare with the first.

    setup  device, net, source -> the forms by name, the models whose layers they run, and the bytes that stand before
           a step; "plain" is never compiled
    """
    config.check()
    device, usual = pick_device(config.device), ROWS[config.shape]
    rows, length = config.rows or usual[0], config.length or usual[1]
    shape = SHAPES[config.shape]
    with torch.device(device):
        net = LoopedTransformer(shape, generator=data.seeded(config.shape, device=device))
    ids = torch.randint(shape.vocab_size, (rows, length + 1), generator=data.seeded("rows")).tolist()
    forms, nets, standing = setup(device, net, data.Documents([data.Row(row, 1) for row in ids], batch=rows, seed=0))
    if not config.plain:
        del forms["plain"]
    if config.compile:
        forms |= {f"{form}, compiled": forms[form] for form in forms if form != "plain"}

    def go(form: str) -> float:
        for layer in (layer for n in nets for layer in n.layers):
            layer.compiled = form.endswith("compiled")
        net.checkpointing = config.checkpoint and form != "plain"
        start = time.perf_counter()
        forms[form].step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    sizes = {}
    bar = {"console": console, "transient": True, "disable": not console.is_terminal}
    for form in track(forms, "warming up", **bar):
        try:
            go(form)
            sizes[form] = peak_bytes(lambda form=form: go(form), standing, device)
        except torch.OutOfMemoryError:
            console.print(f"{form}: more memory than there is")
    if not sizes:
        raise UserError(f"--rows {rows} --length {length}: nothing fits into the memory of {device}, give less")
    times = [{form: go(form) for form in sizes} for _ in track(range(config.rounds), "timing", **bar)]
    first, peak, found = next(iter(sizes)), peak_flops(device, config.precision), []
    for form, size in sizes.items():
        seconds = statistics.median(t[form] for t in times)
        speedup = statistics.median(t[first] / t[form] for t in times)
        row = {"form": form, "tokens_per_s": rows * length / seconds, "speedup": speedup, "peak_gib": size / 2**30}
        found.append(row | {"memory": size / sizes[first], "mfu": forms[form].flops / seconds / peak})
    result = {
        "bench": name,
        "shape": config.shape,
        "rows": rows,
        "length": length,
        "precision": eval.products(device, config.precision),
    }
    result |= {"threads": torch.get_num_threads(), "peak_tflops": peak / 1e12, "forms": found} | eval.provenance(device)
    title = f"{name}, {config.shape}, {rows} rows of {length}, {result['precision']}, {result['device']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for head in HEADS:
        table.add_column(head, justify="right" if head else "left")
    for row in found:
        table.add_row(*speed_cells(row))
    console.print(table)
    if config.out:
        model.write_json(config.out, {"runs": [*gathered(config.out), result]})


HEADS = ("", "tokens/s", "speed-up", "peak GiB", "of first", "MFU")


def speed_cells(row: dict) -> list[str]:
    speeds = f"{row['tokens_per_s']:,.0f}", f"{row['speedup']:.2f}", f"{row['peak_gib']:.2f}", f"{row['memory']:.2f}"
    return [row["form"], *speeds, f"{100 * row['mfu']:.0f} %"]


def rpt(config: Annotated[SpeedConfig, tyro.conf.arg(name="")]) -> None:
    """A step of LoopRPT, backward pass, optimiser and teacher included: ours beside a plain reading of the paper.

    plain and sampled draw exits in 8 rollouts, exact takes the expectation in one, looprpt is the default: without
    noise, and trained on all tokens. MFU counts the operations that our form of the step needs, also for the plain one.
    """

    def setup(device: torch.device, net: LoopedTransformer, source: data.Documents) -> tuple:
        teacher, batch = copy.deepcopy(net).requires_grad_(False), eval.counted(source.batch(0), device)
        optimizer = looprpt.optimizer_for(net, 0.0, 0.0)  # a learning rate of 0: all forms find the same weights

        def form(loss: Callable, cfg: looprpt.RPTConfig) -> Form:
            def step() -> None:
                optimizer.zero_grad()
                with eval.autocast(device, config.precision):
                    found = loss(cfg, data.seeded("noise", device=device))
                found.backward()
                clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                looprpt.update_teacher(teacher, net, 0.995)

            return Form(step, looprpt.step_flops("rpt", net.config, cfg, batch))

        def plain(cfg: looprpt.RPTConfig, generator: torch.Generator) -> Tensor:
            return yardstick(net, teacher, batch, cfg, generator)

        def ours(cfg: looprpt.RPTConfig, generator: torch.Generator) -> Tensor:
            counts, _ = looprpt.count(batch, cfg.rho, device)
            return looprpt.rpt_step(net, teacher, batch, cfg, counts=counts, generator=generator).loss

        exact = replace(looprpt.PAPER, estimator="exact", rollouts=1)
        ways = {"sampled": looprpt.PAPER, "exact": exact, "looprpt": looprpt.RPTConfig()}
        forms = {"plain": form(plain, looprpt.PAPER)} | {name: form(ours, cfg) for name, cfg in ways.items()}
        return forms, (net, teacher), 16 * sum(p.numel() for p in net.parameters())  # weights, teacher, two moments

    race("rpt", config, setup)


def pretrain(config: Annotated[SpeedConfig, tyro.conf.arg(name="")]) -> None:
    """A step of Ouro's Stage I, backward pass and optimiser included: ours beside one that makes all logits at once."""

    def setup(device: torch.device, net: LoopedTransformer, source: data.Documents) -> tuple:
        batch, cfg = eval.counted(source.batch(0), device), looprpt.PretrainConfig()
        optimizer = looprpt.optimizer_for(net, 0.0, 0.0)
        counts, _ = looprpt.count(batch, looprpt.RPTConfig.rho, device)

        def form(loss: Callable[[], Tensor]) -> Form:
            def step() -> None:
                optimizer.zero_grad()
                with eval.autocast(device, config.precision):
                    found = loss()
                found.backward()
                clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()

            return Form(step, looprpt.step_flops("pretrain", net.config, cfg, batch))

        plain = form(lambda: plain_pretrain(net, batch, cfg.beta))
        ours = form(lambda: looprpt.pretrain_step(net, batch, cfg, counts=counts).loss)
        return {"plain": plain, "ours": ours}, (net,), 12 * sum(p.numel() for p in net.parameters())

    race("pretrain", config, setup)


def evaluate(config: Annotated[SpeedConfig, tyro.conf.arg(name="")]) -> None:
    """Scoring: ours beside one that makes all logits at once."""

    def setup(device: torch.device, net: LoopedTransformer, source: data.Documents) -> tuple:
        def plain() -> None:
            with eval.autocast(device, config.precision):
                plain_score(net, eval.counted(source.batch(0), device))

        def ours() -> None:
            eval.score(net, source, device=device, precision=config.precision)

        flops = looprpt.step_flops("gate", net.config, None, source.batch(0))
        forms = {"plain": Form(plain, flops), "ours": Form(ours, flops)}
        return forms, (net,), 4 * sum(p.numel() for p in net.parameters())

    race("eval", config, setup)


def speeds(found: Annotated[Path, tyro.conf.Positional] = Path("results/bench.json")) -> None:
    """The README's table of speeds, as Markdown: what --out of rpt, pretrain and eval has gathered."""
    if not found.is_file():
        raise UserError(f"{found} is not a file: give what --out of rpt, pretrain and eval wrote")
    print(speeds_markdown(gathered(found)))


def speeds_markdown(results: list[dict]) -> str:
    lines = ["| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
    for r in results:
        args = [*r["argv"][1:]]
        if "--out" in args:
            del args[args.index("--out") : args.index("--out") + 2]
        command = shlex.join(["python", "bench.py", *args])
        lines.append(f"| **`{command}`** ({r['precision']}) |" + " |" * (len(HEADS) - 1))
        lines += ["| " + " | ".join(speed_cells(row)) + " |" for row in r["forms"]]
    return "\n".join(lines)


def main() -> None:
    commands = {"rpt": rpt, "pretrain": pretrain, "eval": evaluate, "decode": decode, "cache": cache, "plan": plan}
    tyro.extras.subcommand_cli_from_dict(commands | {"speeds": speeds})


if __name__ == "__main__":
    report(main)
