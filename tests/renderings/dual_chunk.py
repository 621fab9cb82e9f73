"""A dense model with Dual Chunk Attention from its formulas, in float64 PyTorch, one text a call.

Tensors have their published names, `fields` are those of config.json.
"""

import math
from collections.abc import Sequence

import torch


class DualChunkModel:
    """`logits = DualChunkModel(tensors, fields, chunk_size, local_size, trained)(ids, calls)`.

    `trained` is the length up to which nothing is scaled, 0 for any.
    """

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        fields: dict,
        chunk_size: int,
        local_size: int,
        trained: int,
    ):
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.fields = fields
        self.chunk_size, self.trained = chunk_size, trained
        self.c = chunk_size - local_size

    def __call__(self, ids: Sequence[int], calls: Sequence[int]) -> torch.Tensor:
        """Logits [T, V] of a text of T tokens that came in calls of so many tokens each.

        There is no cache: all that a call leaves behind is the factor of its keys.
        """
        calls = torch.tensor(calls)
        lengths = calls.cumsum(0).repeat_interleave(calls)
        factors = torch.tensor([self.factor(n) for n in lengths.tolist()]).double()
        eps = self.fields["rms_norm_eps"]
        x = self.tensors["model.embed_tokens.weight"][torch.as_tensor(ids)]
        for i in range(self.fields["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            u = _norm(x, self.tensors[f"{layer}.input_layernorm.weight"], eps)
            x = x + self._attention(f"{layer}.self_attn", u, factors)
            u = _norm(x, self.tensors[f"{layer}.post_attention_layernorm.weight"], eps)
            gate = torch.nn.functional.silu(self._linear(f"{layer}.mlp.gate_proj", u))
            up = self._linear(f"{layer}.mlp.up_proj", u)
            x = x + self._linear(f"{layer}.mlp.down_proj", gate * up)
        return self._linear("lm_head", _norm(x, self.tensors["model.norm.weight"], eps))

    def factor(self, length: int) -> float:
        """Of keys that come while the text has `length` tokens, and of the scores of that call."""
        return max(1.0, 0.1 * math.log(length / self.trained) + 1) if self.trained else 1.0

    def _attention(self, name, x, factors):
        q, k, v = (self._heads(f"{name}.{part}", x) for part in ("q", "k", "v"))
        theta = self.fields["rope_parameters"]["rope_theta"]
        places = torch.arange(len(x))
        own = places % self.c
        k = _turned(k, own, theta) * factors[:, None, None]
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        # The places that a query is turned to, for keys of its chunk, of the one before, and older.
        before = torch.clamp(own + self.c, max=self.chunk_size)
        older = torch.full_like(own, min(2 * self.c - 1, self.chunk_size))
        queries = torch.stack([_turned(q, place, theta) for place in (own, before, older)])
        scores = torch.einsum("bthd,shd->bhts", queries, k)
        chunks_back = places[:, None] // self.c - places // self.c
        which = chunks_back.clamp(0, 2).expand_as(scores[:1])
        scores = scores.gather(0, which)[0] * factors[:, None] / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(places > places[:, None], -torch.inf)
        out = torch.einsum("hts,shd->thd", scores.softmax(-1), v)
        return self._linear(f"{name}.o_proj", out.flatten(1))

    def _heads(self, name, x):
        heads = "num_attention_heads" if name.endswith("q") else "num_key_value_heads"
        y = self._linear(f"{name}_proj", x).unflatten(-1, (self.fields[heads], -1))
        weight = self.tensors.get(f"{name}_norm.weight")
        return y if weight is None else _norm(y, weight, self.fields["rms_norm_eps"])

    def _linear(self, name, x):
        y = x @ self.tensors[f"{name}.weight"].T
        bias = self.tensors.get(f"{name}.bias")
        return y if bias is None else y + bias


def _norm(x, weight, eps):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _turned(x, places, theta):
    """RoPE of `x` [T, heads, d] at `places` [T]; channel i pairs with i + d/2."""
    d = x.shape[-1]
    angles = torch.outer(places.double(), theta ** -(torch.arange(0, d, 2).double() / d))
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], -1)
