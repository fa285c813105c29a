"""Processes: one, or as many as torchrun starts, by FSDP2. On one process nothing here changes anything."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from support.runtime import UserError


def rank_and_world() -> tuple[int, int]:
    """Which of how many processes this one is, by the group if there is one, else by what torchrun says."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def process_group(device: torch.device, timeout: int, resumes_from: Callable[[], object]) -> Iterator[None]:
    """Join the other processes, if there are any. Raises UserError if one is gone, or for an error of the system.
    timeout  seconds to wait for another process; resumes_from  what --resume would go on from"""
    several = rank_and_world()[1] > 1
    try:
        if several:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
        yield
    except (OSError, RuntimeError) as error:
        why = str(error)
        if isinstance(error, OSError):
            problem = f"the run can't go on ({why}): mend that, or make room;"
        elif several and (isinstance(error, dist.DistError) or "gloo" in why.lower() or "Connection" in why):
            problem = f"another process is gone ({why.splitlines()[0][:200]}):"  # gloo raises a plain RuntimeError
        else:
            raise
        raise UserError(f"{problem} --resume goes on from {resumes_from()}") from error
    if several:
        dist.destroy_process_group()


def is_writer() -> bool:
    """Whether this process is the one that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def full_tensor(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def all_reduce_sum(x: Tensor) -> Tensor:
    """x, summed over the processes in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def count_shards(kind: Literal["auto", "ddp", "fsdp"], parameters: int, device: torch.device) -> int:
    """Over how many processes a copy of the weights is spread."""
    if not dist.is_initialized():
        return 1
    if kind == "auto":  # 20 bytes a parameter: weights, gradient, two moments, teacher
        large = device.type == "cuda" and 20 * parameters > torch.cuda.get_device_properties(device).total_memory / 2
        kind = "fsdp" if all_reduce_sum(torch.tensor(float(large), device=device)) else "ddp"  # the same on all
    world = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return 1 if kind == "ddp" else local if local > 1 and world % local == 0 else world


def shard(net: nn.Module, kind: Literal["auto", "ddp", "fsdp"], device: torch.device, *, bf16: bool) -> nn.Module:
    """Over the processes: 'ddp' is a copy for each, 'fsdp' a shard for each of a machine's, a copy for each machine.
    Gradients are summed, not averaged: a loss is divided by a count over all processes already. Parameters stay
    gathered until `reshard`: the blocks run L times in each forward and backward pass, and letting go each time would
    gather about four times as often.
    bf16  gather the matrices of layers and head in bfloat16; norms, gate, embedding and all gradients in float32"""
    if not dist.is_initialized():
        return net
    world, shards = dist.get_world_size(), count_shards(kind, sum(p.numel() for p in net.parameters()), device)
    mesh = dist.init_device_mesh(device.type, (world // shards, shards), mesh_dim_names=("copies", "shards"))
    rounded = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)  # the state is as it was
    parts = [*net.layers] if net.config.tied else [*net.layers, net.lm_head]
    matrices = {p for part in parts for p in part.parameters() if p.dim() > 1}
    for module in (net, *parts):  # the root first, so that it takes the norms inside the layers, too
        others = matrices if module is net else {*net.parameters()} - matrices
        policy = rounded if bf16 and module is not net else MixedPrecisionPolicy()
        fully_shard(module, mesh=mesh, reshard_after_forward=False, mp_policy=policy, ignored_params=others)
        module.set_reshard_after_backward(False)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for name in ("logits", "gate"):
        register_fsdp_forward_method(net, name)
    hooked = net.gate  # in `forward` it is the plain one: the hooks would let go of the root, and the head needs it
    net.register_forward_pre_hook(lambda *_: delattr(net, "gate"))
    net.register_forward_hook(lambda *_: setattr(net, "gate", hooked))
    return net


def reshard(net: nn.Module | None) -> None:
    """Let go of the gathered parameters, so that the optimiser and the teacher's average see the shards."""
    for module in net.modules() if net else ():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """The names of the signals that asked for an end; a second one ends at once."""
    asked, since = [], []  # the last one's name; when they came

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
