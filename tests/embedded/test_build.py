"""The command that makes the model, a few steps of it."""

import json

import torch
import transformers


def test_a_few_steps_leave_a_model_with_its_tokenizer(run_tool, tmp_path):
    arguments = (f"--workdir={tmp_path}", "--problems=200", "--steps=4")
    result = run_tool("build_embedded", *arguments)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    chat = [{"role": "user", "content": "1+1=?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    assert torch.isfinite(model(ids["input_ids"]).logits).all()
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert 5e6 < size < 9e6
