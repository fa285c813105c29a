"""A run on the disk: state/STAGE-STEP/ is all that it needs to go on; run.json and log.jsonl say what was done."""

import hashlib
import importlib.metadata
import json
import math
import shutil
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from torch.distributed.tensor import DTensor, distribute_tensor

from model import LoopedTransformer, ModelConfig
from support import checkpoint
from support.processes import all_reduce_sum, full_tensor, is_writer
from support.ranges import require_same
from support.runtime import UserError, console, git, make_folder, provenance

Stage = Literal["pretrain", "gate", "rpt"]
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter
SHOWN = {"tokens_per_s": "{:,.0f} tokens/s", "loss": "loss {:.2f}", "loops": "loops {:.2f}", "reward": "reward {:+.3f}"}
FOLDER = {"pretrain": "base", "gate": "gate", "rpt": "rpt"}  # where each stage's checkpoint goes


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


def make_optimizer(net: torch.nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    matrices, vectors = ([p for p in net.parameters() if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def lr_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then a cosine to 0: the share of the peak learning rate at a step counted from 0.
    Adam's first steps move every weight by the whole rate: at least 20 are small, so that a trained model stays one."""
    rise = max(20, round(warmup * steps)) if warmup else 1
    return (step + 1) / rise if step < rise else 0.5 + 0.5 * math.cos(math.pi * (step + 1 - rise) / (steps + 1 - rise))


def save_run(run: Run, config) -> None:
    """Write state/STAGE-STEP, complete or not at all; then only this stage's newest stay, and the last before it.
    Raises UserError if it can't be written, or the weights are not finite: then the last good one stays."""
    folder = config.folder
    target = folder / "state" / f"{run.stage}-{run.step:06}"
    if not full_tensor(torch.nn.utils.get_total_norm(list(run.student.parameters()))).isfinite():
        problem = f"the weights are not finite after {run.stage} step {run.step}: {run.saved}"
        raise UserError(f"{problem}; try a smaller --{run.stage}.lr")
    if is_writer() and (folder / "log.jsonl").exists():
        checkpoint.fsync(folder / "log.jsonl")
    with checkpoint.atomic_folder(target) as temporary:
        checkpoint.save(run.student, temporary / "student")
        if run.teacher:
            checkpoint.save(run.teacher, temporary / "teacher")
        moments_of, trained = run.optimizer.state, run.student.named_parameters()
        moments = {f"{kind}.{name}": moments_of[p][kind] for name, p in trained if p in moments_of for kind in MOMENTS}
        checkpoint.save_weights(moments, temporary / "moments", run.student.embed_tokens.weight.dtype)
        if is_writer():
            files = {str(f.relative_to(temporary)): checksum(f) for f in sorted(temporary.rglob("*")) if f.is_file()}
            info = {"stage": run.stage, "step": run.step, "skipped": run.skipped, "bad": run.bad, "sha256": files}
            (temporary / "state.json").write_text(json.dumps(info, indent=1) + "\n")
    run.saved = f"the last good checkpoint is {target}"
    if dist.is_initialized():
        dist.barrier()  # from here on all may read it
    if is_writer():
        mine = saved_states(folder, (run.stage,))
        for old in mine[config.train.keep :] + [s for s in saved_states(folder, config.objective) if s not in mine][1:]:
            (old / "state.json").unlink(missing_ok=True)  # from here on it is no checkpoint
            shutil.rmtree(old, ignore_errors=True)


def saved_states(folder: Path, stages: Sequence[Stage]) -> list[Path]:
    """The saved states of these stages, from the last step of the last stage back."""
    names = {path: path.name.partition("-") for path in (folder / "state").glob("*-*")}
    places = {path: (stages.index(x), int(n)) for path, (x, _, n) in names.items() if x in stages and n.isdecimal()}
    return sorted(places, key=places.get, reverse=True)


def checksum(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def damage_of(state: Path) -> str | None:
    """What is wrong with a saved state; None if nothing is. An error of the disk is not the state's: it is raised."""
    try:
        info = checkpoint.read_json(state / "state.json")
        if f"{info['stage']}-{info['step']:06}" != state.name or "student/config.json" not in info["sha256"]:
            return "its state.json is another's"
        wrong = [name for name, digest in info["sha256"].items() if checksum(state / name) != digest]
    except (FileNotFoundError, UserError, KeyError, TypeError, AttributeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(wrong)} changed since it was written" if wrong else None


def latest_state(folder: Path, stage: Stage, device="cpu", step: int | None = None) -> Path | None:
    """The newest sound state of a stage, or that of a step; damaged ones are renamed. All processes agree."""
    chosen = torch.tensor(-1 if is_writer() else 0, device=device)  # its step: objects would travel as pickles
    states = saved_states(folder, (stage,)) if is_writer() else []
    for state in states if step is None else [s for s in states if s.name == f"{stage}-{step:06}"]:
        if not (damage := damage_of(state)):
            chosen.fill_(int(state.name.partition("-")[2]))
            break
        console.print(f"{state} is skipped ({damage})", soft_wrap=True)
        state.rename(f"{state}.damaged-{uuid.uuid4().hex[:8]}")  # it may still be of use to somebody
    all_reduce_sum(chosen)
    return folder / "state" / f"{stage}-{int(chosen):06}" if chosen >= 0 else None


def load_models(state: Path, shape: ModelConfig, device: torch.device) -> tuple:
    """Student and teacher (or None) of a saved state. Raises UserError if they are of another shape."""
    require_same(shape, checkpoint.load_config(state / "student"), f"{state} (remove it if it is another run's)")
    return tuple(checkpoint.load(x, device) if x.exists() else None for x in (state / "student", state / "teacher"))


def restore(run: Run, state: Path, steps: int) -> None:
    """Give a run the position and the moments of a saved state. Raises UserError if that has done more steps."""
    info = checkpoint.read_json(state / "state.json")
    run.step, run.skipped, run.bad = info["step"], info["skipped"], info["bad"]
    if run.step > steps:
        raise UserError(f"--{run.stage}.steps {steps} is less than the {run.step} that {state} has done: give more")
    parameters, updates = dict(run.student.named_parameters()), float(run.step - run.skipped)
    for key, file in checkpoint.index_tensors(state / "moments", {}).items():
        kind, _, name = key.partition(".")
        p = parameters[name]
        moment = checkpoint.read_tensor(file, key).to(p.device, p.dtype, copy=True)
        if isinstance(p, DTensor):
            moment = distribute_tensor(moment, p.device_mesh, p.placements, src_data_rank=None)
        run.optimizer.state[p] |= {kind: moment, "step": torch.tensor(updates, device=p.device)}
    if is_writer():
        console.print(f"{run.stage} goes on after step {run.step}, from {state}", soft_wrap=True)


@contextmanager
def open_log(path: Path, run: Run, done: Sequence[Stage], total: int, logger: Callable) -> Iterator[Callable]:
    """A function that takes each step's numbers: a line of JSON in the log, and a progress bar, or twenty lines.
    The log first loses the steps that will be done again."""
    if not is_writer():
        yield lambda numbers: None
        return
    kept, recent = [], deque(maxlen=50)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):  # of a line that was being written when the run ended
            x = json.loads(line)
            kept += [f"{line}\n"] if x["stage"] in done or (x["stage"] == run.stage and x["step"] <= run.step) else []
    checkpoint.write_atomic(path, "".join(kept))
    columns, many = ("{task.description}", BarColumn(None), TimeRemainingColumn()), not console.is_terminal
    with open(path, "a", encoding="utf-8") as log, Progress(*columns, console=console, disable=many) as bar:
        task = bar.add_task(run.stage, total=total)

        def write(numbers: dict) -> None:
            print(json.dumps(numbers), file=log, flush=True)
            logger(numbers)
            recent.append(numbers)
            step, known = numbers["step"], {key: [r[key] for r in recent if r.get(key) is not None] for key in SHOWN}
            means = " ".join(SHOWN[key].format(sum(xs) / len(xs)) for key, xs in known.items() if xs)
            status = f"{run.stage:>8} {step}/{total}  {means}"
            bar.update(task, completed=step, description=status)
            if many and (step == 1 or step * 20 // total > (step - 1) * 20 // total):
                console.print(status)

        yield write


def require_free(folder: Path, *, resume: bool) -> None:
    """Raises UserError if a folder holds a run already, and it isn't to be resumed or can't be."""
    taken = ", ".join(name for name in (*FOLDER.values(), "state", "results.json") if (folder / name).exists())
    if taken and not resume:
        raise UserError(f"--out {folder} holds another run ({taken}): give another, or --resume this one")
    if taken and not (folder / "run.json").exists():
        raise UserError(f"--out {folder} has {taken}, but no run.json: restore it, or begin anew")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder; one that ends, however it does, lets them in. Raises UserError if one
    is there. On Windows, and on a disk without locks, nobody is kept out."""
    if not is_writer():
        yield
        return
    make_folder(folder)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl = importlib.import_module("fcntl")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--out {folder} is in use by another run: wait for its end, or give another") from error
        except (ImportError, OSError):
            pass
        yield


def require_shared(folder: Path, device: torch.device) -> None:
    """Raises UserError, in every process, if one doesn't see within 2 seconds what the first one writes to a folder."""
    number = all_reduce_sum(torch.tensor(uuid.uuid4().int >> 66 if is_writer() else 0, device=device))
    file, until = folder / f".seen.{number:x}", time.monotonic() + 2
    if is_writer():
        file.touch()
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.1)
        any(folder.parent.glob("*"))  # makes a network disk's client ask again for a folder that was not there
    blind = all_reduce_sum(torch.tensor(int(not file.exists()), device=device))
    file.unlink(missing_ok=True)
    if blind:
        raise UserError(f"--out {folder} is not one folder for all processes: give all the same, on a shared disk")


def open_run(folder: Path, config, student: LoopedTransformer, world: int, chosen: Sequence[str]) -> dict:
    """Make the folder of a run, and write and print what is known of it. Returns what run.json holds.
    chosen  flags whose values were not given"""
    parameters, device = sum(p.numel() for p in student.parameters()), student.embed_tokens.weight.device
    record = {"id": uuid.uuid4().hex[:8], "config": asdict(config), "chosen": chosen, "parameters": parameters}
    own = config.init / "tokenizer.json" if config.init and config.data.tokenizer == "auto" else config.data.tokenizer
    files = {"path": config.data.path or "", "val": config.data.val or "", "tokenizer": own}
    record |= {"sha256": {name: checksum(x) for name, x in files.items() if Path(x).is_file()}, "starts": []}
    for pattern in (*(f".{name}.*.tmp" for name in FOLDER.values()), "state/.*.tmp"):  # of saves that were cut off
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
    if config.resume and (folder / "run.json").exists():
        now, record = record["sha256"], record | checkpoint.read_json(folder / "run.json")
        for name in [name for name in now if now[name] != record["sha256"].get(name, now[name])]:
            raise UserError(f"--data.{name} {files[name]} has changed since the run began: restore it, or begin anew")
    timestamp, changed = time.strftime("%Y-%m-%dT%H:%M:%S%z"), git("status", "--porcelain", "--untracked-files=no")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "safetensors", "tokenizers", "tyro")}
    start = {"time": timestamp, "processes": world, "dirty": None if changed is None else bool(changed)}
    start |= provenance(device) | {"python": sys.version.split()[0], "versions": versions, "seed": config.seed}
    record |= {"starts": [*record["starts"], start], "finished": None}
    checkpoint.write_json(folder / "run.json", record)
    size = f"{parameters:,} parameters, {student.config.loops} loops, on {world} x {device.type}"
    console.print(f"{size}; the run goes to {folder}", soft_wrap=True)
    return record
