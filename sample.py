"""Text from a looped model whose gate really stops it: a token that leaves after loop l has run l loops.

    python sample.py out/rpt --prompt "Problem: ..." --exit-threshold 0.5 --show-loops

Prompts run at full depth. While decoding, every pass through the stack serves all rows at once, each at its own loop:
the weights are the same in every loop, so a row that leaves early starts its next token while others still think.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.style import Style
from rich.text import Text
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

import data
import model
from model import Cache, LoopedTransformer, Precision, UserError, pick_device, report

CacheRule = Literal["copy", "last", "full"]


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
# Where to leave


class Exit(NamedTuple):
    """Leave after the first loop whose score reaches the threshold, after the last loop if none does."""

    rule: str = "gate"  # score: the gate's cumulative exit probability; or 'confidence', the largest token probability
    threshold: float = 1.0

    def never(self) -> bool:
        """A threshold of 1 means all loops, however far the score is saturated."""
        return self.threshold >= 1


RULES = ("gate", "confidence")


def parse_exit(exit: str | None, threshold: float | None, default: float) -> Exit:
    """From the flags --exit RULE:THRESHOLD and --exit-threshold. Raises UserError for what they can't be."""
    if exit and threshold is not None:
        raise UserError(f"--exit {exit} and --exit-threshold {threshold} are two rules: give one of them")
    if exit is None:
        rule, flag, value = "gate", "--exit-threshold", default if threshold is None else threshold
    else:
        rule, _, value = exit.partition(":")
        flag = "--exit"
        try:
            value = float(value)
        except ValueError:
            rule = ""
        if rule not in RULES:
            known = " or ".join(f"{rule}:0.9" for rule in RULES)
            raise UserError(f"--exit {exit} is not a rule and its threshold: give {known}")
    if not 0 <= value <= 1:
        raise UserError(
            f"{flag} {exit or value} is outside 0..1: give a threshold from 0 (first loop) to 1 (all loops)"
        )
    return Exit(rule, value)


def at_exit(net: LoopedTransformer, exit: Exit, hidden: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Logits where each token leaves, and that loop (from 1), when all loops have run.    N L D, N L -> N V, N"""
    every = torch.arange(len(hidden), device=hidden.device)
    if exit.rule == "gate":
        leave = model.exit_loop(gate, exit.threshold)  # N
        return net.logits(hidden[every, leave]), leave + 1
    logits = net.logits(hidden)  # N L V
    unsure = (logits[:, :-1].softmax(-1).amax(-1) < exit.threshold) | exit.never()  # N L-1
    leave = unsure.cumprod(-1).sum(-1)  # N
    return logits[every, leave], leave + 1


# ---------------------------------------------------------------------------------------------------------------------
# Generation


class Token(NamedTuple):
    row: int  # which prompt it continues
    id: int
    loops: int  # how many loops it took; the first token of a row comes from its prompt, at full depth


def draw(logits: Tensor, numbers: list[float], *, temperature: float, top_p: float) -> list[int]:
    """A token for each row; numbers: where in 0..1 each row's draw falls, so a row's text depends on its own alone.

    R V -> R. Temperature 0 takes the likeliest; top_p keeps the likeliest tokens that hold this share together.
    """
    if temperature == 0:
        return logits.argmax(-1).tolist()
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)  # R V
    all_of_them = torch.arange(p.shape[-1], device=p.device).expand_as(p)
    order = p.argsort(dim=-1, descending=True, stable=True) if top_p < 1 else all_of_them  # R V
    upto = p.gather(-1, order).cumsum(-1)  # R V
    mass = upto.gather(-1, (upto < top_p).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1))  # R 1
    where = torch.tensor(numbers, device=p.device, dtype=p.dtype)[:, None] * mass
    return order.gather(-1, (upto < where).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)).squeeze(-1).tolist()


@torch.no_grad()
def generate(
    net: LoopedTransformer,
    prompts: list[list[int]],
    *,
    max_tokens: int,
    exit: Exit = Exit(),  # noqa: B008  it is a constant
    loops: int | None = None,
    cache: CacheRule = "copy",
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch: int | None = None,
    seeds: Sequence[object] | None = None,
    done: Callable[[int, list[int]], bool] = lambda row, text: False,
) -> Iterator[Token]:
    """Continue every prompt; tokens come as they are found, in no order over the rows.

    prompts  token ids, of any lengths
    loops    the most that a token may take (default: the model's)
    cache    'copy': a token that left fills its deeper slots with its last loop's keys and values. 'last': one slot,
             for the last loop of every token, a quarter of the memory at four loops. 'full': every loop runs, so the
             cache is exact and no time is saved; the exit says only which loop's answer is taken
    batch    prompts side by side (default: all); when one ends, the next takes its place
    seeds    of each prompt's draws (default: its number)
    done     told a row and its new tokens after each of them; says whether the row ends there
    Raises UserError for an empty prompt, or one longer than the model's positions.
    """
    most, device, weight = net.config.max_positions, net.embed_tokens.weight.device, net.embed_tokens.weight
    for prompt in prompts:
        if not prompt:
            raise UserError("the prompt is empty: give at least one token to continue")
        if len(prompt) > most:
            raise UserError(f"the prompt has {len(prompt)} tokens, the model {most} positions: give a shorter one")
    loops = loops or net.config.loops
    lengths = [len(prompt) for prompt in prompts]
    longest = min(max(lengths) + max_tokens, most)
    n, slots = min(batch or len(prompts), len(prompts)), 1 if cache == "last" else loops
    kept = Cache(net.config, n, longest, slots=slots, device=device, dtype=weight.dtype)
    generators = [data.seeded("draws", seed) for seed in seeds or range(len(prompts))]
    texts: list[list[int]] = [[] for _ in prompts]

    def prefill(chosen: list[int], rows: list[int]) -> Tensor:
        """Prompts at full depth. Padding on the right is seen by no token, and decoding overwrites it.    -> R V"""
        ids = torch.zeros(len(chosen), max(lengths[p] for p in chosen), dtype=torch.long)  # R T
        for r, p in enumerate(chosen):
            ids[r, : lengths[p]] = torch.tensor(prompts[p])
        hidden = net.prefill(ids.to(device), kept, rows, loops)  # R T D
        return net.logits(hidden[range(len(chosen)), [lengths[p] - 1 for p in chosen]])

    # One entry for each prompt under way (R of them), in a row of the cache. Its newest token has run `ran` loops;
    # `answer` is what its loop `took` says comes next, and took is 0 while that is open
    owners, rows, waiting = list(range(n)), list(range(n)), list(range(n, len(prompts)))
    positions, ran, took = [lengths[p] - 1 for p in owners], [loops] * n, [loops] * n
    answer = prefill(owners, rows)  # R V
    state, log_stay = weight.new_empty(n, net.config.width), answer.new_zeros(n)  # R D, R
    left = list(range(n))
    while True:
        # Tokens that have left: the next one, and back to the first loop
        if left:
            numbers = [torch.rand((), generator=generators[owners[i]]).item() for i in left] if temperature else []
            found = draw(answer[left], numbers, temperature=temperature, top_p=top_p)
            ended = []
            for i, token in zip(left, found, strict=True):
                text = texts[owners[i]]
                text.append(token)
                yield Token(owners[i], token, took[i])
                positions[i] += 1
                if done(owners[i], text) or len(text) >= max_tokens or positions[i] >= most:
                    ended.append(i)
                ran[i] = took[i] = 0
            state[left], log_stay[left] = net.embed_tokens(torch.tensor(found, device=device)), 0.0

            # Prompts that have ended: the next ones take their rows, or the rest goes on without them
            if fresh := ended[: len(waiting)]:
                chosen, waiting = waiting[: len(fresh)], waiting[len(fresh) :]
                answer[fresh] = prefill(chosen, [rows[i] for i in fresh])
                for i, p in zip(fresh, chosen, strict=True):
                    owners[i], positions[i], ran[i], took[i] = p, lengths[p] - 1, loops, loops
            if gone := {*ended[len(fresh) :]}:
                on = [i for i in range(len(rows)) if i not in gone]
                if not on:
                    return
                owners, rows, positions, ran, took = ([x[i] for i in on] for x in (owners, rows, positions, ran, took))
                state, answer, log_stay = state[on], answer[on], log_stay[on]
                if len(rows) <= kept.rows // 2:  # enough have ended: the cache is worth copying
                    kept.keep(rows)
                    rows = list(range(len(rows)))
            left = [i for i in range(len(rows)) if took[i]]
            if left:
                continue

        # One loop for every row
        state = net.decode(state, kept, rows, ran, positions)
        ran = [n + 1 for n in ran]

        # Whose answer stands, and who leaves
        logits = None
        if exit.never():
            enough = [n == loops for n in ran]
        else:
            if exit.rule == "gate":
                log_stay = log_stay + F.logsigmoid(-net.gate(state))
                score = -torch.expm1(log_stay)  # R
            else:
                logits = net.logits(state)  # R V
                score = logits.softmax(-1).amax(-1)  # R
            enough = [e or n == loops for e, n in zip((score >= exit.threshold).tolist(), ran, strict=True)]
        if chosen := [i for i, e in enumerate(enough) if e and not took[i]]:
            answer[chosen] = net.logits(state[chosen]) if logits is None else logits[chosen]
            for i in chosen:
                took[i] = ran[i]
        left = [i for i in range(len(rows)) if (ran[i] == loops if cache == "full" else took[i])]
        if cache == "copy" and (short := [i for i in left if ran[i] < loops]):
            kept.fill(*([x[i] for i in short] for x in (rows, ran, positions)))


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@dataclass(frozen=True)
class SampleConfig:
    """Continue prompts. A token that leaves after loop l has run l loops; prompts run at full depth."""

    folder: Annotated[Path, tyro.conf.Positional]  # checkpoint folder, of this program or of Hugging Face
    prompt: tuple[str, ...]  # text to continue; several are continued side by side
    chat: bool = False  # each prompt is a user's turn, in ChatML
    max_tokens: int = 200  # most new tokens
    temperature: float = 0.0  # of the draw (0: the likeliest token)
    top_p: float = 1.0  # draw among the likeliest tokens that hold this share together
    exit_threshold: float | None = None  # leave when the gate's cumulative probability reaches it (none: checkpoint's)
    exit: str | None = None  # another rule: confidence:0.9 leaves when a token is that probable
    loops: int | None = None  # the most loops for a token (none: the checkpoint's)
    cache: CacheRule = "copy"  # deeper slots of a token that left: its last loop's; one slot; or all loops run
    show_loops: bool = False  # colour each token by the loops it took
    seed: int = 0  # of the draws
    device: str = "auto"  # cpu, cuda, cuda:1 (auto: a GPU if there is one)
    dtype: Precision = "auto"  # of weights and cache (auto: as stored)

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        if not self.prompt or "" in self.prompt:
            raise UserError("the prompt is empty: give some text to continue with --prompt")
        for prompt in self.prompt:
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"--prompt {prompt!r} is not UTF-8: give text") from error
        if self.max_tokens < 1:
            raise UserError(f"--max-tokens {self.max_tokens} is below 1: give a positive number")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature} is out of its range: give a number from 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} is out of its range: give a share above 0, at most 1")
        check_loops(self.loops)


def check_loops(loops: int | None) -> None:
    if loops is not None and loops < 1:
        raise UserError(f"--loops {loops} is below 1: give a positive number")


def load(folder: Path, device: torch.device, dtype: Precision) -> tuple[LoopedTransformer, Tokenizer]:
    """The model and its tokenizer. Raises UserError for a folder that lacks one, or if they don't fit."""
    net = model.load(folder, device, None if dtype == "auto" else model.DTYPES[dtype])
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json: put the one that the checkpoint was trained with there")
    tokenizer = data.load_tokenizer(str(folder / "tokenizer.json"))
    data.check_vocabulary(tokenizer, folder)
    return net.eval(), tokenizer


def stop_ids(net: LoopedTransformer, tokenizer: Tokenizer) -> set[int]:
    """End of text, by the configuration and by the tokenizer, and the end of a turn."""
    eos = net.config.eos_token_id
    found = {*eos} if isinstance(eos, tuple) else {eos}
    return (found | {data.eos_id(tokenizer), tokenizer.token_to_id(data.IM_END)}) - {None}


COLOURS = ("bright_blue", "cyan", "yellow", "red", "magenta", "bright_black")  # of 1, 2, ... loops


def shade(loops: int) -> Style:
    return Style(color=COLOURS[min(loops, len(COLOURS)) - 1])


def legend(loops: list[int]) -> Text:
    """Each colour with its number of loops and the share of the tokens that took so many."""
    parts = [(f"{n} {loops.count(n) / len(loops):.0%}", shade(n)) for n in range(1, max(loops) + 1)]
    return Text("  ").join([Text("loops:"), *(Text(text, style) for text, style in parts)])


def main() -> None:
    config = tyro.cli(SampleConfig, description=__doc__)
    config.check()
    net, tokenizer = load(config.folder, pick_device(config.device), config.dtype)
    exit = parse_exit(config.exit, config.exit_threshold, net.config.exit_threshold)
    console = Console(highlight=False, soft_wrap=True)
    if data.is_chain(tokenizer):
        return show_chain(net, tokenizer, config, exit, console)
    prompts = data.chat_prompts(tokenizer, list(config.prompt)) if config.chat else None
    prompts = prompts or data.ids(tokenizer, list(config.prompt), special=True)
    stops, streams = stop_ids(net, tokenizer), [DecodeStream(skip_special_tokens=True) for _ in prompts]
    texts, taken, start = [Text() for _ in prompts], [], time.perf_counter()
    for row, token, loops in generate(
        net,
        prompts,
        max_tokens=config.max_tokens,
        exit=exit,
        loops=config.loops,
        cache=config.cache,
        temperature=config.temperature,
        top_p=config.top_p,
        seeds=[f"{config.seed}/{i}" for i in range(len(prompts))],
        done=lambda row, text: text[-1] in stops,
    ):
        taken.append(loops)
        piece = Text(streams[row].step(tokenizer, token) or "", shade(loops) if config.show_loops else "")
        texts[row].append(piece)
        if len(prompts) == 1 and config.show_loops:
            console.print(piece, end="")
        elif len(prompts) == 1:
            print(piece.plain, end="", flush=True)  # as it is: rich would change its tabs
    if len(prompts) == 1:
        console.print()
    for prompt, text in zip(config.prompt, texts, strict=True):
        if len(prompts) > 1:
            console.rule(Text(prompt.strip().split("\n")[0]), align="left")
            console.print(text)
    seconds = time.perf_counter() - start
    if config.show_loops:
        console.print(legend(taken))
    note = f"{len(taken)} tokens, {sum(taken) / len(taken):.2f} loops on average, {len(taken) / seconds:.1f} tokens/s"
    Console(stderr=True, highlight=False).print(note, style="dim")


def show_chain(
    net: LoopedTransformer, tokenizer: Tokenizer, config: SampleConfig, exit: Exit, console: Console
) -> None:
    """The built-in task has answers, not text to go on with: the value after each operand, and the loops it took."""
    for prompt in config.prompt:
        symbols = prompt.split()
        ids = [tokenizer.token_to_id(symbol) for symbol in symbols]
        if len(ids) % 2 == 0 or any((i is None) or (i < data.MODULUS) != (n % 2 == 0) for n, i in enumerate(ids)):
            raise UserError(
                f"--prompt {prompt!r} is not chain arithmetic, which {config.folder} was trained on: "
                "give operands 0 to 4 and operators + - × between them, as in '3 + 4 × 2'"
            )
        with torch.no_grad():
            out = net(torch.tensor([ids], device=net.embed_tokens.weight.device), loops=config.loops)
            logits, taken = at_exit(net, exit, out.hidden[0, ::2], out.gate[0, ::2])  # N V, N
        answers, taken = logits.argmax(-1).tolist(), taken.tolist()
        for n, (answer, loops) in enumerate(zip(answers, taken, strict=True)):
            asked = " ".join(symbols[: 2 * n + 1])
            line = f"{asked} = {answer}    {loops} loop{'s' * (loops > 1)}"
            console.print(Text(line, shade(loops) if config.show_loops else ""))
        if config.show_loops:
            console.print(legend(taken))


if __name__ == "__main__":
    report(main)
