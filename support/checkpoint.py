"""Checkpoint folders, in Ouro's own layout."""


CONFIG_KEYS = {  # Ouro's name: ours
    "num_hidden_layers": "layers",
    "total_ut_steps": "loops",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "ffn",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tied",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "early_exit_threshold": "exit_threshold",
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
FOR_OTHERS = {  # what only other programs read
    "auto_map": {
        "AutoConfig": "ByteDance/Ouro-1.4B--configuration_ouro.OuroConfig",
        "AutoModel": "ByteDance/Ouro-1.4B--modeling_ouro.OuroModel",
        "AutoModelForCausalLM": "ByteDance/Ouro-1.4B--modeling_ouro.OuroForCausalLM",
    },
    "sliding_window": None,
    "use_cache": True,
    "transformers_version": "4.55.0",
}
NOT_OURO = {"rope_type": "default", "quantization_config": None, "attention_bias": False}  # and no key of it
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # larger checkpoints are split
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
GENERATION = "generation_config.json"
BESIDE = f"""{GENERATION} tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json
    merges.txt chat_template.jinja""".split()  # what else a folder holds, copied as it is


def ouro_name(name: str) -> str:
    """Name of a parameter in an Ouro checkpoint."""
    return name if name.startswith("lm_head.") else f"model.{name}"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
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
            sync(path)
        os.rename(temporary, folder)
        sync(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):  # safetensors has its own word for a full disk
            raise UserError(
                f"{folder} can't be written ({error}): make room or give another place; what was saved before is intact"
            ) from error
        raise


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def save(
    model: LoopedTransformer,
    folder: Path,
    tokenizer=None,
    *,
    dtype: torch.dtype | None = None,
    beside: Path | None = None,
) -> None:
    """Write a checkpoint folder, complete or not at all. Every process of a sharded model takes part, one writes.

    tokenizer  a tokenizers.Tokenizer, saved beside the weights (default: the files of the one in `beside`)
    dtype      of the weights in the file (default: as they are)
    beside     a checkpoint folder whose generation settings are copied
    Raises UserError if the folder is there already, or can't be written.
    """
    c, shape = model.config, asdict(model.config)
    dtype = dtype or model.embed_tokens.weight.dtype
    config = ARCHITECTURE | FOR_OTHERS | {key: shape[ours] for key, ours in CONFIG_KEYS.items()}
    config |= {"layer_types": ["full_attention"] * c.layers, "torch_dtype": str(dtype).removeprefix("torch.")}
    with new_folder(folder) as temporary:
        save_weights({ouro_name(name): p.detach() for name, p in model.named_parameters()}, temporary, dtype)
        if not is_writer():
            return
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in BESIDE if tokenizer is None else (GENERATION,):
            if beside and (beside / name).is_file():
                shutil.copyfile(beside / name, temporary / name)
        if tokenizer is not None:
            tokenizer.save(str(temporary / "tokenizer.json"))
            first = c.eos_token_id[0] if isinstance(c.eos_token_id, tuple) else c.eos_token_id
            end = None if first is None else tokenizer.id_to_token(first)
            how = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": end,
                "clean_up_tokenization_spaces": False,
            }
            (temporary / "tokenizer_config.json").write_text(json.dumps(how, indent=2) + "\n")


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
            whole = weights[name].full_tensor() if isinstance(weights[name], DTensor) else weights[name]
            if is_writer():
                gathered[name] = whole.to("cpu", dtype).contiguous()
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
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): restore the file") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, not an object: restore the file")
    return found


def write_whole(path: Path, text: str) -> None:
    """Write a file whole, or leave the old one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, found: dict) -> None:
    write_whole(path, json.dumps(found, indent=1, default=str) + "\n")


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
    return shape_of(config, path)


def shape_of(config: dict, path: Path) -> ModelConfig:
    """Ours from Ouro's keys. Raises UserError for one that is missing, or has a value that it can't have."""
    missing = [key for key, ours in CONFIG_KEYS.items() if ours in NEEDED and key not in config]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: restore the file")
    found = {}
    for key, ours in CONFIG_KEYS.items():
        value = config.get(key)
        if key not in config or (value is None and ours in ("kv_heads", "head_dim")):
            continue
        if ours in ("bos_token_id", "eos_token_id"):
            value = tuple(value) if isinstance(value, list) and value else value
            ids = value if isinstance(value, tuple) else (value,)
            rule, kept = "a token's number, or null", value is None or all(type(i) is int and i >= 0 for i in ids)
        elif ours == "tied":
            rule, kept = "true or false", isinstance(value, bool)
        elif ours in ("rope_theta", "rms_norm_eps", "init_std", "exit_threshold"):
            low, high = (0, 1) if ours == "exit_threshold" else (1e-30, math.inf)
            rule, kept = f"a number from {low} to {high}", type(value) in (int, float) and low <= value <= high
        else:
            rule, kept = "a whole number above 0", type(value) is int and value > 0
        if not kept:
            raise UserError(f"{path} says {key} {value!r}: it must be {rule}")
        found[ours] = value
    try:
        return ModelConfig(**found).resolved()
    except UserError as error:
        raise UserError(f"{path} has a shape that no model can have ({error})") from error


def weight_files(folder: Path) -> dict[str, list[str] | None]:
    """The safetensors files of a checkpoint folder, and the keys that its index (if it has one) says each holds."""
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors": None}
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for kind in PICKLES for path in folder.glob(kind))
        if pickles:
            raise UserError(
                f"{folder} holds {pickles[0]}, a pickle, which can run any code when it is loaded: only safetensors "
                "are read; convert it where that does no harm, with safetensors.torch.save_file"
            )
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


def some(names: list[str]) -> str:
    """The first few names."""
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3) if names else "none"


def find_weights(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Path]:
    """The file of each tensor in a folder. Raises UserError for a damaged file, or another shape or type than ours."""
    place = {}
    for file, keys in weight_files(folder).items():
        path = folder / file
        with opened(path) as weights:
            if keys is not None and {*keys} != {*weights.keys()}:
                wrong = some(sorted({*keys} ^ {*weights.keys()}))
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
    place = find_weights(folder, shapes)
    if config.tied and {"lm_head.weight", "model.embed_tokens.weight"} <= place.keys():  # some writers keep the copy
        head, embedding = (read_tensor(place[key], key) for key in ("lm_head.weight", "model.embed_tokens.weight"))
        if not head.equal(embedding):
            raise UserError(f"{folder} says tie_word_embeddings, but its lm_head.weight differs: set it to false")
        del place["lm_head.weight"]
    missing, extra = sorted(names.keys() - place.keys()), sorted(place.keys() - names.keys())
    if missing or extra:
        raise UserError(f"{folder} does not match its config.json: missing {some(missing)}, extra {some(extra)}")
    dtype = dtype or reduce(torch.promote_types, (read_tensor(place[key], key).dtype for key in names))
    weights = {name: read_tensor(place[key], key).to(device, dtype, copy=True) for key, name in names.items()}
    model.load_state_dict(weights, strict=False, assign=True)  # a tied head has no entry of its own
    if config.tied:
        model.lm_head.weight = model.embed_tokens.weight
    return model.requires_grad_()


@contextmanager
def opened(path: Path) -> Iterator:
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
    with opened(path) as file:
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
    save(model, out, beside=source)
    size = sum(p.numel() for p in model.parameters())
    print(f"{out}: {size:,} parameters in {dtype}, from {source}")


def main() -> None:
    tyro.extras.subcommand_cli_from_dict({"export": export})


if __name__ == "__main__":
    report(main)
