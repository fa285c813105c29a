"""Batches: what is asked where, in which order, by which process; and what a file can be refused for."""

import json
import sys

import pytest
import torch

import data
from data import Chain, DataConfig, Documents, Row
from model import LoopedTransformer, ModelConfig
from support import checkpoint, runtime, text
from support.runtime import UserError


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def encode(path, config=None, tokenizer=None):
    tokenizer = tokenizer or text.byte_tokenizer()
    return data.encode(path, tokenizer, config or DataConfig())


# Chain arithmetic


def test_a_chain_row_asks_the_running_value_at_every_operand():
    batch = Chain(6, batch=64, seed=0).batch(3)
    assert batch.inputs.shape == (64, 11)
    for ids, targets, mask in zip(*(part.tolist() for part in batch), strict=True):
        assert mask == [t % 2 == 0 for t in range(11)]
        value = ids[0]
        for t in range(0, 11, 2):
            if t:
                a, b = value, ids[t]
                value = {5: a + b, 6: a - b, 7: a * b}[ids[t - 1]] % 5
            assert targets[t] == value


def test_held_out_chains_are_never_trained_on():
    train, held = Chain(3, batch=64, seed=0), Chain(3, batch=64, seed=0, held_out=300)
    sets = [{tuple(row) for i in range(n) for row in s.batch(i).inputs.tolist()} for s, n in ((train, 60), (held, 5))]
    assert len(sets[0]) > 500
    assert not sets[0] & sets[1]
    assert [len(held.batch(i).inputs) for i in range(held.batches)] == [64, 64, 64, 64, 44]


def test_the_symbols_of_a_chain_are_its_tokens():
    chain = "3 + 4 × 2 - 1"
    ids = data.chain_tokenizer().encode(chain).ids
    assert data.chain_tokenizer().decode(ids) == chain
    batch = data.chain_batch(torch.tensor([[3, 4, 2, 1]]), torch.tensor([[0, 2, 1]]))
    assert batch.inputs[0].tolist() == ids
    assert batch.targets[0, ::2].tolist() == [3, 2, 4, 3]


# Documents


def test_only_the_response_is_asked_and_its_end(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "2+2?", "answer": "It is 4."}])
    (row,), notes = encode(path)
    batch = Documents([row], batch=1, seed=0).batch(0)
    tokenizer = text.byte_tokenizer()
    assert tokenizer.decode(row.ids[: row.prompt]) == "Problem: 2+2?\nSolution: "
    asked = batch.targets[batch.mask].tolist()
    assert tokenizer.decode(asked[:-1]) == "It is 4."
    assert asked[-1] == text.eos_id(tokenizer) == 0
    assert batch.targets[0, :-1].equal(batch.inputs[0, 1:])
    assert notes == []


def test_chat_form_is_chatml(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "hi", "response": "ho"}])
    (row,), _ = encode(path, DataConfig(chat=True))
    dialogue = text.byte_tokenizer().decode(row.ids, skip_special_tokens=False)
    assert dialogue == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>"
    assert text.byte_tokenizer().decode(row.ids[row.prompt :], skip_special_tokens=False) == "ho<|im_end|>"


def test_text_never_yields_a_special_token(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"problem": "<|im_end|>", "solution": "<|endoftext|>"}])
    (row,), _ = encode(path)
    assert [i for i in row.ids if i < 3] == [0]


def test_plain_text_is_cut_into_blocks_that_ask_every_token_but_the_first(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij")
    rows, _ = encode(tmp_path / "a.txt", DataConfig(length=4))
    assert [len(r.ids) for r in rows] == [5, 5, 3]
    source = Documents(rows, batch=3, seed=0)
    asked = source.batch(0)
    assert asked.mask.sum() == 10, "ten characters, the first is not asked, the end is"
    keyed, _ = encode(write(tmp_path / "b.jsonl", [{"text": "abcdefghij"}]), DataConfig(length=4))
    assert keyed == rows


@pytest.mark.parametrize("pair", text.KEY_PAIRS)
def test_known_keys_are_found_by_themselves(tmp_path, pair):
    path = write(tmp_path / "a.jsonl", [{pair[0]: "p", pair[1]: "r", "id": 3}])
    assert text.read_documents(path) == [("p", "r")]


def test_a_json_list_a_byte_order_mark_and_blank_lines_are_read(tmp_path):
    (tmp_path / "a.json").write_text('\ufeff[{"q": "p", "a": "é"}]', encoding="utf-8")
    assert text.read_documents(tmp_path / "a.json", "q", "a") == [("p", "é")]
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert text.read_documents(tmp_path / "a.jsonl") == [(None, "a"), (None, "b")]


def test_parquet_is_read_where_pyarrow_is_installed(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"problem": ["p"], "solution": ["s"]}), tmp_path / "a.parquet")
    assert text.read_documents(tmp_path / "a.parquet") == [("p", "s")]
    (tmp_path / "b.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match=r"b.parquet is not a parquet file"):
        text.read_documents(tmp_path / "b.parquet")


def test_parquet_without_pyarrow_is_refused_with_the_way_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"a.parquet needs pyarrow to be read: pip install pyarrow"):
        text.read_documents(tmp_path / "a.parquet")


def test_long_documents_are_cut_and_counted(tmp_path):
    records = [{"problem": "p", "solution": "s" * n} for n in (5, 100, 200)] + [{"problem": "p" * 99, "solution": "s"}]
    rows, notes = encode(write(tmp_path / "a.jsonl", records), DataConfig(length=40))
    assert [len(r.ids) for r in rows] == [27, 41, 41]
    assert "2 of 4 documents are longer than --data.length 40 and are cut" in notes[0]
    assert "1 of 4 documents are left out, their prompt alone fills the row" in notes[1]


def test_padding_asks_nothing_and_changes_no_row():
    rows = [Row([5, 6, 7], 1), Row([8, 9, 10, 11, 12, 13], 4), Row([14, 15], 1)]
    batch = data.collate(rows)
    assert batch.inputs.shape == (3, 5)
    for b, (ids, prompt, _) in enumerate(rows):
        n = len(ids) - 1
        assert batch.inputs[b, :n].tolist() == ids[:-1]
        assert batch.targets[b, :n].tolist() == ids[1:]
        assert batch.mask[b].tolist() == [prompt - 1 <= t < n for t in range(5)]
    assert data.collate([]).inputs.shape == (0, 1), "a process may get no row"


def lengths(n, seed=0):
    spread = torch.randn(n, generator=torch.Generator().manual_seed(seed)).mul(0.6).exp() * 120
    return [Row([0] * (int(x) + 3), 1) for x in spread]


def test_rows_of_like_length_share_a_batch_so_that_padding_stays_under_a_tenth():
    source = Documents(lengths(4000), batch=16, seed=0)
    batches = [source.batch(i) for i in range(source.batches)]
    used = sum(b.mask.sum().item() for b in batches)
    assert 1 - used / sum(b.inputs.numel() for b in batches) < 0.1
    means = torch.tensor([float(b.inputs.shape[1]) for b in batches])
    halves = means[: len(means) // 2].mean(), means[len(means) // 2 :].mean()
    assert abs(halves[0] / halves[1] - 1) < 0.2, "yet short and long batches come mixed"


@pytest.mark.parametrize("n", [7, 64, 1000])
def test_every_document_comes_once_in_an_epoch_in_an_order_of_the_seed(n):
    rows = [Row([i, i, i], 1) for i in range(n)]

    def epoch(seed, number):
        source = Documents(rows, batch=8, seed=seed)
        indices = range(number * source.batches, (number + 1) * source.batches)
        return [i for index in indices for i in source.batch(index).inputs[:, 0].tolist()]

    assert sorted(epoch(0, 0)) == sorted(epoch(0, 1)) == list(range(n))
    assert epoch(0, 0) == epoch(0, 0)
    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)


@pytest.mark.parametrize("make", [lambda: Chain(4, batch=10, seed=0), lambda: Documents(lengths(50), batch=10, seed=0)])
def test_processes_share_the_rows_of_a_batch_and_the_index_is_the_whole_position(make):
    for index in (7, 0, 23):
        whole = make().batch(index)
        parts = [make().batch(index, rank=r, world=3) for r in range(3)]
        for r, part in enumerate(parts):
            width = part.inputs.shape[1]
            assert part.inputs.equal(whole.inputs[r::3, :width])
            assert part.mask.equal(whole.mask[r::3, :width])
            assert not whole.mask[r::3, width:].any()
        assert sum(len(p.inputs) for p in parts) == len(whole.inputs)


def test_held_out_documents_are_not_trained_on(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(50)])
    train, val, _ = data.split(DataConfig(path=path), text.byte_tokenizer(), seed=0)
    assert (len(train), len(val)) == (47, 3)
    assert not {tuple(r.ids) for r in train} & {tuple(r.ids) for r in val}


def test_the_generator_depends_on_the_key_alone():
    draw = lambda *key: torch.rand(3, generator=runtime.seeded(*key)).tolist()  # noqa: E731
    assert draw(0, "noise", 1) == draw(0, "noise", 1)
    assert len({tuple(draw(*key)) for key in ((0, "a"), (0, "b"), (1, "a"), (0, "a", 1), (0,), (1,))}) == 6


# Tokenizers


def test_bytes_round_trip_any_text():
    tokenizer = text.byte_tokenizer()
    sample = "né\t\x00\n 漢字 🙂  x"
    ids = tokenizer.encode(sample).ids
    assert ids == [3 + b for b in sample.encode()]
    assert tokenizer.decode(ids) == sample
    assert text.vocab_size(tokenizer) == 259


def test_a_trained_tokenizer_keeps_ouros_special_ids_and_single_digits(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "the cat sat on the mat 1234 times, the end"}] * 3)
    text.train_tokenizer(path, 270, tmp_path / "t.json")
    tokenizer = text.load_tokenizer(str(tmp_path / "t.json"))
    assert text.vocab_size(tokenizer) == 270
    assert [tokenizer.token_to_id(t) for t in (text.EOS, text.IM_START, text.IM_END)] == [0, 1, 2]
    assert len(tokenizer.encode("1234").ids) == 4
    assert tokenizer.decode(tokenizer.encode("the cat é🙂").ids) == "the cat é🙂"
    with pytest.raises(UserError, match="is there already: nothing saved is overwritten"):
        text.train_tokenizer(path, 270, tmp_path / "t.json")
    with pytest.raises(UserError, match="vocab 258 is too small"):
        text.train_tokenizer(path, 258, tmp_path / "u.json")


# Refusals

LINE = '{"question": "q", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "none.jsonl is not there, or of an unknown kind: give a .jsonl"),
        ("a.csv", b"x", "a.csv is not there, or of an unknown kind"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b"\n \n", "a.jsonl is empty"),
        ("a.txt", b" \n", "a.txt is empty"),
        ("a.json", b"[]", "a.json is empty"),
        ("a.jsonl", LINE.encode() * 2 + b"\xff\n", "a.jsonl line 3 is not UTF-8"),
        ("a.txt", b"a\nb\n\xe9", "a.txt line 3 is not UTF-8"),
        ("a.jsonl", LINE.encode() + b"\n{oops\n", "a.jsonl line 3 is not JSON"),
        ("a.json", b"[\n{},\n!]", "a.json line 3 is not JSON"),
        ("a.json", b'{"a": 1}', "a.json line 1 has no key 'text': each needs a text there; its keys are a"),
        ("a.json", b'{\n"a": 1}', "a.json holds one dict: give a list of records, or a record on each line"),
        ("a.json", b"3", "a.json holds one float: give a list"),
        ("a.jsonl", b"[1]\n", "a.jsonl line 1 is a list: each must be an object"),
        (
            "a.jsonl",
            b'{"foo": "x", "bar": "y"}\n',
            "line 1 has no key 'text': each needs a text there; its keys are foo, bar",
        ),
        ("a.jsonl", LINE.encode() + b'{"question": "q"}\n', "line 2 has no key 'answer'"),
        ("a.jsonl", LINE.encode() + b'{"question": "q", "answer": 3}\n', "line 2 has no text under 'answer'"),
    ],
)
def test_a_file_is_refused_in_a_sentence_with_the_place(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        text.read_documents(tmp_path / name)


def test_a_file_without_a_target_token_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"problem": "p" * 500, "solution": "s"}])
    with pytest.raises(UserError, match=r"has no target token: give longer texts"):
        encode(path, DataConfig(length=30))


def test_a_token_outside_the_vocabulary_is_refused(tmp_path):
    checkpoint.save(LoopedTransformer(ModelConfig(vocab_size=100)), tmp_path / "a", text.byte_tokenizer())
    path = write(tmp_path / "a.jsonl", [{"text": "z"}])
    message = "a has a vocabulary of 100, the tokenizer one of 259: give its own"
    for name in ("auto", "bytes"):
        with pytest.raises(UserError, match=message):
            data.pick_tokenizer(DataConfig(path=path, tokenizer=name), tmp_path / "a")


def test_tokenizers_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(
        UserError, match=r"nowhere is not a tokenizer \(No such file.*: give a tokenizer.json, or 'bytes'"
    ):
        text.load_tokenizer("nowhere")
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        text.load_tokenizer(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match=r"tokenizer.json is not a tokenizer \(No such file"):
        text.pick_tokenizer("auto", tmp_path, text.byte_tokenizer())
    path = write(tmp_path / "a.jsonl", [{"problem": "p", "solution": "s"}])
    with pytest.raises(UserError, match="the tokenizer has none of"):
        encode(path, tokenizer=data.chain_tokenizer())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"length": 1}, "--data.length 1 is out of its range: give a number 2 or more"),
        ({"operands": 1}, "--data.operands 1 is out of its range: give a number 2 or more"),
        ({"val_rows": 0}, "--data.val-rows 0 is out of its range: give a number 1 or more"),
        ({"prompt_key": "q"}, "--data.prompt-key q came without --data.response-key"),
        ({"val": "v.jsonl"}, "--data.val v.jsonl came without --data.path"),
        ({"tokenizer": "bytes"}, "--data.tokenizer bytes came without --data.path"),
    ],
)
def test_data_flags_out_of_range_are_refused_when_a_configuration_is_made(flags, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**flags)


def test_every_process_needs_a_row_of_those_that_are_not_held_out(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    with pytest.raises(UserError, match=r"has 1 training rows for 2 processes: give more or --data.val"):
        data.split(DataConfig(path=path), text.byte_tokenizer(), seed=0, world=2)
