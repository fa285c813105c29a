"""Batches: the built-in chain arithmetic, or documents from a file; and the tokenizers.

A source answers `batch(index)` for every index from 0 on, so the position in the data is one integer. Batch `index` of
a seed always holds the same rows, however many processes share them: process r of w takes rows r, r + w, r + 2w, ...

    python data.py tokenizer --path train.jsonl --vocab 4096 --out tokenizer.json     trains a tokenizer
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from model import UserError, load_config, report


class Batch(NamedTuple):
    inputs: Tensor  # B T  token ids
    targets: Tensor  # B T  what is asked at each position; the next token, for text
    mask: Tensor  # B T  True where the answer counts; always on the CPU, so that to count them waits for no GPU


@dataclass(frozen=True)
class DataConfig:
    """Where the rows come from."""

    path: Path | None = None  # .jsonl, .json, .parquet or .txt to train on (none: the built-in chain arithmetic)
    val: Path | None = None  # held-out file (none: 5 % of the rows of --data.path, at most 256)
    prompt_key: str | None = None  # key of the prompt (none: found among problem, question, prompt)
    response_key: str | None = None  # key of the response (none: found); alone: the key of plain text
    tokenizer: str = "auto"  # path of a tokenizer.json, or 'bytes' (auto: the checkpoint's, else bytes)
    chat: bool = False  # prompt form: ChatML instead of 'Problem: ...\nSolution: '
    length: int = 512  # most tokens in a row; longer documents are cut, plain text is cut into blocks
    operands: int = 6  # operands in a row of chain arithmetic
    val_rows: int = 4096  # held-out rows of chain arithmetic

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        if self.length < 2:
            raise UserError(f"--data.length {self.length} is too short: a row needs at least 2 tokens")
        if self.operands < 2:
            raise UserError(f"--data.operands {self.operands} leaves nothing to compute: give 2 or more")
        if self.val_rows < 1:
            raise UserError(f"--data.val-rows {self.val_rows} leaves nothing to evaluate: give 1 or more")
        if self.prompt_key and not self.response_key:
            raise UserError(f"--data.prompt-key {self.prompt_key} came alone: give --data.response-key too")
        if self.val and not self.path:
            raise UserError(f"--data.val {self.val} came without --data.path: give the file to train on too")
        if self.tokenizer != "auto" and not self.path:
            raise UserError(
                f"--data.tokenizer {self.tokenizer} came without --data.path: the built-in task has its own"
            )


def seeded(*key, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose numbers depend on the key and the kind of device alone."""
    return torch.Generator(device).manual_seed(random.Random("/".join(map(str, key))).getrandbits(62))


# ---------------------------------------------------------------------------------------------------------------------
# Chain arithmetic: a row is operand, operator, operand, ..., evaluated left to right mod 5. The running value is asked
# at every operand, so a row asks every prefix of itself, and the n-th operand is a problem of known depth n.

MODULUS, OPERATORS = 5, ("+", "-", "×")


class Chain:
    """Endless rows of chain arithmetic. One row in eight, by a hash of the row, is held out and never trained on."""

    def __init__(self, operands: int, *, batch: int, seed: object, held_out: int = 0):
        """held_out: 0 for the training rows; else the number of held-out rows, in batches that end."""
        self.operands, self.size, self.seed, self.held_out = operands, batch, seed, held_out
        self.batches = -(-held_out // batch)  # in one pass over the held-out rows
        self.depth = torch.arange(2 * operands - 1) // 2 + 1  # T  how many operands the answer at a position depends on

    def batch(self, index: int, *, rank: int = 0, world: int = 1) -> Batch:
        size = min(self.size, self.held_out - index * self.size) if self.held_out else self.size
        generator = seeded(self.seed, "held out" if self.held_out else "train", index)
        found, n = [], 0
        while n < size:
            operands = torch.randint(MODULUS, (16 * size, self.operands), generator=generator)
            operators = torch.randint(len(OPERATORS), (16 * size, self.operands - 1), generator=generator)
            keep = self.is_held_out(operands, operators) == bool(self.held_out)
            found.append((operands[keep], operators[keep]))
            n += int(keep.sum())
        operands, operators = (torch.cat(part)[:size][rank::world] for part in zip(*found, strict=True))
        return chain_batch(operands, operators)

    @staticmethod
    def is_held_out(operands: Tensor, operators: Tensor) -> Tensor:
        """B n, B n-1 -> B  by a multiplicative hash of the whole row."""
        code = torch.zeros_like(operands[:, 0])
        for column in (*operands.T, *operators.T):
            code = (code * 1_000_003 + column + 1) % 2_147_483_647
        return code * 48_271 % 2_147_483_647 % 8 == 0


def chain_batch(operands: Tensor, operators: Tensor) -> Batch:
    """B n operands, B n-1 operators -> a batch with T = 2n - 1."""
    values = [operands[:, 0]]
    for operator, operand in zip(operators.T, operands[:, 1:].T, strict=True):
        v = values[-1]
        values.append(torch.stack((v + operand, v - operand, v * operand)).gather(0, operator[None])[0] % MODULUS)
    inputs = operands.new_zeros(len(operands), 2 * operands.shape[1] - 1)  # B T
    inputs[:, ::2], inputs[:, 1::2] = operands, MODULUS + operators
    targets = torch.zeros_like(inputs)
    targets[:, ::2] = torch.stack(values, 1)
    mask = torch.zeros_like(inputs, dtype=torch.bool)
    mask[:, ::2] = True
    return Batch(inputs, targets, mask)


# ---------------------------------------------------------------------------------------------------------------------
# Documents


class Row(NamedTuple):
    ids: list[int]
    prompt: int  # how many of them are the prompt's; the first token is never asked


def encode(path: Path, tokenizer: Tokenizer, config: DataConfig) -> tuple[list[Row], list[str]]:
    """Rows of at most length + 1 tokens, and sentences on what was cut or left out.

    Prompt and response are tokenized apart, so the boundary is exact, and text never yields a special token.
    Raises UserError for what `read` refuses, a tokenizer without the special tokens, and a file with no token that
    counts.
    """
    pairs, most = read(path, config.prompt_key, config.response_key), config.length + 1
    eos = eos_id(tokenizer)
    if is_chain(tokenizer) or eos is None:
        raise UserError(
            f"the tokenizer has none of the tokens {', '.join(EOS_NAMES)}, so no document can end: "
            "give another with --data.tokenizer, or a checkpoint trained on text"
        )
    responses = ids(tokenizer, [response for _, response in pairs])
    if pairs[0][0] is None:
        documents = [[*r, eos] for r in responses]
        blocks = [d[i : i + most] for d in documents for i in range(0, len(d), config.length)]
        rows, notes = [Row(b, 1) for b in blocks if len(b) > 1], []
    else:
        if config.chat:
            prompts, end = chat_prompts(tokenizer, [p for p, _ in pairs]), tokenizer.token_to_id(IM_END)
            rows = [Row([*p, *r, end], len(p)) for p, r in zip(prompts, responses, strict=True)]
        else:
            prompts = ids(tokenizer, [f"Problem: {p}\nSolution: " for p, _ in pairs])
            rows = [Row([*p, *r, eos], len(p)) for p, r in zip(prompts, responses, strict=True)]
        cut = sum(len(r.ids) > most for r in rows)
        whole, rows = len(rows), [Row(r.ids[:most], r.prompt) for r in rows if r.prompt < most]
        notes = [
            f"{path}: {cut} of {whole} documents are longer than --data.length {config.length} and are cut"
        ] * bool(cut)
        if len(rows) < whole:
            notes.append(f"{path}: {whole - len(rows)} of them are left out, their prompt alone fills the row")
    if not rows:
        raise UserError(f"{path} has no token that counts: give longer text, or raise --data.length {config.length}")
    return rows, notes


class Documents:
    """One document per row; rows of like length share a batch; each document once per epoch, in an order from the seed.

    batch  rows in a global batch, at most (the batches of an epoch are of nearly equal size)
    """

    pool = 64  # batches whose documents are sorted by length together

    def __init__(self, rows: list[Row], *, batch: int, seed: object):
        self.rows, self.size, self.seed = rows, batch, seed
        self.lengths = torch.tensor([len(r.ids) for r in rows])
        self.depth = None
        self.epoch: tuple[int, list[Tensor]] = -1, []

    @cached_property
    def batches(self) -> int:
        """Batches in an epoch."""
        return len(self.order(0))

    def order(self, epoch: int) -> list[Tensor]:
        """The rows of each batch of an epoch."""
        if self.epoch[0] != epoch:
            generator = seeded(self.seed, "epoch", epoch)
            rows = torch.randperm(len(self.rows), generator=generator)
            batches = []
            for pool in rows.tensor_split(-(-len(rows) // (self.size * self.pool))):
                pool = pool[self.lengths[pool].argsort(stable=True)]
                batches += pool.tensor_split(-(-len(pool) // self.size))
            self.epoch = epoch, [batches[i] for i in torch.randperm(len(batches), generator=generator)]
        return self.epoch[1]

    def batch(self, index: int, *, rank: int = 0, world: int = 1) -> Batch:
        epoch, place = divmod(index, self.batches)
        rows = [self.rows[i] for i in self.order(epoch)[place][rank::world]]
        length = max((len(r.ids) for r in rows), default=2) - 1
        inputs = torch.zeros(len(rows), length, dtype=torch.long)  # B T
        targets, mask = torch.zeros_like(inputs), torch.zeros_like(inputs, dtype=torch.bool)
        for b, (ids, prompt) in enumerate(rows):
            inputs[b, : len(ids) - 1], targets[b, : len(ids) - 1] = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
            mask[b, prompt - 1 : len(ids) - 1] = True
        return Batch(inputs, targets, mask)


def source(rows: list[Row] | None, config: DataConfig, *, batch: int, seed: object, held_out: bool = False):
    """Batches of these rows, or of chain arithmetic if there are none.    -> Documents or Chain"""
    if rows is not None:
        return Documents(rows, batch=batch, seed=seed)
    return Chain(config.operands, batch=batch, seed=seed, held_out=config.val_rows if held_out else 0)


def split(config: DataConfig, tokenizer: Tokenizer, *, seed: int):
    """Rows to train on, rows held out, and sentences on what was cut; None and None for the built-in task."""
    if config.path is None:
        return None, None, []
    train, notes = encode(config.path, tokenizer, config)
    if config.val:
        val, val_notes = encode(config.val, tokenizer, config)
        return train, val, notes + val_notes
    if len(train) < 2:
        raise UserError(f"{config.path} gives a single row, so none can be held out: give --data.val")
    order = torch.randperm(len(train), generator=seeded(seed, "held out")).tolist()
    n = min(256, -(-len(train) // 20))
    return [train[i] for i in order[n:]], [train[i] for i in order[:n]], notes


def counted(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, without the columns after the last token that counts: nothing reads them.

    A batch in which nothing counts becomes two tokens that don't: other processes may wait for this one's passes.
    """
    if not batch.mask.any():
        idle = torch.zeros(1, 2, dtype=torch.long, device=device)
        return Batch(idle, idle, torch.zeros(1, 2, dtype=torch.bool))
    length = int(batch.mask.any(0).nonzero().max()) + 1
    return Batch(*(put(part[:, :length], device) for part in batch[:2]), batch.mask[:, :length])
