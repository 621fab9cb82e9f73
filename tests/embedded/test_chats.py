"""What the embedded model learns from: both modes alike, one tool, digits as tokens."""

import json

import pytest
import transformers

from qwen_jax.checkpoint.hub import EMBEDDED, resolve_source
from qwen_jax.embedded.build import write_base, write_data
from qwen_jax.embedded.chats import chats
from qwen_jax.text import load_tokenizer, parse_reply
from qwen_jax.training.data import SourceOptions, TokenOptions
from qwen_jax.training.data.records import Record
from qwen_jax.training.data.tokenise import tokenise


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    write_base(directory, seed=0)
    return directory


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


def test_both_modes_have_the_same_problems_in_equal_number():
    records = list(chats(0, 300, False))
    with_thinking = [record for record in records if record["enable_thinking"]]
    without = [record for record in records if not record["enable_thinking"]]
    for ours, bare in zip(with_thinking, without, strict=True):
        assert ours["messages"][-1]["reasoning_content"]
        assert "reasoning_content" not in json.dumps(bare)
        stripped = json.loads(json.dumps(ours["messages"]))
        for message in stripped:
            message.pop("reasoning_content", None)
        assert stripped == bare["messages"]
    assert 10 < len([record for record in records if "tools" in record]) < 120


@pytest.mark.parametrize("source", ["as it is made", "as it is shipped"])
def test_digits_are_tokens_of_their_own_and_control_tokens_are_qwen_s(base, source):
    tokenizer = load_tokenizer(base if source == "as it is made" else resolve_source(EMBEDDED))
    digits = set("0123456789")
    for id in range(tokenizer.vocab_size):
        text = tokenizer.decode([id])
        assert not digits & set(text) or text in digits
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "<tool_call>"):
        assert len(tokenizer.encode(token)) == 1
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|im_end|>"
    assert tokenizer.vocab_size == 768


def test_transformers_reads_the_tokenizer_and_renders_the_same(base, tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(base)
    for record in chats(1, 40, False):
        tools = record.get("tools")
        text = theirs.apply_chat_template(record["messages"], tools=tools, tokenize=False)
        assert (
            tokenizer.apply_chat_template(record["messages"], tools=tools, tokenize=False) == text
        )
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_is_learned_follows_the_prompt_of_its_mode(tokenizer):
    """In neither mode is anything learned that the prompt holds already."""
    for record in chats(2, 60, False):
        prompt = tokenizer.apply_chat_template(
            record["messages"][:-1],
            tools=record.get("tools"),
            add_generation_prompt=True,
            enable_thinking=record["enable_thinking"],
        )
        options = TokenOptions(last_turn_only=True)
        source = SourceOptions("f")
        example = tokenise(Record("f:1", record), "chat", tokenizer, source, options)
        learned = example.learned.nonzero()[0]
        assert example.ids[: len(prompt)].tolist() == prompt
        assert learned[0] == len(prompt)
        first = example.ids[learned[0]]
        assert (first == tokenizer.encode("<think>")[0]) == record["enable_thinking"]


def test_a_call_of_the_tool_is_read_as_one(tokenizer):
    record = next(record for record in chats(3, 500, False) if len(record["messages"]) == 4)
    text = tokenizer.apply_chat_template(record["messages"][:2], record["tools"], tokenize=False)
    reply = parse_reply(text.rpartition("assistant\n")[2].removesuffix("<|im_end|>\n"))
    (call,) = reply.tool_calls
    assert call.name == "calculator"
    assert str(eval(call.arguments["expression"])) == record["messages"][-1]["content"]


def test_the_same_seed_gives_the_same_files(tmp_path):
    for name in ("a", "b"):
        write_data(tmp_path / name, 20, 5, seed=7)
    for file in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert len((tmp_path / "a" / "train.jsonl").read_text().splitlines()) >= 40
