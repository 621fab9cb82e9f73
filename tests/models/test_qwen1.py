"""Qwen1 against transformers' Qwen2 within the trained length, and its own formulas beyond it."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import qwen_jax
from qwen_jax.checkpoint.conversion import convert
from qwen_jax.checkpoint.writer import save_pretrained
from qwen_jax.config import RopeKind
from qwen_jax.hf_config import read_hf_config, write_hf_config
from qwen_jax.nn.cache import init_cache
from tests.models.passes import TOLERANCE, divergence_ratio, padding, random_ids
from tests.renderings.qwen1 import Qwen1

TRAINED = 10

# As the published files have them, sizes aside.
FIELDS = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 176,
    "kv_channels": 16,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 8192,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": TRAINED,
    "softmax_in_fp32": False,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.32.0",
    "use_cache": True,
    "use_cache_kernel": False,
    "use_cache_quantization": False,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": 320,
}


def random_tensors(fields, seed=0):
    """Every tensor of the published layout random, logits of unit scale."""
    torch.manual_seed(seed)
    D, P = fields["hidden_size"], fields["kv_channels"] * fields["num_attention_heads"]
    width, V = fields["intermediate_size"] // 2, fields["vocab_size"]

    def matrix(rows, columns):
        return torch.randn(rows, columns) / columns**0.5

    def norm():
        return 1 + 0.3 * torch.randn(D)

    tensors = {"transformer.wte.weight": matrix(V, D), "transformer.ln_f.weight": norm()}
    for i in range(fields["num_hidden_layers"]):
        layer = {
            "ln_1.weight": norm(),
            "attn.c_attn.weight": matrix(3 * P, D),
            "attn.c_attn.bias": 0.5 * torch.randn(3 * P),
            "attn.c_proj.weight": matrix(D, P),
            "ln_2.weight": norm(),
            "mlp.w1.weight": matrix(width, D),
            "mlp.w2.weight": matrix(width, D),
            "mlp.c_proj.weight": matrix(D, width),
        }
        tensors |= {f"transformer.h.{i}.{name}": tensor for name, tensor in layer.items()}
    tensors["lm_head.weight"] = matrix(V, D)
    logits, _ = Qwen1(tensors, fields)(torch.arange(8)[None])
    tensors["lm_head.weight"] /= logits.std()
    return tensors


def write_checkpoint(directory, tensors, fields):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads a random checkpoint with these fields: rendering, model, params, directory."""
    loaded = {}

    def load_(**changed):
        key = json.dumps(changed)
        if key not in loaded:
            fields = {**FIELDS, **changed}
            tensors = random_tensors(fields, seed=len(key))
            directory = write_checkpoint(tmp_path_factory.mktemp("qwen1"), tensors, fields)
            loaded[key] = (Qwen1(tensors, fields), *qwen_jax.load_pretrained(directory), directory)
        return loaded[key]

    return load_


def rendered(rendering, ids, mask=None, past=None):
    mask = None if mask is None else torch.as_tensor(mask)
    logits, past = rendering(torch.as_tensor(ids), mask, past)
    return logits.numpy(), past


def assert_close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


def as_qwen2(rendering):
    """The same weights in transformers' Qwen2."""
    fields = rendering.fields
    config = transformers.Qwen2Config(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"] // 2,
        num_hidden_layers=fields["num_hidden_layers"],
        num_attention_heads=fields["num_attention_heads"],
        num_key_value_heads=fields["num_attention_heads"],
        head_dim=fields["kv_channels"],
        rms_norm_eps=fields["layer_norm_epsilon"],
        rope_theta=float(fields["rotary_emb_base"]),
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"
    model = transformers.Qwen2ForCausalLM(config).eval()
    ends = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm"}
    inner = {
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.w1": "mlp.up_proj",
        "mlp.w2": "mlp.gate_proj",
        "mlp.c_proj": "mlp.down_proj",
    }
    state = {}
    for name, tensor in rendering.tensors.items():
        stem, _, kind = name.rpartition(".")
        if not stem.startswith("transformer.h."):
            state[f"{ends.get(stem, stem)}.{kind}"] = tensor
            continue
        _, _, i, place = stem.split(".", 3)
        if place == "attn.c_attn":
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[f"model.layers.{i}.self_attn.{letter}_proj.{kind}"] = part
        else:
            state[f"model.layers.{i}.{inner[place]}.{kind}"] = tensor
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize(
    ("length", "fields"),
    [
        (40, {"seq_length": 40, "rotary_emb_base": 1_000_000}),
        (23, {"seq_length": 2048}),
        (45, {"use_dynamic_ntk": False, "use_logn_attn": False}),
        (30, {"seq_length": 30, "kv_channels": 24, "layer_norm_epsilon": 1e-3}),
    ],
    ids=["at the trained length", "within it", "beyond it with both off", "wider heads"],
)
def test_without_stretching_it_equals_a_renamed_qwen2(load, length, fields):
    rendering, model, params, _ = load(**fields)
    reference = as_qwen2(rendering)
    ids = random_ids(model, (3, length))
    with torch.no_grad():
        expected = reference(torch.as_tensor(ids), output_hidden_states=True)
    out = model.apply({"params": params}, ids)
    assert_close(out.logits, expected.logits)
    assert 0.5 < np.asarray(out.logits).std() < 2
    for ours, theirs in zip(out.hidden_states, expected.hidden_states, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * max(1, theirs.std()))
    for side in ("left", "right"):
        mask = padding([length, 7, length - 2], length, side)
        with torch.no_grad():
            padded = reference(torch.as_tensor(ids), attention_mask=torch.as_tensor(mask)).logits
        real = mask.astype(bool)
        assert_close(model.apply({"params": params}, ids, mask).logits[real], padded[real])


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_dynamic_ntk": False}, {"use_logn_attn": False}],
    ids=["both", "logn", "ntk"],
)
def test_beyond_the_trained_length_it_equals_the_formulas(load, fields):
    rendering, model, params, _ = load(**fields)
    seen = set()
    for length in (10, 11, 20, 21, 40, 41, 77):
        ids = random_ids(model, (2, length), seed=length)
        expected, past = rendered(rendering, ids)
        assert_close(model.apply({"params": params}, ids).logits, expected)
        seen |= set(past.alphas)
    assert seen == ({1.0, 3.0, 7.0, 15.0} if rendering.fields["use_dynamic_ntk"] else {1.0})


def test_stretching_changes_the_logits(load):
    """Else the comparisons beyond the trained length would say nothing."""
    rendering, _, _, _ = load()
    ids = np.arange(40)[None]
    whole, _ = rendered(rendering, ids)
    for fields in ({"use_dynamic_ntk": False}, {"use_logn_attn": False}):
        other, _ = rendered(Qwen1(rendering.tensors, {**rendering.fields, **fields}), ids)
        assert np.abs(whole - other).max() > 0.05


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_stretched_by_their_own_lengths(load, side):
    rendering, model, params, _ = load()
    lengths = [45, 9, 10, 21, 40]
    ids, mask = random_ids(model, (5, 45)), padding(lengths, 45, side)
    expected, past = rendered(rendering, ids, mask)
    assert past.alphas == [15.0, 1.0, 1.0, 7.0, 7.0]
    real = mask.astype(bool)
    assert_close(model.apply({"params": params}, ids, mask).logits[real], expected[real])


def test_padding_within_the_trained_length_stretches_nothing(load):
    rendering, model, params, _ = load()
    ids, mask = random_ids(model, (2, 10)), padding([10, 3], 10, "left")
    expected, past = rendered(rendering, ids, mask)
    assert past.alphas == [1.0]
    real = mask.astype(bool)
    assert_close(model.apply({"params": params}, ids, mask).logits[real], expected[real])


@pytest.mark.parametrize("prompt", [4, 10, 11, 20, 33])
def test_decode_keeps_the_frequencies_of_the_prompt(load, prompt):
    rendering, model, params, _ = load()
    end = prompt + 14
    ids = random_ids(model, (2, end), seed=prompt)
    apply = jax.jit(model.apply)
    cache = init_cache(model.config, 2, 48, np.float32)
    expected, past = rendered(rendering, ids[:, :prompt])
    out = apply({"params": params}, ids[:, :prompt], cache=cache)
    assert_close(out.logits, expected)
    for i in range(prompt, end):
        expected, past = rendered(rendering, ids[:, i : i + 1], past=past)
        out = apply({"params": params}, ids[:, i : i + 1], cache=out.cache)
        assert_close(out.logits, expected)
    assert past.alphas == [rendering.alpha(prompt)]
    if rendering.alpha(prompt) != rendering.alpha(end):
        fresh, _ = rendered(rendering, ids)
        assert np.abs(fresh[:, -1] - np.asarray(out.logits)[:, -1]).max() > 0.01


def test_later_pieces_of_a_text_keep_the_frequencies_of_the_first(load):
    rendering, model, params, _ = load()
    ids = random_ids(model, (2, 30))
    out, past = None, None
    cache = init_cache(model.config, 2, 30, np.float32)
    for start, stop in ((0, 12), (12, 23), (23, 30)):
        expected, past = rendered(rendering, ids[:, start:stop], past=past)
        out = model.apply({"params": params}, ids[:, start:stop], cache=cache)
        assert_close(out.logits, expected)
        cache = out.cache


def test_cached_decode_behind_left_padding_counts_it(load):
    """Padding takes positions, for the rotation and for logn, yet does not stretch."""
    rendering, model, params, _ = load()
    lengths, total, end = [26, 8, 13], 26, 32
    ids, mask = random_ids(model, (3, end)), padding(lengths, total, "left")
    mask = np.concatenate([mask, np.ones((3, end - total), np.int32)], axis=1)
    cache = init_cache(model.config, 3, end, np.float32)
    expected, past = rendered(rendering, ids[:, :total], mask[:, :total])
    assert past.alphas == [7.0, 1.0, 3.0]
    out = model.apply({"params": params}, ids[:, :total], mask[:, :total], cache=cache)
    real = mask[:, :total].astype(bool)
    assert_close(out.logits[real], expected[real])
    for i in range(total, end):
        expected, past = rendered(rendering, ids[:, i : i + 1], mask[:, : i + 1], past)
        out = model.apply({"params": params}, ids[:, i : i + 1], cache=out.cache)
        assert_close(out.logits, expected)


def test_greedy_ids_equal_the_formulas_row_by_row(load):
    rendering, model, params, _ = load()
    prompts = [random_ids(model, n, seed=n).tolist() for n in (3, 9, 12, 25)]
    expected = [rendering.generate(prompt, 14) for prompt in prompts]
    assert qwen_jax.generate(model, params, prompts, max_new_tokens=14) == expected
    for prompt, ids in zip(prompts, expected, strict=True):
        assert qwen_jax.generate(model, params, [prompt], max_new_tokens=14) == [ids]
    assert len({token for ids in expected for token in ids}) > 8


def read_back(directory):
    return {
        name: tensor
        for path in directory.glob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(path).items()
    }


def assert_same_tensors(directory, expected):
    """The published layout, by safetensors alone."""
    found = read_back(directory)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_export_holds_the_published_layout(load, tmp_path):
    rendering, model, params, _ = load()
    save_pretrained(tmp_path / "out", model.config, params)
    assert_same_tensors(tmp_path / "out", rendering.tensors)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    # What may be said otherwise: the dtype's spelling, and what says nothing of the model.
    for name in ("hidden_size", "intermediate_size", "kv_channels", "layer_norm_epsilon",
                 "model_type", "no_bias", "num_attention_heads", "num_hidden_layers",
                 "rotary_emb_base", "rotary_pct", "seq_length", "tie_word_embeddings",
                 "use_dynamic_ntk", "use_logn_attn", "vocab_size", "architectures"):  # fmt: skip
        assert written[name] == FIELDS[name], name
    again, same = qwen_jax.load_pretrained(tmp_path / "out")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, params, same)


def test_convert_brings_every_bit_back(load, tmp_path):
    rendering, _, _, directory = load()
    convert(directory, tmp_path / "orbax", "orbax")
    convert(tmp_path / "orbax", tmp_path / "hf", "hf")
    assert_same_tensors(tmp_path / "hf", rendering.tensors)
    assert (tmp_path / "hf/config.json").read_bytes() == (directory / "config.json").read_bytes()


def test_half_precision_comes_back_too(tmp_path):
    fields = {**FIELDS, "bf16": True}
    tensors = {name: t.bfloat16() for name, t in random_tensors(fields).items()}
    source = write_checkpoint(tmp_path / "source", tensors, fields)
    convert(source, tmp_path / "orbax", "orbax")
    convert(tmp_path / "orbax", tmp_path / "hf", "hf")
    assert_same_tensors(tmp_path / "hf", tensors)
    model, params = qwen_jax.load_pretrained(source, model_dtype(source))
    save_pretrained(tmp_path / "saved", model.config, params)
    assert_same_tensors(tmp_path / "saved", tensors)


def model_dtype(directory):
    return read_hf_config(json.loads((directory / "config.json").read_text())).dtype


def test_buffers_of_old_files_are_ignored(load, tmp_path):
    rendering, model, params, _ = load()
    buffers = {
        "transformer.rotary_emb.inv_freq": torch.rand(8),
        "transformer.h.0.attn.rotary_emb.inv_freq": torch.rand(8),
        "transformer.h.1.attn.logn_tensor": torch.rand(1, 32, 1, 1),
        "transformer.logn_tensor": torch.rand(32),
        "transformer.h.2.attn.masked_bias": torch.tensor(-1e4),
    }
    directory = write_checkpoint(tmp_path, {**rendering.tensors, **buffers}, rendering.fields)
    again, same = qwen_jax.load_pretrained(directory)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, params, same)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"transformer.h.1.attn.c_attn.weight": torch.zeros(191, 64)}),
            r"transformer.h.1.attn.c_attn.weight has shape \[191, 64\].*\[192, 64\]",
        ),
        (
            lambda t: t.update({"transformer.h.0.attn.c_attn.bias": torch.zeros(64)}),
            r"transformer.h.0.attn.c_attn.bias has shape \[64\].*\[192\]",
        ),
        (
            lambda t: t.update({"transformer.h.0.mlp.w2.weight": torch.zeros(176, 64)}),
            r"transformer.h.0.mlp.w2.weight has shape \[176, 64\].*\[88, 64\]",
        ),
        (
            lambda t: t.pop("transformer.h.2.attn.c_attn.bias"),
            r"missing tensors for qwen: transformer.h.2.attn.c_attn.bias",
        ),
        (
            lambda t: t.update({"transformer.h.0.mlp.w1.bias": torch.zeros(88)}),
            r"unknown tensors for qwen: transformer.h.0.mlp.w1.bias",
        ),
    ],
    ids=["c_attn", "c_attn bias", "doubled width", "missing", "unknown"],
)
def test_wrong_tensors_are_named(load, tmp_path, change, message):
    rendering, *_ = load()
    tensors = dict(rendering.tensors)
    change(tensors)
    directory = write_checkpoint(tmp_path, tensors, rendering.fields)
    with pytest.raises(qwen_jax.UserError, match=message) as caught:
        qwen_jax.load_pretrained(directory)
    assert "\n" not in str(caught.value)


# Sizes of the published config.json files.
RELEASES = {
    "Qwen-1_8B": {
        "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
        "intermediate_size": 11008, "seq_length": 8192, "fp16": True,
    },
    "Qwen-7B": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "intermediate_size": 22016, "seq_length": 8192, "bf16": True,
        "max_position_embeddings": 32768,
    },
    "Qwen-7B, first release": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "intermediate_size": 22016, "seq_length": 2048,
    },
    "Qwen-14B": {
        "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40,
        "intermediate_size": 27392, "seq_length": 2048, "vocab_size": 152064, "bf16": True,
    },
    "Qwen-72B": {
        "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
        "intermediate_size": 49152, "seq_length": 32768, "vocab_size": 152064,
        "rotary_emb_base": 1000000, "max_position_embeddings": 32768, "torch_dtype": "bfloat16",
        "use_dynamic_ntk": False, "use_logn_attn": False, "softmax_in_fp32": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASES)
def test_published_configs_are_read_and_written(name):
    own = RELEASES[name]
    raw = {**FIELDS, "kv_channels": 128, "vocab_size": 151936, "layer_norm_epsilon": 1e-6, **own}
    config = read_hf_config(raw)
    assert config.head_dim == 128
    assert config.num_attention_heads == config.num_key_value_heads == raw["hidden_size"] // 128
    assert config.intermediate_size * 2 == raw["intermediate_size"]
    assert config.vocab_size == raw["vocab_size"]
    assert config.rope.theta == raw["rotary_emb_base"]
    assert config.rms_norm_eps == 1e-6
    assert config.qkv_bias and not config.output_bias and not config.tie_word_embeddings
    stretched = raw["use_dynamic_ntk"]
    assert config.rope.kind is (RopeKind.STEPPED_NTK if stretched else RopeKind.DEFAULT)
    trained = raw["seq_length"] if stretched else None
    assert config.rope.original_max_position_embeddings == config.logn_length == trained
    flags = {"bf16": "bfloat16", "fp16": "float16"}
    flagged = next((dtype for flag, dtype in flags.items() if raw[flag]), "float32")
    assert config.dtype == raw.get("torch_dtype", flagged)
    assert read_hf_config(write_hf_config(config)) == config


def test_the_trained_length_is_only_a_field():
    first, later = (read_hf_config({**FIELDS, "seq_length": n}) for n in (2048, 8192))
    assert first.rope.original_max_position_embeddings == first.logn_length == 2048
    assert later.rope.original_max_position_embeddings == later.logn_length == 8192


def test_left_out_fields_have_the_published_defaults():
    needed = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers",
              "num_attention_heads", "intermediate_size", "seq_length")  # fmt: skip
    config = read_hf_config({name: FIELDS[name] for name in needed})
    assert config.rope.kind is RopeKind.STEPPED_NTK
    assert config.rope.theta == 10_000
    assert config.logn_length == FIELDS["seq_length"]
    assert (config.head_dim, config.rms_norm_eps) == (128, 1e-6)
    assert config.max_position_embeddings == 8192
    assert config.qkv_bias and not config.output_bias


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_cache_quantization": True}, "use_cache_quantization = true is not supported"),
        ({"scale_attn_weights": False}, "scale_attn_weights = false is not supported"),
        ({"no_bias": False}, "no_bias = false is not supported"),
        ({"intermediate_size": 175}, "intermediate_size = 175 is not supported: .*even"),
        ({"architectures": ["QWenModel"]}, "only QWenLMHeadModel"),
        ({"visual": {"heads": 16}}, "visual = .* is not supported"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_changes_the_forward_pass_is_refused_by_name(change, message):
    with pytest.raises(qwen_jax.UserError, match=message):
        read_hf_config({**FIELDS, **change})


def test_the_command_converts_without_torch_and_transformers(load, tmp_path):
    rendering, _, _, directory = load()
    code = (
        "import sys\n"
        "from tools.convert import main\n"
        "from tools.command_line import run\n"
        "try:\n"
        "    run(main)\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    for source, target, kind in (
        (directory, tmp_path / "orbax", "orbax"),
        (tmp_path / "orbax", tmp_path / "hf", "hf"),
    ):
        flags = [f"--source={source}", f"--target={target}", f"--format={kind}"]
        subprocess.run([sys.executable, "-c", code, *flags], check=True, capture_output=True)
    assert_same_tensors(tmp_path / "hf", rendering.tensors)


def test_bfloat16_is_no_further_from_float32_than_the_formulas(tmp_path):
    fields = {**FIELDS, "num_hidden_layers": 6, "torch_dtype": "bfloat16"}
    logits = []
    for seed in range(3):
        rounded = {name: t.bfloat16() for name, t in random_tensors(fields, seed).items()}
        directory = write_checkpoint(tmp_path / str(seed), rounded, fields)
        model, params = qwen_jax.load_pretrained(directory, "bfloat16")
        ids = random_ids(model, (4, 40), seed)
        exact = {name: tensor.float() for name, tensor in rounded.items()}
        theirs, truth = (
            Qwen1(tensors, fields)(torch.as_tensor(ids))[0].float().numpy()
            for tensors in (rounded, exact)
        )
        logits.append([model.apply({"params": params}, ids).logits, theirs, truth])
    assert divergence_ratio(*(np.concatenate(each) for each in zip(*logits, strict=True))) <= 1.1


def test_a_row_that_begins_later_equals_the_row_alone(load):
    """What stands before is padding, which a caller's positions need not count."""
    _, model, params, _ = load()
    ids = random_ids(model, (2, 16))
    first = np.array([[1] * 6, [0] * 6])
    cache = init_cache(model.config, 2, 24, np.float32)
    positions = np.where(first, np.arange(6), 0)
    out = model.apply({"params": params}, ids[:, :6], first, positions, cache)
    out = model.apply({"params": params}, ids[:, 6:], cache=out.cache)
    alone = model.apply({"params": params}, ids[1:, 6:]).logits
    np.testing.assert_allclose(out.logits[1:], alone, rtol=0, atol=TOLERANCE)
