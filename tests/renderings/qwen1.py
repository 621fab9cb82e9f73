"""Qwen1 from its formulas, in plain PyTorch, with a cache of its own.

Tensors have their published names, `fields` are those of config.json.
"""

import dataclasses
import math

import torch


@dataclasses.dataclass
class Past:
    """Keys (rotated) and values of each layer, [B, S, H, d], and what the prompt has fixed."""

    alphas: list[float]
    layers: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[1]


class Qwen1:
    """`logits, past = Qwen1(tensors, fields)(ids, mask, past)`."""

    def __init__(self, tensors: dict[str, torch.Tensor], fields: dict):
        self.tensors, self.fields = tensors, fields

    def alpha(self, n: int) -> float:
        """Stretch of the rotary base for a text of `n` tokens."""
        return max(1.0, 2.0 ** math.ceil(math.log2(n / self.fields["seq_length"]) + 1) - 1)

    def __call__(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, past: Past | None = None
    ) -> tuple[torch.Tensor, Past]:
        """Logits [B, T, V] of `ids` [B, T]; `mask` [B, S] is of the past and of these."""
        with torch.no_grad():
            return self._forward(ids, mask, past)

    def _forward(self, ids, mask, past):
        start = 0 if past is None else past.length
        total = start + ids.shape[1]
        alphas = past.alphas if past else self._alphas(mask, total)
        turns = [self._angles(alpha, total)[start:] for alpha in alphas]
        angles = torch.stack(turns if len(turns) > 1 else turns * len(ids))[:, :, None]
        allowed = torch.ones(ids.shape[1], total, dtype=torch.bool).tril(start)[None, None]
        if mask is not None:
            allowed = allowed & mask.bool()[:, None, None]
        x = self.tensors["transformer.wte.weight"][ids]
        layers = []
        for i in range(self.fields["num_hidden_layers"]):
            before = None if past is None else past.layers[i]
            mixed, entry = self._attention(i, self._norm(f"h.{i}.ln_1", x), angles, allowed, before)
            layers.append(entry)
            x = x + mixed
            u = self._norm(f"h.{i}.ln_2", x)
            gate = torch.nn.functional.silu(self._linear(f"h.{i}.mlp.w2", u))
            x = x + self._linear(f"h.{i}.mlp.c_proj", self._linear(f"h.{i}.mlp.w1", u) * gate)
        logits = self._norm("ln_f", x) @ self.tensors["lm_head.weight"].T
        return logits, Past(alphas, layers)

    def _alphas(self, mask, total):
        """One for each row where padding tells them apart, else one for all."""
        if not self.fields["use_dynamic_ntk"]:
            return [1.0]
        if mask is not None and total > self.fields["seq_length"]:
            return [self.alpha(int(row.sum())) for row in mask]
        return [self.alpha(total)]

    def _angles(self, alpha, total):
        r = self.fields["kv_channels"]
        base = self.fields["rotary_emb_base"] * alpha ** (r / (r - 2))
        inverse = 1.0 / base ** (torch.arange(0, r, 2).float() / r)
        return torch.outer(torch.arange(total).float(), inverse).repeat(1, 2)

    def _attention(self, i, x, angles, allowed, before):
        d = self.fields["kv_channels"]
        q, k, v = (
            part.unflatten(-1, (-1, d))
            for part in self._linear(f"h.{i}.attn.c_attn", x).chunk(3, -1)
        )
        # Rotated in float32, whatever the dtype.
        q, k = (
            (t.float() * angles.cos() + _half_turn(t.float()) * angles.sin()).type_as(t)
            for t in (q, k)
        )
        if before is not None:
            k, v = torch.cat([before[0], k], 1), torch.cat([before[1], v], 1)
        if self.fields["use_logn_attn"]:
            places = range(k.shape[1] - q.shape[1] + 1, k.shape[1] + 1)
            trained = self.fields["seq_length"]
            scale = [math.log(n) / math.log(trained) if n > trained else 1.0 for n in places]
            q = q * torch.tensor(scale).type_as(q)[None, :, None, None]
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(d)
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        out = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2)
        return self._linear(f"h.{i}.attn.c_proj", out), (k, v)

    def _linear(self, name, x):
        y = x @ self.tensors[f"transformer.{name}.weight"].T
        bias = self.tensors.get(f"transformer.{name}.bias")
        return y if bias is None else y + bias

    def _norm(self, name, x):
        wide = x.float()
        spread = wide.pow(2).mean(-1, keepdim=True) + self.fields["layer_norm_epsilon"]
        return self.tensors[f"transformer.{name}.weight"] * (wide * spread.rsqrt()).type_as(x)

    def generate(self, prompt: list[int], new: int) -> list[int]:
        """Greedy new ids of one prompt, a step at a time from the cache."""
        ids, past, found = torch.tensor([prompt]), None, []
        for _ in range(new):
            logits, past = self(ids, None, past)
            found.append(int(logits[0, -1].argmax()))
            ids = torch.tensor([[found[-1]]])
        return found


def _half_turn(x):
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
