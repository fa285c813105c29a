"""Each formula by value, against a loop over Python floats, and by the inputs that its gradient reaches."""

import itertools
import math
from fractions import Fraction
from statistics import mean, stdev

import pytest
import torch
from helpers import slow_exit
from torch.testing import assert_close

import eval
import looprpt
from model import exit_cdf, exit_logpdf, exit_loop
from support import runs

N, G, L, V = 5, 3, 4, 7


@pytest.fixture(autouse=True)
def draws():
    torch.manual_seed(0)


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def logpi_like(*shape):
    return exit_logpdf(rand(*shape))


def expect(actual, rows):
    assert_close(actual, torch.tensor(rows, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def reached(formula, *inputs):
    """Which inputs the gradient of a formula reaches."""
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    weights = rand(*formula(*inputs).shape)
    out = (formula(*inputs) * weights).sum()
    if not out.requires_grad:
        return [False] * len(inputs)
    out.backward()
    return [x.grad is not None and bool(x.grad.any()) for x in inputs]


def plain_exit_pdf(gate):
    pdf, left = [], 1.0
    for g in gate[:-1]:
        p = 1 / (1 + math.exp(-g))
        pdf.append(left * p)
        left *= 1 - p
    return [*pdf, left]


def plain_standardized(xs):
    return [(x - mean(xs)) / (stdev(xs) + 1e-6) for x in xs]


# Exit distribution


def test_exit_distribution_is_the_chance_of_having_stayed_times_that_of_leaving():
    gate = rand(N, L)
    expect(exit_logpdf(gate).exp(), [plain_exit_pdf(row) for row in gate.tolist()])


def test_exit_distribution_ignores_the_last_gate_and_keeps_a_gradient_when_saturated():
    gate = torch.tensor([[-300.0, 300.0, -300.0, 1e9]], requires_grad=True)
    logpdf = exit_logpdf(gate)
    assert_close(logpdf.exp(), torch.tensor([[0.0, 1, 0, 0]]))
    logpdf[0, 2].backward()
    assert gate.grad.isfinite().all()
    assert gate.grad[0, 1] == -1, "log-sigmoid sums keep it; log(pi + 1e-8) would lose it"
    assert gate.grad[0, 3] == 0


def test_exit_loop_is_the_first_at_which_the_cumulative_probability_reaches_the_threshold():
    gate = 2 * rand(200, L)
    for threshold in (0.0, 0.1, 0.5, 0.9, 0.99):
        expected = [slow_exit(row, threshold) - 1 for row in gate.tolist()]
        assert exit_loop(gate, threshold).tolist() == expected


def test_exit_threshold_one_runs_every_loop_even_when_the_gate_is_saturated():
    assert exit_loop(torch.full((1, L), 1e4), 1.0).tolist() == [L - 1]


def test_exit_threshold_zero_leaves_after_the_first_loop_even_when_the_gate_never_would():
    assert exit_loop(torch.full((1, L), -1e4), 0.0).tolist() == [0]


def test_cumulative_exit_probability_adds_up_to_one_at_the_last_loop():
    gate = rand(N, L)
    expect(exit_cdf(gate), [list(itertools.accumulate(plain_exit_pdf(row))) for row in gate.tolist()])
    assert (exit_cdf(gate)[:, -1] == 1).all()


# Steps 1 to 5


def test_log_probability_of_the_gold_token():
    logits, targets = rand(N, L, V), torch.randint(V, (N,))
    rows = [
        [x[t] - math.log(sum(map(math.exp, x))) for x in per_loop]
        for per_loop, t in zip(logits.tolist(), targets.tolist(), strict=True)
    ]
    expect(looprpt.logp_of(logits, targets), rows)
    assert reached(lambda x: looprpt.logp_of(x, targets), logits) == [True]


def test_entropy_in_nats():
    logits = rand(N, V)
    rows = []
    for row in logits.tolist():
        p = [math.exp(x) / sum(map(math.exp, row)) for x in row]
        rows.append(-sum(q * math.log(q) for q in p))
    expect(looprpt.entropy_of(logits), rows)


def test_hard_count_rounds_up_without_float_error():
    n = torch.arange(1001)
    mask = torch.arange(1001) < n[:, None]
    for rho in ("0.07", "0.1", "0.2", "0.55", "1"):
        exact = [math.ceil(Fraction(rho) * i) for i in n.tolist()]
        assert looprpt.hard_count(mask, float(rho)).tolist() == exact


def test_hard_tokens_are_the_uncertain_ones_of_each_row_among_those_that_count():
    entropy, mask = rand(6, 23).abs(), torch.rand(6, 23) < 0.6
    mask[2] = False
    hard = looprpt.hard_tokens(entropy, mask, 0.3)
    for b in range(6):
        counted = [t for t in range(23) if mask[b, t]]
        ranked = sorted(counted, key=lambda t: -entropy[b, t].item())
        assert set(hard[b].nonzero().flatten().tolist()) == set(ranked[: math.ceil(0.3 * len(counted))])
    flat = looprpt.hard_tokens(torch.zeros(1, 10), torch.ones(1, 10, dtype=torch.bool), 0.25)
    assert flat.sum() == 3, "ties are no reason for more or fewer"


def test_reference_is_where_the_teacher_leaves():
    logp, gate = rand(N, L), rand(N, L)
    ref_loop, baseline = looprpt.reference(logp, gate, 0.5)
    for n in range(N):
        expected = slow_exit(gate[n].tolist(), 0.5) - 1
        assert ref_loop[n] == expected
        assert baseline[n] == logp[n, expected]


def test_the_cost_of_a_loop_falls_with_difficulty():
    entropy = torch.tensor([0.0, 0.5, math.log(V), 9.0], dtype=torch.float64)
    rows = [0.02 * (1 + 0.5 * (1 - min(1.0, h / math.log(V)))) for h in entropy.tolist()]
    expect(looprpt.loop_cost(entropy, V, 0.02, 0.5), rows)
    assert rows[0] == pytest.approx(0.03)
    assert rows[-1] == pytest.approx(0.02)


def test_reward_is_the_gain_over_the_teacher_less_the_cost_of_later_loops():
    logp, baseline, cost, ref_loop = rand(N, L), rand(N), rand(N).abs(), torch.randint(L, (N,))
    rows = [
        [logp[n, i].item() - baseline[n].item() - cost[n].item() * (i - ref_loop[n].item()) for i in range(L)]
        for n in range(N)
    ]
    expect(looprpt.exit_reward(logp, baseline, cost, ref_loop), rows)
    reward = lambda a, b, c: looprpt.exit_reward(a, b, c, ref_loop)  # noqa: E731
    assert reached(reward, logp, baseline, cost) == [False, False, False]


# Steps 6 and 7


def test_exits_are_drawn_from_each_rollouts_own_distribution():
    logpi = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]], [[0, 1, 0, 0], [0, 0, 0, 1]]]).log()
    exits = looprpt.draw_exits(logpi.repeat(1, 5000, 1), torch.Generator().manual_seed(0))
    assert exits.shape == (2, 10000)
    for n, g in itertools.product(range(2), range(2)):
        share = torch.bincount(exits[n, g::2], minlength=4) / 5000
        assert_close(share, logpi[n, g].exp(), atol=0.03, rtol=0)


def test_sampled_policy_loss_compares_each_rollout_with_the_others_of_its_token():
    logpi, reward, exits = logpi_like(N, G, L), rand(N, L), torch.randint(L, (N, G))
    rows = []
    for n in range(N):
        paid = [reward[n, exits[n, g]].item() for g in range(G)]
        advantage = plain_standardized(paid)
        rows.append(-mean(advantage[g] * logpi[n, g, exits[n, g]].item() for g in range(G)))
    expect(looprpt.sampled_policy_loss(logpi, exits, reward), rows)
    assert reached(lambda p, r: looprpt.sampled_policy_loss(p, exits, r), logpi, reward) == [True, False]


def test_a_group_that_was_paid_alike_moves_nothing():
    logpi, exits = logpi_like(N, G, L), torch.zeros(N, G, dtype=torch.long)
    assert not looprpt.sampled_policy_loss(logpi, exits, torch.ones(N, L, dtype=torch.float64)).any()


def policy_gradient(gate, loss):
    gate = gate.detach().clone().requires_grad_()
    loss(exit_logpdf(gate)).sum().backward()
    return gate.grad


def test_exact_policy_gradient_is_that_of_the_expected_reward():
    gate, reward = rand(N, G, L), rand(N, L)
    actual = policy_gradient(gate, lambda logpi: looprpt.exact_policy_loss(logpi, reward))
    expected = torch.zeros_like(gate)
    for n, g, i in itertools.product(range(N), range(G), range(L)):

        def value(step, n=n, g=g, i=i):
            row = gate[n, g].tolist()
            row[i] += step
            return sum(p * r for p, r in zip(plain_exit_pdf(row), reward[n].tolist(), strict=True))

        expected[n, g, i] = -(value(1e-5) - value(-1e-5)) / 2e-5 / G
    assert_close(actual, expected, rtol=0, atol=1e-9)
    assert reached(looprpt.exact_policy_loss, logpi_like(N, G, L), reward) == [True, False]


def test_sampled_gradient_averages_to_the_exact_one():
    """Over all draws of a pair of rollouts, with a plainly centred advantage: (G - 1) / G of the exact gradient."""
    gate, reward = rand(1, 1, L).expand(1, 2, L), rand(1, L)
    total = torch.zeros(1, 2, L, dtype=torch.float64)
    probability = exit_logpdf(gate)[0, 0].exp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(looprpt, "standardized", lambda x: x - x.mean(-1, keepdim=True))
        for drawn in itertools.product(range(L), repeat=2):
            exits = torch.tensor([drawn])
            weight = probability[drawn[0]] * probability[drawn[1]]
            total += weight * policy_gradient(gate, lambda p, e=exits: looprpt.sampled_policy_loss(p, e, reward))
    exact = policy_gradient(gate, lambda p: looprpt.exact_policy_loss(p, reward))
    assert_close(total, exact / 2, rtol=1e-9, atol=1e-12)


def test_sampled_gradient_tends_to_the_exact_one_over_the_deviation_as_rollouts_grow():
    many = 200_000
    gate, reward = rand(1, 1, L), rand(1, L)
    gates = gate.repeat(1, many, 1)
    exits = looprpt.draw_exits(exit_logpdf(gates), torch.Generator().manual_seed(0))
    sampled = policy_gradient(gates, lambda p: looprpt.sampled_policy_loss(p, exits, reward)).sum(1)
    pi = exit_logpdf(gate).exp()
    deviation = ((pi * reward**2).sum() - (pi * reward).sum() ** 2).sqrt()
    exact = policy_gradient(gate, lambda p: looprpt.exact_policy_loss(p, reward)).sum(1)
    assert_close(sampled * deviation, exact, rtol=0, atol=0.02 * exact.abs().max().item())


def test_the_reference_changes_no_gradient():
    """baseline and cost x ref_loop are constant over loops and rollouts, and every advantage is centred."""
    gate, logp, cost, exits = rand(N, G, L), rand(N, L), rand(N).abs(), torch.randint(L, (N, G))

    def gradients(baseline, ref_loop):
        reward = looprpt.exit_reward(logp, baseline, cost, ref_loop)
        yield policy_gradient(gate, lambda p: looprpt.sampled_policy_loss(p, exits, reward))
        yield policy_gradient(gate, lambda p: looprpt.exact_policy_loss(p, reward))
        x = logp.clone().requires_grad_()
        looprpt.representation_loss(x, exit_logpdf(gate[:, 0]), reward).sum().backward()
        yield x.grad

    one = gradients(rand(N), torch.zeros(N, dtype=torch.long))
    other = gradients(5 * rand(N), torch.tensor([3, 1, 2, 0, 3]))
    for a, b in zip(one, other, strict=True):
        assert a.any()
        assert_close(a, b, rtol=1e-9, atol=1e-11)


# Steps 8 to 10, and Ouro's own stages


def test_representation_loss_weighs_loops_by_exit_and_advantage():
    logp, logpi, reward = rand(N, L), logpi_like(N, L), rand(N, L)
    rows = []
    for n in range(N):
        advantage = plain_standardized(reward[n].tolist())
        weights = [math.exp(logpi[n, i]) * (1 + max(0, advantage[i])) for i in range(L)]
        rows.append(-sum(w * logp[n, i].item() for i, w in enumerate(weights)))
    expect(looprpt.representation_loss(logp, logpi, reward), rows)
    assert reached(looprpt.representation_loss, logp, logpi, reward) == [True, False, False]


def test_representation_loss_without_the_bonus_or_of_the_last_loop_alone():
    logp, logpi, reward = rand(N, L), logpi_like(N, L), rand(N, L)
    paid = looprpt.representation_loss(logp, logpi, reward).tolist()
    visited = [
        -sum(math.exp(p) * x for p, x in zip(*pair, strict=True))
        for pair in zip(logpi.tolist(), logp.tolist(), strict=True)
    ]
    last = [-x[-1] for x in logp.tolist()]
    formula = looprpt.representation_loss
    expect(formula(logp, logpi, reward, bonus=0), visited)
    expect(formula(logp, logpi, reward, bonus=0.5), [(a + b) / 2 for a, b in zip(paid, visited, strict=True)])
    expect(formula(logp, logpi, reward, bonus=0, floor=0.3), mixed(visited, last))
    expect(formula(logp, logpi, reward, floor=0.3), mixed(paid, last))
    expect(formula(logp, logpi, reward, floor=1), last)
    for bonus, floor in itertools.product((0.0, 1.0), (0.3, 1.0)):
        changed = lambda *x, b=bonus, f=floor: formula(*x, b, f)  # noqa: E731
        assert reached(changed, logp, logpi, reward) == [True, False, False]


def mixed(rows, last):
    return [0.7 * a + 0.3 * b for a, b in zip(rows, last, strict=True)]


def test_distillation_pulls_the_earlier_loops_towards_the_last_and_never_the_last():
    logits = rand(N, L, V)
    rows = []
    for token in logits.log_softmax(-1).tolist():
        p = [math.exp(x) for x in token[-1]]
        rows.append(mean(sum(a * (math.log(a) - b) for a, b in zip(p, q, strict=True)) for q in token[:-1]))
    expect(looprpt.distillation(logits), rows)
    logits.requires_grad_()
    looprpt.distillation(logits).sum().backward()
    assert not logits.grad[:, -1].any()
    assert logits.grad[:, :-1].any(-1).all()
    nearer = logits.detach() - 0.1 * logits.grad
    assert (looprpt.distillation(nearer) < looprpt.distillation(logits)).all()


def test_k3():
    logp, teacher = rand(N, L), rand(N, L)
    rows = [
        mean(math.exp(t - s) - (t - s) - 1 for s, t in zip(*pair, strict=True))
        for pair in zip(logp.tolist(), teacher.tolist(), strict=True)
    ]
    expect(looprpt.k3_kl(logp, teacher), rows)
    assert reached(looprpt.k3_kl, logp, teacher) == [True, False]


def test_k3_of_a_token_that_the_student_finds_impossible_is_finite():
    logp = torch.full((1, L), -1000.0, requires_grad=True)
    value = looprpt.k3_kl(logp, torch.zeros(1, L))
    value.sum().backward()
    assert value.isfinite().all()
    assert logp.grad.isfinite().all()


def test_stage1_loss_is_the_expected_cross_entropy_less_the_entropy_bonus():
    logp, logpi = rand(N, L), logpi_like(N, L)
    rows = []
    for n in range(N):
        pi = [math.exp(x) for x in logpi[n].tolist()]
        cross_entropy = sum(-p * logp[n, i].item() for i, p in enumerate(pi))
        rows.append(cross_entropy - 0.1 * -sum(p * math.log(p) for p in pi))
    expect(looprpt.stage1_loss(logp, logpi, 0.1), rows)
    assert reached(lambda a, b: looprpt.stage1_loss(a, b, 0.1), logp, logpi) == [True, True]


def test_gate_loss_labels_each_gate_with_the_gain_of_the_next_loop():
    gate, logp = rand(N, L), rand(N, L) / 50
    rows = []
    for n in range(N):
        terms = []
        for i in range(L - 1):
            gain = max(0.0, logp[n, i + 1].item() - logp[n, i].item())
            go_on = 1 / (1 + math.exp(-50 * (gain - 0.005)))
            stay = 1 - 1 / (1 + math.exp(-gate[n, i].item()))
            terms.append(-go_on * math.log(stay) - (1 - go_on) * math.log(1 - stay))
        rows.append(mean(terms))
    expect(looprpt.gate_loss(gate, logp), rows)
    assert reached(looprpt.gate_loss, gate, logp) == [True, False]
    helps = torch.tensor([[-3.0, 0, 0, 0]], dtype=torch.float64)
    assert policy_gradient_of_gate(helps)[0, 0] > 0, "the second loop helps, so the first gate learns to stay"


def policy_gradient_of_gate(logp):
    gate = torch.zeros_like(logp, requires_grad=True)
    looprpt.gate_loss(gate, logp).sum().backward()
    return gate.grad


def test_mean_loop_counts_from_one():
    gates = torch.tensor([[99.0, 0, 0, 0], [-99, -99, -99, 0], [0, -99, 99, 0]])
    assert [eval.exit_stats(gate[None], 1)["loops"].item() for gate in gates] == pytest.approx([1, 4, 2])
    assert eval.exit_stats(gates, 2)["loops"].item() == pytest.approx((1 + 4 + 2) / 2)


def test_learning_rate_rises_to_its_peak_and_falls_to_nothing():
    factors = [runs.lr_factor(step, 1000, 0.03) for step in range(1000)]
    assert factors[:30] == pytest.approx([(step + 1) / 30 for step in range(30)])
    assert all(a >= b for a, b in itertools.pairwise(factors[29:]))
    assert 0 < factors[-1] < 0.01
    assert runs.lr_factor(0, 1, 0.0) == 1
    short = [runs.lr_factor(step, 10, 0.03) for step in range(10)]
    assert short == pytest.approx([(step + 1) / 20 for step in range(10)]), (
        "20 steps at least, even if they are not done"
    )
