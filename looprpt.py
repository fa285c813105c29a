"""LoopRPT (arXiv 2603.19714): reinforcement pre-training of the latent loops of a looped language model.

    python looprpt.py                                          pre-train a small base, run LoopRPT on it, compare them
    python looprpt.py --init out/base --objective rpt          one stage, from a checkpoint
    python looprpt.py --recipe dense                           LoopRPT changed: what did better on text
    torchrun --nproc-per-node 8 looprpt.py --model.loops 4     on eight GPUs

The paper's symbols and the names they have here. B batch, T tokens, L loops, G rollouts, V vocabulary, and N the hard
tokens of a batch. Tensors count loops from 0; prose, comments too, from 1.

    paper          here            shape      meaning
    log p(l)       logp            N L        log-probability of the gold token after each loop
    log p_ref(l)   teacher_logp    N L        the same, by the EMA teacher
    H              entropy         B T        entropy of the teacher's last loop, nats
    M              hard_tokens()   B T        which tokens are hard
    pi(l)          logpi           N L        log-probability of leaving after each loop
    l_ref          ref_loop        N          where the teacher leaves
    b              baseline        N          teacher_logp there
    lambda         cost            N          what a loop costs, nats
    R(l)           reward          N L        reward of leaving after each loop
    pi_g(l)        rollout_logpi   N G L      logpi on each noisy latent rollout
    l_g            exits           N G        where each rollout leaves
    A_g            advantage       N G        centred and scaled over the rollouts of a token
    w(l)           weights         N L        weight of each loop's log-likelihood

Where this differs from the paper: f and g always, the others with --recipe dense:

    a  the policy gradient is the expectation over exits, not one drawn exit a rollout      exact_policy_loss
    b  no noise, so the rollouts are the clean pass; all target tokens, not the hard fifth  noisy_gates, hard_tokens
    c  a share of the likelihood is the last loop's alone: loops left early would decay     representation_loss
    d  the earlier loops learn the last one's distribution                                  distillation
    e  a loop costs more, the entropy bonus is smaller                                      RECIPES
    f  entropy is a bonus: the paper's text has its sign the wrong way round                rpt_step
    g  K3's log-ratio is clamped, so that it stays finite                                   k3_kl
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from einops import rearrange, repeat
from tokenizers import Tokenizer
from torch import Tensor

import data
import eval
from data import Batch, DataConfig, Rows
from model import LoopedTransformer, ModelConfig, Output, chunked, exit_logpdf, exit_loop, pick
from support import checkpoint, processes, ranges, runs, runtime, sizes, text
from support.ranges import LearningRate, NonNegative, NonNegativeFloat, Positive, PositiveFloat, PositiveShare, Share
from support.runs import FOLDER, Run, Stage
from support.runtime import DType, Precision, UserError, console, to_device, true_indices

# Configuration: each comment is the flag's help


@dataclass(frozen=True)
class TrainConfig(ranges.Checked, group="train."):
    """What the stages share."""

    batch: NonNegative = 0  # rows in a step, over all processes (0: 8 of a file, 128 of chain arithmetic)
    micro_batch: NonNegative = 0  # rows in one forward pass of a process (0: as many as memory suits, see docs/runs.md)
    clip: PositiveFloat = 1.0  # largest norm of the gradient
    warmup: Share = 0.03  # share of the steps, 20 or more, in which the learning rate rises; then it falls (0: none)
    compile: Literal["auto", "on", "off"] = "auto"  # the layers, by torch.compile (auto: on a GPU)
    recompute: Literal["auto", "on", "off"] = "auto"  # keep no activations, compute them again (auto: large, on a GPU)
    save_every: Positive = 500  # steps between two saved states (one more at the end of a stage)
    keep: Positive = 2  # saved states of a stage to keep, the newest
    max_bad_steps: Positive = 10  # stop after so many steps in a row whose loss or gradient is not finite (skipped)
    timeout: Positive = 600  # seconds to wait for another process


@dataclass(frozen=True)
class PretrainConfig(ranges.Checked, group="pretrain."):
    """Ouro's Stage I: the expected loss over the exits, less an entropy bonus."""

    steps: NonNegative = 0  # optimiser steps (0: 3 epochs of a file, 2500 of chain arithmetic)
    lr: LearningRate = None  # peak learning rate (none: by the model's size)
    beta: NonNegativeFloat = 0.1  # weight of the exit distribution's entropy
    weight_decay: NonNegativeFloat = 0.1  # of the matrices


@dataclass(frozen=True)
class GateConfig(ranges.Checked, group="gate."):
    """Ouro's Stage II: the gate alone learns whether the next loop helps, the backbone is frozen."""

    steps: NonNegative = 0  # optimiser steps (0: 3 epochs of a file, 400 of chain arithmetic)
    lr: LearningRate = None  # peak learning rate (none: by the model's width)


@dataclass(frozen=True)
class RPTConfig(ranges.Checked, group="rpt."):
    """LoopRPT. The defaults are those of --recipe paper; in brackets, those of --recipe dense."""

    steps: NonNegative = 0  # optimiser steps (0: 3 epochs of a file, 250 of chain arithmetic)
    lr: LearningRate = None  # peak learning rate (none: by the model's size)
    estimator: Literal["sampled", "exact"] = "sampled"  # an exit drawn per rollout, or the expectation (dense: exact)
    rollouts: Positive = 8  # G, noisy latent rollouts (dense: 1)
    noise_std: NonNegativeFloat = 0.1  # standard deviation of the noise on the state fed to the next loop (dense: 0)
    rho: PositiveShare = 0.2  # share of a row's target tokens that are hard, and trained on (dense: 1)
    tau: PositiveShare = 0.5  # cumulative exit probability at which the teacher leaves
    lambda_base: NonNegativeFloat = 0.02  # cost of a loop, nats (dense: 0.05)
    lambda_scale: NonNegativeFloat = 0.5  # how much more a loop costs on an easy token
    pg_weight: NonNegativeFloat = 1.0  # weight of the policy loss
    rep_weight: NonNegativeFloat = 1.0  # weight of the representation loss
    rep_bonus: NonNegativeFloat = 1.0  # in that loss, extra weight of loops of above-average reward (0: weights pi(l))
    floor: Share = 0.0  # share of that loss that is the last loop's alone (dense: 0.3; 1: next-token training)
    distill_weight: NonNegativeFloat = 0.0  # weight of the KL from the last loop to the earlier ones (dense: 0.3)
    ent_weight: NonNegativeFloat = 0.01  # weight of the entropy bonus (dense: 0.003)
    kl_weight: NonNegativeFloat = 1e-4  # weight of the KL to the teacher
    gate_only: bool = False  # the backbone stays as it is
    ema_decay: Share = 0.995  # EMA decay of the teacher
    weight_decay: NonNegativeFloat = 0.01  # of the matrices

    @property
    def has_noise(self) -> bool:  # without it the rollouts are the clean pass
        return self.noise_std > 0 and self.pg_weight > 0

    def check(self) -> None:
        super().check()
        if self.estimator == "sampled" and self.rollouts < 2:
            problem = f"--rpt.rollouts {self.rollouts} gives no group to compare"
            raise UserError(f"{problem}: give --rpt.rollouts 8, or --rpt.estimator exact")


DENSE = {"estimator": "exact", "rollouts": 1, "noise_std": 0.0, "rho": 1.0, "lambda_base": 0.05}
RECIPES = {"paper": RPTConfig(), "dense": RPTConfig(**DENSE, floor=0.3, distill_weight=0.3, ent_weight=0.003)}


@dataclass(frozen=True)
class Config(ranges.Checked):
    """Train a looped language model and teach it to stop early (LoopRPT, arXiv 2603.19714)."""

    objective: tuple[Stage, ...] = ("pretrain", "rpt")  # stages to run, in order
    init: Path | None = None  # checkpoint folder to start from (none: random weights)
    out: Path | None = None  # folder of the run (none: out, or with --init out/NAME-STAGES)
    resume: bool = False  # go on with the run in that folder, with the flags it was started with
    recipe: Literal["paper", "dense"] = "paper"  # where the --rpt flags start from: as published, or dense
    seed: int = 0  # seed of the weights, the order of the rows, and the noise
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
        super().check()
        self.model.resolved()
        stages, learned = self.objective, [stage for stage in self.objective if stage != "pretrain"]
        if not stages or len({*stages}) < len(stages):
            problem = f"--objective {' '.join(stages) or 'nothing'}: give each stage at most once"
            raise UserError(f"{problem}, and at least one of pretrain, gate, rpt")
        if learned and self.model.loops < 2:
            problem = f"--model.loops {self.model.loops} leaves {learned[0]} no exit to learn"
            raise UserError(f"{problem}: give 2 or more loops")


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
    """How many tokens of each row are hard: rho of its target tokens, rounded up.    B T -> B"""
    return torch.ceil(rho * mask.sum(-1).double() - 1e-9).long()  # 0.1 * 30 is a bit above 3


def hard_tokens(entropy: Tensor, mask: Tensor, rho: float) -> Tensor:
    """The `hard_count` target tokens of each row at which the teacher is least sure.    B T, B T -> B T    (step 2)"""
    order = entropy.masked_fill(~mask, -math.inf).argsort(dim=-1, descending=True, stable=True)  # B T
    return order.argsort(-1) < hard_count(mask, rho)[:, None]  # rank < count


def reference(teacher_logp: Tensor, teacher_gate: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Where the teacher leaves, and its log-probability there.    N L, N L -> N, N    (step 3)"""
    ref_loop = exit_loop(teacher_gate, tau)
    return ref_loop, teacher_logp.gather(-1, ref_loop[:, None]).squeeze(-1)


def loop_cost(entropy: Tensor, vocab: int, lambda_base: float, lambda_scale: float) -> Tensor:
    """What a loop costs: more on tokens that are easy for the teacher, nats.    N -> N    (step 5)"""
    difficulty = (entropy / math.log(vocab)).clamp(0, 1)
    return lambda_base * (1 + lambda_scale * (1 - difficulty))


def exit_reward(logp: Tensor, baseline: Tensor, cost: Tensor, ref_loop: Tensor) -> Tensor:
    """R(l): what leaving after loop l gains over the teacher, less its cost.    N L, N, N, N -> N L    (step 5)
    A constant: no gradient passes."""
    late = torch.arange(logp.shape[-1], device=logp.device) - ref_loop[:, None]  # N L  negative before ref_loop
    return (logp - baseline[:, None] - cost[:, None] * late).detach()


def standardized(x: Tensor) -> Tensor:
    """Centred, and divided by the (unbiased) standard deviation, over the last axis.   ... K -> ... K    (step 7, 8)"""
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)


def draw_exits(logpi: Tensor, generator: torch.Generator | None) -> Tensor:
    """An exit for each token and rollout.    N G L -> N G    (step 7)"""
    drawn = torch.rand(logpi[..., :1].shape, generator=generator, device=logpi.device, dtype=logpi.dtype)  # N G 1
    return (logpi[..., :-1].exp().cumsum(-1) <= drawn).sum(-1)


def sampled_policy_loss(rollout_logpi: Tensor, exits: Tensor, reward: Tensor) -> Tensor:
    """The paper's policy gradient: a drawn exit beside the token's other ones.    N G L, N G, N L -> N    (step 7)"""
    advantage = standardized(reward.gather(-1, exits))  # N G
    return -(advantage.detach() * rollout_logpi.gather(-1, exits[..., None]).squeeze(-1)).mean(-1)


def exact_policy_loss(rollout_logpi: Tensor, reward: Tensor) -> Tensor:
    """The same gradient without the draw, and not divided by a deviation.    N G L, N L -> N
    Every reward is known, so -sum_l pi_g(l) A(l) with A(l) = R(l) - sum_j pi_g(j) R(j) has the gradient that the drawn
    exits only estimate. Its value is always 0: read the reward, not this loss."""
    pi, reward = rollout_logpi.exp(), reward[:, None]  # N G L, N 1 L
    advantage = reward - (pi * reward).sum(-1, keepdim=True)  # N G L
    return -(pi * advantage.detach()).sum(-1).mean(-1)


def representation_loss(logp: Tensor, logpi: Tensor, reward: Tensor, bonus: float = 1.0, floor: float = 0.0) -> Tensor:
    """Negative log-likelihood of the gold token, more on loops that pay.    N L, N L, N L -> N    (step 8)
    bonus  extra weight of those that pay (1: the paper; 0: each as often as it is the exit, Stage I)
    floor  share of the loss that is the last loop's alone (0: the paper; 1: next-token training)"""
    weights, last = logpi.exp() * (1 + bonus * standardized(reward).relu()), -logp[:, -1]  # N L, N
    return torch.lerp(-(weights.detach() * logp).sum(-1), last, floor)


def distillation(logits: Tensor) -> Tensor:
    """KL(last loop || earlier loop) over the vocabulary, averaged over the earlier ones.    N L V -> N
    The last loop is held constant: no gradient reaches it."""
    logp = logits.log_softmax(-1)
    last = logp[:, -1:].detach()
    return (last.exp() * (last - logp[:, :-1])).sum(-1).mean(-1)


def k3_kl(logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """K3 at the gold token, averaged over the loops.    N L, N L -> N    (step 10)
    Not a true KL: once the student is better than the teacher, its gradient pulls the student back."""
    ratio = (teacher_logp.detach() - logp).clamp(-20, 20)  # N L  clamped first, so exp stays finite
    return (ratio.exp() - ratio - 1).mean(-1)


def stage1_loss(logp: Tensor, logpi: Tensor, beta: float) -> Tensor:
    """Expected cross-entropy over the exits, less their entropy.    N L, N L -> N    (Ouro, Eq. 4)"""
    pi = logpi.exp()
    return -(pi * logp).sum(-1) + beta * (pi * logpi).sum(-1)


def gate_loss(gate: Tensor, logp: Tensor) -> Tensor:
    """Whether to go on, learned from what the next loop gains.    N L, N L -> N    (Ouro, Stage II)
    Gate l is labelled with the gain from loop l to l + 1: Ouro prints one lower, which never trains the first gate."""
    gain = (logp[:, 1:] - logp[:, :-1]).detach().relu()  # N L-1
    go_on = torch.sigmoid(50 * (gain - 0.005))  # N L-1  Ouro's slope and threshold
    return F.binary_cross_entropy_with_logits(-gate[:, :-1], go_on, reduction="none").mean(-1)


# Passes, made cheap: logits of few tokens at a time, and of a rollout only what can differ from the clean pass


def gold_logp(net: LoopedTransformer, hidden: Tensor, targets: Tensor, distill: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probability of the gold token after each loop, and `distillation` if asked for.    N L D, N -> N L, N"""

    def at_head(h: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = net.logits(h)  # n L V
        logp = logp_of(logits, target)
        return logp, distillation(logits) if distill else torch.zeros_like(logp[:, 0])

    return chunked(at_head, hidden, targets, logits_per_token=hidden.shape[1] * net.config.vocab_size)


def last_entropy(net: LoopedTransformer, out: Output, mask: Tensor) -> Tensor:
    """Entropy after the last loop at target tokens, -inf elsewhere.    -> B T"""
    targets_at, words = true_indices(mask, out.gate.device), net.config.vocab_size  # n
    (last,) = pick(targets_at, out.hidden[:, :, -1])  # n D
    (entropy,) = chunked(lambda h: (entropy_of(net.logits(h)),), last, logits_per_token=words)  # n
    everywhere = torch.full_like(out.gate[..., 0], -math.inf)  # B T
    return everywhere.masked_scatter(to_device(mask, entropy.device), entropy)


def noisy_gates(student: LoopedTransformer, clean: Output, cfg: RPTConfig, generator: torch.Generator | None) -> Tensor:
    """The gates on each rollout.    -> B T G L    (step 6)
    Loop 1 gets no noise, so it is the clean pass's; the last loop's gate is never used, so no rollout runs it."""
    gate = repeat(clean.gate[:, :, :1], "b t l -> (b g) t l", g=cfg.rollouts)
    if clean.gate.shape[-1] > 2:
        start = repeat(clean.hidden[:, :, 0], "b t d -> (b g) t d", g=cfg.rollouts)
        rollout = student(start, loops=clean.gate.shape[-1] - 2, noise_std=cfg.noise_std, generator=generator)
        gate = torch.cat((gate, rollout.gate), -1)
    return rearrange(F.pad(gate, (0, 1)), "(b g) t l -> b t g l", g=cfg.rollouts)


# The objectives: a batch in, a loss out. Losses and metrics are sums over this process's tokens, divided by a count
# over all processes, so they add up over processes and micro-batches.


class StepOutput(NamedTuple):
    loss: Tensor  # to go backward from
    metrics: dict[str, Tensor]  # detached; loss, reward, loops, ...


class TokenCounts(NamedTuple):
    targets: float  # target tokens of the global batch
    hard: float


def pretrain_step(student: LoopedTransformer, batch: Batch, cfg: PretrainConfig, *, counts: TokenCounts) -> StepOutput:
    """Stage I on every target token."""
    out, targets_at = student(batch.inputs), true_indices(batch.mask, batch.inputs.device)  # n
    hidden, gate, targets = pick(targets_at, *out, batch.targets)  # n L D, n L, n
    logp, _ = gold_logp(student, hidden, targets)  # n L
    loss = stage1_loss(logp, exit_logpdf(gate), cfg.beta).sum() / counts.targets
    metrics = {"loss": loss.detach(), "last_ce": -logp[:, -1].detach().sum() / counts.targets}
    return StepOutput(loss, metrics | eval.exit_stats(gate, counts.targets))


def gate_step(student: LoopedTransformer, batch: Batch, cfg: GateConfig, *, counts: TokenCounts) -> StepOutput:
    """Stage II on every target token; only the gate gets a gradient."""
    with torch.no_grad():
        out, targets_at = student(batch.inputs), true_indices(batch.mask, batch.inputs.device)  # n
        hidden, targets = pick(targets_at, out.hidden, batch.targets)  # n L D, n
        logp, _ = gold_logp(student, hidden, targets)  # n L
    gate = student.gate(hidden)  # n L
    loss = gate_loss(gate, logp).sum() / counts.targets
    return StepOutput(loss, {"loss": loss.detach()} | eval.exit_stats(gate, counts.targets))


def rpt_step(
    student: LoopedTransformer,
    teacher: LoopedTransformer,
    batch: Batch,
    cfg: RPTConfig,
    *,
    counts: TokenCounts,
    generator: torch.Generator | None = None,
) -> StepOutput:
    """One LoopRPT step, up to the backward pass (arXiv 2603.19714; the numbers are the steps of the README). What comes
    after it is the caller's: `loss.backward()`, the optimiser's step, and then `ema_update(teacher, student, decay)`.
    teacher    starts as a copy of the student and gets no gradient (`start_stage` makes it)
    batch      on the student's device, but for the mask, which stays on the CPU (`data.trim_and_move`)
    counts     `count_tokens(batch, cfg.rho, device)[0]`, target and hard tokens of all processes and micro-batches
    generator  of the noise and of the drawn exits, on the batch's device (none: torch's own)"""
    n_hard = int(hard_count(batch.mask, cfg.rho).sum())  # known here, so nothing waits for a GPU
    with torch.no_grad():
        # 1 Teacher pass: entropy of the last loop
        ref = teacher(batch.inputs)  # B T L D, B T L
        entropy = last_entropy(teacher, ref, batch.mask)  # B T

        # 2 Hard tokens: from here on, N of them are all that reaches the vocabulary
        hard = hard_tokens(entropy, to_device(batch.mask, entropy.device), cfg.rho)  # B T
        torch._assert_async(hard.sum() == n_hard, "hard_tokens must select hard_count tokens of each row")
        index = hard.flatten().nonzero_static(size=n_hard)[:, 0]  # N
        targets, entropy, ref_hidden, ref_gate = pick(index, batch.targets, entropy, *ref)  # N, N, N L D, N L

        # 3 Reference
        teacher_logp, _ = gold_logp(teacher, ref_hidden, targets)  # N L
        ref_loop, baseline = reference(teacher_logp, ref_gate, cfg.tau)  # N, N

    # 4 Student, clean pass (and step 8's distillation, while the logits are there)
    clean = student(batch.inputs)  # B T L D, B T L
    hidden, gate = pick(index, *clean)  # N L D, N L
    logpi = exit_logpdf(gate)  # N L
    logp, distill = gold_logp(student, hidden, targets, distill=cfg.distill_weight > 0)  # N L, N

    # 5 Reward of leaving after each loop
    cost = loop_cost(entropy, student.config.vocab_size, cfg.lambda_base, cfg.lambda_scale)  # N
    reward = exit_reward(logp, baseline, cost, ref_loop)  # N L

    # 6 Noisy latent rollouts
    if cfg.has_noise:
        rollout_logpi = exit_logpdf(*pick(index, noisy_gates(student, clean, cfg, generator)))  # N G L
    else:
        rollout_logpi = repeat(logpi, "n l -> n g l", g=cfg.rollouts)

    # 7 Policy
    if cfg.estimator == "sampled":
        exits = draw_exits(rollout_logpi.detach(), generator)  # N G
        pg, earned = sampled_policy_loss(rollout_logpi, exits, reward), reward.gather(-1, exits)  # N, N G
    else:
        pg = exact_policy_loss(rollout_logpi, reward)  # N
        earned = (rollout_logpi.detach().exp() * reward[:, None]).sum(-1)  # N G

    # 8 Representation   9 Entropy bonus   10 KL to the teacher
    rep = representation_loss(logp, logpi, reward, cfg.rep_bonus, cfg.floor)  # N
    ent = (logpi.exp() * logpi).sum(-1)  # N
    kl = k3_kl(logp, teacher_logp)  # N

    # 11 Total: means over the hard tokens of the global batch
    terms = {"pg": pg, "rep": rep, "ent": ent, "kl": kl, "distill": distill, "reward": earned.mean(-1)}
    mean = {name: term.sum() / counts.hard for name, term in terms.items()}
    loss = cfg.pg_weight * mean["pg"] + cfg.rep_weight * mean["rep"] + cfg.distill_weight * mean["distill"]
    loss = loss + cfg.ent_weight * mean["ent"] + cfg.kl_weight * mean["kl"]
    metrics = {name: value.detach() for name, value in ({"loss": loss} | mean).items()}
    return StepOutput(loss, metrics | eval.exit_stats(gate, counts.hard))


# Training


def start_stage(stage: Stage, student: LoopedTransformer, config: Config, *, teacher=None) -> Run:
    """A stage, ready to train on as many processes as there are; the EMA teacher starts as a copy of the student."""
    cfg, device = getattr(config, stage), student.embed_tokens.weight.device
    if stage == "rpt":
        teacher = (teacher or copy.deepcopy(student)).requires_grad_(False)
    gate_only = stage == "gate" or (stage == "rpt" and config.rpt.gate_only)
    student.requires_grad_(not gate_only).early_exit_gate.requires_grad_(True)
    student.recompute = config.train.recompute == "on"
    for net in filter(None, (student, teacher)):
        if config.train.compile == "on" or (config.train.compile == "auto" and device.type == "cuda"):
            net.compile()
        processes.shard(net, config.dist, device, bf16=runtime.matmul_dtype(device, config.precision) == "bf16")
    trained = student.early_exit_gate if gate_only else student
    return Run(stage, student, teacher, runs.make_optimizer(trained, cfg.lr, getattr(cfg, "weight_decay", 0.0)))


def count_tokens(batch: Batch, rho: float, device: torch.device) -> tuple[TokenCounts, int]:
    """Target tokens, hard tokens and rows, over all processes, known before any forward pass."""
    sums = torch.stack((batch.mask.sum(), hard_count(batch.mask, rho).sum(), torch.tensor(len(batch.mask)))).double()
    sums = processes.all_reduce_sum(to_device(sums, device) if processes.rank_and_world()[1] > 1 else sums)
    targets, hard, rows = sums.tolist()
    return TokenCounts(targets, hard), int(rows)


def ema_update(teacher: LoopedTransformer, student: LoopedTransformer, decay: float) -> None:
    """teacher <- decay teacher + (1 - decay) student    (step 11)"""
    with torch.no_grad():
        torch._foreach_lerp_([*teacher.parameters()], [*student.parameters()], 1 - decay)


def train(
    run: Run,
    config: Config,
    rows: Rows,
    *,
    stopping: Callable[[], bool] = lambda: False,
    log: Callable[[dict], None] = lambda numbers: None,
    save: Callable[[Run], None] = lambda run: None,
) -> None:
    """Do a stage's steps from where the run is, in place.
    stopping  asked in every step whether to end after it; one process's yes ends all
    log       takes each step's numbers
    save      writes the run, every train.save_every steps and at the end
    A step whose loss or gradient is not finite updates nothing; train.max_bad_steps in a row raise UserError."""
    stage, cfg, (rank, world) = run.stage, getattr(config, run.stage), processes.rank_and_world()
    device = run.student.embed_tokens.weight.device
    order = f"{config.seed}/{'pretrain' if stage == 'pretrain' else 'rpt'}"  # gate and rpt see the same rows
    source = data.source(rows, config.data, batch=config.train.batch, seed=order)
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    batch = source.batch(run.step, rank=rank, world=world)
    while run.step < cfg.steps and not run.stopped:
        start = time.perf_counter()

        # Batch: what a loss is divided by is counted over all processes before any forward pass
        counts, n_rows = count_tokens(batch, config.rpt.rho, device)
        most = math.ceil(n_rows / world)  # rows of the first process; every process runs as many micro-batches
        size = config.train.micro_batch or most

        # Loss and backward pass, a micro-batch at a time; a process without target tokens exchanges gradients of zero
        metrics, flops = {}, 0.0
        for p in parameters:
            p.grad = torch.zeros_like(p)
        for i in range(math.ceil(most / size)):
            micro = data.trim_and_move(Batch(*(part[i * size : (i + 1) * size] for part in batch)), device)
            flops += runtime.step_flops(stage, run.student.config, cfg, micro)
            with runtime.autocast(device, config.precision):
                if stage == "rpt":
                    noise = runtime.seeded(config.seed, "noise", run.step, rank, i, device=device)
                    output = rpt_step(run.student, run.teacher, micro, cfg, counts=counts, generator=noise)
                else:
                    step = pretrain_step if stage == "pretrain" else gate_step
                    output = step(run.student, micro, cfg, counts=counts)
            processes.reshard(run.teacher)
            output.loss.backward()
            for name, value in output.metrics.items():
                metrics[name] = metrics.get(name, 0) + value.double()

        # Clip; then the one exchange of numbers between processes, and the one wait for a GPU
        processes.reshard(run.student)
        norm = processes.full_tensor(torch.nn.utils.clip_grad_norm_(parameters, config.train.clip))
        others = torch.tensor([batch.inputs.numel(), flops, stopping()], dtype=torch.float64)
        sums = processes.all_reduce_sum(torch.cat((torch.stack([*metrics.values()]), to_device(others, device))))
        batch = source.batch(run.step + 1, rank=rank, world=world)  # while a GPU is still at this step
        *values, tokens, flops, stop, norm = torch.cat((sums, norm.to(sums)[None])).tolist()
        lr = cfg.lr * runs.lr_factor(run.step, cfg.steps, config.train.warmup)
        numbers = dict(zip(metrics, values, strict=True)) | {"grad_norm": norm, "lr": lr}

        # Update the student, then the teacher
        if math.isfinite(numbers["loss"]) and math.isfinite(norm):
            run.bad = 0
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            run.optimizer.step()
            if run.teacher:
                ema_update(run.teacher, run.student, cfg.ema_decay)
        else:
            run.bad, run.skipped = run.bad + 1, run.skipped + 1
        run.step, run.stopped = run.step + 1, stop > 0

        # Log
        numbers |= {"skipped": run.skipped} | runtime.speed(start, tokens, flops, world, device)
        finite = {name: x if x is None or math.isfinite(x) else None for name, x in numbers.items()}
        log({"stage": stage, "step": run.step} | finite)

        # Save, but never a run that is about to be given up
        if run.bad >= config.train.max_bad_steps:
            problem = f"the loss or its gradient was not finite in {run.bad} steps in a row, up to {stage} step"
            raise UserError(f"{problem} {run.step}: {run.saved}; try a smaller --{stage}.lr than {cfg.lr:g}")
        due = run.step % config.train.save_every == 0 and run.bad == 0
        if due or run.stopped or run.step == cfg.steps:
            save(run)


def run_stages(config: Config, tokenizer: Tokenizer, rows: Rows, device: torch.device, stopping: Callable[[], bool]):
    """All stages that are left.    -> folders of the checkpoints to compare, or None if the run was stopped; and the
    first process's function that logs how they compare"""
    folder, (rank, world) = config.folder, processes.rank_and_world()
    done = tuple(stage for stage in config.objective if (folder / FOLDER[stage]).exists())
    words = {} if config.init else {"vocab_size": text.vocab_size(tokenizer), "eos_token_id": text.eos_id(tokenizer)}
    shape, given = replace(config.model, **words).resolved(), ranges.flatten_config(config)
    config = sizes.fill_in(config, shape, rows, device)
    chosen = {name: x for name, x in ranges.flatten_config(config).items() if x != given[name]}
    sizes.require_memory(config, shape, rows, device, done)
    student, logger = first_student(config, shape, done, device), None
    if rank == 0:
        record = runs.open_run(folder, config, student, world, [*chosen])
        runtime.print_notes(sizes.describe(config, shape, chosen))
        logger = runtime.open_logger(config.logger, folder, asdict(config), record["id"])
    models = (config.init,) if config.init else ()
    for stage in config.objective:
        target, steps = folder / FOLDER[stage], getattr(config, stage).steps
        if stage not in done:
            # From the newest state, or from what the stage before left
            state = runs.latest_state(folder, stage, device) if config.resume else None
            student, teacher = runs.load_models(state, shape, device) if state else (student, None)
            run = start_stage(stage, student, config, teacher=teacher)
            if state or models:
                run.saved = f"the last good checkpoint is {state or models[-1]}"
            if state:
                runs.restore(run, state, steps)
            if rank == 0:  # with flags that a resume has changed
                record["config"] = asdict(config) | {"resume": False}
                checkpoint.write_json(folder / "run.json", record)

            # Train
            with runs.open_log(folder / "log.jsonl", run, done, steps, logger) as log:
                train(run, config, rows, stopping=stopping, log=log, save=lambda run: runs.save_run(run, config))
            if run.stopped and run.step < steps:
                return None, logger

            # The checkpoint, with the tokenizer's own files if it came with some
            new = None if config.init and config.data.tokenizer == "auto" else tokenizer
            checkpoint.save(run.student, target, new, dtype=runtime.DTYPES[config.save_dtype], source=config.init)
            done = (*done, stage)
            if world > 1 and stage != config.objective[-1]:  # whole again
                student = checkpoint.load(folder / "state" / f"{stage}-{run.step:06}" / "student", device)
        models = (*models, target)
    if rank == 0:
        checkpoint.write_json(folder / "run.json", record | {"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
    return models, logger


def first_student(config: Config, shape: ModelConfig, done: Sequence[Stage], device: torch.device):
    """The model that the next stage starts from: of the last stage that is done, of --init, or of random weights."""
    if done:
        folder = config.folder / FOLDER[done[-1]]
        state = runs.latest_state(config.folder, done[-1], device, getattr(config, done[-1]).steps)
        student = checkpoint.load(state / "student" if state else folder, device)  # a state is in float32
    elif config.init:
        student = checkpoint.load(config.init, device)
        if shape.loops > (known := student.config.loops) and processes.is_writer():
            runtime.print_notes([f"{config.init} was trained with {known} loops, --model.loops is {shape.loops}"])
    else:
        return LoopedTransformer(shape, generator=runtime.seeded(config.seed, "weights")).to(device)
    student.config = shape  # --model.loops may ask for fewer, or more; a checkpoint may name more ends of text
    return student


# The command line

RESUME_FIXED = ("objective", "init", "seed", "recipe", "model.", "data.", "train.batch")  # flags that stay when resumed


def main() -> None:
    config = parse()
    folder, (rank, world) = config.folder, processes.rank_and_world()
    runs.require_free(folder, resume=config.resume)
    if 0 < config.train.batch < world:
        raise UserError(f"--train.batch {config.train.batch} is less than the {world} processes: each needs a row")
    device = runtime.pick_device(config.device)
    tokenizer = data.pick_tokenizer(config.data, config.init)
    rows, val_rows, notes = data.split(config.data, tokenizer, seed=config.seed, world=world)
    if rank == 0:
        runtime.print_notes(notes)

    def newest() -> Path | str:
        return next(iter(runs.saved_states(folder, config.objective)), "the start")

    with processes.stop_signals() as asked:
        with processes.process_group(device, config.train.timeout, resumes_from=newest), runs.locked(folder):
            runs.require_shared(folder, device)
            models, log = run_stages(config, tokenizer, rows, device, stopping=lambda: bool(asked))
        if rank == 0 and models is None:
            signals = " ".join(asked) or "another process"
            console.print(f"stopped by {signals}, saved in {newest()}: --resume goes on", soft_wrap=True)
        elif rank == 0:
            out = folder / "results.json"
            compared = eval.EvalConfig(models, config.data, out, seed=config.seed, precision=config.precision)
            log({"stage": "comparison", "step": 1} | eval.compare_folders(compared, val_rows, device))


@ranges.unchecked()
def parse(args: Sequence[str] | None = None) -> Config:
    """The command line, or other flags. Raises UserError for values that are refused or don't go together.
    With --init, the checkpoint's shape is the default of the --model flags; the recipe is that of the --rpt flags. With
    --resume, the flags that the run was started with are the default of all, and those of its model and its data stay
    as they are."""
    config = tyro.cli(Config, description=__doc__.partition("\n\nThe paper")[0], args=args)
    folder, record = config.folder, config.folder / "run.json"
    if config.resume and record.exists():
        try:
            values = checkpoint.read_json(record)["config"] | {"resume": True, "out": folder}
            saved = ranges.config_from_json(Config, values)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{record} is not the record of a run ({error!r}): restore it, or start anew") from error
        config = replace(tyro.cli(Config, default=saved, args=args), out=folder)
        fixed = RESUME_FIXED + tuple(f"{stage}." for stage in saved.objective if (folder / FOLDER[stage]).exists())
        ranges.require_same(config, saved, f"the run in {folder}", only=fixed)
    else:
        shape = checkpoint.load_config(config.init) if config.init else ModelConfig()
        config = tyro.cli(Config, default=Config(model=shape, rpt=RECIPES[config.recipe]), args=args)
        if config.init:
            config = replace(config, data=config.data.within(shape.max_positions, config.init))
            model = replace(config.model, loops=shape.loops).resolved()
            ranges.require_same(model, shape, f"the checkpoint {config.init}")
    config.check()
    if not config.init and config.objective[0] != "pretrain":
        problem = f"--objective {config.objective[0]} has nothing to start from"
        raise UserError(f"{problem}: give --init, or put pretrain before it")
    return config


if __name__ == "__main__":
    runtime.run_cli(main, distributed=processes.rank_and_world()[1] > 1)
