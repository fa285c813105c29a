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
from model import MAX_LOOPS, LoopedTransformer, exit_cdf
from support import checkpoint, text
from support.decoding import Cache, decode, draft_and_verify, draw, prefill
from support.ranges import Checked, NonNegative, NonNegativeFloat, Positive, PositiveShare, Range, unchecked
from support.runtime import DTYPES, Precision, UserError, pick_device, run_cli, seeded

CacheRule = Literal["copy", "last", "full"]


class Exit(NamedTuple):
    """Leave after the first loop whose score reaches the threshold, after the last loop if none does."""

    rule: str = "gate"  # its score: the gate's cumulative exit probability; the largest token probability; the loop
    threshold: float = 1.0  # of gate and confidence, 1 means all loops, however far the score is saturated

    def reached(self, net: LoopedTransformer, state: Tensor, share: Tensor, loop: Tensor) -> Tensor:
        """Whether tokens leave after this loop (from 1), which led to this state; share is the gate's score."""
        if self.rule == "loop":
            return loop >= self.threshold
        score = share if self.rule == "gate" or self.threshold >= 1 else net.logits(state).softmax(-1).amax(-1)
        return (score >= self.threshold) & (self.threshold < 1)


def logits_at_exit(net: LoopedTransformer, exit: Exit, hidden: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Logits where each token leaves, and that loop (from 1), when all loops have run.    N L D, N L -> N V, N"""
    loop = torch.arange(1, gate.shape[1], device=gate.device).expand(len(gate), -1)  # N L-1
    stays = ~exit.reached(net, hidden[:, :-1], exit_cdf(gate)[:, :-1], loop)  # N L-1
    leave = stays.cumprod(-1).sum(-1)  # N
    return net.logits(hidden[torch.arange(len(hidden), device=hidden.device), leave]), leave + 1


def distribution(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """What is drawn from: the likeliest tokens that hold the share top_p; the likeliest alone at a temperature of 0.
    R V -> R V, float64"""
    if not temperature:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    p = ((logits - logits.amax(-1, keepdim=True)).double() / temperature).softmax(-1)  # R V
    if top_p < 1:
        ranked, order = p.sort(dim=-1, descending=True, stable=True)
        beyond = ranked.cumsum(-1) - ranked >= top_p  # R V
        p = p.masked_fill(beyond.scatter(-1, order, beyond), 0)
    return p / p.sum(-1, keepdim=True)


class Token(NamedTuple):
    row: int  # which prompt it continues
    id: int
    loops: int  # how many loops it took; the first token of a row comes from its prompt, at full depth
    likeliest: int  # the most probable token there
    logp: float  # log P(id) where it left, of all tokens, at temperature 1 whatever it was drawn at
    exit: float  # the gate's cumulative exit probability there; 1 at the last loop


def apart_cost(device: torch.device, rows: int) -> float:
    """What a loop takes of rows at different loops, beside one of rows at the same; with the head in each. Measured."""
    return 1.25 + rows / 70 if device.type == "cuda" else 1.05 + rows / 160


@dataclass(eq=False)
class Stream:
    """A prompt under way. Its newest token is at `position` and has run `loops_run` loops."""

    prompt: int  # which one
    slot: int  # its row of the cache
    position: int
    loops_run: int
    exit_loop: int  # the loop that says what comes next; 0 while it is open
    exit_share: float = 1.0  # the gate's cumulative exit probability there
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
    verify: int = 0,
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
    verify   so many tokens are drafted by the exit, then all loops check them: the text is that of full depth
    batch    prompts side by side (default: all); when one ends, the next takes its place
    seeds    of each prompt's draws (default: its number)
    done     told a row and its new tokens after each of them; says whether the row ends there
    Raises UserError for a prompt that is empty, or longer than the model's positions."""
    most, weight, loops = net.config.max_positions, net.embed_tokens.weight, loops or net.config.loops
    if wrong := [n for n in map(len, prompts) if not 1 <= n <= most]:
        raise UserError(f"the prompt has {wrong[0]} tokens, the model {most} positions: give from 1 to {most} tokens")
    if verify < 0 or (verify and (given or cache != "copy")):
        raise UserError(f"verify {verify}: give 0 or more drafts, without `given` and with --cache copy")
    limits = [min(max_tokens, len(tokens)) for tokens in given] if given else [max_tokens] * len(prompts)
    length = min(max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)), most)
    size, kept_loops = min(batch or len(prompts), len(prompts)), 1 if cache == "last" else loops
    kv_cache = Cache(net.config, size, length, loops=kept_loops, device=weight.device, dtype=weight.dtype)
    generators, waiting = [seeded("draws", s) for s in seeds or range(len(prompts))], [*range(len(prompts))]
    told, spent = 0, 0  # tokens so far, and their loops
    streams, spread = [], partial(distribution, temperature=temperature, top_p=top_p)
    state, exit_state = weight.new_zeros(2, size, weight.shape[1])  # R D  of newest tokens; where they left
    log_stay = net.gate(state)  # R  log P(the gate has not stopped it); set to 0 at a token's start

    def numbers(streams: Sequence[Stream]) -> list[float]:
        return [torch.rand((), generator=generators[s.prompt]).item() for s in streams]

    def ends(s: Stream) -> bool:
        """Whether the token that was added last ends the prompt."""
        s.position += 1
        return done(s.prompt, s.tokens) or len(s.tokens) >= limits[s.prompt] or s.position >= most

    while streams or waiting:
        # Prompts take the free rows, at full depth. No token sees the padding, and decoding overwrites it
        if free := sorted({*range(kv_cache.rows)} - {s.slot for s in streams})[: len(waiting)]:
            begun, waiting = waiting[: len(free)], waiting[len(free) :]
            ids, last = data.pad([prompts[p] for p in begun]).to(weight.device), [len(prompts[p]) - 1 for p in begun]
            exit_state[free] = prefill(net, ids, kv_cache, free, loops)[range(len(free)), last]  # R D
            streams += map(partial(Stream, loops_run=loops, exit_loop=loops), begun, free, last)
            streams.sort(key=lambda s: s.slot)  # the cache wants its rows in order

        # Without the rows that are free now, once they are half of them: the copy is worth it
        if len(streams) <= kv_cache.rows // 2:
            kept = [s.slot for s in streams]
            kv_cache.keep_rows(kept)
            state, exit_state, log_stay = (x[kept] for x in (state, exit_state, log_stay))
            for slot, s in enumerate(streams):
                s.slot = slot

        # Tokens that have left: the next one, which starts at the first loop. Where few save a loop, all wait for all
        left = [s for s in streams if s.exit_loop and (cache != "full" or s.loops_run == loops)]
        running = [s for s in streams if s not in left]
        all_begin = not any(s.loops_run for s in running)  # they start one, too
        if left and (verify or all_begin or apart_cost(weight.device, size) * spent < told * loops):
            slots = [s.slot for s in left]
            logits = net.logits(exit_state[slots])  # R V
            likeliest = chosen = logits.argmax(-1)  # R
            if given:
                chosen = torch.tensor([given[s.prompt][len(s.tokens)] for s in left], device=weight.device)
            elif temperature:
                chosen = draw(spread(logits), numbers(left))
            logps = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
            state[slots], log_stay[slots] = net.embed_tokens(chosen), 0.0
            found = torch.stack([x.double() for x in (chosen, likeliest, logps)], -1).tolist()  # in one wait for a GPU
            for s, (token, best, logp) in zip(left, found, strict=True):
                s.tokens.append(int(token))
                yield Token(s.prompt, int(token), s.exit_loop, int(best), logp, s.exit_share)
                told, spent = told + 1, spent + s.exit_loop
                s.loops_run, s.exit_loop = 0, 0
                if ends(s):
                    streams.remove(s)
            continue  # with the first tokens of prompts that take the rows of those that have ended

        slots, ran, positions = map(list, zip(*((s.slot, s.loops_run, s.position) for s in running), strict=True))
        if verify:
            how = {"loops": loops, "reached": partial(exit.reached, net), "spread": spread}
            room = max(min(limits[s.prompt] - len(s.tokens), most - s.position) for s in streams)
            how |= {"drafts": min(verify, room), "numbers": partial(numbers, [*streams])}
            found = draft_and_verify(net, kv_cache, state[slots], slots, positions, **how)
            for s, tokens in zip([*streams], found, strict=True):
                for token in tokens:
                    s.tokens.append(token[0])
                    yield Token(s.prompt, *token)
                    if ends(s):
                        streams.remove(s)
                        break
            state[slots] = net.embed_tokens(torch.tensor([tokens[-1][0] for tokens in found], device=weight.device))
            continue

        # One loop for every stream that has not left
        now = decode(net, state[slots][:, None], kv_cache, slots, ran, positions)[:, 0]  # R D
        stay = log_stay[slots] + F.logsigmoid(-net.gate(now))  # R
        state[slots], log_stay[slots], shares = now, stay, -torch.expm1(stay)

        # Those whose score reaches the threshold leave here, and at the last loop those that are still there
        reached = exit.reached(net, now, shares, torch.tensor(ran, device=weight.device) + 1)  # R
        leaving, found = [], torch.stack((shares, reached.to(shares)), -1).tolist()  # in one wait for a GPU
        for i, (s, (share, enough)) in enumerate(zip(running, found, strict=True)):
            s.loops_run += 1
            if not s.exit_loop and (enough or s.loops_run == loops):
                s.exit_loop, s.exit_share = s.loops_run, share if s.loops_run < loops else 1.0
                leaving.append(i)
        exit_state[[slots[i] for i in leaving]] = now[leaving]


# The command line

THINK, END_THINK = "<think>", "</think>"  # the marks of a thought: tokens of their own, or spelled
COLOURS = ("bright_blue", "cyan", "yellow", "red", "magenta", "bright_black")  # of 1, 2, ... loops


@dataclass(frozen=True, kw_only=True)
class GenerationFlags(Checked):
    """Of every script that loads one checkpoint and generates."""

    folder: Annotated[Path, tyro.conf.Positional]  # checkpoint folder, of this program or of Hugging Face
    # leave when the gate's cumulative probability reaches it; 0: first loop, 1: all loops (none: checkpoint's)
    exit_threshold: Annotated[float | None, Range(0, 1)] = None
    exit: str | None = None  # another rule: confidence:0.9 leaves when a token is that probable, loop:2 after two loops
    loops: Annotated[int | None, Range(1, MAX_LOOPS)] = None  # the most loops for a token (none: the checkpoint's)
    cache: CacheRule = "copy"  # deeper loops of a token that left: a copy of its last; the last only; or all loops run
    verify: NonNegative = 0  # tokens that --exit drafts and full depth checks: its text, sooner (0: exits are final)
    chat: bool = False  # prompts as ChatML: each is a user's turn
    system: str | None = None  # a system's turn before it; implies --chat
    thinking: bool = False  # open the answer with <think>, as for Ouro's Thinking models; implies --chat
    seed: int = 0  # of the draws
    device: str = "auto"  # cpu, cuda, cuda:1 (auto: a GPU if there is one)
    dtype: Precision = "auto"  # of weights and cache (auto: as stored)

    def __post_init__(self) -> None:
        object.__setattr__(self, "chat", self.chat or self.thinking or self.system is not None)
        super().__post_init__()

    def check(self) -> None:
        super().check()
        if self.verify and self.cache != "copy":
            raise UserError(f"--verify {self.verify} has a cache of its own: leave --cache {self.cache} out")

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
            if rule == "loop" and 1 <= int(threshold) <= MAX_LOOPS:
                return Exit(rule, int(threshold))
        problem = f"--exit {self.exit} is not RULE:THRESHOLD (0 to 1), or loop:1 to loop:{MAX_LOOPS}"
        raise UserError(f"{problem}: give gate:0.9, confidence:0.9 or loop:2")


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


def load_with_tokenizer(folder: str | Path, device, dtype: Precision = "auto") -> tuple[LoopedTransformer, Tokenizer]:
    """The model and its tokenizer. Raises UserError for a folder that lacks one, or if they don't fit."""
    return checkpoint.load(folder, device, DTYPES.get(dtype)), text.pick_tokenizer("auto", folder)


def load_for(config: GenerationFlags) -> tuple[LoopedTransformer, Tokenizer, Exit]:
    net, tokenizer = load_with_tokenizer(config.folder, pick_device(config.device), config.dtype)
    if (config.loops or 0) > net.config.loops:
        print(f"{config.folder} was trained with {net.config.loops} loops, --loops is {config.loops}", file=sys.stderr)
    return net, tokenizer, config.exit_rule(net.config.exit_threshold)


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
    net, tokenizer, exit = load_for(config)
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    if data.is_chain(tokenizer):
        if config.json or config.chat:
            raise UserError(f"{config.folder} has no text, only chain arithmetic: leave --json and the chat flags out")
        return show_chain(net, tokenizer, config, Exit() if config.verify else exit, console)
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

    how = {flag: getattr(config, flag) for flag in ("max_tokens", "temperature", "top_p", "loops", "cache", "verify")}
    how["seeds"] = [f"{config.seed}/{i}" for i in range(len(prompts))]
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
