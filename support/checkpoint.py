"""Checkpoint folders, in Ouro's own layout: config.json, model.safetensors (or shards and their index), tokenizer.json.

python -m support.checkpoint export IN OUT --dtype bf16     writes a checkpoint again, in another precision
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import reduce
from pathlib import Path

import torch
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tyro.conf import Positional

from model import LoopedTransformer, ModelConfig
from support.processes import full_tensor, is_writer
from support.runtime import DTYPES, DType, UserError, run_cli


def are_tokens(ids: list) -> bool:
    return ids != [] and all(type(i) is int and i >= 0 for i in ids)


# What the value of a key must be, in words and as a function
COUNT = "a whole number above 0", lambda x: type(x) is int and x > 0
COUNT_OR_NULL = "a whole number above 0, or null", lambda x: x is None or COUNT[1](x)
POSITIVE = "a number above 0", lambda x: type(x) in (int, float) and 0 < x < math.inf
SHARE = "a number from 0 to 1", lambda x: type(x) in (int, float) and 0 <= x <= 1
BOOLEAN = "true or false", lambda x: isinstance(x, bool)
TOKENS = "a token's number, or null", lambda x: x is None or are_tokens(x if isinstance(x, list) else [x])
CONFIG_KEYS = {  # Ouro's name: ours, and what it can be
    "num_hidden_layers": ("layers", COUNT),
    "total_ut_steps": ("loops", COUNT),
    "hidden_size": ("width", COUNT),
    "num_attention_heads": ("heads", COUNT),
    "num_key_value_heads": ("kv_heads", COUNT_OR_NULL),
    "intermediate_size": ("ffn", COUNT),
    "head_dim": ("head_dim", COUNT_OR_NULL),
    "vocab_size": ("vocab_size", COUNT),
    "max_position_embeddings": ("max_positions", COUNT),
    "rope_theta": ("rope_theta", POSITIVE),
    "rms_norm_eps": ("rms_norm_eps", POSITIVE),
    "initializer_range": ("init_std", POSITIVE),
    "tie_word_embeddings": ("tied", BOOLEAN),
    "bos_token_id": ("bos_token_id", TOKENS),
    "eos_token_id": ("eos_token_id", TOKENS),
    "early_exit_threshold": ("exit_threshold", SHARE),
}
NEEDED = ("layers", "loops", "width", "heads", "ffn", "vocab_size")  # the shape; the rest has Ouro's defaults
ARCHITECTURE = {  # what a configuration says of the computation; ours does just this
    "model_type": "ouro",
    "architectures": ["OuroForCausalLM"],
    "hidden_act": "silu",
    "rope_scaling": None,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
}
NOT_OURO = {"rope_type": "default", "quantization_config": None, "attention_bias": False}  # and no key of it
PUBLISHED = "ByteDance/Ouro-1.4B--{}"  # the code of all sizes
FOR_OTHERS = {  # what only other programs read
    "auto_map": {
        "AutoConfig": PUBLISHED.format("configuration_ouro.OuroConfig"),
        "AutoModel": PUBLISHED.format("modeling_ouro.OuroModel"),
        "AutoModelForCausalLM": PUBLISHED.format("modeling_ouro.OuroForCausalLM"),
    },
    "sliding_window": None,
    "use_cache": True,
    "transformers_version": "4.55.0",
}
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # larger checkpoints are split
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
GENERATION = "generation_config.json"
COMPANIONS = f"""{GENERATION} tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json
    merges.txt chat_template.jinja""".split()  # what else a folder holds, copied as it is


def ouro_name(name: str) -> str:
    """Name of a parameter in an Ouro checkpoint."""
    return name if name.startswith("lm_head.") else f"model.{name}"


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` at the end, complete and on the disk, or not at all.

    Raises UserError if the folder is there already, or can't be written; what was saved before is left as it is.
    """
    if not is_writer():
        yield folder
        return
    if folder.exists():
        raise UserError(f"{folder} is there already: nothing saved is overwritten, give another folder")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            fsync(path)
        os.rename(temporary, folder)
        fsync(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):  # safetensors has its own word for a full disk
            problem = f"{folder} can't be written ({error}): make room or give another place"
            raise UserError(f"{problem}; what was saved before is intact") from error
        raise


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def save(model: LoopedTransformer, folder: Path, tokenizer=None, *, dtype=None, source: Path | None = None) -> None:
    """Write a checkpoint folder, complete or not at all. Every process of a sharded model takes part, one writes.

    tokenizer  a tokenizers.Tokenizer, saved with the weights (default: the files of the one in `source`)
    dtype      a torch.dtype for the weights in the file (default: as they are)
    source     a checkpoint folder whose generation settings are copied
    Raises UserError if the folder is there already, or can't be written.
    """
    c, shape = model.config, asdict(model.config)
    dtype = dtype or model.embed_tokens.weight.dtype
    config = ARCHITECTURE | FOR_OTHERS | {key: shape[ours] for key, (ours, _) in CONFIG_KEYS.items()}
    config |= {"layer_types": ["full_attention"] * c.layers, "torch_dtype": str(dtype).removeprefix("torch.")}
    with atomic_folder(folder) as temporary:
        save_weights({ouro_name(name): p.detach() for name, p in model.named_parameters()}, temporary, dtype)
        if not is_writer():
            return
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in COMPANIONS if tokenizer is None else (GENERATION,):
            if source and (source / name).is_file():
                shutil.copyfile(source / name, temporary / name)
        if tokenizer is not None:
            tokenizer.save(str(temporary / "tokenizer.json"))
            first = c.eos_token_id[0] if isinstance(c.eos_token_id, tuple) else c.eos_token_id
            end = None if first is None else tokenizer.id_to_token(first)
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
            settings["clean_up_tokenization_spaces"] = False
            (temporary / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def save_weights(weights: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """One model.safetensors, or files of at most SHARD_BYTES and their index; one file at a time is gathered."""
    parts, room = [[]], SHARD_BYTES
    for name, weight in weights.items():
        size = weight.numel() * dtype.itemsize
        if parts[-1] and size > room:
            parts.append([])
            room = SHARD_BYTES
        parts[-1].append(name)
        room -= size
    n = len(parts)
    files = [f"model-{i:05}-of-{n:05}.safetensors" if n > 1 else "model.safetensors" for i in range(1, n + 1)]
    for names, file in zip(parts, files, strict=True):
        gathered = {}
        for name in names:
            weight = full_tensor(weights[name])
            if is_writer():
                gathered[name] = weight.to("cpu", dtype).contiguous()
        if is_writer():
            save_file(gathered, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(folder.stat().st_mode & 0o666)  # the library writes it for its owner alone
    if n > 1 and is_writer():
        total = sum(w.numel() for w in weights.values()) * dtype.itemsize
        where = {name: file for names, file in zip(parts, files, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): restore the file") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object: restore the file")
    return content


def write_atomic(path: Path, text: str) -> None:
    """Write a file whole, or leave the old one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, content: dict) -> None:
    write_atomic(path, json.dumps(content, indent=1, default=str) + "\n")


def load_config(folder: Path) -> ModelConfig:
    """Shape of the checkpoint in a folder. Raises UserError if it isn't one, or isn't Ouro's architecture."""
    path = folder / "config.json"
    if not path.is_file():
        what = "is a file, give its folder" if folder.is_file() else "has no config.json"
        if not folder.exists():
            what = f"is not there (to download: hf download ORGANISATION/NAME --local-dir {folder})"
        raise UserError(f"{folder} is not a checkpoint folder: it {what}")
    config, rope = read_json(path), {}
    if isinstance(config.get("rope_parameters"), dict):  # where transformers 5 writes them
        rope = config["rope_parameters"]
    config = {key: rope[key] for key in ("rope_theta", "rope_type") if key in rope} | config
    types = config.get("layer_types") or []
    layer_types = sorted({*types} - {"full_attention"}) if isinstance(types, list) else types
    given = ARCHITECTURE | NOT_OURO | {"model_type": None} | config | {"layer_types": layer_types}
    for key, ours in (ARCHITECTURE | NOT_OURO | {"layer_types": []}).items():
        if given[key] != ours:
            raise UserError(f"{path} says {key} {given[key]!r}: only Ouro's {ours or 'full_attention'!r} is known here")
    return parse_config(config, path)


def parse_config(config: dict, path: Path) -> ModelConfig:
    """Ours from Ouro's keys. Raises UserError for one that is missing, or has a value that it can't have."""
    if missing := [key for key, (ours, _) in CONFIG_KEYS.items() if ours in NEEDED and key not in config]:
        raise UserError(f"{path} lacks {', '.join(missing)}: restore the file")
    shape = {}
    for key, (ours, (rule, holds)) in CONFIG_KEYS.items():
        value = config.get(key)
        if key in config and not holds(value):
            raise UserError(f"{path} says {key} {value!r}: it must be {rule}")
        if key in config and not (value is None and ours in ("kv_heads", "head_dim")):
            shape[ours] = tuple(value) if isinstance(value, list) else value
    try:
        return ModelConfig(**shape).resolved()
    except UserError as error:
        raise UserError(f"{path} has a shape that no model can have ({error})") from error


def weight_files(folder: Path) -> dict[str, list[str] | None]:
    """The safetensors files of a checkpoint folder, and the keys that its index (if it has one) says each holds."""
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors": None}
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for kind in PICKLES for path in folder.glob(kind))
        if pickles:
            problem = f"{folder} holds {pickles[0]}, a pickle, which can run any code when it is loaded"
            way_out = "convert it where that does no harm, with safetensors.torch.save_file"
            raise UserError(f"{problem}: only safetensors are read; {way_out}")
        raise UserError(f"{folder} has no model.safetensors: only safetensors checkpoints are read")
    files: dict[str, list[str]] = {}
    where = read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise UserError(f"{folder / INDEX} has no weight_map of names to files: restore the file")
    for key, file in where.items():
        files.setdefault(file, []).append(key)
    for file in files:
        if Path(file).name != file or not (folder / file).is_file():
            raise UserError(f"{folder / INDEX} names {file}, which is not in the folder: restore it")
    return files


def first_few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "none"


def index_tensors(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Path]:
    """The file of each tensor in a folder. Raises UserError for a damaged file, or another shape or type than ours."""
    place = {}
    for file, keys in weight_files(folder).items():
        path = folder / file
        with open_safetensors(path) as weights:
            if keys is not None and {*keys} != {*weights.keys()}:
                wrong = first_few(sorted({*keys} ^ {*weights.keys()}))
                raise UserError(f"{folder / INDEX} and {path} disagree on {wrong}: restore both from a copy")
            for key in weights.keys():  # noqa: SIM118  it is no dict
                place[key], part = path, weights.get_slice(key)
                shape, kind = tuple(part.get_shape()), part.get_dtype()
                if shape != shapes.get(key, shape):
                    raise UserError(f"{path} holds {key} of shape {shape}, its config.json says {shapes[key]}")
                if kind not in ("BF16", "F16", "F32", "F64"):
                    raise UserError(f"{path} holds {key} as {kind}: only BF16, F16, F32 and F64 weights are read")
    return place


def load(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> LoopedTransformer:
    """The model in a checkpoint folder.

    dtype  of the parameters (None: as stored)
    Tensors are read one at a time from the mapped file, so little more is held than the model.
    Raises UserError for a missing, damaged or foreign checkpoint.
    """
    config = load_config(folder)
    with torch.device("meta"):
        model = LoopedTransformer(config)
    names = {ouro_name(name): name for name, _ in model.named_parameters()}
    shapes = {ouro_name(name): tuple(p.shape) for name, p in model.named_parameters()}
    place = index_tensors(folder, shapes)
    if config.tied and {"lm_head.weight", "model.embed_tokens.weight"} <= place.keys():  # some writers keep the copy
        head, embedding = (read_tensor(place[key], key) for key in ("lm_head.weight", "model.embed_tokens.weight"))
        if not head.equal(embedding):
            raise UserError(f"{folder} says tie_word_embeddings, but its lm_head.weight differs: set it to false")
        del place["lm_head.weight"]
    missing, extra = sorted(names.keys() - place.keys()), sorted(place.keys() - names.keys())
    if missing or extra:
        problem = f"missing {first_few(missing)}, extra {first_few(extra)}"
        raise UserError(f"{folder} does not match its config.json: {problem}")
    dtype = dtype or reduce(torch.promote_types, (read_tensor(place[key], key).dtype for key in names))
    weights = {name: read_tensor(place[key], key).to(device, dtype, copy=True) for key, name in names.items()}
    model.load_state_dict(weights, strict=False, assign=True)  # a tied head has no entry of its own
    if config.tied:
        model.lm_head.weight = model.embed_tokens.weight
    return model.requires_grad_()


@contextmanager
def open_safetensors(path: Path) -> Iterator:
    """A safetensors file. Raises UserError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        with open(path, "rb") as start:
            pointer = start.read(19) == b"version https://git"
        mend = "is a pointer of git-lfs, not the weights: run git lfs pull" if pointer else None
        raise UserError(f"{path} {mend or f'is damaged ({error}): restore it from a copy'}") from error


def read_tensor(path: Path, key: str) -> Tensor:
    """One tensor, mapped; a file opened for it alone is unmapped with it."""
    with open_safetensors(path) as file:
        return file.get_tensor(key)


def export(source: Positional[Path], out: Positional[Path], dtype: DType = "bf16") -> None:
    """Write a checkpoint again: in another precision, in one file or in shards, with its tokenizer.

    Args:
        source: checkpoint folder to read.
        out: folder to write.
        dtype: precision of the weights in the file.
    """
    if out.exists():
        raise UserError(f"{out} is there already: nothing saved is overwritten, give another folder")
    model = load(source, dtype=DTYPES[dtype])
    save(model, out, source=source)
    size = sum(p.numel() for p in model.parameters())
    print(f"{out}: {size:,} parameters in {dtype}, from {source}")


if __name__ == "__main__":
    run_cli(lambda: tyro.extras.subcommand_cli_from_dict({"export": export}))
