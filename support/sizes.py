"""Defaults that know the size of the model and of the data, and the memory of a step, before anything is allocated."""

import functools
import math
import os
import re
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch

from model import MAX_KEPT_LOGITS, LoopedTransformer, ModelConfig
from support import processes, ranges, text
from support.runs import Stage
from support.runtime import UserError, matmul_dtype

GIB = 2**30
MARGIN = 1.05  # what was measured is at most 4 % above the sum
BUILT_IN_STEPS, EPOCHS = {"pretrain": 2500, "gate": 400, "rpt": 250}, 3
LARGE = 100e6  # parameters from which a GPU takes one row at a time, and computes activations again
ACTIVATIONS = 4 * GIB  # else a forward pass has as many rows as keep no more than this


@functools.cache
def count_parameters(c: ModelConfig) -> int:
    """Of a model that is not built."""
    with torch.device("meta"):
        return sum(p.numel() for p in LoopedTransformer(c).parameters())


def step_memory(
    stage: str, c: ModelConfig, cfg, *, rows: int, length: int, bf16: bool, recompute: bool, shards: int = 1
) -> dict[str, float]:
    """Bytes on each device at the peak of a step without torch.compile, by what they hold.
    cfg     the stage's configuration
    rows    in a forward pass of one process, of `length` tokens
    shards  over so many devices the weights are spread"""
    c, n, tokens, is_rpt = c.resolved(), count_parameters(c), rows * length, stage == "rpt"
    # What a layer keeps of a token in one loop: counted once, and again by a test
    heads, kv_heads = c.heads * c.head_dim, c.kv_heads * c.head_dim
    sizes = (c.width, c.ffn, heads, kv_heads)
    numbers = (38, 8, 6, 4) if bf16 else (40, 16, 12, 8)  # bytes of each
    kept = sum(size * number for size, number in zip(sizes, numbers, strict=True)) + 4 * c.heads + 16
    state, inside = 4 * tokens * c.width, tokens * kept
    rollouts = cfg.rollouts * max(0, c.loops - 2) if is_rpt and cfg.has_noise else 0
    gate_only = stage == "gate" or (is_rpt and cfg.gate_only)
    loops = 0 if gate_only else c.loops + rollouts
    layers = c.layers * loops * state + inside if recompute else c.layers * loops * inside
    logits = tokens * (cfg.rho if is_rpt else 1) * c.loops * c.vocab_size
    trained = c.width + 1 if gate_only else n
    return {
        "weights": 4 * n / shards,
        "grads": 4 * trained / shards,
        "moments": 8 * trained / shards,
        "teacher": 4 * n / shards if is_rpt else 0.0,
        # Whole weights and gradients while they are in use, and in bfloat16; or a pass's gradients beside their sum
        "gathered": (4 * n + 4 * trained if shards > 1 else 0) + (2 * n if bf16 else 4 * trained),
        "layers": layers + 3 * (c.loops + rollouts) * state,  # states, before and after the norm, and stacked
        "head": 3 * 4 * min(logits, MAX_KEPT_LOGITS),  # logits, their log-probabilities, a gradient
    }


def peak_lr(stage: Stage, cfg, shape: ModelConfig) -> float:
    """Peak learning rate by the model's size: what the built-in model and Ouro-1.4B need, and what lies between."""
    n, gate_only = count_parameters(shape), stage == "gate" or (stage == "rpt" and cfg.gate_only)
    lr = 0.64 / shape.width if gate_only else 0.23 * n**-0.5 if stage == "rpt" else min(2e-3, 0.11 * n**-0.28)
    return float(f"{lr:.2g}")


def pass_kind(config, rows, device: torch.device) -> dict:
    """Of a forward pass: tokens of the longest row, and whether its products are in bfloat16."""
    length = max(len(row.ids) for row in rows) - 1 if rows else 2 * config.data.operands - 1
    return {"length": length, "bf16": matmul_dtype(device, config.precision) == "bf16"}


def fill_in(config, shape: ModelConfig, rows, device: torch.device):
    """The configuration with a value for every flag that was left to the sizes."""
    world = processes.rank_and_world()[1]
    is_large = device.type == "cuda" and count_parameters(shape) > LARGE
    batch = config.train.batch or max(world, 8 if rows else 128)
    recompute = config.train.recompute if config.train.recompute != "auto" else "on" if is_large else "off"
    length = config.data.length or (text.MAX_LENGTH if rows else None)
    epoch = math.ceil(len(rows) / batch) if rows else 0
    stages, micro_batch = {}, config.train.micro_batch
    for stage in config.objective:
        cfg = getattr(config, stage)
        steps, lr = cfg.steps or EPOCHS * epoch or BUILT_IN_STEPS[stage], cfg.lr or peak_lr(stage, cfg, shape)
        stages[stage] = replace(cfg, steps=steps, lr=lr)
    if not micro_batch:
        how = {"rows": 1, "recompute": recompute == "on"} | pass_kind(config, rows, device)
        row = max(step_memory(stage, shape, cfg, **how)["layers"] for stage, cfg in stages.items())
        most = 1 if is_large else max(1, int(ACTIVATIONS / row))
        micro_batch = most if most < math.ceil(batch / world) else 0
    train = replace(config.train, batch=batch, micro_batch=micro_batch, recompute=recompute)
    return replace(config, data=replace(config.data, length=length), train=train, **stages)


def describe(config, shape: ModelConfig, chosen: dict[str, object]) -> list[str]:
    """What the first lines of a run say: the recipe and its values, and what was chosen by size."""
    lines = []
    if "rpt" in config.objective:
        values = ", ".join(f"{name} {value}" for name, value in asdict(config.rpt).items())
        lines.append(f"LoopRPT ({config.recipe}): {values}")
    if chosen:
        lines.append(f"chosen, where no flag was given: {' '.join(map(ranges.flag, chosen, chosen.values()))}")
    for stage in config.objective:
        cfg = getattr(config, stage)
        if cfg.lr > 10 * (rule := peak_lr(stage, cfg, shape)):
            lines.append(f"--{stage}.lr {cfg.lr:g} is {cfg.lr / rule:.0f} times the {rule:g} for a model of this size")
    return lines


def free_memory(device: torch.device) -> float:
    """Bytes that may still be taken: of a GPU, or of this machine and its container (cgroup v2); infinite: unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free, group = [math.inf], Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError, TypeError):  # what is not there, or "max", says nothing
        free.append(1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1]))
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        kept = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)  # makes room
        free.append(limit - used + int(kept[1]))
    return min(free)


def require_memory(config, shape: ModelConfig, rows, device: torch.device, done: tuple[Stage, ...]) -> None:
    """Raise UserError if a stage to come can't fit into the free memory, with what would help first."""
    (_, world), n = processes.rank_and_world(), count_parameters(shape)
    at_once = min(config.train.micro_batch or math.inf, math.ceil(config.train.batch / world))
    now = {"rows": at_once, "recompute": config.train.recompute == "on"} | pass_kind(config, rows, device)
    now["shards"] = processes.count_shards(config.dist, n, device)
    sharing = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # a machine's memory is shared
    free = free_memory(device) / sharing / GIB

    def gib(stage: Stage, **change) -> float:
        return MARGIN * sum(step_memory(stage, shape, getattr(config, stage), **now | change).values()) / GIB

    for stage in config.objective:
        if stage not in done and gib(stage) > free:
            problem = f"{stage} of {n:,} parameters, {at_once} x {now['length']} tokens at once, needs"
            problem += f" {gib(stage):.1f} GiB of memory, and {free:.1f} are free on {device.type}"
            smallest, flags = gib(stage, rows=1, recompute=True), "--train.micro-batch 1 --train.recompute on"
            ways = "shorter rows (--data.length), more GPUs (torchrun --nproc-per-node, --dist fsdp) or more memory"
            way = flags if smallest <= free else f"{ways}, for with {flags} it needs {smallest:.1f}"
            raise UserError(f"{problem}: give {way}")
