"""A run on the disk."""


)
Stage = Literal["pretrain", "gate", "rpt"]
FOLDER = {"pretrain": "base", "gate": "gate", "rpt": "rpt"}  # where each stage's checkpoint goes, in --out


@dataclass
class Run:
    """A stage under way: all that its steps change."""

    stage: Stage
    student: LoopedTransformer
    teacher: LoopedTransformer | None  # of LoopRPT
    optimizer: torch.optim.Optimizer
    step: int = 0  # steps done, skipped ones too
    skipped: int = 0  # of them, without an update, because the loss or the gradient was not finite
    bad: int = 0  # of them, in a row until now
    stopped: bool = False  # somebody asked for an end
    saved: str = "nothing is saved yet"  # what to tell a user whose run breaks


# ---------------------------------------------------------------------------------------------------------------------
# A run on the disk: state/STAGE-STEP/ holds all that a run needs to go on, in safetensors and JSON


def save_run(run: Run, folder: Path, config: Config) -> None:
    """Write state/STAGE-STEP, complete or not at all; then only this stage's newest stay, and the last before it.

    Raises UserError if it can't be written, or the weights are not finite: then the last good one stays.
    """
    target = folder / "state" / f"{run.stage}-{run.step:06}"
    norm = whole(get_total_norm(list(run.student.parameters()))).item()
    if not math.isfinite(norm):
        raise UserError(
            f"the weights are not finite after {run.stage} step {run.step}: {run.saved}; try a smaller --{run.stage}.lr"
        )
    if model.is_writer() and (folder / "log.jsonl").exists():
        model.sync(folder / "log.jsonl")
    with model.new_folder(target) as temporary:
        model.save(run.student, temporary / "student")
        if run.teacher:
            model.save(run.teacher, temporary / "teacher")
        if model.is_writer():
            (temporary / "moments").mkdir()
        moments = {
            f"{kind}.{name}": run.optimizer.state[p][kind]
            for name, p in run.student.named_parameters()
            for kind in ("exp_avg", "exp_avg_sq")
            if p in run.optimizer.state
        }
        model.save_weights(moments, temporary / "moments", run.student.embed_tokens.weight.dtype)
        if model.is_writer():
            files = {str(f.relative_to(temporary)): checksum(f) for f in sorted(temporary.rglob("*")) if f.is_file()}
            info = {"stage": run.stage, "step": run.step, "skipped": run.skipped, "bad": run.bad, "sha256": files}
            (temporary / "state.json").write_text(json.dumps(info, indent=1) + "\n")
    run.saved = f"the last good checkpoint is {target}"
    if dist.is_initialized():
        dist.barrier()  # from here on all may read it
    if model.is_writer():
        mine = states(folder, (run.stage,))
        for old in mine[config.train.keep :] + [s for s in states(folder, config.objective) if s not in mine][1:]:
            (old / "state.json").unlink(missing_ok=True)  # from here on it is no checkpoint
            shutil.rmtree(old, ignore_errors=True)


def states(folder: Path, stages: tuple[Stage, ...]) -> list[Path]:
    """The saved states of these stages, from the last step of the last stage back."""
    found = []
    for path in (folder / "state").glob("*-*"):
        stage, _, step = path.name.partition("-")
        if stage in stages and step.isdecimal():
            found.append((stages.index(stage), int(step), path))
    return [path for _, _, path in sorted(found, reverse=True)]


def checksum(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def flaw(state: Path) -> str | None:
    """What is wrong with a saved state; None if nothing is. An error of the disk is not the state's: it is raised."""
    try:
        info = model.read_json(state / "state.json")
        if f"{info['stage']}-{info['step']:06}" != state.name or "student/config.json" not in info["sha256"]:
            return "its state.json is another's"
        wrong = [name for name, digest in info["sha256"].items() if checksum(state / name) != digest]
    except (FileNotFoundError, UserError, KeyError, TypeError, AttributeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(wrong)} changed since it was written" if wrong else None


def newest(folder: Path, stage: Stage, step: int | None = None) -> Path | None:
    """The newest sound state of a stage, or that of a step. What is damaged is put aside. All processes agree."""
    chosen = torch.tensor(-1)
    if model.is_writer():
        for state in states(folder, (stage,)):
            if step is not None and state.name != f"{stage}-{step:06}":
                continue
            if not (why := flaw(state)):
                chosen.fill_(int(state.name.partition("-")[2]))
                break
            console.print(f"{state} is passed over ({why})", soft_wrap=True)
            if (state / "state.json").exists():  # it may still be of use to somebody
                aside = [state.with_name(f"{state.name}.damaged{n or ''}") for n in range(100)]
                state.rename(next(path for path in aside if not path.exists()))
            else:
                shutil.rmtree(state)  # it was being removed
    if dist.is_initialized():
        chosen = chosen.to("cuda") if dist.get_backend() == "nccl" else chosen
        dist.broadcast(chosen, 0)
    return folder / "state" / f"{stage}-{int(chosen):06}" if chosen >= 0 else None


def load_run(state: Path, config: Config, device: torch.device, spread: Callable) -> Run:
    """A run as it was saved, on this number of processes. Raises UserError if it is another model's."""
    info, shape = model.read_json(state / "state.json"), model.load_config(state / "student")
    for f in fields(ModelConfig):
        found, given = getattr(shape, f.name), getattr(config.model.resolved(), f.name)
        if found != given:
            raise UserError(f"{state} is of another model: its {f.name} is {found}, this run's {given}; remove it")
    student = model.load(state / "student", device)
    teacher = model.load(state / "teacher", device) if (state / "teacher").exists() else None
    run = begin(info["stage"], student, config, teacher=teacher, spread=spread)
    run.step, run.skipped, run.bad = info["step"], info["skipped"], info["bad"]
    run.saved = f"the last good checkpoint is {state}"
    place = model.find_weights(state / "moments", {})
    trained = {p for group in run.optimizer.param_groups for p in group["params"]}
    for name, p in run.student.named_parameters():
        if p not in trained or f"exp_avg.{name}" not in place:
            continue
        moments = {"step": torch.tensor(float(run.step - run.skipped), device=p.device)}
        for kind in ("exp_avg", "exp_avg_sq"):
            moment = model.read_tensor(place[f"{kind}.{name}"], f"{kind}.{name}").to(p.device, p.dtype, copy=True)
            if isinstance(p, DTensor):
                moment = distribute_tensor(moment, p.device_mesh, p.placements, src_data_rank=None)
            moments[kind] = moment
        run.optimizer.state[p] = moments
    return run


def trim_log(path: Path, done: tuple[Stage, ...], stage: Stage, step: int) -> None:
    """Keep of a log the stages that are done and this one's steps up to `step`: the rest will be done again."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            now = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line that was being written when the run ended
        if now["stage"] in done or (now["stage"] == stage and now["step"] <= step):
            kept.append(line + "\n")
    model.write_whole(path, "".join(kept))


def start_record(config: Config, device: torch.device, world: int) -> dict:
    """What run.json says of each start."""
    changed = eval.git("status", "--porcelain", "--untracked-files=no")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "safetensors", "tokenizers", "tyro")}
    found = {
        "time": now_text(),
        "processes": world,
        "dirty": None if changed is None else bool(changed),
    }
    return (
        found | eval.provenance(device) | {"python": sys.version.split()[0], "versions": versions, "seed": config.seed}
    )


def revive(kind: type, found: dict):
    """A configuration from its JSON form."""
    values = {}
    for name, hint in get_type_hints(kind).items():
        if name not in found and not is_dataclass(hint):
            continue  # a flag that came later
        value = found[name]
        if isinstance(value, dict):
            value = revive(hint, value)
        elif isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, str) and "Path" in str(hint):
            value = Path(value)
        values[name] = value
    return replace(PAPER if kind is RPTConfig else kind(), **values)  # what came later changes no older run


# What a run stays with when it is resumed
FIXED = ("objective", "init", "seed", "paper", "model.", "data.", "train.batch")


def flags(config, group: str = "") -> dict[str, object]:
    """Every flag's name and value."""
    found = {}
    for f in fields(config):
        value = getattr(config, f.name)
        found |= flags(value, f"{f.name}.") if is_dataclass(value) else {f"{group}{f.name}": value}
    return found
