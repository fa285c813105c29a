"""Machinery that a reader may skip: errors, devices, processes, signals, progress, provenance."""


SLICE, KEPT = 2**23, 2**27  # logits at once: what a CPU's caches like, and 512 MiB in float32


class UserError(ValueError):
    """A user's mistake: one sentence with what was given, the rule and the way out; printed without a traceback."""


def report(main: Callable[[], None], *, several: bool = False) -> None:
    """Run a script; end with one sentence and exit status 1 on a user's mistake.

    several  it is one of several processes, and ends by `leave`
    """
    problem = None
    try:
        main()
    except UserError as error:
        problem = str(error)
    except RuntimeError as error:
        if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        why = str(error).strip().partition("\n")[0][:200]
        problem = f"torch.compile can't build the layers here ({why}): give --train.compile off, or --no-compile"
    rank = os.environ.get("RANK", "0")
    if problem:
        problem = f"error: {problem}" if rank == "0" else f"error on process {rank}: {problem}"
    if several:
        leave(problem)
    if problem:
        sys.exit(problem)


def leave(problem: str | None = None) -> NoReturn:
    """End one of several processes, with a sentence and exit status 1 if there is a problem.

    Not through Python's own end: what hears the others over gloo outlives the process group, and a thread of it that
    lets go of a tensor while Python ends aborts the process, whose work was done.
    """
    if problem:
        print(problem, file=sys.stderr)
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):  # closed, or full
            stream.flush()
    os._exit(bool(problem))


def pick_device(name: str) -> torch.device:
    """Raises UserError if there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is not a device: give auto, cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= max(
        torch.cuda.device_count(), device.type == "cpu"
    ):
        raise UserError(f"--device {name} is not there: {torch.cuda.device_count()} CUDA devices are, give auto or cpu")
    return device


console = Console()


def make_folder(folder: Path) -> None:
    """Raises UserError if there can be no such folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {folder} can't be a folder ({error.strerror}): give another place") from error


def products(device: torch.device, precision: Precision) -> str:
    """What the matrix products are in: bf16 or fp32."""
    return precision if precision != "auto" else "bf16" if device.type == "cuda" else "fp32"


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager:
    """A fresh context for one forward pass; its cached weights go stale after an optimiser step."""
    low = products(device, precision) == "bf16"
    return torch.autocast(device.type, torch.bfloat16) if low else contextlib.nullcontext()


def put(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for what the device still does."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def places(mask: Tensor, device: torch.device) -> Tensor:
    """Where a mask on the CPU is True, as places in its flattened form, on a device.    B T -> N"""
    return put(mask.flatten().nonzero()[:, 0], device)


DType = Literal["bf16", "fp32"]
Precision = Literal["auto", "bf16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def is_writer() -> bool:
    """Whether this process is the one that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}  # bfloat16, dense, by the vendor


def peak_flops(device: torch.device) -> float | None:
    """What the GPU could do in a second; None for a CPU or an unknown GPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for kind, peak in PEAK_FLOPS.items() if kind in name), None)


def memory_gib(device: torch.device) -> float:
    """Most memory that was in use until now, on the GPU, or by this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---------------------------------------------------------------------------------------------------------------------
# Processes: one, or as many as torchrun starts, by FSDP2. On one process nothing here changes anything.


def own(x: Tensor) -> Tensor:
    """This process's shard."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """All shards."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def sum_over_processes(x: Tensor) -> Tensor:
    """x, summed in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def spread(net: LoopedTransformer, kind: str, device: torch.device) -> LoopedTransformer:
    """Over the processes: 'ddp' is a copy for each, 'fsdp' a shard for each of a machine's, a copy for each machine.

    Gradients are summed, not averaged: a loss is divided by a count over all processes already. Parameters stay
    gathered until the step lets go of them: the blocks run L times in each forward and backward pass, and letting go
    each time gathers 4 times as often (counted, for 2 layers and 4 loops: 12 gathers against 3 in a pre-training step,
    25 against 7 in one of LoopRPT).
    """
    if kind == "auto":
        size = 20 * sum(p.numel() for p in net.parameters())  # weights, gradient, two moments, teacher
        small = device.type == "cpu" or size < torch.cuda.get_device_properties(device).total_memory / 2
        tight = sum_over_processes(torch.tensor(float(not small), device=device)).item()
        kind = "fsdp" if tight else "ddp"  # the same on all
    world = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    shards = 1 if kind == "ddp" else local if world % local == 0 else world
    mesh = init_device_mesh(device.type, (world // shards, shards), mesh_dim_names=("copies", "shards"))
    for module in (*net.layers, net):
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
        module.set_reshard_after_backward(False)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for name in ("logits", "gate"):
        register_fsdp_forward_method(net, name)
    return net


def gather_no_more(net: LoopedTransformer | None) -> None:
    """Let go of the gathered parameters, so that the optimiser and the teacher's average see the shards."""
    for module in net.modules() if net else ():
        if isinstance(module, FSDPModule):
            module.reshard()


def git(*args: str) -> str | None:
    """What git says of this code; None where there is no git, or this is no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *args]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance(device: torch.device) -> dict:
    """What made a result."""
    return {
        "argv": sys.argv,
        "commit": git("rev-parse", "HEAD"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def now_text() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def sink(config: Config, folder: Path) -> Callable[[dict], None]:
    """Where the numbers go besides log.jsonl. Raises UserError if the package for it isn't installed."""
    if config.logger == "none":
        return lambda now: None
    try:
        if config.logger == "wandb":
            import wandb

            wandb.init(project="looprpt", dir=str(folder), name=folder.name, config=asdict(config), resume="allow")
            return lambda now: wandb.log({f"{now['stage']}/{k}": v for k, v in now.items() if k != "stage"})
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"--logger {config.logger} needs a package ({error}): pip install {config.logger}") from error
    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(now: dict) -> None:
        for name, value in now.items():
            if name not in ("stage", "step") and value is not None:
                writer.add_scalar(f"{now['stage']}/{name}", value, now["step"])

    return write


def watch(steps: Iterator[dict], total: int, stage: str, log: TextIO, to: Callable[[dict], None]) -> None:
    """Run the steps: a progress bar on a terminal, else twenty lines; every step goes to the log as a line of JSON."""
    recent: deque[dict] = deque(maxlen=50)
    name, status = TextColumn("{task.description:>8}"), TextColumn("{task.fields[status]}")
    columns = (name, BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn(), status)
    with Progress(*columns, console=console, expand=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(stage, total=total, status="")
        for now in steps:
            log.write(json.dumps(now) + "\n")
            log.flush()
            to(now)
            recent.append(now)
            known = [n for n in ("tokens_per_s", "loss", "loops", "reward") if now.get(n) is not None]
            mean = {n: statistics.mean(r[n] for r in recent if r[n] is not None) for n in known}
            status = f"{mean['tokens_per_s'] / 1000:.1f}k tokens/s"
            if "loss" in mean:
                status += f" loss {mean['loss']:.2f} loops {mean['loops']:.2f}"
            if "reward" in mean:
                status += f" reward {mean['reward']:+.3f}"
            step = now["step"]
            bar.update(task, completed=step, status=status)
            if not console.is_terminal and (step == 1 or step * 20 // total > (step - 1) * 20 // total):
                console.print(f"{stage:>8} {step}/{total}  {status}")


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """The names of the signals that asked for an end; a second one ends at once."""
    asked: list[str] = []
    since: list[float] = []

    def note(number: int, frame) -> None:
        asked[:] = [signal.Signals(number).name]
        since.append(time.monotonic())
        if since[-1] - since[0] > 1:  # sooner, it is a launcher's echo of the first
            signal.signal(number, before[number])
            signal.raise_signal(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_from_processes(error: RuntimeError) -> bool:
    """Whether a collective failed, not we: torch's own class, or gloo's plain RuntimeError."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "Connection" in str(error)
