"""The Ouro looped transformer (arXiv 2510.25741): one stack of layers, run up to L times for every token.

Axes, here and everywhere: B batch, T tokens, L loops, G rollouts, H heads, K key/value heads, C head channels,
D width, V vocabulary, N selected tokens. Loops are counted from 1 in everything a person reads.

    h(0) = embedding;  h(l) = norm(layers(h(l-1)));  gate and head read h(l), and h(l) feeds the next loop.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from tyro.conf import Suppress

from support.ranges import Checked, Range
from support.runtime import UserError

CHUNK_LOGITS = 2**23  # logits made at once: what a CPU's caches hold
MAX_KEPT_LOGITS = 2**27  # logits kept for the backward pass, 512 MiB in float32; beyond, they are computed again
FEW_TOKENS = 3, 5  # in a product of float32 on a CPU, by one thread and by several: see Linear
MAX_LOOPS, MAX_LAYERS, MAX_SIZE = 64, 1000, 10**6  # what could run somewhere; heads, channels and words are sizes


@dataclass(frozen=True)
class ModelConfig(Checked, group="model."):
    """Shape of the looped transformer; with --init it comes from the checkpoint."""

    layers: Annotated[int, Range(1, MAX_LAYERS)] = 1  # layers in the shared stack
    loops: Annotated[int, Range(1, MAX_LOOPS)] = 4  # L, the most often that the stack runs for one token
    width: Annotated[int, Range(1, MAX_SIZE)] = 64  # D, width of the state
    heads: Annotated[int, Range(1, MAX_SIZE)] = 4  # attention heads
    kv_heads: Annotated[int, Range(0, MAX_SIZE)] = 0  # key/value heads (0: as heads; fewer: grouped-query attention)
    ffn: Annotated[int, Range(0, MAX_SIZE)] = 0  # feed-forward width (0: 2.75 x width, rounded up to a multiple of 16)
    # What follows is not on the command line: it comes from the tokenizer or from the checkpoint.
    head_dim: Suppress[Annotated[int, Range(0, MAX_SIZE)]] = 0  # 0: width / heads
    vocab_size: Suppress[int] = 0
    max_positions: Suppress[int] = 65536
    rope_theta: Suppress[float] = 1e6
    rms_norm_eps: Suppress[float] = 1e-6
    init_std: Suppress[float] = 0.02
    tied: Suppress[bool] = False
    bos_token_id: Suppress[int | None] = 0
    eos_token_id: Suppress[int | tuple[int, ...] | None] = 0
    exit_threshold: Suppress[float] = 1.0

    def resolved(self) -> "ModelConfig":
        """The same shape with every 0 filled in. Raises UserError for a shape that no model can have."""
        self.check()
        kv_heads, head_dim = self.kv_heads or self.heads, self.head_dim or self.width // self.heads
        problem = None
        if not self.head_dim and self.width % self.heads:
            problem = f"--model.width {self.width} is not divisible by --model.heads {self.heads}"
            problem += f": try --model.width {self.width // self.heads * self.heads + self.heads}"
        elif self.heads % kv_heads:
            problem = f"--model.heads {self.heads} is not divisible by --model.kv-heads {kv_heads}"
            problem += ": every key/value head serves the same number of heads"
        elif head_dim % 2:
            problem = f"--model.width {self.width} over --model.heads {self.heads} gives heads of {head_dim} channels"
            problem += ": rotary positions need an even number"
        if problem:
            raise UserError(problem)
        ffn = self.ffn or 16 * math.ceil(11 * self.width / 64)
        return replace(self, kv_heads=kv_heads, head_dim=head_dim, ffn=ffn)


# Layers (attribute names are Ouro's key names)


def rotary(positions: Tensor, channels: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, float32.    ... -> ... C/2, ... C/2"""
    frequency = theta ** -(torch.arange(0, channels, 2, device=positions.device, dtype=torch.float32) / channels)
    angle = positions[..., None].float() * frequency  # ... C/2
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in half-split form.    B H T C, ... T C/2, ... T C/2 -> B H T C"""
    a, b = x.chunk(2, -1)  # B H T C/2
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).type_as(x)


class RMSNorm(nn.Module):
    """Root-mean-square norm, inside in at least float32; cast back before the weight, as published weights expect."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps).type_as(x) * self.weight


class Linear(nn.Linear):
    """Without bias; the other way round for few tokens, which a CPU multiplies in down to a third of the time then."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
        most = 0 if plain or not x.is_cpu or x.dtype != torch.float32 else FEW_TOKENS[torch.get_num_threads() > 1]
        if 1 < x.numel() // x.shape[-1] <= most:
            return (self.weight @ x.flatten(0, -2).T).T.reshape(*x.shape[:-1], -1)
        return F.linear(x, self.weight)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of each token to itself and those before it.    B H T C, B K T C, B K T C -> B H T C"""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.width, c.heads * c.head_dim)
        self.k_proj = Linear(c.width, c.kv_heads * c.head_dim)
        self.v_proj = Linear(c.width, c.kv_heads * c.head_dim)
        self.o_proj = Linear(c.heads * c.head_dim, c.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable = causal) -> Tensor:
        q, k, v = (
            rearrange(proj(x), "b t (h c) -> b h t c", c=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # B H T C, B K T C, B K T C
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.o_proj(rearrange(attend(q, k, v), "b h t c -> b t (h c)"))


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(c.width, c.ffn)
        self.up_proj = Linear(c.width, c.ffn)
        self.down_proj = Linear(c.ffn, c.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each between two norms (`post_attention_layernorm` is the one *before* the MLP)."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.compiled = False  # by torch.compile, at its first use
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.width, c.rms_norm_eps)
        self.input_layernorm_2 = RMSNorm(c.width, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.width, c.rms_norm_eps)
        self.post_attention_layernorm_2 = RMSNorm(c.width, c.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable = causal) -> Tensor:
        if not self.compiled:
            return self.compute(x, cos, sin, attend)
        for tensor, varying in ((x, (0, 1)), (cos, 0), (sin, 0)):  # rows and lengths
            torch._dynamo.maybe_mark_dynamic(tensor, varying)
        return compiled_layer()(self, x, cos, sin, attend)

    def compute(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable) -> Tensor:
        x = x + self.input_layernorm_2(self.self_attn(self.input_layernorm(x), cos, sin, attend))
        return x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x)))


@cache
def compiled_layer() -> Callable:
    """One graph for all layers, loops, rows and lengths; another one without gradient, and one for frozen weights."""
    return torch.compile(Layer.compute, fullgraph=True)


# The looped model


class Output(NamedTuple):
    hidden: Tensor  # B T L D  state after each loop, after the final norm
    gate: Tensor  # B T L  exit gate's logit on that state, float32 or better


class LoopedTransformer(nn.Module):
    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None = None):
        super().__init__()
        self.config = c = config.resolved()
        self.recompute = False  # in training: keep no layer's activations for the backward pass, compute them again
        self.embed_tokens = nn.Embedding(c.vocab_size, c.width)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.width, c.rms_norm_eps)
        self.early_exit_gate = nn.Linear(c.width, 1)
        self.lm_head = Linear(c.width, c.vocab_size)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=c.init_std, generator=generator)
        nn.init.zeros_(self.early_exit_gate.bias)
        if c.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self, x: Tensor, *, loops: int | None = None, noise_std: float = 0.0, generator: torch.Generator | None = None
    ) -> Output:
        """Run the stack `loops` times (default: all L) and return the state and the gate after each of them.
        x          token ids B T; or a state B T D that some loop left, to go on from there
        noise_std  standard deviation of the Gaussian noise on a state *that is fed to the next loop*; the gate and the
                   head read the state before the noise, and an embedding gets none (LoopRPT, Figure 2)
        generator  where the noise comes from, on x's device"""
        fresh = not x.is_floating_point()
        state = self.embed_tokens(x) if fresh else x.contiguous()  # B T D
        cos, sin = self.rotary(torch.arange(x.shape[1], device=x.device))
        hidden = []
        for loop in range(self.config.loops if loops is None else loops):
            if noise_std and not (fresh and loop == 0):
                noise = torch.randn(state.shape, generator=generator, device=state.device, dtype=state.dtype)
                state = state + noise_std * noise
            state = self.loop(state, cos, sin)
            hidden.append(state)
        hidden = torch.stack(hidden, 2)  # B T L D
        return Output(hidden, self.gate(hidden))

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary(positions, self.config.head_dim, self.config.rope_theta)

    def loop(self, state: Tensor, cos: Tensor, sin: Tensor, attend: Callable | None = None) -> Tensor:
        """Once through the stack and the final norm.    B T D, ... T C/2, ... T C/2 -> B T D
        attend  the attention, told which layer it is in (default: causal)"""
        for i, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                state = recompute(layer, state, cos, sin, use_reentrant=False)
            else:
                state = layer(state, cos, sin, partial(attend, i) if attend else causal)
        return self.norm(state)

    def compile(self) -> None:
        """Run the layers by torch.compile: faster and in less memory, after some seconds at the first use."""
        for layer in self.layers:
            layer.compiled = True

    def gate(self, hidden: Tensor) -> Tensor:
        """Logit of leaving here, in float32 or better even under autocast.    ... D -> ..."""
        weight, bias = self.early_exit_gate.weight[0], self.early_exit_gate.bias
        return (hidden.to(torch.promote_types(hidden.dtype, torch.float32)) * weight).sum(-1) + bias

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits, in float32 or better.    ... D -> ... V"""
        logits = self.lm_head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def exit_logpdf(gate: Tensor) -> Tensor:
    """Log-probability of leaving after each loop; the last takes what is left.    B T L -> B T L    (Ouro, Eq. 3)"""
    stay, leave = F.logsigmoid(-gate[..., :-1]), F.logsigmoid(gate[..., :-1])  # B T L-1
    return F.pad(stay.cumsum(-1), (1, 0)) + F.pad(leave, (0, 1))  # B T L


def exit_cdf(gate: Tensor) -> Tensor:
    """Probability of having left after each loop, 1 after the last.    B T L -> B T L
    As 1 - P(stay) by expm1, which is exact where little has left."""
    return F.pad(-torch.expm1(F.logsigmoid(-gate[..., :-1]).cumsum(-1)), (0, 1), value=1.0)


def exit_loop(gate: Tensor, threshold: float) -> Tensor:
    """First loop (counted from 0) whose cumulative exit probability reaches the threshold.    B T L -> B T
    Threshold 1 always means the last loop, threshold 0 the first."""
    if threshold >= 1:
        return torch.full_like(gate[..., 0], gate.shape[-1] - 1, dtype=torch.long)
    return (exit_cdf(gate)[..., :-1] < threshold).sum(-1)


def pick(index: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    """Some tokens of each part, by their flat index.    N, B T ... -> N ..."""
    return tuple(part.flatten(0, 1)[index] for part in parts)


def chunked(f: Callable[..., tuple[Tensor, ...]], *parts: Tensor, logits_per_token: int) -> tuple[Tensor, ...]:
    """f over chunks of its arguments, so that few logits are there at once; too many to be kept for the backward pass
    are computed again in it.    N ... -> N ..., ..."""
    size = max(1, (MAX_KEPT_LOGITS if parts[0].is_cuda else CHUNK_LOGITS) // logits_per_token)
    chunks = zip(*(part.split(size) for part in parts), strict=True)
    if len(parts[0]) * logits_per_token <= MAX_KEPT_LOGITS:
        results = [f(*chunk) for chunk in chunks]
    else:
        results = [recompute(f, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return tuple(map(torch.cat, zip(*results, strict=True)))
