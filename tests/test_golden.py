"""Reference numbers of other implementations: the published modelling code, and a research implementation of the step.

Where they come from is in tests/golden/README.md. Other cases of the same layout: pytest -k golden --golden DIR
"""

import json
from copy import copy
from dataclasses import replace

import pytest
import torch
from einops import rearrange
from helpers import slow_step
from safetensors.torch import load_file
from torch.testing import assert_close

import data
import eval
import looprpt
import model
from data import Batch
from looprpt import RECIPES, RPTConfig, TokenCounts, rpt_step
from support import checkpoint


def test_golden_model(golden, device):
    net, reference = checkpoint.load(golden / "ouro_tiny", device), golden / "ouro_tiny" / "reference.safetensors"
    expected = {name: x.to(device) for name, x in load_file(reference).items()}
    with torch.no_grad():
        out = net(expected["input_ids"])
        logits = net.logits(out.hidden)
    close = {"rtol": 1e-5, "atol": 1e-5 if device.type == "cpu" else 5e-5}  # float32 in another order of additions
    assert_close(out.hidden, expected["hidden"], **close)
    assert_close(out.gate, expected["gate_logits"], **close)
    assert_close(logits, expected["logits"], rtol=1e-5, atol=close["atol"] * expected["logits"].abs().max().item())
    assert_close(model.exit_logpdf(out.gate).exp(), expected["exit_pdf"], **close)
    thresholds = [name for name in expected if name.startswith("exit_loop_q")]
    assert thresholds
    for name in thresholds:
        threshold = int(name.removeprefix("exit_loop_q")) / 100
        assert_close(model.exit_loop(out.gate, threshold) + 1, expected[name].long(), msg=name)


@pytest.fixture
def step(golden, monkeypatch, device):
    """The reference step's numbers, and a function that runs ours on its inputs, draws and hyper-parameters."""
    folder = golden / "rl_step"
    reference, tensors = (
        json.loads((folder / "reference.json").read_text()),
        load_file(folder / "reference.safetensors"),
    )
    hyper = reference["hyper"]
    ids, hard = tensors["input_ids"].long(), tensors["hard_mask"].bool()
    batch = Batch(ids[:, :-1], ids[:, 1:], tensors["loss_mask_at_prediction"][:, :-1].bool())
    exits = rearrange(tensors["sampled_loops"].long()[:, :-1], "(b g) t -> b t g", g=hyper["rollouts"])[hard]  # N G
    monkeypatch.setattr(looprpt, "draw_exits", lambda logpi, generator: exits.to(device))
    cfg = replace(
        RPTConfig(),
        rollouts=hyper["rollouts"],
        noise_std=hyper["sigma"],
        rho=hyper["rho"],
        tau=hyper["tau"],
        lambda_base=hyper["lambda_base"],
        lambda_scale=hyper["lambda_scale"],
        pg_weight=hyper["alpha"],
        rep_weight=hyper["beta"],
        ent_weight=hyper["gamma"],
        kl_weight=0.0,
    )

    def run(**changes):
        student, teacher = (checkpoint.load(folder / name, device) for name in ("student", "teacher"))
        changed, counts = copy(cfg), TokenCounts(batch.mask.sum(), hard.sum())
        vars(changed).update(changes)  # unchecked: a wrong sign is refused
        return student, rpt_step(student, teacher, data.trim_and_move(batch, device), changed, counts=counts)

    return reference, tensors, batch, cfg, run


def test_golden_hard_tokens(golden, step, device):
    reference, tensors, batch, cfg, _ = step
    teacher = checkpoint.load(golden / "rl_step" / "teacher", device)
    with torch.no_grad():
        entropy = looprpt.entropy_of(teacher.logits(teacher(batch.inputs.to(device)).hidden[:, :, -1])).cpu()
    assert_close(entropy, tensors["teacher_entropy"], rtol=1e-4, atol=1e-5)
    hard = looprpt.hard_tokens(entropy, batch.mask, cfg.rho)
    assert hard.equal(tensors["hard_mask"].bool())
    assert hard.sum() == reference["metrics"]["n_hard"]


def test_golden_terms(step):
    reference, _, _, cfg, run = step
    expected, close = reference["metrics"], {"rel": 1e-4, "abs": 1e-7}
    metrics = {name: value.item() for name, value in run()[1].metrics.items()}
    assert metrics["pg"] == pytest.approx(expected["pg_loss"], **close)
    assert metrics["rep"] == pytest.approx(expected["model_loss"], **close)
    assert cfg.ent_weight * metrics["ent"] == pytest.approx(expected["entropy_loss"], **close)
    assert metrics["loss"] == pytest.approx(expected["total_loss"], **close)


def test_golden_step_of_a_recipe(golden, step, monkeypatch, same_noise, device, near):
    """That code has the published values as its own, but for the size of the group, the noise and the KL. Ours, dense:
    on the same models and tokens, value and gradient of the slow reading, which has that code's value and gradient with
    its own hyper-parameters."""
    reference, tensors, batch, cfg, _ = step
    assert cfg == replace(RECIPES["paper"], rollouts=4, noise_std=0.0, kl_weight=0.0)
    exits = rearrange(tensors["sampled_loops"].long()[:, :-1], "(b g) t -> b t g", g=4)
    for ours in (cfg, RECIPES["paper"], RECIPES["dense"]):
        many = exits.repeat(1, 1, 2)[..., : ours.rollouts]
        hard = looprpt.hard_tokens(tensors["teacher_entropy"], batch.mask, ours.rho)
        monkeypatch.setattr(looprpt, "draw_exits", lambda logpi, generator, x=many[hard]: x.to(device))
        (student, teacher), (slow_student, slow_teacher) = (
            [checkpoint.load(golden / "rl_step" / name, where).double() for name in ("student", "teacher")]
            for where in (device, "cpu")
        )
        counts, noise = TokenCounts(batch.mask.sum(), hard.sum()), lambda: torch.Generator().manual_seed(3)
        there = data.trim_and_move(batch, device)
        output = rpt_step(student, teacher, there, ours, counts=counts, generator=noise())
        slow = slow_step(slow_student, slow_teacher, batch, ours, noise(), lambda b, t, g, x=many: x[b, t, g])
        assert hard.sum() == (batch.mask.sum() if ours is RECIPES["dense"] else reference["metrics"]["n_hard"])
        if ours is cfg:
            assert slow.item() == pytest.approx(reference["metrics"]["total_loss"], rel=1e-4)
        assert_close(output.loss.cpu(), slow, rtol=10 * near, atol=10 * near)
        output.loss.backward()
        slow.backward()
        for (name, p), q in zip(student.named_parameters(), slow_student.named_parameters(), strict=True):
            assert_close(
                p.grad.cpu(), q[1].grad, rtol=1e3 * near, atol=10 * near, msg=lambda m, name=name: f"{name}: {m}"
            )
            if ours is cfg:
                expected = tensors[f"grad.{checkpoint.ouro_name(name)}"].double()
                assert (q[1].grad - expected).norm() <= 1e-4 * expected.norm().clamp(min=1e-12), name


@pytest.fixture
def passes(golden, step, device):
    """Runs both models on chosen tokens: gates, logits, and log-probability of the gold token after each loop."""
    batch = data.trim_and_move(step[2], device)
    nets = [checkpoint.load(golden / "rl_step" / name, device) for name in ("student", "teacher")]

    @torch.no_grad()
    def run(selected):
        outs = [net(batch.inputs) for net in nets]
        logits = [net.logits(out.hidden[selected]) for net, out in zip(nets, outs, strict=True)]
        logp = [looprpt.logp_of(x, batch.targets[selected]) for x in logits]
        return [[x.cpu() for x in each] for each in ([out.gate[selected] for out in outs], logits, logp)]

    return run


def test_golden_k3(step, passes):
    """That code weighs K3 by the exit distribution and clamps the result; ours averages it over the loops."""
    reference, tensors, *_ = step
    (gate, _), _, (logp, teacher_logp) = passes(tensors["hard_mask"].bool())
    k3 = [looprpt.k3_kl(s, t) for s, t in zip(logp.split(1, 1), teacher_logp.split(1, 1), strict=True)]
    weighted = (model.exit_logpdf(gate).exp() * torch.stack(k3, 1).clamp(max=10)).sum(-1).mean()
    assert weighted.item() == pytest.approx(reference["metrics"]["kl_loss_unweighted"], rel=1e-4)


def test_golden_reward_and_loops(step, passes):
    """What that code logs of them: plain averages over all positions, those of the prompt too."""
    reference, _, batch, cfg, _ = step
    (gate, teacher_gate), (_, teacher_logits), (logp, teacher_logp) = passes(torch.ones_like(batch.mask))
    ref_loop, baseline = looprpt.reference(teacher_logp, teacher_gate, cfg.tau)
    entropy = looprpt.entropy_of(teacher_logits[:, -1])
    cost = looprpt.loop_cost(entropy, teacher_logits.shape[-1], cfg.lambda_base, cfg.lambda_scale)
    reward = looprpt.exit_reward(logp, baseline, cost, ref_loop)
    assert reward.mean().item() == pytest.approx(reference["student_avg_reward"], rel=1e-4)
    loops = eval.exit_stats(gate, len(gate))["loops"].item()
    assert loops - 1 == pytest.approx(reference["expected_loop_zero_based"], rel=1e-4)


def test_golden_gradients(step):
    _, tensors, _, _, run = step
    student, output = run()
    output.loss.backward()
    expected = {name.removeprefix("grad."): g for name, g in tensors.items() if name.startswith("grad.")}
    names = {checkpoint.ouro_name(name): p for name, p in student.named_parameters()}
    assert expected.keys() == names.keys()
    for name, gradient in expected.items():
        error = (names[name].grad.cpu() - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 1e-4, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("term", ["pg_weight", "rep_weight", "ent_weight"])
def test_golden_gradients_notice_a_wrong_sign(step, term):
    """A check of the check: with one term's sign turned, some gradient leaves the tolerance by far."""
    _, tensors, _, cfg, run = step
    student, output = run(**{term: -getattr(cfg, term)})
    output.loss.backward()
    grads = {checkpoint.ouro_name(name): p.grad.cpu() for name, p in student.named_parameters()}
    errors = [(grads[n[5:]] - g).norm() / g.norm() for n, g in tensors.items() if n.startswith("grad.") and g.any()]
    assert max(errors) > 1e-3
