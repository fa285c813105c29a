"""Checkpoint folders, in Ouro's own layout: config.json, model.safetensors (or shards and their index), tokenizer.json.

python -m support.checkpoint export IN OUT --dtype bf16     writes a checkpoint again, in another precision
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from pathlib import Path
from reprlib import repr as brief
from textwrap import shorten

import torch
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from model import MAX_LAYERS, MAX_LOOPS, MAX_SIZE, LoopedTransformer, ModelConfig
from support.processes import full_tensor, is_writer
from support.runtime import DTYPES, DType, UserError, run_cli

# Ouro's names of our fields; the shape and rope_theta are needed, the rest has Ouro's defaults
SHAPE = {"num_hidden_layers": "layers", "total_ut_steps": "loops", "hidden_size": "width", "vocab_size": "vocab_size"}
SHAPE |= {"num_attention_heads": "heads", "intermediate_size": "ffn"}
COUNTS = SHAPE | {"num_key_value_heads": "kv_heads", "head_dim": "head_dim", "max_position_embeddings": "max_positions"}
MOST = {"num_hidden_layers": MAX_LAYERS, "total_ut_steps": MAX_LOOPS, "max_position_embeddings": 2**31 - 1}
SCALES = {"rope_theta": "rope_theta", "rms_norm_eps": "rms_norm_eps", "initializer_range": "init_std"}
TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id"}
RULES = (  # what their values must be, null aside: in words and as a function
    ("a whole number from 1 to {}", lambda x, most: type(x) is int and 0 < x <= most, COUNTS),
    ("a number above 0, below 1e18", lambda x, _: type(x) in (int, float) and 0 < x < 1e18, SCALES),
    ("0 or more", lambda x, _: type(x) in (int, float) and x >= 0, {"early_exit_threshold": "exit_threshold"}),
    ("true or false", lambda x, _: isinstance(x, bool), {"tie_word_embeddings": "tied"}),
    ("a token's number", lambda x, _: are_tokens(x if isinstance(x, list) else [x]), TOKENS),
)
CONFIG_KEYS = {key: (ours, rule, holds) for rule, holds, names in RULES for key, ours in names.items()}
# What a configuration says of the computation: ours does just this. A key that stands nowhere here changes no number
ARCHITECTURE = {"model_type": "ouro", "architectures": ["OuroForCausalLM"], "hidden_act": "silu", "rope_scaling": None}
ARCHITECTURE |= {"attention_dropout": 0.0, "use_sliding_window": False}
NOT_OURO = {"rope_type": "default", "type": "default", "factor": 1.0, "partial_rotary_factor": 1.0, "pruned_heads": {}}
NOT_OURO |= {"rope_parameters": None, "quantization_config": None, "attention_bias": False, "early_exit_step": None}
KNOWN = {"layer_types": "full_attention"} | ARCHITECTURE | NOT_OURO  # or null, or no such key
ROPE_PLACES = ("rope_parameters", "rope_scaling", "full_attention")  # where rotary settings stand, but for the top
# What only other programs read; the published code is the same for all sizes
FOR_OTHERS = {"sliding_window": None, "use_cache": True, "transformers_version": "4.55.0"}
PUBLISHED = {"AutoConfig": "configuration_ouro.OuroConfig", "AutoModel": "modeling_ouro.OuroModel"}
PUBLISHED |= {"AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM"}
FOR_OTHERS["auto_map"] = {kind: f"ByteDance/Ouro-1.4B--{name}" for kind, name in PUBLISHED.items()}
INDEX = "model.safetensors.index.json"
GENERATION, SETTINGS = "generation_config.json", "tokenizer_config.json"
COMPANIONS = f"""{GENERATION} tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json
    merges.txt chat_template.jinja""".split()  # what else a folder holds, copied as it is
EOS, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # the last two are ChatML's
CHATML = "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
CHATML += "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def are_tokens(ids: list) -> bool:
    return ids != [] and all(type(i) is int and 0 <= i < 2**32 for i in ids)


def join_tokens(*ids: object) -> int | tuple[int, ...] | None:
    """One token, several, or none, of each, as one configuration has them."""
    joined = tuple(dict.fromkeys(i for x in ids if x is not None for i in (x if isinstance(x, list | tuple) else [x])))
    return joined if len(joined) > 1 else joined[0] if joined else None


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
    except (OSError, SafetensorError) as error:  # safetensors has its own word for a full disk
        raise UserError(f"{folder} can't be written ({error}): make room; what was saved before is intact") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # nothing is there once it is renamed


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer.json, without its cutting and padding. Raises UserError if there is none."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path} is not a tokenizer ({error}): give a tokenizer.json, or 'bytes'") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def save(model: LoopedTransformer, folder: str | Path, tokenizer=None, *, dtype=None, source=None) -> None:
    """Write a checkpoint folder, or leave none and raise UserError. Every process of a sharded model takes part.
    tokenizer  a tokenizers.Tokenizer, saved with the weights (default: the files of the one in `source`)
    dtype      a torch.dtype for the weights in the file (default: as they are)
    source     a checkpoint folder (str or Path) whose generation settings are copied"""
    c, dtype = model.config, dtype or model.embed_tokens.weight.dtype
    files = {name: path for name in COMPANIONS if source and (path := Path(source, name)).is_file()}
    known = tokenizer or ("tokenizer.json" in files and load_tokenizer(files["tokenizer.json"]))
    is_chat = known and None not in (known.token_to_id(IM_START), known.token_to_id(IM_END))
    eos = join_tokens(c.eos_token_id, known.token_to_id(IM_END) if is_chat else None)
    first = eos[0] if isinstance(eos, tuple) else eos
    generation = read_json(files[GENERATION]) if GENERATION in files else {}
    generation = generation or {"bos_token_id": c.bos_token_id, "pad_token_id": first}
    config = ARCHITECTURE | FOR_OTHERS | {key: getattr(c, ours) for key, (ours, *_) in CONFIG_KEYS.items()}
    config |= {"layer_types": ["full_attention"] * c.layers, "torch_dtype": str(dtype).removeprefix("torch.")}
    config["early_exit_threshold"] = 2.0 if c.exit_threshold == 1 else c.exit_threshold  # a gate there rounds to 1
    with atomic_folder(Path(folder)) as temporary:
        save_weights({ouro_name(name): p.detach() for name, p in model.named_parameters()}, temporary, dtype)
        if not is_writer():
            return
        for name, path in files.items() if tokenizer is None else ():
            shutil.copyfile(path, temporary / name)
        for name, content in (("config.json", config), (GENERATION, generation)):
            write_json(temporary / name, content | {"eos_token_id": eos})
        if tokenizer is not None:
            tokenizer.save(str(temporary / "tokenizer.json"))
        if known:
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
            settings["model_input_names"] = ["input_ids", "attention_mask"]
            settings["eos_token"] = settings["pad_token"] = None if first is None else known.id_to_token(first)
            settings |= {"chat_template": CHATML} if is_chat and "chat_template.jinja" not in files else {}
            own = read_json(files[SETTINGS]) if tokenizer is None and SETTINGS in files else {}
            if settings.keys() - own.keys():  # what the source says comes first
                write_json(temporary / SETTINGS, settings | own)


def save_weights(weights: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Write model.safetensors. All processes gather, one tensor at a time."""
    gathered = ((name, full_tensor(weight)) for name, weight in weights.items())
    tensors = {name: weight.to("cpu", dtype).contiguous() for name, weight in gathered if is_writer()}
    if is_writer():
        folder.mkdir(exist_ok=True)
        path = folder / "model.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(folder.stat().st_mode & 0o666)  # the library writes it for its owner alone


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
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


def load_config(folder: str | Path) -> ModelConfig:
    """Shape of the checkpoint in a folder. Raises UserError if it isn't one, or isn't Ouro's architecture."""
    path, generation = Path(folder, "config.json"), Path(folder, GENERATION)
    if not path.is_file():
        way = f"to download one: hf download ORGANISATION/NAME --local-dir {folder}"
        raise UserError(f"{folder} is not a checkpoint folder: it has no config.json ({way})")
    config = {"model_type": ""} | {key: value for key, value in read_json(path).items() if value is not None}
    types, parts = config.pop("layer_types", []), [("", config)]
    config["layer_types"] = ([x for x in types if x != "full_attention"] if type(types) is list else [types]) or None
    for place, part in parts:  # grows by the objects that hold rotary settings
        parts += [(f"{place}{key} ", part.pop(key)) for key in ROPE_PLACES if isinstance(part.get(key), dict)]
        for key, value in sorted(((k, v) for k, v in part.items() if v is not None), reverse=place > ""):  # type first
            ours = config.setdefault(key, value) if key == "rope_theta" else KNOWN.get(key, None if place else value)
            if value != ours:
                raise UserError(f"{path} says {place}{key} {brief(value)}: only Ouro's {ours!r} is known here")
    if missing := [key for key in (*SHAPE, "rope_theta") if key not in config]:
        raise UserError(f"{path} lacks {', '.join(missing)}: restore the file")
    more = read_json(generation).get("eos_token_id") if generation.is_file() else None
    for file, values in ((path, config), (generation, {} if more is None else {"eos_token_id": more})):
        for key, (_, rule, holds) in CONFIG_KEYS.items():
            if key in values and not holds(values[key], most := MOST.get(key, MAX_SIZE)):
                raise UserError(f"{file} says {key} {brief(values[key])}: it must be {rule.format(most)}")
    shape = {ours: config[key] for key, (ours, *_) in CONFIG_KEYS.items() if key in config}
    shape |= {"bos_token_id": config.get("bos_token_id"), "eos_token_id": join_tokens(config.get("eos_token_id"), more)}
    shape |= {"exit_threshold": min(1.0, shape.get("exit_threshold", 1.0))}
    try:
        return ModelConfig(**shape).resolved()
    except UserError as error:
        raise UserError(f"{path} has a shape that no model can have ({error})") from error


def index_tensors(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Path]:
    """The file of each tensor in a folder. Raises UserError for a damaged file, or another shape or type than ours."""
    index, where, place = folder / INDEX, {}, {}
    if not (folder / "model.safetensors").is_file() and index.is_file():
        where = read_json(index).get("weight_map")
        if not where or not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise UserError(f"{index} has no weight_map of names to files: restore the file")
    for file in sorted({*where.values()}) or ["model.safetensors"]:
        path = folder / file
        if Path(file).name != file or not os.path.isfile(path):
            raise UserError(f"{folder} has no {file}: restore it (a pickle, .bin or .pt, can run any code: convert it)")
        with open_safetensors(path) as weights:
            stored = {*weights.keys()}
            if where and stored != {key for key in where if where[key] == file}:
                raise UserError(f"{index} and {path} disagree on its tensors: restore both from a copy")
            for key in sorted(key for key in stored if not key.endswith("rotary_emb.inv_freq")):  # computed here
                place[key], part = path, weights.get_slice(key)
                shape, kind = tuple(part.get_shape()), part.get_dtype()
                if shape != shapes.get(key, shape):
                    raise UserError(f"{path} holds {key} of shape {shape}, its config.json says {shapes[key]}")
                if kind not in ("BF16", "F16", "F32", "F64"):
                    raise UserError(f"{path} holds {key} as {kind}: only BF16, F16, F32 and F64 weights are read")
    return place


def load(folder: str | Path, device="cpu", dtype: torch.dtype | None = torch.float32) -> LoopedTransformer:
    """The model in a checkpoint folder, in `dtype` (None: as stored). Raises UserError for a missing, damaged or
    foreign one. Tensors are read one at a time from the mapped file, so little more is held than the model."""
    folder, config = Path(folder), load_config(folder)
    with torch.device("meta"):  # of no more layers than the files can hold
        model = LoopedTransformer(replace(config, layers=min(config.layers, 1 + len(index_tensors(folder, {})))))
    shapes = {ouro_name(name): tuple(p.shape) for name, p in model.named_parameters()}
    place = index_tensors(folder, shapes)
    copies = ("lm_head.weight", "model.embed_tokens.weight")
    if config.tied and place.keys() >= {*copies}:  # some writers keep both
        if not torch.equal(*(read_tensor(place[key], key) for key in copies)):
            raise UserError(f"{folder} says tie_word_embeddings, but its lm_head.weight differs: set it to false")
        del place["lm_head.weight"]
    if shapes.keys() != place.keys():
        names = (", ".join(sorted(a.keys() - b.keys())) for a, b in ((shapes, place), (place, shapes)))
        missing, extra = (shorten(some or "none", 200) for some in names)
        raise UserError(f"{folder} does not match its config.json: missing {missing}, extra {extra}")
    dtype = dtype or reduce(torch.promote_types, (read_tensor(place[key], key).dtype for key in place))
    weights = {key.removeprefix("model."): read_tensor(place[key], key).to(device, dtype, copy=True) for key in place}
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
        raise UserError(f"{path} is damaged, or a pointer of git-lfs ({error}): restore it from a copy") from error


def read_tensor(path: Path, key: str) -> Tensor:
    """One tensor, mapped; a file opened for it alone is unmapped with it."""
    with open_safetensors(path) as file:
        return file.get_tensor(key)


def export(source: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path], dtype: DType = "bf16") -> None:
    """Write a checkpoint again to a new folder OUT: in another precision and in one file, with its tokenizer."""
    model = load(source, dtype=DTYPES[dtype])
    save(model, out, source=source)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters in {dtype}, from {source}")


if __name__ == "__main__":
    run_cli(lambda: tyro.extras.subcommand_cli_from_dict({"export": export}))
