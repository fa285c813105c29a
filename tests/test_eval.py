"""Exit rules, curves and intervals: against plain Python."""

import math

import pytest
import torch
from helpers import slow_exit
from torch.testing import assert_close

import data
import eval
from eval import Scores, Tally
from model import LoopedTransformer, ModelConfig
from support import runtime
from support.runtime import UserError

L = 4


def compare(pairs, rounds):
    return eval.compare([(a.bootstrapped(rounds), b.bootstrapped(rounds)) for a, b in pairs])


@pytest.fixture
def scores():
    """Sixty tokens in seven documents."""
    g = torch.Generator().manual_seed(0)
    n = 60
    spread = torch.rand(n, L, generator=g)
    return Scores(
        correct=torch.rand(n, L, generator=g) < torch.tensor([0.3, 0.5, 0.6, 0.7]),
        gate=torch.randn(n, L, generator=g) * 2 - 0.5,
        entropy=spread[:, -1] * 3,
        logp=-torch.rand(n, L, generator=g) * 4,
        max_logp=-spread,
        document=torch.randint(7, (n,), generator=g).sort().values,
        depth=None,
    )


def slow_rule(s, rule, threshold, n):
    """Loop (from 0) at which token n leaves by a rule."""
    if rule == "gate":
        return slow_exit(s.gate[n], threshold) - 1
    return next((loop for loop in range(L - 1) if s.max_logp[n, loop].exp() >= threshold), L - 1)


@pytest.mark.parametrize("rule", list(eval.EXIT_RULES))
def test_each_rule_leaves_after_the_first_loop_that_reaches_the_threshold(scores, rule):
    reached = eval.EXIT_RULES[rule](scores)
    for threshold in eval.FINE:
        expected = [slow_rule(scores, rule, threshold, n) for n in range(60)]
        assert eval.exit_at(reached, threshold).tolist() == expected
    assert {*eval.exit_at(reached, -math.inf).tolist()} == {0}
    assert {*eval.exit_at(reached, math.inf).tolist()} == {L - 1}


def test_a_summary_is_what_its_words_say(scores):
    chosen = torch.rand(60, generator=torch.Generator().manual_seed(1)) < 0.6
    summary, tokens = eval.summarize(scores, chosen), chosen.nonzero().flatten().tolist()
    n = len(tokens)
    assert summary["tokens"] == n
    right = scores.correct.tolist()
    for loop in range(L):
        assert summary["by_loop"][loop] == pytest.approx(sum(right[t][loop] for t in tokens) / n)
        assert summary["ce"][loop] == pytest.approx(-sum(scores.logp[t, loop].item() for t in tokens) / n)
    for point in summary["sweep"]:
        leave = {t: slow_rule(scores, "gate", point["threshold"], t) for t in tokens}
        assert point["loops"] == pytest.approx(sum(leave.values()) / n + 1)
        assert point["accuracy"] == pytest.approx(sum(right[t][leave[t]] for t in tokens) / n)
    assert summary["curves"].keys() == {"gate", "confidence"}
    for rule, curve in summary["curves"].items():
        assert curve[0] == pytest.approx([1, summary["by_loop"][0]])
        assert curve[-1] == pytest.approx([L, summary["by_loop"][-1]])
        assert [x for x, _ in curve] == sorted(x for x, _ in curve), rule


def test_the_area_is_the_mean_accuracy_over_all_numbers_of_loops():
    assert eval.area(torch.tensor([[1.0, 0.2], [4.0, 0.8]])) == pytest.approx(0.5)
    assert eval.area(torch.tensor([[1.0, 0.2], [2.0, 0.8], [4.0, 0.8]])) == pytest.approx((0.5 + 2 * 0.8) / 3)


def test_a_bucket_without_tokens_has_no_numbers(scores):
    summary = eval.summarize(scores, torch.zeros(60, dtype=torch.bool))
    assert summary["by_loop"] == [None] * L
    assert {p["accuracy"] for p in summary["sweep"]} == {None}


def test_a_curve_is_read_on_straight_lines_between_its_points():
    loops, accuracy = torch.tensor([[1.0, 2, 2, 4]] * 5), torch.tensor([[0.0, 0.4, 0.4, 1]] * 5)
    x = torch.tensor([1, 1.5, 2, 3, 4])
    assert_close(eval.interpolate(x, loops, accuracy), torch.tensor([0, 0.2, 0.4, 0.7, 1]))


def test_intervals_come_from_drawing_documents(scores):
    """Beside a bootstrap in plain Python, of two models whose documents differ."""
    other = scores._replace(correct=scores.correct.roll(1, 0) | scores.correct, gate=scores.gate.flip(1))
    every = torch.ones(60, dtype=torch.bool)
    a, b = eval.tally(other, every), eval.tally(scores, every)
    intervals = compare([(a, b)], rounds=4000)
    documents = [(scores.document == d).nonzero().flatten().tolist() for d in range(7)]
    documents = [d for d in documents if d]

    def peak(s, chosen):
        tokens = [t for d in chosen for t in documents[d]]
        return [s.correct[tokens][:, i].double().mean().item() for i in range(L)]

    straight = [
        x - y for x, y in zip(peak(other, range(len(documents))), peak(scores, range(len(documents))), strict=True)
    ]
    g, draws = torch.Generator().manual_seed(5), []
    for _ in range(1500):
        chosen = torch.randint(len(documents), (len(documents),), generator=g).tolist()
        draws.append([x - y for x, y in zip(peak(other, chosen), peak(scores, chosen), strict=True)])
    limits = torch.tensor(draws).quantile(torch.tensor([0.025, 0.975]), 0)
    for i in range(L):
        middle, low, high = intervals[f"by_loop {i + 1}"]
        assert middle == pytest.approx(straight[i])
        assert [low, high] == pytest.approx(limits[:, i].tolist(), abs=0.015)
    same = compare([(a, a)], rounds=50)
    assert same.pop("each") == [pytest.approx(0, abs=1e-12)]
    for name, (middle, low, high) in same.items():
        if name != "matched confidence":
            assert middle == low == high == pytest.approx(0, abs=1e-12), name


def test_seeds_are_averaged_on_the_same_documents(scores):
    every = torch.ones(60, dtype=torch.bool)
    a, b = eval.tally(scores, every), eval.tally(scores._replace(correct=~scores.correct), every)
    one, other, both = (compare(pairs, rounds=20) for pairs in ([(a, b)], [(b, a)], [(a, b), (b, a)]))
    for name in ("by_loop 1", "at_half"):
        assert one[name][0] == pytest.approx(-other[name][0])
        assert both[name] == pytest.approx([0, 0, 0], abs=1e-12)


def test_scores_are_those_of_each_token_and_know_their_document():
    net = LoopedTransformer(
        ModelConfig(layers=1, width=16, heads=2, vocab_size=20, init_std=0.3), generator=runtime.seeded(0)
    )
    rows = [data.Row(torch.randint(20, (n,), generator=runtime.seeded(n)).tolist(), 2) for n in (9, 5, 7, 6, 8)]
    source = data.Documents(rows, batch=2, seed=0)
    s = eval.score(net, source, device=torch.device("cpu"))
    k = document = 0
    for index in range(source.batches):
        batch = source.batch(index)
        with torch.no_grad():
            out = net(batch.inputs)
            p = net.logits(out.hidden).double().softmax(-1)
        for b in range(len(batch.mask)):
            for t in batch.mask[b].nonzero().flatten().tolist():
                assert s.document[k] == document
                for loop in range(4):
                    q, y = p[b, t, loop], batch.targets[b, t]
                    assert s.correct[k, loop] == (q.argmax() == y)
                    assert s.logp[k, loop].item() == pytest.approx(q[y].log().item(), abs=1e-5)
                    assert s.max_logp[k, loop].item() == pytest.approx(q.max().log().item(), abs=1e-5)
                assert s.entropy[k].item() == pytest.approx(-(q * q.log()).sum().item(), abs=1e-5), "of the last loop"
                k += 1
            document += 1
    assert k == len(s.document)


def test_documents_without_a_token_of_the_bucket_are_drawn_too(scores):
    """Otherwise seeds whose buckets differ would draw different documents, and their errors would seem independent."""
    each, every = eval.tally(scores, scores.document != 3), eval.tally(scores, torch.ones(60, dtype=torch.bool))
    assert isinstance(each, Tally)
    assert each.tokens[3] == 0 < every.tokens[3]
    assert len(each.tokens) == len(every.tokens)
    other = [n for n in range(7) if n != 3]
    assert_close(each.bootstrapped(0).tokens[0], every.tokens[other].sum())
    same, part = every.bootstrapped(20), each.bootstrapped(20)
    left = same.tokens - part.tokens
    assert_close(left / every.tokens[3], (left / every.tokens[3]).round(), msg="whole documents are missing")
    with pytest.raises(UserError, match="different tokens"):
        compare([(each, every)], rounds=5)


def test_a_rival_is_read_off_a_fine_curve():
    """A gate that is exact but calibrated elsewhere: what it does at threshold 0.003 has to be found, and a model that
    is the same but for the place of its threshold is ahead by nothing."""
    g = torch.Generator().manual_seed(0)
    n = 4000
    first = torch.randint(L, (n,), generator=g)  # the loop from which on a token is right
    correct = torch.arange(L) >= first[:, None]
    sure = torch.where(correct, 4.0, -4.0) + torch.randn(n, L, generator=g)
    zeros = torch.zeros(n, L)
    make = lambda gate: Scores(correct, gate, zeros, zeros, zeros, torch.arange(n) // 20, None)  # noqa: E731
    every = torch.ones(n, dtype=torch.bool)
    intervals = compare([(eval.tally(make(sure), every), eval.tally(make(sure - 5.5), every))], rounds=50)
    assert abs(intervals["matched gate"][0]) < 0.01
    assert intervals["loops_at_half"][0] < -0.5, "at the same threshold they differ"
