"""Passes through the stack by tokens that come one by one: the cache, draws, and drafts that full depth checks."""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from model import LoopedTransformer, ModelConfig
from support.runtime import to_device

Ints = list[int]  # of rows of the cache: their numbers, or each one's loop or position
LEAST = 128  # a recorded pass reads so many places of the cache, or twice, four times, ... as many


class Cache:
    """Keys and values, preallocated for each loop of each layer. A row holds one prompt's tokens.
    A token at loop l attends to loop l of the tokens before it. What it leaves at a loop stands in the deeper ones too,
    until it gets there: a token that leaves early leaves copies. With loops=1 every loop overwrites the one before, so
    that all loops of the next tokens attend to each token's last, as Ouro shares the last loop's keys and values."""

    def __init__(self, c: ModelConfig, rows: int, length: int, *, loops: int, device: torch.device, dtype: torch.dtype):
        shape = c.layers, loops, rows, c.kv_heads, length + 1, c.head_dim  # layers L B K S C
        self.loops, self.rows, self.nowhere = loops, rows, length  # the last place, which no token reads
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.attention = partial(F.scaled_dot_product_attention, enable_gqa=c.heads != c.kv_heads)
        self.recorded = {}  # passes on a GPU, by their shape

    def keep_rows(self, rows: Ints) -> None:
        """Only these rows, from now on numbered in this order."""
        self.keys, self.values, self.rows, self.recorded = self.keys[:, :, rows], self.values[:, :, rows], len(rows), {}


def prefill(net: LoopedTransformer, ids: Tensor, cache: Cache, rows: Ints, loops: int) -> Tensor:
    """All loops of prompts, which these rows of the cache keep; the state after the last one.    R T -> R T D"""
    state = net.embed_tokens(ids)
    for loop in range(loops):
        places = torch.tensor([rows, [min(loop, cache.loops - 1)] * len(rows), [0] * len(rows)], device=ids.device)
        state = run_pass(net, state, cache, places, 0)
    return state


def decode(net: LoopedTransformer, state: Tensor, cache: Cache, rows: Ints, loops: Ints, positions: Ints) -> Tensor:
    """One loop more for the T newest tokens of each of these rows of the cache.    R T D -> R T D
    loops      that they have run, each row its own
    positions  of each row's first one"""
    loops, length = [min(loop, cache.loops - 1) for loop in loops], min(max(positions) + state.shape[1], cache.nowhere)
    same, is_level = loops[0] if len({*loops}) == 1 else None, state.shape[1] == 1 and len({*positions}) == 1
    places = [[b, 0, cache.nowhere] for b in range(cache.rows)]  # rows that are not asked for write nowhere
    for place in zip(rows, loops, positions, strict=True):
        places[place[0]] = place
    if state.is_cuda:
        return replay(net, state, cache, rows, torch.tensor(places).T, length, same)
    if (same is None or 2 * len(rows) <= cache.rows) and not gather_rows_on(state.device):
        asked = torch.tensor([rows, loops, positions])
        return run_pass(net, state, cache, asked, length, listed=asked.T.tolist())
    every = state.new_zeros(cache.rows, *state.shape[1:]).index_copy(0, torch.tensor(rows), state)
    return run_pass(net, every, cache, torch.tensor(places).T, length, same, is_level)[rows]


def gather_rows_on(device: torch.device) -> bool:
    """Rows at different loops, in one kernel: on a CPU, copying what they have cached costs more than it saves."""
    return device.type == "cuda"


@torch.no_grad()
def run_pass(net, state, cache: Cache, places: Tensor, length: int, same=None, is_level=False, listed=()) -> Tensor:
    """One loop of R rows, each at its own loop and position; the cache keeps the tokens.    R T D, 3 R -> R T D
    places  number, loop and first position of each row; `listed` is the same, row by row, to attend so
    length  places of the cache that are read; 0: these are prompts, which begin at position 0 and read themselves
    same    the loop, if all rows of the cache are at it: nothing is copied; `is_level`: at the same place, too"""
    (row, loop, start), tokens = places, state.shape[1]
    position = (start[:, None] + torch.arange(tokens, device=start.device)).clamp(max=cache.nowhere)  # R T
    deeper = torch.arange(cache.loops, device=start.device).maximum(loop[:, None])[:, :, None]  # R L 1
    where = deeper, row[:, None, None], slice(None), position[:, None]  # R L T K C
    is_prompt, mask = length == 0, None  # all tokens see all places
    if not is_prompt and not is_level:
        mask = torch.arange(length, device=start.device) <= position[:, None, :, None]  # R 1 T S
    kept = [
        [x[:, at, b : b + 1, :, : min(first + tokens, length)].unbind() for x in (cache.keys, cache.values)]
        for b, at, first in listed
    ]  # of each row, of each layer: 1 K S C

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.keys[layer], cache.values[layer]  # L B K S C
        for all_rows, new in (keys, k), (values, v):
            all_rows[where] = rearrange(new, "r k t c -> r 1 t k c")
        if is_prompt:
            return cache.attention(q, k, v, is_causal=True)
        if same is not None:
            return cache.attention(q, keys[same, :, :, :length], values[same, :, :, :length], mask)
        if not kept:
            return cache.attention(q, keys[loop, row, :, :length], values[loop, row, :, :length], mask)
        masks = [None if tokens == 1 else mask[i, ..., : k[0].shape[2]] for i, (k, _) in enumerate(kept)]
        each = zip(q.split(1), kept, masks, strict=True)
        return torch.cat([cache.attention(x, k[layer], v[layer], mask) for x, (k, v), mask in each])

    return net.loop(state, *(x[:, None] for x in net.rotary(position)), attend)


def replay(net, state: Tensor, cache: Cache, rows: Ints, places: Tensor, length: int, same: int | None) -> Tensor:
    """`run_pass` of all rows of the cache, recorded once for each shape.    R T D, 3 B -> R T D"""
    length, device = min(LEAST << ((length - 1) // LEAST).bit_length(), cache.nowhere), state.device
    if (key := (state.shape[1], length, same)) not in cache.recorded:
        idle = torch.tensor([[b, 0, cache.nowhere] for b in range(cache.rows)], device=device).T.contiguous()
        inputs = state.new_zeros(cache.rows, *state.shape[1:]), idle
        record = partial(run_pass, net, inputs[0], cache, idle, length, same)
        stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            record()  # once before: libraries set themselves up
        torch.cuda.current_stream(device).wait_stream(stream)
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):
            output = record()
        cache.recorded[key] = graph, inputs, output
    graph, inputs, output = cache.recorded[key]
    chosen = to_device(torch.tensor(rows), device)
    inputs[0][chosen] = state
    inputs[1].copy_(to_device(places, device))
    graph.replay()
    return output[chosen]


def draw(p: Tensor, numbers: list[float]) -> Tensor:
    """A token for each row, in proportion to p, float64.    R V -> R
    numbers  where in 0..1 each row's draw falls, so that a row's text depends on its own draws alone"""
    upto = p.cumsum(-1)  # R V
    where = torch.tensor(numbers, device=p.device, dtype=p.dtype)[:, None] * upto[:, -1:]  # R 1
    return (upto[:, :-1] <= where).sum(-1)


def draft_and_verify(net, cache, newest, rows, positions, *, drafts, loops, reached, spread, numbers):
    """Tokens of full depth, most of whose loops run side by side: `drafts` tokens are drafted one after the other, by
    few loops each; then the loops that they lack run for all of them at once.    embeddings R D -> of each row, 1 to
    `drafts` tokens, with the loops of the draft, the likeliest token, log-probability and the gate's word (see Token)
    reached  whether tokens may leave, by state, cumulative exit probability and loop (from 1); all rows run until the
             last has left
    spread   logits to the probabilities that are drawn from, float64
    numbers  a number in 0..1 for each row
    The loops that a draft has run are the first ones of its full pass, because it reads no copies: before a token goes
    deeper, those before it are taken as deep. A draft x stays with probability full(x) / draft(x); the first that goes
    is drawn anew from what full depth gives more to, and those after it are forgotten. The text is as of full depth."""
    states, ran, told = newest[:, None], [0], []  # R T D, loops that each of the T tokens has run
    row = torch.arange(len(rows), device=newest.device)  # R

    def deepen(loop: int) -> None:
        """One loop more for the tokens that have run so many, the last ones."""
        nonlocal states
        first = ran.index(loop)
        ran[first:] = [loop + 1] * (len(ran) - first)
        at = rows, [loop] * len(rows), [position + first for position in positions]
        states = torch.cat((states[:, :first], decode(net, states[:, first:], cache, *at)), 1)

    while len(told) < drafts:
        if told:
            states, ran = torch.cat((states, net.embed_tokens(told[-1][0])[:, None]), 1), [*ran, 0]
        log_stay, has_left = torch.zeros_like(net.gate(newest)), row < 0  # R, R
        for loop in range(loops):
            deepen(loop)
            log_stay = log_stay + F.logsigmoid(-net.gate(states[:, -1]))
            share = -torch.expm1(log_stay) if loop + 1 < loops else torch.ones_like(log_stay)  # R
            has_left = has_left | reached(states[:, -1], share, torch.full_like(row, loop + 1))
            if has_left.all():
                break
        p = spread(net.logits(states[:, -1]))  # R V
        told.append((draw(p, numbers()), torch.full_like(row, loop + 1), share, p))

    for loop in range(ran[-1], loops):
        deepen(loop)
    token, ran_by, share, p = (torch.stack(x, 1) for x in zip(*told, strict=True))  # R T, R T, R T, R T V
    logits = net.logits(states)  # R T V
    full = spread(logits)  # R T V
    stays = (full / p).gather(-1, token[..., None])[..., 0]  # R T  probability, if below 1
    stays = stays > torch.tensor([numbers() for _ in told], device=p.device).T  # R T
    count = stays.long().cumprod(-1).sum(-1)  # R  drafts that stay
    last, goes = count.clamp(max=drafts - 1), count < drafts  # R
    instead = draw((full - p)[row, last].clamp(min=0), numbers())  # R
    for kept, new in (token, instead), (ran_by, loops), (share, 1.0):
        kept[row, last] = torch.where(goes, new, kept[row, last])
    logp = logits.log_softmax(-1).gather(-1, token[..., None])[..., 0]  # R T
    columns = zip(*(x.tolist() for x in (token, ran_by, logits.argmax(-1), logp, share)), strict=True)
    return [[*zip(*parts, strict=True)][:n] for parts, n in zip(columns, (count + goes).tolist(), strict=True)]
