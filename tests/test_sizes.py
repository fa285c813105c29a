"""Defaults by the size of the model and of the data, and the memory of a step: by value, and what is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import call, filled, refused

import data
import eval
import looprpt
from data import DataConfig, Row
from lab import bench
from looprpt import RECIPES, Config, TrainConfig
from model import LoopedTransformer, ModelConfig
from support import checkpoint, processes, ranges, sizes, text
from support.runtime import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DEMO, TEXT, OURO = (
    ModelConfig(vocab_size=8),
    ModelConfig(layers=2, width=192, vocab_size=2048),
    bench.SHAPES["ouro-1.4b"],
)
STAGES = ("pretrain", "gate", "rpt")
GIB = 2**30
SMALL = "--model.width 16 --model.heads 2 --model.loops 3 --data.operands 3 --data.val-rows 64".split()
TEXTS = [f"{i} and {7 * i} are " + "many words " * (i % 5) for i in range(1, 31)]


def rows(*lengths):
    """Documents of so many tokens."""
    return [Row([1] * n, 1) for n in lengths]


def changes(config, other) -> dict:
    """The flags in which two configurations differ, and what the second one has."""
    a, b = ranges.flatten_config(config), ranges.flatten_config(other)
    return {name: b[name] for name in a if a[name] != b[name]}


@pytest.fixture
def of_world(monkeypatch):
    return lambda world: monkeypatch.setattr(processes, "rank_and_world", lambda: (0, world))


# Learning rates


@pytest.mark.parametrize(
    ("shape", "parameters", "rates"),
    [
        (DEMO, 51_585, {"pretrain": 2e-3, "gate": 1e-2, "rpt": 1e-3}),
        (TEXT, 1_691_521, {"pretrain": 2e-3, "gate": 3.3e-3, "rpt": 1.8e-4}),
        (OURO, 1_434_652_673, {"pretrain": 3e-4, "gate": 3.1e-4, "rpt": 6.1e-6}),
    ],
)
def test_the_learning_rate_goes_by_the_size_of_the_model(shape, parameters, rates):
    assert sizes.count_parameters(shape) == parameters
    assert {stage: sizes.peak_lr(stage, getattr(Config(), stage), shape) for stage in STAGES} == rates


def test_a_gate_that_learns_alone_takes_the_rate_of_the_gate_stage():
    assert sizes.peak_lr("rpt", replace(RECIPES["paper"], gate_only=True), DEMO) == 1e-2
    assert sizes.peak_lr("rpt", replace(RECIPES["dense"], gate_only=True), OURO) == 3.1e-4


# What is filled in


def test_what_was_not_given_is_filled_in_and_nothing_else():
    config = Config(objective=STAGES)
    train = {"train.batch": 128, "train.recompute": "off"}
    pretrain, rpt = ({f"{s}.steps": n, f"{s}.lr": x} for s, n, x in (("pretrain", 2500, 2e-3), ("rpt", 250, 1e-3)))
    gate = {"gate.steps": 400, "gate.lr": 1e-2}
    assert changes(config, sizes.fill_in(config, DEMO, None, CPU)) == train | pretrain | gate | rpt
    assert changes(Config(), sizes.fill_in(Config(), DEMO, None, CPU)) == train | pretrain | rpt, "no stage gate"
    file = sizes.fill_in(config, DEMO, rows(10, 31, 5), CPU)
    by_file = {"train.batch": 8, "data.length": 4096, "pretrain.steps": 3, "gate.steps": 3, "rpt.steps": 3}
    assert changes(config, file) == train | pretrain | gate | rpt | by_file


def test_what_was_given_stays():
    given = Config(
        objective=STAGES,
        data=DataConfig(length=77),
        train=TrainConfig(batch=5, micro_batch=2, recompute="on"),
        pretrain=looprpt.PretrainConfig(steps=3, lr=0.5),
        gate=looprpt.GateConfig(steps=4, lr=0.25),
        rpt=replace(RECIPES["dense"], steps=6, lr=0.125),
    )
    for shape, some, device in ((DEMO, None, CPU), (TEXT, rows(9, 9), CPU), (OURO, rows(9, 9), GPU)):
        assert sizes.fill_in(given, shape, some, device) == given
    off = replace(given, train=replace(given.train, recompute="off"))
    assert sizes.fill_in(off, OURO, None, GPU) == off


def test_the_steps_of_a_file_are_three_epochs():
    many = rows(*[9] * 100)
    assert sizes.fill_in(Config(), DEMO, many, CPU).rpt.steps == 3 * 13
    config = replace(Config(), train=TrainConfig(batch=30))
    found = sizes.fill_in(config, DEMO, many, CPU)
    assert (found.pretrain.steps, found.rpt.steps) == (12, 12)
    assert data.Documents(many, batch=30, seed=0).batches == 4


def test_a_batch_has_a_row_for_every_process(of_world):
    for world, file, chain in ((1, 8, 128), (8, 8, 128), (12, 12, 128), (200, 200, 200)):
        of_world(world)
        assert sizes.fill_in(Config(), DEMO, rows(*[9] * 300), CPU).train.batch == file
        assert sizes.fill_in(Config(), DEMO, None, CPU).train.batch == chain


def test_rows_are_as_long_as_the_longest_but_no_longer_than_4096_tokens_or_the_positions(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 5000)
    path = tmp_path / "a.txt"
    found, _ = data.encode(path, text.byte_tokenizer(), DataConfig())
    assert max(len(row.ids) for row in found) == 4097, "a token more, which is only a target"
    assert sizes.fill_in(Config(), DEMO, found, CPU).data.length == 4096
    assert DataConfig(path=path).within(4096, "a").length is None
    short = DataConfig(path=path).within(64, "a")
    found, _ = data.encode(path, text.byte_tokenizer(), short)
    assert (short.length, max(len(row.ids) for row in found)) == (64, 65)
    assert DataConfig(path=path, length=32).within(64, "a").length == 32
    with pytest.raises(UserError) as error:
        DataConfig(path=path, length=65).within(64, "a")
    assert str(error.value) == "--data.length 65 is more than the 64 positions of a: give a smaller one"
    assert DataConfig(path=path, length=5000).within(65536, "a").length == 5000, "given, it may be more than 4,096"


def test_a_checkpoints_positions_bound_the_rows_of_a_run_and_of_its_evaluation(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    shape = ModelConfig(width=16, heads=2, loops=3, vocab_size=259, max_positions=64)
    checkpoint.save(LoopedTransformer(shape), tmp_path / "a", text.byte_tokenizer())
    seen, collate = [], data.collate
    monkeypatch.setattr(data, "collate", lambda some: seen.extend(len(r.ids) for r in some) or collate(some))
    flags = ["--data.path", tmp_path / "a.txt"]
    few = ["--objective", "rpt", "--rpt.steps", 3]
    call(monkeypatch, looprpt, "--init", tmp_path / "a", *few, *flags, "--out", tmp_path / "out")
    call(monkeypatch, eval, tmp_path / "a", *flags)
    assert max(seen) == 65
    message = refused(monkeypatch, eval, tmp_path / "a", *flags, "--data.length", 65)
    assert message == f"--data.length 65 is more than the 64 positions of {tmp_path / 'a'}: give a smaller one"


def test_a_large_model_on_a_gpu_takes_one_row_at_a_time_and_computes_activations_again():
    some = rows(*[513] * 40)
    how = lambda shape, device: sizes.fill_in(Config(), shape, some, device).train  # noqa: E731
    assert (how(OURO, GPU).batch, how(OURO, GPU).micro_batch, how(OURO, GPU).recompute) == (8, 1, "on")
    assert how(OURO, CPU).recompute == "off"
    assert (how(TEXT, GPU).micro_batch, how(TEXT, GPU).recompute) == (0, "off")
    edge = ModelConfig(layers=1, width=1024, heads=8, vocab_size=42_000)
    below, above = edge, replace(edge, vocab_size=43_000)
    assert sizes.count_parameters(below) < 100e6 < sizes.count_parameters(above)
    assert [how(shape, GPU).recompute for shape in (below, above)] == ["off", "on"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("world", [1, 4])
def test_a_forward_pass_on_a_cpu_keeps_at_most_4_gib(recipe, world, of_world):
    """Of the stage that keeps most; and as many rows as that allows, but never none."""
    of_world(world)
    config = Config(objective=STAGES, rpt=RECIPES[recipe], train=TrainConfig(batch=400))
    found = sizes.fill_in(config, TEXT, rows(*[513] * 500), CPU)

    def kept(n):
        how = {"rows": n, "length": 512, "bf16": False, "recompute": False}
        return max(sizes.step_memory(s, TEXT, getattr(found, s), **how)["layers"] for s in STAGES)

    assert kept(found.train.micro_batch) <= 4 * GIB < kept(found.train.micro_batch + 1)
    assert found.train.micro_batch == {"paper": 9, "dense": 49}[recipe]
    few = sizes.fill_in(replace(config, train=TrainConfig(batch=4 * 9)), TEXT, rows(*[513] * 500), CPU)
    assert few.train.micro_batch == (9 if (recipe, world) == ("paper", 1) else 0), "0 where all fit"
    large = sizes.fill_in(config, OURO, rows(*[4097] * 500), CPU)
    assert large.train.micro_batch == 1


# What is said


def test_the_first_lines_say_the_recipe_and_what_was_chosen():
    config = sizes.fill_in(replace(Config(), recipe="dense", rpt=RECIPES["dense"]), DEMO, None, CPU)
    chosen = changes(Config(rpt=RECIPES["dense"], recipe="dense"), config)
    assert sizes.describe(config, DEMO, chosen) == [
        "LoopRPT (dense): steps 250, lr 0.001, estimator exact, rollouts 1, noise_std 0.0, rho 1.0, tau 0.5, "
        "lambda_base 0.05, lambda_scale 0.5, pg_weight 1.0, rep_weight 1.0, rep_bonus 1.0, floor 0.3, "
        "distill_weight 0.3, ent_weight 0.003, kl_weight 0.0001, gate_only False, ema_decay 0.995, weight_decay 0.01",
        "chosen, where no flag was given: --train.batch 128 --train.recompute off --pretrain.steps 2500 "
        "--pretrain.lr 0.002 --rpt.steps 250 --rpt.lr 0.001",
    ]
    paper = sizes.describe(sizes.fill_in(Config(), DEMO, None, CPU), DEMO, {})
    assert len(paper) == 1, "nothing was chosen"
    assert paper[0].startswith("LoopRPT (paper): steps 250, lr 0.001, estimator sampled, rollouts 8, noise_std 0.1, ")
    assert sizes.describe(sizes.fill_in(Config(objective=("pretrain",)), DEMO, None, CPU), DEMO, {}) == []


def test_a_learning_rate_far_above_the_rule_is_warned_of():
    def warnings(lr, **how):
        config = replace(Config(), objective=("gate", "rpt"), rpt=replace(RECIPES["paper"], lr=lr, **how))
        return sizes.describe(sizes.fill_in(config, DEMO, None, CPU), DEMO, {})[1:]

    assert warnings(1e-2) == []
    assert warnings(2e-2) == ["--rpt.lr 0.02 is 20 times the 0.001 for a model of this size"]
    assert warnings(2e-2, gate_only=True) == [], "the gate's own rule is ten times as high"
    found = sizes.fill_in(Config(objective=("pretrain",), pretrain=looprpt.PretrainConfig(lr=1.0)), DEMO, None, CPU)
    assert sizes.describe(found, DEMO, {}) == ["--pretrain.lr 1 is 500 times the 0.002 for a model of this size"]


# The memory of a step


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("other", [{}, {"width": 64, "ffn": 96}, {"heads": 4, "kv_heads": 2}, {"head_dim": 32}])
def test_what_the_plan_keeps_is_what_real_tensors_keep(other, bf16):
    """The tensors that one more layer keeps in one loop of a forward pass that is really run."""
    counted, planned = [], []
    for layers in (1, 2):
        shape = replace(ModelConfig(width=16, heads=2, vocab_size=8, layers=layers), **other)
        net, kept = LoopedTransformer(shape), {}

        def note(x, kept=kept):
            kept[x.untyped_storage().data_ptr()] = x  # held, so that no address is used twice
            return x

        state = torch.zeros(3, 200, shape.width, requires_grad=True)
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda x: x),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            net(state, loops=1)
        weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
        copies = 2 * layers * sum(p.numel() for p in net.layers[0].parameters() if p.dim() > 1) if bf16 else 0
        counted.append(sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in weights) - copies)
        how = {"rows": 3, "length": 200, "bf16": bf16, "recompute": False}
        planned.append(sizes.step_memory("pretrain", shape, looprpt.PretrainConfig(), **how)["layers"])
    assert (planned[1] - planned[0]) / shape.loops == counted[1] - counted[0]


def test_the_plan_adds_up():
    n, gate, rpt = 1_434_652_673, looprpt.GateConfig(), RECIPES["paper"]
    how = {"rows": 1, "length": 4096, "bf16": True, "recompute": True}
    one, eight = (sizes.step_memory("rpt", OURO, rpt, **how, shards=shards) for shards in (1, 8))
    assert (one["weights"], one["grads"], one["moments"], one["teacher"]) == (4 * n, 4 * n, 8 * n, 4 * n)
    assert one["gathered"] == 2 * n, "the weights in bfloat16"
    assert [eight[k] * 8 for k in ("weights", "grads", "moments", "teacher")] == [4 * n, 4 * n, 8 * n, 4 * n]
    assert eight["gathered"] == 4 * n + 4 * n + 2 * n
    fp32 = sizes.step_memory("rpt", OURO, rpt, **how | {"bf16": False})
    assert fp32["gathered"] == 4 * n, "a pass's gradients beside their sum"
    assert fp32["layers"] > one["layers"]
    whole = sizes.step_memory("rpt", OURO, rpt, **how | {"recompute": False})["layers"]
    assert whole > 10 * one["layers"]
    for stage, cfg in (("gate", gate), ("rpt", replace(rpt, gate_only=True))):
        alone = sizes.step_memory(stage, OURO, cfg, **how)
        assert (alone["grads"], alone["moments"]) == (4 * 2049, 8 * 2049)
        assert alone["layers"] < one["layers"]
        assert alone["teacher"] == (4 * n if stage == "rpt" else 0)
    assert sizes.step_memory("pretrain", OURO, looprpt.PretrainConfig(), **how)["teacher"] == 0


def test_rollouts_without_noise_cost_no_memory():
    how = {"rows": 2, "length": 64, "bf16": False, "recompute": False}
    layers = lambda cfg: sizes.step_memory("rpt", TEXT, cfg, **how)["layers"]  # noqa: E731
    paper, dense = RECIPES["paper"], RECIPES["dense"]
    assert layers(dense) == layers(replace(paper, noise_std=0.0)) == layers(replace(paper, pg_weight=0.0))
    assert layers(paper) == pytest.approx(5 * layers(dense)), "4 loops, and 2 of each of 8 rollouts"
    loss = lambda rho: sizes.step_memory("rpt", DEMO, replace(paper, rho=rho), **how)["head"]  # noqa: E731
    assert loss(0.2) == pytest.approx(loss(1.0) / 5) == 3 * 4 * 0.2 * 2 * 64 * 4 * 8


@pytest.fixture
def memory(monkeypatch):
    """Sets what is free, in GiB."""
    return lambda gib: monkeypatch.setattr(sizes, "free_memory", lambda device: gib * GIB)


def plan(device=CPU, length=512, shape=TEXT, some=None, **train):
    """A configuration of 8 rows, the rows, and the GiB that LoopRPT needs after a change."""
    some = some or rows(*[length + 1] * 40)
    config = sizes.fill_in(Config(objective=("rpt",), train=TrainConfig(batch=8, **train)), shape, some, device)

    def need(**change):
        how = {"rows": config.train.micro_batch or 8, "length": length, "recompute": config.train.recompute == "on"}
        how["bf16"] = device.type == "cuda"
        return 1.05 * sum(sizes.step_memory("rpt", shape, config.rpt, **how | change).values()) / GIB

    return config, some, need


def refusal(config, some, device=CPU, shape=TEXT, done=()):
    with pytest.raises(UserError) as error:
        sizes.require_memory(config, shape, some, device, done)
    return error.value.args[0]


WAYS = "shorter rows (--data.length), more GPUs (torchrun --nproc-per-node, --dist fsdp) or more memory"


def test_a_step_that_cannot_fit_is_refused_with_the_first_change_that_helps(memory):
    config, some, need = plan()
    smallest, flags = need(rows=1, recompute=True), "--train.micro-batch 1 --train.recompute on"
    problem = f"rpt of 1,691,521 parameters, 8 x 512 tokens at once, needs {need():.1f} GiB of memory"
    for free, way in ((1.001, flags), (0.999, f"{WAYS}, for with {flags} it needs {smallest:.1f}")):
        memory(free * smallest)
        assert refusal(config, some) == f"{problem}, and {free * smallest:.1f} are free on cpu: give {way}"


def test_what_fits_is_not_refused(memory):
    config, some, need = plan()
    memory(1.001 * need())
    sizes.require_memory(config, TEXT, some, CPU, ())
    memory(math.inf)
    sizes.require_memory(config, TEXT, some, CPU, ())
    memory(0.999 * need())
    assert refusal(config, some).endswith("give --train.micro-batch 1 --train.recompute on")


def test_rows_of_chain_arithmetic_are_counted_too(memory):
    memory(0.01)
    chain = sizes.fill_in(Config(objective=("rpt",)), TEXT, None, CPU)
    assert "128 x 11 tokens at once" in refusal(chain, None)


def test_only_stages_to_come_need_memory(memory):
    config, some, need = plan()
    config = filled(replace(config, objective=("pretrain", "rpt")), TEXT, some)
    memory(0.999 * need())
    assert refusal(config, some).startswith("rpt of ")
    assert refusal(config, some, done=("pretrain",)).startswith("rpt of ")
    sizes.require_memory(config, TEXT, some, CPU, ("pretrain", "rpt"))
    memory(0.01)
    assert refusal(config, some).startswith("pretrain of ")


def test_processes_share_the_memory_of_a_machine_but_not_that_of_a_gpu(memory, of_world, monkeypatch):
    config, some, need = plan()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    of_world(2)
    memory(1.999 * need(rows=4))
    free = f"4 x 512 tokens at once, needs {need(rows=4):.1f} GiB of memory, and {0.9995 * need(rows=4):.1f} are"
    assert free in refusal(config, some)
    memory(2.001 * need(rows=4))
    sizes.require_memory(config, TEXT, some, CPU, ())
    config, some, need = plan(GPU)
    memory(1.001 * need(rows=4))
    sizes.require_memory(config, TEXT, some, GPU, ())


def test_a_forward_pass_has_no_more_rows_than_the_batch(memory):
    config, some, need = plan(micro_batch=1000)
    memory(1.001 * need(rows=8))
    sizes.require_memory(config, TEXT, some, CPU, ())


def test_nothing_is_built_before_the_refusal(tmp_path, monkeypatch, memory):
    shape = ModelConfig(width=16, heads=2, loops=3, vocab_size=8)
    checkpoint.save(LoopedTransformer(shape), tmp_path / "a", data.chain_tokenizer())
    build = LoopedTransformer.__init__

    def on_paper_only(net, *args, **how):
        assert torch.get_default_device().type == "meta"
        build(net, *args, **how)

    monkeypatch.setattr(LoopedTransformer, "__init__", on_paper_only)
    monkeypatch.setattr(checkpoint, "load", lambda *_: pytest.fail("loaded"))
    memory(1e-6)
    for start in (SMALL, [*SMALL[6:], "--init", tmp_path / "a", "--objective", "rpt"]):
        message = refused(monkeypatch, looprpt, *start, "--out", tmp_path / "out")
        assert "parameters, 128 x 5 tokens at once, needs " in message
        assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock"}


# How much is free


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Writes files of a machine's /proc and /sys, and says what is free there."""
    monkeypatch.setattr(sizes, "Path", lambda path: tmp_path / path.lstrip("/"))

    def free(**files):
        for name, content in files.items():
            path = tmp_path / {"meminfo": "proc/meminfo"}.get(name, f"sys/fs/cgroup/{name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return sizes.free_memory(CPU)

    return free


MEMINFO = "MemTotal:       16000 kB\nMemFree:        100 kB\nMemAvailable:   9000 kB\n"
STAT = "anon 5\ninactive_file 70\nactive_file 3\n"


def test_what_is_free_is_what_the_machine_can_give(machine):
    assert machine() == math.inf, "unknown"
    assert machine(meminfo="MemFree: 100 kB\n") == math.inf
    assert machine(meminfo=MEMINFO) == 9000 * 1024


def test_a_containers_limit_counts_too(machine):
    """cgroup v2: files in memory that nobody uses make room."""
    files = {"meminfo": MEMINFO, "memory.max": "5000\n", "memory.current": "4000\n", "memory.stat": STAT}
    assert machine(**files) == 5000 - 4000 + 70
    assert machine(**{"memory.max": "max\n"}) == 9000 * 1024
    assert machine(**{"memory.max": str(10**9)}) == 9000 * 1024, "the machine has less"
    assert machine(**{"memory.max": "5000", "memory.stat": "anon 5\n"}) == 9000 * 1024, "unknown"


def test_what_is_free_on_a_gpu_is_what_its_driver_says(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456))
    assert sizes.free_memory(GPU) == 123


# In a run


def test_a_run_says_and_records_what_it_chose(tmp_path, monkeypatch, capsys):
    call(monkeypatch, looprpt, *SMALL, "--pretrain.steps", 2, "--rpt.steps", 2, "--out", tmp_path / "out")
    shown = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["chosen"] == ["train.batch", "train.recompute", "pretrain.lr", "rpt.lr"]
    config, n = record["config"], record["parameters"]
    rate = float(f"{0.23 / math.sqrt(n):.2g}")
    assert (config["train"]["batch"], config["pretrain"]["lr"], config["rpt"]["lr"]) == (128, 2e-3, rate)
    flags = f"--train.batch 128 --train.recompute off --pretrain.lr 0.002 --rpt.lr {rate}"
    assert f"chosen, where no flag was given: {flags}" in shown.splitlines()
    assert "LoopRPT (paper): steps 2, " in shown
    assert "times the" not in shown


def test_a_run_warns_of_its_learning_rate(tmp_path, monkeypatch, capsys):
    few = ["--objective", "pretrain", "--pretrain.steps", 1, "--pretrain.lr", 0.1, "--out", tmp_path / "out"]
    call(monkeypatch, looprpt, *SMALL, *few)
    assert "--pretrain.lr 0.1 is 50 times the 0.002 for a model of this size" in capsys.readouterr().out.splitlines()


class Cut(BaseException):
    """The process dies here."""


def cut_run(monkeypatch, step, *args):
    """A run that dies before this step, counted over its stages."""
    inner, left = looprpt.count_tokens, [step]

    def wrapped(*args):
        left[0] -= 1
        if left[0] == 0:
            raise Cut
        return inner(*args)

    with monkeypatch.context() as patch:
        patch.setattr(looprpt, "count_tokens", wrapped)
        with pytest.raises(Cut):
            call(patch, looprpt, *args)


def test_a_resumed_run_keeps_its_values(tmp_path, monkeypatch, capsys):
    """Also where another machine, or another version, would choose others."""
    monkeypatch.setattr(sizes, "ACTIVATIONS", 2**22)
    out = ["--out", tmp_path / "out"]
    few = ["--pretrain.steps", 4, "--rpt.steps", 4, "--train.save-every", 2, *out]
    cut_run(monkeypatch, 7, *SMALL, *few)
    before = json.loads((tmp_path / "out" / "run.json").read_text())
    assert "LoopRPT (paper)" in capsys.readouterr().out
    message = refused(monkeypatch, looprpt, *out, "--resume", "--recipe", "dense")
    assert message == f"--recipe dense contradicts the run in {tmp_path / 'out'}, which has paper: leave the flag out"
    monkeypatch.setattr(sizes, "peak_lr", lambda *_: 0.5)
    monkeypatch.setattr(sizes, "ACTIVATIONS", 2**30)
    seen, train = [], looprpt.train
    monkeypatch.setattr(
        looprpt, "train", lambda run, config, *a, **how: seen.append(config) or train(run, config, *a, **how)
    )
    call(monkeypatch, looprpt, *out, "--resume")
    after = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (after["config"], after["chosen"]) == (before["config"], before["chosen"])
    assert seen[0].rpt.lr == before["config"]["rpt"]["lr"] < 0.1
    assert 1 < seen[0].train.micro_batch == before["config"]["train"]["micro_batch"] < 128
    assert "train.micro_batch" in before["chosen"]
    assert "chosen by size" not in capsys.readouterr().out


def results(out):
    return json.loads((out / "results.json").read_text())["models"]


@pytest.mark.parametrize("kind", ["plain", "longest held out", "other file"])
def test_a_resumed_run_on_a_file_sees_the_same_rows(tmp_path, monkeypatch, kind):
    """In training and in the evaluation, wherever the longest row is."""
    documents, val = [{"text": x} for x in TEXTS], [{"text": TEXTS[3]}]
    if kind == "longest held out":
        flags = ["--data.path", tmp_path / "a.jsonl"]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(x) + "\n" for x in documents))
        _, (held_out, *_), _ = data.split(DataConfig(path=tmp_path / "a.jsonl"), text.byte_tokenizer(), seed=0)
        found = bytes(i - 3 for i in held_out.ids[:-1]).decode()
        documents[[x["text"] for x in documents].index(found)]["text"] += " and more" * 20
    if kind == "other file":
        val += [{"text": TEXTS[4] + " and more" * 20}]
    for name, some in (("a", documents), ("val", val)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in some))
    flags = ["--data.path", tmp_path / "a.jsonl"]
    if kind == "other file":
        flags += ["--data.val", tmp_path / "val.jsonl"]
    few = [*SMALL[:6], *flags, "--pretrain.steps", 4, "--rpt.steps", 4, "--train.save-every", 2, "--out"]
    call(monkeypatch, looprpt, *few, tmp_path / "straight")
    cut_run(monkeypatch, 4, *few, tmp_path / "cut")
    call(monkeypatch, looprpt, "--out", tmp_path / "cut", "--resume")
    assert results(tmp_path / "cut") == results(tmp_path / "straight")


def test_a_run_on_rows_of_two_tokens_can_be_resumed(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in "abcdefgh" * 3))
    few = [*SMALL[:6], "--data.path", tmp_path / "a.jsonl", "--objective", "pretrain", "--out", tmp_path / "out"]
    cut_run(monkeypatch, 4, *few)
    call(monkeypatch, looprpt, "--out", tmp_path / "out", "--resume")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"]


def test_the_recipe_is_where_the_rpt_flags_start_from(capsys):
    assert looprpt.parse([]).rpt == looprpt.parse(["--recipe", "paper"]).rpt == RECIPES["paper"] == looprpt.RPTConfig()
    assert changes(looprpt.parse(["--recipe", "dense"]), Config(rpt=RECIPES["dense"])) == {"recipe": "paper"}
    half = looprpt.parse("--recipe dense --rpt.rho 0.5".split())
    assert half.rpt == replace(RECIPES["dense"], rho=0.5)
    assert looprpt.parse("--rpt.rollouts 4".split()).rpt == replace(RECIPES["paper"], rollouts=4)
    for wrong in (["--paper"], ["--recipe", "sampled"]):
        with pytest.raises(SystemExit) as error:
            looprpt.parse(wrong)
        assert error.value.code == 2
        assert wrong[-1] in capsys.readouterr().err


def test_the_recipes_differ_in_what_the_readme_says():
    dense = {"estimator": "exact", "rollouts": 1, "noise_std": 0.0, "rho": 1.0, "lambda_base": 0.05}
    dense |= {"floor": 0.3, "distill_weight": 0.3, "ent_weight": 0.003}
    paper = {"estimator": "sampled", "rollouts": 8, "noise_std": 0.1, "rho": 0.2, "lambda_base": 0.02}
    paper |= {"floor": 0.0, "distill_weight": 0.0, "ent_weight": 0.01}
    for name, values in (("paper", paper), ("dense", dense)):
        shared = {"tau": 0.5, "lambda_scale": 0.5, "pg_weight": 1.0, "rep_weight": 1.0, "rep_bonus": 1.0}
        shared |= {"kl_weight": 1e-4, "ema_decay": 0.995, "weight_decay": 0.01, "gate_only": False}
        assert vars(RECIPES[name]) == values | shared | {"steps": 0, "lr": None}, name


@pytest.mark.parametrize(
    ("length", "given", "expected"), [(11, 0, 64), (512, 0, 64), (1024, 0, 32), (40_000, 0, 1), (1024, 5, 5)]
)
def test_an_evaluation_takes_as_many_rows_at_once_as_have_32768_tokens(length, given, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(data, "source", lambda *_, batch, **how: seen.append(batch))
    monkeypatch.setattr(eval, "results", lambda *_, **how: {"models": {}})
    monkeypatch.setattr(eval, "print_results", lambda _: None)
    config = eval.EvalConfig((), DataConfig(), batch=given)
    eval.compare_folders(config, rows(length, 3), CPU)
    eval.compare_folders(config, None, CPU)
    assert seen == [expected, given or 64]
