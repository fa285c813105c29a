"""Text on its way in: files of documents, and tokenizers (always a tokenizers.Tokenizer, saved as tokenizer.json).

python -m support.text tokenizer --path train.jsonl --vocab 4096 --out tokenizer.json     trains a tokenizer
"""

import json
from collections.abc import Iterator
from pathlib import Path

import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from support.checkpoint import load_config
from support.runtime import UserError, require_new, run_cli

EOS, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2 in what is made here, as in Ouro
SPECIAL = [EOS, IM_START, IM_END]
EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<eos>", "[EOS]")
KEY_PAIRS = (("problem", "solution"), ("question", "answer"), ("prompt", "response"))
Document = tuple[str | None, str]  # prompt and response; the prompt of plain text is None


def byte_tokenizer() -> Tokenizer:
    """Three special tokens, then the 256 bytes: byte b is token 3 + b."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}  # bytes that stand for themselves in byte-level BPE
    rest = iter(range(256, 512))
    symbols = [*SPECIAL, *(chr(b if b in plain else next(rest)) for b in range(256))]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.add_special_tokens(SPECIAL)
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


def pick_tokenizer(name: str, checkpoint: Path | None, built_in: Tokenizer) -> Tokenizer:
    """The one asked for by name or path, else ('auto') the checkpoint's own, else the built-in one. Raises UserError
    for a checkpoint without tokenizer.json, or whose vocabulary is smaller than the tokenizer's."""
    if name == "auto" and checkpoint:
        name = str(checkpoint / "tokenizer.json")
        if not Path(name).is_file():
            raise UserError(f"{checkpoint} has no tokenizer.json: give one with --data.tokenizer")
    tokenizer = built_in if name == "auto" else load_tokenizer(name)
    if checkpoint:
        check_vocabulary(tokenizer, checkpoint)
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, checkpoint: Path) -> None:
    """Raises UserError if the tokenizer has tokens that the model doesn't know."""
    known, needed = load_config(checkpoint).vocab_size, vocab_size(tokenizer)
    if known < needed:
        problem = f"{checkpoint} has a vocabulary of {known}, the tokenizer one of {needed}"
        raise UserError(f"{problem}: give the tokenizer that the checkpoint was trained with")


def vocab_size(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def eos_id(tokenizer: Tokenizer) -> int | None:
    """Id of the end-of-text token, None if there is none."""
    return next((i for i in map(tokenizer.token_to_id, EOS_NAMES) if i is not None), None)


def tokenize(tokenizer: Tokenizer, texts: list[str], *, special: bool = False) -> list[list[int]]:
    """Tokens of each text. special: whether a text that spells a special token yields it."""
    tokenizer.encode_special_tokens = not special
    return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def chat_prompts(tokenizer: Tokenizer, prompts: list[str]) -> list[list[int]]:
    """ChatML up to where the assistant's answer starts. Raises UserError if the tokenizer lacks its tokens."""
    start, end = map(tokenizer.token_to_id, (IM_START, IM_END))
    if start is None or end is None:
        problem = f"ChatML needs a tokenizer with {IM_START} and {IM_END}"
        raise UserError(f"{problem}: give another, or leave the chat flag out")
    newline, assistant = tokenize(tokenizer, ["\n", "assistant\n"])
    users = tokenize(tokenizer, [f"user\n{prompt}" for prompt in prompts])
    return [[start, *user, end, *newline, start, *assistant] for user in users]


def train_tokenizer(path: Path, vocab: int = 4096, out: Path = Path("tokenizer.json")) -> None:
    """Train a byte-level BPE tokenizer, digits one by one, and write it.

    Args:
        path: .jsonl, .json, .parquet or .txt to learn from.
        vocab: number of tokens: 3 special ones, 256 bytes, the rest learned.
        out: where to write tokenizer.json."""
    if vocab < 259:
        raise UserError(f"--vocab {vocab} is too small: 3 special tokens and 256 bytes need 259")
    documents = read_documents(path)
    require_new(out)
    tokenizer, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    bpe = trainers.BpeTrainer(vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((text for pair in documents for text in pair if text), bpe)
    tokenizer.save(str(out))
    print(f"{out}: {vocab_size(tokenizer)} tokens, learned from {path}")


def read_records(path: Path) -> Iterator[tuple[str, dict]]:
    """Each record of a .jsonl, .json or .parquet file, with the words that say where it stands."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
        except ImportError as error:
            raise UserError(f"{path} needs pyarrow to be read: pip install pyarrow, or give a .jsonl file") from error
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a parquet file ({error}): give another") from error
        yield from ((f"{path} row {i}", row) for i, row in enumerate(rows, 1))
    elif path.suffix == ".jsonl":
        lines = enumerate(read_text(path).split("\n"), 1)
        yield from ((f"{path} line {i}", parse_json(line, path, i)) for i, line in lines if line.strip())
    else:
        rows = parse_json(read_text(path), path)
        if not isinstance(rows, list):
            raise UserError(f"{path} holds one {type(rows).__name__}: a .json file must be a list of records")
        yield from ((f"{path} record {i}", row) for i, row in enumerate(rows, 1))


def parse_json(text: str, path: Path, first_line: int = 1):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{path} line {line} is not JSON ({error.msg}): mend the line, or give another file") from error


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {line} is not UTF-8 ({error.reason}): convert the file to UTF-8") from error


def read_documents(path: Path, prompt_key: str | None = None, response_key: str | None = None) -> list[Document]:
    """All documents of a file. Raises UserError for a file that is missing, empty, not UTF-8, not JSON, of an unknown
    kind, or lacks the keys."""
    if not path.is_file():
        raise UserError(f"{path} is not a file: give a .jsonl, .json, .parquet or .txt file")
    if path.suffix not in (".jsonl", ".json", ".parquet", ".txt"):
        raise UserError(f"{path} is of an unknown kind {path.suffix!r}: give a .jsonl, .json, .parquet or .txt file")
    plain = read_text(path) if path.suffix == ".txt" else ""
    pairs = [(None, plain)] if plain.strip() else []
    for place, record in read_records(path) if path.suffix != ".txt" else ():
        if not isinstance(record, dict):
            raise UserError(f"{place} is a {type(record).__name__}: each must be an object with the prompt's keys")
        keys = ", ".join(record)
        if response_key is None:
            known = (pair for pair in KEY_PAIRS if record.keys() >= {*pair})
            prompt_key, response_key = next(known, (None, "text" if "text" in record else None))
        if response_key is None:
            problem = f"{place} has the keys {keys}, none of them known"
            raise UserError(f"{problem}: give --data.prompt-key and --data.response-key")
        for key in (prompt_key, response_key):
            if key is not None and not isinstance(record.get(key), str):
                what = f"a {type(record[key]).__name__} under" if key in record else "no key"
                raise UserError(f"{place} has {what} {key!r}: each record needs a text there; its keys are {keys}")
        pairs.append((record[prompt_key] if prompt_key else None, record[response_key]))
    if not pairs:
        raise UserError(f"{path} is empty: give a file with at least one document")
    return pairs


if __name__ == "__main__":
    run_cli(lambda: tyro.extras.subcommand_cli_from_dict({"tokenizer": train_tokenizer}))
