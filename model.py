"""The Ouro looped transformer (arXiv 2510.25741): one stack of layers, run up to L times for every token.

Axes, here and everywhere: B batch, T tokens, L loops, G rollouts, H heads, K key/value heads, C head channels,
D width, V vocabulary, N selected tokens. Loops are counted from 1 in everything a person reads.

    h(0) = embedding;  h(l) = norm(layers(h(l-1)));  gate and head read h(l), and h(l) feeds the next loop.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class UserError(ValueError):
    """A user's mistake: one sentence with what was given, the rule and the way out; printed without a traceback."""


def report(main: Callable[[], None]) -> None:
    """Run a script; end with one sentence and exit status 1 on a user's mistake."""
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        sys.exit(f"error: {error}" if rank == "0" else f"error on process {rank}: {error}")


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
    eos_token_id: tyro.conf.Suppress[int | None] = 0
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


def rotary(length: int, channels: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles of positions 0 ... length-1, float32.    -> T C/2, T C/2"""
    frequency = theta ** -(torch.arange(0, channels, 2, device=device, dtype=torch.float32) / channels)  # C/2
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency  # T C/2
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in half-split form.    B H T C -> B H T C"""
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


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim, self.grouped = c.head_dim, c.kv_heads != c.heads
        self.q_proj = nn.Linear(c.width, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            rearrange(proj(x), "b t (h c) -> b h t c", c=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # B H T C, B K T C, B K T C
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)  # B H T C
        return self.o_proj(rearrange(out, "b h t c -> b t (h c)"))


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
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.width, c.rms_norm_eps)
        self.input_layernorm_2 = RMSNorm(c.width, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.width, c.rms_norm_eps)
        self.post_attention_layernorm_2 = RMSNorm(c.width, c.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.input_layernorm_2(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x)))


# ---------------------------------------------------------------------------------------------------------------------
# The looped model


class Output(NamedTuple):
    hidden: Tensor  # B T L D  state after each loop, after the final norm
    gate: Tensor  # B T L  exit gate's logit on that state, float32 or better


class LoopedTransformer(nn.Module):
    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None = None):
        super().__init__()
        self.config = c = config.resolved()
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
        self, x: Tensor, *, loops: int | None = None, noise_std: float = 0.0, generator: torch.Generator | None = None
    ) -> Output:
        """Run the stack `loops` times (default: all L) and return the state and the gate after each of them.

        x          token ids B T; or a state B T D that some loop left, to go on from there
        noise_std  standard deviation of the Gaussian noise on a state *that is fed to the next loop*; the gate and the
                   head read the state before the noise, and an embedding gets none (LoopRPT, Figure 2)
        generator  where the noise comes from, on x's device
        """
        fresh = not x.is_floating_point()
        state = self.embed_tokens(x) if fresh else x  # B T D
        cos, sin = rotary(x.shape[1], self.config.head_dim, self.config.rope_theta, x.device)
        hidden = []
        for loop in range(self.config.loops if loops is None else loops):
            if noise_std and not (fresh and loop == 0):
                noise = torch.randn(state.shape, generator=generator, device=state.device, dtype=state.dtype)
                state = state + noise_std * noise
            for layer in self.layers:
                state = layer(state, cos, sin)
            state = self.norm(state)
            hidden.append(state)
        hidden = torch.stack(hidden, 2)  # B T L D
        return Output(hidden, self.gate(hidden))

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
# Checkpoint folders, in Ouro's own layout: config.json, model.safetensors, tokenizer.json

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
    "eos_token_id": "eos_token_id",
    "early_exit_threshold": "exit_threshold",
}
NEEDED = ("layers", "loops", "width", "heads", "ffn", "vocab_size")  # the shape; the rest has Ouro's defaults
CONFIG_FIXED = {  # keys whose value is part of the architecture, or that only other programs read
    "architectures": ["OuroForCausalLM"],
    "model_type": "ouro",
    "auto_map": {
        "AutoConfig": "ByteDance/Ouro-1.4B--configuration_ouro.OuroConfig",
        "AutoModel": "ByteDance/Ouro-1.4B--modeling_ouro.OuroModel",
        "AutoModelForCausalLM": "ByteDance/Ouro-1.4B--modeling_ouro.OuroForCausalLM",
    },
    "hidden_act": "silu",
    "rope_scaling": None,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "sliding_window": None,
    "use_cache": True,
    "torch_dtype": "float32",
    "transformers_version": "4.55.0",
}


def ouro_name(name: str) -> str:
    """Name of a parameter in an Ouro checkpoint."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def save(model: LoopedTransformer, folder: Path, tokenizer=None) -> None:
    """Write a checkpoint folder, complete or not at all: under a temporary name first, then renamed.

    tokenizer  a tokenizers.Tokenizer, saved beside the weights
    Raises UserError if the folder is there already.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already: nothing saved is overwritten, give another folder")
    c, shape = model.config, asdict(model.config)
    config = CONFIG_FIXED | {key: shape[ours] for key, ours in CONFIG_KEYS.items()}
    config |= {"bos_token_id": c.eos_token_id, "layer_types": ["full_attention"] * c.layers}
    weights = {ouro_name(name): p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save(str(temporary / "tokenizer.json"))
    os.rename(temporary, folder)


def load_config(folder: Path) -> ModelConfig:
    """Shape of the checkpoint in a folder. Raises UserError if it isn't one, or isn't Ouro's architecture."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a checkpoint folder: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["model_type"] != "ouro":
            raise UserError(f"{path} says model_type {config['model_type']!r}: only 'ouro' is known here")
        found = {ours: config[key] for key, ours in CONFIG_KEYS.items() if key in config}
        missing = [key for key, ours in CONFIG_KEYS.items() if ours in NEEDED and key not in config]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}: restore the file")
        return ModelConfig(**found).resolved()
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the configuration of an Ouro model ({error!r}): restore the file") from error


def load(folder: Path, device: torch.device | str = "cpu") -> LoopedTransformer:
    """The model in a checkpoint folder, in float32. Raises UserError for a missing, damaged or foreign checkpoint."""
    config, path = load_config(folder), folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} has no model.safetensors: only safetensors checkpoints are read")
    with torch.device("meta"):
        model = LoopedTransformer(config)
    expected = {ouro_name(name): (name, p.shape) for name, p in model.named_parameters()}
    try:
        with safe_open(path, framework="pt") as file:
            missing, extra = sorted(expected.keys() - file.keys()), sorted(file.keys() - expected.keys())
            if missing or extra:
                raise UserError(
                    f"{path} does not match its config.json: missing {missing or 'none'}, extra {extra or 'none'}"
                )
            weights = {}
            for key, (name, shape) in expected.items():
                tensor = file.get_tensor(key)
                if tensor.shape != shape:
                    raise UserError(
                        f"{path} holds {key} of shape {tuple(tensor.shape)}, its config.json says {tuple(shape)}"
                    )
                weights[name] = tensor.float()
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): restore it from a copy") from error
    model.load_state_dict(weights, strict=False, assign=True)  # a tied head has no entry of its own
    if config.tied:
        model.lm_head.weight = model.embed_tokens.weight
    return model.requires_grad_().to(device)
