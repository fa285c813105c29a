"""Batches: the built-in chain arithmetic, or documents from a file.

Chain arithmetic is worked out from left to right mod 5, and the running value is asked for at every operand. Text asks
for the next token, of the response only if there is a prompt. `mask` is True where there is a target:

    inputs     3   +   4   ×   2   -   1           Problem: 1+1?  Solution:  2      .
    targets    3       2       4       3                                     2  .   <|endoftext|>
    mask       x       x       x       x                                     x  x   x

A source answers `batch(index)` for every index from 0 on, so the position in the data is one integer. Batch `index` of
a seed always holds the same rows, however many processes share them: process r of w takes rows r, r + w, r + 2w, ...
From a file to a step: read_documents (support/text.py), encode, Documents.batch, collate, trim_and_move; then `train`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from support import text
from support.ranges import AtLeastTwo, Checked, Positive, Range, flag
from support.runtime import UserError, seeded, to_device


class Batch(NamedTuple):
    inputs: Tensor  # B T  token ids
    targets: Tensor  # B T  the token asked for at each position; the next one, for text
    mask: Tensor  # B T  True at target tokens; always on the CPU, so that counting them waits for no GPU


@dataclass(frozen=True)
class DataConfig(Checked, group="data."):
    """Where the rows come from."""

    path: Path | None = None  # .jsonl, .json, .parquet or .txt to train on (none: the built-in chain arithmetic)
    val: Path | None = None  # held-out file (none: 5 % of the rows of --data.path, at most 256)
    prompt_key: str | None = None  # key of the prompt (none: found among problem, question, prompt)
    response_key: str | None = None  # key of the response (none: found); alone: the key of plain text, or of messages
    tokenizer: str = "auto"  # path of a tokenizer.json, or 'bytes' (auto: the checkpoint's, else bytes)
    chat: bool = False  # prompt form: ChatML, as messages always have, instead of 'Problem: ...\nSolution: '
    length: Annotated[int | None, Range(2)] = None  # most tokens in a row; what is longer is cut (none: 4,096)
    operands: AtLeastTwo = 6  # operands in a row of chain arithmetic
    val_rows: Positive = 4096  # held-out rows of chain arithmetic

    def check(self) -> None:
        super().check()
        for name, needed in (("prompt_key", "response_key"), ("val", "path"), ("tokenizer", "path")):
            if (value := getattr(self, name)) not in (None, "auto") and not getattr(self, needed):
                way = f"came without --data.{needed.replace('_', '-')}: give that too"
                raise UserError(f"{flag(f'data.{name}', value)} {way}")

    def within(self, positions: int, owner: object) -> "DataConfig":
        """The same, with rows that a model of so many positions takes. Raises UserError for a length above them."""
        n = self.length or min(positions, text.MAX_LENGTH)
        if self.path and n > positions:
            raise UserError(f"--data.length {n} is more than the {positions} positions of {owner}: give a smaller one")
        return replace(self, length=n) if self.path and positions < text.MAX_LENGTH else self


# Chain arithmetic: a row asks every prefix of itself, and the n-th operand is a problem of known depth n

MODULUS, OPERATORS = 5, ("+", "-", "×")


class Chain:
    """Endless rows of chain arithmetic. One row in eight, by a hash of the row, is held out and never trained on."""

    def __init__(self, operands: int, *, batch: int, seed: object, held_out: int = 0):
        """held_out: 0 for the training rows; else the number of held-out rows, in batches that end."""
        self.operands, self.size, self.seed, self.held_out = operands, batch, seed, held_out
        self.batches = math.ceil(held_out / batch)  # in one pass over the held-out rows
        self.depth = torch.arange(2 * operands - 1) // 2 + 1  # T  how many operands the answer at a position depends on

    def batch(self, index: int, *, rank: int = 0, world: int = 1) -> Batch:
        size = min(self.size, self.held_out - index * self.size) if self.held_out else self.size
        generator = seeded(self.seed, "held out" if self.held_out else "train", index)
        kept = []
        while sum(len(operands) for operands, _ in kept) < size:
            operands = torch.randint(MODULUS, (16 * size, self.operands), generator=generator)
            operators = torch.randint(len(OPERATORS), (16 * size, self.operands - 1), generator=generator)
            code = torch.zeros_like(operands[:, 0])  # a multiplicative hash of the whole row
            for column in (*operands.T, *operators.T):
                code = (code * 1_000_003 + column + 1) % 2_147_483_647
            keep = (code * 48_271 % 2_147_483_647 % 8 == 0) == bool(self.held_out)
            kept.append((operands[keep], operators[keep]))
        operands, operators = (torch.cat(part)[:size][rank::world] for part in zip(*kept, strict=True))
        return chain_batch(operands, operators)


def chain_batch(operands: Tensor, operators: Tensor) -> Batch:
    """B n operands, B n-1 operators -> a batch with T = 2n - 1."""
    values = [operands[:, 0]]
    for operator, operand in zip(operators.T, operands[:, 1:].T, strict=True):
        v = values[-1]
        values.append(torch.stack((v + operand, v - operand, v * operand)).gather(0, operator[None])[0] % MODULUS)
    inputs = operands.new_zeros(len(operands), 2 * operands.shape[1] - 1)  # B T
    inputs[:, ::2], inputs[:, 1::2] = operands, MODULUS + operators
    targets, mask = torch.zeros_like(inputs), torch.zeros_like(inputs, dtype=torch.bool)
    targets[:, ::2], mask[:, ::2] = torch.stack(values, 1), True
    return Batch(inputs, targets, mask)


def chain_tokenizer() -> Tokenizer:
    """The eight symbols of chain arithmetic."""
    symbols = [*map(str, range(MODULUS)), *OPERATORS]
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token=symbols[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return tokenizer


def is_chain(tokenizer: Tokenizer) -> bool:
    return tokenizer.get_vocab() == chain_tokenizer().get_vocab()


# Documents


class Row(NamedTuple):
    ids: list[int]
    prompt: int  # how many of them are the prompt's, and no targets; at least 1
    answers: Sequence[tuple[int, int]] = ()  # from where to where, in a chat: only they are targets


Rows = list[Row] | None  # None: the built-in task


def encode(path: str | Path, tokenizer: Tokenizer, config: DataConfig) -> tuple[list[Row], list[str]]:
    """Rows of at most length + 1 tokens, and sentences on what was cut or left out.
    Prompt and response are tokenized apart, so the boundary is exact, and no text ends itself or its turn.
    Raises UserError for what `read_documents` refuses, a tokenizer that can't end a text, and a file without target."""
    found = text.read_documents(path, config.prompt_key, config.response_key)
    most, eos = (config.length or text.MAX_LENGTH) + 1, text.eos_id(tokenizer)
    if is_chain(tokenizer) or eos is None:
        raise UserError(f"the tokenizer has none of {text.EOS_NAMES}: give another, or a checkpoint trained on text")
    is_chat, silent = isinstance(found[0], list), 0
    if not is_chat and found[0][0] is None:
        documents = [[*r, eos] for r in text.tokenize(tokenizer, [r for _, r in found], added=True)]
        whole = [Row(d[i : i + most], 1) for d in documents for i in range(0, len(d) - 1, most - 1)]
    elif is_chat or config.chat:
        chats = found if is_chat else [[("user", p), ("assistant", r)] for p, r in found]
        whole = [Row(ids, a[0][0], a) for ids, a in text.encode_chats(tokenizer, chats) if a]  # answers
        silent = len(found) - len(whole)
    else:
        prompts = text.tokenize(tokenizer, [f"Problem: {p}\nSolution: " for p, _ in found])
        responses = text.tokenize(tokenizer, [r for _, r in found], added=True)
        whole = [Row([*p, *r, eos], len(p)) for p, r in zip(prompts, responses, strict=True)]
    rows = [row._replace(ids=row.ids[:most]) for row in whole if row.prompt < most]
    counts = {
        "have no turn of the assistant and are left out": silent,
        f"are longer than --data.length {most - 1} and are cut": sum(row.prompt < most < len(row.ids) for row in whole),
        "are left out, their prompt alone fills the row": len(whole) - len(rows),
    }
    notes = [f"{path}: {n} of {len(found)} documents {what}" for what, n in counts.items() if n]
    if not rows:
        raise UserError(f"{path} has no target token: give longer texts, answered chats, or a larger --data.length")
    return rows, notes


class Documents:
    """One document per row; rows of like length share a batch; each document once per epoch, in an order from the seed.
    batch  rows in a global batch, at most (the batches of an epoch are of nearly equal size)"""

    pool = 64  # batches whose documents are sorted by length together

    def __init__(self, rows: list[Row], *, batch: int, seed: object):
        self.rows, self.size, self.seed = rows, batch, seed
        self.lengths = torch.tensor([len(r.ids) for r in rows])
        self.depth, self.order = None, lru_cache(maxsize=1)(self.shuffle)
        self.batches = math.ceil(len(rows) / batch)  # in an epoch

    def shuffle(self, epoch: int) -> list[Tensor]:
        """The rows of each batch of an epoch."""
        generator, batches = seeded(self.seed, "epoch", epoch), []
        chunks = torch.randperm(len(self.rows), generator=generator).tensor_split(self.batches)
        for some in (chunks[i : i + self.pool] for i in range(0, len(chunks), self.pool)):
            pool = torch.cat(some)
            batches += pool[self.lengths[pool].argsort(stable=True)].split([*map(len, some)])
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]

    def batch(self, index: int, *, rank: int = 0, world: int = 1) -> Batch:
        epoch, place = divmod(index, self.batches)
        return collate([self.rows[i] for i in self.order(epoch)[place][rank::world]])


def collate(rows: list[Row]) -> Batch:
    """The rows, padded on the right; the token after each one is its target."""
    ids = pad([row.ids for row in rows]) if rows else torch.zeros(0, 2, dtype=torch.long)  # B T+1
    mask = torch.zeros_like(ids[:, 1:], dtype=torch.bool)  # B T
    for b, row in enumerate(rows):
        for start, end in row.answers or [(row.prompt, len(row.ids))]:
            mask[b, start - 1 : min(end, len(row.ids)) - 1] = True  # a row may be cut within an answer
    return Batch(ids[:, :-1], ids[:, 1:], mask)


def pad(rows: list[list[int]]) -> Tensor:
    """Token ids, padded on the right with zeros.    -> B T"""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)


def trim_and_move(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, without the columns after the last target token: nothing reads them.
    A batch without a target token becomes two tokens that are none: other processes may wait for this one's passes."""
    if not batch.mask.any():
        idle = torch.zeros(1, 2, dtype=torch.long, device=device)
        return Batch(idle, idle, torch.zeros(1, 2, dtype=torch.bool))
    length = int(batch.mask.any(0).nonzero().max()) + 1
    return Batch(*(to_device(part[:, :length], device) for part in batch[:2]), batch.mask[:, :length])


def source(rows: Rows, config: DataConfig, *, batch: int, seed: object, held_out: bool = False):
    """Batches of these rows, or of chain arithmetic if there are none.    -> Documents or Chain"""
    if rows is not None:
        return Documents(rows, batch=batch, seed=seed)
    return Chain(config.operands, batch=batch, seed=seed, held_out=config.val_rows if held_out else 0)


def split(config: DataConfig, tokenizer: Tokenizer, *, seed: int, world: int = 1) -> tuple[Rows, Rows, list[str]]:
    """Rows to train on, rows held out, and sentences on what was cut; None and None for the built-in task."""
    if config.path is None:
        return None, None, []
    train, notes = encode(config.path, tokenizer, config)
    if config.val:
        val, val_notes = encode(config.val, tokenizer, config)
        notes += val_notes
    else:
        order = torch.randperm(len(train), generator=seeded(seed, "held out")).tolist()
        n = min(256, math.ceil(len(train) / 20))
        train, val = [train[i] for i in order[n:]], [train[i] for i in order[:n]]
    if len(train) < world:
        raise UserError(f"{config.path} has {len(train)} training rows for {world} processes: give more or --data.val")
    return train, val, notes


def pick_tokenizer(config: DataConfig, checkpoint: str | Path | None) -> Tokenizer:
    """The one asked for, else the checkpoint's own, else the built-in task's or the bytes.
    Raises UserError for what `text.pick_tokenizer` refuses, and a checkpoint trained on text while no text is given."""
    built_in = text.byte_tokenizer() if config.path else chain_tokenizer()
    tokenizer = text.pick_tokenizer(config.tokenizer, checkpoint, built_in)
    if config.path is None and not is_chain(tokenizer):
        raise UserError(f"{checkpoint} was trained on text, not on the built-in chain arithmetic: give --data.path")
    return tokenizer
