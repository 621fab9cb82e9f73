"""The multi-token-prediction head, which transformers drops, against its formulas.

That the head reads the hidden states behind the final norm is believed, not confirmed: the tests
hold the formulas, not that.
"""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeDecoderLayer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextDecoderLayer

import qwen_jax
from qwen_jax.checkpoint.conversion import convert
from qwen_jax.checkpoint.writer import save_pretrained
from qwen_jax.errors import UserError
from qwen_jax.models.heads import init_mtp_cache
from qwen_jax.nn.cache import init_cache
from qwen_jax.rope_scaling import with_rope_scaling
from tests.models.passes import TOLERANCE, padding, random_ids
from tests.reference import quiet, random_reference, reference_logits, save_reference
from tests.renderings.mtp import MtpHead

LAYERS = {
    "qwen3_next": Qwen3NextDecoderLayer,
    "qwen3_5_text": Qwen3_5DecoderLayer,
    "qwen3_5_moe_text": Qwen3_5MoeDecoderLayer,
}
LAYER_TYPES = ["linear_attention", "full_attention"]
# By name: the family, where all experts of a layer are one tensor, fields.
CASES = {
    "qwen3_next": ("qwen3_next", (), {"norm_topk_prob": False}),
    "qwen3_5": ("qwen3_5_text", (), {"tie_word_embeddings": True}),
    "qwen3_5_moe": ("qwen3_5_moe_text", (), {}),
    "qwen3_5_moe fused": ("qwen3_5_moe_text", ("model", "head"), {}),
    "qwen3_5_moe model fused": ("qwen3_5_moe_text", ("model",), {}),
    "qwen3_5_moe head fused": ("qwen3_5_moe_text", ("head",), {}),
}


def random_head(like, D, fused, seed=1):
    """The tensors of a head: its layer has the shapes of `like`, a layer's tensors."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name, shape):
        noise = torch.randn(shape, generator=generator)
        return 0.3 * noise if name.endswith("norm.weight") else noise / shape[-1] ** 0.5

    shapes = {"fc.weight": (D, 2 * D)}
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        shapes[f"{name}.weight"] = (D,)
    shapes |= {f"layers.0.{name}": tuple(tensor.shape) for name, tensor in like.items()}
    tensors = {f"mtp.{name}": draw(name, shape) for name, shape in shapes.items()}
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        tensors[f"mtp.{name}.weight"] = 0.3 * torch.randn(D, generator=generator)
    return fuse(tensors) if fused else tensors


def fuse(tensors):
    """All experts of a layer in one tensor, gate rows before up rows."""
    first = ".0.gate_proj.weight"
    stems = {name.removesuffix(first) for name in tensors if name.endswith("experts" + first)}
    fused = {n: t for n, t in tensors.items() if not n.startswith(tuple(stems))}
    for stem in stems:
        count = len([n for n in tensors if n.startswith(stem) and n.endswith("down_proj.weight")])
        gate, up, down = (
            torch.stack([tensors[f"{stem}.{e}.{part}_proj.weight"] for e in range(count)])
            for part in ("gate", "up", "down")
        )
        fused |= {f"{stem}.gate_up_proj": torch.cat([gate, up], 1), f"{stem}.down_proj": down}
    return fused


class Case:
    """A checkpoint with a head: `tensors` are all of it, `head` the head's alone."""

    def __init__(self, name, directory):
        family, fused, fields = CASES[name]
        fields = {"num_hidden_layers": 2, "layer_types": LAYER_TYPES, **fields}
        self.reference = random_reference(family, seed=len(name), **fields)
        self.directory = save_reference(self.reference, directory)
        path = self.directory / "model.safetensors"
        stored = safetensors.torch.load_file(path)
        prefix = "model.layers.1."  # of full attention
        like = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
        self.like = like
        self.head = random_head(like, self.reference.config.hidden_size, "head" in fused)
        self.tensors = {**(fuse(stored) if "model" in fused else stored), **self.head}
        safetensors.torch.save_file(self.tensors, path, {"format": "pt"})
        fields = json.loads((self.directory / "config.json").read_text())
        embedding = stored["model.embed_tokens.weight"]
        output = stored.get("lm_head.weight", embedding)
        self.rendering = MtpHead(self.head, fields, embedding, output)
        self.model, self.params = qwen_jax.load_pretrained(self.directory)

    def hidden(self, ids, mask=None):
        """The main model's hidden states behind its final norm, from transformers."""
        mask = None if mask is None else torch.as_tensor(mask)
        with torch.no_grad():
            out = self.reference.base_model(torch.as_tensor(ids), attention_mask=mask)
        return out.last_hidden_state

    def predict(self, hidden, next_ids, mask=None, **options):
        return self.model.apply(
            {"params": self.params}, jnp.asarray(hidden), next_ids, mask, method="predict_next",
            **options,
        )  # fmt: skip


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    loaded = {}

    def load_(name):
        if name not in loaded:
            loaded[name] = Case(name, tmp_path_factory.mktemp("mtp"))
        return loaded[name]

    return load_


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def any_layout(request, load):
    return load(request.param)


@pytest.fixture(scope="module", params=["qwen3_next", "qwen3_5", "qwen3_5_moe"])
def case(request, load):
    return load(request.param)


@pytest.fixture(scope="module")
def sparse(load):
    return load("qwen3_next")


def layer_of_transformers(case):
    """The head's layer run by transformers' class for a layer of full attention."""
    config = copy.deepcopy(case.reference.config)
    # The class has all experts in one tensor.
    state = {n.removeprefix("mtp.layers.0."): t for n, t in fuse(case.head).items() if ".0." in n}
    layer = LAYERS[config.model_type](config, layer_idx=1).eval()
    layer.load_state_dict(state, strict=True)

    def run(x, angles, allowed):
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(x.dtype).min)
        angles = angles[None]
        out = layer(
            x, position_embeddings=(angles.cos(), angles.sin()), attention_mask=bias,
            position_ids=torch.arange(x.shape[1])[None], past_key_values=None,
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    return run


def test_the_two_witnesses_agree(case):
    ids = random_ids(case.model, (2, 21))
    hidden, next_ids = case.hidden(ids[:, :-1]), torch.as_tensor(ids[:, 1:])
    mask = torch.as_tensor(padding([20, 13], 20, "right"))
    expected = case.rendering(hidden, next_ids, mask, layer_of_transformers(case))
    found = case.rendering(hidden, next_ids, mask)
    np.testing.assert_allclose(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
    assert 0.3 < found.std() < 3


def test_logits_equal_the_formulas(any_layout):
    assert any_layout.model.config.mtp_layers == 1
    ids = random_ids(any_layout.model, (2, 31))
    hidden = any_layout.hidden(ids[:, :-1])
    expected = any_layout.rendering(hidden, torch.as_tensor(ids[:, 1:]))
    out = any_layout.predict(hidden, ids[:, 1:])
    np.testing.assert_allclose(out.logits, expected, rtol=0, atol=TOLERANCE)


def test_it_takes_the_main_models_own_hidden_states(case):
    ids = random_ids(case.model, (2, 24))
    main = case.model.apply({"params": case.params}, ids[:, :-1])
    expected = case.rendering(case.hidden(ids[:, :-1]), torch.as_tensor(ids[:, 1:]))
    out = case.predict(main.hidden_states[-1], ids[:, 1:])
    np.testing.assert_allclose(out.logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_the_formulas(case, side):
    ids, mask = random_ids(case.model, (3, 25)), padding([24, 9, 15], 24, side)
    hidden, next_ids = case.hidden(ids[:, :-1], mask), ids[:, 1:]
    real = mask.astype(bool)
    expected = case.rendering(hidden, torch.as_tensor(next_ids), torch.as_tensor(mask))
    out = case.predict(hidden, next_ids, mask)
    np.testing.assert_allclose(out.logits[real], expected[real], rtol=0, atol=TOLERANCE)
    last = case.predict(hidden, next_ids, mask, logits_at="last").logits[:, 0]
    where = 23 if side == "left" else np.array([23, 8, 14])
    np.testing.assert_allclose(last, expected[np.arange(3), where], rtol=0, atol=TOLERANCE)


def test_token_by_token_with_a_cache_equals_a_full_pass(case):
    ids = random_ids(case.model, (2, 21))
    hidden = np.asarray(case.hidden(ids[:, :-1]))
    expected = case.rendering(torch.as_tensor(hidden), torch.as_tensor(ids[:, 1:]))
    config = case.model.config
    cache = init_mtp_cache(config, 2, 20, np.float32)
    assert len(cache.layers) == 1
    step = jax.jit(lambda h, t, c: case.predict(h, t, cache=c))
    for start, stop in [(0, 9), *((i, i + 1) for i in range(9, 20))]:
        out = step(hidden[:, start:stop], ids[:, start + 1 : stop + 1], cache)
        cache = out.cache
        assert_near(out.logits, expected[:, start:stop])
    np.testing.assert_array_equal(cache.lengths, [20, 20])


def assert_near(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


def test_the_second_step_reads_the_heads_own_hidden_states(sparse):
    """Drafting further ahead: the layer is taken again on what the head itself made."""
    ids = random_ids(sparse.model, (2, 14))
    first = sparse.predict(sparse.hidden(ids[:, :-2]), ids[:, 1:-1])
    (own,) = first.hidden_states
    expected = sparse.rendering(torch.as_tensor(np.array(own)), torch.as_tensor(ids[:, 2:]))
    out = sparse.predict(own, ids[:, 2:], step=1)
    assert_near(out.logits, expected)


def test_embedding_and_hidden_state_do_not_commute(sparse):
    """Else the order of the two halves would not be tested."""
    ids = random_ids(sparse.model, (1, 9))
    hidden, next_ids = sparse.hidden(ids[:, :-1]), torch.as_tensor(ids[:, 1:])
    swapped = dict(sparse.head)
    swapped["mtp.fc.weight"] = torch.cat(sparse.head["mtp.fc.weight"].chunk(2, 1)[::-1], 1)
    rendering = sparse.rendering
    other = MtpHead(swapped, rendering.fields, rendering.embedding, rendering.output)
    assert (other(hidden, next_ids) - rendering(hidden, next_ids)).abs().max() > 0.5


def test_hidden_states_of_another_shape_than_the_ids_are_refused(sparse):
    hidden = np.zeros((1, 3, sparse.model.config.hidden_size))
    for wrong, ids in ((hidden, [[1, 2, 3, 4]]), ((hidden,), [[1, 2, 3]]), (hidden[0], [[1, 2]])):
        with pytest.raises(
            ValueError, match=r"hidden_states has shape .*, where next_ids of shape"
        ):
            sparse.predict(wrong, ids)


def test_the_head_leaves_the_main_model_alone(case):
    ids = random_ids(case.model, (2, 19))
    out = case.model.apply({"params": case.params}, ids)
    assert_near(out.logits, reference_logits(case.reference, ids))
    main_cache = init_cache(case.model.config, 1, 8, np.float32)
    assert len(main_cache.layers) == 2


def read_tensors(directory):
    return {
        name: tensor
        for path in directory.glob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(path).items()
    }


def assert_same_checkpoint(case, directory):
    """Bit-equal tensors, the head's among them, in a directory that transformers loads."""
    # The layout is that of transformers, whatever the source's.
    expected, found = fuse(case.tensors), fuse(read_tensors(directory))
    assert found.keys() == expected.keys()
    assert any(name.startswith("mtp.") for name in found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    with quiet():
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    own = case.reference.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, own[name]), name


def test_export_holds_the_head(any_layout, tmp_path):
    save_pretrained(tmp_path / "saved", any_layout.model.config, any_layout.params)
    assert_same_checkpoint(any_layout, tmp_path / "saved")
    model, params = qwen_jax.load_pretrained(tmp_path / "saved")
    assert model.config.mtp_layers == 1
    jax.tree.map(np.testing.assert_array_equal, params, any_layout.params)


def test_convert_keeps_the_head(any_layout, tmp_path):
    convert(any_layout.directory, tmp_path / "orbax", "orbax")
    convert(tmp_path / "orbax", tmp_path / "hf", "hf")
    assert_same_checkpoint(any_layout, tmp_path / "hf")
    for directory in (tmp_path / "orbax", tmp_path / "hf"):
        model, params = qwen_jax.load_pretrained(directory)
        assert model.config == any_layout.model.config
        jax.tree.map(np.testing.assert_array_equal, params, any_layout.params)


@pytest.mark.parametrize(
    "name",
    ["mtp.fc.weight", "mtp.pre_fc_norm_hidden.weight", "mtp.layers.0.self_attn.q_norm.weight",
     "mtp.layers.0.mlp.experts.4.up_proj.weight"],
)  # fmt: skip
def test_a_missing_tensor_of_the_head_is_named(sparse, tmp_path, name):
    tensors = {n: t for n, t in sparse.tensors.items() if n != name}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((sparse.directory / "config.json").read_bytes())
    with pytest.raises(qwen_jax.UserError, match=f"missing tensors for qwen3_next: {name}") as e:
        qwen_jax.load_pretrained(tmp_path)
    assert "\n" not in str(e.value)


def test_a_misshapen_tensor_of_the_head_is_named(sparse, tmp_path):
    tensors = {**sparse.tensors, "mtp.fc.weight": torch.zeros(64, 64)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((sparse.directory / "config.json").read_bytes())
    with pytest.raises(qwen_jax.UserError, match=r"mtp.fc.weight has shape \[64, 64\].*128"):
        qwen_jax.load_pretrained(tmp_path)


def test_no_head_without_its_tensors(tmp_path):
    """config.json may announce a head that the file, saved by transformers, does not have."""
    directory = save_reference(random_reference("qwen3_5_text"), tmp_path)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mtp_num_hidden_layers": 1}))
    model, params = qwen_jax.load_pretrained(directory)
    assert model.config.mtp_layers == 0
    assert "mtp" not in params


def test_a_cache_is_refused_where_frequencies_change_with_the_text(sparse):
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    config = with_rope_scaling(sparse.model.config, scaling)
    with pytest.raises(UserError, match=r"rope_type = dynamic .* without a cache"):
        init_mtp_cache(config, 1, 8, np.float32)
