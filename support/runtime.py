"""Machinery that a reader may skip: errors, tables, devices, loggers, provenance."""

import atexit
import importlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, NoReturn

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

console = Console(markup=False, emoji=False)  # a path or a prompt may hold brackets and colons


class UserError(ValueError):
    """A user's mistake: one sentence with what was given, as a flag, the rule and the way out; without a traceback."""


def run_cli(main: Callable[[], None], *, distributed: bool = False) -> None:
    """Run a script, or one of several processes; end with one sentence and exit status 1 on a user's mistake."""
    problem, rank = None, os.environ.get("RANK", "0")
    who = "error" if rank == "0" else f"error on process {rank}"
    with suppress(AttributeError):  # a test's output has no encoding
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        problem = f"{who}: {error}"
    except RuntimeError as error:
        if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        why = str(error).strip().partition("\n")[0][:200]
        problem = f"{who}: torch.compile can't build the layers here ({why}): give --train.compile off, or --no-compile"
    if distributed:
        exit_process(problem)
    if problem:
        sys.exit(problem)


def exit_process(problem: str | None = None) -> NoReturn:
    """End one of several processes, with a sentence and exit status 1 if there is a problem. By os._exit: a thread of
    gloo's outlives the group, and if it frees a tensor while Python shuts down, the process aborts."""
    if problem:
        print(problem, file=sys.stderr)
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError, AttributeError):  # closed, full, or none is there
        sys.stdout.flush()
    os._exit(bool(problem))


def print_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> None:
    """A table whose first `left` columns hold words, the others numbers; an empty row ends a section."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row) if row else table.add_section()
    table.width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    console.print(table, crop=False)  # whole, however narrow a terminal or a pipe is


def print_notes(notes: Sequence[str]) -> None:
    console.print(*notes, sep="\n", end="\n" if notes else "", soft_wrap=True)


def progress_bar(steps: Iterable, label: str) -> Iterable:
    """The steps, behind a progress bar that vanishes at its end; on a terminal only."""
    return track(steps, label, console=console, transient=True, disable=not console.is_terminal)


def make_folder(folder: Path) -> None:
    """Raises UserError if there can be no such folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {folder} can't be a folder ({error.strerror}): give another place") from error


def require_new(out: Path | None) -> None:
    """Make the folder of a file that is to be written. Raises UserError if the file is there already."""
    if out and out.exists():
        raise UserError(f"--out {out} is there already: nothing saved is overwritten, give another name")
    if out:
        make_folder(out.parent)


DType = Literal["bf16", "fp32"]
Precision = Literal["auto", "bf16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}  # bfloat16, dense, by the vendor


def pick_device(name: str) -> torch.device:
    """The device asked for; of several GPUs, this process's own. Raises UserError if there is no such device."""
    count = torch.cuda.device_count()
    try:
        device = torch.device("cuda" if count else "cpu") if name == "auto" else torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is not a device: give auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= max(count, device.type == "cpu"):
        raise UserError(f"--device {name} is not there: {count} CUDA devices are, give auto or cpu")
    return device


def matmul_dtype(device: torch.device, precision: Precision) -> DType:
    """What the matrix products are computed in."""
    return precision if precision != "auto" else "bf16" if device.type == "cuda" else "fp32"


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """A fresh context for one forward pass; its cached weights go stale after an optimiser step."""
    return torch.autocast(device.type, torch.bfloat16, enabled=matmul_dtype(device, precision) == "bf16")


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on a device, without waiting for what the device still does."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def true_indices(mask: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Where a mask on the CPU is True, as indices into its flattened form, on a device.    B T -> N"""
    return to_device(mask.flatten().nonzero()[:, 0], device)


def vendor_flops(device: torch.device) -> float | None:
    """What the GPU could do in a second; None for a CPU or an unknown GPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for kind, peak in PEAK_FLOPS.items() if kind in name), None)


def speed(start: float, tokens: float, flops: float, world: int, device: torch.device) -> dict[str, float | None]:
    """What a step that began at `start` (time.perf_counter) reached, on so many devices, and the memory it needed."""
    seconds, peak = time.perf_counter() - start, vendor_flops(device)
    mfu = flops / seconds / world / peak if peak else None
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    with suppress(ImportError):  # of a module that Windows lacks
        resource, unit = importlib.import_module("resource"), 1 if sys.platform == "darwin" else 1024
        memory = memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"tokens_per_s": tokens / seconds, "mfu": mfu, "memory_gib": memory and memory / 2**30}


def step_flops(stage: str, c, cfg, batch) -> float:
    """Floating-point operations of a step on a batch, forward (2 for each weight and token) and backward (4 more).
    c  the model's shape; cfg  the stage's configuration; batch  inputs B T, mask B T"""
    rows, length = batch.inputs.shape
    layer = c.width * c.head_dim * 2 * (c.heads + c.kv_heads) + 3 * c.width * c.ffn  # weights
    attention = length * c.heads * c.head_dim  # a token's products with the half of the tokens that it sees, twice
    loop = rows * length * c.layers * 2 * (layer + attention)
    head = 2 * c.width * c.vocab_size  # one token
    tokens = batch.mask.sum().item()
    if stage != "rpt":
        return (3 if stage == "pretrain" else 1) * c.loops * (loop + tokens * head)
    rollouts = 3 * cfg.rollouts * (c.loops - 2) * loop if cfg.has_noise else 0
    return 4 * c.loops * (loop + cfg.rho * tokens * head) + tokens * head + rollouts  # 1 is the teacher's, 3 ours


def open_logger(name: str, folder: Path, config: dict, run_id: str) -> Callable[[dict], None]:
    """Where a step's numbers go besides log.jsonl, and the comparison's; on one axis, the steps of all stages. A run
    that is resumed goes on there. Raises UserError if the package for it isn't installed."""
    order = (*config["objective"], "comparison")
    starts = {stage: sum(config[before]["steps"] for before in order[:i]) for i, stage in enumerate(order)}
    try:
        wandb = importlib.import_module("wandb") if name == "wandb" else None
        board = importlib.import_module("torch.utils.tensorboard") if name == "tensorboard" else None
    except ImportError as error:
        raise UserError(f"--logger {name} needs a package ({error}): pip install {name}") from error
    writer = board and board.SummaryWriter(str(folder / "tensorboard"))
    if wandb:
        wandb.init(project="looprpt", name=folder.name, id=run_id, resume="allow", dir=folder, config=config)

    def write(numbers: dict) -> None:
        stage, step = numbers["stage"], starts[numbers["stage"]] + numbers["step"]
        named = {f"{stage}/{key}": x for key, x in numbers.items() if key != "step" and isinstance(x, int | float)}
        if wandb:
            wandb.log(named, step=step)
        if writer:
            for key, x in named.items():
                writer.add_scalar(key, x, step)
            writer.flush()

    return write


def seeded(*key, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose numbers depend on the key and the kind of device alone."""
    return torch.Generator(device).manual_seed(random.Random("/".join(map(str, key))).getrandbits(62))


def git(*args: str) -> str | None:
    """What git says of this code; None where there is no git, or this is no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *args]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def provenance(device: torch.device) -> dict:
    """What made a result."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    argv = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return {"argv": argv, "commit": git("rev-parse", "HEAD"), "torch": torch.__version__, "device": name}
