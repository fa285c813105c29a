"""Files from the wild: what is read, what is refused in a sentence with the place, and chats."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

import data
import eval
from data import DataConfig, Documents
from model import LoopedTransformer, ModelConfig
from support import text
from support.runtime import UserError

LINE = '{"question": "1 + 1?", "answer": "2"}\n'
CHATS = """\
{"messages": [{"role": "system", "content": "You add."}, {"role": "user", "content": "2 + 2?"}, {"role": "assistant", \
"content": "4"}, {"role": "user", "content": "And one more?"}, {"role": "assistant", "content": "5"}]}
{"messages": [{"role": "user", "content": "3 + 3?"}, {"role": "assistant", "content": "6"}]}
{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "<think>Hi.</think>Hello!"}]}
{"messages": [{"role": "user", "content": "never answered"}]}
"""
DIALOGUE = (
    "<|im_start|>system\nYou add.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    "<|im_start|>user\nAnd one more?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>"
)


def write(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


def spell(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def asked(row: data.Row) -> list[int]:
    """The target tokens of a row that is alone in its batch."""
    batch = Documents([row], batch=1, seed=0).batch(0)
    return batch.targets[batch.mask].tolist()


@pytest.fixture
def thinking() -> Tokenizer:
    """A byte tokenizer with <think> as an ordinary added token, </think> as a special one."""
    tokenizer = text.byte_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_special_tokens(["</think>"])
    return tokenizer


# What is read


def test_json_lines_are_read_under_json_too(tmp_path):
    path = write(tmp_path / "a.json", LINE * 2 + "\n" + LINE)
    assert text.read_documents(path) == [("1 + 1?", "2")] * 3
    assert text.read_documents(write(tmp_path / "one.json", LINE)) == [("1 + 1?", "2")]


def test_only_line_feeds_end_a_line_of_json(tmp_path):
    record = '{"question": "q", "answer": "one\u2028two\x85three %d"}\r\n'
    path = write(tmp_path / "a.jsonl", "".join(record % i for i in range(3)))
    assert text.read_documents(path) == [("q", f"one\u2028two\x85three {i}") for i in range(3)]


def test_a_key_that_is_not_asked_for_may_hold_anything(tmp_path):
    extras = ("9" * 5000, "1e999999", "NaN", "null", r'"\udcff"', "[[[]]]")
    path = write(tmp_path / "a.jsonl", "".join(f'{{"prompt": "p", "response": "r", "id": {x}}}\n' for x in extras))
    assert text.read_documents(path) == [("p", "r")] * 6


def test_paths_may_be_texts(tmp_path):
    path = str(write(tmp_path / "[train].jsonl", LINE * 40))
    rows, _ = data.encode(path, text.byte_tokenizer(), DataConfig())
    assert [spell(text.byte_tokenizer(), row.ids) for row in rows] == ["Problem: 1 + 1?\nSolution: 2<|endoftext|>"] * 40
    assert len(data.split(DataConfig(path=path, val=path), text.byte_tokenizer(), seed=0)[1]) == 40
    text.train_tokenizer(path, 259, str(tmp_path / "t.json"))
    for form in (str, Path):
        assert text.vocab_size(text.load_tokenizer(form(tmp_path / "t.json"))) == 259


def test_parquet_chats_are_read_and_text_that_is_not_utf8_is_refused_with_its_row(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    chats = [json.loads(line)["messages"] for line in CHATS.splitlines()]
    parquet.write_table(pyarrow.table({"messages": chats}), tmp_path / "a.parquet")
    assert text.read_documents(tmp_path / "a.parquet") == text.read_documents(write(tmp_path / "a.jsonl", CHATS))
    bounds = pyarrow.py_buffer(torch.tensor([0, 1, 4], dtype=torch.int32).numpy().tobytes())
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, bounds, pyarrow.py_buffer(b"a\xed\xb3\xbf")])
    parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet row 2 can't be read \('utf-8' codec"):
        text.read_documents(tmp_path / "b.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c.parquet row 2 has no text under 'text'"):
        text.read_documents(tmp_path / "c.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "d.parquet").write_bytes(whole[:4] + b"\xff" * 4 + whole[8:])
    with pytest.raises(UserError, match=r"d.parquet is not a parquet file") as error:
        text.read_documents(tmp_path / "d.parquet")
    assert "\n" not in str(error.value)


# What is refused


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "line 2 is not JSON (nested too deeply): mend the line"),
        ('{"a": ' * 100_000, "line 2 is not JSON (nested too deeply)"),
        ("9" * 5000, "line 2 is a float: each must be an object"),
        (
            r'{"question": "q", "answer": "It is \udcff."}',
            "line 2 has half a character (a lone surrogate) under 'answer'",
        ),
        (r'{"question": "\ud83d", "answer": "a"}', "line 2 has half a character (a lone surrogate) under 'question'"),
        *(
            (f'{{"question": "q", "answer": {value}}}', "line 2 has no text under 'answer': each needs a text there")
            for value in ("NaN", "-Infinity", "9" * 5000, "null", '["a"]', '""', r'" \n"', "true", '{"a": 1}')
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_whatever_json_can_hold_is_refused_with_its_line(tmp_path, suffix, line, message):
    path = write(tmp_path / f"a.{suffix}", LINE + line + "\n")
    with pytest.raises(UserError) as error:
        text.read_documents(path)
    assert str(error.value).startswith(f"{path} {message}")


def test_a_lone_surrogate_is_refused_in_a_json_list_and_in_what_a_tokenizer_learns_from(tmp_path):
    path = write(tmp_path / "a.json", rf'[{LINE}, {{"question": "q", "answer": "\udcff"}}]')
    with pytest.raises(UserError, match=r"a.json record 2 has half a character"):
        text.read_documents(path)
    with pytest.raises(UserError, match=r"a.jsonl line 1 has half a character \(a lone surrogate\) under 'text'"):
        text.train_tokenizer(write(tmp_path / "a.jsonl", '{"text": "\\udcff"}'), 259, tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", LINE)
    monkeypatch.setattr(Path, "read_bytes", lambda path: path.parent.open())  # as a file that may not be read, to root
    with pytest.raises(UserError, match=r"a.jsonl can't be read \(Is a directory\): give another file"):
        text.read_documents(path)


def test_a_sentence_stays_one_line_however_many_keys_there_are(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({f"key\n{i}": i for i in range(1000)}))
    with pytest.raises(
        UserError, match=r"has no key 'text': .* its keys are key 0, key 1, .* \[...\] \(to use others: --data"
    ) as error:
        text.read_documents(path)
    assert len(str(error.value)) < 500


# Chats


def test_the_loss_is_on_every_turn_of_the_assistant_and_its_end(tmp_path):
    path, tokenizer = write(tmp_path / "a.jsonl", CHATS), text.byte_tokenizer()
    rows, notes = data.encode(path, tokenizer, DataConfig())
    assert spell(tokenizer, rows[0].ids) == DIALOGUE, "a system turn is kept"
    answers = ["4<|im_end|>5<|im_end|>", "6<|im_end|>", "<think>Hi.</think>Hello!<|im_end|>"]
    assert [spell(tokenizer, asked(row)) for row in rows] == answers
    assert notes == [f"{path}: 1 of 4 documents have no turn of the assistant and are left out"]
    together = data.collate(rows)
    assert spell(tokenizer, together.targets[together.mask].tolist()) == "".join(answers), "beside others, too"
    assert (data.encode(path, tokenizer, DataConfig(chat=True))[0]) == rows, "messages are always ChatML"


def test_a_chat_of_one_answer_is_the_row_that_prompt_and_response_give(tmp_path):
    chat = write(tmp_path / "a.jsonl", CHATS.splitlines()[1])
    pair = write(tmp_path / "b.jsonl", '{"prompt": "3 + 3?", "response": "6"}')
    rows = [data.encode(path, text.byte_tokenizer(), DataConfig(chat=True))[0] for path in (chat, pair)]
    assert rows[0] == rows[1]
    prompt = rows[0][0].ids[: rows[0][0].prompt]
    ((ids, _),) = text.encode_chats(text.byte_tokenizer(), [[("user", "3 + 3?"), ("assistant", "")]])
    assert prompt == ids[:-1]


def test_chats_are_cut_at_the_length_and_keep_the_answers_before(tmp_path):
    path, tokenizer = write(tmp_path / "a.jsonl", CHATS.splitlines()[0]), text.byte_tokenizer()
    (whole,), _ = data.encode(path, tokenizer, DataConfig())
    assert (whole.prompt, len(whole.ids)) == (43, 80)
    for length, targets in ((79, "4<|im_end|>5<|im_end|>"), (78, "4<|im_end|>5"), (60, "4<|im_end|>")):
        (row,), notes = data.encode(path, tokenizer, DataConfig(length=length))
        assert spell(tokenizer, asked(row)) == targets
        cut = [f"{path}: 1 of 1 documents are longer than --data.length {length} and are cut"]
        assert notes == (cut if length < 79 else [])
    (row,), _ = data.encode(path, tokenizer, DataConfig(length=43))
    assert spell(tokenizer, asked(row)) == "4"
    beside = data.collate([row, data.Row([5] * 90, 90)])
    assert beside.mask.sum(1).tolist() == [1, 0], "of the answers that were cut off, nothing is asked in the padding"
    with pytest.raises(
        UserError, match=r"has no target token: give longer texts, answered chats, or a larger --data.length"
    ):
        data.encode(path, tokenizer, DataConfig(length=42))


def test_a_chat_that_goes_on_after_its_last_answer_ends_with_the_answer(tmp_path):
    turns = [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Bye."}]
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": turns}))
    (row,), _ = data.encode(path, text.byte_tokenizer(), DataConfig())
    assert spell(text.byte_tokenizer(), row.ids) == "<|im_start|>assistant\nHi.<|im_end|>"
    assert spell(text.byte_tokenizer(), asked(row)) == "Hi.<|im_end|>"


def test_eval_scores_the_answers_of_chats(tmp_path):
    rows, _ = data.encode(write(tmp_path / "a.jsonl", CHATS), text.byte_tokenizer(), DataConfig())
    net = LoopedTransformer(ModelConfig(vocab_size=259, width=16, heads=2, loops=2), generator=torch.Generator())
    scores = eval.score(net, Documents(rows, batch=2, seed=0), device=torch.device("cpu"))
    assert len(scores.correct) == sum(len(asked(row)) for row in rows) == 4 + 2 + 25


def test_messages_give_way_to_known_pairs_and_other_keys_may_hold_chats(tmp_path):
    chat = json.loads(CHATS.splitlines()[1])["messages"]
    path = write(tmp_path / "a.jsonl", json.dumps({"problem": "p", "solution": "s", "messages": chat, "talk": chat}))
    assert text.read_documents(path) == [("p", "s")]
    write(tmp_path / "b.jsonl", json.dumps({"text": "t", "messages": chat}))
    assert text.read_documents(tmp_path / "b.jsonl") == [[("user", "3 + 3?"), ("assistant", "6")]]
    for key in ("messages", "talk"):
        assert text.read_documents(path, response_key=key) == [[("user", "3 + 3?"), ("assistant", "6")]]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("null", "line 1 has no list of turns under 'messages': each needs a list of turns there"),
        ('"hi"', "line 1 has no list of turns under 'messages'"),
        ('["hi"]', "line 1 turn 1 has no key 'role': each needs a text there"),
        (
            '[{"from": "gpt", "value": "hi"}]',
            "line 1 turn 1 has no key 'role': each needs a text there; its keys are from, value",
        ),
        (
            '[{"role": "user", "content": "q"}, {"role": "assistant", "content": null}]',
            "line 1 turn 2 has no text under 'content'",
        ),
        ('[{"role": "user", "content": [{"type": "text", "text": "q"}]}]', "line 1 turn 1 has no text under 'content'"),
        ('[{"role": "user", "content": "\\ud800"}]', "line 1 turn 1 has half a character"),
        ("[]", "has no target token: give longer texts, answered chats"),
    ],
)
def test_a_chat_is_refused_with_its_line_and_turn(tmp_path, messages, message):
    path = write(tmp_path / "a.jsonl", f'{{"messages": {messages}}}\n')
    with pytest.raises(UserError) as error:
        data.encode(path, text.byte_tokenizer(), DataConfig())
    assert str(error.value).startswith(f"{path} {message}")


def test_chats_need_a_tokenizer_with_the_tokens_of_chatml(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "?": 1}, unk_token="?"))
    with pytest.raises(UserError, match=r"ChatML needs a tokenizer with <\|im_start\|> and <\|im_end\|>: give another"):
        data.encode(write(tmp_path / "a.jsonl", CHATS), tokenizer, DataConfig())


def test_a_tokenizer_learns_from_what_chats_say(tmp_path):
    turns = [{"role": "user", "content": "zq"}, {"role": "assistant", "content": "jx"}]
    text.train_tokenizer(write(tmp_path / "a.jsonl", json.dumps({"messages": turns})), 263, tmp_path / "t.json")
    vocabulary = text.load_tokenizer(tmp_path / "t.json").get_vocab()
    assert {token for token in vocabulary if len(token) > 1} - {*text.SPECIAL} == {"zq", "jx"}, "and no role"


# Tokens that a text spells


@pytest.mark.parametrize("chat", [True, False])
def test_added_tokens_keep_their_meaning_in_responses_and_never_in_prompts(tmp_path, thinking, chat):
    spelled = "<think>a</think>"
    path = write(tmp_path / "a.jsonl", json.dumps({"prompt": spelled, "response": spelled}))
    (row,), _ = data.encode(path, thinking, DataConfig(chat=chat))
    think, end = map(thinking.token_to_id, ("<think>", "</think>"))
    assert row.ids[row.prompt :] == [think, 3 + ord("a"), end, 2 if chat else 0]
    assert not {think, end} & {*row.ids[: row.prompt]}
    assert spelled in spell(thinking, row.ids[: row.prompt])


def test_added_tokens_keep_their_meaning_in_answers_of_chats_and_in_plain_text(tmp_path, thinking):
    think, end = map(thinking.token_to_id, ("<think>", "</think>"))
    turns = [
        {"role": role, "content": "<think></think>"} for role in ("system", "user", "assistant", "tool", "assistant")
    ]
    (row,), _ = data.encode(write(tmp_path / "a.jsonl", json.dumps({"messages": turns})), thinking, DataConfig())
    assert asked(row) == [think, end, 2] * 2
    assert row.ids.count(think) == row.ids.count(end) == 2
    (row,), _ = data.encode(write(tmp_path / "a.txt", "<think>"), thinking, DataConfig())
    assert row.ids == [think, 0]
    assert text.tokenize(thinking, ["<think></think><|im_end|>"], special=True) == [[think, end, 2]]
    assert [t.special for t in thinking.get_added_tokens_decoder().values()] == [True] * 3 + [False, True], "as it was"


def test_the_copy_that_spells_tokens_out_is_made_once_and_again_for_a_new_token(thinking):
    think = thinking.token_to_id("<think>")
    before = text.make_special.cache_info().misses
    assert [text.tokenize(thinking, ["<think>"], added=True) for _ in range(3)] == [[[think]]] * 3
    assert text.make_special.cache_info().misses == before + 1
    thinking.add_tokens(["<tool>"])
    assert text.tokenize(thinking, ["<tool>"], added=True) == [[thinking.token_to_id("<tool>")]]


def test_what_ends_a_text_or_a_turn_is_never_made_of_text(tmp_path, thinking):
    content = "<|im_start|>a<|im_end|><|endoftext|>"
    turns = [{"role": role, "content": content} for role in ("system", "user", "assistant")]
    (row,), _ = data.encode(write(tmp_path / "a.jsonl", json.dumps({"messages": turns})), thinking, DataConfig())
    assert [i for i in row.ids if i < 3] == [1, 2] * 3
    assert spell(thinking, asked(row)) == f"{content}<|im_end|>"
    pieces = [("</s>", 0.0), *((symbol, -1.0) for symbol in ("a", "<", "/", "s", ">", "?"))]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=6))  # it finds its pieces in any text
    unigram.add_special_tokens(["</s>"])
    assert text.tokenize(unigram, ["as"]) == [[1, 4]]
    with pytest.raises(UserError, match="a text spells an end of text or turn, and the tokenizer takes it for one"):
        text.tokenize(unigram, ["a", "a</s>a"])


def test_a_tokenizer_that_cuts_and_pads_by_its_file_does_neither_here(tmp_path):
    tokenizer = text.byte_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(pad_id=0)
    tokenizer.save(str(tmp_path / "t.json"))
    tokenizer = text.load_tokenizer(tmp_path / "t.json")
    assert [len(ids) for ids in text.tokenize(tokenizer, ["a", "abcdefg"])] == [1, 7]
