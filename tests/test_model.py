"""The looped model's own laws, and its checkpoint folders."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import call
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import model
from data import chain_tokenizer
from model import LoopedTransformer, ModelConfig
from support import checkpoint
from support.runtime import DTYPES, UserError
from support.text import byte_tokenizer

SHAPE = ModelConfig(layers=2, loops=4, width=16, heads=4, kv_heads=2, vocab_size=11, init_std=0.3)


@pytest.fixture
def net():
    net = LoopedTransformer(SHAPE, generator=torch.Generator().manual_seed(0)).double()
    torch.nn.init.normal_(net.early_exit_gate.bias, generator=torch.Generator().manual_seed(1))
    return net


@pytest.fixture
def ids():
    return torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(2))


def test_looped_equals_unrolled(net, ids):
    out = net(ids)
    state, states = net.embed_tokens(ids), []
    cos, sin = model.rotary(torch.arange(7), 4, 1e6)
    for _ in range(4):
        for layer in net.layers:
            state = layer(state, cos, sin)
        state = net.norm(state)
        states.append(state)
    assert_close(out.hidden, torch.stack(states, 2))
    gate = torch.stack([net.early_exit_gate(h)[..., 0] for h in states], 2)
    assert_close(out.gate, gate)
    assert out.hidden.shape == (3, 7, 4, 16)


def test_more_loops_leave_the_earlier_ones_alone(net, ids):
    short, long = net(ids, loops=2), net(ids, loops=6)
    assert_close(short.hidden, long.hidden[:, :, :2], rtol=0, atol=0)


def test_going_on_from_a_state_equals_having_run_through(net, ids):
    whole = net(ids)
    rest = net(whole.hidden[:, :, 0], loops=3)
    assert_close(rest.hidden, whole.hidden[:, :, 1:])
    assert_close(rest.gate, whole.gate[:, :, 1:])


def test_a_token_sees_nothing_that_comes_after_it(net, ids):
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    before, after = net(ids).hidden, net(changed).hidden
    assert_close(before[:, :4], after[:, :4], rtol=0, atol=0)
    assert (before[:, 4:] != after[:, 4:]).any(-1).all(), "and everything from it on does change, in every loop"


def test_rows_of_a_batch_do_not_mix(net, ids):
    assert_close(net(ids).hidden[1:2], net(ids[1:2]).hidden)


def test_noise_enters_only_what_is_fed_to_the_next_loop(net, ids):
    clean, noisy = net(ids), net(ids, noise_std=0.1, generator=torch.Generator().manual_seed(3))
    assert_close(noisy.hidden[:, :, 0], clean.hidden[:, :, 0], rtol=0, atol=0)
    assert_close(noisy.gate[:, :, 0], clean.gate[:, :, 0], rtol=0, atol=0)
    noise = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    second = net(clean.hidden[:, :, 0] + 0.1 * noise, loops=1)
    assert_close(noisy.hidden[:, :, 1:2], second.hidden)
    message = "the gate reads the state before the next noise"
    assert_close(noisy.gate[:, :, 1:2], second.gate, msg=lambda m: f"{message}: {m}")


def test_grouped_query_heads_equal_full_heads_with_repeated_keys_and_values(net, ids):
    full = LoopedTransformer(replace(SHAPE, kv_heads=4)).double()
    weights = net.state_dict()
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weights[name].unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(weights)
    assert_close(full(ids).hidden, net(ids).hidden)


def test_gate_and_logits_are_float32_under_autocast(net, ids):
    net = net.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = net(ids)
        assert out.gate.dtype == net.logits(out.hidden).dtype == torch.float32


def test_the_policy_gradient_reaches_the_backbone_and_the_embedding_through_the_gate(net, ids):
    model.exit_logpdf(net(ids).gate)[..., 2].sum().backward()
    untouched = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert untouched == {"lm_head.weight"}


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_checkpoint_loads_bit_for_bit_under_ouros_names(tmp_path, ids, tied):
    net = LoopedTransformer(replace(SHAPE, tied=tied, exit_threshold=0.5))
    checkpoint.save(net, tmp_path / "a", chain_tokenizer())
    names = load_file(tmp_path / "a" / "model.safetensors").keys()
    assert len(names) == 11 * 2 + 5 - tied
    assert "model.layers.1.post_attention_layernorm_2.weight" in names
    assert ("lm_head.weight" in names) != tied
    again = checkpoint.load(tmp_path / "a")
    assert again.config == net.config
    for (name, a), (other, b) in zip(net.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert a.equal(b)
        assert b.requires_grad
    assert net(ids).hidden.equal(again(ids).hidden)
    written = {p.name for p in (tmp_path / "a").iterdir()}
    assert written == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert not [p for p in tmp_path.iterdir() if p.name != "a"], "no temporary folder stays behind"
    assert len({p.stat().st_mode for p in (tmp_path / "a").iterdir()}) == 1, "who may read one file may read all"


def test_config_json_has_every_key_that_the_published_one_has(tmp_path):
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["layer_types"] == ["full_attention"] * 2
    assert config["auto_map"]["AutoModelForCausalLM"] == "ByteDance/Ouro-1.4B--modeling_ouro.OuroForCausalLM"
    keys = """architectures model_type hidden_size intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads head_dim hidden_act vocab_size max_position_embeddings rope_theta rope_scaling rms_norm_eps
        initializer_range tie_word_embeddings attention_dropout use_sliding_window sliding_window layer_types
        total_ut_steps early_exit_threshold bos_token_id eos_token_id use_cache torch_dtype transformers_version
        auto_map"""
    assert config.keys() == {*keys.split()}


def test_parameter_counts_of_the_published_shapes():
    for layers, tensors, parameters in ((24, 269, 1_434_652_673), (48, 533, 2_667_974_657)):
        shape = ModelConfig(layers=layers, width=2048, heads=16, ffn=5632, vocab_size=49152)
        with torch.device("meta"):
            net = LoopedTransformer(shape)
        assert len(list(net.parameters())) == tensors
        assert sum(p.numel() for p in net.parameters()) == parameters


def test_the_feed_forward_width_of_ouro_is_the_default_ratio():
    assert ModelConfig(width=2048, heads=16).resolved().ffn == 5632


# Checkpoints of other programs


def parameters(net):
    return {name: p.detach() for name, p in net.named_parameters()}


def same(net, other):
    assert net.config == other.config
    for (name, a), (_, b) in zip(net.named_parameters(), other.named_parameters(), strict=True):
        assert a.dtype == b.dtype, name
        assert a.equal(b), name


def test_a_large_checkpoint_is_sharded_with_an_index_and_loads_the_same(tmp_path, monkeypatch):
    net = LoopedTransformer(SHAPE)
    checkpoint.save(net, tmp_path / "one")
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 8000)
    checkpoint.save(net, tmp_path / "many")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert [f.name for f in files] == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "many" / checkpoint.INDEX).read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(w.numel() * 4 for w in whole.values())
    checkpoint.save(net, tmp_path / "half", dtype=torch.bfloat16)
    half = json.loads((tmp_path / "half" / checkpoint.INDEX).read_text())
    assert half["metadata"]["total_size"] == index["metadata"]["total_size"] / 2
    for file in files:
        part = load_file(file)
        assert {key for key, name in index["weight_map"].items() if name == file.name} == part.keys()
        assert sum(w.numel() * 4 for w in part.values()) <= 8000
    same(checkpoint.load(tmp_path / "one"), checkpoint.load(tmp_path / "many"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_precision_is_read_and_written(tmp_path, dtype):
    net = LoopedTransformer(SHAPE)
    checkpoint.save(net, tmp_path / "a", dtype=dtype)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    as_stored, trained = checkpoint.load(tmp_path / "a", dtype=None), checkpoint.load(tmp_path / "a")
    for (name, p), (_, q), (_, r) in zip(*(m.named_parameters() for m in (net, as_stored, trained)), strict=True):
        assert q.dtype == dtype, name
        assert r.dtype == torch.float32, name
        assert q.equal(p.to(dtype)), name
        assert r.equal(p.to(dtype).float()), name


def test_export_keeps_bf16_bit_for_bit_and_copies_what_stands_beside(tmp_path, monkeypatch, capsys):
    net = LoopedTransformer(replace(SHAPE, bos_token_id=None, eos_token_id=(0, 2), exit_threshold=0.7))
    checkpoint.save(net, tmp_path / "a", dtype=torch.bfloat16)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "modeling_ouro.py"):
        (tmp_path / "a" / name).write_text(f"{{}}  {name}")
    for source, dtype, out in (("a", "bf16", "b"), ("a", "fp32", "c"), ("c", "bf16", "d")):
        call(monkeypatch, checkpoint, "export", tmp_path / source, tmp_path / out, "--dtype", dtype)
    c = load_file(tmp_path / "c" / "model.safetensors")
    assert {x.dtype for x in c.values()} == {torch.float32}
    for other in ("b", "d"):
        same(checkpoint.load(tmp_path / "a", dtype=None), checkpoint.load(tmp_path / other, dtype=None))
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (tmp_path / other / name).read_text() == f"{{}}  {name}"
        assert not (tmp_path / other / "modeling_ouro.py").exists(), "no code is copied"
        assert (tmp_path / other / "config.json").read_bytes() == (tmp_path / "a" / "config.json").read_bytes()
        original, again = (load_file(tmp_path / x / "model.safetensors") for x in ("a", other))
        assert original.keys() == again.keys()
        assert all(original[key].equal(again[key]) for key in original)
    assert f"{tmp_path / 'd'}: " in capsys.readouterr().out


def test_the_published_cases_files_load_and_come_back_bit_for_bit(golden, tmp_path):
    net = checkpoint.load(golden / "ouro_tiny", dtype=None)
    checkpoint.save(net, tmp_path / "a", source=golden / "ouro_tiny")
    original, again = (load_file(f / "model.safetensors") for f in (golden / "ouro_tiny", tmp_path / "a"))
    assert original.keys() == again.keys()
    assert all(original[key].equal(again[key]) for key in original)
    theirs, ours = (json.loads((f / "config.json").read_text()) for f in (golden / "ouro_tiny", tmp_path / "a"))
    assert {key: ours[key] for key in theirs if key != "auto_map"} == {
        k: v for k, v in theirs.items() if k != "auto_map"
    }


def test_a_tied_head_may_be_stored_twice_but_not_differ(tmp_path):
    net = LoopedTransformer(replace(SHAPE, tied=True))
    checkpoint.save(net, tmp_path / "a")
    rewrite(tmp_path / "a", lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    again = checkpoint.load(tmp_path / "a")
    same(again, net)
    assert again.lm_head.weight is again.embed_tokens.weight
    rewrite(tmp_path / "a", lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"] + 1})
    with pytest.raises(UserError, match=r"says tie_word_embeddings, but its lm_head.weight differs"):
        checkpoint.load(tmp_path / "a")


def test_rope_theta_is_found_where_newer_transformers_write_it(tmp_path):
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a")

    def change(c):
        del c["rope_theta"]
        c["rope_parameters"] = {"rope_theta": 5000.0, "rope_type": "default"}

    spoil(tmp_path / "a", change)
    assert checkpoint.load_config(tmp_path / "a").rope_theta == 5000
    spoil(tmp_path / "a", lambda c: c.update(rope_theta=7000.0))
    assert checkpoint.load_config(tmp_path / "a").rope_theta == 7000, "the published place goes first"


def test_as_stored_means_the_widest_precision_stored(tmp_path):
    net = LoopedTransformer(SHAPE)
    checkpoint.save(net, tmp_path / "a", dtype=torch.bfloat16)
    rewrite(tmp_path / "a", lambda w: w | {"model.norm.weight": torch.full((16,), 1 + 2**-20)})
    again = checkpoint.load(tmp_path / "a", dtype=None)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert again.norm.weight.equal(torch.full((16,), 1 + 2**-20))


def test_the_end_of_text_may_be_several_tokens(tmp_path):
    net = LoopedTransformer(replace(SHAPE, vocab_size=259, eos_token_id=(0, 2)))
    checkpoint.save(net, tmp_path / "a", byte_tokenizer())
    assert checkpoint.load_config(tmp_path / "a").eos_token_id == (0, 2)
    assert json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"


def test_a_new_tokenizer_takes_only_the_generation_settings_along(tmp_path):
    (tmp_path / "old").mkdir()
    for name in checkpoint.COMPANIONS:
        (tmp_path / "old" / name).write_text("old")
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a", byte_tokenizer(), source=tmp_path / "old")
    old = {p.name for p in (tmp_path / "a").iterdir() if p.read_bytes() == b"old"}
    assert old == {"generation_config.json"}
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "b", source=tmp_path / "old")
    assert {p.name for p in (tmp_path / "b").iterdir() if p.read_bytes() == b"old"} == {*checkpoint.COMPANIONS}


def test_the_gate_is_exact_where_the_model_is_bf16():
    net = LoopedTransformer(SHAPE).bfloat16()
    torch.nn.init.normal_(net.early_exit_gate.weight)
    hidden = torch.randn(50, 16).bfloat16()
    exact = (hidden.double() @ net.early_exit_gate.weight[0].double()) + net.early_exit_gate.bias.double()
    assert_close(net.gate(hidden).double(), exact, rtol=1e-5, atol=1e-5)


def test_a_folder_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't be written .*: make room or give another place"):
        checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "file" / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


IMPOSSIBLE = """num_hidden_layers 2.0|true|0|null
vocab_size null|-3|"259"
head_dim 8.0|0|7
total_ut_steps 4.5
max_position_embeddings null|64.5
rope_theta 0|-1|null|"x"
rms_norm_eps null|0
tie_word_embeddings 1
early_exit_threshold null|"0.5"|1.5
eos_token_id "x"|[]|{}|-1
bos_token_id "x"
quantization_config {"quant_method": "fp8"}
attention_bias true
layer_types 5|"full_attention"
hidden_size 17"""


@pytest.mark.parametrize(
    ("key", "value"),
    [(k, v) for line in IMPOSSIBLE.splitlines() for k, _, vs in [line.partition(" ")] for v in vs.split("|")],
)
def test_a_value_that_a_key_cannot_have_is_refused_by_its_name(tmp_path, key, value):
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a")
    spoil(tmp_path / "a", lambda c: c.update({key: json.loads(value)}))
    if key == "hidden_size":
        spoil(tmp_path / "a", lambda c: c.pop("head_dim"))
    with pytest.raises(UserError, match=f"config.json (says {key} |has a shape that no model can have)"):
        checkpoint.load_config(tmp_path / "a")


def test_null_means_the_default_where_other_programs_write_it(tmp_path):
    checkpoint.save(LoopedTransformer(replace(SHAPE, kv_heads=4)), tmp_path / "a")
    spoil(tmp_path / "a", lambda c: c.update(head_dim=None, num_key_value_heads=None))
    assert checkpoint.load_config(tmp_path / "a") == replace(SHAPE, kv_heads=4).resolved()


def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(tmp_path):
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    with pytest.raises(UserError, match="is a pointer of git-lfs, not the weights: run git lfs pull"):
        checkpoint.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: next(f.glob("*00002-of*")).unlink(),
            r"names model-00002-of-\d+.safetensors, which is not in the folder",
        ),
        (lambda f: (f / checkpoint.INDEX).write_text("{"), "index.json is not JSON"),
        (lambda f: (f / checkpoint.INDEX).write_text("{}"), "has no weight_map of names to files"),
        (
            lambda f: reindex(f, lambda w: {k: f"../{v}" for k, v in w.items()}),
            r"names ../model-\d+-of-\d+.safetensors, which is not in",
        ),
        (
            lambda f: reindex(f, lambda w: {k: v for k, v in w.items() if k != "model.norm.weight"}),
            "disagree on model.norm.weight",
        ),
        (lambda f: next(f.glob("*00001-of*")).write_bytes(b"junk"), r"model-00001-of-\d+.safetensors is damaged"),
    ],
)
def test_a_damaged_index_or_shard_is_refused(tmp_path, monkeypatch, damage, message):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 8000)
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path / "a")


def reindex(folder, change):
    index = json.loads((folder / checkpoint.INDEX).read_text())
    (folder / checkpoint.INDEX).write_text(json.dumps(index | {"weight_map": change(index["weight_map"])}))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_loading_holds_little_more_than_the_model(tmp_path, dtype):
    """Peak memory of a process that loads 220 MB (in float32), over that of one that loads next to nothing."""
    shape = ModelConfig(layers=16, loops=2, width=512, heads=8, vocab_size=8192)
    net = LoopedTransformer(shape)
    checkpoint.save(net, tmp_path / "big", dtype=DTYPES[dtype])
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "small")
    script = "import sys, resource, pathlib; from support import checkpoint; "
    script += "checkpoint.load(pathlib.Path(sys.argv[1])); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peaks = [
        int(subprocess.run([sys.executable, "-c", script, tmp_path / name], capture_output=True, check=True).stdout)
        for name in ("small", "big")
    ]
    size = sum(p.numel() for p in net.parameters()) * 4 / 1024
    assert peaks[1] - peaks[0] < 1.2 * size


# Refusals


def rewrite(folder, change):
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def spoil(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "is not a checkpoint folder: it has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json holds a list, not an object"),
        (lambda f: spoil(f, lambda c: c.update(model_type="llama")), "model_type 'llama': only Ouro's 'ouro' is known"),
        (lambda f: spoil(f, lambda c: c.pop("model_type")), "model_type None: only Ouro's 'ouro' is known here"),
        (
            lambda f: spoil(f, lambda c: c.update(architectures=["LlamaForCausalLM"])),
            r"architectures \['LlamaForCausalLM'\]: only Ouro's",
        ),
        (lambda f: spoil(f, lambda c: c.update(hidden_act="gelu")), "hidden_act 'gelu': only Ouro's 'silu' is known"),
        (lambda f: spoil(f, lambda c: c.update(rope_scaling={"factor": 2})), "rope_scaling {'factor': 2}: only Ouro's"),
        (
            lambda f: spoil(f, lambda c: c.update(layer_types=["full_attention", "sliding_attention"])),
            r"layer_types \['sliding_attention'\]: only Ouro's",
        ),
        (
            lambda f: spoil(f, lambda c: c.update(rope_parameters={"rope_type": "yarn"})),
            "rope_type 'yarn': only Ouro's 'default' is known here",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "holds pytorch_model.bin, a pickle, which can run any code when it is loaded: only safetensors are",
        ),
        (
            lambda f: rewrite(f, lambda w: w | {"model.norm.weight": w["model.norm.weight"].to(torch.int8)}),
            "holds model.norm.weight as I8: only BF16, F16, F32 and F64 weights are read",
        ),
        (lambda f: spoil(f, lambda c: c.pop("vocab_size")), "lacks vocab_size: restore the file"),
        (lambda f: spoil(f, lambda c: c.update(hidden_size="16")), "says hidden_size '16': it must be a whole number"),
        (lambda f: spoil(f, lambda c: c.update(num_hidden_layers=3)), "does not match its config.json: missing"),
        (lambda f: spoil(f, lambda c: c.update(vocab_size=12)), r"shape \(11, 16\), its config.json says \(12, 16\)"),
        (
            lambda f: (f / "model.safetensors").unlink(),
            "has no model.safetensors: only safetensors checkpoints are read",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x02junk"), "is damaged"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]), "is damaged"),
        (lambda f: rewrite(f, lambda w: w | {"x": torch.ones(1)}), "missing none, extra x"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_what_is_wrong_with_it(tmp_path, damage, message):
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path / "a")


def test_nothing_saved_is_overwritten(tmp_path):
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a")
    with pytest.raises(UserError, match="is there already: nothing saved is overwritten"):
        checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 65}, "--model.width 65 is not divisible by --model.heads 4: try --model.width 68"),
        ({"heads": 4, "kv_heads": 3}, "--model.heads 4 is not divisible by --model.kv-heads 3"),
        ({"width": 12, "kv_heads": 0}, "heads of 3 channels: rotary positions need an even number"),
        ({"layers": 0}, "--model.layers 0 is out of its range: give a number 1 or more"),
        ({"loops": 0}, "--model.loops 0 is out of its range: give a number 1 or more"),
        ({"ffn": -1}, "--model.ffn -1 is out of its range: give a number 0 or more"),
    ],
)
def test_a_shape_that_no_model_can_have_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        LoopedTransformer(replace(SHAPE, **change))
