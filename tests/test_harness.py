"""The adapter to the lm-evaluation-harness, with the real package (pip install lm_eval) on a task of our own."""

import functools
import importlib.util
import json
import shutil
import sys

import pytest
import torch
from helpers import call, refused, slow_exit
from tokenizers import AddedToken

import data
from lab import harness
from model import LoopedTransformer, ModelConfig
from sample import Exit, GenerationFlags, Token, encode_prompts
from support import checkpoint, text
from support.runtime import UserError

QUESTIONS = [f"What is {i} + {7 * i}?" for i in range(1, 9)]
CHOICES = [[f" {8 * i}", f" {i}", " none of these"] for i in range(1, 9)]


@pytest.fixture(scope="module")
def net():
    """Random weights whose gate is unsure. Every exit below is read from it in a slow way."""
    shape = ModelConfig(layers=2, width=32, heads=4, vocab_size=259, init_std=0.3, max_positions=48)
    net = LoopedTransformer(shape, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(net.early_exit_gate.weight, generator=torch.Generator().manual_seed(1))
    return net


@pytest.fixture(autouse=True, scope="module")
def task_files():
    """The thousands of task files of the harness are read once for each folder of ours: it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("lm_eval"):
            import lm_eval.tasks

            patch.setattr(lm_eval.tasks, "TaskManager", functools.cache(lm_eval.tasks.TaskManager))
        yield


@pytest.fixture(scope="module")
def folder(net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    checkpoint.save(net, folder / "a", text.byte_tokenizer())
    (folder / "tasks").mkdir()
    rows = zip(QUESTIONS, CHOICES, strict=True)
    lines = [json.dumps({"question": q, "choices": c, "gold": 0}) + "\n" for q, c in rows]
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
            "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }.items():
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(shared | {"task": f"our_{name}"} | task))
    return folder


def slow_scores(net, context, new, threshold):
    """Log-probability and loops of each new token: one forward pass, one position at a time."""
    out, scores = net(torch.tensor([context + new])), []
    for t, token in enumerate(new, len(context) - 1):
        loops = slow_exit(out.gate[0, t].tolist(), threshold)
        scores.append((net.logits(out.hidden[0, t, loops - 1]).log_softmax(-1)[token].item(), loops))
    return scores


def encode(text):
    return [3 + b for b in text.encode()]


@pytest.mark.parametrize("threshold", [0.3, 1.0])
def test_scores_and_loops_equal_a_direct_computation(net, folder, tmp_path, monkeypatch, capsys, threshold):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tasks = ["--tasks", "our_choose,our_answer", "--include-path", folder / "tasks"]
    folder = shutil.copytree(folder, tmp_path / "[red]x[")  # a name that is no markup
    how = ["--exit-threshold", threshold, "--cache", "full", "--batch", 3, "--out", tmp_path / "scores.json"]
    call(monkeypatch, harness, folder / "a", *tasks, *how)
    assert "[red]x[/a, exit gate" in capsys.readouterr().out
    result = json.loads((tmp_path / "scores.json").read_text())
    assert result["exit"] == f"gate:{threshold:g}"
    scores = result["harness"]

    right, loops = 0, []
    for question, choices in zip(QUESTIONS, CHOICES, strict=True):
        scored = [slow_scores(net, encode(question), encode(c), threshold) for c in choices]
        totals = [sum(logp for logp, _ in s) for s in scored]
        right += totals.index(max(totals)) == 0
        loops += [n for s in scored for _, n in s]
    assert scores["our_choose"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    assert scores["our_choose"]["loops"] == pytest.approx(sum(loops) / len(loops))
    assert scores["our_choose"]["tokens"] == len(loops)

    answers, loops = slow_answers(net, threshold)
    assert scores["our_answer"]["loops"] == pytest.approx(sum(loops) / len(loops))
    assert scores["our_answer"]["tokens"] == len(loops)
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
            n = slow_exit(out.gate[0, -1].tolist(), threshold) if ids else 4  # the first token is the prompt's
            ids.append(net.logits(out.hidden[0, -1, n - 1]).argmax().item())
            loops.append(n)
            answer = bytes(i - 3 for i in ids if i > 2).decode(errors="replace")
            if ids[-1] in (0, 2) or "e" in answer or "Q:" in answer:
                break
        answers.append(answer.partition("e")[0].partition("Q:")[0])
    return answers, loops


def test_generated_text_equals_a_direct_computation(net, folder):
    """By the adapter itself: what it returns ends before the stop text."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    config = harness.HarnessConfig(folder=folder / "a", tasks="our_answer", cache="full", batch=3)
    lm = harness.harness_model(net, text.byte_tokenizer(), Exit("gate", 0.3), config)
    assert isinstance(lm, lm_eval.api.model.LM)
    how = {"until": ["e", "Q:"], "max_gen_toks": 20, "do_sample": False}
    asked = [Instance("generate_until", {}, (q, how), i, ("t", i, 1)) for i, q in enumerate(QUESTIONS)]
    assert lm.generate_until(asked, disable_tqdm=True) == slow_answers(net, 0.3)[0]
    long = [Instance("generate_until", {}, (q, how), 0, ("t", 0, 1)) for q in ("", "q" * 100)]
    assert len(lm.generate_until(long, disable_tqdm=True)) == 2
    scored = [
        Instance("loglikelihood", {}, pair, 0, ("t", 0, 1)) for pair in (("", "ab"), ("q" * 100, "ab"), ("a", "b" * 99))
    ]
    scores = lm.loglikelihood(scored, disable_tqdm=True)
    for (logp, _), (context, new) in zip(scores, (([0], "ab"), ("q" * 47, "ab"), ("b", "b" * 48)), strict=True):
        context = context if isinstance(context, list) else encode(context)
        assert logp == pytest.approx(sum(x for x, _ in slow_scores(net, context, encode(new), 0.3)), rel=1e-4)
    out = net(torch.tensor([encode("What")]))
    likeliest = (
        net.logits(out.hidden[0, -1, slow_exit(out.gate[0, -1].tolist(), 0.3) - 1])[3:131].topk(2).indices.tolist()
    )
    assert net.logits(out.hidden[0, -1]).argmax(-1).unique().numel() > 1, "the loops differ in what they say"
    pairs = [("What", chr(byte)) for byte in likeliest]
    assert [is_greedy for _, is_greedy in lm.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)] == [
        True,
        False,
    ]


def ask(kind, *args):
    instance = pytest.importorskip("lm_eval.api.instance")
    return [instance.Instance(kind, {}, a, i, ("t", i, 1)) for i, a in enumerate(args)]


def adapter(net, folder, exit=Exit(), **how):  # noqa: B008
    pytest.importorskip("lm_eval")
    config = harness.HarnessConfig(folder=folder / "a", tasks="t", **{"cache": "full"} | how)
    return harness.harness_model(net, text.byte_tokenizer(), exit, config)


def test_verified_drafts_score_and_say_what_full_depth_does(net, folder):
    how, early = {"until": ["e"], "max_gen_toks": 12}, Exit("gate", 0.3)
    asked = [(None, encode("What"), encode("not"))]
    found = []
    for exit, flags in ((Exit(), {}), (early, {"verify": 3}), (early, {})):
        lm = adapter(net, folder, exit, **{"cache": "copy"} | flags)
        lm.asked = ["t"]
        scores = lm._loglikelihood_tokens(asked, disable_tqdm=True)
        found.append((scores, lm.generate_until(ask("generate_until", ("What", how)), disable_tqdm=True)))
    assert found[0] == found[1] != found[2]


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

    seen, inner = [], harness.generate

    def note(net, prompts, **options):
        seen.append(options)
        return inner(net, prompts, **options)

    monkeypatch.setattr(harness, "generate", note)
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


@pytest.fixture
def told(monkeypatch):
    """What generation was asked for; it says `told.text`, until it is told to stop."""

    class Told(list):
        text = "x"

    told = Told()

    def note(net, prompts, done, **options):
        told.append(options | {"prompts": prompts})
        for row in range(len(prompts)):
            tokens = []
            for i in told.text if isinstance(told.text, list) else encode(told.text):
                tokens.append(i)
                yield Token(row, i, 1, i, -1.0, 1.0)
                if done(row, tokens) or len(tokens) == options["max_tokens"]:
                    break

    monkeypatch.setattr(harness, "generate", note)
    return told


GREEDY, DRAWN, UNCUT = (0.0, 1.0), (0.7, 0.9), (1.0, 1.0)  # temperature and top_p


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, GREEDY),
        ({"do_sample": True, "temperature": 0}, GREEDY),
        ({"do_sample": True, "temperature": 0.0, "top_p": 0.9}, (0.0, 0.9)),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0}, GREEDY),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, DRAWN),
        ({"temperature": 0.7, "top_p": 0.9}, DRAWN),
        ({"do_sample": True}, UNCUT),
        ({"do_sample": True, "temperature": None, "top_p": None, "top_k": None}, UNCUT),
        ({"do_sample": False, "temperature": 0.7}, GREEDY),
        ({"do_sample": True, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "num_beams": 1}, UNCUT),
        ({"do_sample": True, "top_k": -1, "typical_p": 1.0, "max_tokens": 256}, UNCUT),
        ({"num_beams": 1, "until": None, "do_sample": None}, GREEDY),
    ],
)
def test_what_a_task_says_of_the_draw_is_done(net, folder, told, asked, expected):
    lm = adapter(net, folder)
    assert lm.generate_until(ask("generate_until", ("What", {"until": []} | asked)), disable_tqdm=True) == ["x"]
    assert (told[0]["temperature"], told[0]["top_p"]) == expected
    assert told[0]["max_tokens"] == 256


@pytest.mark.parametrize(
    ("key", "value"),
    [("top_k", 40), ("min_p", 0.1), ("repetition_penalty", 1.1), ("num_beams", 4), ("stop", ["x"]), ("seed", 0)]
    + [("temperature", "hot"), ("temperature", -1), ("top_p", 1.5), ("top_p", True), ("max_gen_toks", 0)],
)
def test_what_is_unknown_and_changes_the_text_is_refused(net, folder, told, key, value):
    asked = ask("generate_until", ("What", {"until": [], key: value}))
    with pytest.raises(UserError) as error:
        adapter(net, folder).generate_until(asked, disable_tqdm=True)
    value = "['x']" if key == "stop" else value
    assert str(error.value) == f"a task asks for {key} {value}, which is not done here: leave the task out"
    assert told == []


def test_the_flag_for_the_most_tokens_wins_over_the_task(net, folder, told):
    told.text = "x" * 60
    for flag, asked, expected in ((None, {}, 256), (None, {"max_gen_toks": 5}, 5), (7, {"max_new_tokens": 5}, 7)):
        answers = adapter(net, folder, max_tokens=flag).generate_until(ask("generate_until", ("What", asked)))
        assert told[-1]["max_tokens"] == expected
        assert answers == ["x" * min(expected, 60)]


OPEN = "<|im_start|>assistant\n<think>\n"


@pytest.mark.parametrize(
    ("prompt", "said", "until", "answer"),
    [
        ("Q", "<think>#### 5</think>#### 7", [], "#### 7"),
        ("Q", "<think>#### 5</think>#### 7\nQ: next", ["\n"], "#### 7"),
        (OPEN, "a\n\nb 5</think>\n\n7\n\nmore", ["\n\n"], "7"),
        (OPEN, "5</think>6<think>7</think> 8", [], "8"),
        (OPEN, "so it is 5", [], ""),
        ("Q", " <think>so it is 5", [], ""),
        ("Q", "a\nb", ["\n"], "a"),
        ("Q", "the mark <think> is", [], "the mark <think> is"),
        ("Q", " as it is ", [], " as it is "),
        ("<think>\n</think>\n", "7\n", ["\n"], "7"),
    ],
)
def test_what_follows_the_last_thought_is_scored(net, folder, told, prompt, said, until, answer):
    """Its stop texts count there alone; a thought without an end has no answer."""
    told.text = said
    lm = adapter(net, folder)
    assert lm.generate_until(ask("generate_until", (prompt, {"until": until, "max_gen_toks": 99}))) == [answer]


@pytest.mark.parametrize("special", [True, False])
def test_the_marks_of_a_thought_may_be_tokens(net, folder, told, special):
    pytest.importorskip("lm_eval")
    tokenizer = text.byte_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=special) for mark in ("<think>", "</think>")])
    config = harness.HarnessConfig(folder=folder / "a", tasks="t", thinking=True)
    lm = harness.harness_model(net, tokenizer, Exit(), config)
    told.text = [*encode("#### 5\n"), 260, *encode("\n#### 7\n"), 2]
    asked = ask("generate_until", (OPEN, {"until": ["\n"], "max_gen_toks": 30}))
    assert lm.generate_until(asked) == ["#### 7"]
    assert told[0]["prompts"] == [[1, *encode("assistant\n"), 259, *encode("\n")]]


def test_the_flags_reach_the_harness(folder, monkeypatch):
    lm_eval, seen = pytest.importorskip("lm_eval"), {}

    def note(lm, **how):
        seen.update(how)
        return {"results": {}}

    monkeypatch.setattr(lm_eval, "simple_evaluate", note)
    flags = ["--num-fewshot", 3, "--limit", 5, "--chat"]
    call(monkeypatch, harness, folder / "a", "--tasks", "our_cho*", "--include-path", folder / "tasks", *flags)
    assert [seen[k] for k in ("tasks", "num_fewshot", "limit", "apply_chat_template")] == [["our_choose"], 3, 5, True]
    for flags, chat, system in ((["--system", "Be."], True, "Be."), (["--thinking"], True, None), ([], False, None)):
        call(monkeypatch, harness, folder / "a", "--tasks", "our_answer", "--include-path", folder / "tasks", *flags)
        assert (seen["apply_chat_template"], seen["system_instruction"]) == (chat, system)


def test_chat_turns_are_chatml(net, folder):
    pytest.importorskip("lm_eval")
    lm = harness.harness_model(
        net, text.byte_tokenizer(), Exit(), harness.HarnessConfig(folder=folder / "a", tasks="t")
    )
    turns = [{"role": "user", "content": "hi"}]
    assert (
        lm.tok_encode(lm.apply_chat_template(turns))
        == text.encode_chats(text.byte_tokenizer(), [[("user", "hi"), ("assistant", "")]])[0][0][:-1]
    )
    string = lm.apply_chat_template([*turns, {"role": "assistant", "content": "So"}], add_generation_prompt=False)
    assert string.endswith("<|im_start|>assistant\nSo")


@pytest.mark.parametrize("special", [True, False])
def test_chat_text_yields_no_token_that_it_spells(net, folder, special):
    """The prompt that sample.py makes of the same texts; what the model says itself may hold its added tokens."""
    pytest.importorskip("lm_eval")
    tokenizer = text.byte_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=special) for mark in ("<think>", "</think>")])
    for flags in ({"thinking": True}, {"chat": True}, {"system": "<|im_end|>"}):
        lm = harness.harness_model(
            net, tokenizer, Exit(), harness.HarnessConfig(folder=folder / "a", tasks="t", **flags)
        )
        system = [{"role": "system", "content": flags["system"]}] if "system" in flags else []
        string = lm.apply_chat_template([*system, {"role": "user", "content": "a<|im_end|>\n<|endoftext|><think>"}])
        expected = encode_prompts(
            tokenizer, ["a<|im_end|>\n<|endoftext|><think>"], GenerationFlags(folder="x", **flags)
        )
        assert [lm.tok_encode(string)] == expected
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<think><|im_end|>"}]
    string = lm.apply_chat_template(turns, add_generation_prompt=False)
    assert lm.tok_encode(string)[-11:] == [259, *encode("<|im_end|>")]


def test_thinking_models_are_not_asked_for_the_probability_of_a_choice(folder, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tasks = ["--tasks", "our_choose", "--include-path", folder / "tasks", "--thinking"]
    message = refused(monkeypatch, harness, folder / "a", *tasks)
    assert message == "--thinking: our_choose scores given text, not an answer: leave one of both out"


def test_without_the_package_it_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert refused(monkeypatch, harness, folder / "a", "--tasks", "gsm8k").endswith("pip install lm_eval")


def test_mistakes_are_refused_in_a_sentence(folder, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    checkpoint.save(LoopedTransformer(ModelConfig(vocab_size=8)), tmp_path / "chain", data.chain_tokenizer())
    tasks = ["--tasks", "our_choose", "--include-path", folder / "tasks"]
    for args, expected in (
        ([folder / "a", "--tasks", "no_such_task", *tasks[2:]], "no task is called no_such_task"),
        ([folder / "a", "--tasks", ",", *tasks[2:]], "--tasks ,: no task is called that"),
        ([folder / "a", *tasks, "--batch", 0], "--batch 0 is out of its range: give a number 1 or more"),
        ([folder / "a", *tasks[:3], folder / "none"], "no task is called our_choose"),
        ([folder / "a", "--tasks", "our_missing", *tasks[2:]], "--tasks our_missing: a task's data can't be had"),
        ([folder / "a", "--tasks", "our_roll", *tasks[2:]], "our_roll asks for the perplexity of whole documents"),
        ([folder / "a", *tasks, "--num-fewshot", -1], "--num-fewshot -1 is out of its range: give a number 0 or more"),
        ([folder / "a", *tasks, "--out", folder / "tasks" / "rows.jsonl" / "x.json"], "can't be a folder"),
        (
            [folder / "a", *tasks, "--exit-threshold", 2],
            "--exit-threshold 2.0 is out of its range: give a number from 0 to 1",
        ),
        ([folder / "none", *tasks], "is not a checkpoint folder"),
        ([tmp_path / "chain", *tasks], "was not trained on text"),
    ):
        assert expected in refused(monkeypatch, harness, *args)
