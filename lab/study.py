"""The study: every control and every ablation from one base."""


# ---------------------------------------------------------------------------------------------------------------------
# The study: every control and every ablation from one base, with the same rows and steps

EXACT = "--paper --rpt.estimator exact --rpt.rollouts 1"
NEXT_TOKEN = f"{EXACT} --rpt.rep-loops last --rpt.pg-weight 0 --rpt.kl-weight 0 --rpt.ent-weight 0"
STAGE_I = f"{EXACT} --rpt.rep-loops exits --rpt.noise-std 0 --rpt.lambda-base 0 --rpt.kl-weight 0 --rpt.ent-weight 0.1"
VARIANTS = {  # stage, whose learning rate of the track, and flags
    "base": ("pretrain", "ours", ""),
    "next-token": ("rpt", "control", f"{NEXT_TOKEN} --rpt.rho 1"),
    "next-token-hard": ("rpt", "paper", NEXT_TOKEN),
    "stage-1": ("rpt", "control", f"{STAGE_I} --rpt.rho 1"),
    "stage-1-hard": ("rpt", "paper", STAGE_I),
    "stage-2": ("gate", "ours", ""),
    "sampled": ("rpt", "paper", "--paper"),
    "exact": ("rpt", "paper", EXACT),
    "gate-only": ("rpt", "gate", f"{EXACT} --rpt.rep-weight 0 --rpt.gate-only"),
    "rep-only": ("rpt", "paper", f"{EXACT} --rpt.pg-weight 0"),
    "no-rep-no-entropy": ("rpt", "paper", f"{EXACT} --rpt.rep-weight 0 --rpt.ent-weight 0"),
    "no-selection": ("rpt", "paper", f"{EXACT} --rpt.rho 1"),
    "no-noise": ("rpt", "paper", f"{EXACT} --rpt.noise-std 0"),
    "no-kl": ("rpt", "paper", f"{EXACT} --rpt.kl-weight 0"),
    "no-price": ("rpt", "paper", f"{EXACT} --rpt.lambda-base 0"),
    "looprpt": ("rpt", "ours", ""),
    "looprpt-no-distill": ("rpt", "ours", "--rpt.distill-weight 0"),
    "looprpt-no-floor": ("rpt", "ours", "--rpt.floor 0"),
    "looprpt-no-policy": ("rpt", "ours", "--rpt.pg-weight 0"),
    "looprpt-no-price": ("rpt", "ours", "--rpt.lambda-base 0"),
}
TEXT = "--data.path {0}/train.jsonl --data.tokenizer {0}/tokenizer.json"  # in the folder of the study
TRACKS = {  # flags of all runs
    "demo": "--gate.steps 500",
    "text": f"{TEXT} --data.length 256 --model.layers 2 --model.width 192 --train.batch 8 --precision bf16 "
    "--train.compile on --pretrain.steps 2000 --rpt.steps 200 --gate.steps 200",
    "gpu": f"{TEXT} --data.length 512 --model.layers 8 --model.width 768 --model.heads 12 --train.batch 64 "
    "--pretrain.steps 2000 --pretrain.lr 1e-3 --rpt.steps 200 --gate.steps 200",
}
RATES = {  # learning rates, where not the defaults; LOG.md says how those of text were chosen
    "demo": {"gate": "1e-2"},
    "text": {"gate": "1e-2", "control": "3e-4", "paper": "1e-4"},
    "gpu": {"gate": "1e-2", "control": "3e-4", "paper": "1e-4", "ours": "3e-4"},
}
FILES = {  # of --texts: what is trained on, what the tokenizer is learned from, what is reported
    "text": {"train": ("gsm8k_train",), "words": ("gsm8k_train", "omni_train"), "test": ("gsm8k_test_1019",)},
    "gpu": {"train": ("gsm8k_train", "omni_train"), "words": ("gsm8k_train", "omni_train", "books_train")}
    | {"test": ("gsm8k_test_1019",)},
}


@dataclass(frozen=True)
class StudyConfig:
    """Train a base for each seed and every variant from it, and score them all on rows that nothing was chosen by.
    A file of results for each; what is there already is not done again."""

    track: Literal["demo", "text", "gpu"] = "demo"  # the built-in task, text on two cores, text on a GPU
    seeds: int = 3  # number of bases
    start: int = 0  # the first one's seed; several processes can share a study, each with seeds of its own
    only: tuple[str, ...] = ()  # of the variants (none: all)
    texts: Path = Path("../shared/data")  # folder of gsm8k_train, gsm8k_test_1019, omni_train (and books_train) .jsonl
    out: Path | None = None  # folder of the runs (none: out/study-TRACK)
    results: Path | None = None  # folder of the files of results (none: results/TRACK)
    device: str = "auto"  # cpu, cuda, cuda:1 (auto: a GPU if there is one)

    @property
    def of(self) -> range:
        """The seeds."""
        return range(self.start, self.start + self.seeds)

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        if self.seeds < 1:
            raise UserError(f"--seeds {self.seeds} is below 1: give a positive number")
        if unknown := [name for name in self.only if name not in VARIANTS]:
            raise UserError(f"--only {' '.join(unknown)}: no such variant, the variants are {', '.join(VARIANTS)}")


def study() -> None:
    """`python eval.py study`: see StudyConfig."""
    import looprpt

    config = tyro.cli(StudyConfig, args=sys.argv[2:], prog="eval.py study")
    config.check()
    folder = config.out or Path("out") / f"study-{config.track}"
    results = config.results or Path("results") / config.track
    make_folder(folder)
    make_folder(results)
    gather_texts(config, folder)
    names = [name for name in VARIANTS if name == "base" or name in config.only or not config.only]
    for seed in config.of:
        first = None
        for name in names:
            run, result = folder / f"seed-{seed}" / name, results / f"{name}-{seed}.json"
            checkpoint = run / looprpt.FOLDER[VARIANTS[name][0]]
            if not train_variant(config, folder, seed, name, checkpoint):
                console.print("stopped: the same command goes on", soft_wrap=True)
                return
            if result.exists() and (run / "tally.safetensors").exists():
                continue
            console.print(f"scoring {name}, seed {seed}")
            first = first or score_variant(config, folder, folder / f"seed-{seed}" / "base" / "base")
            s = first if name == "base" else score_variant(config, folder, checkpoint)
            sets = buckets(first)
            found = {key: summary(s, tokens) for key, tokens in sets.items()}
            for key in found.keys() - {"all", *DIFFICULTY}:
                found[key].pop("curves", None)  # by operand they are many, and nobody draws them
            sums = {f"{side}.{key}": x for side in SIDES for key, x in tally(s, sets[side])._asdict().items()}
            save_file({key: x.contiguous() for key, x in sums.items()}, run / "tally.safetensors")
            log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
            every, record = max(1, len(log) // 50), model.read_json(run / "run.json")
            write_result(
                result,
                {"track": config.track, "variant": name, "seed": seed}
                | {"command": shlex.join(["python", "looprpt.py", *command(config, folder, seed, name)])}
                | {"trained": record["starts"][-1], "buckets": found}
                | {"training": [{k: now[k] for k in ("step", "loss", "loops")} for now in log[every - 1 :: every]]}
                | provenance(pick_device(config.device)),
            )
    against(config, folder, results)


def gather_texts(config: StudyConfig, folder: Path) -> None:
    """The files of a track of text, and its tokenizer.

    Raises UserError for a file that is not there.
    """
    for name, files in FILES.get(config.track, {}).items():
        if not (folder / f"{name}.jsonl").exists():
            pairs = [pair for file in files for pair in data.read(config.texts / f"{file}.jsonl")]
            lines = [json.dumps({"prompt": prompt or "", "response": text}) + "\n" for prompt, text in pairs]
            model.write_whole(folder / f"{name}.jsonl", "".join(lines))
    if config.track in FILES and not (folder / "tokenizer.json").exists():
        vocab = 2048 if config.track == "text" else 8192
        data.train_tokenizer(folder / "words.jsonl", vocab, folder / "tokenizer.json")


def command(config: StudyConfig, folder: Path, seed: int, name: str) -> list[str]:
    """Flags of looprpt.py for a run of the study."""
    stage, whose, flags = VARIANTS[name]
    rate = f"--rpt.lr {RATES[config.track][whose]}" if whose in RATES[config.track] else ""
    start = ["--init", str(folder / f"seed-{seed}" / "base" / "base")] if name != "base" else []
    shared = [flag.format(folder) for flag in TRACKS[config.track].split()]
    shared += ["--seed", str(seed), "--device", config.device, *flags.split(), *rate.split()]
    return ["--objective", stage, *start, *shared, "--out", str(folder / f"seed-{seed}" / name)]


def train_variant(config: StudyConfig, folder: Path, seed: int, name: str, checkpoint: Path) -> bool:
    """One run, if it isn't there, from its last state if it was cut off. False if somebody asked for an end.

    Raises UserError if what is there was trained with other flags.
    """
    import looprpt

    flags, record = command(config, folder, seed, name), folder / f"seed-{seed}" / name / "run.json"
    asked = looprpt.parse(flags)
    asked.check()
    if record.exists():
        saved = looprpt.revive(looprpt.Config, model.read_json(record)["config"])
        given, found = looprpt.flags(asked), looprpt.flags(saved)
        mute = {"out", "init", "resume", "device", "paper"}
        mute |= {key for key in given if key.split(".")[0] in {*looprpt.FOLDER} - {*asked.objective}}  # of other stages
        if other := [key for key in given if given[key] != found[key] and key not in mute]:
            what = ", ".join(f"--{key.replace('_', '-')} {found[key]} for {given[key]}" for key in other)
            raise UserError(f"{record.parent} was trained with {what}: move it away, or give another --out")
    if checkpoint.exists():
        return True
    console.rule(f"{name}, seed {seed}")
    asked = looprpt.parse([*flags, "--resume"]) if record.exists() else asked
    tokenizer = data.pick_tokenizer(asked.data, asked.init)
    rows, _, _ = data.split(asked.data, tokenizer, seed=seed)
    with looprpt.stop_signals() as stop:
        where = {"device": pick_device(config.device), "rank": 0, "world": 1}
        done = looprpt.run_stages(asked, tokenizer, rows, stopping=lambda: bool(stop), **where)
    return done is not None


def score_variant(config: StudyConfig, folder: Path, checkpoint: Path) -> Scores:
    """On the rows that the track reports on, as long as those it trains on; in float32 on a CPU, bfloat16 on a GPU."""
    import looprpt

    rows, settings = None, DataConfig()
    if config.track in FILES:
        length = looprpt.parse(TRACKS[config.track].split()).data.length
        settings = DataConfig(path=folder / "test.jsonl", length=length)
        rows, notes = data.encode(settings.path, data.pick_tokenizer(settings, checkpoint), settings)
        console.print(*notes, sep="\n", end="\n" * bool(notes), soft_wrap=True)
    source = data.source(rows, settings, batch=EvalConfig.batch, seed="study", held_out=True)
    device = pick_device(config.device)
    return score(model.load(checkpoint, device), source, device=device)


SIDES = ("all", "hard")  # buckets on which variants are compared
BESIDE = ("base", "stage-1", "sampled", "exact")  # what each variant is compared with; looprpt is with every other


def against(config: StudyConfig, folder: Path, results: Path) -> None:
    """Differences between all variants that are scored, averaged over the seeds that both have, with intervals from
    drawing documents."""
    seeds: dict[str, set[int]] = {}
    for path in sorted(results.glob("*-*.json")):
        name, _, seed = path.stem.rpartition("-")
        if (folder / f"seed-{seed}" / name / "tally.safetensors").exists():
            seeds.setdefault(name, set()).add(int(seed))

    pairs = [(a, b) for a in seeds for b in seeds if a != b and (b in BESIDE or a == "looprpt")]
    pairs = [(a, b, sorted(seeds[a] & seeds[b])) for a, b in pairs]
    found: dict[str, dict] = {}
    for bucket in SIDES:
        drawn = {}
        places = [(name, seed) for name in seeds for seed in seeds[name]]
        for name, seed in track(places, bucket, console=console, transient=True, disable=not console.is_terminal):
            sums = load_file(folder / f"seed-{seed}" / name / "tally.safetensors")
            drawn[name, seed] = Tally(*(sums[f"{bucket}.{key}"] for key in Tally._fields)).drawn()
        found[bucket] = {
            f"{a} - {b}": {"seeds": of} | compare([(drawn[a, seed], drawn[b, seed]) for seed in of], each=True)
            for a, b, of in pairs
            if of and all(drawn[a, seed].tokens.all() for seed in of)
        }
    what = {"track": config.track, "against": found}
    write_result(results / "against.json", what | provenance(pick_device(config.device)))


def write_result(path: Path, found: dict) -> None:
    """As JSON, numbers with five digits."""

    def short(x):
        if isinstance(x, dict):
            return {name: short(value) for name, value in x.items()}
        if isinstance(x, list | tuple):
            return [short(value) for value in x]
        return float(f"{x:.5g}") if isinstance(x, float) else x

    model.write_whole(path, json.dumps(short(found)) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Tables and pictures of a study, from its files alone


def load_study(paths: Sequence[Path], bucket: str = "all") -> tuple[dict[str, list[dict]], dict]:
    """The runs of each variant in the order of VARIANTS, and the differences between variants in a bucket.

    Raises UserError for files that are not of one study, or not of the same seeds for every variant.
    """
    runs: dict[str, list[dict]] = {}
    found, tracks = {}, set()
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is not a file: give the files of one folder, results/demo/*.json")
        file = model.read_json(path)
        if "track" not in file or not file.keys() & {"variant", "against"}:
            raise UserError(
                f"{path} is no result of `eval.py study`: give the files of one folder, results/demo/*.json"
            )
        tracks.add(file["track"])
        if "against" in file:
            found = file["against"].get(bucket, {})
            continue
        if bucket not in file["buckets"]:
            raise UserError(f"{path} has no bucket {bucket}: it has {', '.join(file['buckets'])}")
        runs.setdefault(file["variant"], []).append(file)
    if not runs or len(tracks) > 1:
        what = (
            f"the files are of {' and '.join(sorted(tracks))}" if runs else "there is no run's file among those given"
        )
        raise UserError(f"{what}: give the files of one folder, results/demo/*.json")
    seeds = {name: sorted(run["seed"] for run in each) for name, each in runs.items()}
    first = next(iter(seeds))
    for name, given in seeds.items():
        if given != seeds[first] or len({*given}) < len(given):
            raise UserError(
                f"{name} has the seeds {given}, {first} has {seeds[first]}: give one file for each seed of each"
            )
    return {name: runs[name] for name in [*VARIANTS, *sorted(runs.keys() - VARIANTS)] if name in runs}, found


def at_half(part: dict) -> tuple[float, float]:
    """Average loops and accuracy of a bucket, left at the gate's threshold 0.5."""
    return next((point["loops"], point["accuracy"]) for point in part["sweep"] if point["threshold"] == 0.5)


def study_table(paths: Sequence[Path], bucket: str = "all", only: Sequence[str] = ()) -> str:
    """Markdown: a row for each variant, mean and standard deviation over the seeds."""
    runs, found = load_study(paths, bucket)
    names = chosen(only, runs, "--only")
    first = next(iter(runs.values()))
    seeds, loops = sorted(run["seed"] for run in first), len(first[0]["buckets"][bucket]["by_loop"])
    heads = ["", *(f"loop {i + 1}" for i in range(loops)), "at q = 0.5", "loops there", "area", "looprpt ahead by"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]

    def percent(x: float | None) -> float | None:
        return None if x is None else 100 * x

    for name in names:
        parts = [run["buckets"][bucket] for run in runs[name]]
        left, accuracy = zip(*map(at_half, parts), strict=True)
        cells = [cell([percent(part["by_loop"][i]) for part in parts], 1) for i in range(loops)]
        cells += [cell([*map(percent, accuracy)], 1), cell([*left], 2)]
        cells.append(cell([percent(part.get("area", {}).get("gate")) for part in parts], 1))
        ahead = found.get(f"looprpt - {name}", {})
        if ahead.get("seeds") == seeds:
            _, low, high = map(percent, ahead["matched gate"])
            cells.append(f"{'+' if sum(ahead['each']) >= 0 else ''}{cell([*map(percent, ahead['each'])], 2)}")
            cells[-1] += f" [{low:+.2f}, {high:+.2f}]"
        else:
            cells.append("" if name == "looprpt" else "–")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join([*lines, "", what_was_run({name: runs[name] for name in names}, bucket)])


def what_was_run(runs: dict[str, list[dict]], bucket: str) -> str:
    """Seeds, tokens and commits of the runs of a table."""
    first = next(iter(runs.values()))
    tokens = " / ".join(f"{run['buckets'][bucket]['tokens']:,}" for run in first)
    ran = [run for found in runs.values() for run in found]
    trained, scored = (
        ", ".join(sorted({at["commit"][:7] for at in each if at["commit"]})) or "unknown"
        for each in ([run["trained"] for run in ran], ran)
    )
    seeds = ", ".join(str(run["seed"]) for run in first)
    return f"Seeds {seeds}; {tokens} tokens ({bucket}); trained at commit {trained}, scored at {scored}."


def loops_table(
    paths: Sequence[Path], at_loops: Sequence[float], bucket: str = "all", only: Sequence[str] = (), rules=()
) -> str:
    """Markdown: accuracy at given average numbers of loops, a row for each variant and exit rule.

    Mean and standard deviation over the seeds, read off each one's curve on straight lines.
    """
    runs, _ = load_study(paths, bucket)
    names = chosen(only, runs, "--only")
    curves = need_curves({name: runs[name] for name in names}, bucket)
    rules = chosen(rules, curves, "--rules")
    most = max(x for x, _ in curves["gate"])
    if wrong := [x for x in at_loops if not 1 <= x <= most]:
        raise UserError(f"--at-loops {' '.join(map(str, wrong))}: these models have between 1 and {most:g} loops")
    heads = ["", "leaves by", *(f"at {x:g}" for x in at_loops)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, rule in itertools.product(names, rules):
        found = torch.tensor([run["buckets"][bucket]["curves"][rule] for run in runs[name]])  # seeds K 2
        each = [100 * at(torch.full((len(found),), x), *found.unbind(-1)) for x in at_loops]
        cells = [cell(values.tolist(), 1) for values in each]
        lines.append("| " + " | ".join([name, rule, *cells]) + " |")
    return "\n".join([*lines, "", what_was_run({name: runs[name] for name in names}, bucket)])


def need_curves(runs: dict[str, list[dict]], bucket: str) -> dict[str, list]:
    """The curves of the first run. Raises UserError if a run has none in this bucket."""
    parts = [run["buckets"][bucket] for found in runs.values() for run in found]
    if not all(part["tokens"] and part.get("curves") for part in parts):
        raise UserError(
            f"--bucket {bucket} has no curves in these runs: it takes all, easy, medium or hard, with tokens"
        )
    return parts[0]["curves"]


def cell(values: list, digits: int) -> str:
    """Mean and standard deviation."""
    if None in values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def chosen(names: Sequence[str], among: Collection[str], flag: str) -> list[str]:
    """Those of the names, or all if there are none. Raises UserError for one that isn't there."""
    if unknown := [name for name in names if name not in among]:
        raise UserError(f"{flag} {' '.join(unknown)}: these runs have {', '.join(among)}")
    return [*(names or among)]


def table(
    files: Annotated[tuple[Path, ...], tyro.conf.Positional],
    bucket: str = "all",
    only: tuple[str, ...] = (),
    at_loops: tuple[float, ...] = (),
    rules: tuple[str, ...] = (),
) -> None:
    """A study as Markdown: accuracy in % after each loop and where the gate leaves at threshold 0.5, mean loops there,
    mean accuracy under the curve, and how far looprpt is ahead at its own number of loops (95 % interval).

    Args:
        files: what `eval.py study` wrote.
        bucket: all, easy, medium or hard.
        only: these variants (none: all).
        at_loops: instead, accuracy at these average numbers of loops, by every exit rule.
        rules: with at_loops, by these exit rules only (none: all).
    """
    if rules and not at_loops:
        raise UserError("--rules is for accuracy at numbers of loops: give --at-loops too, --at-loops 1.5 2 3")
    print(loops_table(files, at_loops, bucket, only, rules) if at_loops else study_table(files, bucket, only))


STYLES = {  # colours that differ for everybody, and marks that differ in print
    "base": ("#000000", "o", "-"),
    "next-token": ("#999999", "v", ":"),
    "stage-1": ("#0072B2", "s", "--"),
    "stage-2": ("#56B4E9", "D", "-."),
    "gate-only": ("#CC79A7", "X", ":"),
    "sampled": ("#E69F00", "^", "--"),
    "exact": ("#009E73", "P", "-."),
    "looprpt": ("#D55E00", "*", "-"),
}


def plot(
    files: Annotated[tuple[Path, ...], tyro.conf.Positional], out: Path = Path("assets"), bucket: str = "all"
) -> None:
    """Four pictures of a study, means over the seeds: accuracy over average loops, accuracy by loop, where tokens
    leave, and average loops in training.

    Args:
        files: what `eval.py study` wrote.
        out: folder of the pictures.
        bucket: all, easy, medium or hard.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"pictures need matplotlib ({error}): pip install -r requirements.txt") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs, _ = load_study(files, bucket)
    runs = {name: found for name, found in runs.items() if name in STYLES}
    if not runs:
        raise UserError(f"nothing to draw: it takes runs of {', '.join(STYLES)}")
    need_curves(runs, bucket)
    make_folder(out)
    track = next(iter(runs.values()))[0]["track"]

    def mean(values: list) -> Tensor:
        return torch.tensor(values).mean(0)

    def picture(name: str, xlabel: str, ylabel: str, draw: Callable, panels: int = 1) -> None:
        figure, every = pyplot.subplots(1, panels, figsize=(2 + 5 * panels, 4), layout="constrained", squeeze=False)
        for axes in every[0]:
            for variant, found in runs.items():
                colour, mark, line = STYLES[variant]
                parts = [run["buckets"][bucket] for run in found]
                draw(axes, found, parts, {"color": colour, "marker": mark, "linestyle": line, "label": variant})
            axes.set_xlabel(xlabel)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
        if panels > 1:  # the second one: around where the gates leave at threshold 0.5
            x, y = torch.tensor([at_half(run["buckets"][bucket]) for found in runs.values() for run in found]).T
            every[0, 1].set_xlim(x.min().item() - 0.2, x.max().item() + 0.2)
            every[0, 1].set_ylim(100 * y.min().item() - 0.5, 100 * y.max().item() + 0.5)
        every[0, 0].set_ylabel(ylabel)
        every[0, -1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        figure.savefig(out / f"{track}-{name}.png", dpi=150)
        pyplot.close(figure)
        console.print(out / f"{track}-{name}.png")

    def pareto(axes, found, parts, style) -> None:
        x, y = mean([part["curves"]["gate"] for part in parts]).T
        axes.plot(x, 100 * y, markersize=3, **style)
        half = mean([at_half(part) for part in parts])
        axes.plot(half[0], 100 * half[1], markersize=10, **style | {"label": None})

    def by_loop(axes, found, parts, style) -> None:
        y = mean([part["by_loop"] for part in parts])
        axes.plot(range(1, len(y) + 1), 100 * y, **style)
        axes.set_xticks(range(1, len(y) + 1))

    def leave(axes, found, parts, style) -> None:
        y = mean([[e["share"] for e in part["exits"]] for part in parts])
        axes.plot(range(1, len(y) + 1), 100 * y, **style)
        axes.set_xticks(range(1, len(y) + 1))

    def training(axes, found, parts, style) -> None:
        steps = [now["step"] for now in found[0]["training"]]
        if found[0]["variant"] != "base":
            axes.plot(steps, mean([[now["loops"] for now in run["training"]] for run in found]), markersize=3, **style)

    picture("pareto", "average loops (large mark: threshold 0.5)", f"accuracy in %, {bucket} tokens", pareto, panels=2)
    picture("by-loop", "loop", f"accuracy in %, {bucket} tokens", by_loop)
    picture("exits", "loop", "tokens that leave after it, in %, threshold 0.5", leave)
    picture("training", "step", "average loops of the tokens trained on", training)
