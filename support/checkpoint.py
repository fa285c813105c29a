"""Checkpoint folders, in Ouro's own layout: config.json, model.safetensors (or shards and their index), tokenizer.json.

python -m support.checkpoint export IN OUT --dtype bf16     writes a checkpoint again, in another precision
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from textwrap import shorten

import torch
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import LoopedTransformer, ModelConfig
from support.processes import full_tensor, is_writer
from support.runtime import DTYPES, DType, UserError, run_cli

# Ouro's names of our fields; the shape is needed, the rest has Ouro's defaults
SHAPE = {"num_hidden_layers": "layers", "total_ut_steps": "loops", "hidden_size": "width", "vocab_size": "vocab_size"}
SHAPE |= {"num_attention_heads": "heads", "intermediate_size": "ffn"}
COUNTS = SHAPE | {"max_position_embeddings": "max_positions"}
HEADS = {"num_key_value_heads": "kv_heads", "head_dim": "head_dim"}
SCALES = {"rope_theta": "rope_theta", "rms_norm_eps": "rms_norm_eps", "initializer_range": "init_std"}
SHARES = {"early_exit_threshold": "exit_threshold"}
TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id"}
RULES = (  # what their values must be, in words and as a function
    ("a whole number above 0", lambda x: type(x) is int and x > 0, COUNTS),
    ("a whole number above 0, or null", lambda x: x is None or (type(x) is int and x > 0), HEADS),
    ("a number above 0", lambda x: type(x) in (int, float) and 0 < x < torch.inf, SCALES),
    ("a number from 0 to 1", lambda x: type(x) in (int, float) and 0 <= x <= 1, SHARES),
    ("true or false", lambda x: isinstance(x, bool), {"tie_word_embeddings": "tied"}),
    ("a token's number, or null", lambda x: x is None or are_tokens(x if isinstance(x, list) else [x]), TOKENS),
)
CONFIG_KEYS = {key: (ours, rule, holds) for rule, holds, names in RULES for key, ours in names.items()}
# What a configuration says of the computation; ours does just this
ARCHITECTURE = {"model_type": "ouro", "architectures": ["OuroForCausalLM"], "hidden_act": "silu", "rope_scaling": None}
ARCHITECTURE |= {"attention_dropout": 0.0, "use_sliding_window": False}
NOT_OURO = {"rope_type": "default", "quantization_config": None, "attention_bias": False}  # and no key of it
# What only other programs read; the published code is the same for all sizes
FOR_OTHERS = {"sliding_window": None, "use_cache": True, "transformers_version": "4.55.0"}
PUBLISHED = {"AutoConfig": "configuration_ouro.OuroConfig", "AutoModel": "modeling_ouro.OuroModel"}
PUBLISHED |= {"AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM"}
FOR_OTHERS["auto_map"] = {kind: f"ByteDance/Ouro-1.4B--{name}" for kind, name in PUBLISHED.items()}
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # larger checkpoints are split
GENERATION = "generation_config.json"
COMPANIONS = f"""{GENERATION} tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json
    merges.txt chat_template.jinja""".split()  # what else a folder holds, copied as it is


def are_tokens(ids: list) -> bool:
    return ids != [] and all(type(i) is int and i >= 0 for i in ids)


def ouro_name(name: str) -> str:
    """Name of a parameter in an Ouro checkpoint."""
    return name if name.startswith("lm_head.") else f"model.{name}"


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` at the end, complete and on the disk, or not at all.
    Raises UserError if the folder is there already, or can't be written; what was saved before is left as it is."""
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
    source     a checkpoint folder whose generation settings are copied"""
    c, dtype = model.config, dtype or model.embed_tokens.weight.dtype
    config = ARCHITECTURE | FOR_OTHERS | {key: getattr(c, ours) for key, (ours, *_) in CONFIG_KEYS.items()}
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
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
            settings["eos_token"] = None if first is None else tokenizer.id_to_token(first)
            (temporary / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def save_weights(weights: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """One model.safetensors, or files of at most SHARD_BYTES and their index; one file at a time is gathered."""
    sizes = {name: weight.numel() * dtype.itemsize for name, weight in weights.items()}
    parts, room, where = [[]], SHARD_BYTES, {}
    for name, size in sizes.items():
        if parts[-1] and size > room:
            parts, room = [*parts, []], SHARD_BYTES
        parts[-1].append(name)
        room -= size
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors" if len(parts) > 1 else "model.safetensors"
        where |= dict.fromkeys(names, file)
        gathered = ((name, full_tensor(weights[name])) for name in names)  # by all processes, one at a time
        tensors = {name: weight.to("cpu", dtype).contiguous() for name, weight in gathered if is_writer()}
        if is_writer():
            folder.mkdir(exist_ok=True)
            save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(folder.stat().st_mode & 0o666)  # the library writes it for its owner alone
    if len(parts) > 1 and is_writer():
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(where.items()))}
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
    config = read_json(path)
    if isinstance(rope := config.get("rope_parameters"), dict):  # where transformers 5 writes them
        config = {key: rope[key] for key in ("rope_theta", "rope_type") if key in rope} | config
    types = config.get("layer_types") or []
    layer_types = sorted({*types} - {"full_attention"}) if isinstance(types, list) else types
    given = ARCHITECTURE | NOT_OURO | {"model_type": None} | config | {"layer_types": layer_types}
    for key, ours in (ARCHITECTURE | NOT_OURO | {"layer_types": []}).items():
        if given[key] != ours:
            raise UserError(f"{path} says {key} {given[key]!r}: only Ouro's {ours or 'full_attention'!r} is known here")
    if missing := [key for key in SHAPE if key not in config]:
        raise UserError(f"{path} lacks {', '.join(missing)}: restore the file")
    shape = {}
    for key, (ours, rule, holds) in CONFIG_KEYS.items():
        value = config.get(key)
        if key in config and not holds(value):
            raise UserError(f"{path} says {key} {value!r}: it must be {rule}")
        if key in config and not (value is None and key in HEADS):
            shape[ours] = tuple(value) if isinstance(value, list) else value
    try:
        return ModelConfig(**shape).resolved()
    except UserError as error:
        raise UserError(f"{path} has a shape that no model can have ({error})") from error


def index_tensors(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Path]:
    """The file of each tensor in a folder. Raises UserError for a damaged file, or another shape or type than ours."""
    index, place = folder / INDEX, {}
    files: dict[str, set[str] | None] = {"model.safetensors": None}  # what each holds, if an index says it
    if not (folder / "model.safetensors").is_file() and index.is_file():
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise UserError(f"{index} has no weight_map of names to files: restore the file")
        files = {file: {key for key in where if where[key] == file} for file in sorted({*where.values()})}
    elif not (folder / "model.safetensors").is_file():
        if pickles := sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(kind)):
            problem = f"{folder} holds {pickles[0]}, a pickle, which can run any code when it is loaded"
            way_out = "only safetensors are read; convert it in a sandbox, by safetensors.torch.save_file"
            raise UserError(f"{problem}: {way_out}")
        raise UserError(f"{folder} has no model.safetensors: only safetensors checkpoints are read")
    for file, keys in files.items():
        path = folder / file
        if Path(file).name != file or not path.is_file():
            raise UserError(f"{index} names {file}, which is not in the folder: restore it")
        with open_safetensors(path) as weights:
            stored = {*weights.keys()}
            if keys and keys != stored:
                wrong = shorten(", ".join(sorted(keys ^ stored)), 200)
                raise UserError(f"{index} and {path} disagree on {wrong}: restore both from a copy")
            for key in sorted(stored):
                place[key], part = path, weights.get_slice(key)
                shape, kind = tuple(part.get_shape()), part.get_dtype()
                if shape != shapes.get(key, shape):
                    raise UserError(f"{path} holds {key} of shape {shape}, its config.json says {shapes[key]}")
                if kind not in ("BF16", "F16", "F32", "F64"):
                    raise UserError(f"{path} holds {key} as {kind}: only BF16, F16, F32 and F64 weights are read")
    return place


def load(folder: Path, device="cpu", dtype: torch.dtype | None = torch.float32) -> LoopedTransformer:
    """The model in a checkpoint folder, in `dtype` (None: as stored). Raises UserError for a missing, damaged or
    foreign one. Tensors are read one at a time from the mapped file, so little more is held than the model."""
    with torch.device("meta"):
        model = LoopedTransformer(load_config(folder))
    shapes = {ouro_name(name): tuple(p.shape) for name, p in model.named_parameters()}
    place = index_tensors(folder, shapes)
    copies = ("lm_head.weight", "model.embed_tokens.weight")
    if model.config.tied and place.keys() >= {*copies}:  # some writers keep both
        if not torch.equal(*(read_tensor(place[key], key) for key in copies)):
            raise UserError(f"{folder} says tie_word_embeddings, but its lm_head.weight differs: set it to false")
        del place["lm_head.weight"]
    if shapes.keys() != place.keys():
        wrong = (sorted(shapes.keys() - place.keys()), sorted(place.keys() - shapes.keys()))
        missing, extra = (shorten(", ".join(names) or "none", 200) for names in wrong)
        raise UserError(f"{folder} does not match its config.json: missing {missing}, extra {extra}")
    dtype = dtype or reduce(torch.promote_types, (read_tensor(place[key], key).dtype for key in shapes))
    weights = {key.removeprefix("model."): read_tensor(place[key], key).to(device, dtype, copy=True) for key in shapes}
    model.load_state_dict(weights, strict=False, assign=True)  # a tied head has no entry of its own
    if model.config.tied:
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


def export(source: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path], dtype: DType = "bf16") -> None:
    """Write a checkpoint again: in another precision, in one file or in shards, with its tokenizer.

    Args:
        source: checkpoint folder to read.
        out: folder to write.
        dtype: precision of the weights in the file."""
    if out.exists():  # said before a large model is read
        raise UserError(f"{out} is there already: nothing saved is overwritten, give another folder")
    model = load(source, dtype=DTYPES[dtype])
    save(model, out, source=source)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters in {dtype}, from {source}")


if __name__ == "__main__":
    run_cli(lambda: tyro.extras.subcommand_cli_from_dict({"export": export}))
