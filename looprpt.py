"""LoopRPT (arXiv 2603.19714): reinforcement pre-training of the latent loops of a looped language model.

    python looprpt.py                                          pre-train a small base, run LoopRPT on it, compare them
    python looprpt.py --init out/base --objective rpt          one stage, from a checkpoint
    torchrun --nproc-per-node 8 looprpt.py --model.loops 4     on eight GPUs

The paper's symbols and the names they have here. B batch, T tokens, L loops, G rollouts, V vocabulary, and N the hard
tokens of a batch. Loops are counted from 0 in the code and from 1 in all that a person sees.

    paper          here            shape      meaning
    log p(l)       logp            N L        log-probability of the gold token after each loop
    log p_ref(l)   teacher_logp    N L        the same, by the EMA teacher
    H              entropy         B T        entropy of the teacher's last loop, nats
    M              hard            B T        which tokens are hard
    pi(l)          logpi           N L        log-probability of leaving after each loop
    l_ref          ref_loop        N          where the teacher leaves
    b              baseline        N          teacher_logp there
    lambda         price           N          what a loop costs, nats
    R(l)           reward          N L        reward of leaving after each loop
    pi_g(l)        rollout_logpi   N G L      logpi on each noisy latent rollout
    l_g            exits           N G        where each rollout leaves
    A_g            advantage       N G        centred and scaled over the rollouts of a token
    w(l)           weights         N L        weight of each loop's log-likelihood
"""

import copy
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from einops import rearrange, repeat
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

import data
import eval
import model
from data import Batch, DataConfig
from eval import autocast, console, counted, make_folder
from model import (
    DTYPES,
    DType,
    LoopedTransformer,
    ModelConfig,
    Precision,
    UserError,
    exit_logpdf,
    exit_loop,
    pick_device,
    report,
)

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: each comment is the flag's help


@dataclass(frozen=True)
class TrainConfig:
    """What the stages share."""

    batch: int = 128  # rows in a step, over all processes
    micro_batch: int = 0  # rows in one forward pass of a process (0: all its rows)
    clip: float = 1.0  # largest norm of the gradient
    warmup: float = 0.03  # share of the steps in which the learning rate rises; then it falls along a cosine


@dataclass(frozen=True)
class PretrainConfig:
    """Ouro's Stage I: the expected loss over the exits, less an entropy bonus."""

    steps: int = 2500  # optimiser steps
    lr: float = 2e-3  # peak learning rate
    beta: float = 0.1  # weight of the exit distribution's entropy
    weight_decay: float = 0.1  # of the matrices


@dataclass(frozen=True)
class GateConfig:
    """Ouro's Stage II: the gate alone learns whether the next loop helps, the backbone is frozen."""

    steps: int = 400  # optimiser steps
    lr: float = 1e-2  # peak learning rate


@dataclass(frozen=True)
class RPTConfig:
    """LoopRPT."""

    steps: int = 500  # optimiser steps
    lr: float = 1e-3  # peak learning rate
    estimator: Literal["sampled", "exact"] = "exact"  # draw an exit per rollout (the paper), or take the expectation
    rollouts: int = 1  # G, noisy latent rollouts (the paper: 8, with the sampled estimator)
    noise_std: float = 0.1  # standard deviation of the noise on the state fed to the next loop
    reward: Literal["clean", "rollout"] = "clean"  # from the clean pass (the paper), or recomputed on each rollout
    kl: Literal["k3", "full"] = "k3"  # at the gold token (the paper), or over the vocabulary
    rho: float = 0.2  # share of the counted tokens of a row that are hard
    tau: float = 0.5  # cumulative exit probability at which the teacher leaves
    lambda_base: float = 0.02  # price of a loop, nats
    lambda_scale: float = 0.5  # how much dearer a loop is on an easy token
    pg_weight: float = 1.0  # weight of the policy loss
    rep_weight: float = 1.0  # weight of the representation loss
    ent_weight: float = 0.01  # weight of the entropy bonus
    kl_weight: float = 1e-4  # weight of the KL to the teacher
    ema: float = 0.995  # how much of itself the teacher keeps at each step
    weight_decay: float = 0.01  # of the matrices


Stage = Literal["pretrain", "gate", "rpt"]
FOLDER = {"pretrain": "base", "gate": "gate", "rpt": "rpt"}  # where each stage's checkpoint goes, in --out


@dataclass(frozen=True)
class Config:
    """Train a looped language model and teach it to stop early (LoopRPT, arXiv 2603.19714)."""

    objective: tuple[Stage, ...] = ("pretrain", "rpt")  # stages to run, in order
    init: Path | None = None  # checkpoint folder to start from (none: random weights)
    out: Path | None = None  # folder of the run (none: out, or with --init out/NAME-STAGES)
    seed: int = 0  # of the weights, the rows and the noise
    device: str = "auto"  # cpu, cuda, cuda:1 (auto: a GPU if there is one)
    precision: Precision = "auto"  # of the matrix products (auto: bf16 on a GPU, fp32 on a CPU)
    save_dtype: DType = "fp32"  # of the weights in the saved checkpoints; training keeps float32
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    rpt: RPTConfig = field(default_factory=RPTConfig)

    @property
    def folder(self) -> Path:
        return self.out or (Path("out") / f"{self.init.name}-{'-'.join(self.objective)}" if self.init else Path("out"))

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        self.data.check()
        if not self.objective or len({*self.objective}) < len(self.objective):
            given = " ".join(self.objective) or "nothing"
            raise UserError(
                f"--objective {given}: give each stage at most once, and at least one of pretrain, gate, rpt"
            )
        if not self.init and self.objective[0] != "pretrain":
            raise UserError(
                f"--objective {self.objective[0]} has nothing to start from: give --init, or put pretrain before it"
            )
        for stage in ("gate", "rpt"):
            if stage in self.objective and self.model.loops < 2:
                raise UserError(
                    f"--model.loops {self.model.loops} leaves {stage} no exit to learn: give 2 or more loops"
                )
        if self.rpt.estimator == "sampled" and self.rpt.rollouts < 2:
            raise UserError(
                f"--rpt.rollouts {self.rpt.rollouts} gives no group to compare: the sampled estimator needs 2 or more, "
                "or use --rpt.estimator exact"
            )
        for rule, low, high, names in (
            ("1 or more", 1, math.inf, "train.batch pretrain.steps gate.steps rpt.steps rpt.rollouts"),
            ("0 or more", 0, math.inf, "train.micro_batch pretrain.beta pretrain.weight_decay rpt.weight_decay"),
            ("0 or more", 0, math.inf, "rpt.noise_std rpt.lambda_base rpt.lambda_scale"),
            ("0 or more", 0, math.inf, "rpt.pg_weight rpt.rep_weight rpt.ent_weight rpt.kl_weight"),
            ("above 0", 1e-30, math.inf, "train.clip pretrain.lr gate.lr rpt.lr"),
            ("above 0, at most 1", 1e-30, 1, "rpt.rho rpt.tau"),
            ("from 0 to 1", 0, 1, "train.warmup rpt.ema"),
        ):
            for name in names.split():
                group, leaf = name.split(".")
                value = getattr(getattr(self, group), leaf)
                if not (low <= value <= high and math.isfinite(value)):
                    raise UserError(f"--{name.replace('_', '-')} {value} is out of its range: give a number {rule}")


# ---------------------------------------------------------------------------------------------------------------------
# The paper's formulas: pure functions of tensors


def logp_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of the gold token after each loop.    N L V, N -> N L"""
    index = repeat(targets, "n -> n l 1", l=logits.shape[1])
    return logits.log_softmax(-1).gather(-1, index).squeeze(-1)


def entropy_of(logits: Tensor) -> Tensor:
    """Entropy of a distribution, nats.    ... V -> ..."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def hard_count(mask: Tensor, rho: float) -> Tensor:
    """How many tokens of each row are hard: rho of those that count, rounded up.    B T -> B"""
    return torch.ceil(rho * mask.sum(-1).double() - 1e-9).long()


def hard_tokens(entropy: Tensor, mask: Tensor, rho: float) -> Tensor:
    """The counted tokens of each row at which the teacher is least sure.    B T, B T -> B T    (step 2)"""
    order = entropy.masked_fill(~mask, -math.inf).argsort(dim=-1, descending=True, stable=True)  # B T
    return order.argsort(-1) < hard_count(mask, rho)[:, None]


def reference(teacher_logp: Tensor, teacher_gate: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Where the teacher leaves, and its log-probability there.    N L, N L -> N, N    (step 3)"""
    ref_loop = exit_loop(teacher_gate, tau)
    return ref_loop, teacher_logp.gather(-1, ref_loop[:, None]).squeeze(-1)


def time_price(entropy: Tensor, vocab: int, lambda_base: float, lambda_scale: float) -> Tensor:
    """What a loop costs: more on tokens that are easy for the teacher, nats.    N -> N    (step 5)"""
    difficulty = (entropy / math.log(vocab)).clamp(0, 1)
    return lambda_base * (1 + lambda_scale * (1 - difficulty))


def exit_reward(logp: Tensor, baseline: Tensor, price: Tensor, ref_loop: Tensor) -> Tensor:
    """R(l): what leaving after loop l gains over the teacher, less the price.    (step 5)

    ... L, ..., ..., ... -> ... L. A constant: no gradient passes.
    """
    late = torch.arange(logp.shape[-1], device=logp.device) - ref_loop[..., None]  # ... L
    return (logp - baseline[..., None] - price[..., None] * late).detach()


def standardized(x: Tensor) -> Tensor:
    """Centred, and divided by the (unbiased) standard deviation, over the last axis.    ... K -> ... K    (7, 8)"""
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)


def draw_exits(logpi: Tensor, generator: torch.Generator | None) -> Tensor:
    """An exit for each token and rollout.    N G L -> N G    (step 6)"""
    flat = torch.multinomial(rearrange(logpi.exp(), "n g l -> (n g) l"), 1, generator=generator)
    return rearrange(flat, "(n g) 1 -> n g", n=len(logpi))


def sampled_policy_loss(rollout_logpi: Tensor, exits: Tensor, reward: Tensor) -> Tensor:
    """The paper's policy gradient: a drawn exit against the token's other rollouts.    N G L, N G, N G L -> N    (7)"""
    index = exits[..., None]  # N G 1
    advantage = standardized(reward.gather(-1, index).squeeze(-1))  # N G
    return -(advantage.detach() * rollout_logpi.gather(-1, index).squeeze(-1)).mean(-1)


def exact_policy_loss(rollout_logpi: Tensor, reward: Tensor) -> Tensor:
    """The same gradient without the draw, and not divided by a deviation.    N G L, N G L -> N

    Every reward is known, so -sum_l pi_g(l) A(l) with A(l) = R(l) - sum_j pi_g(j) R(j) has the gradient that the drawn
    exits only estimate. Its value is always 0: read the reward, not this loss.
    """
    pi = rollout_logpi.exp()  # N G L
    advantage = reward - (pi * reward).sum(-1, keepdim=True)  # N G L
    return -(pi * advantage.detach()).sum(-1).mean(-1)


def representation_loss(logp: Tensor, logpi: Tensor, reward: Tensor) -> Tensor:
    """Likelihood of the gold token, weighted to the loops that pay.    N L, N L, N L -> N    (step 8)"""
    weights = logpi.exp() * (1 + standardized(reward).relu())  # N L
    return -(weights.detach() * logp).sum(-1)


def k3_kl(logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """K3 at the gold token, averaged over the loops.    N L, N L -> N    (step 10)

    Not a true KL: once the student is better than the teacher, its gradient pulls the student back.
    """
    ratio = (teacher_logp.detach() - logp).clamp(-20, 20)  # N L  clamped first, so exp stays finite
    return (ratio.exp() - ratio - 1).mean(-1)


def full_kl(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) over the vocabulary, averaged over the loops.    N L V, N L V -> N"""
    teacher = teacher_logits.detach().log_softmax(-1)
    return (teacher.exp() * (teacher - logits.log_softmax(-1))).sum(-1).mean(-1)


def stage1_loss(logp: Tensor, logpi: Tensor, beta: float) -> Tensor:
    """Expected cross-entropy over the exits, less their entropy.    N L, N L -> N    (Ouro, Eq. 4)"""
    pi = logpi.exp()
    return -(pi * logp).sum(-1) + beta * (pi * logpi).sum(-1)


def gate_loss(gate: Tensor, logp: Tensor) -> Tensor:
    """Whether to go on, learned from what the next loop gains.    N L, N L -> N    (Ouro, Stage II)

    Gate l is labelled with the gain from loop l to l + 1: the paper's index, one lower, never trains the first gate.
    """
    gain = (logp[:, 1:] - logp[:, :-1]).detach().relu()  # N L-1
    go_on = torch.sigmoid(50 * (gain - 0.005))  # N L-1
    return F.binary_cross_entropy_with_logits(-gate[:, :-1], go_on, reduction="none").mean(-1)


# ---------------------------------------------------------------------------------------------------------------------
# The objectives: a batch in, a loss out. Losses and measurements are sums over this process's tokens, divided by a
# count over all processes, so they add up over processes and micro-batches.


class Loss(NamedTuple):
    loss: Tensor  # to go backward from
    measured: dict[str, Tensor]  # detached; loss, reward, loops, ...


class Counts(NamedTuple):
    tokens: float  # that count, in the global batch
    hard: float


def mean_loop(logpi: Tensor) -> Tensor:
    """Expected exit, counted from 1.    N L -> N"""
    return (logpi.exp() * torch.arange(1, logpi.shape[-1] + 1, device=logpi.device)).sum(-1)


def pretrain_step(student: LoopedTransformer, batch: Batch, cfg: PretrainConfig, *, counts: Counts) -> Loss:
    """Stage I on every token that counts."""
    out = student(batch.inputs)
    logp = logp_of(student.logits(out.hidden[batch.mask]), batch.targets[batch.mask])  # N L
    logpi = exit_logpdf(out.gate[batch.mask])  # N L
    loss = stage1_loss(logp, logpi, cfg.beta).sum() / counts.tokens
    last = -logp[:, -1].sum() / counts.tokens
    return Loss(
        loss,
        {"loss": loss.detach(), "last_ce": last.detach(), "loops": mean_loop(logpi.detach()).sum() / counts.tokens},
    )


def gate_step(student: LoopedTransformer, batch: Batch, cfg: GateConfig, *, counts: Counts) -> Loss:
    """Stage II on every token that counts; only the gate gets a gradient."""
    with torch.no_grad():
        hidden = student(batch.inputs).hidden[batch.mask]  # N L D
        logp = logp_of(student.logits(hidden), batch.targets[batch.mask])  # N L
    gate = student.gate(hidden)  # N L
    loss = gate_loss(gate, logp).sum() / counts.tokens
    loops = mean_loop(exit_logpdf(gate.detach())).sum() / counts.tokens
    return Loss(loss, {"loss": loss.detach(), "loops": loops})


def rpt_step(
    student: LoopedTransformer,
    teacher: LoopedTransformer,
    batch: Batch,
    cfg: RPTConfig,
    *,
    counts: Counts,
    generator: torch.Generator | None = None,
) -> Loss:
    """One LoopRPT step, up to the backward pass (arXiv 2603.19714; the numbers are the steps of the README).

    generator  of the noise and of the drawn exits, on the batch's device
    """
    n_loops, vocab, mask = student.config.loops, student.config.vocab_size, batch.mask

    with torch.no_grad():
        # 1 Teacher pass: the last loop's entropy wherever a token counts
        teacher_out = teacher(batch.inputs)
        entropy = torch.full_like(teacher_out.gate[..., 0], -math.inf)  # B T
        entropy[mask] = entropy_of(teacher.logits(teacher_out.hidden[:, :, -1][mask]))

        # 2 Hard tokens: from here on, N of them are all that reaches the vocabulary
        hard = hard_tokens(entropy, mask, cfg.rho)  # B T
        targets, entropy = batch.targets[hard], entropy[hard]  # N, N
        teacher_logits = teacher.logits(teacher_out.hidden[hard])  # N L V
        teacher_logp = logp_of(teacher_logits, targets)  # N L

        # 3 Reference
        ref_loop, baseline = reference(teacher_logp, teacher_out.gate[hard], cfg.tau)  # N, N

    # 4 Student, clean pass
    out = student(batch.inputs)
    logits = student.logits(out.hidden[hard])  # N L V
    logp, logpi = logp_of(logits, targets), exit_logpdf(out.gate[hard])  # N L, N L

    # 5 Reward of leaving after each loop
    price = time_price(entropy, vocab, cfg.lambda_base, cfg.lambda_scale)  # N
    reward = exit_reward(logp, baseline, price, ref_loop)  # N L

    # 6 Noisy latent rollouts: loop 1 is the clean pass's, and the last loop's gate is never used
    noise = {"noise_std": cfg.noise_std, "generator": generator}
    hidden = [repeat(out.hidden[:, :, :1], "b t l d -> (b g) t l d", g=cfg.rollouts)]
    gates = [repeat(out.gate[:, :, :1], "b t l -> (b g) t l", g=cfg.rollouts)]
    if n_loops > 2:
        rollout = student(hidden[0][:, :, 0], loops=n_loops - 2, **noise)
        hidden, gates = [*hidden, rollout.hidden], [*gates, rollout.gate]
    gate = F.pad(torch.cat(gates, -1), (0, 1))  # (b g) T L
    rollout_logpi = exit_logpdf(rearrange(gate, "(b g) t l -> b t g l", g=cfg.rollouts)[hard])  # N G L
    rollout_reward = repeat(reward, "n l -> n g l", g=cfg.rollouts)
    if cfg.reward == "rollout":
        with torch.no_grad():
            last = student(hidden[-1][:, :, -1], loops=1, **noise).hidden
            noisy = rearrange(torch.cat([*hidden, last], 2), "(b g) t l d -> b t g l d", g=cfg.rollouts)[hard]
            noisy_logits = student.logits(rearrange(noisy, "n g l d -> (n g) l d"))
            noisy_logp = logp_of(noisy_logits, repeat(targets, "n -> (n g)", g=cfg.rollouts))
        noisy_logp = rearrange(noisy_logp, "(n g) l -> n g l", g=cfg.rollouts)
        rollout_reward = exit_reward(noisy_logp, baseline[:, None], price[:, None], ref_loop[:, None])

    # 7 Policy
    if cfg.estimator == "sampled":
        exits = draw_exits(rollout_logpi.detach(), generator)  # N G
        pg = sampled_policy_loss(rollout_logpi, exits, rollout_reward)
        earned = rollout_reward.gather(-1, exits[..., None]).squeeze(-1)  # N G
    else:
        pg = exact_policy_loss(rollout_logpi, rollout_reward)
        earned = (rollout_logpi.detach().exp() * rollout_reward).sum(-1)  # N G

    # 8 Representation   9 Entropy bonus   10 KL to the teacher
    rep = representation_loss(logp, logpi, reward)
    ent = (logpi.exp() * logpi).sum(-1)
    kl = k3_kl(logp, teacher_logp) if cfg.kl == "k3" else full_kl(logits, teacher_logits)

    # 11 Total: means over the hard tokens of the global batch (each term is N)
    terms = {"pg": pg, "rep": rep, "ent": ent, "kl": kl, "reward": earned.mean(-1), "loops": mean_loop(logpi)}
    mean = {name: term.sum() / counts.hard for name, term in terms.items()}
    loss = cfg.pg_weight * mean["pg"] + cfg.rep_weight * mean["rep"]
    loss = loss + cfg.ent_weight * mean["ent"] + cfg.kl_weight * mean["kl"]
    return Loss(loss, {"loss": loss.detach()} | {name: value.detach() for name, value in mean.items()})


MEASURED = {
    "pretrain": ("loss", "last_ce", "loops"),
    "gate": ("loss", "loops"),
    "rpt": ("loss", "pg", "rep", "ent", "kl", "reward", "loops"),
}

# ---------------------------------------------------------------------------------------------------------------------
# Training


def count(batch: Batch, rho: float, device: torch.device) -> Counts:
    """Tokens that count and hard tokens, over all processes, known before any forward pass."""
    counts = torch.stack((batch.mask.sum(), hard_count(batch.mask, rho).sum())).to(device, torch.float64)
    if dist.is_initialized():
        dist.all_reduce(counts)
    return Counts(*counts.tolist())


def optimizer_for(m: torch.nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    matrices, vectors = ([p for p in m.parameters() if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def lr_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then a cosine to 0: the share of the peak learning rate at a step counted from 0."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else 0.5 + 0.5 * math.cos(math.pi * (step + 1 - rise) / (steps + 1 - rise))


def update_teacher(teacher: LoopedTransformer, student: LoopedTransformer, ema: float) -> None:
    """teacher <- ema teacher + (1 - ema) student    (step 11)"""
    with torch.no_grad():
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
            t.lerp_(s, 1 - ema)


def sum_over_processes(tensors: list[Tensor]) -> None:
    """Replace each tensor by its sum over all processes."""
    if dist.is_initialized():
        flat = parameters_to_vector(tensors)
        dist.all_reduce(flat)
        vector_to_parameters(flat, tensors)


def train(
    stage: Stage,
    student: LoopedTransformer,
    config: Config,
    rows: list[data.Row] | None,
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    saved: str = "nothing is saved yet",
) -> Iterator[dict[str, float]]:
    """Run one stage on the student, in place; yields each step's measurements.

    saved  what to tell the user is safe when the loss is not finite; then UserError is raised
    """
    cfg = getattr(config, stage)
    source = data.source(rows, config.data, batch=config.train.batch, seed=f"{config.seed}/{stage}")
    trained = student.early_exit_gate if stage == "gate" else student
    parameters = list(trained.parameters())
    optimizer = optimizer_for(trained, cfg.lr, getattr(cfg, "weight_decay", 0.0))
    teacher = copy.deepcopy(student).requires_grad_(False) if stage == "rpt" else None

    for step in range(cfg.steps):
        start = time.perf_counter()
        batch = source.batch(step, rank=rank, world=world)
        counts = count(batch, config.rpt.rho, device)
        measured = {name: torch.zeros((), device=device) for name in (*MEASURED[stage], "tokens")}
        measured["tokens"] += batch.inputs.numel()
        for p in parameters:
            p.grad = torch.zeros_like(p)
        size = config.train.micro_batch or len(batch.inputs) or 1
        for i, micro in enumerate(map(Batch, *(part.split(size) for part in batch))):
            if not micro.mask.any():
                continue
            micro = counted(micro, device)
            with autocast(device, config.precision):
                if stage == "pretrain":
                    found = pretrain_step(student, micro, cfg, counts=counts)
                elif stage == "gate":
                    found = gate_step(student, micro, cfg, counts=counts)
                else:
                    generator = data.seeded(config.seed, "noise", step, rank, i, device=device)
                    found = rpt_step(student, teacher, micro, cfg, counts=counts, generator=generator)
            found.loss.backward()
            for name, value in found.measured.items():
                measured[name] += value
        sum_over_processes([p.grad for p in parameters])
        sum_over_processes(list(measured.values()))
        norm = clip_grad_norm_(parameters, config.train.clip)
        now = {name: value.item() for name, value in measured.items()} | {"grad_norm": norm.item()}
        if not (math.isfinite(now["loss"]) and math.isfinite(now["grad_norm"])):
            raise UserError(
                f"the loss is not finite at {stage} step {step + 1} (loss {now['loss']:.4g}, gradient norm "
                f"{now['grad_norm']:.4g}): {saved}; try a smaller --{stage}.lr than {cfg.lr:g}"
            )
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * lr_factor(step, cfg.steps, config.train.warmup)
        optimizer.step()
        if teacher:
            update_teacher(teacher, student, cfg.ema)
        now["tokens_per_s"] = now.pop("tokens") / (time.perf_counter() - start)
        yield {"stage": stage, "step": step + 1, **now}


def watch(steps: Iterator[dict], total: int, stage: str, log: TextIO) -> None:
    """Run the steps: a progress bar on a terminal, else twenty lines; every step goes to the log as a line of JSON."""
    recent: deque[dict] = deque(maxlen=50)
    name, status = TextColumn("{task.description:>8}"), TextColumn("{task.fields[status]}")
    columns = (name, BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn(), status)
    with Progress(*columns, console=console, expand=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(stage, total=total, status="")
        for now in steps:
            log.write(json.dumps(now) + "\n")
            log.flush()
            recent.append(now)
            mean = {name: sum(r[name] for r in recent) / len(recent) for name in now if name not in ("stage", "step")}
            status = f"{mean['tokens_per_s'] / 1000:.1f}k tokens/s loss {mean['loss']:.2f} loops {mean['loops']:.2f}"
            if "reward" in mean:
                status += f" reward {mean['reward']:+.3f}"
            bar.update(task, advance=1, status=status)
            step = now["step"]
            if not console.is_terminal and (step == 1 or step * 20 // total > (step - 1) * 20 // total):
                console.print(f"{stage:>8} {step}/{total}  {status}")


def main() -> None:
    config = parse()
    config.check()
    folder = config.folder
    taken = [name for name in (*FOLDER.values(), "results.json") if (folder / name).exists()]
    if taken:
        raise UserError(
            f"--out {folder} holds another run ({', '.join(taken)}): nothing saved is overwritten, give another"
        )
    rank, world, local = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if config.train.batch < world:
        raise UserError(f"--train.batch {config.train.batch} is less than the {world} processes: each needs a row")
    device = pick_device(config.device)
    if world > 1 and device.type == "cuda":
        device = pick_device(f"cuda:{local}")
        torch.cuda.set_device(device)

    tokenizer = data.pick_tokenizer(config.data, config.init)
    file = data.tokenizer_file(config.data, config.init)
    beside = file.parent if file and file.name == "tokenizer.json" else None  # what else stands there goes along
    if config.init:
        student = model.load(config.init, device)
        student.config = config.model.resolved()
    else:
        shape = replace(config.model, vocab_size=data.vocab_size(tokenizer), eos_token_id=data.eos_id(tokenizer))
        student = LoopedTransformer(shape, generator=data.seeded(config.seed, "weights")).to(device)
    rows, val_rows, notes = data.split(config.data, tokenizer, seed=config.seed)
    if rows is not None and len(rows) < world:
        raise UserError(f"{config.data.path} gives {len(rows)} rows for {world} processes: each needs one")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank == 0:
        make_folder(folder)
        size = sum(p.numel() for p in student.parameters())
        console.print(
            f"{size:,} parameters, {student.config.loops} loops, on {world} x {device.type}; the run goes to {folder}"
        )
        console.print(*notes, sep="\n", end="\n" * bool(notes))
    models = {config.init.name: config.init} if config.init else {}
    with open(folder / "log.jsonl" if rank == 0 else os.devnull, "a", encoding="utf-8") as log:
        log.write(json.dumps({"argv": sys.argv, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}) + "\n")
        for stage in config.objective:
            saved = f"the last checkpoint is {[*models.values()][-1]}" if models else "nothing is saved yet"
            steps = train(stage, student, config, rows, device=device, rank=rank, world=world, saved=saved)
            if rank == 0:
                watch(steps, getattr(config, stage).steps, stage, log)
                target = folder / FOLDER[stage]
                model.save(student, target, tokenizer, dtype=DTYPES[config.save_dtype], beside=beside)
                models[target.name if target.name not in models else str(target)] = target
            else:
                deque(steps, maxlen=0)
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        source = data.source(val_rows, config.data, batch=eval.EvalConfig.batch, seed=config.seed, held_out=True)
        scores = {
            name: eval.score(model.load(path, device), source, device=device, precision=config.precision)
            for name, path in models.items()
        }
        found = eval.results(scores, device=device, seed=config.seed)
        (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
        eval.show(found)


def parse() -> Config:
    """The command line; with --init, the checkpoint's shape is the default of the --model flags."""
    config = tyro.cli(Config, description=__doc__.partition("\n\nThe paper")[0])
    if not config.init:
        return config
    shape = model.load_config(config.init)
    config = tyro.cli(Config, default=Config(model=shape))
    for f in fields(ModelConfig):
        given, found = (getattr(c.resolved(), f.name) for c in (config.model, shape))
        if given != found and f.name != "loops":
            flag = f"--model.{f.name.replace('_', '-')} {given}"
            raise UserError(f"{flag} contradicts the checkpoint {config.init}, which has {found}: leave the flag out")
    return config


if __name__ == "__main__":
    report(main)
