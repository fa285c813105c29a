"""Text on its way in: files of documents, and tokenizers (always a tokenizers.Tokenizer, saved as tokenizer.json).

python -m support.text tokenizer --path train.jsonl --vocab 4096 --out tokenizer.json     trains a tokenizer
"""

import json
import os
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from textwrap import shorten

import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from support.checkpoint import EOS, IM_END, IM_START, load_config, load_tokenizer
from support.runtime import UserError, require_new, run_cli

SPECIAL = [EOS, IM_START, IM_END]  # ids 0, 1, 2 in what is made here, as in Ouro
MAX_LENGTH = 4096  # tokens in a row where no length is given
EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<eos>", "[EOS]")
CONTROL = {*EOS_NAMES, IM_START, IM_END, "<s>", "<pad>"}  # what no text yields, whatever it spells
KEY_PAIRS = (("problem", "solution"), ("question", "answer"), ("prompt", "response"))
Chat = list[tuple[str, str]]  # role and content of each turn
Document = tuple[str | None, str] | Chat  # prompt and response; the prompt of plain text is None


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


def pick_tokenizer(name: str | Path, checkpoint: str | Path | None, built_in: Tokenizer | None = None) -> Tokenizer:
    """The one asked for by name or path, else ('auto') the checkpoint's own, else the built-in one. Raises UserError
    for a checkpoint without tokenizer.json, or whose vocabulary is smaller than the tokenizer's."""
    name = Path(checkpoint) / "tokenizer.json" if name == "auto" and checkpoint else name
    tokenizer = built_in if name == "auto" else byte_tokenizer() if name == "bytes" else load_tokenizer(name)
    if checkpoint and (known := load_config(checkpoint).vocab_size) < (needed := vocab_size(tokenizer)):
        raise UserError(f"{checkpoint} has a vocabulary of {known}, the tokenizer one of {needed}: give its own")
    return tokenizer


def vocab_size(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def eos_id(tokenizer: Tokenizer) -> int | None:
    """Id of the end-of-text token, None if there is none."""
    return next((i for i in map(tokenizer.token_to_id, EOS_NAMES) if i is not None), None)


def tokenize(tokenizer: Tokenizer, texts: list[str], *, added: bool = False, special: bool = False) -> list[list[int]]:
    """Tokens of each text. Raises UserError if the tokenizer can't spell a token that ends texts or turns.
    added    whether a text that spells an added token, like <think>, yields it, unless it is one of CONTROL
    special  whether it yields any"""
    tokens = tokenizer.get_added_tokens_decoder().values()
    spelled = {t.content for t in tokens if not added or t.content in CONTROL}
    if not special and {t.content for t in tokens if t.special} != spelled:  # the library spells out the special ones
        tokenizer = make_special(tokenizer, frozenset(spelled), len(tokens))
    tokenizer.encode_special_tokens = not special
    found = [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    ends = {eos_id(tokenizer), *map(tokenizer.token_to_id, (IM_START, IM_END))}
    if not special and ends & {i for ids in found for i in ids}:
        raise UserError("a text spells an end of text or turn, and the tokenizer takes it for one: give another")
    return found


@lru_cache(maxsize=4)
def make_special(tokenizer: Tokenizer, names: frozenset[str], added: int) -> Tokenizer:
    """A copy in which just these added tokens are special.    added: their number, as a tokenizer may get more"""
    form = json.loads(tokenizer.to_str())
    form["added_tokens"] = [t | {"special": t["content"] in names} for t in form["added_tokens"]]
    return Tokenizer.from_str(json.dumps(form))


def encode_chats(tokenizer: Tokenizer, chats: list[Chat]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """ChatML of each chat up to the end of its last answer, and from where to where each answer stands, with its end of
    turn. Raises UserError if the tokenizer lacks the tokens."""
    start, end = map(tokenizer.token_to_id, (IM_START, IM_END))
    if start is None or end is None:
        raise UserError(f"ChatML needs a tokenizer with {IM_START} and {IM_END}: give another, or no chats")
    turns, encoded = [turn for chat in chats for turn in chat], []
    heads = tokenize(tokenizer, [f"{role}\n{content if role != 'assistant' else ''}" for role, content in turns])
    answers = tokenize(tokenizer, [content if role == "assistant" else "" for role, content in turns], added=True)
    (newline,), parts = tokenize(tokenizer, ["\n"]), zip(heads, answers, strict=True)
    for chat in chats:
        ids, places = [], []
        for (role, _), (head, answer) in zip(chat, parts, strict=False):  # the parts of this chat's turns
            ids += [start, *head, *answer, end]
            places += [(len(ids) - len(answer) - 1, len(ids))] if role == "assistant" else []
            ids += newline
        encoded.append((ids[: places[-1][1]] if places else [], places))
    return encoded


def train_tokenizer(path: Path, vocab: int = 4096, out: Path = Path("tokenizer.json")) -> None:
    """Train a byte-level BPE tokenizer, digits one by one, on a .jsonl, .json, .parquet or .txt file; write it to OUT.
    Of its VOCAB tokens 3 are special, 256 are bytes, and the rest are learned."""
    if vocab < 259:
        raise UserError(f"--vocab {vocab} is too small: 3 special tokens and 256 bytes need 259")
    documents, out = read_documents(path), Path(out)
    require_new(out)
    tokenizer, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    bpe = trainers.BpeTrainer(vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    texts = ([content for _, content in d] if isinstance(d, list) else d for d in documents)
    tokenizer.train_from_iterator((text for each in texts for text in each if text), bpe)
    tokenizer.save(str(out))
    print(f"{out}: {vocab_size(tokenizer)} tokens, learned from {path}")


def read_records(path: Path) -> Iterator[tuple[str, object]]:
    """Each record of a file, with the words that say where it stands; a .txt file is one, under the key 'text'."""
    i, parse = 0, partial(json.loads, parse_int=float)  # Python's integers end at 4,300 digits
    if path.suffix == ".parquet":
        try:
            from pyarrow import ArrowException, parquet

            table = parquet.ParquetFile(path).read()
            for i, row in enumerate(zip(*table.columns, strict=True), 1):
                yield f"{path} row {i}", {name: x.as_py() for name, x in zip(table.column_names, row, strict=True)}
        except ImportError as error:
            raise UserError(f"{path} needs pyarrow to be read: pip install pyarrow, or give a .jsonl file") from error
        except (ArrowException, OSError, ValueError, OverflowError) as error:  # text that is not UTF-8, an odd date
            what = f"row {i} can't be read" if i else "is not a parquet file"
            raise UserError(f"{path} {what} ({shorten(str(error), 200)}): mend it, or give another") from error
        return
    try:
        content = path.read_bytes().decode("utf-8-sig")
        first = content.strip().partition("\n")[0].rstrip()
        if path.suffix == ".txt":
            yield from [(str(path), {"text": content})] if first else []
        elif path.suffix == ".jsonl" or (first.startswith("{") and first.endswith("}")):  # many write lines under .json
            for i, line in enumerate(content.split("\n"), 1):
                if line.strip():
                    yield f"{path} line {i}", parse(line)
        elif isinstance(rows := parse(content), list):
            yield from ((f"{path} record {n}", row) for n, row in enumerate(rows, 1))
        else:
            raise UserError(f"{path} holds one {type(rows).__name__}: give a list of records, or a record on each line")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {line} is not UTF-8 ({error.reason}): convert the file to UTF-8") from error
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): give another file") from error
    except (json.JSONDecodeError, RecursionError) as error:
        line, why = max(i, 1) + getattr(error, "lineno", 1) - 1, getattr(error, "msg", "nested too deeply")
        raise UserError(f"{path} line {line} is not JSON ({why}): mend the line, or give another file") from error


def get(record: dict, key: str, place: str, kind: type = str):
    """The text, or the list, under a key. Raises UserError if there is none, or a text that can't be trained on."""
    value, what = record.get(key), "text" if kind is str else "list of turns"
    problem = f"no {what} under" if key in record else "no key"
    if isinstance(value, kind) and (kind is list or value.strip()):
        if kind is list or value == value.encode(errors="replace").decode():
            return value
        problem = "half a character (a lone surrogate) under"
    keys = f"{shorten(', '.join(record), 200)} (to use others: --data.prompt-key, --data.response-key)"
    raise UserError(f"{place} has {problem} {key!r}: each needs a {what} there; its keys are {keys}")


def read_documents(path: str | Path, prompt_key: str | None = None, response_key: str | None = None) -> list[Document]:
    """All documents of a file. Raises UserError for a file that is missing, empty, not UTF-8, not JSON, of an unknown
    kind, or has a record that lacks the keys, or a text there."""
    path, documents = Path(path), []
    if not os.path.isfile(path) or path.suffix not in (".jsonl", ".json", ".parquet", ".txt"):
        raise UserError(f"{path} is not there, or of an unknown kind: give a .jsonl, .json, .parquet or .txt file")
    for place, record in read_records(path):
        if not isinstance(record, dict):
            raise UserError(f"{place} is a {type(record).__name__}: each must be an object with the prompt's keys")
        if not documents:  # the first record says where all have their texts
            if response_key is None:
                known = (pair for pair in (*KEY_PAIRS, (None, "messages")) if record.keys() >= {*pair} - {None})
                prompt_key, response_key = next(known, (None, "text"))
            value = record.get(response_key)
            is_chat = response_key == "messages" or (isinstance(value, list) and dict in map(type, value))
        if is_chat and not prompt_key:
            turns = enumerate(get(record, response_key, place, list), 1)
            turns = [(turn if isinstance(turn, dict) else {}, f"{place} turn {i}") for i, turn in turns]
            documents.append([(get(turn, "role", i), get(turn, "content", i)) for turn, i in turns])
        else:
            prompt = get(record, prompt_key, place) if prompt_key else None
            documents.append((prompt, get(record, response_key, place)))
    if not documents:
        raise UserError(f"{path} is empty: give a file with at least one document")
    return documents


if __name__ == "__main__":
    run_cli(lambda: tyro.extras.subcommand_cli_from_dict({"tokenizer": train_tokenizer}))
