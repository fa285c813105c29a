"""Text from a looped model whose gate really stops it: a token that leaves after loop l has run l loops.

    python sample.py out/rpt --prompt "Problem: ..." --exit-threshold 0.5 --show-loops

Prompts run at full depth. While decoding, every pass through the stack serves all rows at once, each at its own loop:
the weights are the same in every loop, so a row that leaves early starts its next token while others still think.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer
from torch import Tensor

import data
from model import MAX_LOOPS, LoopedTransformer, ModelConfig, exit_cdf
from support import checkpoint, text
from support.ranges import Checked, NonNegativeFloat, Positive, PositiveShare, Range, unchecked
from support.runtime import DTYPES, Precision, UserError, pick_device, run_cli, seeded

CacheRule = Literal["copy", "last", "full"]
Ints = list[int]  # of rows of the cache: their numbers, or each one's loop or position


class Cache:
    """Keys and values of the tokens so far, preallocated for each loop of each layer. A row holds one prompt's tokens.
    A token at loop l attends to loop l of the tokens before it. With loops=1 every loop overwrites the one before, so
    that all loops of the next tokens attend to each token's last, as Ouro shares the last loop's keys and values."""

    def __init__(self, c: ModelConfig, rows: int, length: int, *, loops: int, device: torch.device, dtype: torch.dtype):
        shape = c.layers, loops, rows, c.kv_heads, length, c.head_dim  # layers L B K S C
        self.loops, self.rows = loops, rows
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.attention = partial(F.scaled_dot_product_attention, enable_gqa=c.heads != c.kv_heads)

    def prefill_attention(self, rows: Ints, loop: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention of one loop over prompts, from position 0 on, which these rows of the cache keep."""
        for kept, new in (self.keys, k), (self.values, v):
            kept[layer, min(loop, self.loops - 1), rows, :, : new.shape[2]] = new
        return self.attention(q, k, v, is_causal=True)

    def decode_attention(self, rows: Ints, loops: Ints, positions: Ints) -> Callable:
        """The attention of one more token in each of these rows, at its own loop and position; the cache keeps it."""
        device, length = self.keys.device, max(positions) + 1
        loops = [min(loop, self.loops - 1) for loop in loops]
        loop, row, position = (torch.tensor(x, device=device) for x in (loops, rows, positions))  # R, R, R
        level = min(positions) + 1 == length
        mask = None if level else torch.arange(length, device=device) <= position[:, None, None, None]  # R 1 1 S

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]  # L B K S C
            keys[loop, row, :, position], values[loop, row, :, position] = k[:, :, 0], v[:, :, 0]
            # All rows at the same loop need no copy of what they have cached
            if len({*loops}) == 1 and len(rows) == self.rows:
                return self.attention(q, keys[loops[0], :, :, :length], values[loops[0], :, :, :length], mask)
            if gather_rows_on(device):
                return self.attention(q, keys[loop, row, :, :length], values[loop, row, :, :length], mask)
            places = zip(loops, rows, positions, strict=True)
            seen = [(at, slice(b, b + 1), slice(None), slice(p + 1)) for at, b, p in places]
            return torch.cat([self.attention(q[i : i + 1], keys[at], values[at]) for i, at in enumerate(seen)])

        return attend

    def keep_rows(self, rows: Ints) -> None:
        """Only these rows, from now on numbered in this order."""
        self.keys, self.values, self.rows = self.keys[:, :, rows], self.values[:, :, rows], len(rows)

    def fill_deeper(self, rows: Ints, loops: Ints, positions: Ints) -> None:
        """Tokens that left after these numbers of loops: the deeper loops get the last one's keys and values."""
        row, last, position = (torch.tensor(x, device=self.keys.device)[:, None] for x in (rows, loops, positions))
        loop = torch.arange(self.loops, device=self.keys.device)  # L
        source = loop.minimum(last - 1)  # R L
        for kept in (self.keys, self.values):
            kept[:, loop, row, :, position] = kept[:, source, row, :, position]


def gather_rows_on(device: torch.device) -> bool:
    """Rows at different loops, in one kernel: on a CPU, copying what they have cached costs more than it saves."""
    return device.type == "cuda"


def prefill(net: LoopedTransformer, ids: Tensor, cache: Cache, rows: Ints, loops: int) -> Tensor:
    """All loops of prompts, which these rows of the cache keep; the state after the last one.    R T -> R T D"""
    state, (cos, sin) = net.embed_tokens(ids), net.rotary(torch.arange(ids.shape[1], device=ids.device))
    for loop in range(loops):
        state = net.loop(state, cos, sin, partial(cache.prefill_attention, rows, loop))
    return state


def decode(net: LoopedTransformer, state: Tensor, cache: Cache, rows: Ints, loops: Ints, positions: Ints) -> Tensor:
    """One loop more for the newest token of each of these rows of the cache; loops count from 0.    R D -> R D"""
    cos, sin = (x[:, None, None] for x in net.rotary(torch.tensor(positions, device=state.device)))  # R 1 1 C/2
    return net.loop(state[:, None], cos, sin, cache.decode_attention(rows, loops, positions))[:, 0]


class Exit(NamedTuple):
    """Leave after the first loop whose score reaches the threshold, after the last loop if none does."""

    rule: str = "gate"  # score: the gate's cumulative exit probability; or 'confidence', the largest token probability
    threshold: float = 1.0  # 1 means all loops, however far the score is saturated


def logits_at_exit(net: LoopedTransformer, exit: Exit, hidden: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Logits where each token leaves, and that loop (from 1), when all loops have run.    N L D, N L -> N V, N"""
    score = exit_cdf(gate)[:, :-1] if exit.rule == "gate" else net.logits(hidden[:, :-1]).softmax(-1).amax(-1)
    leave = ((score < exit.threshold) | (exit.threshold >= 1)).cumprod(-1).sum(-1)  # N L-1 -> N
    return net.logits(hidden[torch.arange(len(hidden), device=hidden.device), leave]), leave + 1


def sample_tokens(logits: Tensor, numbers: list[float], *, temperature: float, top_p: float) -> list[int]:
    """A token for each row, at a temperature above 0, among the likeliest that hold the share top_p.    R V -> R
    numbers  where in 0..1 each row's draw falls, so that a row's text depends on its own draws alone"""
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)  # R V
    unsorted = torch.arange(p.shape[-1], device=p.device).expand_as(p)
    order = p.argsort(dim=-1, descending=True, stable=True) if top_p < 1 else unsorted  # R V
    upto = p.gather(-1, order).cumsum(-1)  # R V
    mass = upto.gather(-1, (upto < top_p).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1))  # R 1
    where = torch.tensor(numbers, device=p.device, dtype=p.dtype)[:, None] * mass
    return order.gather(-1, (upto < where).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)).squeeze(-1).tolist()


class Token(NamedTuple):
    row: int  # which prompt it continues
    id: int
    loops: int  # how many loops it took; the first token of a row comes from its prompt, at full depth
    likeliest: int  # the most probable token there
    logp: float  # log P(id) where it left, of all tokens, at temperature 1 whatever it was drawn at
    exit: float  # the gate's cumulative exit probability there; 1 at the last loop


@dataclass(eq=False)
class Stream:
    """A prompt under way. Its newest token is at `position` and has run `loops_run` loops."""

    prompt: int  # which one
    slot: int  # its row of the cache
    position: int
    exit_state: Tensor  # D  after the loop that says what comes next
    exit_loop: int  # that loop; 0 while it is open
    loops_run: int
    exit_share: float = 1.0  # the gate's cumulative exit probability at that loop
    state: Tensor | None = None  # D  after the loops run so far; a prompt's last token, which has run all, needs none
    log_stay: Tensor | None = None  # log P(the gate has not stopped it)
    tokens: list[int] = field(default_factory=list)  # the continuation


@torch.no_grad()
def generate(
    net: LoopedTransformer,
    prompts: list[list[int]],
    *,
    max_tokens: int,
    given: list[list[int]] | None = None,
    exit: Exit = Exit(),  # noqa: B008  it is a constant
    loops: int | None = None,
    cache: CacheRule = "copy",
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch: int | None = None,
    seeds: Sequence[object] | None = None,
    done: Callable[[int, list[int]], bool] = lambda row, tokens: False,
) -> Iterator[Token]:
    """Continue every prompt (token ids); tokens come as they are chosen, in no order over the rows.
    given    the continuation of each prompt (teacher forcing): it is taken, not chosen, and ends the prompt
    loops    the most that a token may take (default: the model's)
    cache    'copy': a token that left copies its last loop into its deeper ones. 'last': only each token's last loop
             is kept, in 1/loops of the memory. 'full': all loops run, exact but no faster; the exit picks the logits
    batch    prompts side by side (default: all); when one ends, the next takes its place
    seeds    of each prompt's draws (default: its number)
    done     told a row and its new tokens after each of them; says whether the row ends there
    Raises UserError for a prompt that is empty, or longer than the model's positions."""
    most, weight, loops = net.config.max_positions, net.embed_tokens.weight, loops or net.config.loops
    if wrong := [n for n in map(len, prompts) if not 1 <= n <= most]:
        raise UserError(f"the prompt has {wrong[0]} tokens, the model {most} positions: give from 1 to {most} tokens")
    limits = [min(max_tokens, len(tokens)) for tokens in given] if given else [max_tokens] * len(prompts)
    length = min(max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)), most)
    size, kept_loops = min(batch or len(prompts), len(prompts)), 1 if cache == "last" else loops
    kv_cache = Cache(net.config, size, length, loops=kept_loops, device=weight.device, dtype=weight.dtype)
    generators, waiting = [seeded("draws", s) for s in seeds or range(len(prompts))], [*range(len(prompts))]
    streams, zero = [], torch.zeros((), device=weight.device)

    while streams or waiting:
        # Prompts take the free rows, at full depth. No token sees the padding, and decoding overwrites it
        if free := sorted({*range(kv_cache.rows)} - {s.slot for s in streams})[: len(waiting)]:
            begun, waiting = waiting[: len(free)], waiting[len(free) :]
            ids, ends = data.pad([prompts[p] for p in begun]).to(weight.device), [len(prompts[p]) - 1 for p in begun]
            states = prefill(net, ids, kv_cache, free, loops)[range(len(free)), ends]  # R D
            streams += map(partial(Stream, loops_run=loops, exit_loop=loops), begun, free, ends, states)
            streams.sort(key=lambda s: s.slot)  # the cache wants its rows in order

        # Without the rows that are free now, once they are half of them: the copy is worth it
        if len(streams) <= kv_cache.rows // 2:
            kv_cache.keep_rows([s.slot for s in streams])
            for slot, s in enumerate(streams):
                s.slot = slot

        # Tokens that have left: the next one, which starts at the first loop
        if left := [s for s in streams if s.exit_loop and (cache != "full" or s.loops_run == loops)]:
            logits = net.logits(torch.stack([s.exit_state for s in left]))  # R V
            likeliest = chosen = logits.argmax(-1).tolist()
            if given:
                chosen = [given[s.prompt][len(s.tokens)] for s in left]
            elif temperature:
                numbers = [torch.rand((), generator=generators[s.prompt]).item() for s in left]
                chosen = sample_tokens(logits, numbers, temperature=temperature, top_p=top_p)
            logps = logits.log_softmax(-1)[range(len(left)), chosen].tolist()
            states = net.embed_tokens(torch.tensor(chosen, device=weight.device))  # R D
            for s, token, best, logp, state in zip(left, chosen, likeliest, logps, states, strict=True):
                s.tokens.append(token)
                yield Token(s.prompt, token, s.exit_loop, best, logp, s.exit_share)
                s.position, s.loops_run, s.exit_loop, s.state, s.log_stay = s.position + 1, 0, 0, state, zero
                if done(s.prompt, s.tokens) or len(s.tokens) >= limits[s.prompt] or s.position >= most:
                    streams.remove(s)
            continue  # with the first tokens of prompts that take the rows of those that have ended

        # One loop for every stream
        slots, loops_run, positions = map(list, zip(*((s.slot, s.loops_run, s.position) for s in streams), strict=True))
        states = decode(net, torch.stack([s.state for s in streams]), kv_cache, slots, loops_run, positions)  # R D

        # Those whose score reaches the threshold leave here, and at the last loop those that are still there
        log_stay = torch.stack([s.log_stay for s in streams]) + F.logsigmoid(-net.gate(states))  # R
        shares = -torch.expm1(log_stay)  # R
        score = shares if exit.rule == "gate" or exit.threshold >= 1 else net.logits(states).softmax(-1).amax(-1)  # R
        reached = (score >= exit.threshold) & (exit.threshold < 1)  # R
        numbers = torch.stack((shares, reached.to(shares))).tolist()  # in one wait for a GPU
        for s, state, stay, share, enough in zip(streams, states, log_stay, *numbers, strict=True):
            s.loops_run, s.state, s.log_stay = s.loops_run + 1, state, stay
            if not s.exit_loop and (enough or s.loops_run == loops):
                s.exit_loop, s.exit_state, s.exit_share = s.loops_run, state, share if s.loops_run < loops else 1.0
        if early := [s for s in streams if cache == "copy" and s.exit_loop and s.loops_run < loops]:
            kv_cache.fill_deeper([s.slot for s in early], [s.loops_run for s in early], [s.position for s in early])


# The command line

THINK, END_THINK = "<think>", "</think>"  # the marks of a thought: tokens of their own, or spelled
COLOURS = ("bright_blue", "cyan", "yellow", "red", "magenta", "bright_black")  # of 1, 2, ... loops


@dataclass(frozen=True, kw_only=True)
class GenerationFlags(Checked):
    """Of every script that loads one checkpoint and generates."""

    folder: Annotated[Path, tyro.conf.Positional]  # checkpoint folder, of this program or of Hugging Face
    # leave when the gate's cumulative probability reaches it; 0: first loop, 1: all loops (none: checkpoint's)
    exit_threshold: Annotated[float | None, Range(0, 1)] = None
    exit: str | None = None  # another rule: confidence:0.9 leaves when a token is that probable
    loops: Annotated[int | None, Range(1, MAX_LOOPS)] = None  # the most loops for a token (none: the checkpoint's)
    cache: CacheRule = "copy"  # deeper loops of a token that left: a copy of its last; the last only; or all loops run
    chat: bool = False  # prompts as ChatML: each is a user's turn
    system: str | None = None  # a system's turn before it; implies --chat
    thinking: bool = False  # open the answer with <think>, as for Ouro's Thinking models; implies --chat
    seed: int = 0  # of the draws
    device: str = "auto"  # cpu, cuda, cuda:1 (auto: a GPU if there is one)
    dtype: Precision = "auto"  # of weights and cache (auto: as stored)

    def __post_init__(self) -> None:
        object.__setattr__(self, "chat", self.chat or self.thinking or self.system is not None)
        super().__post_init__()

    def exit_rule(self, default: float) -> Exit:
        """From --exit RULE:THRESHOLD or --exit-threshold; by default the gate's, with this threshold."""
        if self.exit is None:
            return Exit("gate", default if self.exit_threshold is None else self.exit_threshold)
        if self.exit_threshold is not None:
            raise UserError(f"--exit {self.exit} and --exit-threshold {self.exit_threshold} are two rules: give one")
        rule, _, threshold = self.exit.partition(":")
        with suppress(ValueError):
            if rule in ("gate", "confidence") and 0 <= float(threshold) <= 1:
                return Exit(rule, float(threshold))
        raise UserError(f"--exit {self.exit} is not RULE:THRESHOLD (0 to 1): give gate:0.9 or confidence:0.9")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(GenerationFlags):
    prompt: tuple[str, ...]  # text to continue; several are continued side by side
    max_tokens: Positive = 200  # most new tokens
    temperature: NonNegativeFloat = 0.0  # of the draw (0: the likeliest token)
    top_p: PositiveShare = 1.0  # draw among the likeliest tokens that hold this share together
    show_loops: bool = False  # colour each token by the loops it took
    json: bool = False  # an object for each new token and one for all of them, instead of text

    def check(self) -> None:
        super().check()
        if not self.prompt or "" in self.prompt:
            raise UserError("the prompt is empty: give some text to continue with --prompt")
        for flag, given in (*(("prompt", prompt) for prompt in self.prompt), ("system", self.system or "")):
            if given != given.encode(errors="replace").decode():
                raise UserError(f"--{flag} {given!r} is not UTF-8: give text")


def load_with_tokenizer(folder: str | Path, device, dtype: Precision = "auto") -> tuple[LoopedTransformer, Tokenizer]:
    """The model and its tokenizer. Raises UserError for a folder that lacks one, or if they don't fit."""
    net = checkpoint.load(folder, device, None if dtype == "auto" else DTYPES[dtype])
    return net.eval(), text.pick_tokenizer("auto", folder, text.byte_tokenizer())


def load_for(config: GenerationFlags) -> tuple[LoopedTransformer, Tokenizer]:
    net, tokenizer = load_with_tokenizer(config.folder, pick_device(config.device), config.dtype)
    if (config.loops or 0) > net.config.loops:
        print(f"{config.folder} was trained with {net.config.loops} loops, --loops is {config.loops}", file=sys.stderr)
    return net, tokenizer


def stop_ids(net: LoopedTransformer, tokenizer: Tokenizer) -> set[int]:
    """End of text, by the configuration and by the tokenizer, and the end of a turn."""
    eos = net.config.eos_token_id
    configured = {*eos} if isinstance(eos, tuple) else {eos}
    return (configured | {text.eos_id(tokenizer), tokenizer.token_to_id(text.IM_END)}) - {None}


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str], how: GenerationFlags) -> list[list[int]]:
    """Tokens of prompts: as they are, where text may spell any token; or of ChatML up to the answer, where none does.
    Raises UserError for ChatML if the tokenizer lacks its tokens."""
    if not how.chat:
        return text.tokenize(tokenizer, list(texts), special=True)
    head, start = [("system", how.system)] * (how.system is not None), f"{THINK}\n" * how.thinking
    chats = text.encode_chats(tokenizer, [[*head, ("user", prompt), ("assistant", start)] for prompt in texts])
    return [ids[: places[-1][1] - 1] for ids, places in chats]  # without the end of the answer


def decode_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of tokens; of special ones, it keeps the marks of a thought alone."""
    added = tokenizer.get_added_tokens_decoder()
    hidden = {i for i, token in added.items() if token.special and token.content not in (THINK, END_THINK)}
    return tokenizer.decode([i for i in ids if i not in hidden], skip_special_tokens=False)


def shade(loops: int) -> str:
    return COLOURS[min(loops, len(COLOURS)) - 1]


def legend(loops: list[int]) -> Text:
    """Each colour with its number of loops and the share of the tokens that took so many."""
    parts = [(f"{n} {loops.count(n) / len(loops):.0%}", shade(n)) for n in range(1, max(loops) + 1)]
    return Text("  ").join([Text("loops:"), *(Text(*part) for part in parts)])


def main() -> None:
    with unchecked():
        config = tyro.cli(SampleConfig, description=__doc__)
    config.check()
    net, tokenizer = load_for(config)
    exit = config.exit_rule(net.config.exit_threshold)
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    if data.is_chain(tokenizer):
        if config.json or config.chat:
            raise UserError(f"{config.folder} has no text, only chain arithmetic: leave --json and the chat flags out")
        return show_chain(net, tokenizer, config, exit, console)
    prompts, stops = encode_prompts(tokenizer, config.prompt, config), stop_ids(net, tokenizer)
    shown, tokens, start = [Text() for _ in prompts], [[] for _ in prompts], time.perf_counter()
    said = [THINK * config.thinking for _ in prompts]

    def show(token: Token, held: str) -> None:
        """What is new in a row's text but for these characters at its end: dimmed in a thought, coloured by loops."""
        before, ids = said[token.row], [other.id for other in tokens[token.row]]
        after = (THINK * config.thinking + decode_text(tokenizer, ids)).rstrip(held)
        said[token.row], piece = after, after[len(before) :]
        thought = any(x.rfind(THINK) > x.rfind(END_THINK) for x in (before, after))
        style = " ".join(["dim"] * thought + [shade(token.loops)] * config.show_loops)
        shown[token.row].append(piece, style)
        if len(prompts) == 1 and style:
            console.print(Text(piece, style), end="")
        elif len(prompts) == 1:
            print(piece, end="", flush=True)  # as it is: rich would change its tabs

    how = {"max_tokens": config.max_tokens, "temperature": config.temperature, "top_p": config.top_p}
    how |= {"loops": config.loops, "cache": config.cache, "seeds": [f"{config.seed}/{i}" for i in range(len(prompts))]}
    for token in generate(net, prompts, exit=exit, done=lambda row, tokens: tokens[-1] in stops, **how):
        tokens[token.row].append(token)
        if config.json:
            print(json.dumps(token._asdict() | {"text": decode_text(tokenizer, [token.id])}), flush=True)
        else:
            show(token, "\ufffd")  # which may be a part of a character
    loops, seconds = [token.loops for row in tokens for token in row], time.perf_counter() - start
    total = {"tokens": len(loops), "loops": sum(loops) / len(loops), "tokens_per_s": len(loops) / seconds}
    if config.json:
        texts = [decode_text(tokenizer, [token.id for token in row]) for row in tokens]
        return print(json.dumps({"prompts": prompts, "texts": texts} | total))
    for prompt, row, continuation in zip(config.prompt, tokens, shown, strict=True):
        show(row[-1], "")
        if len(prompts) > 1:
            console.rule(Text(prompt.strip().split("\n")[0]), align="left")
        console.print(continuation if len(prompts) > 1 else "")
    if config.show_loops:
        console.print(legend(loops))
    note = "{tokens} tokens, {loops:.2f} loops on average, {tokens_per_s:.1f} tokens/s".format(**total)
    Console(stderr=True, markup=False, highlight=False).print(note, style="dim")


def show_chain(net: LoopedTransformer, tokenizer: Tokenizer, config: SampleConfig, exit: Exit, console: Console):
    """The built-in task has answers, not text to go on with: the value after each operand, and the loops it took."""
    for prompt in config.prompt:
        symbols, ids = prompt.split(), [*map(tokenizer.token_to_id, prompt.split())]
        if len(ids) % 2 == 0 or any((i is None) or (i < data.MODULUS) != (n % 2 == 0) for n, i in enumerate(ids)):
            problem = f"--prompt {prompt!r} is not chain arithmetic, which {config.folder} was trained on"
            raise UserError(f"{problem}: give operands 0 to 4 and operators + - × between them, as in '3 + 4 × 2'")
        out = net(torch.tensor([ids], device=net.embed_tokens.weight.device), loops=config.loops)
        logits, exits = logits_at_exit(net, exit, out.hidden[0, ::2], out.gate[0, ::2])  # N V, N
        for n, (answer, loops) in enumerate(zip(logits.argmax(-1).tolist(), exits.tolist(), strict=True)):
            line = f"{' '.join(symbols[: 2 * n + 1])} = {answer}    {loops} {'loop' if loops == 1 else 'loops'}"
            console.print(Text(line, shade(loops) if config.show_loops else ""))
        if config.show_loops:
            console.print(legend(exits.tolist()))


if __name__ == "__main__":
    run_cli(main)
