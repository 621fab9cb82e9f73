"""The main job on a small model: write a checkpoint, load it, check it, talk to it.

    python -m tools.demo

The model is a Qwen3 of random weights, so what it says is noise: everything else is the real
thing, from the files in Hugging Face layout to the streamed answer.
"""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
from absl import flags

import qwen_jax
from qwen_jax.checkpoint.writer import write_json
from qwen_jax.config import LayerKind, ModelConfig, RopeSpec
from qwen_jax.errors import UserError
from qwen_jax.inference.conversation import Conversation
from qwen_jax.inference.defaults import load_generation_defaults
from qwen_jax.models.decoder import Decoder
from qwen_jax.nn.cache import init_cache
from tools import command_line

_WORKDIR = flags.DEFINE_string("workdir", ".cache/demo", "Where the checkpoint is written.")
_PROMPT = flags.DEFINE_string("prompt", "Hello! Who are you?", "What the user says.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 96, "Length of the answer.", lower_bound=1)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of the weights and of the draws.", lower_bound=0, upper_bound=2**32 - 1
)

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TOLERANCE = 1e-4


def main() -> None:
    """Runs the demonstration."""
    if not _PROMPT.value:
        raise UserError("--prompt is empty; give some text")
    directory = command_line.path(_WORKDIR) / "qwen3-random"
    print(f"Writing a small Qwen3 to {directory}. Its weights are random: it will say nonsense.")
    try:
        _write_checkpoint(directory, _SEED.value)
    except OSError as error:
        message = f"--workdir={_WORKDIR.value}: cannot be written ({error.strerror or error})"
        raise UserError(message) from None

    start = time.perf_counter()
    model, params = qwen_jax.load_pretrained(directory)
    tokenizer = qwen_jax.load_tokenizer(directory)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    elapsed = time.perf_counter() - start
    print(f"Loaded {count / 1e6:.1f} M parameters in {elapsed:.2f} s on {jax.devices()[0]}.")

    difference = _cached_against_full(model, params, tokenizer.encode(_PROMPT.value))
    print(f"Checked: token by token equals one pass within {difference:.1e}.")
    if not difference <= _TOLERANCE:
        raise UserError(f"the check failed: {difference} is above {_TOLERANCE}")

    print(f"\nuser: {_PROMPT.value}\nassistant: ", end="", flush=True)
    defaults = load_generation_defaults(directory)
    _, timing = Conversation(model, params, tokenizer).reply(
        _PROMPT.value,
        _MAX_NEW_TOKENS.value,
        defaults.options,
        defaults.stop_ids,
        seed=_SEED.value,
        on_text=_write,
    )
    print(
        f"\n\nTime to the first token {timing.first_token_s:.2f} s (compiling included), then "
        f"{timing.tokens_per_s:.0f} tokens/s."
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _write_checkpoint(directory: Path, seed: int) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    vocabulary = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate((*vocabulary, *_SPECIAL))}
    config = ModelConfig(
        family="qwen3",
        vocab_size=len(ids),
        hidden_size=256,
        intermediate_size=768,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        layer_types=(LayerKind.FULL_ATTENTION,) * 6,
        max_position_embeddings=4096,
        rope=RopeSpec(theta=1_000_000.0),
        tie_word_embeddings=True,
        qk_norm=True,
        eos_token_ids=(ids["<|im_end|>"],),
        pad_token_id=ids["<|endoftext|>"],
        dtype="float32",
    )
    variables = Decoder(config).init(jax.random.key(seed), np.zeros((1, 1), np.int32))
    qwen_jax.save_pretrained(directory, config, variables["params"])
    _write_tokenizer(directory, ids)
    write_json(
        directory / "generation_config.json",
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8,
         "eos_token_id": list(config.eos_token_ids)},
    )  # fmt: skip


def _write_tokenizer(directory: Path, ids: dict[str, int]) -> None:
    """A byte-level vocabulary without merges: any text, a token a byte."""
    vocabulary = {token: i for token, i in ids.items() if token not in _SPECIAL}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(token) for token in _SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write_json(directory / "tokenizer_config.json", config)


def _cached_against_full(model: Decoder, params: Any, ids: list[int]) -> float:
    """Largest difference of logits between one pass and a token at a time."""
    variables = {"params": params}
    with jax.default_matmul_precision("highest"):
        full = model.apply(variables, np.array([ids])).logits
        step = jax.jit(model.apply)
        cache = init_cache(model.config, 1, len(ids), full.dtype)
        worst = 0.0
        for i, token in enumerate(ids):
            out = step(variables, np.array([[token]]), cache=cache)
            cache = out.cache
            worst = max(worst, float(abs(out.logits[0, 0] - full[0, i]).max()))
    return worst


if __name__ == "__main__":
    command_line.run(main)
