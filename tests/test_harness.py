"""The adapter to the lm-evaluation-harness, with the real package (pip install lm_eval) on a task of our own."""

import json
import math
import sys

import pytest
import torch

import data
import eval
import model
from model import LoopedTransformer, ModelConfig

QUESTIONS = [f"What is {i} + {7 * i}?" for i in range(1, 9)]
CHOICES = [[f" {8 * i}", f" {i}", " none of these"] for i in range(1, 9)]
TEXTS = [f"line {i} " * i for i in range(1, 9)]


@pytest.fixture(scope="module")
def net():
    """Random weights whose gate is unsure. Every exit below is read from it in a slow way."""
    shape = ModelConfig(layers=2, width=32, heads=4, vocab_size=259, init_std=0.3, max_positions=48)
    net = LoopedTransformer(shape, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(net.early_exit_gate.weight, generator=torch.Generator().manual_seed(1))
    return net


@pytest.fixture(scope="module")
def folder(net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    model.save(net, folder / "a", data.byte_tokenizer())
    (folder / "tasks").mkdir()
    rows = zip(QUESTIONS, CHOICES, TEXTS, strict=True)
    lines = [json.dumps({"question": q, "choices": c, "text": t, "gold": 0}) + "\n" for q, c, t in rows]
    (folder / "tasks" / "rows.jsonl").write_text("".join(lines))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "tasks" / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    missing = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "none.jsonl")}}}
    for name, task in {
        "missing": missing | {"output_type": "generate_until", "doc_to_target": "gold"},
        "choose": {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        "answer": {
            "output_type": "generate_until",
            "doc_to_target": "gold",
            "generation_kwargs": {"until": ["e", "Q:"], "max_gen_toks": 20},
            "metric_list": [{"metric": "exact_match"}],
        },
        "roll": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }.items():
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(shared | {"task": f"our_{name}"} | task))
    return folder


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["eval.py", "harness", *map(str, args)])
    model.report(eval.main)


def refused(monkeypatch, *args) -> str:
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, *args)
    return str(error.value.code).removeprefix("error: ")


def slow_scores(net, context, new, threshold):
    """Log-probability and loops of each new token: one forward pass, one position at a time."""
    out, found = net(torch.tensor([context + new])), []
    for i, token in enumerate(new):
        t, stay = len(context) + i - 1, 1.0
        for loop in range(4):
            stay *= 1 - torch.sigmoid(out.gate[0, t, loop]).item()
            if loop == 3 or (threshold < 1 and 1 - stay >= threshold):
                break
        found.append((net.logits(out.hidden[0, t, loop]).log_softmax(-1)[token].item(), loop + 1))
    return found


def encode(text):
    return [3 + b for b in text.encode()]


@pytest.mark.parametrize("threshold", [0.3, 1.0])
def test_scores_and_loops_equal_a_direct_computation(net, folder, tmp_path, monkeypatch, threshold):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tasks = ["--tasks", "our_choose,our_answer,our_roll", "--include-path", folder / "tasks"]
    how = ["--exit-threshold", threshold, "--cache", "full", "--batch", 3, "--out", tmp_path / "found.json"]
    run(monkeypatch, folder / "a", *tasks, *how)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["exit"] == f"gate:{threshold:g}"

    right, loops = 0, []
    for question, choices in zip(QUESTIONS, CHOICES, strict=True):
        scored = [slow_scores(net, encode(question), encode(c), threshold) for c in choices]
        totals = [sum(logp for logp, _ in s) for s in scored]
        right += totals.index(max(totals)) == 0
        loops += [n for s in scored for _, n in s]
    assert found["harness"]["our_choose"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    assert found["harness"]["our_choose"]["loops"] == pytest.approx(sum(loops) / len(loops))
    assert found["harness"]["our_choose"]["tokens"] == len(loops)

    total, words, loops = 0.0, 0, []
    for text in TEXTS:  # in pieces of as many tokens as the model has positions
        ids = encode(text)
        for start in range(0, len(ids), 48):
            before, new = ([0] + ids)[max(0, min(start, len(ids) - 48)) : start + 1], ids[start : start + 48]
            scored = slow_scores(net, before, new, threshold)
            total += sum(logp for logp, _ in scored)
            loops += [n for _, n in scored]
        words += len(text.split(" "))  # as the harness counts them
    assert math.log(found["harness"]["our_roll"]["word_perplexity,none"]) == pytest.approx(-total / words, rel=1e-4)
    assert found["harness"]["our_roll"]["loops"] == pytest.approx(sum(loops) / len(loops))

    answers, loops = slow_answers(net, threshold)
    assert found["harness"]["our_answer"]["loops"] == pytest.approx(sum(loops) / len(loops))
    assert found["harness"]["our_answer"]["tokens"] == len(loops)
    assert len({*answers}) > 1
    if threshold < 1:
        assert 1 < sum(loops) / len(loops) < 4


def slow_answers(net, threshold):
    """Greedy answers up to a stop text, by full forward passes; and the loops of their tokens."""
    answers, loops = [], []
    for question in QUESTIONS:
        ids = []
        while len(ids) < 20:
            out = net(torch.tensor([encode(question) + ids]))
            first, loop, stay = not ids, 3, 1.0
            for i in range(3):
                stay *= 1 - torch.sigmoid(out.gate[0, -1, i]).item()
                if not first and threshold < 1 and 1 - stay >= threshold:
                    loop = i
                    break
            ids.append(net.logits(out.hidden[0, -1, loop]).argmax().item())
            loops.append(loop + 1)
            text = bytes(i - 3 for i in ids if i > 2).decode(errors="replace")
            if ids[-1] in (0, 2) or "e" in text or "Q:" in text:
                break
        answers.append(text.partition("e")[0].partition("Q:")[0])
    return answers, loops


def test_generated_text_equals_a_direct_computation(net, folder):
    """By the adapter itself: what it returns ends before the stop text."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    config = eval.HarnessConfig(folder=folder / "a", tasks="our_answer", cache="full", batch=3)
    lm = eval.harness_model(net, data.byte_tokenizer(), eval.Exit("gate", 0.3), config)
    assert isinstance(lm, lm_eval.api.model.LM)
    how = {"until": ["e", "Q:"], "max_gen_toks": 20, "do_sample": False}
    asked = [Instance("generate_until", {}, (q, how), i, ("t", i, 1)) for i, q in enumerate(QUESTIONS)]
    assert lm.generate_until(asked, disable_tqdm=True) == slow_answers(net, 0.3)[0]
    long = [Instance("generate_until", {}, (q, how), 0, ("t", 0, 1)) for q in ("", "q" * 100)]
    assert len(lm.generate_until(long, disable_tqdm=True)) == 2
    scored = [
        Instance("loglikelihood", {}, pair, 0, ("t", 0, 1)) for pair in (("", "ab"), ("q" * 100, "ab"), ("a", "b" * 99))
    ]
    found = lm.loglikelihood(scored, disable_tqdm=True)
    for (logp, _), (context, new) in zip(found, (([0], "ab"), ("q" * 47, "ab"), ("b", "b" * 48)), strict=True):
        context = context if isinstance(context, list) else encode(context)
        assert logp == pytest.approx(sum(x for x, _ in slow_scores(net, context, encode(new), 0.3)), rel=1e-4)
    greedy = lm.loglikelihood([Instance("loglikelihood", {}, ("What", "is"), 0, ("t", 0, 1))], disable_tqdm=True)
    assert greedy[0][1] in (True, False)


def ask(kind, *args):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, a, i, ("t", i, 1)) for i, a in enumerate(args)]


def adapter(net, folder, exit=eval.Exit(), **how):  # noqa: B008
    pytest.importorskip("lm_eval")
    config = eval.HarnessConfig(folder=folder / "a", tasks="t", cache="full", **how)
    return eval.harness_model(net, data.byte_tokenizer(), exit, config)


def test_greedy_means_that_every_token_is_the_likeliest(net, folder):
    lm, context, greedy = adapter(net, folder), encode("What"), []
    for _ in range(3):
        greedy.append(net.logits(net(torch.tensor([context + greedy])).hidden[0, -1, -1]).argmax().item())
    other = (greedy[2] + 1) % 256 + 3
    asked = [(None, context, new) for new in (greedy, [*greedy[:2], other], [other, *greedy[1:]])]
    lm.asked = ["t"] * 3
    assert [is_greedy for _, is_greedy in lm._loglikelihood_tokens(asked, disable_tqdm=True)] == [True, False, False]


def test_loops_stop_ids_and_draws_are_those_asked_for(net, folder, monkeypatch):
    how = {"until": [], "max_gen_toks": 30}
    lm = adapter(net, folder, loops=2)
    lm.generate_until(ask("generate_until", ("What", how)), disable_tqdm=True)
    lm.loglikelihood(ask("loglikelihood", ("What", " is")), disable_tqdm=True)
    assert {*lm.loops["t"]} == {2}

    seen, inner = [], eval.generate

    def note(net, prompts, **options):
        seen.append(options)
        return inner(net, prompts, **options)

    monkeypatch.setattr(eval, "generate", note)
    lm = adapter(net, folder, batch=2, seed=5)
    drawn = how | {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    texts = lm.generate_until(ask("generate_until", *[("What", drawn)] * 4, ("What", how)), disable_tqdm=True)
    assert [len(options["seeds"]) for options in seen] == [4, 1], "the greedy one goes by itself"
    assert [(options["temperature"], options["top_p"]) for options in seen] == [(0.7, 0.9), (0.0, 1.0)]
    assert seen[0]["batch"] == 2
    assert len({*texts[:4]}) == 4, "the same prompt again is another draw"
    done = seen[0]["done"]
    assert done(0, [70, 0])
    assert done(0, [70, 2])
    assert not done(0, [0, 70])
    long = how | {"until": ["stop here"]}
    lm.generate_until(ask("generate_until", ("What", long)), disable_tqdm=True)
    assert seen[-1]["done"](0, encode("and now stop here"))
    assert not seen[-1]["done"](0, encode("and now stop her"))
    with pytest.raises(model.UserError, match="a task asks for top_k 40"):
        lm.generate_until(ask("generate_until", ("What", how | {"top_k": 40})), disable_tqdm=True)


def test_the_flags_reach_the_harness(folder, monkeypatch):
    lm_eval, seen = pytest.importorskip("lm_eval"), {}

    def note(lm, **how):
        seen.update(how)
        return {"results": {}}

    monkeypatch.setattr(lm_eval, "simple_evaluate", note)
    flags = ["--num-fewshot", 3, "--limit", 5, "--chat"]
    run(monkeypatch, folder / "a", "--tasks", "our_cho*", "--include-path", folder / "tasks", *flags)
    assert [seen[k] for k in ("tasks", "num_fewshot", "limit", "apply_chat_template")] == [["our_choose"], 3, 5, True]


def test_chat_turns_are_chatml(net, folder):
    pytest.importorskip("lm_eval")
    lm = eval.harness_model(net, data.byte_tokenizer(), eval.Exit(), eval.HarnessConfig(folder=folder / "a", tasks="t"))
    turns = [{"role": "user", "content": "hi"}]
    assert lm.tok_encode(lm.apply_chat_template(turns)) == data.chat_prompts(data.byte_tokenizer(), ["hi"])[0]
    text = lm.apply_chat_template([*turns, {"role": "assistant", "content": "So"}], add_generation_prompt=False)
    assert text.endswith("<|im_start|>assistant\nSo")


def test_without_the_package_it_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert refused(monkeypatch, folder / "a", "--tasks", "gsm8k").endswith("pip install lm_eval")


def test_mistakes_are_refused_in_a_sentence(folder, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    model.save(LoopedTransformer(ModelConfig(vocab_size=8)), tmp_path / "chain", data.chain_tokenizer())
    tasks = ["--tasks", "our_choose", "--include-path", folder / "tasks"]
    for args, expected in (
        ([folder / "a", "--tasks", "no_such_task"], "no task is called no_such_task"),
        ([folder / "a", "--tasks", ","], "--tasks ,: no task is called that"),
        ([folder / "a", *tasks, "--batch", 0], "--batch 0 is below 1"),
        ([folder / "a", *tasks[:3], folder / "none"], "none is not a folder: give one that holds task files"),
        ([folder / "a", "--tasks", "our_missing", *tasks[2:]], "--tasks our_missing: a task's data can't be had"),
        ([folder / "a", *tasks, "--num-fewshot", -1], "--num-fewshot -1 is below 0"),
        ([folder / "a", *tasks, "--out", folder / "tasks" / "rows.jsonl" / "x.json"], "can't be a folder"),
        ([folder / "a", *tasks, "--exit-threshold", 2], "--exit-threshold 2.0 is outside 0..1"),
        ([folder / "none", *tasks], "is not a checkpoint folder"),
        ([tmp_path / "chain", *tasks], "was not trained on text"),
    ):
        assert expected in refused(monkeypatch, *args)
