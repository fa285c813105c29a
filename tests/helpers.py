"""What several tests share: a script run here or in forked processes, its refusals, the paper worked out slowly."""

import functools
import math
import os
import runpy
import sys
from dataclasses import replace
from multiprocessing import forkserver, get_context
from pathlib import Path

import pytest
import torch

from support import runtime, sizes


def call(monkeypatch, module, *args) -> None:
    """Run a script in this process, as from the command line."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, args)])
    if hasattr(module, "main"):
        runtime.run_cli(module.main)
    else:
        runpy.run_path(module.__file__, run_name="__main__")


def refused(monkeypatch, module, *args) -> str:
    """The one sentence that a script ends with, with exit status 1 and no traceback."""
    with pytest.raises(SystemExit) as error:
        call(monkeypatch, module, *args)
    message = str(error.value.code)
    assert message.startswith("error: "), f"not refused in a sentence: {message}"
    assert "\n" not in message
    return message.removeprefix("error: ")


@functools.cache
def forking():
    """Starts processes as copies of one that has imported everything, once: a start of Python takes seconds. They are
    processes like any other, but for their end: it is `os._exit`."""
    tests = Path(__file__).parent
    context = get_context("forkserver")
    context.set_forkserver_preload(["__main__", "test_faults", "test_step"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (tests.parent, tests))))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def forked(function, *args, count: int) -> None:
    """Run function(rank, *args) in as many processes, to their end; a failure of one is raised here."""
    forking()
    torch.multiprocessing.start_processes(function, args, nprocs=count, start_method="forkserver")


def filled(config, shape, rows=None):
    """A configuration with a value for every flag of every stage, as `looprpt.run_stages` fills it in."""
    all_stages = replace(config, objective=("pretrain", "gate", "rpt"))
    return replace(sizes.fill_in(all_stages, shape, rows, torch.device("cpu")), objective=config.objective)


def slow_exit(gates, threshold: float) -> int:
    """Loops that a token takes: the first (from 1) after which it has left with this probability, or all."""
    stayed = 1.0
    for loop, gate in enumerate(gates, 1):
        stayed *= 1 - 1 / (1 + math.exp(-torch.as_tensor(gate).item()))
        if loop == len(gates) or (threshold < 1 and 1 - stayed >= threshold):
            return loop
    raise AssertionError("no gate was given")


# A slow reading of the paper: one sequence, one rollout, one token at a time, every pass at full depth


def slow_standardized(xs):
    xs = torch.stack(xs).detach()
    return (xs - xs.mean()) / (xs.std() + 1e-6)


def slow_logp(net, state, target):
    return net.lm_head(state).log_softmax(-1)[target]


def slow_pdf(gates):
    pdf, left = [], 1.0
    for gate in gates[:-1]:
        pdf.append(left * torch.sigmoid(gate))
        left = left * (1 - torch.sigmoid(gate))
    return [*pdf, left]


def slow_rollout(net, ids, noises):
    """States and gates of one sequence, each T long; noises: one T D tensor for each loop after the first."""
    out = [net(ids[None], loops=1)]
    for noise in noises:
        out.append(net(out[-1].hidden[:, :, -1] + noise, loops=1))
    return [o.hidden[0, :, 0] for o in out], [o.gate[0, :, 0] for o in out]


def slow_step(student, teacher, batch, cfg, generator, draw):
    """The total loss. draw: the exit (from 0) of row b, token t, rollout g."""
    (B, T), c = batch.inputs.shape, student.config
    loops, vocab, dtype = c.loops, c.vocab_size, student.lm_head.weight.dtype
    noise = [
        cfg.noise_std * torch.randn(B * cfg.rollouts, T, c.width, generator=generator, dtype=dtype)
        for _ in range(loops - 1)
    ]
    terms = []
    for b in range(B):
        ids = batch.inputs[b]
        quiet = [torch.zeros(T, c.width)] * (loops - 1)
        with torch.no_grad():
            ref_states, ref_gates = slow_rollout(teacher, ids, quiet)
            p = teacher.lm_head(ref_states[-1]).softmax(-1)
            entropy = -(p * p.log()).sum(-1)
        counted = [t for t in range(T) if batch.mask[b, t]]
        hard = sorted(counted, key=lambda t: -entropy[t])[: math.ceil(cfg.rho * len(counted))]
        states, gates = slow_rollout(student, ids, quiet)
        rollouts = [slow_rollout(student, ids, [n[b * cfg.rollouts + g] for n in noise]) for g in range(cfg.rollouts)]
        for t in hard:
            y = batch.targets[b, t]
            ref_logp = [slow_logp(teacher, s[t], y).detach() for s in ref_states]
            ref_loop = slow_exit([g[t] for g in ref_gates], cfg.tau) - 1
            d = min(1.0, entropy[t].item() / math.log(vocab))
            cost = cfg.lambda_base * (1 + cfg.lambda_scale * (1 - d))

            def reward(states, i):
                gain = slow_logp(student, states[i][t], y) - ref_logp[ref_loop]  # noqa: B023
                return (gain - cost * (i - ref_loop)).detach()  # noqa: B023

            logp, pi = [slow_logp(student, s[t], y) for s in states], slow_pdf([g[t] for g in gates])
            rewards = [reward(states, i) for i in range(loops)]
            paid, chosen, exact = [], [], 0.0
            for g, (_, noisy_gates) in enumerate(rollouts):
                pi_g = slow_pdf([x[t] for x in noisy_gates])
                exact = exact - sum(p * r for p, r in zip(pi_g, rewards, strict=True)) / cfg.rollouts
                paid.append(rewards[draw(b, t, g)])
                chosen.append(pi_g[draw(b, t, g)].log())
            if cfg.estimator == "sampled":
                pg = -(slow_standardized(paid) * torch.stack(chosen)).mean()
            else:
                pg = exact - exact.detach()  # a centred advantage: the gradient of the expectation, the value 0
            advantage = slow_standardized(rewards).clamp(min=0)
            weights = [p.detach() * (1 + cfg.rep_bonus * a) for p, a in zip(pi, advantage, strict=True)]
            rep = -sum(w * x for w, x in zip(weights, logp, strict=True))
            rep = (1 - cfg.floor) * rep - cfg.floor * logp[-1]
            last = student.lm_head(states[-1][t]).detach().log_softmax(-1)
            earlier = [student.lm_head(s[t]).log_softmax(-1) for s in states[:-1]]
            distill = sum((last.exp() * (last - x)).sum() for x in earlier) / len(earlier)
            ent = sum(p * p.log() for p in pi)
            ratio = [r - x for r, x in zip(ref_logp, logp, strict=True)]
            kl = sum(r.exp() - r - 1 for r in ratio) / loops
            total = cfg.pg_weight * pg + cfg.rep_weight * rep + cfg.ent_weight * ent + cfg.kl_weight * kl
            total = total + cfg.distill_weight * distill
            terms.append(total)
    return sum(terms) / len(terms)
