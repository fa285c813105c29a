"""Generation: the cache against the full forward pass, exits against a slow reading, and the command line."""

import copy
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from einops import rearrange
from helpers import call, refused, slow_exit
from tokenizers import AddedToken
from torch.testing import assert_close

import data
import looprpt
import model
import sample
from model import LoopedTransformer, ModelConfig
from sample import Exit, Token, generate
from support import checkpoint, decoding, text
from support.decoding import Cache, decode, prefill
from support.runtime import UserError

SHAPE = ModelConfig(layers=2, loops=4, width=16, heads=4, kv_heads=2, vocab_size=13, init_std=0.3)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2], [3, 3]]
CPU = torch.device("cpu")


@pytest.fixture
def net():
    """Random weights whose gate is unsure, so that tokens leave after every loop."""
    generator = torch.Generator().manual_seed(0)
    net = LoopedTransformer(SHAPE, generator=generator).double()
    torch.nn.init.normal_(net.early_exit_gate.weight, generator=generator)
    return net


def collect(tokens, rows=4):
    """Tokens and loops of each row."""
    texts = [[] for _ in range(rows)]
    for token in tokens:
        texts[token.row].append((token.id, token.loops))
    return texts


@pytest.fixture(params=[False, True], ids=["row by row", "gathered"])
def copying(request, monkeypatch):
    """Rows at different loops, as a CPU and as a GPU attend to them."""
    monkeypatch.setattr(decoding, "gather_rows_on", lambda device: request.param)


# The cache against the full forward pass


@pytest.mark.parametrize("prefix", range(1, 7))
@pytest.mark.parametrize("loops", [1, 4, 6])
def test_cached_decoding_equals_the_full_forward_pass(net, prefix, loops, device):
    """Every loop's state, for every prefix, in batches whose rows start at different places and are padded."""
    net, ids = net.to(device), torch.randint(13, (3, 12), generator=torch.Generator().manual_seed(1)).to(device)
    starts = [prefix, prefix + 2, prefix + 5]
    whole = net(ids, loops=loops).hidden  # B T L D
    cache = Cache(net.config, 3, 12, loops=loops, device=device, dtype=torch.float64)
    padded = ids[:, : max(starts)].clone()
    for b, start in enumerate(starts):
        padded[b, start:] = 0  # padding, which must not be seen
    prefill(net, padded, cache, [0, 1, 2], loops)
    for step in range(12 - max(starts)):
        positions = [start + step for start in starts]
        state = net.embed_tokens(ids[range(3), positions])
        for loop in range(loops):
            state = decode(net, state[:, None], cache, [0, 1, 2], [loop] * 3, positions)[:, 0]
            assert_close(state, whole[range(3), positions, loop], rtol=1e-10, atol=1e-10)


def test_rows_at_different_loops_share_a_pass(net, copying, device):
    """Row 0 runs its loops one tick behind row 1: the cache keeps them apart."""
    net, ids = net.to(device), torch.randint(13, (2, 6), generator=torch.Generator().manual_seed(2)).to(device)
    whole = net(ids).hidden
    cache = Cache(net.config, 2, 6, loops=4, device=device, dtype=torch.float64)
    prefill(net, ids[:, :4], cache, [0, 1], 4)
    state = net.embed_tokens(ids[:, 4])
    state[1:] = decode(net, state[1:, None], cache, [1], [0], [4])[:, 0]
    assert_close(state[1], whole[1, 4, 0])
    for loop in range(3):
        state = decode(net, state[:, None], cache, [0, 1], [loop, loop + 1], [4, 4])[:, 0]
        assert_close(state[0], whole[0, 4, loop])
        assert_close(state[1], whole[1, 4, loop + 1])


def test_full_depth_generation_is_greedy_decoding_of_the_full_forward_pass(net, device):
    expected, net = [], net.to(device)
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(10):
            text.append(net.logits(net(torch.tensor([text], device=device)).hidden[0, -1, -1]).argmax().item())
        expected.append([(token, 4) for token in text[len(prompt) :]])
    for cache in ("full", "copy"):
        assert collect(generate(net, PROMPTS, max_tokens=10, cache=cache)) == expected


# A slow reading of the rules: one row, one token, one loop at a time; keys and values in a dictionary


def slow_generate(net, prompt, *, max_tokens, exit, cache, loops):
    """Tokens and loops of one row. kept[loop, layer] lists the keys and values of each position."""
    c, kept = net.config, {}

    def one_loop(state, loop, position):
        cos, sin = model.rotary(torch.tensor([position]), c.head_dim, c.rope_theta)
        for i, layer in enumerate(net.layers):
            attention, x = layer.self_attn, layer.input_layernorm(state)
            q, k, v = (
                rearrange(proj(x), "(h c) -> h 1 c", c=c.head_dim)
                for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = model.rotate(q, cos, sin), model.rotate(k, cos, sin)
            own = kept.setdefault((loop, i), {})
            if cache == "last":
                before = kept.setdefault(("shared", i), {}) if position >= len(prompt) else own
            else:
                before = own
            own[position] = k, v
            seen = [before[p] for p in range(position)] + [(k, v)]
            keys, values = (
                torch.cat(x, 1).repeat_interleave(c.heads // c.kv_heads, 0) for x in zip(*seen, strict=True)
            )
            weights = (q @ keys.mT / c.head_dim**0.5).softmax(-1)
            out = attention.o_proj(rearrange(weights @ values, "h 1 c -> (h c)"))
            state = state + layer.input_layernorm_2(out)
            state = state + layer.post_attention_layernorm_2(layer.mlp(layer.post_attention_layernorm(state)))
        return net.norm(state)

    def leaves(states):
        if exit.rule == "confidence":
            return net.logits(states[-1]).softmax(-1).max() >= exit.threshold
        gates = [net.early_exit_gate(state).item() for state in states]
        return slow_exit([*gates, 0.0], exit.threshold) <= len(states)

    def finish(ran, position):
        """What the slots hold once a token has left."""
        for i in range(c.layers):
            last = kept[ran - 1, i][position]
            kept.setdefault(("shared", i), {})[position] = last
            for loop in range(ran, loops):
                kept[loop, i][position] = last

    for position, token in enumerate(prompt):
        state = net.embed_tokens.weight[token]
        for loop in range(loops):
            state = one_loop(state, loop, position)
        finish(loops, position)
    tokens = [(net.logits(state).argmax().item(), loops)]
    for position in range(len(prompt), len(prompt) + max_tokens - 1):
        state, states, answer = net.embed_tokens.weight[tokens[-1][0]], [], None
        for loop in range(loops):
            state = one_loop(state, loop, position)
            states.append(state)
            if answer is None and (leaves(states) or loop == loops - 1):
                answer = net.logits(state).argmax().item(), loop + 1
            if answer and cache != "full":
                break
        finish(len(states), position)
        tokens.append(answer)
    return tokens


@pytest.mark.parametrize(("loops", "batch"), [(2, None), (4, None), (4, 2)])
@pytest.mark.parametrize("cache", ["copy", "last", "full"])
@pytest.mark.parametrize("exit", [Exit("gate", 0.7), Exit("gate", 1.0), Exit("confidence", 0.3)])
def test_text_and_loops_equal_a_slow_reading(net, copying, exit, cache, loops, batch, device):
    """Of each row alone; together they run at different loops, end at different times, and make room for the next."""
    lengths = [9, 3, 12, 6]

    def done(row, text):
        return len(text) == lengths[row]

    how = {"exit": exit, "cache": cache, "loops": loops}
    there = copy.deepcopy(net).to(device)
    texts = collect(generate(there, PROMPTS, max_tokens=12, done=done, batch=batch, **how))
    with torch.no_grad():
        for row, prompt in enumerate(PROMPTS):
            assert texts[row] == slow_generate(net, prompt, max_tokens=lengths[row], **how)
    if exit.threshold < 1:
        assert {loops for row in texts for _, loops in row} > {loops}, "some tokens leave early"


def test_the_slow_reading_can_tell_the_caches_apart(net):
    """A check of the check: the three rules give three texts."""
    with torch.no_grad():
        how = {"max_tokens": 12, "exit": Exit("gate", 0.7), "loops": 4}
        texts = [[slow_generate(net, p, cache=cache, **how) for p in PROMPTS] for cache in ("copy", "last", "full")]
    assert texts[0] != texts[1] != texts[2] != texts[0]


def test_a_token_that_leaves_after_a_loop_has_run_just_that_many(net, monkeypatch):
    ran = []

    def counting(net, state, cache, rows, loops, positions):
        ran.extend(positions)
        return decode(net, state, cache, rows, loops, positions)

    monkeypatch.setattr(sample, "decode", counting)
    how = {"max_tokens": 12, "exit": Exit("gate", 0.3)}
    for prompt in PROMPTS:
        ran.clear()
        (row,) = collect(generate(net, [prompt], **how), 1)
        # the first token is the prompt's, and the last one is never fed
        assert [loops for _, loops in row][1:] == [ran.count(len(prompt) + i) for i in range(11)]
    ran.clear()
    together = collect(generate(net, PROMPTS, **how))
    assert len(ran) == sum(loops for row in together for _, loops in row[1:])


@pytest.mark.parametrize(("bias", "together"), [(-6.0, True), (0.0, False)])
def test_rows_wait_for_each_other_where_few_save_a_loop(net, monkeypatch, bias, together):
    """The head then runs once for all; otherwise a row goes on as soon as it has left. The text is the same."""
    torch.nn.init.constant_(net.early_exit_gate.bias, bias)
    heads, logits = [], LoopedTransformer.logits
    how = {"max_tokens": 12, "exit": Exit("gate", 0.7)}
    expected = [row for prompt in PROMPTS for row in collect(generate(net, [prompt], **how), 1)]
    monkeypatch.setattr(LoopedTransformer, "logits", lambda self, h: heads.append(len(h)) or logits(self, h))
    assert collect(generate(net, PROMPTS, **how)) == expected
    loops = [loops for row in expected for _, loops in row[1:]]
    assert (sum(loops) / len(loops) > 4 / sample.apart_cost(net.norm.weight.device, len(PROMPTS))) == together
    assert {*loops} > {4}, "some leave early"
    assert (len(heads) == 12) == together


def test_where_rows_wait_a_prompt_that_takes_a_free_row_starts_with_the_others(net, monkeypatch):
    passes = []
    monkeypatch.setattr(sample, "decode", lambda *args: passes.append(1) or decode(*args))
    given = [[1] * n for n in (3, 5, 4, 4)]  # rows of 3 + 4 and 5 + 4 tokens; of each prompt the last isn't fed
    assert len(list(generate(net, PROMPTS, max_tokens=9, given=given, batch=2))) == 16
    assert len(passes) == 4 * (4 + 3)


def test_given_tokens_are_taken_and_the_likeliest_ones_told(net, copying):
    """With one token changed, its row goes on from it; the others' tokens are the likeliest, at the same loops."""
    for cache in ("copy", "last", "full"):
        how = {"exit": Exit("gate", 0.3), "cache": cache, "batch": 2}
        free = list(generate(net, PROMPTS, max_tokens=12, **how))
        assert all(t.id == t.likeliest for t in free)
        given = [[t.id for t in free if t.row == row][: 12 - row] for row in range(4)]
        expected = [x[: 12 - row] for row, x in enumerate(collect(free))]
        forced = list(generate(net, PROMPTS, max_tokens=12, given=given, **how))
        assert collect(forced) == expected, "a row ends after its given tokens"
        assert all(t.id == t.likeliest for t in forced)
        given[1][3] = (given[1][3] + 1) % 13
        changed = list(generate(net, PROMPTS, max_tokens=12, given=given, temperature=1.0, **how))
        assert [[t.id for t in changed if t.row == row] for row in range(4)] == given, "nothing is drawn"
        row = [t for t in changed if t.row == 1]
        assert [t.likeliest for t in row[:4]] == [token for token, _ in expected[1][:4]]
        assert [t.loops for t in row[:4]] == [loops for _, loops in expected[1][:4]]
        with torch.no_grad():
            answer = slow_generate(net, PROMPTS[1] + given[1][:4], max_tokens=1, exit=Exit(), cache="full", loops=4)
        ((likeliest, _),) = answer
        full = list(generate(net, PROMPTS, max_tokens=12, given=given))
        assert [t for t in full if t.row == 1][4].likeliest == likeliest, "it goes on from the changed token"


def test_a_drawn_token_tells_the_likeliest_too(net):
    tokens = list(generate(net, PROMPTS[:1], max_tokens=9, temperature=1.0))
    ids = PROMPTS[0] + [t.id for t in tokens]
    expected = net.logits(net(torch.tensor([ids])).hidden[0, :, -1]).argmax(-1)[len(PROMPTS[0]) - 1 : -1]
    assert [t.likeliest for t in tokens] == expected.tolist()
    assert any(t.likeliest != t.id for t in tokens)


@pytest.mark.parametrize("exit", [Exit("gate", 0.7), Exit("gate", 1.0), Exit("confidence", 0.3)])
@pytest.mark.parametrize("loops", [3, 4])
def test_a_token_tells_its_log_probability_and_the_gates_word_on_its_exit(net, copying, exit, loops, device, near):
    """By one full pass over the finished text; whatever it was drawn at, and whichever rule let it leave."""
    how = {"temperature": 0.5, "top_p": 0.8, "cache": "full", "exit": exit, "loops": loops}
    tokens = list(generate(copy.deepcopy(net).to(device), PROMPTS, max_tokens=12, **how))
    for row, prompt in enumerate(PROMPTS):
        mine = [t for t in tokens if t.row == row]
        out = net(torch.tensor([prompt + [t.id for t in mine]]), loops=loops)
        at = range(len(prompt) - 1, len(prompt) + 11)
        expected = [
            net.logits(out.hidden[0, i, t.loops - 1]).log_softmax(-1)[t.id] for i, t in zip(at, mine, strict=True)
        ]
        assert [t.logp for t in mine] == pytest.approx([x.item() for x in expected], abs=10 * near)
        stay = torch.sigmoid(-out.gate[0]).cumprod(-1)  # T L
        shares = [1 - stay[i, t.loops - 1].item() if t.loops < loops else 1.0 for i, t in zip(at, mine, strict=True)]
        shares[0] = 1.0  # the prompt runs at full depth
        assert [t.exit for t in mine] == pytest.approx(shares, abs=10 * near)
    assert {t.loops for t in tokens} > {loops} or exit.threshold == 1


def test_keeping_the_last_loop_only_is_a_quarter_of_the_memory():
    full, shared = (Cache(SHAPE.resolved(), 2, 8, loops=n, device=CPU, dtype=torch.float32) for n in (4, 1))
    assert full.keys.numel() == 4 * shared.keys.numel() == 2 * 4 * 2 * 2 * 9 * 4  # and a place that is no token's


@pytest.mark.parametrize("exit", [Exit("gate", 0.0), Exit("gate", 0.5), Exit("gate", 1.0), Exit("confidence", 0.4)])
def test_leaving_in_hindsight_and_on_the_way_agree(net, exit, device):
    """`logits_at_exit` on all loops chooses what decoding with an exact cache chooses."""
    net.to(device)
    texts = collect(generate(net, PROMPTS, max_tokens=12, exit=exit, cache="full"))
    for prompt, row in zip(PROMPTS, texts, strict=True):
        out = net(torch.tensor([prompt + [token for token, _ in row]], device=device))
        logits, leave = sample.logits_at_exit(net, exit, out.hidden[0], out.gate[0])
        assert leave[len(prompt) : -1].tolist() == [loops for _, loops in row][1:]
        assert logits.argmax(-1)[len(prompt) : -1].tolist() == [token for token, _ in row][1:]


def test_a_score_that_just_reaches_the_threshold_is_enough(net):
    """The gate's logit 0 is a probability of exactly a half, then of three quarters; on the way and in hindsight."""
    torch.nn.init.zeros_(net.early_exit_gate.weight)
    for threshold, expected in ((0.5, 1), (0.75, 2), (0.76, 3)):
        texts = collect(generate(net, PROMPTS, max_tokens=4, exit=Exit("gate", threshold)))
        assert {loops for row in texts for _, loops in row[1:]} == {expected}
        assert model.exit_loop(torch.zeros(1, 4), threshold).item() + 1 == expected
    torch.nn.init.zeros_(net.lm_head.weight)  # every token is equally probable
    for threshold, expected in ((1 / 13, 1), (1 / 12, 4)):
        hidden, gate = torch.ones(1, 4, 16).double(), torch.zeros(1, 4)
        assert sample.logits_at_exit(net, Exit("confidence", threshold), hidden, gate)[1].item() == expected
        texts = collect(generate(net, PROMPTS, max_tokens=3, exit=Exit("confidence", threshold)))
        assert {loops for row in texts for _, loops in row[1:]} == {expected}


def test_a_threshold_of_one_means_all_loops_for_confidence_too(net):
    torch.nn.init.constant_(net.lm_head.weight[3:4].data, 1e4)
    hidden = torch.ones(1, 4, 16).double()
    assert sample.logits_at_exit(net, Exit("confidence", 1.0), hidden, torch.zeros(1, 4))[1].item() == 4
    assert sample.logits_at_exit(net, Exit("confidence", 0.99), hidden, torch.zeros(1, 4))[1].item() == 1


def test_generating_keeps_no_graph(net, monkeypatch):
    tracked, distribution = [], sample.distribution

    def note(logits, **how):
        tracked.append(logits.requires_grad)
        return distribution(logits, **how)

    monkeypatch.setattr(sample, "distribution", note)
    list(generate(net, PROMPTS, max_tokens=3, temperature=1.0))
    assert tracked == [False] * 3


def test_a_saturated_gate_leaves_early_at_no_threshold_of_one(net):
    torch.nn.init.constant_(net.early_exit_gate.bias, 50.0)
    for threshold, expected in ((1.0, 4), (0.999, 1)):
        texts = collect(generate(net, PROMPTS, max_tokens=4, exit=Exit("gate", threshold)))
        assert {loops for row in texts for _, loops in row[1:]} == {expected}


def test_text_ends_at_the_last_position(net):
    net.config = replace(net.config, max_positions=9)
    texts = collect(generate(net, PROMPTS, max_tokens=50))
    assert [len(row) + len(prompt) for row, prompt in zip(texts, PROMPTS, strict=True)] == [10] * 4
    assert len(collect(generate(net, [[1] * 9], max_tokens=50))[0]) == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt has 0 tokens, the model 9 pos"),
        ([1] * 10, "10 tokens, the model 9 positions: give from 1 to 9"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(net, prompt, message):
    net.config = replace(net.config, max_positions=9)
    with pytest.raises(UserError, match=message):
        list(generate(net, [[1], prompt], max_tokens=5))


# The draw


def test_draws_follow_the_tempered_distribution_within_top_p():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    numbers = torch.rand(20_000, generator=torch.Generator().manual_seed(0)).tolist()
    p = (logits[0].double() / 0.7).softmax(-1)
    kept = p * torch.tensor([1, 1, 0, 0])
    top_p = (p[0] + 0.5 * p[1]).item()  # the second token is needed to reach it
    for share, expected in ((1.0, p), (top_p, kept / kept.sum())):
        spread = sample.distribution(logits, 0.7, share)
        assert_close(spread[0], expected)
        counts = decoding.draw(spread.expand(20_000, 4), numbers).bincount(minlength=4)
        assert_close(counts / 20_000, expected.float(), rtol=0, atol=0.01)
        assert not counts[expected == 0].any()
    assert sample.distribution(logits, 1e-40, 1.0).tolist() == [[1, 0, 0, 0]], "next to no temperature"
    holes = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).double().expand(4, 5)
    numbers = [0.0, 0.4999, 0.5, 1 - 2**-24]
    assert decoding.draw(holes, numbers).tolist() == [1, 1, 3, 3], "what is not there is not drawn"


@pytest.mark.parametrize("verify", [1, 3])
@pytest.mark.parametrize("exit", [Exit("gate", 0.3), Exit("gate", 1.0), Exit("confidence", 0.3), Exit("loop", 2)])
def test_verified_drafts_are_the_text_of_full_depth(net, copying, exit, verify):
    """Tokens, what is told of them, and the prompts that take the places of those that ended."""
    lengths = [9, 3, 12, 6]
    how = {"max_tokens": 12, "done": lambda row, text: len(text) == lengths[row], "batch": 3}
    full = [list(generate(net, PROMPTS, loops=loops, **how)) for loops in (4, 3)]
    for loops, expected in zip((4, 3), full, strict=True):
        found = list(generate(net, PROMPTS, exit=exit, verify=verify, loops=loops, **how))
        for row in range(4):
            pairs = [*zip(*([t for t in tokens if t.row == row] for tokens in (found, expected)), strict=True)]
            assert all(a.id == b.id == a.likeliest for a, b in pairs)
            assert [a.logp for a, _ in pairs] == pytest.approx([b.logp for _, b in pairs], abs=1e-9)
        assert all((t.exit == 1) == (t.loops == loops) for t in found)
        assert {t.loops for t in found} > {loops} or exit.threshold == 1, "some drafts are right"


@pytest.mark.parametrize("verify", [6, 7, 8, 9, 500])
def test_drafts_may_be_as_many_as_the_cache_has_places_and_run_none_that_is_not_asked_for(net, monkeypatch, verify):
    prompts, most = [[0], [3]], []
    full = collect(generate(net, prompts, max_tokens=7), 2)
    monkeypatch.setattr(decoding, "decode", lambda *args: most.append(args[1].shape[1]) or decode(*args))
    assert full == [
        [(token, 4) for token, _ in row]
        for row in collect(generate(net, prompts, max_tokens=7, verify=verify, exit=Exit("loop", 1)), 2)
    ]
    assert max(most) == 6
    with pytest.raises(UserError, match="give 0 or more drafts"):
        next(generate(net, prompts, max_tokens=7, verify=-1))


def test_a_draft_runs_the_loops_of_full_depth_and_no_more(net, monkeypatch):
    """Every token runs each loop once, those after a wrong draft excepted; passes are fewer than loops."""
    ran, passes = [], []

    def counting(net, state, cache, rows, loops, positions):
        ran.extend((loops[0], positions[0] + i) for i in range(state.shape[1]))
        passes.append(state.shape[1])
        return decode(net, state, cache, rows, loops, positions)

    monkeypatch.setattr(decoding, "decode", counting)
    torch.nn.init.zeros_(net.layers[0].mlp.down_proj.weight)
    with torch.no_grad():
        for layer in net.layers:  # loops that change nothing: every draft is right
            layer.input_layernorm_2.weight.zero_()
            layer.post_attention_layernorm_2.weight.zero_()
    tokens = list(generate(net, PROMPTS[:1], max_tokens=9, verify=4, exit=Exit("loop", 1)))
    assert [t.loops for t in tokens] == [4] + [1] * 8
    assert sorted(ran) == [(loop, 3 + i) for loop in range(4) for i in range(8)]
    assert passes == [1, 1, 1, 1, 4, 4, 4] * 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chain", "text"])
def test_verified_drafts_of_trained_models_are_the_text_of_full_depth(tmp_path, monkeypatch, kind):
    """200 prompts, and a draft mostly agrees."""
    (tmp_path / "read.txt").write_text((Path(__file__).parent.parent / "README.md").read_text())
    text_flags = f"--data.path {tmp_path}/read.txt --data.length 64 --data.tokenizer bytes --train.batch 16"
    flags = "--data.operands 4 --data.val-rows 8" if kind == "chain" else text_flags
    few = f"--objective pretrain --pretrain.steps 150 --model.width 32 --out {tmp_path}/out".split()
    call(monkeypatch, looprpt, *few, *flags.split())
    net = checkpoint.load(tmp_path / "out" / "base", CPU).double()
    corpus = data.Chain(4, batch=200, seed=9).batch(0).inputs if kind == "chain" else None
    if kind == "text":
        ids = text.tokenize(text.byte_tokenizer(), [(tmp_path / "read.txt").read_text()])[0]
        corpus = torch.tensor([ids[i * 40 : i * 40 + 12] for i in range(200)])
    how = {"max_tokens": 12, "batch": 50}
    full = collect(generate(net, corpus.tolist(), **how), 200)
    for exit in (Exit("loop", 1), Exit("gate", 0.3)):
        found = collect(generate(net, corpus.tolist(), exit=exit, verify=4, **how), 200)
        assert [[token for token, _ in row] for row in found] == [[token for token, _ in row] for row in full]
        assert sum(loops < 4 for row in found for _, loops in row[1:]) > 200 * 11 / 3


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_verified_draws_have_the_distribution_of_full_depth(top_p):
    """Three tokens of 6,000 rows beside the probabilities of all their 125 texts, worked out by full passes."""
    shape = replace(SHAPE, vocab_size=5)
    net = LoopedTransformer(shape, generator=torch.Generator().manual_seed(3)).double()
    how = {"temperature": 0.8, "top_p": top_p}
    drawn = list(generate(net, [[1, 2]] * 6000, max_tokens=4, verify=3, exit=Exit("loop", 1), **how))
    texts = torch.zeros(6000, 4, dtype=torch.long)
    places = [0] * 6000
    for token in drawn:
        texts[token.row, places[token.row]] = token.id
        places[token.row] += 1
    texts = texts[texts[:, 0] == texts[:, 0].mode().values]
    every = torch.cartesian_prod(*[torch.arange(5)] * 3)  # 125 3
    whole = torch.cat((torch.tensor([1, 2, texts[0, 0]]).expand(125, 3), every), 1)
    with torch.no_grad():
        p = sample.distribution(net.logits(net(whole).hidden[:, 2:5, -1]), 0.8, top_p)
        early = sample.distribution(net.logits(net(whole).hidden[:, 2:5, 0]), 0.8, top_p)
    expected, other = (x.gather(-1, every[..., None])[..., 0].prod(-1) * len(texts) for x in (p, early))
    counts = (texts[:, 1:] * torch.tensor([25, 5, 1])).sum(-1).bincount(minlength=125)
    assert counts[expected == 0].sum() == 0

    def misfit(expected):
        rare = expected < 5
        observed, wanted = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (counts, expected))
        freedom = len(wanted) - 1
        return (((observed - wanted) ** 2 / wanted.clamp(min=1e-9)).sum() - freedom) / (2 * freedom) ** 0.5

    assert misfit(expected).abs() < 4 < misfit(other), "as full depth, unlike the drafts"


def test_a_rows_text_depends_on_its_seed_and_not_on_its_company(net):
    how = {"max_tokens": 8, "temperature": 1.0, "top_p": 0.9, "exit": Exit("gate", 0.5)}
    together, again = (collect(generate(net, PROMPTS, seeds="abcd", **how)) for _ in range(2))
    assert together == again
    assert together[2:3] == collect(generate(net, PROMPTS[2:3], seeds="c", **how), 1)
    assert together != collect(generate(net, PROMPTS, seeds="efgh", **how))
    twice = collect(generate(net, PROMPTS[:1] * 2, seeds="ab", **how), 2)
    assert twice[0] != twice[1], "the same prompt, drawn twice"


# The command line


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of a byte-level model with random weights."""
    shape = replace(SHAPE, vocab_size=259, max_positions=64, exit_threshold=0.5)
    net = LoopedTransformer(shape, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(net.early_exit_gate.weight, generator=torch.Generator().manual_seed(1))
    checkpoint.save(net, tmp_path / "a", text.byte_tokenizer(), dtype=torch.bfloat16)
    return tmp_path / "a"


def test_text_is_shown_with_its_loops(folder, monkeypatch, capsys):
    call(monkeypatch, sample, folder, "--prompt", "ab", "--max-tokens", 20, "--show-loops")
    shown = capsys.readouterr()
    assert "loops:  1 " in shown.out
    assert "loops on average" in shown.err
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    call(monkeypatch, sample, folder, "--prompt", "ab", "--max-tokens", 20, "--show-loops")
    assert capsys.readouterr().out.count("\x1b[") > 8, "tokens are coloured"


def test_several_prompts_and_every_flag(folder, monkeypatch, capsys):
    flags = "--chat --temperature 0.8 --top-p 0.95 --exit confidence:0.1 --loops 3 --cache last --seed 2 --dtype fp32"
    call(monkeypatch, sample, folder, "--prompt", "one", "two", *flags.split(), "--max-tokens", 5, "--device", "cpu")
    shown = capsys.readouterr().out
    assert shown.index("one") < shown.index("two")


def test_every_flag_reaches_the_generation(folder, monkeypatch, capsys):
    seen = {}

    def note(net, prompts, **how):
        seen.update(how, dtype=net.embed_tokens.weight.dtype)
        yield from (Token(0, token, loops, token, -1.0, 0.5) for token, loops in ((70, 1), (1, 2), (71, 3)))

    monkeypatch.setattr(sample, "generate", note)
    flags = "--max-tokens 7 --temperature 0.8 --top-p 0.95 --loops 3 --verify 5 --exit loop:2 --seed 2".split()
    call(monkeypatch, sample, folder, "--prompt", "hi", "--dtype", "fp32", *flags)
    del seen["done"]
    assert seen == {
        "max_tokens": 7,
        "exit": Exit("loop", 2),
        "loops": 3,
        "cache": "copy",
        "verify": 5,
        "temperature": 0.8,
        "top_p": 0.95,
        "seeds": ["2/0"],
        "dtype": torch.float32,
    }
    shown = capsys.readouterr()
    assert shown.out == "CD\n", "special tokens are not shown"
    assert "3 tokens, 2.00 loops" in shown.err


def tell(monkeypatch, *ids):
    """Let the model say these tokens to every prompt."""

    def note(net, prompts, **how):
        for i in ids:
            yield from (Token(row, i, 1, i, -1.5, 0.5) for row in range(len(prompts)))

    monkeypatch.setattr(sample, "generate", note)


def spell(text):
    return [3 + b for b in text.encode()]


def marked(special):
    """The byte tokenizer with a token for each mark of a thought: 259 and 260."""
    tokenizer = text.byte_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=special) for mark in ("<think>", "</think>")])
    return tokenizer


def put_marks(folder, special):
    """A folder's model with that tokenizer."""
    shape = replace(SHAPE, vocab_size=261, max_positions=64)
    checkpoint.save(LoopedTransformer(shape), folder / "marked", marked(special))
    return folder / "marked"


@pytest.mark.parametrize(
    ("ids", "shown"),
    [
        ([*spell("ab"), 3 + 0xE2, 3 + 0x82], "ab\ufffd"),
        ([3 + 0xE2, 3 + 0x82, 3 + 0xAC, 3 + 0xC3, 2], "€\ufffd"),
        ([3 + 0xFF, 3 + 0xC3], "\ufffd\ufffd"),
        ([3 + 0xE2, 1, 3 + 0x82, 3 + 0xAC], "€"),
    ],
)
def test_the_last_characters_are_what_decoding_all_tokens_gives(folder, monkeypatch, capsys, ids, shown):
    assert text.byte_tokenizer().decode(ids, skip_special_tokens=True) == shown
    tell(monkeypatch, *ids)
    for flags in ([], ["--show-loops"]):
        call(monkeypatch, sample, folder, "--prompt", "a", *flags)
        assert capsys.readouterr().out.split("\n")[0] == shown
        call(monkeypatch, sample, folder, "--prompt", "a", "b", *flags)
        assert capsys.readouterr().out.split("\n")[1:4:2] == [shown] * 2


def test_random_bytes_are_shown_as_all_tokens_decode(folder, monkeypatch, capsys):
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.choice((0, 1, 2, *range(3 + 128, 259), *range(3 + 32, 3 + 48))) for _ in range(rng.randrange(1, 30))]
        tell(monkeypatch, *ids)
        call(monkeypatch, sample, folder, "--prompt", "a")
        assert capsys.readouterr().out == text.byte_tokenizer().decode(ids, skip_special_tokens=True) + "\n"


def test_json_has_an_object_for_each_token_and_one_for_all(folder, monkeypatch, capsys):
    tell(monkeypatch, 3 + ord('"'), 3 + 0xE2, 3 + 0x82, 2)
    call(monkeypatch, sample, folder, "--prompt", "hi", "é", "--json", "--show-loops")
    shown = capsys.readouterr()
    *tokens, summary = map(json.loads, shown.out.splitlines())
    assert shown.err == ""
    assert shown.out.isascii()
    assert [t["text"] for t in tokens[::2]] == ['"', "\ufffd", "\ufffd", ""]
    first = {"row": 1, "id": 37, "loops": 1, "likeliest": 37, "logp": -1.5, "exit": 0.5, "text": '"'}
    assert tokens[1] == first
    assert summary.pop("tokens_per_s") > 0
    prompts = [spell("hi"), spell("é")]
    assert summary == {"prompts": prompts, "texts": ['"\ufffd'] * 2, "tokens": 8, "loops": 1.0}


def test_json_of_a_real_generation_adds_up(folder, monkeypatch, capsys):
    call(monkeypatch, sample, folder, "--prompt", "ab", "c", "--json", "--max-tokens", 9, "--temperature", 1)
    *tokens, summary = map(json.loads, capsys.readouterr().out.splitlines())
    for row in range(2):
        ids = [t["id"] for t in tokens if t["row"] == row]
        assert summary["texts"][row] == text.byte_tokenizer().decode(ids, skip_special_tokens=True)
    assert summary["loops"] == pytest.approx(sum(t["loops"] for t in tokens) / len(tokens))
    assert summary["tokens"] == len(tokens) <= 18
    assert all(t["logp"] < 0 < t["exit"] <= 1 for t in tokens)


CHAT = "user\nhi <|im_end|><think>"


@pytest.mark.parametrize(
    ("tokenizer", "mark"),
    [(text.byte_tokenizer(), spell("<think>")), (marked(True), [259]), (marked(False), [259])],
    ids=["spelled", "special", "added"],
)
def test_a_thinking_prompt_opens_the_thought_after_the_systems_turn(tokenizer, mark):
    """As `<|im_start|>assistant`, newline, `<think>`, newline; what users and systems write yields no such token."""
    how = sample.GenerationFlags(folder="x", system="Be <|im_start|>.", thinking=True)
    system = [1, *spell("system\nBe <|im_start|>."), 2, *spell("\n")]
    user = [1, *spell(CHAT), 2, *spell("\n")]
    start = [1, *spell("assistant\n")]
    expected = [*system, *user, *start, *mark, *spell("\n")]
    assert sample.encode_prompts(tokenizer, ["hi <|im_end|><think>"], how) == [expected]
    plain = sample.GenerationFlags(folder="x", chat=True)
    assert sample.encode_prompts(tokenizer, ["hi <|im_end|><think>"], plain) == [[*user, *start]]
    empty = sample.GenerationFlags(folder="x", system="")
    turns = [1, *spell("system\n"), 2, *spell("\n"), 1, *spell("user\nhi"), 2, *spell("\n"), *start]
    assert sample.encode_prompts(tokenizer, ["hi"], empty) == [turns]


@pytest.mark.parametrize("special", [True, False])
def test_thoughts_are_shown_dimmed_with_their_marks(folder, monkeypatch, capsys, special):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    tell(monkeypatch, *spell("so "), 260, *spell("7"), 2)
    where = put_marks(folder, special)
    call(monkeypatch, sample, where, "--prompt", "hi", "--thinking")
    dim = "".join(f"\x1b[2m{x}\x1b[0m" for x in ("s", "o", " ", "</think>"))
    assert capsys.readouterr().out == f"{dim}7\n"
    tell(monkeypatch, 70, 259, 70, 260, 70)
    call(monkeypatch, sample, where, "--prompt", "hi")
    assert capsys.readouterr().out == "C\x1b[2m<think>\x1b[0m\x1b[2mC\x1b[0m\x1b[2m</think>\x1b[0mC\n"
    call(monkeypatch, sample, where, "--prompt", "hi", "--json")
    *tokens, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert [t["text"] for t in tokens] == ["C", "<think>", "C", "</think>", "C"]
    assert summary["texts"] == ["C<think>C</think>C"]


def test_thoughts_whose_marks_are_spelled_are_dimmed_too(folder, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    tell(monkeypatch, *spell("a</think>b"))
    call(monkeypatch, sample, folder, "--prompt", "x", "y", "--thinking")
    lines = capsys.readouterr().out.replace("\x1b[0m\x1b[2m", "").split("\n")
    assert [line for line in lines if "think" in line] == ["\x1b[2ma</think>\x1b[0mb"] * 2


def test_an_added_token_that_is_not_special_is_text():
    tokenizer = text.byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<x>", special=False), AddedToken("<y>", special=True)])
    assert sample.decode_text(tokenizer, [70, 259, 260, 2, 71]) == "C<x>D"


def test_flags_check_themselves_when_they_are_made(folder):
    assert sample.SampleConfig(folder=str(folder), prompt=("a",)).folder == folder
    for wrong in ({"prompt": ()}, {"prompt": ("a",), "top_p": 0}, {"prompt": ("a",), "system": "\udcff"}):
        with pytest.raises(UserError):
            sample.SampleConfig(folder=folder, **wrong)


def test_a_folder_may_be_a_string(folder):
    net, tokenizer = sample.load_with_tokenizer(str(folder), CPU, "auto")
    assert net.config.vocab_size == 259
    assert tokenizer.token_to_id("<|im_end|>") == 2


def test_generation_stops_where_the_generation_settings_say(folder, monkeypatch):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7]}')
    assert sample.stop_ids(*sample.load_with_tokenizer(folder, CPU, "auto")) == {0, 2, 7}


def test_colours_stand_for_loops():
    legend = sample.legend([1, 2, 2, 4])
    assert [(legend.plain[s.start : s.end], s.style) for s in legend.spans] == [
        ("1 25%", "bright_blue"),
        ("2 50%", "cyan"),
        ("3 0%", "yellow"),
        ("4 25%", "red"),
    ]


def test_chat_wraps_the_prompt_and_text_may_spell_special_tokens(folder, monkeypatch):
    seen = []

    def note(net, prompts, **how):
        seen.extend(prompts)
        yield Token(0, 70, 1, 70, -1.0, 0.5)

    monkeypatch.setattr(sample, "generate", note)
    call(monkeypatch, sample, folder, "--prompt", "hi", "--chat")
    call(monkeypatch, sample, folder, "--prompt", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert seen[0] == seen[1]
    assert seen[0][:2] == [1, 3 + ord("u")]


def test_text_stops_at_the_end_of_text_and_of_a_turn(folder, monkeypatch):
    net, tokenizer = sample.load_with_tokenizer(folder, CPU, "auto")
    assert sample.stop_ids(net, tokenizer) == {0, 2}
    net.config = replace(net.config, eos_token_id=(5, 7))
    assert sample.stop_ids(net, tokenizer) == {0, 2, 5, 7}
    ends = []

    def note(net, prompts, done, **how):
        ends.extend(done(0, [9, token]) for token in (0, 1, 2))
        yield Token(0, 70, 1, 70, -1.0, 0.5)

    monkeypatch.setattr(sample, "generate", note)
    call(monkeypatch, sample, folder, "--prompt", "hi")
    assert ends == [True, False, True]


def test_the_threshold_of_the_checkpoint_is_the_default(folder, monkeypatch):
    seen = []

    def note(net, prompts, exit, **how):
        seen.append(exit)
        yield Token(0, 70, 1, 70, -1.0, 0.5)

    monkeypatch.setattr(sample, "generate", note)
    for flags in ([], ["--exit-threshold", 1], ["--exit", "confidence:0.9"], ["--exit", "gate:0.2"]):
        call(monkeypatch, sample, folder, "--prompt", "hi", "--dtype", "fp32", *flags)
    assert seen == [Exit("gate", 0.5), Exit("gate", 1.0), Exit("confidence", 0.9), Exit("gate", 0.2)]
    config = checkpoint.read_json(folder / "config.json")
    checkpoint.write_json(folder / "config.json", config | {"early_exit_threshold": 0.25})
    call(monkeypatch, sample, folder, "--prompt", "hi")
    assert seen[-1] == Exit("gate", 0.25)


def test_chain_arithmetic_is_answered_at_each_operand(tmp_path, monkeypatch, capsys):
    net = LoopedTransformer(replace(SHAPE, vocab_size=8), generator=torch.Generator().manual_seed(0))
    checkpoint.save(net, tmp_path / "a", data.chain_tokenizer())
    call(monkeypatch, sample, tmp_path / "a", "--prompt", "3 + 4 × 2", "--show-loops", "--exit-threshold", 0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" = ")[0] for line in lines[:3]] == ["3", "3 + 4", "3 + 4 × 2"]
    assert all(line.endswith("1 loop") for line in lines[:3])
    call(monkeypatch, sample, tmp_path / "a", "--prompt", "3 + 4 × 2", "--exit-threshold", 1, "--loops", 2)
    assert capsys.readouterr().out.splitlines()[2].endswith("2 loops")
    for flags in (["--json"], ["--thinking"], ["--system", "x"], ["--chat"]):
        assert "has no text" in refused(monkeypatch, sample, tmp_path / "a", "--prompt", "3", *flags)
    for prompt in ("3 +", "3 4", "9 + 1", "+", "3 + x"):
        assert "is not chain arithmetic" in refused(monkeypatch, sample, tmp_path / "a", "--prompt", prompt)


REFUSALS = """--prompt a --exit-threshold 1.5 | --exit-threshold 1.5 is out of its range: give a number from 0 to 1
--prompt a --exit-threshold nan | --exit-threshold nan is out of its range
--prompt a --exit confidence:-0.1 | --exit confidence:-0.1 is not RULE:THRESHOLD (0 to 1), or loop:1 to loop:64
--prompt a --exit gate:nan | --exit gate:nan is not RULE:THRESHOLD (0 to 1)
--prompt a --exit surprise:0.5 | --exit surprise:0.5 is not RULE:THRESHOLD (0 to 1), or loop:1 to loop:64: give
--prompt a --exit loop:0 | --exit loop:0 is not RULE:THRESHOLD
--prompt a --exit loop:1.5 | --exit loop:1.5 is not RULE:THRESHOLD
--prompt a --verify -1 | --verify -1 is out of its range
--prompt a --verify 2 --cache last | --verify 2 has a cache of its own: leave --cache last out
--prompt a --exit confidence | --exit confidence is not RULE:THRESHOLD
--prompt a --exit= | --exit  is not RULE:THRESHOLD
--prompt a --exit gate:0.5 --exit-threshold 0.5 | --exit gate:0.5 and --exit-threshold 0.5 are two rules
--prompt a --loops 0 | --loops 0 is out of its range: give a number from 1 to 64
--prompt a --max-tokens 0 | --max-tokens 0 is out of its range: give a number 1 or more
--prompt a --temperature -1 | --temperature -1.0 is out of its range: give a number 0 or more
--prompt a --temperature inf | --temperature inf is out of its range
--prompt a --top-p 0 | --top-p 0.0 is out of its range: give a number above 0, at most 1
--prompt= | the prompt is empty
--prompt | the prompt is empty
--prompt= --chat | the prompt is empty
--prompt \udcff | --prompt '\\udcff' is not UTF-8: give text
--prompt a --system \udcff | --system '\\udcff' is not UTF-8: give text
--prompt a --device tpu | --device tpu is not a device"""


@pytest.mark.parametrize("case", REFUSALS.splitlines(), ids=lambda c: c.partition(" |")[0])
def test_a_mistake_is_refused_in_a_sentence(folder, monkeypatch, case):
    flags, _, message = case.partition(" | ")
    assert refused(monkeypatch, sample, folder, *flags.split()).startswith(message)


def test_a_folder_that_cannot_speak_is_refused(folder, tmp_path, monkeypatch):
    long = refused(monkeypatch, sample, folder, "--prompt", "a" * 65)
    assert long == "the prompt has 65 tokens, the model 64 positions: give from 1 to 64 tokens"
    assert "it has no config.json" in refused(monkeypatch, sample, tmp_path / "none", "--prompt", "a")
    checkpoint.save(LoopedTransformer(replace(SHAPE, vocab_size=100)), tmp_path / "small", text.byte_tokenizer())
    small = refused(monkeypatch, sample, tmp_path / "small", "--prompt", "a")
    assert "has a vocabulary of 100, the tokenizer one of 259" in small
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json is not a tokenizer (No such file" in refused(monkeypatch, sample, folder, "--prompt", "a")


def test_no_text_is_read_as_markup(folder, tmp_path, monkeypatch, capsys):
    """Neither prompts nor what is generated; nor the operands of a chain, nor a folder in a refusal."""
    prompts, answer = ("[red]one[/red] :cat:", "[/]two"), "[b]x[/b] :dog:"

    def note(net, prompts, **how):
        for row in range(len(prompts)):
            yield from (Token(row, 3 + b, 1, 0, -1.0, 0.5) for b in answer.encode())

    monkeypatch.setattr(sample, "generate", note)
    folder = folder.rename(tmp_path / "[red]a[")
    for flags in ([], ["--show-loops"]):
        call(monkeypatch, sample, folder, "--prompt", *prompts, *flags)
        shown = capsys.readouterr().out
        assert all(prompt in shown for prompt in prompts)
        assert shown.count(answer) == 2
        call(monkeypatch, sample, folder, "--prompt", prompts[0], *flags)
        assert answer in capsys.readouterr().out
