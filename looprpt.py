"""LoopRPT (arXiv 2603.19714): reinforcement pre-training of the latent loops of a looped language model.

    python looprpt.py                                          pre-train a small base, run LoopRPT on it, compare them
    python looprpt.py --init out/base --objective rpt          one stage, from a checkpoint
    python looprpt.py --paper                                  LoopRPT as published; without it, what turned out better
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
import hashlib
import importlib.metadata
import json
import math
import os
import resource
import shutil
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple, TextIO, get_type_hints

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from einops import rearrange, repeat
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint

import data
import eval
import model
from data import Batch, DataConfig
from eval import autocast, console, counted, make_folder, places, put
from model import (
    DTYPES,
    KEPT,
    SLICE,
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
    compile: Literal["auto", "on", "off"] = "auto"  # the layers, by torch.compile (auto: on a GPU)
    checkpoint: bool = False  # keep no layer's inside for the backward pass, run it again: slower, in less memory
    save_every: int = 500  # steps between saves of the whole run; it is saved at the end of a stage too
    keep: int = 2  # the newest of these that stay
    max_bad_steps: int = 10  # stop after so many steps in a row whose loss or gradient is not finite; they are skipped
    timeout: int = 600  # seconds to wait for another process


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
    noise_std: float = 0.0  # standard deviation of the noise on the state fed to the next loop (the paper: 0.1)
    rho: float = 1.0  # share of the counted tokens of a row that are hard, and trained on (the paper: 0.2)
    tau: float = 0.5  # cumulative exit probability at which the teacher leaves
    lambda_base: float = 0.05  # price of a loop, nats (the paper: 0.02)
    lambda_scale: float = 0.5  # how much dearer a loop is on an easy token
    pg_weight: float = 1.0  # weight of the policy loss
    rep_weight: float = 1.0  # weight of the representation loss
    rep_loops: Literal["pay", "exits", "last"] = "pay"  # trains those that pay (the paper), all as visited, the last
    floor: float = 0.3  # share of that loss which is the last loop's alone (the paper: 0)
    distill_weight: float = 0.3  # weight of the KL from the last loop, held constant, to the others (the paper: 0)
    ent_weight: float = 0.003  # weight of the entropy bonus (the paper: 0.01)
    kl_weight: float = 1e-4  # weight of the KL to the teacher
    gate_only: bool = False  # the backbone stays as it is
    ema: float = 0.995  # how much of itself the teacher keeps at each step
    weight_decay: float = 0.01  # of the matrices


PAPER = RPTConfig(  # as published
    estimator="sampled",
    rollouts=8,
    noise_std=0.1,
    rho=0.2,
    rep_loops="pay",
    floor=0.0,
    distill_weight=0.0,
    lambda_base=0.02,
    ent_weight=0.01,


@dataclass(frozen=True)
class Config:
    """Train a looped language model and teach it to stop early (LoopRPT, arXiv 2603.19714)."""

    objective: tuple[Stage, ...] = ("pretrain", "rpt")  # stages to run, in order
    init: Path | None = None  # checkpoint folder to start from (none: random weights)
    out: Path | None = None  # folder of the run (none: out, or with --init out/NAME-STAGES)
    resume: bool = False  # go on with the run in that folder, with the flags it was started with
    paper: bool = False  # the --rpt flags start from LoopRPT as published
    seed: int = 0  # of the weights, the rows and the noise
    device: str = "auto"  # cpu, cuda, cuda:1 (auto: a GPU if there is one)
    precision: Precision = "auto"  # of the matrix products (auto: bf16 on a GPU, fp32 on a CPU)
    save_dtype: DType = "fp32"  # of the weights in the final checkpoints; training keeps float32
    dist: Literal["auto", "ddp", "fsdp"] = "auto"  # each process a whole copy, or a shard (auto: as memory allows)
    logger: Literal["none", "tensorboard", "wandb"] = "none"  # where the numbers go besides log.jsonl
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
            ("1 or more", 1, math.inf, "train.save_every train.keep train.max_bad_steps train.timeout"),
            ("0 or more", 0, math.inf, "train.micro_batch pretrain.beta pretrain.weight_decay rpt.weight_decay"),
            ("0 or more", 0, math.inf, "rpt.noise_std rpt.lambda_base rpt.lambda_scale"),
            ("0 or more", 0, math.inf, "rpt.pg_weight rpt.rep_weight rpt.ent_weight rpt.kl_weight rpt.distill_weight"),
            ("above 0", 1e-30, math.inf, "train.clip pretrain.lr gate.lr rpt.lr"),
            ("above 0, at most 1", 1e-30, 1, "rpt.rho rpt.tau"),
            ("from 0 to 1", 0, 1, "train.warmup rpt.ema rpt.floor"),
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


def in_chunks(f: Callable[..., tuple[Tensor, ...]], *parts: Tensor, words: int) -> tuple[Tensor, ...]:
    """f over slices of its arguments, so that no more than a slice's logits are there at once. If all of them together
    are more than KEPT, the backward pass makes them again, a slice at a time.    N ... -> N ..., ...

    words  logits of one token: L V, or V
    """
    size = max(1, (KEPT if parts[0].is_cuda else SLICE) // words)
    slices = zip(*(part.split(size) for part in parts), strict=True)
    if len(parts[0]) * words <= KEPT:
        found = [f(*s) for s in slices]
    else:
        found = [checkpoint(f, *s, use_reentrant=False, preserve_rng_state=False) for s in slices]
    return tuple(map(torch.cat, zip(*found, strict=True)))


def gold_logp(net: LoopedTransformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of the gold token after each loop, its logits in slices.    N L D, N -> N L"""
    words = hidden.shape[1] * net.config.vocab_size
    return in_chunks(lambda h, target: (logp_of(net.logits(h), target),), hidden, targets, words=words)[0]


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
    """R(l): what leaving after loop l gains over the teacher, less the price.    N L, N, N, N -> N L    (step 5)

    A constant: no gradient passes.
    """
    late = torch.arange(logp.shape[-1], device=logp.device) - ref_loop[:, None]  # N L
    return (logp - baseline[:, None] - price[:, None] * late).detach()


def standardized(x: Tensor) -> Tensor:
    """Centred, and divided by the (unbiased) standard deviation, over the last axis.    ... K -> ... K    (7, 8)"""
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)


def draw_exits(logpi: Tensor, generator: torch.Generator | None) -> Tensor:
    """An exit for each token and rollout.    N G L -> N G    (step 7)"""
    drawn = torch.rand(logpi[..., :1].shape, generator=generator, device=logpi.device, dtype=logpi.dtype)  # N G 1
    return (logpi[..., :-1].exp().cumsum(-1) <= drawn).sum(-1)


def sampled_policy_loss(rollout_logpi: Tensor, exits: Tensor, reward: Tensor) -> Tensor:
    """The paper's policy gradient: a drawn exit against the token's other rollouts.    N G L, N G, N L -> N    (7)"""
    advantage = standardized(reward.gather(-1, exits))  # N G
    return -(advantage.detach() * rollout_logpi.gather(-1, exits[..., None]).squeeze(-1)).mean(-1)


def exact_policy_loss(rollout_logpi: Tensor, reward: Tensor) -> Tensor:
    """The same gradient without the draw, and not divided by a deviation.    N G L, N L -> N

    Every reward is known, so -sum_l pi_g(l) A(l) with A(l) = R(l) - sum_j pi_g(j) R(j) has the gradient that the drawn
    exits only estimate. Its value is always 0: read the reward, not this loss.
    """
    pi, reward = rollout_logpi.exp(), reward[:, None]  # N G L, N 1 L
    advantage = reward - (pi * reward).sum(-1, keepdim=True)  # N G L
    return -(pi * advantage.detach()).sum(-1).mean(-1)


def representation_loss(
    logp: Tensor, logpi: Tensor, reward: Tensor, loops: Literal["pay", "exits", "last"] = "pay", floor: float = 0.0
) -> Tensor:
    """Likelihood of the gold token, weighted to the loops that pay.    N L, N L, N L -> N    (step 8)

    loops  whose: those that pay, all as often as they are the exit (Stage I), or the last alone (next-token training)
    floor  share of the loss that is the last loop's alone (0: the paper)
    """
    weights = logpi.exp()  # N L
    if loops == "pay":
        weights = weights * (1 + standardized(reward).relu())
    last = -logp[:, -1]
    return torch.lerp(-(weights.detach() * logp).sum(-1), last, 1.0 if loops == "last" else floor)


def distillation(logits: Tensor) -> Tensor:
    """KL(last loop || earlier loop) over the vocabulary, averaged over the earlier ones.    N L V -> N

    The last loop is held constant: the earlier ones learn from it, and it doesn't stoop to them.
    """
    logp = logits.log_softmax(-1)
    last = logp[:, -1:].detach()
    return (last.exp() * (last - logp[:, :-1])).sum(-1).mean(-1)


def k3_kl(logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """K3 at the gold token, averaged over the loops.    N L, N L -> N    (step 10)

    Not a true KL: once the student is better than the teacher, its gradient pulls the student back.
    """
    ratio = (teacher_logp.detach() - logp).clamp(-20, 20)  # N L  clamped first, so exp stays finite
    return (ratio.exp() - ratio - 1).mean(-1)


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


def exits_of(gate: Tensor, count: float) -> dict[str, Tensor]:
    """What a log says of the exits: mean loop, entropy, and how much of the gate has left where a gradient lives.

    N L -> three sums over the tokens, divided by a count
    """
    gate = gate.detach()
    logpi = exit_logpdf(gate)
    saturated = (gate[:, :-1].abs() > SATURATED).double().mean(-1)  # N
    means = {"loops": mean_loop(logpi), "entropy": -(logpi.exp() * logpi).sum(-1), "saturation": saturated}
    return {name: value.sum() / count for name, value in means.items()}


SATURATED = 6.2  # a gate's logit beyond which its sigmoid rounds to 0 or 1 in bfloat16


def noisy(cfg: RPTConfig) -> bool:
    """Whether rollouts need passes of their own: without noise they are the clean pass."""
    return cfg.noise_std > 0 and cfg.pg_weight > 0


def pretrain_step(student: LoopedTransformer, batch: Batch, cfg: PretrainConfig, *, counts: Counts) -> Loss:
    """Stage I on every token that counts."""
    out, where = student(batch.inputs), places(batch.mask, batch.inputs.device)  # N
    hidden, gate, targets = (x.flatten(0, 1)[where] for x in (*out, batch.targets))  # N L D, N L, N
    logp = gold_logp(student, hidden, targets)  # N L
    loss = stage1_loss(logp, exit_logpdf(gate), cfg.beta).sum() / counts.tokens
    measured = {"loss": loss, "last_ce": -logp[:, -1].sum() / counts.tokens} | exits_of(gate, counts.tokens)
    return Loss(loss, {name: value.detach() for name, value in measured.items()})


def gate_step(student: LoopedTransformer, batch: Batch, cfg: GateConfig, *, counts: Counts) -> Loss:
    """Stage II on every token that counts; only the gate gets a gradient."""
    with torch.no_grad():
        out, where = student(batch.inputs), places(batch.mask, batch.inputs.device)  # N
        hidden, targets = (x.flatten(0, 1)[where] for x in (out.hidden, batch.targets))  # N L D, N
        logp = gold_logp(student, hidden, targets)  # N L
    gate = student.gate(hidden)  # N L
    loss = gate_loss(gate, logp).sum() / counts.tokens
    return Loss(loss, {"loss": loss.detach()} | exits_of(gate, counts.tokens))


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
    n_loops, vocab, device = student.config.loops, student.config.vocab_size, batch.inputs.device
    n = int(hard_count(batch.mask, cfg.rho).sum())  # known here, so nothing waits for a GPU

    with torch.no_grad():
        # 1 Teacher pass: the last loop's entropy wherever a token counts
        teacher_hidden, teacher_gate = teacher(batch.inputs)  # B T L D, B T L
        where = places(batch.mask, device)
        entropy = torch.full_like(teacher_gate[..., 0], -math.inf)  # B T
        last = teacher_hidden[:, :, -1].flatten(0, 1)[where]
        (entropy.view(-1)[where],) = in_chunks(lambda h: (entropy_of(teacher.logits(h)),), last, words=vocab)

        # 2 Hard tokens: from here on, N of them are all that reaches the vocabulary
        chosen = hard_tokens(entropy, put(batch.mask, device), cfg.rho).flatten().nonzero_static(size=n)[:, 0]  # N

        def hard(x: Tensor) -> Tensor:  # B T ... -> N ...
            return x.flatten(0, 1)[chosen]

        targets, entropy, teacher_hidden = hard(batch.targets), hard(entropy), hard(teacher_hidden)  # N, N, N L D
        teacher_logp = gold_logp(teacher, teacher_hidden, targets)  # N L

        # 3 Reference
        ref_loop, baseline = reference(teacher_logp, hard(teacher_gate), cfg.tau)  # N, N

    # 4 Student, clean pass
    out = student(batch.inputs)
    hidden, logpi = hard(out.hidden), exit_logpdf(hard(out.gate))  # N L D, N L

    def at_words(h: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = student.logits(h)  # n L V
        logp = logp_of(logits, target)
        return logp, distillation(logits) if cfg.distill_weight else torch.zeros_like(logp[:, 0])

    logp, distill = in_chunks(at_words, hidden, targets, words=n_loops * vocab)  # N L, N

    # 5 Reward of leaving after each loop
    price = time_price(entropy, vocab, cfg.lambda_base, cfg.lambda_scale)  # N
    reward = exit_reward(logp, baseline, price, ref_loop)  # N L

    # 6 Noisy latent rollouts: loop 1 is the clean pass's, and the last loop's gate is never used
    #   (without noise all of a rollout is the clean pass's)
    rollout_logpi = repeat(logpi, "n l -> n g l", g=cfg.rollouts)
    if noisy(cfg):
        gate = repeat(out.gate[:, :, :1], "b t l -> (b g) t l", g=cfg.rollouts)
        if n_loops > 2:
            start = repeat(out.hidden[:, :, 0], "b t d -> (b g) t d", g=cfg.rollouts)
            rollout = student(start, loops=n_loops - 2, noise_std=cfg.noise_std, generator=generator)
            gate = torch.cat((gate, rollout.gate), -1)
        gate = F.pad(gate, (0, 1))  # (b g) T L
        rollout_logpi = exit_logpdf(hard(rearrange(gate, "(b g) t l -> b t g l", g=cfg.rollouts)))  # N G L

    # 7 Policy
    if cfg.estimator == "sampled":
        exits = draw_exits(rollout_logpi.detach(), generator)  # N G
        pg = sampled_policy_loss(rollout_logpi, exits, reward)
        earned = reward.gather(-1, exits)  # N G
    else:
        pg = exact_policy_loss(rollout_logpi, reward)
        earned = (rollout_logpi.detach().exp() * reward[:, None]).sum(-1)  # N G

    # 8 Representation   9 Entropy bonus   10 KL to the teacher
    rep = representation_loss(logp, logpi, reward, cfg.rep_loops, cfg.floor)
    ent = (logpi.exp() * logpi).sum(-1)
    kl = k3_kl(logp, teacher_logp)

    # 11 Total: means over the hard tokens of the global batch (each term is N)
    terms = {"pg": pg, "rep": rep, "ent": ent, "kl": kl, "distill": distill, "reward": earned.mean(-1)}
    mean = {name: term.sum() / counts.hard for name, term in terms.items()}
    loss = cfg.pg_weight * mean["pg"] + cfg.rep_weight * mean["rep"] + cfg.distill_weight * mean["distill"]
    loss = loss + cfg.ent_weight * mean["ent"] + cfg.kl_weight * mean["kl"]
    measured = {"loss": loss} | mean | exits_of(hard(out.gate), counts.hard)
    return Loss(loss, {name: value.detach() for name, value in measured.items()})


MEASURED = {
    "pretrain": ("loss", "last_ce", "loops", "entropy", "saturation"),
    "gate": ("loss", "loops", "entropy", "saturation"),
    "rpt": ("loss", "pg", "rep", "ent", "kl", "distill", "reward", "loops", "entropy", "saturation"),
}

# ---------------------------------------------------------------------------------------------------------------------
# Training


def begin(
    stage: Stage,
    student: LoopedTransformer,
    config: "Config",
    *,
    teacher: LoopedTransformer | None = None,
    spread: Callable[[LoopedTransformer], LoopedTransformer] = lambda net: net,
) -> Run:
    """A stage at its first step.

    teacher  where the EMA stands (default: a copy of the student)
    spread   spreads a model over the processes
    """
    cfg = getattr(config, stage)
    if stage == "rpt":
        teacher = spread((teacher or copy.deepcopy(student)).requires_grad_(False))
    gate_only = stage == "gate" or (stage == "rpt" and config.rpt.gate_only)
    student.requires_grad_(not gate_only).early_exit_gate.requires_grad_(True)
    student.checkpointing = config.train.checkpoint
    on_gpu = student.embed_tokens.weight.is_cuda
    for net in (student, teacher):
        if net and (config.train.compile == "on" or (config.train.compile == "auto" and on_gpu)):
            net.compile()
    student = spread(student)
    trained = student.early_exit_gate if gate_only else student
    return Run(stage, student, teacher, optimizer_for(trained, cfg.lr, getattr(cfg, "weight_decay", 0.0)))


def count(batch: Batch, rho: float, device: torch.device) -> tuple[Counts, int]:
    """Tokens that count, hard tokens and rows, over all processes, known before any forward pass."""
    sums = torch.stack((batch.mask.sum(), hard_count(batch.mask, rho).sum(), torch.tensor(len(batch.mask)))).double()
    tokens, hard, rows = sum_over_processes(sums.to(device) if dist.is_initialized() else sums).tolist()
    return Counts(tokens, hard), int(rows)


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
        torch._foreach_lerp_([*map(own, teacher.parameters())], [*map(own, student.parameters())], 1 - ema)


def train(
    run: Run,
    config: Config,
    rows: list[data.Row] | None,
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[dict]:
    """Do a stage's steps from where the run is, in place; yields each one's measurements.

    stopping  asked in every step whether to end after it; one process's yes ends all
    A step whose loss or gradient is not finite changes nothing. Raises UserError after train.max_bad_steps in a row.
    """
    stage, cfg = run.stage, getattr(config, run.stage)
    order = f"{config.seed}/{'pretrain' if stage == 'pretrain' else 'rpt'}"  # the stages after it see the same rows
    source = data.source(rows, config.data, batch=config.train.batch, seed=order)
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    batch = source.batch(run.step, rank=rank, world=world)
    while run.step < cfg.steps and not run.stopped:
        start = time.perf_counter()
        counts, n_rows = count(batch, config.rpt.rho, device)
        most = -(-n_rows // world)  # rows of the first process; every process runs as many micro-batches
        size = config.train.micro_batch or most
        measured = {name: torch.zeros((), device=device) for name in (*MEASURED[stage], "tokens", "flops", "stop")}
        measured["tokens"] += batch.inputs.numel()
        measured["stop"] += stopping()
        for p in parameters:
            p.grad = torch.zeros_like(p)
        for i in range(-(-most // size)):
            micro = Batch(*(part[i * size : (i + 1) * size] for part in batch))
            if not micro.mask.any() and world == 1:
                continue
            micro = counted(micro, device)
            measured["flops"] += step_flops(stage, run.student.config, cfg, micro)
            with autocast(device, config.precision):
                if stage == "pretrain":
                    found = pretrain_step(run.student, micro, cfg, counts=counts)
                elif stage == "gate":
                    found = gate_step(run.student, micro, cfg, counts=counts)
                else:
                    generator = data.seeded(config.seed, "noise", run.step, rank, i, device=device)
                    found = rpt_step(run.student, run.teacher, micro, cfg, counts=counts, generator=generator)
            gather_no_more(run.teacher)
            found.loss.backward()
            for name, value in found.measured.items():
                measured[name] += value
        gather_no_more(run.student)
        norm = whole(clip_grad_norm_(parameters, config.train.clip))
        sums = sum_over_processes(torch.stack([*measured.values()]))
        batch = source.batch(run.step + 1, rank=rank, world=world)  # while a GPU is still at this step
        values = torch.cat((sums, norm.to(sums)[None])).tolist()  # the one place in a step that waits for it
        now = dict(zip((*measured, "grad_norm"), values, strict=True))
        if math.isfinite(now["loss"]) and math.isfinite(now["grad_norm"]):
            run.bad = 0
            for group in run.optimizer.param_groups:
                group["lr"] = cfg.lr * lr_factor(run.step, cfg.steps, config.train.warmup)
            run.optimizer.step()
            if run.teacher:
                update_teacher(run.teacher, run.student, cfg.ema)
        else:
            run.bad, run.skipped = run.bad + 1, run.skipped + 1
        run.step, run.stopped = run.step + 1, now.pop("stop") > 0
        now["skipped"] = run.skipped
        seconds, peak = time.perf_counter() - start, peak_flops(device)
        now["tokens_per_s"], flops = now.pop("tokens") / seconds, now.pop("flops")
        now |= {"mfu": flops / seconds / world / peak if peak else None, "memory_gib": memory_gib(device)}
        yield {"stage": stage, "step": run.step} | {
            name: value if value is None or math.isfinite(value) else None for name, value in now.items()
        }
        if run.bad >= config.train.max_bad_steps:
            raise UserError(
                f"the loss or its gradient was not finite in {run.bad} steps in a row, up to {stage} step {run.step}: "
                f"{run.saved}; try a smaller --{stage}.lr than {cfg.lr:g}"
            )


def step_flops(stage: Stage, c: ModelConfig, cfg, batch: Batch) -> float:
    """Floating-point operations of a step on a batch, forward (2 for each weight and token) and backward (4 more)."""
    rows, length = batch.inputs.shape
    layer = c.width * c.head_dim * 2 * (c.heads + c.kv_heads) + 3 * c.width * c.ffn  # weights
    attention = length * c.heads * c.head_dim  # a token's products with the half of the tokens that it sees, twice
    loop = rows * length * c.layers * 2 * (layer + attention)
    word = 2 * c.width * c.vocab_size  # one token through the head
    tokens = batch.mask.sum().item()
    if stage == "pretrain":
        return 3 * c.loops * (loop + tokens * word)
    if stage == "gate":
        return c.loops * (loop + tokens * word)
    hard = hard_count(batch.mask, cfg.rho).sum().item()
    teacher = c.loops * (loop + hard * word) + tokens * word
    rollouts = 3 * cfg.rollouts * (c.loops - 2) * loop
    return teacher + 3 * c.loops * (loop + hard * word) + (rollouts if noisy(cfg) else 0)


def main() -> None:
    config = parse()
    config.check()
    folder = config.folder
    taken = [name for name in (*FOLDER.values(), "state", "results.json") if (folder / name).exists()]
    if taken and config.resume and not (folder / "run.json").exists():
        raise UserError(f"--out {folder} has {', '.join(taken)}, but no run.json: restore it, or begin anew")
    if taken and not config.resume:
        raise UserError(
            f"--out {folder} holds another run ({', '.join(taken)}): nothing saved is overwritten, give another, "
            "or --resume"
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
    rows, val_rows, notes = data.split(config.data, tokenizer, seed=config.seed)
    if rows is not None and len(rows) < world:
        raise UserError(f"{config.data.path} gives {len(rows)} rows for {world} processes: each needs one")
    if rank == 0:
        console.print(*notes, sep="\n", end="\n" * bool(notes), soft_wrap=True)
    with stop_signals() as asked:
        try:
            if world > 1:
                backend = "nccl" if device.type == "cuda" else "gloo"
                dist.init_process_group(backend, timeout=timedelta(seconds=config.train.timeout))
            where = {"device": device, "rank": rank, "world": world}
            models = run_stages(config, tokenizer, rows, stopping=lambda: bool(asked), **where)
        except RuntimeError as error:
            if world == 1 or not is_from_processes(error):
                raise
            state = next(iter(states(folder, config.objective)), None)
            raise UserError(
                f"another process is gone ({str(error).splitlines()[0][:200]}): "
                f"--resume goes on from {state or 'the start'}"
            ) from error
        except OSError as error:
            state = next(iter(states(folder, config.objective)), None)
            raise UserError(
                f"the run can't go on ({error}): mend that, or make room; --resume goes on from {state or 'the start'}"
            ) from error
        if world > 1:
            dist.destroy_process_group()
        if models is None:
            if rank == 0:
                state = states(folder, config.objective)[0]
                by = " ".join(asked) or "another process"
                console.print(f"stopped by {by}, saved in {state}: --resume goes on", soft_wrap=True)
            return
        if rank == 0:
            source = data.source(val_rows, config.data, batch=eval.EvalConfig.batch, seed=config.seed, held_out=True)
            scores = {
                name: eval.score(model.load(path, device), source, device=device, precision=config.precision)
                for name, path in models.items()
            }
            found = eval.results(scores, device=device, seed=config.seed)
            model.write_json(folder / "results.json", found)
            eval.show(found)


def run_stages(
    config: Config,
    tokenizer: Tokenizer,
    rows: list[data.Row] | None,
    *,
    device: torch.device,
    rank: int,
    world: int,
    stopping: Callable[[], bool],
) -> dict[str, Path] | None:
    """All stages that are left. Returns the checkpoints to compare, by name; None if the run was stopped."""
    folder = config.folder

    def over_processes(net: LoopedTransformer) -> LoopedTransformer:
        return spread(net, config.dist, device) if world > 1 else net

    done = tuple(stage for stage in config.objective if (folder / FOLDER[stage]).exists())
    source = folder / FOLDER[done[-1]] if done else config.init
    if done and (state := newest(folder, done[-1], getattr(config, done[-1]).steps)):
        source = state / "student"  # in float32, whatever --save-dtype says
    if source:
        student = model.load(source, device)
        if not done:
            student.config = config.model.resolved()
    else:
        shape = replace(config.model, vocab_size=data.vocab_size(tokenizer), eos_token_id=data.eos_id(tokenizer))
        student = LoopedTransformer(shape, generator=data.seeded(config.seed, "weights")).to(device)
    shape, parameters = student.config, sum(p.numel() for p in student.parameters())
    record = {"config": asdict(config), "parameters": parameters, "starts": [], "finished": None}
    if rank == 0:
        make_folder(folder)
        for name in FOLDER:  # what saves that were cut off left
            for leftover in (*folder.glob(f".{FOLDER[name]}.*.tmp"), *folder.glob(f"state/.{name}-*.tmp")):
                shutil.rmtree(leftover)
        if config.resume and (folder / "run.json").exists():  # the flags stay those of the first start
            record |= {"finished": None, "starts": []} | model.read_json(folder / "run.json") | {"finished": None}
        record["starts"].append(start_record(config, device, world))
        model.write_json(folder / "run.json", record)
        size = f"{parameters:,} parameters, {shape.loops} loops, on {world} x {device.type}"
        console.print(f"{size}; the run goes to {folder}", soft_wrap=True)
    to = sink(config, folder) if rank == 0 else None
    models = {config.init.name: config.init} if config.init else {}
    for stage in config.objective:
        target = folder / FOLDER[stage]
        if stage not in done:
            state = newest(folder, stage) if config.resume else None
            if state:
                run = load_run(state, replace(config, model=shape), device, over_processes)
                if run.step > getattr(config, stage).steps:
                    raise UserError(
                        f"--{stage}.steps {getattr(config, stage).steps} is less than the {run.step} that {state} "
                        "has done: give as many or more"
                    )
            else:
                run = begin(stage, student, config, spread=over_processes)
                if models:
                    run.saved = f"the last good checkpoint is {[*models.values()][-1]}"
            if rank == 0:
                trim_log(folder / "log.jsonl", done, stage, run.step)
                if config.resume:
                    place = f", from {state}" if state else ""
                    console.print(f"{stage} goes on after step {run.step}{place}", soft_wrap=True)
            steps = saving(
                run, config, train(run, config, rows, device=device, rank=rank, world=world, stopping=stopping)
            )
            if rank == 0:
                with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
                    watch(steps, getattr(config, stage).steps, stage, log, to)
            else:
                deque(steps, maxlen=0)
            if run.stopped and run.step < getattr(config, stage).steps:
                return None
            kept = config.init and config.data.tokenizer == "auto"  # the checkpoint's own files, as they are
            files = {"tokenizer": None if kept else tokenizer, "beside": config.init}
            model.save(run.student, target, dtype=DTYPES[config.save_dtype], **files)
            done = (*done, stage)
            if stage != config.objective[-1]:
                last = folder / "state" / f"{stage}-{run.step:06}" / "student"
                student = model.load(last, device) if world > 1 else run.student
        models[target.name if target.name not in models else str(target)] = target
    if rank == 0:
        model.write_json(folder / "run.json", record | {"finished": now_text()})
    return models


def saving(run: Run, config: Config, steps: Iterator[dict]) -> Iterator[dict]:
    """The steps, with the run saved after some of them: when a step's line is in the log, so that none is missing."""
    for now in steps:
        yield now
        last = run.stopped or run.step == getattr(config, run.stage).steps
        due = last or (run.step % config.train.save_every == 0 and run.bad == 0)
        if due and run.bad < config.train.max_bad_steps:
            save_run(run, config.folder, config)


def parse(args: Sequence[str] | None = None) -> Config:
    """The command line, or other flags.

    With --init, the checkpoint's shape is the default of the --model flags, and with --paper the published values that
    of the --rpt flags. With --resume, the flags that the run was started with are the default of all, and those of its
    model and its data stay as they are.
    """
    config = tyro.cli(Config, description=__doc__.partition("\n\nThe paper")[0], args=args)
    record = config.folder / "run.json"
    if config.resume and record.exists():
        try:
            saved = revive(Config, model.read_json(record)["config"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{record} is not the record of a run ({error!r}): restore it, or start anew") from error
        saved, folder = replace(saved, resume=True, out=config.folder), config.folder
        config = replace(tyro.cli(Config, default=saved, args=args), out=folder)
        given = flags(config)
        for name, found in flags(saved).items():
            if name.startswith(FIXED) and given[name] != found:
                flag = f"--{name.replace('_', '-')} {given[name]}"
                raise UserError(f"{flag} contradicts the run in {folder}, which has {found}: leave the flag out")
        return config
    shape = model.load_config(config.init) if config.init else ModelConfig()
    if config.init or config.paper:
        default = Config(model=shape, rpt=PAPER if config.paper else RPTConfig())
        config = tyro.cli(Config, default=default, args=args)
    if not config.init:
        return config
    if config.data.path and config.data.length > shape.max_positions:
        raise UserError(
            f"--data.length {config.data.length} is more than the {shape.max_positions} positions of {config.init}: "
            "give a smaller one"
        )
    for f in fields(ModelConfig):
        given, found = (getattr(c.resolved(), f.name) for c in (config.model, shape))
        if given != found and f.name != "loops":
            flag = f"--model.{f.name.replace('_', '-')} {given}"
            raise UserError(f"{flag} contradicts the checkpoint {config.init}, which has {found}: leave the flag out")
    return config


if __name__ == "__main__":
    report(main, several=int(os.environ.get("WORLD_SIZE", 1)) > 1)
