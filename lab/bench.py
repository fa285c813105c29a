"""How fast it is: ratios within one run, with random weights of a known shape or a checkpoint.

python -m lab.bench decode                           what early exits save, one prompt; or DIR --batch 16
python -m lab.bench plan --shape ouro-2.6b --gpus 8  memory of training, before it is tried
python -m lab.bench rpt                              a LoopRPT step beside a naive reading of the paper
python -m lab.bench gpu --out results/gpu.json       all of it on a GPU, in pieces of at most eight minutes
"""

import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Literal
from unittest import mock

import torch
import tyro
from einops import rearrange, repeat
from torch import Tensor, nn

import data
import looprpt
import sample
from lab import study
from model import LoopedTransformer, ModelConfig, exit_logpdf
from support import checkpoint, decoding, runtime, sizes
from support.ranges import AtLeastTwo, Checked, NonNegative, Positive, Range, unchecked
from support.runs import Stage, make_optimizer
from support.runtime import Precision, UserError, console

OURO = {"width": 2048, "heads": 16, "ffn": 5632, "vocab_size": 49152}
SHAPES = {
    "demo": ModelConfig(vocab_size=8),
    "small": ModelConfig(layers=4, width=256, vocab_size=8192),
    "medium": ModelConfig(layers=12, width=512, heads=8, vocab_size=8192),
    "ouro-1.4b": ModelConfig(layers=24, **OURO),
    "ouro-2.6b": ModelConfig(layers=48, **OURO),
}
Shape = Literal["demo", "small", "medium", "ouro-1.4b", "ouro-2.6b"]
PAPER, DENSE = looprpt.RECIPES["paper"], looprpt.RECIPES["dense"]
FORMS = {"naive": PAPER, "paper": PAPER, "exact": replace(PAPER, estimator="exact", rollouts=1), "dense": DENSE}


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> LoopedTransformer:
    """Random weights, wide enough that the gate finds tokens to leave after every loop."""
    c = replace(SHAPES[shape], init_std=0.06)
    weights, gate = (runtime.seeded(x, device=device) for x in (shape, "gate"))
    with torch.device(device):
        net = LoopedTransformer(c, generator=weights).to(dtype)
    nn.init.normal_(net.early_exit_gate.weight, std=1.5 * c.width**-0.5, generator=gate)
    nn.init.constant_(net.early_exit_gate.bias, -2.5)
    return net


@dataclass(frozen=True)
class DecodeConfig(Checked):
    folder: Annotated[Path | None, tyro.conf.Positional] = None  # checkpoint folder (none: random weights)
    shape: Shape = "medium"  # of the random weights
    thresholds: Annotated[tuple[float, ...], Range(0, 1)] = (0.1, 0.3, 0.5, 0.7, 0.9)  # exit thresholds of the gate
    batch: Positive = 1  # prompts side by side; when one ends, another one takes its place
    prompt_tokens: Positive = 16  # tokens of each prompt, drawn at random
    tokens: AtLeastTwo = 64  # new tokens of each; the first one comes from the prompt
    rounds: Positive = 3  # prompts in each row that are timed, after one that isn't
    verify: NonNegative = 0  # tokens that the exits draft, to be checked at full depth together (0: none are)
    cache: sample.CacheRule = "copy"  # as in sample.py
    device: str = "auto"  # cpu, cuda, cuda:1 (auto: a GPU if there is one)
    dtype: Precision = "auto"  # of weights and cache (auto: as stored, random weights bf16 on a GPU and fp32 on a CPU)
    out: Path | None = None  # where to write the table as JSON


def race(net: LoopedTransformer, prompts: list[list[int]], runs: list[dict], *, skip: int, count: int, **how):
    """Loops of a token on average and tokens per second of each run, by `count` tokens after the first `skip`. The runs
    take turns, a token each, in a drawn order: the first after a pause is up to 4 % slower. Each has its own cache.
    Prompts never run out; their passes don't count, nor the token from each, but its head.    -> R floats, R floats"""
    in_prompts, seconds, loops = 0.0, [0.0] * len(runs), [0] * len(runs)

    def prefill(*args) -> Tensor:
        nonlocal in_prompts
        start, state = time.perf_counter(), decoding.prefill(*args)
        state[0, 0, 0].item()  # waits for a GPU
        in_prompts += time.perf_counter() - start
        return state

    with mock.patch.object(sample, "prefill", prefill):
        each, turns = [(sample.generate(net, prompts, **how, **run), set()) for run in runs], runtime.seeded("turns")
        for n in runtime.progress_bar(range(skip + count), "decoding"):
            for i in torch.randperm(len(runs), generator=turns).tolist():
                (tokens, begun), start = each[i], time.perf_counter() - in_prompts
                while (token := next(tokens)).row not in begun:
                    begun.add(token.row)
                if n >= skip:
                    seconds[i] += time.perf_counter() - in_prompts - start
                    loops[i] += token.loops
    return [total / count for total in loops], [count / total for total in seconds]


def decode(config: Annotated[DecodeConfig, tyro.conf.arg(name="")]) -> None:
    """Tokens per second at each exit threshold beside full depth (1), as long as there are prompts for all rows.
    Ideal is L / average loops: a loop that isn't run costs nothing, and all else is free."""
    config.check()
    runtime.require_new(config.out)
    device = runtime.pick_device(config.device)
    if config.folder:
        net, _ = sample.load_with_tokenizer(config.folder, device, config.dtype)
    else:
        net = random_model(config.shape, device, runtime.DTYPES[runtime.matmul_dtype(device, config.dtype)])
    if config.prompt_tokens + config.tokens > (most := net.config.max_positions):
        problem = f"--prompt-tokens {config.prompt_tokens} and --tokens {config.tokens}"
        raise UserError(f"{problem} are more than the model's {most} positions: give less")
    size, each = ((config.rounds + 2) * config.batch, config.prompt_tokens), config.batch * (config.tokens - 1)
    prompts = torch.randint(net.config.vocab_size, size, generator=runtime.seeded("prompts")).tolist()
    how = {"max_tokens": config.tokens, "cache": config.cache, "temperature": 1.0, "batch": config.batch}
    thresholds, most, rows = [*dict.fromkeys((*config.thresholds, 1.0))], net.config.loops, []
    runs = [{"exit": sample.Exit("gate", x), "verify": config.verify if x < 1 else 0} for x in thresholds]
    loops, speeds = race(net, prompts, runs, skip=each, count=config.rounds * each, **how)
    full = speeds[thresholds.index(1)]
    for threshold, mean, speed in zip(thresholds, loops, speeds, strict=True):
        row = {"threshold": threshold, "tokens_per_s": speed, "loops": mean, "speedup": speed / full}
        ideal = most / mean if not config.verify and config.cache != "full" else None
        rows.append(row | {"ideal": ideal, "of_ideal": ideal and row["speedup"] / ideal})
    cells = (["–" if x is None else f"{x:.2f}" for x in row.values()] for row in rows)
    name = str(config.folder or config.shape)
    title = f"decoding, {name}, batch {config.batch}, cache '{config.cache}', verify {config.verify}"
    runtime.print_table(title, ("threshold", "tokens/s", "loops", "speed-up", "ideal", "of ideal"), cells, left=0)
    if config.out:
        result = asdict(config) | {"decode": name, "dtype": str(net.norm.weight.dtype), "rows": rows}
        checkpoint.write_json(config.out, result | runtime.provenance(device) | {"threads": torch.get_num_threads()})


@dataclass(frozen=True)
class PlanConfig(Checked):
    shape: Shape = "ouro-2.6b"  # of the model
    gpus: Annotated[tuple[int, ...], Range(1, 1024)] = (1, 2, 4, 8, 16, 64, 256, 1024)  # a row of the table for each
    per_machine: Positive = 8  # GPUs that share one copy of the model, at most (1: each has its own)
    objective: Stage = "rpt"  # what is trained
    rows: Positive = 1  # rows of a forward pass of one GPU, as --train.micro-batch
    length: Positive = 4096  # tokens in a row
    recipe: Literal["paper", "dense"] = "paper"  # of LoopRPT


def plan(config: Annotated[PlanConfig, tyro.conf.arg(name="")]) -> None:
    """Computed, not measured: GiB on each GPU at the peak of a step with --train.recompute on, not compiled."""
    config.check()
    c, cfg, cells = SHAPES[config.shape].resolved(), looprpt.RECIPES[config.recipe], []
    how = {"rows": config.rows, "length": config.length, "bf16": True, "recompute": True}
    for gpus in config.gpus:
        bytes_of = sizes.step_memory(config.objective, c, cfg, shards=min(gpus, config.per_machine), **how)
        cells.append([str(gpus), *(f"{x / 2**30:.1f}" for x in (*bytes_of.values(), sum(bytes_of.values())))])
    title = f"{config.objective} ({config.recipe}), {config.shape}, sharded: GiB per GPU"
    runtime.print_table(title, ("GPUs", *bytes_of, "all"), cells, left=0)
    cache = 2 * c.layers * c.loops * c.kv_heads * c.head_dim * 2 // 2**10
    console.print(f"Generation's cache in bf16: {cache} KiB a token, {cache // c.loops} with --cache last.")


@dataclass(frozen=True)
class SpeedConfig(Checked):
    shape: Shape = "small"  # of the random weights
    rows: Positive = 2  # rows in a step, all at once
    length: AtLeastTwo = 256  # tokens in a row
    rounds: Positive = 3  # alternating runs of each form; the first one more is not counted
    precision: Precision = "auto"  # of the matrix products (auto: bf16 on a GPU, fp32 on a CPU)
    stage: Literal["rpt", "pretrain"] = "rpt"  # what is trained; pretrain has one form
    compile: bool = True  # time the forms with torch.compile too, but for the naive one
    recompute: bool = False  # compute each layer's activations again in the backward pass, as --train.recompute
    device: str = "auto"  # cpu, cuda, cuda:1 (auto: a GPU if there is one)
    out: Path | None = None  # where to write the result as JSON


def naive_step(student, teacher, batch: data.Batch, cfg: looprpt.RPTConfig, generator: torch.Generator) -> Tensor:
    """The loss of a LoopRPT step as the paper reads: each pass apart, at full depth, with the logits of all loops."""
    mask, vocab = batch.mask.to(batch.inputs.device), student.config.vocab_size

    def run(net: LoopedTransformer, ids: Tensor, noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        out = net(ids, noise_std=noise, generator=generator)
        logp = net.logits(out.hidden).log_softmax(-1)  # B T L V
        gold = repeat(batch.targets, "b t -> (b g) t l 1", g=len(ids) // len(mask), l=net.config.loops)
        return logp.gather(-1, gold)[..., 0], out.gate, -(logp[:, :, -1].exp() * logp[:, :, -1]).sum(-1)

    with torch.no_grad():
        teacher_logp, teacher_gate, entropy = run(teacher, batch.inputs)  # B T L, B T L, B T
        hard = looprpt.hard_tokens(entropy, mask, cfg.rho)  # B T
        ref_loop, baseline = looprpt.reference(teacher_logp[hard], teacher_gate[hard], cfg.tau)  # N, N
        cost = looprpt.loop_cost(entropy[hard], vocab, cfg.lambda_base, cfg.lambda_scale)  # N
        reward = looprpt.exit_reward(run(student, batch.inputs)[0][hard], baseline, cost, ref_loop)  # N L
    logp, gate, _ = run(student, batch.inputs)
    _, noisy_gate, _ = run(student, batch.inputs.repeat_interleave(cfg.rollouts, 0), cfg.noise_std)
    noisy_gate = rearrange(noisy_gate, "(b g) t l -> b t g l", g=cfg.rollouts)
    logp, logpi, noisy_logpi = logp[hard], exit_logpdf(gate[hard]), exit_logpdf(noisy_gate[hard])  # N L, N L, N G L
    exits = looprpt.draw_exits(noisy_logpi.detach(), generator)  # N G
    pg = looprpt.sampled_policy_loss(noisy_logpi, exits, reward)  # N
    rep = looprpt.representation_loss(logp, logpi, reward)
    ent, kl = (logpi.exp() * logpi).sum(-1), looprpt.k3_kl(logp, teacher_logp[hard])
    return (cfg.pg_weight * pg + cfg.rep_weight * rep + cfg.ent_weight * ent + cfg.kl_weight * kl).mean()


def compare_forms(config: Annotated[SpeedConfig, tyro.conf.arg(name="")]) -> None:
    """A training step, backward pass, optimiser and teacher included, in several forms: LoopRPT's beside a naive one.
    Naive and paper draw exits in 8 rollouts, exact takes the expectation in one, dense is without noise and trained on
    all tokens. MFU counts the operations that our form needs, also for the naive one; the plan is that of `plan`."""
    config.check()
    runtime.require_new(config.out)
    device, rows, length = runtime.pick_device(config.device), config.rows, config.length
    net, is_rpt = random_model(config.shape, device), config.stage == "rpt"
    teacher = random_model(config.shape, device).requires_grad_(False) if is_rpt else None  # the same weights
    optimizer = make_optimizer(net, 0.0, 0.0)  # a learning rate of 0: all forms meet the same weights
    net.recompute = config.recompute
    ids = torch.randint(net.config.vocab_size, (rows, length + 1), generator=runtime.seeded("rows")).tolist()
    batch = data.trim_and_move(data.collate([data.Row(row, 1) for row in ids]), device)
    forms = dict(FORMS) if is_rpt else {"pretrain": looprpt.PretrainConfig()}
    if config.compile:
        forms |= {f"{form}, compiled": cfg for form, cfg in forms.items() if form != "naive"}

    def step(form: str) -> tuple[float, float | None]:  # seconds; GiB at the peak, of a GPU
        for layer in (*net.layers, *(teacher.layers if is_rpt else ())):
            layer.compiled = form.endswith("compiled")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        cfg, noise = forms[form], runtime.seeded("noise", device=device)
        counts, _ = looprpt.count_tokens(batch, getattr(cfg, "rho", 1.0), device)
        with runtime.autocast(device, config.precision):
            if form == "naive":
                loss = naive_step(net, teacher, batch, cfg, noise)
            elif is_rpt:
                loss = looprpt.rpt_step(net, teacher, batch, cfg, counts=counts, generator=noise).loss
            else:
                loss = looprpt.pretrain_step(net, batch, cfg, counts=counts).loss
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()  # here, so that the next step's memory starts without gradients
        if is_rpt:
            looprpt.ema_update(teacher, net, looprpt.RPTConfig.ema_decay)
        net.norm.weight[0].item()  # waits for a GPU
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
        return time.perf_counter() - start, peak

    runs = {form: [] for form in forms}
    for turn, form in runtime.progress_bar([(n, form) for n in range(1 + config.rounds) for form in forms], "training"):
        if len(runs[form]) == turn:  # it has fitted into the memory so far
            try:
                runs[form].append(step(form))
            except torch.OutOfMemoryError:
                optimizer.zero_grad()
    fitting = {form: run[1:] for form, run in runs.items() if len(run) > config.rounds}
    first, peak, results = next(iter(fitting.values()), None), runtime.vendor_flops(device), []
    precision = runtime.matmul_dtype(device, config.precision)
    how = {"rows": rows, "length": length, "bf16": precision == "bf16", "recompute": config.recompute}
    for form, cfg in forms.items():
        row = {"form": form, "error": "out of memory"}
        if form in fitting:
            seconds, memory = median(time for time, _ in fitting[form]), fitting[form][-1][1]
            speedup = median(its / mine for (mine, _), (its, _) in zip(fitting[form], first, strict=True))
            row = {"form": form, "tokens_per_s": rows * length / seconds, "speedup": speedup, "peak_gib": memory}
            row["mfu"] = runtime.step_flops(config.stage, net.config, cfg, batch) / seconds / peak if peak else None
        plan = sum(sizes.step_memory(config.stage, net.config, cfg, **how).values())
        results.append(row | {"plan_gib": None if form == "naive" else plan / 2**30})
    title = f"{config.stage}, {config.shape}, {rows} rows of {length}, {precision}{', recomputed' * config.recompute}"
    runtime.print_table(title, ("", "tokens/s", "speed-up", "peak GiB", "MFU"), map(speed_cells, results))
    if config.out:
        run = {"bench": config.stage, "shape": config.shape, "precision": precision, "threads": torch.get_num_threads()}
        checkpoint.write_json(config.out, {"runs": [run | how | {"forms": results} | runtime.provenance(device)]})


def speed_cells(row: dict) -> list[str]:
    if "error" in row:
        return [row["form"], row["error"]]
    numbers = row["tokens_per_s"], row["speedup"], row["peak_gib"], row["mfu"] and 100 * row["mfu"]
    formats = "{:,.0f}", "{:.2f}", "{:.2f}", "{:.0f} %"
    return [row["form"], *("–" if x is None else form.format(x) for x, form in zip(numbers, formats, strict=True))]


# The first hour on a GPU: commands, each in a process of its own, so that none meets what another left in memory

STEP = "-m lab.bench rpt --device {device} --out {new} --shape"
DECODE = "-m lab.bench decode --device {device} --out {new} --shape ouro-1.4b --rounds 2 --thresholds 0.3 0.7"
PIECES = {"tests": "-m pytest -q --device {device} -m device"}
PIECES |= {"rpt": f"{STEP} ouro-1.4b --rows 1 --length 4096 --recompute"}
PIECES |= {"rpt-medium": f"{STEP} medium --rows 4 --length 512"}
for n in (1, 2, 4):
    PIECES[f"pretrain-{n}"] = f"{STEP} ouro-1.4b --rows {n} --length 4096 --stage pretrain"
    PIECES[f"pretrain-{n}-recomputed"] = PIECES[f"pretrain-{n}"] + " --recompute"
for n, tokens in (1, 64), (8, 32), (32, 16):
    PIECES[f"decode-{n}"] = f"{DECODE} --batch {n} --tokens {tokens}"
    PIECES[f"decode-{n}-verify"] = PIECES[f"decode-{n}"] + " --verify 4"
PIECES["study"] = "-m lab.study run --track text --device {device} --texts {texts} --out {name}.runs --results {name}"
PIECES["study"] += " --only next-token stage-1 paper dense"


def gpu(out: Path, only: tuple[str, ...] = (), texts=study.StudyConfig.texts, device: str = "auto"):
    """Every benchmark, the tests on the device, and the study as far as it comes, in pieces of at most eight minutes.
    Each is written to --out once it is there. The same command goes on with the others, and with --only it tries again
    what ended in an error. --texts is as in lab.study."""
    limit = ["timeout", "--foreground", "-k", "60", "480"]  # seconds until it is told to end; the study saves
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    names, device = study.select(only, PIECES, "--only"), str(runtime.pick_device(device))
    runtime.make_folder(out.parent)
    pieces = checkpoint.read_json(out)["pieces"] if out.exists() else {}
    for name in (name for name in names if name not in pieces or (only and "error" in pieces[name])):
        new = out.with_name(f"{out.stem}.{name}.json")
        places = {"new": new, "name": out.with_suffix(""), "texts": texts, "device": device}
        args = [part.format(**places) for part in PIECES[name].split()]
        console.print(name, "python", *args, soft_wrap=True)
        start, ended = time.perf_counter(), subprocess.run([*limit, sys.executable, *args], check=False, **how)
        status, last = ended.returncode, ended.stdout.strip().rpartition("\n")[2]
        last = "not done after eight minutes" if status == 124 else last or f"exit status {status}"
        console.print(ended.stdout.strip(), f"{name}: {last}", sep="\n", soft_wrap=True)
        pieces[name] = {"command": ["python", *args], "seconds": time.perf_counter() - start}
        pieces[name] |= checkpoint.read_json(new) if new.exists() else {"error" if status else "said": last}
        checkpoint.write_json(out, {"pieces": pieces})
        new.unlink(missing_ok=True)
    console.print(f"{out}: commit {runtime.git('rev-parse', 'HEAD')}", soft_wrap=True)


@unchecked()
def main() -> None:
    commands = {"rpt": compare_forms, "decode": decode, "plan": plan, "gpu": gpu}
    tyro.extras.subcommand_cli_from_dict(commands, prog="python -m lab.bench")


if __name__ == "__main__":
    runtime.run_cli(main)
