"""The looped model's own laws, and its checkpoint folders."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from helpers import call
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import model
from data import chain_tokenizer
from model import FEW_TOKENS, Linear, LoopedTransformer, ModelConfig
from support import checkpoint
from support.runtime import DTYPES, UserError
from support.text import byte_tokenizer, encode_chats, tokenize

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


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_few_tokens_are_multiplied_the_other_way_round_to_the_same_numbers(dtype, threads, monkeypatch):
    """Only in float32, without a gradient or autocast, and with more than one of them."""
    linear, plain, real = Linear(5, 7).to(dtype), [], torch.nn.functional.linear
    assert linear.bias is None
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: plain.append(x.numel() // 5) or real(x, w))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    most = FEW_TOKENS[threads - 1]
    for n in range(1, most + 3):
        for shape in ((n, 5), (1, n, 5), (n, 1, 5)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(n), dtype=torch.float32).to(dtype)
            with torch.no_grad():
                found = linear(x)
            assert found.shape == (*shape[:-1], 7)
            assert_close(found, linear(x), rtol=1e-5, atol=1e-6)
    turned = range(2, most + 1) if dtype == torch.float32 else ()
    assert plain == [n for n in range(1, most + 3) for _ in range(3) for _ in range(2 - (n in turned))]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.ones(2, 5, dtype=dtype)).dtype == (dtype if dtype == torch.float64 else torch.bfloat16)
    assert plain[-1] == 2, "autocast takes it as it is"


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
    beside = {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert written == {"config.json", "model.safetensors", *beside}
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


def split(folder):
    """What other programs write of a large checkpoint: several files and their index."""
    whole = load_file(folder / "model.safetensors")
    where = {name: f"model-{1 + i % 3:05}-of-00003.safetensors" for i, name in enumerate(sorted(whole))}
    for file in {*where.values()}:
        save_file({name: whole[name] for name in where if where[name] == file}, folder / file)
    (folder / checkpoint.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "model.safetensors").unlink()


def test_a_checkpoint_in_shards_loads_the_same_and_is_saved_in_one_file(tmp_path):
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "many")
    split(tmp_path / "many")
    net = checkpoint.load(tmp_path / "many")
    same(checkpoint.load(tmp_path / "a"), net)
    checkpoint.save(net, tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").glob("*.safetensors*")] == ["model.safetensors"]


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
    (tmp_path / "a" / "tokenizer.json").write_text(byte_tokenizer().to_str() + "\n\n")
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": [0, 2], "temperature": 0.6}')
    for name in ("chat_template.jinja", "modeling_ouro.py"):
        (tmp_path / "a" / name).write_text(f"{{}}  {name}")
    settings = ("tokenizer_class", "clean_up_tokenization_spaces", "model_input_names", "eos_token", "pad_token")
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(dict.fromkeys(settings)) + "  ")
    for source, dtype, out in (("a", "bf16", "b"), ("a", "fp32", "c"), ("c", "bf16", "d")):
        call(monkeypatch, checkpoint, "export", tmp_path / source, tmp_path / out, "--dtype", dtype)
    c = load_file(tmp_path / "c" / "model.safetensors")
    assert {x.dtype for x in c.values()} == {torch.float32}
    for other in ("b", "d"):
        same(checkpoint.load(tmp_path / "a", dtype=None), checkpoint.load(tmp_path / other, dtype=None))
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (tmp_path / other / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
        assert read(tmp_path / other, "generation_config.json") == {"eos_token_id": [0, 2], "temperature": 0.6}
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
    assert theirs["early_exit_threshold"] == 1.0
    theirs |= {"auto_map": ours["auto_map"], "early_exit_threshold": 2.0}
    assert {key: ours[key] for key in theirs} == theirs


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


PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": None, "rope_parameters": {"full_attention": PLAIN}},
        {"rope_theta": None, "rope_parameters": PLAIN},
        {"rope_theta": None, "rope_parameters": PLAIN | {"partial_rotary_factor": 1.0}},
        {"rope_theta": None, "rope_scaling": PLAIN},
        {"rope_theta": 10000, "rope_parameters": {"full_attention": PLAIN}},
        {"rope_theta": 10000, "rope_scaling": {"rope_type": "default"}},
        {"rope_theta": 10000, "rope_scaling": {"type": "default", "factor": 1.0}},
        {"rope_theta": 10000, "rope_scaling": {}, "rope_parameters": None, "partial_rotary_factor": 1},
        {"rope_theta": 10000, "rope_parameters": {"rope_type": "default", "rope_theta": None}},
    ],
)
def test_rotary_settings_are_found_wherever_they_stand(tmp_path, change):
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a")
    spoil(tmp_path / "a", lambda c: c.update(change))
    assert checkpoint.load(tmp_path / "a").config == replace(SHAPE, rope_theta=10000.0).resolved()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"rope_parameters": {"full_attention": PLAIN | {"rope_type": "yarn", "factor": 4}}},
            "rope_parameters full_attention rope_type 'yarn': only Ouro's 'default'",
        ),
        ({"rope_parameters": PLAIN | {"factor": 4.0}}, "rope_parameters factor 4.0: only Ouro's 1.0"),
        ({"rope_parameters": {"sliding_attention": PLAIN}}, "rope_parameters sliding_attention {.*}: only Ouro's None"),
        ({"rope_parameters": "yarn"}, "rope_parameters 'yarn': only Ouro's None"),
        ({"rope_parameters": {"rope_theta": 5000.0}}, "rope_parameters rope_theta 5000.0: only Ouro's 10000.0"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling factor 2: only Ouro's 1.0"),
        (
            {"rope_scaling": {"factor": 8.0, "rope_type": "llama3"}},
            "rope_scaling rope_type 'llama3': only Ouro's 'default'",
        ),
        ({"rope_scaling": 2.0}, "rope_scaling 2.0: only Ouro's None"),
        *(
            ({"rope_scaling": {key: kind}}, f"rope_scaling {key} '{kind}': only Ouro's 'default'")
            for key in ("type", "rope_type")
            for kind in ("linear", "dynamic", "yarn", "longrope", "llama3", "su", "mrope")
        ),
        (
            {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1]}},
            r"mrope_section \[1, 1\]: only Ouro's None",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5: only Ouro's 1.0"),
        ({"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5: only Ouro's 1.0"),
        ({"rope_type": "yarn"}, "rope_type 'yarn': only Ouro's 'default'"),
    ],
)
def test_rotary_positions_that_are_not_plain_are_refused(tmp_path, change, said):
    checkpoint.save(LoopedTransformer(replace(SHAPE, rope_theta=10000.0)), tmp_path / "a")
    spoil(tmp_path / "a", lambda c: c.update(change))
    with pytest.raises(UserError, match=f"config.json says .*{said} is known here"):
        checkpoint.load_config(tmp_path / "a")


@pytest.mark.parametrize("key", ["rope_theta", "num_hidden_layers", "total_ut_steps", "vocab_size"])
def test_what_changes_every_number_has_no_default(tmp_path, key):
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a")
    for change in (lambda c: c.update({key: None}), lambda c: c.pop(key)):
        spoil(tmp_path / "a", change)
        with pytest.raises(UserError, match=f"config.json lacks {key}: restore the file"):
            checkpoint.load_config(tmp_path / "a")


IGNORED = {  # what transformers reads, and what changes no number of the published code
    "attention_dropout": 0,
    "pruned_heads": {},
    "layer_types": [],
    "max_window_layers": 1,
    "sliding_window": 4096,
    "dtype": "bfloat16",
    "torch_dtype": "float16",
    "pad_token_id": 1,
    "chunk_size_feed_forward": 0,
    "quantization_config": None,
    "attention_bias": None,
    "temperature": 0.6,
    "unsloth_version": "2025.9",
}


def test_keys_that_change_nothing_are_ignored(tmp_path):
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a")
    spoil(tmp_path / "a", lambda c: c.update(IGNORED))
    path = tmp_path / "a" / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a mark that editors on Windows leave
    assert checkpoint.load(tmp_path / "a").config == SHAPE.resolved()


@pytest.mark.parametrize("value", [None, 1, 1.5, 2.0, float("inf")])
def test_a_threshold_of_one_and_more_and_null_all_mean_all_loops(tmp_path, value):
    net = LoopedTransformer(SHAPE)
    torch.nn.init.constant_(net.early_exit_gate.bias, 100.0)  # every gate says: leave
    checkpoint.save(net, tmp_path / "a")
    assert read(tmp_path / "a", "config.json")["early_exit_threshold"] == 2.0, "all loops in the published code, too"
    spoil(tmp_path / "a", lambda c: c.update(early_exit_threshold=value))
    again = checkpoint.load(tmp_path / "a")
    assert again.config.exit_threshold == 1.0
    assert model.exit_loop(again(torch.zeros(1, 2, dtype=torch.long)).gate, again.config.exit_threshold).eq(3).all()


def test_buffers_of_rotary_frequencies_beside_the_weights_are_ignored(tmp_path):
    net = LoopedTransformer(SHAPE)
    checkpoint.save(net, tmp_path / "a")
    split(tmp_path / "a")
    name, first = "model.layers.0.self_attn.rotary_emb.inv_freq", sorted((tmp_path / "a").glob("*.safetensors"))[0]
    save_file(load_file(first) | {name: torch.ones(2, dtype=torch.int64)}, first)
    reindex(tmp_path / "a", lambda w: w | {name: first.name})
    same(checkpoint.load(tmp_path / "a"), net)


# The ends of text


@pytest.mark.parametrize(("more", "ends"), [([7], (0, 7)), (7, (0, 7)), ([0, 3], (0, 3)), (0, 0), (None, 0)])
def test_the_ends_of_text_of_generation_config_join_those_of_config(tmp_path, more, ends):
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps({"eos_token_id": more, "pad_token_id": 5}))
    assert checkpoint.load(tmp_path / "a").config.eos_token_id == ends
    spoil(tmp_path / "a", lambda c: c.pop("eos_token_id"))
    alone = {(0, 7): 7, (0, 3): (0, 3), 0: more}[ends]
    assert checkpoint.load_config(tmp_path / "a").eos_token_id == alone, "none is made up"


@pytest.mark.parametrize(
    "content", ['{"eos_token_id": "x"}', '{"eos_token_id": [-1]}', '{"eos_token_id": []}', "{", "[]"]
)
def test_damaged_generation_settings_are_refused_by_their_file(tmp_path, content):
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config.json (says eos_token_id|is not JSON|holds a list)"):
        checkpoint.load_config(tmp_path / "a")


def test_what_has_chatmls_tokens_is_saved_so_that_other_programs_stop_at_a_turns_end(tmp_path):
    net = LoopedTransformer(replace(SHAPE, vocab_size=259))
    checkpoint.save(net, tmp_path / "a", byte_tokenizer())
    assert read(tmp_path / "a", "config.json")["eos_token_id"] == [0, 2]
    generation = {"bos_token_id": 0, "pad_token_id": 0, "eos_token_id": [0, 2]}
    assert read(tmp_path / "a", "generation_config.json") == generation
    settings = read(tmp_path / "a", "tokenizer_config.json")
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert (settings["eos_token"], settings["pad_token"]) == ("<|endoftext|>", "<|endoftext|>")
    assert checkpoint.load_config(tmp_path / "a").eos_token_id == (0, 2)


def test_the_chat_template_writes_what_the_trainer_reads(tmp_path):
    jinja2 = pytest.importorskip("jinja2")
    checkpoint.save(LoopedTransformer(replace(SHAPE, vocab_size=259)), tmp_path / "a", byte_tokenizer())
    template = read(tmp_path / "a", "tokenizer_config.json")["chat_template"]
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)  # as in transformers
    turns = [{"role": "system", "content": " Be {{brief}}.\n"}, {"role": "user", "content": "1+1\n\n= ?"}]
    chat = "<|im_start|>system\n Be {{brief}}.\n<|im_end|>\n<|im_start|>user\n1+1\n\n= ?<|im_end|>\n"
    assert template.render(messages=turns) == chat
    assert template.render(messages=turns, add_generation_prompt=True) == chat + "<|im_start|>assistant\n"
    ours = encode_chats(byte_tokenizer(), [[("user", "Hi"), ("assistant", "")]])[0][0][:-1]
    theirs = template.render(messages=[{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert tokenize(byte_tokenizer(), [theirs], special=True) == [ours]


def test_a_tokenizer_without_chatml_gets_no_template_and_no_end_of_a_turn(tmp_path):
    tokenizer = chain_tokenizer()
    checkpoint.save(LoopedTransformer(replace(SHAPE, eos_token_id=None)), tmp_path / "a", tokenizer)
    settings = read(tmp_path / "a", "tokenizer_config.json")
    assert "chat_template" not in settings
    assert settings["eos_token"] is settings["pad_token"] is None
    generation = {"bos_token_id": 0, "pad_token_id": None, "eos_token_id": None}
    assert read(tmp_path / "a", "generation_config.json") == generation
    assert checkpoint.load_config(tmp_path / "a").eos_token_id is None


def test_files_of_the_source_stay_but_a_turns_end_joins_their_ends(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "tokenizer.json").write_text(byte_tokenizer().to_str())
    (tmp_path / "old" / "tokenizer_config.json").write_text('{"chat_template": "theirs"}')
    net = LoopedTransformer(replace(SHAPE, vocab_size=259))
    checkpoint.save(net, tmp_path / "a", source=tmp_path / "old")
    settings = read(tmp_path / "a", "tokenizer_config.json")
    assert settings["chat_template"] == "theirs"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"], "what is missing is filled in"
    generation = {"bos_token_id": 0, "pad_token_id": 0, "eos_token_id": [0, 2]}
    assert read(tmp_path / "a", "generation_config.json") == generation, "written, as there was none"
    (tmp_path / "old" / "generation_config.json").write_text('{"eos_token_id": 0, "top_p": 0.7}')
    checkpoint.save(net, tmp_path / "b", source=tmp_path / "old")
    assert read(tmp_path / "b", "generation_config.json") == {"eos_token_id": [0, 2], "top_p": 0.7}
    assert checkpoint.load_config(tmp_path / "b").eos_token_id == (0, 2)


def test_folders_may_be_strings(tmp_path):
    net = LoopedTransformer(SHAPE)
    checkpoint.save(net, f"{tmp_path}/a")
    assert checkpoint.load_config(f"{tmp_path}/a") == SHAPE.resolved()
    checkpoint.save(checkpoint.load(f"{tmp_path}/a"), f"{tmp_path}/b", source=f"{tmp_path}/a")
    checkpoint.export(f"{tmp_path}/b", f"{tmp_path}/c", "fp32")
    same(checkpoint.load(tmp_path / "c"), net)
    with pytest.raises(UserError, match="c is there already"):
        checkpoint.export(f"{tmp_path}/b", f"{tmp_path}/c")
    with pytest.raises(UserError, match=r"x is not a checkpoint folder: it has no config.json"):
        checkpoint.load(f"{tmp_path}/x")


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
    (tmp_path / "old" / "generation_config.json").write_text('{"top_p": 0.7}')
    (tmp_path / "old" / "tokenizer_config.json").write_text("{}")
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a", byte_tokenizer(), source=tmp_path / "old")
    assert not [p for p in (tmp_path / "a").iterdir() if p.read_bytes() == b"old"]
    assert read(tmp_path / "a", "generation_config.json") == {"top_p": 0.7, "eos_token_id": [0, 2]}
    with pytest.raises(UserError, match=r"old/tokenizer.json is not a tokenizer"):
        checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "b", source=tmp_path / "old")
    (tmp_path / "old" / "tokenizer.json").write_text(chain_tokenizer().to_str())
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "b", source=tmp_path / "old")
    kept = {*checkpoint.COMPANIONS} - {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in (tmp_path / "b").iterdir() if p.read_bytes() == b"old"} == kept


def test_the_gate_is_exact_where_the_model_is_bf16():
    net = LoopedTransformer(SHAPE).bfloat16()
    torch.nn.init.normal_(net.early_exit_gate.weight)
    hidden = torch.randn(50, 16).bfloat16()
    exact = (hidden.double() @ net.early_exit_gate.weight[0].double()) + net.early_exit_gate.bias.double()
    assert_close(net.gate(hidden).double(), exact, rtol=1e-5, atol=1e-5)


def test_a_folder_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't be written .*: make room; what was saved before is intact"):
        checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "file" / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


IMPOSSIBLE = """num_hidden_layers 2.0|true|0|99999999999|1001
vocab_size -3|"259"|1000000000000
head_dim 8.0|0|7|1000000000
num_attention_heads 1000000000
total_ut_steps 4.5|65|99999999999|0
max_position_embeddings 64.5|1000000000000000
rope_theta 0|-1|"x"|NaN|Infinity|1e400|true
rms_norm_eps 0
tie_word_embeddings 1
early_exit_threshold "0.5"|-0.1|true|NaN
eos_token_id "x"|[]|{}|-1|4294967296|[[1]]
bos_token_id "x"
quantization_config {"quant_method": "fp8"}|"fp8"
attention_bias true
attention_dropout 0.1
use_sliding_window true
pruned_heads {"0": [1]}
early_exit_step 0
layer_types 5|"full_attention"|[[1]]|[1, "x"]
hidden_act "gelu"|["silu"]
hidden_size 17|1e9"""


@pytest.mark.parametrize(
    ("key", "value"),
    [(k, v) for line in IMPOSSIBLE.splitlines() for k, _, vs in [line.partition(" ")] for v in vs.split("|")],
)
def test_a_value_that_a_key_cannot_have_is_refused_by_its_name(tmp_path, key, value):
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a")
    spoil(tmp_path / "a", lambda c: c.update({key: json.loads(value)}))
    if (key, value) == ("hidden_size", "17"):
        spoil(tmp_path / "a", lambda c: c.pop("head_dim"))
    no_shape = (key, value) in (("hidden_size", "17"), ("head_dim", "7"))
    says = "has a shape that no model can have" if no_shape else f"says {key} "
    with pytest.raises(UserError, match=f"config.json {says}"):
        checkpoint.load_config(tmp_path / "a")


@pytest.mark.parametrize(
    "value", ["9" * 400, "-" + "9" * 400, "9" * 5000, "[" * 200 + "]" * 200, "[" * 100_000, '"\\ud800"']
)
def test_numbers_of_any_length_and_nests_of_any_depth_are_refused_in_a_sentence(tmp_path, value):
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    for key in ("vocab_size", "rope_theta", "eos_token_id", "rope_scaling", "architectures"):
        config = json.loads(path.read_text())
        (tmp_path / "a" / "config.json").write_text(json.dumps(config | {key: "HERE"}).replace('"HERE"', value))
        with pytest.raises(UserError, match=f"config.json (says {key} |is not JSON)") as error:
            checkpoint.load_config(tmp_path / "a")
        assert len(str(error.value)) < 400
        path.write_text(json.dumps(config))


def test_a_shape_that_is_not_that_of_the_weights_is_refused_before_a_model_of_it_is_built(tmp_path):
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a")
    for change in (
        {"num_hidden_layers": 1000},
        {"num_attention_heads": 10**6, "head_dim": 10**6},
        {"vocab_size": 10**6},
    ):
        spoil(tmp_path / "a", lambda c: c.update(change))  # noqa: B023
        start = time.perf_counter()
        with pytest.raises(
            UserError, match=r"does not match its config.json: missing model.layers|its config.json says \("
        ):
            checkpoint.load(tmp_path / "a")
        assert time.perf_counter() - start < 2


def test_null_means_the_default_where_other_programs_write_it(tmp_path):
    checkpoint.save(LoopedTransformer(replace(SHAPE, kv_heads=4)), tmp_path / "a")
    spoil(tmp_path / "a", lambda c: c.update(head_dim=None, num_key_value_heads=None, rms_norm_eps=None))
    spoil(tmp_path / "a", lambda c: c.update(max_position_embeddings=None, architectures=None, layer_types=None))
    assert checkpoint.load_config(tmp_path / "a") == replace(SHAPE, kv_heads=4).resolved()


def test_a_pointer_of_git_lfs_is_refused_by_its_name(tmp_path):
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="is damaged, or a pointer of git-lfs"):
        checkpoint.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: next(f.glob("*00002-of*")).unlink(), r"a has no model-00002-of-\d+.safetensors: restore it"),
        (lambda f: (f / checkpoint.INDEX).write_text("{"), "index.json is not JSON"),
        (lambda f: (f / checkpoint.INDEX).write_text("{}"), "has no weight_map of names to files"),
        (lambda f: reindex(f, lambda w: dict.fromkeys(w, "x" * 300)), r"a has no x{300}: restore it"),
        (
            lambda f: reindex(f, lambda w: {k: f"../{v}" for k, v in w.items()}),
            r"a has no ../model-\d+-of-\d+.safetensors: restore it",
        ),
        (
            lambda f: reindex(f, lambda w: {k: v for k, v in w.items() if k != "model.norm.weight"}),
            "disagree on its tensors",
        ),
        (lambda f: next(f.glob("*00001-of*")).write_bytes(b"junk"), r"model-00001-of-\d+.safetensors is damaged"),
    ],
)
def test_a_damaged_index_or_shard_is_refused(tmp_path, damage, message):
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "a")
    split(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path / "a")


def reindex(folder, change):
    index = json.loads((folder / checkpoint.INDEX).read_text())
    (folder / checkpoint.INDEX).write_text(json.dumps(index | {"weight_map": change(index["weight_map"])}))


@pytest.mark.slow
def test_loading_holds_little_more_than_the_model(tmp_path):
    """Peak memory of a process that loads 220 MB (in float32), over that of one that loads next to nothing."""
    shape = ModelConfig(layers=16, loops=2, width=512, heads=8, vocab_size=8192)
    net = LoopedTransformer(shape)
    for dtype in ("bf16", "fp32"):
        checkpoint.save(net, tmp_path / dtype, dtype=DTYPES[dtype])
    checkpoint.save(LoopedTransformer(SHAPE), tmp_path / "small")
    script = "import sys, resource, pathlib; from support import checkpoint; "
    script += "checkpoint.load(pathlib.Path(sys.argv[1])); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peaks = [
        int(subprocess.run([sys.executable, "-c", script, tmp_path / name], capture_output=True, check=True).stdout)
        for name in ("small", "bf16", "fp32")
    ]
    size = sum(p.numel() for p in net.parameters()) * 4 / 1024
    assert max(peaks[1:]) - peaks[0] < 1.2 * size


# Refusals


def read(folder, name):
    return json.loads((folder / name).read_text())


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
        (lambda f: spoil(f, lambda c: c.pop("model_type")), "model_type '': only Ouro's 'ouro' is known here"),
        (lambda f: spoil(f, lambda c: c.update(model_type=None)), "model_type '': only Ouro's 'ouro' is known here"),
        (
            lambda f: spoil(f, lambda c: c.update(architectures=["LlamaForCausalLM"])),
            r"architectures \['LlamaForCausalLM'\]: only Ouro's",
        ),
        (lambda f: spoil(f, lambda c: c.update(hidden_act="gelu")), "hidden_act 'gelu': only Ouro's 'silu' is known"),
        (
            lambda f: spoil(f, lambda c: c.update(layer_types=["full_attention", "sliding_attention"])),
            r"layer_types \['sliding_attention'\]: only Ouro's",
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
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            r"has no model.safetensors: restore it \(a pickle, .bin or .pt, can run any code: convert it\)",
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
        ({"layers": 0}, "--model.layers 0 is out of its range: give a number from 1 to 1000"),
        ({"loops": 0}, "--model.loops 0 is out of its range: give a number from 1 to 64"),
        ({"loops": 65}, "--model.loops 65 is out of its range: give a number from 1 to 64"),
        ({"ffn": -1}, r"--model.ffn -1 is out of its range: give a number from 0 to 1e\+06"),
    ],
)
def test_a_shape_that_no_model_can_have_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        LoopedTransformer(replace(SHAPE, **change))


# Folders that were changed at random

ODD = '0 1 -1 65 99999999999 1e9 -1e400 1e-300 NaN Infinity true null [] {} [0] [[]] "x" "\\ud800" 0.5'.split()
ODD += ["9" * 400, "9" * 5000, "[" * 5000, '{"rope_type": "yarn"}', '{"full_attention": {"rope_theta": 10}}']


def mutate(folder, rng):
    """Change one file of a folder: some bytes, or the values of one or two keys."""
    file = rng.choice([folder / name for name in ("config.json", "generation_config.json", "model.safetensors")])
    content = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.6:
        config, known = json.loads(content), {"rope_parameters", "quantization_config", "partial_rotary_factor"}
        changed = {key: f"<{i}>" for i, key in enumerate(rng.sample(sorted(known | config.keys()), rng.choice([1, 2])))}
        text = json.dumps(config | changed)
        for mark in changed.values():
            text = text.replace(json.dumps(mark), rng.choice(ODD))
        return file.write_text(text)
    head = 8 + int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else len(content)
    for _ in range(rng.choice([1, 1, 3, 30])):
        at, more = rng.randrange(head if rng.random() < 0.8 else len(content)), rng.randbytes(rng.choice([1, 8, 100]))
        kind = rng.choice(["flip", "cut", "insert", "drop"])
        end = {"flip": at + 1, "cut": len(content) + 1, "insert": at, "drop": at + len(more)}[kind]
        content = content[:at] + {"flip": more[:1], "insert": more}.get(kind, b"") + content[end:]
        head = max(1, min(head, len(content)))
        content = content or b"x"
    return file.write_bytes(content)


@pytest.mark.slow
def test_a_folder_changed_at_random_loads_and_runs_or_is_refused_within_two_seconds(tmp_path):
    def ring(*_):
        raise TimeoutError

    good, rng, outcomes = tmp_path / "good", random.Random(0), []
    checkpoint.save(LoopedTransformer(SHAPE), good)
    signal.signal(signal.SIGALRM, ring)
    for i in range(300):
        shutil.copytree(good, tmp_path / "a")
        mutate(tmp_path / "a", rng)
        start = time.process_time()
        signal.alarm(60)  # a loop that doesn't end fails here
        try:
            with torch.no_grad():
                checkpoint.load(tmp_path / "a")(torch.zeros(1, 4, dtype=torch.long))
            outcomes.append("runs")
        except UserError as error:
            outcomes.append(str(error))
        signal.alarm(0)
        assert time.process_time() - start < 2, i
        shutil.rmtree(tmp_path / "a")
    refused = [outcome for outcome in outcomes if outcome != "runs"]
    assert 25 < len(refused) < 275, "both are tried"
    assert not [problem for problem in refused if len(problem) > 1000 or "\n" in problem], "each is one sentence"
