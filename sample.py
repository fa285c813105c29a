"""Text from a looped model whose gate really stops it: a token that leaves after loop l has run l loops.

    python sample.py out/rpt --prompt "Problem: ..." --exit-threshold 0.5 --show-loops

Prompts run at full depth. While decoding, every pass through the stack serves all rows at once, each at its own loop:
the weights are the same in every loop, so a row that leaves early starts its next token while others still think.
"""

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
from tokenizers.decoders import DecodeStream
from torch import Tensor

import data
from model import LoopedTransformer, ModelConfig, exit_loop
from support import checkpoint, text
from support.ranges import NonNegativeFloat, Positive, PositiveShare, Range, require_ranges
from support.runtime import DTYPES, Precision, UserError, pick_device, run_cli, seeded

CacheRule = Literal["copy", "last", "full"]
Ints = list[int]  # of rows of the cache: their numbers, or each one's loop or position


class Cache:
    """Keys and values of the tokens so far, preallocated for each loop of each layer. A row holds one prompt's tokens.
    A token at loop l attends to loop l of the tokens before it. One that left early has filled its first loops only;
    `fill_deeper` copies the last of them into the rest. With loops=1 (Ouro's sharing of the last loop's keys and
    values) every loop overwrites the one before, so that all loops of the next tokens attend to each token's last."""

    def __init__(self, c: ModelConfig, rows: int, length: int, *, loops: int, device: torch.device, dtype: torch.dtype):
        shape = c.layers, loops, rows, c.kv_heads, length, c.head_dim  # layers L B K S C
        self.loops, self.rows = loops, rows
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.attention = partial(F.scaled_dot_product_attention, enable_gqa=c.heads != c.kv_heads)

    def prefill_attention(self, rows: Ints, loop: int) -> Callable:
        """The attention of one loop over prompts, from position 0 on, which these rows of the cache keep."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for kept, new in (self.keys, k), (self.values, v):
                kept[layer, min(loop, self.loops - 1), rows, :, : new.shape[2]] = new
            return self.attention(q, k, v, is_causal=True)

        return attend

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
        state = net.loop(state, cos, sin, cache.prefill_attention(rows, loop))
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
    if exit.rule == "gate":
        leave = exit_loop(gate, exit.threshold)  # N
    else:
        confidence = net.logits(hidden[:, :-1]).softmax(-1).amax(-1)  # N L-1
        leave = ((confidence < exit.threshold) | (exit.threshold >= 1)).cumprod(-1).sum(-1)  # N
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


@dataclass(eq=False)
class Stream:
    """A prompt under way. Its newest token is at `position` and has run `loops_run` loops."""

    prompt: int  # which one
    slot: int  # its row of the cache
    position: int
    loops_run: int
    exit_loop: int  # the loop that says what comes next; 0 while that is open
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
    for n in map(len, prompts):
        if not 1 <= n <= most:
            raise UserError(f"the prompt has {n} tokens, the model {most} positions: give from 1 to {most} tokens")
    limits = [min(max_tokens, len(tokens)) for tokens in given] if given else [max_tokens] * len(prompts)
    length = min(max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)), most)
    size, kept_loops = min(batch or len(prompts), len(prompts)), 1 if cache == "last" else loops
    kv_cache = Cache(net.config, size, length, loops=kept_loops, device=weight.device, dtype=weight.dtype)
    generators, waiting = [seeded("draws", s) for s in seeds or range(len(prompts))], [*range(len(prompts))]

    # Of the newest token in each row: its state, its state at the exit, and log P(its gate has not stopped it)
    state, exit_state = weight.new_empty(2, size, net.config.width)  # R D, R D
    log_stay = weight.new_zeros(size, dtype=torch.promote_types(weight.dtype, torch.float32))  # R

    def start(slots: Ints) -> list[Stream]:
        """Waiting prompts at full depth, in these rows. No token sees the padding, and decoding overwrites it."""
        chosen = [waiting.pop(0) for _ in slots]
        streams = [Stream(p, slot, len(prompts[p]) - 1, loops, loops) for p, slot in zip(chosen, slots, strict=True)]
        if streams:
            ids = data.pad([prompts[s.prompt] for s in streams]).to(weight.device)  # R T
            hidden = prefill(net, ids, kv_cache, slots, loops)  # R T D
            exit_state[slots] = hidden[range(len(slots)), [s.position for s in streams]]
        return streams

    streams = start(list(range(size)))
    while streams:
        # Tokens that have left: the next one, which starts at the first loop
        if left := [s for s in streams if s.exit_loop and (cache != "full" or s.loops_run == loops)]:
            slots = [s.slot for s in left]
            logits = net.logits(exit_state[slots])  # R V
            likeliest = chosen = logits.argmax(-1).tolist()
            if given:
                chosen = [given[s.prompt][len(s.tokens)] for s in left]
            elif temperature:
                numbers = [torch.rand((), generator=generators[s.prompt]).item() for s in left]
                chosen = sample_tokens(logits, numbers, temperature=temperature, top_p=top_p)
            state[slots], log_stay[slots] = net.embed_tokens(torch.tensor(chosen, device=weight.device)), 0.0
            ended = []
            for s, token, best in zip(left, chosen, likeliest, strict=True):
                s.tokens.append(token)
                yield Token(s.prompt, token, s.exit_loop, best)
                s.position, s.loops_run, s.exit_loop = s.position + 1, 0, 0
                if done(s.prompt, s.tokens) or len(s.tokens) >= limits[s.prompt] or s.position >= most:
                    ended.append(s)

            # Waiting prompts take the rows of those that have ended; the cache wants its rows in order
            streams = [s for s in streams if s not in ended] + start([s.slot for s in ended[: len(waiting)]])
            streams.sort(key=lambda s: s.slot)

            # Without the rows that are free now, once they are half of them: the copy is worth it
            if len(streams) <= kv_cache.rows // 2:
                slots = [s.slot for s in streams]
                kv_cache.keep_rows(slots)
                state, exit_state, log_stay = state[slots], exit_state[slots], log_stay[slots]
                for slot, s in enumerate(streams):
                    s.slot = slot
            continue  # with the first tokens of prompts that have just started

        # One loop for every stream
        slots, positions = [s.slot for s in streams], [s.position for s in streams]
        state[slots] = decode(net, state[slots], kv_cache, slots, [s.loops_run for s in streams], positions)

        # Those whose score reaches the threshold leave here, and at the last loop those that are still there
        reached = [False] * len(streams)
        if exit.threshold < 1 and exit.rule == "gate":
            log_stay[slots] += F.logsigmoid(-net.gate(state[slots]))
            reached = (-torch.expm1(log_stay[slots]) >= exit.threshold).tolist()
        elif exit.threshold < 1:
            reached = (net.logits(state[slots]).softmax(-1).amax(-1) >= exit.threshold).tolist()
        open_slots = [s.slot for s in streams if not s.exit_loop]
        exit_state[open_slots] = state[open_slots]
        for s, enough in zip(streams, reached, strict=True):
            s.loops_run += 1
            if not s.exit_loop and (enough or s.loops_run == loops):
                s.exit_loop = s.loops_run
        if early := [s for s in streams if cache == "copy" and s.exit_loop and s.loops_run < loops]:
            kv_cache.fill_deeper([s.slot for s in early], [s.loops_run for s in early], [s.position for s in early])


# The command line


@dataclass(frozen=True, kw_only=True)
class GenerationFlags:
    """Of every script that loads one checkpoint and generates."""

    folder: Annotated[Path, tyro.conf.Positional]  # checkpoint folder, of this program or of Hugging Face
    # leave when the gate's cumulative probability reaches it; 0: first loop, 1: all loops (none: checkpoint's)
    exit_threshold: Annotated[float | None, Range(0, 1)] = None
    exit: str | None = None  # another rule: confidence:0.9 leaves when a token is that probable
    loops: Annotated[int | None, Range(1)] = None  # the most loops for a token (none: the checkpoint's)
    cache: CacheRule = "copy"  # deeper loops of a token that left: a copy of its last; the last only; or all loops run
    seed: int = 0  # of the draws
    device: str = "auto"  # cpu, cuda, cuda:1 (auto: a GPU if there is one)
    dtype: Precision = "auto"  # of weights and cache (auto: as stored)

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
    chat: bool = False  # each prompt is a user's turn, in ChatML
    max_tokens: Positive = 200  # most new tokens
    temperature: NonNegativeFloat = 0.0  # of the draw (0: the likeliest token)
    top_p: PositiveShare = 1.0  # draw among the likeliest tokens that hold this share together
    show_loops: bool = False  # colour each token by the loops it took

    def check(self) -> None:
        """Raise UserError for a value outside its range, and for a prompt that is no text."""
        require_ranges(self)
        if not self.prompt or "" in self.prompt:
            raise UserError("the prompt is empty: give some text to continue with --prompt")
        for prompt in self.prompt:
            if prompt != prompt.encode(errors="replace").decode():
                raise UserError(f"--prompt {prompt!r} is not UTF-8: give text")


def load_with_tokenizer(folder: Path, device: torch.device, dtype: Precision) -> tuple[LoopedTransformer, Tokenizer]:
    """The model and its tokenizer. Raises UserError for a folder that lacks one, or if they don't fit."""
    net = checkpoint.load(folder, device, None if dtype == "auto" else DTYPES[dtype])
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json: put the one that the checkpoint was trained with there")
    tokenizer = text.load_tokenizer(str(folder / "tokenizer.json"))
    text.check_vocabulary(tokenizer, folder)
    return net.eval(), tokenizer


def stop_ids(net: LoopedTransformer, tokenizer: Tokenizer) -> set[int]:
    """End of text, by the configuration and by the tokenizer, and the end of a turn."""
    eos = net.config.eos_token_id
    configured = {*eos} if isinstance(eos, tuple) else {eos}
    return (configured | {text.eos_id(tokenizer), tokenizer.token_to_id(text.IM_END)}) - {None}


COLOURS = ("bright_blue", "cyan", "yellow", "red", "magenta", "bright_black")  # of 1, 2, ... loops


def shade(loops: int) -> str:
    return COLOURS[min(loops, len(COLOURS)) - 1]


def legend(loops: list[int]) -> Text:
    """Each colour with its number of loops and the share of the tokens that took so many."""
    parts = [(f"{n} {loops.count(n) / len(loops):.0%}", shade(n)) for n in range(1, max(loops) + 1)]
    return Text("  ").join([Text("loops:"), *(Text(*part) for part in parts)])


def main() -> None:
    config = tyro.cli(SampleConfig, description=__doc__)
    config.check()
    net, tokenizer = load_with_tokenizer(config.folder, pick_device(config.device), config.dtype)
    exit = config.exit_rule(net.config.exit_threshold)
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    if data.is_chain(tokenizer):
        return show_chain(net, tokenizer, config, exit, console)
    texts = list(config.prompt)
    prompts = text.chat_prompts(tokenizer, texts) if config.chat else text.tokenize(tokenizer, texts, special=True)
    stops, streams = stop_ids(net, tokenizer), [DecodeStream(skip_special_tokens=True) for _ in prompts]
    shown, loops, start = [Text() for _ in prompts], [], time.perf_counter()
    how = {"max_tokens": config.max_tokens, "temperature": config.temperature, "top_p": config.top_p}
    how |= {"loops": config.loops, "cache": config.cache, "seeds": [f"{config.seed}/{i}" for i in range(len(prompts))]}
    for token in generate(net, prompts, exit=exit, done=lambda row, tokens: tokens[-1] in stops, **how):
        loops.append(token.loops)
        piece = streams[token.row].step(tokenizer, token.id) or ""
        if len(prompts) > 1:
            shown[token.row].append(piece, shade(token.loops) if config.show_loops else None)
        elif config.show_loops:
            console.print(Text(piece, shade(token.loops)), end="")
        else:
            print(piece, end="", flush=True)  # as it is: rich would change its tabs
    seconds = time.perf_counter() - start
    if len(prompts) == 1:
        console.print()
    for prompt, continuation in zip(config.prompt, shown, strict=True) if len(prompts) > 1 else ():
        console.rule(Text(prompt.strip().split("\n")[0]), align="left")
        console.print(continuation)
    if config.show_loops:
        console.print(legend(loops))
    note = f"{len(loops)} tokens, {sum(loops) / len(loops):.2f} loops on average, {len(loops) / seconds:.1f} tokens/s"
    Console(stderr=True, markup=False, highlight=False).print(note, style="dim")


def show_chain(net: LoopedTransformer, tokenizer: Tokenizer, config: SampleConfig, exit: Exit, console: Console):
    """The built-in task has answers, not text to go on with: the value after each operand, and the loops it took."""
    for prompt in config.prompt:
        symbols = prompt.split()
        ids = [tokenizer.token_to_id(symbol) for symbol in symbols]
        if len(ids) % 2 == 0 or any((i is None) or (i < data.MODULUS) != (n % 2 == 0) for n, i in enumerate(ids)):
            problem = f"--prompt {prompt!r} is not chain arithmetic, which {config.folder} was trained on"
            raise UserError(f"{problem}: give operands 0 to 4 and operators + - × between them, as in '3 + 4 × 2'")
        with torch.no_grad():
            out = net(torch.tensor([ids], device=net.embed_tokens.weight.device), loops=config.loops)
            logits, exits = logits_at_exit(net, exit, out.hidden[0, ::2], out.gate[0, ::2])  # N V, N
        for n, (answer, loops) in enumerate(zip(logits.argmax(-1).tolist(), exits.tolist(), strict=True)):
            line = f"{' '.join(symbols[: 2 * n + 1])} = {answer}    {loops} {'loop' if loops == 1 else 'loops'}"
            console.print(Text(line, shade(loops) if config.show_loops else ""))
        if config.show_loops:
            console.print(legend(exits.tolist()))


if __name__ == "__main__":
    run_cli(main)
