"""The Ouro looped transformer (arXiv 2510.25741): one stack of layers, run up to L times for every token.

Axes, here and everywhere: B batch, T tokens, L loops, G rollouts, H heads, K key/value heads, C head channels,
D width, V vocabulary, N selected tokens. Loops are counted from 1 in everything a person reads.

    h(0) = embedding;  h(l) = norm(layers(h(l-1)));  gate and head read h(l), and h(l) feeds the next loop.

    python model.py export IN OUT --dtype bf16     writes a checkpoint again, in another precision
"""

import atexit
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial, reduce
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tyro.conf import Positional

SLICE, KEPT = 2**23, 2**27  # logits at once: what a CPU's caches like, and 512 MiB in float32


class UserError(ValueError):
    """A user's mistake: one sentence with what was given, the rule and the way out; printed without a traceback."""


def report(main: Callable[[], None], *, several: bool = False) -> None:
    """Run a script; end with one sentence and exit status 1 on a user's mistake.

    several  it is one of several processes, and ends by `leave`
    """
    problem = None
    try:
        main()
    except UserError as error:
        problem = str(error)
    except RuntimeError as error:
        if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        why = str(error).strip().partition("\n")[0][:200]
        problem = f"torch.compile can't build the layers here ({why}): give --train.compile off, or --no-compile"
    rank = os.environ.get("RANK", "0")
    if problem:
        problem = f"error: {problem}" if rank == "0" else f"error on process {rank}: {problem}"
    if several:
        leave(problem)
    if problem:
        sys.exit(problem)


def leave(problem: str | None = None) -> NoReturn:
    """End one of several processes, with a sentence and exit status 1 if there is a problem.

    Not through Python's own end: what hears the others over gloo outlives the process group, and a thread of it that
    lets go of a tensor while Python ends aborts the process, whose work was done.
    """
    if problem:
        print(problem, file=sys.stderr)
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):  # closed, or full
            stream.flush()
    os._exit(bool(problem))


def pick_device(name: str) -> torch.device:
    """Raises UserError if there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is not a device: give auto, cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= max(
        torch.cuda.device_count(), device.type == "cpu"
    ):
        raise UserError(f"--device {name} is not there: {torch.cuda.device_count()} CUDA devices are, give auto or cpu")
    return device


# ---------------------------------------------------------------------------------------------------------------------
# Shape


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the looped transformer; with --init it comes from the checkpoint."""

    layers: int = 1  # layers in the shared stack
    loops: int = 4  # L, the most often that the stack runs for one token
    width: int = 64  # D, width of the state
    heads: int = 4  # attention heads
    kv_heads: int = 0  # key/value heads (0: as many as heads; fewer: grouped-query attention)
    ffn: int = 0  # feed-forward width (0: 2.75 x width, rounded up to a multiple of 16)
    # What follows is not on the command line: it comes from the tokenizer or from the checkpoint.
    head_dim: tyro.conf.Suppress[int] = 0  # 0: width / heads
    vocab_size: tyro.conf.Suppress[int] = 0
    max_positions: tyro.conf.Suppress[int] = 65536
    rope_theta: tyro.conf.Suppress[float] = 1e6
    rms_norm_eps: tyro.conf.Suppress[float] = 1e-6
    init_std: tyro.conf.Suppress[float] = 0.02
    tied: tyro.conf.Suppress[bool] = False
    bos_token_id: tyro.conf.Suppress[int | None] = 0
    eos_token_id: tyro.conf.Suppress[int | tuple[int, ...] | None] = 0
    exit_threshold: tyro.conf.Suppress[float] = 1.0

    def resolved(self) -> "ModelConfig":
        """The same shape with every 0 filled in. Raises UserError for a shape that no model can have."""
        for name in ("layers", "loops", "width", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"--model.{name} {getattr(self, name)} is below 1: give a positive number")
        for name in ("kv_heads", "ffn", "head_dim"):
            if getattr(self, name) < 0:
                flag = f"--model.{name.replace('_', '-')}"
                raise UserError(
                    f"{flag} {getattr(self, name)} is negative: give a positive number, or 0 for the default"
                )
        if not self.head_dim and self.width % self.heads:
            raise UserError(
                f"--model.width {self.width} is not divisible by --model.heads {self.heads}: "
                f"try --model.width {self.width // self.heads * self.heads + self.heads}"
            )
        kv_heads = self.kv_heads or self.heads
        if self.heads % kv_heads:
            raise UserError(
                f"--model.heads {self.heads} is not divisible by --model.kv-heads {kv_heads}: "
                "every key/value head serves the same number of heads"
            )
        head_dim = self.head_dim or self.width // self.heads
        if head_dim % 2:
            raise UserError(
                f"--model.width {self.width} over --model.heads {self.heads} gives heads of {head_dim} channels: "
                "rotary positions need an even number"
            )
        ffn = self.ffn or -(-11 * self.width // 64) * 16
        return replace(self, kv_heads=kv_heads, head_dim=head_dim, ffn=ffn)


# ---------------------------------------------------------------------------------------------------------------------
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
    """Root-mean-square norm in at least float32; cast back before the weight, as the published weights expect."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(exact, x.shape[-1:], eps=self.eps).type_as(x) * self.weight


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of each token to itself and those before it.    B H T C, B K T C, B K T C -> B H T C"""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of one token in each row to the keys of that row.    B H 1 C, B K S C, B K S C -> B H 1 C"""
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1])


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.width, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.width, bias=False)

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
        self.gate_proj = nn.Linear(c.width, c.ffn, bias=False)
        self.up_proj = nn.Linear(c.width, c.ffn, bias=False)
        self.down_proj = nn.Linear(c.ffn, c.width, bias=False)

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
            return self.run(x, cos, sin, attend)
        for tensor, varying in ((x, (0, 1)), (cos, 0), (sin, 0)):  # rows and lengths
            torch._dynamo.maybe_mark_dynamic(tensor, varying)
        return compiled_layer()(self, x, cos, sin, attend)

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable) -> Tensor:
        x = x + self.input_layernorm_2(self.self_attn(self.input_layernorm(x), cos, sin, attend))
        return x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x)))


@cache
def compiled_layer() -> Callable:
    """One graph for all layers, loops, rows and lengths; another one without gradient, and one for frozen weights."""
    return torch.compile(Layer.run, fullgraph=True)


# ---------------------------------------------------------------------------------------------------------------------
# The looped model


class Output(NamedTuple):
    hidden: Tensor  # B T L D  state after each loop, after the final norm
    gate: Tensor  # B T L  exit gate's logit on that state, float32 or better


class LoopedTransformer(nn.Module):
    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None = None):
        super().__init__()
        self.config = c = config.resolved()
        self.checkpointing = False  # in training: keep no layer's inside for the backward pass, run it again
        self.embed_tokens = nn.Embedding(c.vocab_size, c.width)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.width, c.rms_norm_eps)
        self.early_exit_gate = nn.Linear(c.width, 1)
        self.lm_head = nn.Linear(c.width, c.vocab_size, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=c.init_std, generator=generator)
        nn.init.zeros_(self.early_exit_gate.bias)
        if c.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        x: Tensor,
        *,
        loops: int | None = None,
        noise_std: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Output:
        """Run the stack `loops` times (default: all L) and return the state and the gate after each of them.

        x          token ids B T; or a state B T D that some loop left, to go on from there
        noise_std  standard deviation of the Gaussian noise on a state *that is fed to the next loop*; the gate and the
                   head read the state before the noise, and an embedding gets none (LoopRPT, Figure 2)
        generator  where the noise comes from, on x's device
        """
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

        attend  the attention, told which layer it is in (default: causal)
        """
        for i, layer in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                state = checkpoint(layer, state, cos, sin, use_reentrant=False)
            else:
                state = layer(state, cos, sin, partial(attend, i) if attend else causal)
        return self.norm(state)

    def prefill(self, ids: Tensor, cache: "Cache", rows: list[int], loops: int) -> Tensor:
        """All loops of prompts, which these rows of the cache keep; the state after the last one.    R T -> R T D"""
        state, (cos, sin) = self.embed_tokens(ids), self.rotary(torch.arange(ids.shape[1], device=ids.device))
        for loop in range(loops):
            state = self.loop(state, cos, sin, cache.prompt(rows, loop))
        return state

    def decode(self, state: Tensor, cache: "Cache", rows: list[int], loops: list[int], positions: list[int]) -> Tensor:
        """One loop more for the newest token of each of these rows of the cache.    R D -> R D

        The weights are the same in every loop, so one pass serves tokens that are at different loops (from 0).
        """
        cos, sin = self.rotary(torch.tensor(positions, device=state.device))  # R C/2
        cos, sin = (rearrange(x, "r c -> r 1 1 c") for x in (cos, sin))
        return self.loop(state[:, None], cos, sin, cache.step(rows, loops, positions))[:, 0]

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


def exit_loop(gate: Tensor, threshold: float) -> Tensor:
    """First loop (counted from 0) whose cumulative exit probability reaches the threshold, the last if none does.

    B T L -> B T. Computed as 1 - P(stay), so threshold 1 always means the last loop, however far the gate is
    saturated; threshold 0 always means the first.
    """
    if threshold >= 1:
        return torch.full_like(gate[..., 0], gate.shape[-1] - 1, dtype=torch.long)
    left = -torch.expm1(F.logsigmoid(-gate[..., :-1]).cumsum(-1))  # B T L-1
    return (left < threshold).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# The cache of generation


def copying_is_cheap(device: torch.device) -> bool:
    """Cheaper than a kernel for each row; on a CPU, copying what a row has cached costs more than attending to it."""
    return device.type == "cuda"


class Cache:
    """Keys and values of the tokens so far, preallocated: a slot for each loop of each layer.

    A token at loop l attends to slot l of the tokens before it. One that left early has filled its first slots only;
    `fill` copies the last of them into the rest. With a single slot (Ouro's sharing of the last loop's keys and values)
    every loop overwrites it, so that it holds each token's last loop, and all loops of the next tokens attend to that.
    """

    def __init__(self, c: ModelConfig, rows: int, length: int, *, slots: int, device: torch.device, dtype: torch.dtype):
        shape = c.layers, slots, rows, c.kv_heads, length, c.head_dim  # layers L B K S C
        self.slots, self.rows = slots, rows
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))

    def prompt(self, rows: list[int], loop: int) -> Callable:
        """The attention of one loop over prompts, from position 0 on, which these rows of the cache keep."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for kept, new in (self.keys, k), (self.values, v):
                kept[layer, min(loop, self.slots - 1), rows, :, : new.shape[2]] = new
            return causal(q, k, v)

        return attend

    def step(self, rows: list[int], loops: list[int], positions: list[int]) -> Callable:
        """The attention of one more token in each of these rows, at its own loop and position; the cache keeps it."""
        device, length = self.keys.device, max(positions) + 1
        slots = [min(loop, self.slots - 1) for loop in loops]
        slot, row, position = (torch.tensor(x, device=device) for x in (slots, rows, positions))  # R, R, R
        level = min(positions) + 1 == length
        mask = None if level else rearrange(torch.arange(length, device=device) <= position[:, None], "r s -> r 1 1 s")

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]  # L B K S C
            keys[slot, row, :, position], values[slot, row, :, position] = k[:, :, 0], v[:, :, 0]
            if len({*slots}) == 1 and len(rows) == self.rows:
                return attention(q, keys[slots[0], :, :, :length], values[slots[0], :, :, :length], mask)
            if copying_is_cheap(device):
                return attention(q, keys[slot, row, :, :length], values[slot, row, :, :length], mask)
            seen = [
                (s, slice(b, b + 1), slice(None), slice(p + 1)) for s, b, p in zip(slots, rows, positions, strict=True)
            ]
            return torch.cat([attention(q[i : i + 1], keys[at], values[at]) for i, at in enumerate(seen)])

        return attend

    def keep(self, rows: list[int]) -> None:
        """Only these rows, from now on numbered in this order."""
        self.keys, self.values, self.rows = self.keys[:, :, rows], self.values[:, :, rows], len(rows)

    def fill(self, rows: list[int], loops: list[int], positions: list[int]) -> None:
        """Tokens that left after `loops` loops: the deeper slots get the last one's keys and values."""
        row, last, position = (torch.tensor(x, device=self.keys.device)[:, None] for x in (rows, loops, positions))
        slot = torch.arange(self.slots, device=self.keys.device)  # L
        source = slot.minimum(last - 1)  # R L
        for kept in (self.keys, self.values):
            kept[:, slot, row, :, position] = kept[:, source, row, :, position]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoint folders, in Ouro's own layout: config.json, model.safetensors (or shards and their index), tokenizer.json

CONFIG_KEYS = {  # Ouro's name: ours
    "num_hidden_layers": "layers",
    "total_ut_steps": "loops",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "ffn",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tied",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "early_exit_threshold": "exit_threshold",
}
NEEDED = ("layers", "loops", "width", "heads", "ffn", "vocab_size")  # the shape; the rest has Ouro's defaults
ARCHITECTURE = {  # what a configuration says of the computation; ours does just this
    "model_type": "ouro",
    "architectures": ["OuroForCausalLM"],
    "hidden_act": "silu",
    "rope_scaling": None,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
}
FOR_OTHERS = {  # what only other programs read
    "auto_map": {
        "AutoConfig": "ByteDance/Ouro-1.4B--configuration_ouro.OuroConfig",
        "AutoModel": "ByteDance/Ouro-1.4B--modeling_ouro.OuroModel",
        "AutoModelForCausalLM": "ByteDance/Ouro-1.4B--modeling_ouro.OuroForCausalLM",
    },
    "sliding_window": None,
    "use_cache": True,
    "transformers_version": "4.55.0",
}
NOT_OURO = {"rope_type": "default", "quantization_config": None, "attention_bias": False}  # and no key of it
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # larger checkpoints are split
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
GENERATION = "generation_config.json"
BESIDE = f"""{GENERATION} tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json
    merges.txt chat_template.jinja""".split()  # what else a folder holds, copied as it is

DType = Literal["bf16", "fp32"]
Precision = Literal["auto", "bf16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def ouro_name(name: str) -> str:
    """Name of a parameter in an Ouro checkpoint."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def is_writer() -> bool:
    """Whether this process is the one that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` at the end, complete and on the disk, or not at all.

    Raises UserError if the folder is there already, or can't be written; what was saved before is left as it is.
    """
    if not is_writer():
        yield folder
        return
    if folder.exists():
        raise UserError(f"{folder} is there already: nothing saved is overwritten, give another folder")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        os.rename(temporary, folder)
        sync(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):  # safetensors has its own word for a full disk
            raise UserError(
                f"{folder} can't be written ({error}): make room or give another place; what was saved before is intact"
            ) from error
        raise


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def save(
    model: LoopedTransformer,
    folder: Path,
    tokenizer=None,
    *,
    dtype: torch.dtype | None = None,
    beside: Path | None = None,
) -> None:
    """Write a checkpoint folder, complete or not at all. Every process of a sharded model takes part, one writes.

    tokenizer  a tokenizers.Tokenizer, saved beside the weights (default: the files of the one in `beside`)
    dtype      of the weights in the file (default: as they are)
    beside     a checkpoint folder whose generation settings are copied
    Raises UserError if the folder is there already, or can't be written.
    """
    c, shape = model.config, asdict(model.config)
    dtype = dtype or model.embed_tokens.weight.dtype
    config = ARCHITECTURE | FOR_OTHERS | {key: shape[ours] for key, ours in CONFIG_KEYS.items()}
    config |= {"layer_types": ["full_attention"] * c.layers, "torch_dtype": str(dtype).removeprefix("torch.")}
    with new_folder(folder) as temporary:
        save_weights({ouro_name(name): p.detach() for name, p in model.named_parameters()}, temporary, dtype)
        if not is_writer():
            return
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in BESIDE if tokenizer is None else (GENERATION,):
            if beside and (beside / name).is_file():
                shutil.copyfile(beside / name, temporary / name)
        if tokenizer is not None:
            tokenizer.save(str(temporary / "tokenizer.json"))
            first = c.eos_token_id[0] if isinstance(c.eos_token_id, tuple) else c.eos_token_id
            end = None if first is None else tokenizer.id_to_token(first)
            how = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": end,
                "clean_up_tokenization_spaces": False,
            }
            (temporary / "tokenizer_config.json").write_text(json.dumps(how, indent=2) + "\n")


def save_weights(weights: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """One model.safetensors, or files of at most SHARD_BYTES and their index; one file at a time is gathered."""
    parts, room = [[]], SHARD_BYTES
    for name, weight in weights.items():
        size = weight.numel() * dtype.itemsize
        if parts[-1] and size > room:
            parts.append([])
            room = SHARD_BYTES
        parts[-1].append(name)
        room -= size
    n = len(parts)
    files = [f"model-{i:05}-of-{n:05}.safetensors" if n > 1 else "model.safetensors" for i in range(1, n + 1)]
    for names, file in zip(parts, files, strict=True):
        gathered = {}
        for name in names:
            whole = weights[name].full_tensor() if isinstance(weights[name], DTensor) else weights[name]
            if is_writer():
                gathered[name] = whole.to("cpu", dtype).contiguous()
        if is_writer():
            save_file(gathered, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(folder.stat().st_mode & 0o666)  # the library writes it for its owner alone
    if n > 1 and is_writer():
        total = sum(w.numel() for w in weights.values()) * dtype.itemsize
        where = {name: file for names, file in zip(parts, files, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): restore the file") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, not an object: restore the file")
    return found


def write_whole(path: Path, text: str) -> None:
    """Write a file whole, or leave the old one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, found: dict) -> None:
    write_whole(path, json.dumps(found, indent=1, default=str) + "\n")


def load_config(folder: Path) -> ModelConfig:
    """Shape of the checkpoint in a folder. Raises UserError if it isn't one, or isn't Ouro's architecture."""
    path = folder / "config.json"
    if not path.is_file():
        what = "is a file, give its folder" if folder.is_file() else "has no config.json"
        if not folder.exists():
            what = f"is not there (to download: hf download ORGANISATION/NAME --local-dir {folder})"
        raise UserError(f"{folder} is not a checkpoint folder: it {what}")
    config, rope = read_json(path), {}
    if isinstance(config.get("rope_parameters"), dict):  # where transformers 5 writes them
        rope = config["rope_parameters"]
    config = {key: rope[key] for key in ("rope_theta", "rope_type") if key in rope} | config
    types = config.get("layer_types") or []
    layer_types = sorted({*types} - {"full_attention"}) if isinstance(types, list) else types
    given = ARCHITECTURE | NOT_OURO | {"model_type": None} | config | {"layer_types": layer_types}
    for key, ours in (ARCHITECTURE | NOT_OURO | {"layer_types": []}).items():
        if given[key] != ours:
            raise UserError(f"{path} says {key} {given[key]!r}: only Ouro's {ours or 'full_attention'!r} is known here")
    return shape_of(config, path)


def shape_of(config: dict, path: Path) -> ModelConfig:
    """Ours from Ouro's keys. Raises UserError for one that is missing, or has a value that it can't have."""
    missing = [key for key, ours in CONFIG_KEYS.items() if ours in NEEDED and key not in config]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: restore the file")
    found = {}
    for key, ours in CONFIG_KEYS.items():
        value = config.get(key)
        if key not in config or (value is None and ours in ("kv_heads", "head_dim")):
            continue
        if ours in ("bos_token_id", "eos_token_id"):
            value = tuple(value) if isinstance(value, list) and value else value
            ids = value if isinstance(value, tuple) else (value,)
            rule, kept = "a token's number, or null", value is None or all(type(i) is int and i >= 0 for i in ids)
        elif ours == "tied":
            rule, kept = "true or false", isinstance(value, bool)
        elif ours in ("rope_theta", "rms_norm_eps", "init_std", "exit_threshold"):
            low, high = (0, 1) if ours == "exit_threshold" else (1e-30, math.inf)
            rule, kept = f"a number from {low} to {high}", type(value) in (int, float) and low <= value <= high
        else:
            rule, kept = "a whole number above 0", type(value) is int and value > 0
        if not kept:
            raise UserError(f"{path} says {key} {value!r}: it must be {rule}")
        found[ours] = value
    try:
        return ModelConfig(**found).resolved()
    except UserError as error:
        raise UserError(f"{path} has a shape that no model can have ({error})") from error


def weight_files(folder: Path) -> dict[str, list[str] | None]:
    """The safetensors files of a checkpoint folder, and the keys that its index (if it has one) says each holds."""
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors": None}
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for kind in PICKLES for path in folder.glob(kind))
        if pickles:
            raise UserError(
                f"{folder} holds {pickles[0]}, a pickle, which can run any code when it is loaded: only safetensors "
                "are read; convert it where that does no harm, with safetensors.torch.save_file"
            )
        raise UserError(f"{folder} has no model.safetensors: only safetensors checkpoints are read")
    files: dict[str, list[str]] = {}
    where = read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise UserError(f"{folder / INDEX} has no weight_map of names to files: restore the file")
    for key, file in where.items():
        files.setdefault(file, []).append(key)
    for file in files:
        if Path(file).name != file or not (folder / file).is_file():
            raise UserError(f"{folder / INDEX} names {file}, which is not in the folder: restore it")
    return files


def some(names: list[str]) -> str:
    """The first few names."""
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3) if names else "none"


def find_weights(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Path]:
    """The file of each tensor in a folder. Raises UserError for a damaged file, or another shape or type than ours."""
    place = {}
    for file, keys in weight_files(folder).items():
        path = folder / file
        with opened(path) as weights:
            if keys is not None and {*keys} != {*weights.keys()}:
                wrong = some(sorted({*keys} ^ {*weights.keys()}))
                raise UserError(f"{folder / INDEX} and {path} disagree on {wrong}: restore both from a copy")
            for key in weights.keys():  # noqa: SIM118  it is no dict
                place[key], part = path, weights.get_slice(key)
                shape, kind = tuple(part.get_shape()), part.get_dtype()
                if shape != shapes.get(key, shape):
                    raise UserError(f"{path} holds {key} of shape {shape}, its config.json says {shapes[key]}")
                if kind not in ("BF16", "F16", "F32", "F64"):
                    raise UserError(f"{path} holds {key} as {kind}: only BF16, F16, F32 and F64 weights are read")
    return place


def load(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> LoopedTransformer:
    """The model in a checkpoint folder.

    dtype  of the parameters (None: as stored)
    Tensors are read one at a time from the mapped file, so little more is held than the model.
    Raises UserError for a missing, damaged or foreign checkpoint.
    """
    config = load_config(folder)
    with torch.device("meta"):
        model = LoopedTransformer(config)
    names = {ouro_name(name): name for name, _ in model.named_parameters()}
    shapes = {ouro_name(name): tuple(p.shape) for name, p in model.named_parameters()}
    place = find_weights(folder, shapes)
    if config.tied and {"lm_head.weight", "model.embed_tokens.weight"} <= place.keys():  # some writers keep the copy
        head, embedding = (read_tensor(place[key], key) for key in ("lm_head.weight", "model.embed_tokens.weight"))
        if not head.equal(embedding):
            raise UserError(f"{folder} says tie_word_embeddings, but its lm_head.weight differs: set it to false")
        del place["lm_head.weight"]
    missing, extra = sorted(names.keys() - place.keys()), sorted(place.keys() - names.keys())
    if missing or extra:
        raise UserError(f"{folder} does not match its config.json: missing {some(missing)}, extra {some(extra)}")
    dtype = dtype or reduce(torch.promote_types, (read_tensor(place[key], key).dtype for key in names))
    weights = {name: read_tensor(place[key], key).to(device, dtype, copy=True) for key, name in names.items()}
    model.load_state_dict(weights, strict=False, assign=True)  # a tied head has no entry of its own
    if config.tied:
        model.lm_head.weight = model.embed_tokens.weight
    return model.requires_grad_()


@contextmanager
def opened(path: Path) -> Iterator:
    """A safetensors file. Raises UserError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        with open(path, "rb") as start:
            pointer = start.read(19) == b"version https://git"
        mend = "is a pointer of git-lfs, not the weights: run git lfs pull" if pointer else None
        raise UserError(f"{path} {mend or f'is damaged ({error}): restore it from a copy'}") from error


def read_tensor(path: Path, key: str) -> Tensor:
    """One tensor, mapped; a file opened for it alone is unmapped with it."""
    with opened(path) as file:
        return file.get_tensor(key)


def export(source: Positional[Path], out: Positional[Path], dtype: DType = "bf16") -> None:
    """Write a checkpoint again: in another precision, in one file or in shards, with its tokenizer.

    Args:
        source: checkpoint folder to read.
        out: folder to write.
        dtype: precision of the weights in the file.
    """
    if out.exists():
        raise UserError(f"{out} is there already: nothing saved is overwritten, give another folder")
    model = load(source, dtype=DTYPES[dtype])
    save(model, out, beside=source)
    size = sum(p.numel() for p in model.parameters())
    print(f"{out}: {size:,} parameters in {dtype}, from {source}")


def main() -> None:
    tyro.extras.subcommand_cli_from_dict({"export": export})


if __name__ == "__main__":
    report(main)
