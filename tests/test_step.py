"""The RL step end to end: against a slow reading of the paper, in groups, over processes, and in training."""

import copy
import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers import filled, forked, slow_exit, slow_logp, slow_pdf, slow_rollout, slow_step
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import data
import looprpt
import model
from data import Batch, DataConfig, Row
from lab import study
from looprpt import RECIPES, Config, RPTConfig, TokenCounts, TrainConfig, rpt_step
from model import LoopedTransformer, ModelConfig, exit_logpdf
from support import processes, runtime

SHAPE = ModelConfig(layers=1, loops=4, width=16, heads=2, vocab_size=11, init_std=0.4)
B, T, G = 2, 9, 3
EXITS = {"loops", "entropy", "saturation"}
METRICS = {
    "pretrain": {"loss", "last_ce"} | EXITS,
    "gate": {"loss"} | EXITS,
    "rpt": {"loss", "pg", "rep", "ent", "kl", "distill", "reward"} | EXITS,
}


def make(seed, device="cpu", **changes):
    generator = torch.Generator().manual_seed(seed)
    net = LoopedTransformer(replace(SHAPE, **changes), generator=generator).double()
    torch.nn.init.normal_(net.early_exit_gate.bias, std=0.3, generator=generator)
    return net.to(device)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(11, (B, T + 1), generator=generator)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :3], mask[1, :1], mask[1, 7:] = False, False, False
    return Batch(ids[:, :-1], ids[:, 1:], mask)


def train(run, config, rows, **how):
    """Do a stage's steps; gives what each of them logs."""
    lines = []
    looprpt.train(run, config, rows, log=lines.append, **how)
    return lines


def first_step(stage, config, rows, net=None):
    """A stage after its first step, and what that logs."""
    run = looprpt.start_stage(stage, net or make(0), config)
    (line,) = train(run, config, rows, stopping=lambda: True)
    return run, line


def counts_of(batch, rho):
    return TokenCounts(batch.mask.sum().item(), looprpt.hard_count(batch.mask, rho).sum().item())


# Beside a slow reading of the paper

FORMS = [
    {"estimator": "sampled"},
    {"estimator": "exact"},
    {"estimator": "sampled", "loops": 2},
    {"estimator": "exact", "loops": 2},
    {"estimator": "exact", "noise_std": 0.0},
    {"estimator": "sampled", "noise_std": 0.0},
    {"estimator": "exact", "noise_std": 0.0, "floor": 0.3},
    {"estimator": "exact", "rep_bonus": 0.0, "floor": 0.3, "distill_weight": 0.6},
    {"estimator": "exact", "floor": 1.0, "pg_weight": 0.0},
    {"estimator": "sampled", "distill_weight": 0.6},
    {"estimator": "sampled", "rho": 1.0, "tau": 0.9},
]
LARGE = {"rollouts": G, "rho": 0.4, "noise_std": 0.3, "kl_weight": 0.2, "ent_weight": 0.3, "rep_weight": 0.7}
LARGE |= {"pg_weight": 1.3}  # so that no term is lost beside another


@pytest.mark.parametrize(
    "form", [*RECIPES, *FORMS], ids=lambda f: f if isinstance(f, str) else "-".join(map(str, f.values()))
)
def test_step_equals_a_slow_reading_of_the_paper(batch, monkeypatch, same_noise, device, near, form):
    """Value and gradient. It settles at once: which loops are shared or skipped, what is detached, which rollout of
    which sequence a token is grouped with, the sign and weight of each term, and that easy tokens count for nothing."""
    loops = 4
    if isinstance(form, str):
        cfg = RECIPES[form]  # exactly
    else:
        cfg = replace(RPTConfig(), **LARGE | {name: x for name, x in form.items() if name != "loops"})
        loops = form.get("loops", 4)
    student, teacher = make(0, device, loops=loops), make(1, device, loops=loops)
    slow_student, slow_teacher = make(0, loops=loops), make(1, loops=loops)  # on the CPU
    exits = torch.randint(loops, (B, T, cfg.rollouts), generator=torch.Generator().manual_seed(5))

    hard = torch.zeros_like(batch.mask)

    def note_hard(*args):
        hard.copy_(found := chosen(*args))
        return found

    chosen = looprpt.hard_tokens
    monkeypatch.setattr(looprpt, "hard_tokens", note_hard)
    monkeypatch.setattr(looprpt, "draw_exits", lambda logpi, generator: exits[hard].to(device))
    there, noise = data.trim_and_move(batch, device), torch.Generator().manual_seed(3)
    output = rpt_step(student, teacher, there, cfg, counts=counts_of(batch, cfg.rho), generator=noise)
    slow = slow_step(
        slow_student, slow_teacher, batch, cfg, torch.Generator().manual_seed(3), lambda b, t, g: exits[b, t, g]
    )
    assert_close(output.loss.cpu(), slow, rtol=near, atol=near)
    output.loss.backward()
    slow.backward()
    for (name, p), q in zip(student.named_parameters(), slow_student.parameters(), strict=True):
        assert_close(p.grad.cpu(), q.grad, rtol=100 * near, atol=near, msg=lambda m, name=name: f"{name}: {m}")
    assert all(p.grad is None for p in teacher.parameters())


def test_exits_are_drawn_from_each_rollout_of_its_own(batch, monkeypatch, device):
    """From the noisy exit distributions, not from the clean pass's."""
    cfg, seen, student = replace(RPTConfig(), rollouts=3, noise_std=0.5, rho=1.0), [], make(0, device)
    draw = looprpt.draw_exits
    monkeypatch.setattr(looprpt, "draw_exits", lambda logpi, generator: seen.append(logpi) or draw(logpi, generator))
    noise, there = torch.Generator(device).manual_seed(3), data.trim_and_move(batch, device)
    rpt_step(student, make(1, device), there, cfg, counts=counts_of(batch, cfg.rho), generator=noise)
    with torch.no_grad():
        gates = looprpt.noisy_gates(student, student(there.inputs), cfg, noise.manual_seed(3))
    (drawn_from,) = seen
    assert_close(drawn_from, exit_logpdf(gates[batch.mask]))
    assert (drawn_from[:, 0] - drawn_from[:, 1]).abs().max() > 0.1


def gradient(net, loss):
    net.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]


def study_config(name, **changes):
    """The flags of a variant of the study."""
    return replace(looprpt.parse(study.VARIANTS[name][2].split()).rpt, **changes)


def test_stage_i_is_loop_rpt_without_noise_cost_bonus_and_kl(batch):
    """The control of the study called Stage I has Ouro's own gradient, through the gate as well."""
    student, cfg = make(0), study_config("stage-1")
    counts = counts_of(batch, 1)
    actual = gradient(student, rpt_step(student, make(1), batch, cfg, counts=counts).loss)
    expected = gradient(student, looprpt.pretrain_step(student, batch, looprpt.PretrainConfig(), counts=counts).loss)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["next-token", "next-token-hard"])
def test_the_control_next_token_is_cross_entropy_after_the_last_loop(batch, name):
    student, teacher, cfg = make(0), make(1), study_config(name)
    cfg = replace(cfg, rho=cfg.rho if cfg.rho == 1 else 0.5)
    out, ref = student(batch.inputs), teacher(batch.inputs)
    entropy = looprpt.entropy_of(teacher.logits(ref.hidden[:, :, -1]))
    chosen = looprpt.hard_tokens(entropy, batch.mask, cfg.rho)
    logits = student.logits(out.hidden[:, :, -1])[chosen]
    expected = gradient(student, torch.nn.functional.cross_entropy(logits, batch.targets[chosen]))
    actual = gradient(student, rpt_step(student, teacher, batch, cfg, counts=counts_of(batch, cfg.rho)).loss)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_every_loss_weight_and_choice_of_a_variant_is_what_its_name_says():
    published = study_config("paper")
    assert published == RPTConfig() == RECIPES["paper"]
    exact = replace(published, estimator="exact", rollouts=1)
    changes = {
        "exact": {},
        "gate-only": {"rep_weight": 0.0, "gate_only": True, "lr": 1e-2},
        "rep-only": {"pg_weight": 0.0},
        "no-rep-no-entropy": {"rep_weight": 0.0, "ent_weight": 0.0},
        "no-selection": {"rho": 1.0},
        "no-noise": {"noise_std": 0.0},
        "no-kl": {"kl_weight": 0.0},
        "no-price": {"lambda_base": 0.0},
    }
    for name, change in changes.items():
        assert study_config(name) == replace(exact, **change), name
    assert study_config("dense") == RECIPES["dense"]


def test_gate_only_trains_the_gate_alone():
    shape = ModelConfig(vocab_size=8)
    cfg = replace(RECIPES["dense"], steps=3, gate_only=True, rep_weight=0.0)
    config = filled(Config(rpt=cfg, train=TrainConfig(batch=4)), shape)
    start = LoopedTransformer(shape, generator=torch.Generator().manual_seed(0))
    run = looprpt.start_stage("rpt", copy.deepcopy(start), config)
    train(run, config, None)
    changed = [
        n for (n, p), q in zip(run.student.named_parameters(), start.parameters(), strict=True) if (p != q).any()
    ]
    assert changed
    assert all(name.startswith("early_exit_gate.") for name in changed)
    after = looprpt.start_stage("rpt", run.student, replace(config, rpt=replace(config.rpt, gate_only=False)))
    assert all(p.requires_grad for p in after.student.parameters()), "the next stage trains all again"


def test_entropy_bonus_flattens_the_exits(batch):
    student, weights = make(0), {"pg_weight": 0, "rep_weight": 0, "ent_weight": 1, "kl_weight": 0}
    cfg = replace(RPTConfig(), estimator="exact", noise_std=0, rho=1, **weights)
    counts, optimizer, entropies = counts_of(batch, 1), torch.optim.SGD(student.parameters(), 0.1), []
    for _ in range(5):
        optimizer.zero_grad()
        output = rpt_step(student, make(1), batch, cfg, counts=counts)
        output.loss.backward()
        optimizer.step()
        entropies.append(output.metrics["ent"].item())
    assert all(a > b for a, b in itertools.pairwise(entropies)), "ent is minus the entropy"


def test_step_measures_reward_and_loops_in_the_units_a_reader_expects(batch):
    student, teacher = make(0), make(1)
    cfg = replace(RPTConfig(), estimator="exact", noise_std=0.0, rho=1.0)
    metrics = rpt_step(student, teacher, batch, cfg, counts=counts_of(batch, 1)).metrics
    assert metrics.keys() == METRICS["rpt"]
    assert 1 < metrics["loops"] < 4
    assert metrics["pg"].abs() < 1e-12
    out = student(batch.inputs)
    logpi = exit_logpdf(out.gate[batch.mask])
    assert_close(metrics["loops"], (logpi.exp() @ torch.arange(1.0, 5).double()).mean())


def test_the_logged_reward_and_loops_are_means_over_the_hard_tokens(batch):
    """The reference moves no gradient, but the reward that a person watches."""
    student, teacher = make(0), make(1)
    cfg = replace(RPTConfig(), estimator="exact", noise_std=0.0, rho=0.4, rollouts=G)
    metrics = rpt_step(student, teacher, batch, cfg, counts=counts_of(batch, cfg.rho)).metrics
    rewards, loops, quiet = [], [], [torch.zeros(T, SHAPE.width)] * 3
    for b in range(B):
        (states, gates), (ref, ref_gates) = (slow_rollout(net, batch.inputs[b], quiet) for net in (student, teacher))
        p = teacher.lm_head(ref[-1]).softmax(-1)
        entropy = -(p * p.log()).sum(-1)
        targets = [t for t in range(T) if batch.mask[b, t]]
        for t in sorted(targets, key=lambda t: -entropy[t])[: math.ceil(cfg.rho * len(targets))]:
            y, pi = batch.targets[b, t], slow_pdf([g[t] for g in gates])
            ref_loop = slow_exit([g[t] for g in ref_gates], cfg.tau) - 1
            cost = cfg.lambda_base * (1 + cfg.lambda_scale * (1 - min(1.0, entropy[t].item() / math.log(11))))
            gain = [slow_logp(student, x[t], y) - slow_logp(teacher, ref[ref_loop][t], y) for x in states]
            rewards.append(sum(q * (gain[i] - cost * (i - ref_loop)) for i, q in enumerate(pi)))
            loops.append(sum(q * i for i, q in enumerate(pi, 1)))
    assert_close(metrics["reward"], torch.stack(rewards).mean())
    assert_close(metrics["loops"], torch.stack(loops).mean())


def test_gate_and_rpt_see_the_same_rows_and_pretraining_others(monkeypatch):
    seeds, source = [], data.source
    monkeypatch.setattr(data, "source", lambda *args, **how: seeds.append(how["seed"]) or source(*args, **how))
    shape = replace(SHAPE, vocab_size=8)
    config = filled(Config(train=TrainConfig(batch=4)), shape)
    for stage in ("pretrain", "gate", "rpt"):
        run = looprpt.start_stage(stage, LoopedTransformer(shape), config)
        train(run, config, None, stopping=lambda: True)
    assert seeds[1] == seeds[2] != seeds[0]


@pytest.mark.parametrize(("loops", "expected"), [(2, []), (3, [1]), (4, [2])])
def test_rollouts_run_no_loop_that_cannot_change_the_result(batch, monkeypatch, loops, expected):
    ran, forward = [], LoopedTransformer.forward

    def counting(net, x, **how):
        ran.append((len(x), how.get("loops") or loops))
        return forward(net, x, **how)

    monkeypatch.setattr(LoopedTransformer, "forward", counting)
    student, teacher = make(0, loops=loops), make(1, loops=loops)
    rpt_step(student, teacher, batch, replace(RPTConfig(), rollouts=G), counts=TokenCounts(13, 5))
    assert ran == [(B, loops), (B, loops)] + [(B * G, n) for n in expected]
    ran.clear()
    rpt_step(student, teacher, batch, replace(RPTConfig(), rollouts=G, noise_std=0), counts=TokenCounts(13, 5))
    assert ran == [(B, loops), (B, loops)], "without noise a rollout is the clean pass"


def test_only_hard_tokens_reach_the_vocabulary(batch, monkeypatch):
    seen = []
    logits = LoopedTransformer.logits
    monkeypatch.setattr(LoopedTransformer, "logits", lambda net, h: seen.append(h.shape[:-1].numel()) or logits(net, h))
    counts = counts_of(batch, 0.2)
    rpt_step(make(0), make(1), batch, RPTConfig(), counts=counts)
    assert seen == [counts.targets, counts.hard * 4, counts.hard * 4]


@pytest.mark.parametrize("objective", ["pretrain", "rpt"])
def test_logits_come_in_chunks_with_the_same_result(batch, monkeypatch, objective):
    """Never more than a chunk's at once; where all together are too many, the backward pass computes them again."""
    made, logits = [], LoopedTransformer.logits
    monkeypatch.setattr(LoopedTransformer, "logits", lambda net, h: made.append(h.shape[:-1].numel()) or logits(net, h))
    cfg = replace(RECIPES["dense"], rollouts=G, kl_weight=1)
    results = []
    for size in (2**23, 90):  # of logits: 90 are two tokens of four loops
        monkeypatch.setattr(model, "CHUNK_LOGITS", size)
        monkeypatch.setattr(model, "MAX_KEPT_LOGITS", 2 * size)
        made.clear()
        student, counts = make(0), counts_of(batch, 1)
        if objective == "pretrain":
            step = looprpt.pretrain_step(student, batch, looprpt.PretrainConfig(), counts=counts)
        else:
            step = rpt_step(student, make(1), batch, cfg, counts=counts)
        forward = len(made)
        step.loss.backward()
        assert max(made) * 11 <= size
        assert (len(made) > forward) == (size == 90)
        results.append((step.metrics, [p.grad for p in student.parameters()]))
    assert_close(*results)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_step_waits_for_the_device(batch, recipe):
    """On the meta device no value can be read, so whatever asks for one fails: it would wait for a GPU."""
    student, teacher = make(0).to("meta"), make(1).to("meta")
    there = Batch(batch.inputs.to("meta"), batch.targets.to("meta"), batch.mask)
    cfg = replace(RECIPES[recipe], rollouts=G, rho=0.4)
    for step in (
        lambda: rpt_step(student, teacher, there, cfg, counts=counts_of(batch, 0.4)),
        lambda: looprpt.pretrain_step(student, there, looprpt.PretrainConfig(), counts=counts_of(batch, 0.4)),
        lambda: looprpt.gate_step(student, there, looprpt.GateConfig(), counts=counts_of(batch, 0.4)),
    ):
        output = step()
        output.loss.backward()
        assert output.loss.is_meta
    looprpt.ema_update(teacher, student, 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["off", "on"])
def test_compiled_layers_give_the_same_and_compile_once(recompute, device):
    """One graph for weights that are trained and one for weights that aren't, whatever the rows and their lengths."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = replace(SUMS, train=replace(SUMS.train, batch=3, recompute=recompute))
    changes = {stage: replace(getattr(config, stage), steps=4) for stage in STAGES}
    changes["rpt"] = replace(changes["rpt"], rollouts=2, estimator="sampled", noise_std=0.1)
    config = replace(config, **changes)
    results = {}
    for mode in ("off", "on"):
        config = replace(config, train=replace(config.train, compile=mode))
        for stage in STAGES:
            run = looprpt.start_stage(stage, make(0, device), config)
            results[mode, stage] = train(run, config, rows())
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert graphs == ({"pretrain": 1, "gate": 2, "rpt": 2}[stage] if mode == "on" else 0)
    for stage in STAGES:
        for a, b in zip(results["on", stage], results["off", stage], strict=True):
            for name in METRICS[stage]:
                assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-9), (stage, name)


# Processes and micro-batches


def rows():
    generator = torch.Generator().manual_seed(11)
    lengths = [12, 5, 9, 7, 10, 6, 11]
    return [Row(torch.randint(11, (n,), generator=generator).tolist(), 2 + i % 3) for i, n in enumerate(lengths)]


SUMS = filled(
    Config(
        data=DataConfig(length=16),
        train=TrainConfig(batch=7, clip=1e9, compile="off"),
        precision="fp32",
        pretrain=looprpt.PretrainConfig(lr=2e-3),
        rpt=replace(RECIPES["dense"], rho=0.5, kl_weight=0.5, steps=2, lr=1e-3),
    ),
    SHAPE,
    rows(),
)
STAGES = ("pretrain", "gate", "rpt")


def gradients(config, device="cpu"):
    """Every gradient and metric of the first step of each objective."""
    results = {}
    for stage in STAGES:
        run, line = first_step(stage, config, rows(), make(0, device))
        grads = {name: p.grad.cpu() for name, p in run.student.named_parameters() if p.grad is not None}
        results |= {f"{stage} {name}": processes.full_tensor(grad) for name, grad in grads.items()}
        results |= {f"{stage} {name}": torch.tensor(line[name]) for name in METRICS[stage]}
    return results


def worker(rank, world, folder, config):
    torch.set_num_threads(1)
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # C++, which takes longer, has its own test
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    results = gradients(config)
    save_file({name: x.contiguous() for name, x in results.items()}, f"{folder}/{rank}.safetensors")
    runtime.exit_process()


@pytest.fixture(scope="module")
def straight():
    return gradients(SUMS)


def agree(actual, expected, near=1e-10):
    assert actual.keys() == expected.keys()
    for name in expected:
        loose = {"rtol": 1e-6, "atol": 1e-6}  # measurements are kept in float32
        tight = {"rtol": 10 * near, "atol": near / 100 if near < 1e-9 else near}
        is_gradient = actual[name].dim() > 0
        assert_close(
            actual[name], expected[name], **(tight if is_gradient else loose), msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_give_the_gradient_of_the_whole_batch(straight, size, device, near):
    agree(gradients(replace(SUMS, train=replace(SUMS.train, micro_batch=size)), device), straight, near)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_in_mixed_precision_is_close_to_one_in_float32(stage, device):
    """Compiled where that is the default, recomputed; weights, gradients and what is logged stay in float32."""
    config = replace(SUMS, rpt=replace(SUMS.rpt, rho=1.0))  # no token is hard by a hair
    mixed = replace(config, precision="bf16", train=replace(config.train, compile="auto", recompute="on"))
    (exact, line), (run, close) = (
        first_step(stage, how, rows(), make(0, where, init_std=0.1).float())
        for how, where in ((config, "cpu"), (mixed, device))
    )
    assert close["loss"] == pytest.approx(line["loss"], rel=2e-3)
    pairs = [
        (p, q) for p, q in zip(run.student.parameters(), exact.student.parameters(), strict=True) if q.requires_grad
    ]
    assert all(p.dtype == p.grad.dtype == torch.float32 for p, _ in pairs)
    errors = [((p.grad.cpu() - q.grad).norm() / q.grad.norm()).item() for p, q in pairs]
    assert 1e-3 < max(errors) < 0.1, "bfloat16's, neither float32's nor another gradient's"


@pytest.mark.parametrize(
    ("kind", "micro_batch", "compiled"),
    [("ddp", 0, "off"), ("fsdp", 1, "off"), pytest.param("fsdp", 2, "on", marks=pytest.mark.slow)],
)
def test_two_processes_give_the_gradient_of_one(straight, tmp_path, kind, micro_batch, compiled):
    """Of rows and target tokens that don't divide evenly, so an average per process would be off.

    With micro-batches of one row, one process runs four, the other three and an idle one.
    """
    how = {"micro_batch": micro_batch, "recompute": "on" if micro_batch else "off", "compile": compiled}
    config = replace(SUMS, dist=kind, train=replace(SUMS.train, **how))
    forked(worker, 2, str(tmp_path), config, count=2)
    for rank in range(2):
        agree(load_file(tmp_path / f"{rank}.safetensors"), straight)


def test_a_row_without_a_target_token_changes_nothing():
    student, cfg = make(0), RECIPES["dense"]
    one = Batch(torch.ones(1, 5).long(), torch.ones(1, 5).long(), torch.ones(1, 5, dtype=torch.bool))
    two = Batch(*(torch.cat((part, torch.zeros_like(part))) for part in one))
    losses = [rpt_step(student, make(1), b, cfg, counts=counts_of(b, cfg.rho)).loss for b in (one, two)]
    assert_close(*losses)


# Training


@pytest.mark.parametrize("start", [0, 2])
def test_each_step_has_its_own_batch_wherever_a_run_starts(monkeypatch, start):
    seen, step = [], looprpt.pretrain_step
    monkeypatch.setattr(looprpt, "pretrain_step", lambda net, b, *a, **how: seen.append(b) or step(net, b, *a, **how))
    config = replace(SUMS, train=replace(SUMS.train, batch=2), pretrain=replace(SUMS.pretrain, steps=6))
    run = looprpt.start_stage("pretrain", make(0), config)
    run.step = start
    train(run, config, rows())
    source = data.source(rows(), config.data, batch=2, seed="0/pretrain")
    assert len(seen) == 6 - start
    for index, batch in enumerate(seen, start):
        width = batch.inputs.shape[1]
        assert batch.inputs.equal(source.batch(index).inputs[:, :width])


def test_every_step_is_logged_and_a_run_is_saved_when_due_and_at_its_end():
    config = replace(SUMS, train=replace(SUMS.train, save_every=2), pretrain=replace(SUMS.pretrain, steps=5))
    run, saved = looprpt.start_stage("pretrain", make(0), config), []
    lines = train(run, config, rows(), save=lambda run: saved.append(run.step))
    assert [(line["stage"], line["step"]) for line in lines] == [("pretrain", step) for step in range(1, 6)]
    assert all(line.keys() > METRICS["pretrain"] | {"grad_norm", "skipped", "tokens_per_s", "mfu"} for line in lines)
    assert saved == [2, 4, 5]
    run, saved = looprpt.start_stage("pretrain", make(0), config), []
    lines = train(run, config, rows(), save=lambda run: saved.append(run.step), stopping=lambda: run.step == 2)
    assert (len(lines), saved, run.stopped) == (3, [2, 3], True)


def test_gradients_are_clipped_and_their_norm_is_logged_before():
    config = replace(SUMS, train=replace(SUMS.train, clip=0.01))
    run, line = first_step("pretrain", config, rows())
    norm = torch.nn.utils.get_total_norm([p.grad for p in run.student.parameters()])
    assert norm.item() == pytest.approx(0.01, rel=1e-3)
    assert line["grad_norm"] > 0.1


def test_operations_add_up_over_micro_batches(monkeypatch):
    monkeypatch.setattr(runtime, "vendor_flops", lambda device: 1e9)
    ratio = []
    for size in (0, 2):
        config = replace(SUMS, train=replace(SUMS.train, micro_batch=size))
        same = [Row(row.ids[:5], 1) for row in rows()]
        _, line = first_step("pretrain", config, same)
        ratio.append(line["mfu"] / line["tokens_per_s"])
    assert ratio[0] == pytest.approx(ratio[1])


def test_stage_two_reaches_the_gate_alone(batch):
    student = make(0)
    looprpt.gate_step(student, batch, looprpt.GateConfig(), counts=counts_of(batch, 1)).loss.backward()
    reached = {name for name, p in student.named_parameters() if p.grad is not None}
    assert reached == {"early_exit_gate.weight", "early_exit_gate.bias"}


def test_the_gate_stage_leaves_the_backbone_as_it_was():
    student = make(0)
    before = copy.deepcopy(student.state_dict())
    config = replace(SUMS, gate=replace(SUMS.gate, steps=3))
    train(looprpt.start_stage("gate", student, config), config, rows())
    changed = {name for name, p in student.state_dict().items() if not p.equal(before[name])}
    assert changed == {"early_exit_gate.weight", "early_exit_gate.bias"}


def test_the_teacher_is_a_moving_average_without_gradient(monkeypatch):
    student, seen = make(0), []
    follow = looprpt.ema_update

    def watching(teacher, student, decay):
        before = copy.deepcopy(teacher.state_dict())
        follow(teacher, student, decay)
        seen.append((before, copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())))

    monkeypatch.setattr(looprpt, "ema_update", watching)
    start = copy.deepcopy(student.state_dict())
    train(looprpt.start_stage("rpt", student, SUMS), SUMS, rows())
    assert len(seen) == 2
    assert all(a.equal(b) for a, b in zip(seen[0][0].values(), start.values(), strict=True)), "it starts as the student"
    assert all(a.equal(b) for a, b in zip(seen[1][0].values(), seen[0][1].values(), strict=True)), (
        "nothing else moves it"
    )
    for before, after, student_now in seen:
        for name in before:
            assert_close(after[name], 0.995 * before[name] + 0.005 * student_now[name])


def test_training_repeats_bit_for_bit_from_its_seed():
    runs = []
    for seed in (0, 0, 1):
        student = LoopedTransformer(replace(SHAPE, vocab_size=8), generator=runtime.seeded(seed))
        config = Config(seed=seed, data=DataConfig(operands=4), train=TrainConfig(batch=16), rpt=RPTConfig(steps=3))
        config = filled(config, student.config)
        train(looprpt.start_stage("rpt", student, config), config, None)
        runs.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert runs[0].equal(runs[1])
    assert not runs[0].equal(runs[2])


def test_every_step_process_micro_batch_and_seed_has_its_own_noise(monkeypatch):
    seeds, step = [], looprpt.rpt_step

    def noting(*args, generator, **how):
        seeds.append(generator.initial_seed())
        return step(*args, generator=generator, **how)

    monkeypatch.setattr(looprpt, "rpt_step", noting)
    for seed, rank in ((0, 0), (0, 1), (1, 0)):
        monkeypatch.setattr(processes, "rank_and_world", lambda rank=rank: (rank, 1))
        config = replace(SUMS, seed=seed, train=replace(SUMS.train, batch=4, micro_batch=1))
        train(looprpt.start_stage("rpt", make(0), config), config, rows())
    assert len(seeds) > 9, "two steps of one or two rows, three times"
    assert len({*seeds}) == len(seeds)


def test_a_selection_that_takes_another_number_of_tokens_is_noticed(batch, monkeypatch):
    """rpt_step counts the hard tokens before it knows which they are: silently it would train on others."""
    cfg = replace(RPTConfig(), rollouts=2)
    for wrong in (lambda entropy, mask, rho: mask, lambda entropy, mask, rho: mask & False):
        monkeypatch.setattr(looprpt, "hard_tokens", wrong)
        with pytest.raises(RuntimeError, match="hard_tokens must select hard_count tokens"):
            rpt_step(make(0), make(1), batch, cfg, counts=counts_of(batch, cfg.rho))
