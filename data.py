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
# Tokenizers: always a tokenizers.Tokenizer, saved as tokenizer.json beside the weights

EOS, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2 in what is made here, as in Ouro
EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<eos>", "[EOS]")


def chain_tokenizer() -> Tokenizer:
    """The eight symbols of chain arithmetic."""
    symbols = [*map(str, range(MODULUS)), *OPERATORS]
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token=symbols[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """Three special tokens, then the 256 bytes: byte b is token 3 + b."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}  # bytes that stand for themselves in byte-level BPE
    rest = iter(range(256, 512))
    vocab = {EOS: 0, IM_START: 1, IM_END: 2} | {chr(b if b in plain else next(rest)): 3 + b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.add_special_tokens([EOS, IM_START, IM_END])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """'bytes', or the path of a tokenizer.json. Raises UserError if there is none."""
    if name == "bytes":
        return byte_tokenizer()
    if not Path(name).is_file():
        raise UserError(f"--data.tokenizer {name} is not a file: give a tokenizer.json, or 'bytes'")
    try:
        return Tokenizer.from_file(name)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{name} is not a tokenizer ({error}): give a tokenizer.json, or 'bytes'") from error


def tokenizer_file(config: DataConfig, checkpoint: Path | None) -> Path | None:
    """The tokenizer.json asked for, or the checkpoint's own; None for a built-in tokenizer."""
    if config.tokenizer == "auto":
        return checkpoint and checkpoint / "tokenizer.json"
    return None if config.tokenizer == "bytes" else Path(config.tokenizer)


def pick_tokenizer(config: DataConfig, checkpoint: Path | None) -> Tokenizer:
    """The one asked for, else the checkpoint's own, else the built-in task's or the bytes.

    Raises UserError for a checkpoint without tokenizer.json, one trained on text while no text is given, or one whose
    vocabulary is smaller than the tokenizer's.
    """
    file = tokenizer_file(config, checkpoint)
    if file:
        if checkpoint and file.parent == checkpoint and not file.is_file():
            raise UserError(f"{checkpoint} has no tokenizer.json: give one with --data.tokenizer")
        tokenizer = load_tokenizer(str(file))
    else:
        tokenizer = byte_tokenizer() if config.path else chain_tokenizer()
    if config.path is None and not is_chain(tokenizer):
        raise UserError(f"{checkpoint} was trained on text, not on the built-in chain arithmetic: give --data.path")
    if checkpoint:
        check_vocabulary(tokenizer, checkpoint)
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, checkpoint: Path) -> None:
    """Raises UserError if the tokenizer has tokens that the model doesn't know."""
    known, needed = load_config(checkpoint).vocab_size, vocab_size(tokenizer)
    if known < needed:
        raise UserError(
            f"{checkpoint} has a vocabulary of {known}, the tokenizer one of {needed}: "
            "give the tokenizer that the checkpoint was trained with"
        )


def vocab_size(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def is_chain(tokenizer: Tokenizer) -> bool:
    return tokenizer.get_vocab() == chain_tokenizer().get_vocab()


def eos_id(tokenizer: Tokenizer) -> int | None:
    """Id of the end-of-text token, None if there is none."""
    return next((i for i in map(tokenizer.token_to_id, EOS_NAMES) if i is not None), None)


def ids(tokenizer: Tokenizer, texts: list[str], *, special: bool = False) -> list[list[int]]:
    """Tokens of each text. special: whether a text that spells a special token yields it."""
    tokenizer.encode_special_tokens = not special
    return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def chat_prompts(tokenizer: Tokenizer, prompts: list[str]) -> list[list[int]]:
    """ChatML up to where the assistant's answer starts. Raises UserError if the tokenizer lacks its tokens."""
    start, end = map(tokenizer.token_to_id, (IM_START, IM_END))
    if start is None or end is None:
        raise UserError(
            f"ChatML needs a tokenizer with {IM_START} and {IM_END}: give another, or leave the chat flag out"
        )
    newline, assistant = ids(tokenizer, ["\n", "assistant\n"])
    return [
        [start, *user, end, *newline, start, *assistant] for user in ids(tokenizer, [f"user\n{p}" for p in prompts])
    ]


def train_tokenizer(path: Path, vocab: int = 4096, out: Path = Path("tokenizer.json")) -> None:
    """Train a byte-level BPE tokenizer, digits one by one, and write it.

    Args:
        path: .jsonl, .json, .parquet or .txt to learn from.
        vocab: number of tokens: 3 special ones, 256 bytes, the rest learned.
        out: where to write tokenizer.json.
    """
    if vocab < 259:
        raise UserError(f"--vocab {vocab} is too small: 3 special tokens and 256 bytes need 259")
    if out.exists():
        raise UserError(f"--out {out} is there already: nothing saved is overwritten, give another name")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[EOS, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for pair in read(path) for text in pair if text), trainer)
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out))
    print(f"{out}: {vocab_size(tokenizer)} tokens, learned from {path}")


# ---------------------------------------------------------------------------------------------------------------------
# Files

KEY_PAIRS = (("problem", "solution"), ("question", "answer"), ("prompt", "response"))


def records(path: Path) -> Iterator[tuple[str, dict]]:
    """Each record of a .jsonl, .json or .parquet file, with the words that say where it stands."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(f"{path} needs pyarrow to be read: pip install pyarrow, or give a .jsonl file") from error
        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a parquet file ({error}): give another") from error
        yield from ((f"{path} row {i}", row) for i, row in enumerate(rows, 1))
        return
    text = read_text(path)
    try:
        start = 0
        if path.suffix == ".jsonl":
            for start, line in enumerate(text.split("\n")):
                if line.strip():
                    yield f"{path} line {start + 1}", json.loads(line)
        else:
            rows = json.loads(text)
            if not isinstance(rows, list):
                raise UserError(f"{path} holds one {type(rows).__name__}: a .json file must be a list of records")
            yield from ((f"{path} record {i}", row) for i, row in enumerate(rows, 1))
    except json.JSONDecodeError as error:
        line = start + error.lineno
        raise UserError(f"{path} line {line} is not JSON ({error.msg}): mend the line, or give another file") from error


def read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {line} is not UTF-8 ({error.reason}): convert the file to UTF-8") from error


def read(path: Path, prompt_key: str | None = None, response_key: str | None = None) -> list[tuple[str | None, str]]:
    """Pairs of prompt and response; the prompt of plain text is None.

    Raises UserError for a file that is missing, empty, not UTF-8, not JSON, of an unknown kind, or lacks the keys.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file: give a .jsonl, .json, .parquet or .txt file")
    if path.suffix not in (".jsonl", ".json", ".parquet", ".txt"):
        raise UserError(f"{path} is of an unknown kind {path.suffix!r}: give a .jsonl, .json, .parquet or .txt file")
    if path.suffix == ".txt":
        pairs = [(None, text)] if (text := read_text(path)).strip() else []
    else:
        pairs = []
        for place, record in records(path):
            if not isinstance(record, dict):
                raise UserError(f"{place} is a {type(record).__name__}: each must be an object with the prompt's keys")
            if response_key is None:
                prompt_key, response_key = next(
                    (pair for pair in KEY_PAIRS if record.keys() >= {*pair}),
                    (None, "text" if "text" in record else None),
                )
            if response_key is None:
                raise UserError(
                    f"{place} has the keys {', '.join(record)}, none of them known: "
                    "give --data.prompt-key and --data.response-key"
                )
            for key in (prompt_key, response_key):
                if key is not None and not isinstance(record.get(key), str):
                    what = f"a {type(record[key]).__name__} under" if key in record else "no key"
                    raise UserError(
                        f"{place} has {what} {key!r}: each record needs a text there; its keys are {', '.join(record)}"
                    )
            pairs.append((record[prompt_key] if prompt_key else None, record[response_key]))
    if not pairs:
        raise UserError(f"{path} is empty: give a file with at least one document")
    return pairs


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


if __name__ == "__main__":
    report(lambda: tyro.extras.subcommand_cli_from_dict({"tokenizer": train_tokenizer}))
