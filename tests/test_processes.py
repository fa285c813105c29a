"""Several processes: what travels between them, that bf16 costs no accuracy by it, and the folder that all must see."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import filled
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import looprpt
from data import DataConfig
from looprpt import RECIPES, Config, TrainConfig
from model import LoopedTransformer, ModelConfig
from support import processes, runs, runtime

SHAPE = ModelConfig(layers=2, loops=3, width=32, heads=2, vocab_size=32, init_std=0.1)
CONFIG = Config(data=DataConfig(operands=4), train=TrainConfig(batch=8, clip=1e9), rpt=RECIPES["dense"], dist="fsdp")
CONFIG = filled(CONFIG, SHAPE)
STAGES = ("pretrain", "rpt")


class Traffic(TorchDispatchMode):
    """Bytes that each of two processes sends, by collective and type of number: half of what it gathers or reduces."""

    def __init__(self):
        super().__init__()
        self.sent = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        whole = {"c10d::_allgather_base_": 0, "c10d::_reduce_scatter_base_": 1}.get(op._schema.name)
        if whole is not None:
            x = args[whole]
            key = f"{op._schema.name.split('_')[1]} {str(x.dtype).removeprefix('torch.')}"
            self.sent[key] = self.sent.get(key, 0) + x.nbytes // 2
        return op(*args, **(kwargs or {}))


def make():
    """A model whose norms' weights are not 1, which bf16 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    net = LoopedTransformer(SHAPE, generator=generator)
    for p in net.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return net


def first_step(stage, precision):
    """Loss and gradients of the first step, and the traffic of it."""
    config, lines = replace(CONFIG, precision=precision), []
    run = looprpt.start_stage(stage, make(), config)
    with Traffic() as traffic:
        looprpt.train(run, config, None, log=lines.append, stopping=lambda: True)
    grads = {name: processes.full_tensor(p.grad).contiguous() for name, p in run.student.named_parameters()}
    return grads | {"loss": torch.tensor(lines[0]["loss"])}, traffic.sent


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for stage in STAGES:
        for precision in ("fp32", "bf16"):
            tensors, sent = first_step(stage, precision)
            if rank == 0:
                save_file(tensors, f"{folder}/{stage}-{precision}.safetensors")
                Path(f"{folder}/{stage}-{precision}.json").write_text(json.dumps(sent))
    runs.require_shared(Path(folder), torch.device("cpu"))
    os.mkdir(f"{folder}/{rank}")
    os.chdir(f"{folder}/{rank}")  # the disk of a machine
    runtime.make_folder(Path("out"))
    try:
        runs.require_shared(Path("out"), torch.device("cpu"))
    except runtime.UserError as error:
        Path("said").write_text(error.args[0])
    runtime.exit_process()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder that two processes wrote."""
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_in_bf16_matrices_are_gathered_in_bf16_once_for_each_model_and_all_gradients_are_float32(two, stage):
    net, models = make(), {"pretrain": 1, "rpt": 2}[stage]  # the student, and the teacher
    n = sum(p.numel() for p in net.parameters()) + SHAPE.width + 1  # the gate has one row, so each gets a padded one
    matrices = sum(p.numel() for p in (*net.layers.parameters(), net.lm_head.weight) if p.dim() > 1)
    fp32, bf16 = (json.loads((two / f"{stage}-{precision}.json").read_text()) for precision in ("fp32", "bf16"))
    assert fp32 == {"allgather float32": models * 2 * n, "reduce float32": 2 * n}
    rest = {"allgather float32": models * 2 * (n - matrices), "reduce float32": 2 * n}
    assert bf16 == {"allgather bfloat16": models * matrices} | rest


@pytest.mark.parametrize("stage", STAGES)
def test_in_bf16_two_processes_have_the_gradient_of_one(two, stage):
    """Beside float32, it is as near as one process's under autocast; what stays in float32 is the same."""
    exact, one = (first_step(stage, precision)[0] for precision in ("fp32", "bf16"))
    found = load_file(two / f"{stage}-bf16.safetensors")
    assert found.keys() == one.keys()
    for name, x in exact.items():
        error, usual = ((y - x).norm().item() for y in (found[name], one[name]))
        assert usual > 0, "autocast did nothing"
        assert error < 1.1 * usual + 1e-7, name
        assert (found[name] - one[name]).norm().item() < 0.4 * usual + 1e-7, name
    for name in ("loss", "early_exit_gate.weight"):  # of the forward pass
        torch.testing.assert_close(found[name], one[name], rtol=1e-5, atol=1e-7, msg=name)


def test_a_folder_that_a_process_does_not_see_ends_all_in_a_sentence(two):
    for rank in range(2):
        said = (two / str(rank) / "said").read_text()
        assert said == "--out out is not one folder for all processes: give all the same, on a shared disk"
    assert not [*two.glob("**/.seen.*")], "the file is gone, where all see it, too"
