"""What `chat_format` and `max_window_size` of generation_config.json do to the command lines."""

import json

import pytest
import torch

import qwen_jax
from qwen_jax.inference.conversation import Conversation
from qwen_jax.inference.sampling import SamplingOptions
from tests.models.test_qwen1 import FIELDS, random_tensors, write_checkpoint
from tests.renderings.qwen1 import Qwen1
from tests.text.real_vocabulary import write_qwen1_tokenizer

NARROW = {
    **FIELDS, "vocab_size": 151936, "hidden_size": 16, "kv_channels": 8, "num_attention_heads": 2,
    "intermediate_size": 64, "num_hidden_layers": 2, "seq_length": 24,
}  # fmt: skip
EOS, START, END = 151643, 151644, 151645
DEFAULTS = {
    "chat_format": "chatml", "eos_token_id": EOS, "pad_token_id": EOS, "max_window_size": 6144,
    "max_new_tokens": 3, "do_sample": False, "top_k": 0, "top_p": 0.8,
}  # fmt: skip


def aim(tensors, prompt, token):
    """Makes `token` the first one after `prompt`, by the head alone."""
    logits, _ = Qwen1(tensors, NARROW)(torch.tensor([prompt]))
    head = tensors["lm_head.weight"].clone()
    hidden = torch.linalg.lstsq(head[:400], logits[0, -1, :400, None]).solution[:, 0]
    head[token] = 100 * hidden
    return {**tensors, "lm_head.weight": head}


@pytest.mark.parametrize(
    ("token", "chat_format", "stops"),
    [(END, "chatml", True), (START, "chatml", True), (EOS, "chatml", True), (END, "raw", False)],
)
def test_a_chat_ends_with_its_formats_tokens(run_tool, tmp_path, token, chat_format, stops):
    write_qwen1_tokenizer(tmp_path)
    tokenizer = qwen_jax.load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    write_checkpoint(tmp_path, aim(random_tensors(NARROW, 3), prompt, token), NARROW)
    defaults = {**DEFAULTS, "chat_format": chat_format}
    (tmp_path / "generation_config.json").write_text(json.dumps(defaults))
    result = run_tool("generate", f"--model={tmp_path}", "--chat", "--prompt=Hi", "--output=json")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["prompt_tokens"] == len(prompt)
    assert record["token_ids"][0] == token
    assert (len(record["token_ids"]) == 1) == stops
    assert record["finish_reason"] == ("stop" if stops else "length")


def test_the_oldest_turns_leave_the_window(run_tool, tmp_path):
    write_checkpoint(tmp_path, random_tensors(NARROW, 3), NARROW)
    write_qwen1_tokenizer(tmp_path)
    defaults = {**DEFAULTS, "max_window_size": 60, "max_new_tokens": 9, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(defaults))
    lines = ["the sky", "and the sea", "and the land", "and the fire"]
    result = run_tool("chat", f"--model={tmp_path}", stdin="\n".join(lines))
    assert result.returncode == 0, result.stderr
    model, params = qwen_jax.load_pretrained(tmp_path)
    tokenizer = qwen_jax.load_tokenizer(tmp_path)

    def talk(window):
        conversation = Conversation(model, params, tokenizer, max_window_size=window)
        options, stop_ids = SamplingOptions(1.0, top_p=0.8), [EOS, START, END]
        return [conversation.reply(line, 9, options, stop_ids)[0].text for line in lines]

    assert result.stdout == "".join(f"{text}\n" for text in talk(60))
    assert talk(60) != talk(None)
