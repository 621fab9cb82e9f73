"""The multi-token-prediction head of hybrid models from its formulas, in plain PyTorch.

Tensors have their published names, `fields` are those of the text model's config.json.
"""

import math

import torch

silu, sigmoid = torch.nn.functional.silu, torch.sigmoid


class MtpHead:
    """`logits = MtpHead(tensors, fields, embedding, output)(hidden, next_ids, mask)`."""

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        fields: dict,
        embedding: torch.Tensor,
        output: torch.Tensor,
    ):
        self.tensors, self.fields = tensors, fields
        self.embedding, self.output = embedding, output

    def __call__(self, hidden, next_ids, mask=None, layer=None):
        """Logits [B, T, V] of the token after `next_ids` [B, T].

        `hidden` [B, T, D] is the main model's behind its final norm, `layer` stands in for the
        head's own decoder layer: (x, angles [T, r], allowed [B, 1, T, T]) -> x.
        """
        with torch.no_grad():
            T = next_ids.shape[1]
            allowed = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
            if mask is not None:
                allowed = allowed & mask.bool()[:, None, None]
            embedded = self._norm("pre_fc_norm_embedding", self.embedding[next_ids])
            both = torch.cat([embedded, self._norm("pre_fc_norm_hidden", hidden)], -1)
            x = both @ self.tensors["mtp.fc.weight"].T
            x = (layer or self.layer)(x, self._angles(T), allowed)
            return self._norm("norm", x) @ self.output.T

    def layer(self, x, angles, allowed):
        x = x + self._attention(self._norm("layers.0.input_layernorm", x), angles, allowed)
        u = self._norm("layers.0.post_attention_layernorm", x)
        return x + (self._experts(u) if self.fields.get("num_experts") else self._swiglu("", u))

    def _angles(self, T):
        rope = self.fields["rope_parameters"]
        r = int(self.fields["head_dim"] * rope["partial_rotary_factor"])
        inverse = rope["rope_theta"] ** -(torch.arange(0, r, 2).float() / r)
        return torch.outer(torch.arange(T).float(), inverse).repeat(1, 2)

    def _attention(self, x, angles, allowed):
        d, H = self.fields["head_dim"], self.fields["num_attention_heads"]
        q, gate = self._linear("self_attn.q_proj", x).unflatten(-1, (H, 2 * d)).split(d, -1)
        k = self._linear("self_attn.k_proj", x).unflatten(-1, (-1, d))
        v = self._linear("self_attn.v_proj", x).unflatten(-1, (-1, d))
        q = _rotated(self._norm("layers.0.self_attn.q_norm", q), angles)
        k = _rotated(self._norm("layers.0.self_attn.k_norm", k), angles)
        k, v = (t.repeat_interleave(H // t.shape[2], 2) for t in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(d)
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        out = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
        return self._linear("self_attn.o_proj", (out * sigmoid(gate)).flatten(2))

    def _experts(self, u):
        chances = self._linear("mlp.gate", u).softmax(-1)
        best, chosen = chances.topk(self.fields["num_experts_per_tok"], -1)
        if self.fields.get("norm_topk_prob", True):
            best = best / best.sum(-1, keepdim=True)
        weights = torch.zeros_like(chances).scatter(-1, chosen, best)
        y = sigmoid(self._linear("mlp.shared_expert_gate", u)) * self._swiglu("shared_expert.", u)
        for e in range(self.fields["num_experts"]):
            y = y + weights[..., e : e + 1] * self._expert(e, u)
        return y

    def _expert(self, e, u):
        fused = self.tensors.get("mtp.layers.0.mlp.experts.gate_up_proj")
        if fused is None:
            return self._swiglu(f"experts.{e}.", u)
        gate, up = (u @ fused[e].T).chunk(2, -1)
        return (silu(gate) * up) @ self.tensors["mtp.layers.0.mlp.experts.down_proj"][e].T

    def _swiglu(self, name, u):
        gate = silu(self._linear(f"mlp.{name}gate_proj", u))
        return self._linear(f"mlp.{name}down_proj", gate * self._linear(f"mlp.{name}up_proj", u))

    def _linear(self, name, x):
        return x @ self.tensors[f"mtp.layers.0.{name}.weight"].T

    def _norm(self, name, x):
        spread = x.pow(2).mean(-1, keepdim=True) + self.fields["rms_norm_eps"]
        return x * spread.rsqrt() * (1 + self.tensors[f"mtp.{name}.weight"])


def _rotated(x, angles):
    r = angles.shape[-1]
    turned, rest = x[..., :r], x[..., r:]
    first, second = turned.chunk(2, -1)
    half_turn = torch.cat([-second, first], -1)
    angles = angles[:, None]
    return torch.cat([turned * angles.cos() + half_turn * angles.sin(), rest], -1)
