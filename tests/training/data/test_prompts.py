"""Prompts: what rewards get of a record whatever its file, their rows, and what is refused."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen_jax.errors import UserError
from qwen_jax.training.data.options import DataOptions, SourceOptions
from qwen_jax.training.data.prompts import PromptRecords, PromptSource, tokenise_prompt
from qwen_jax.training.data.records import Record
from qwen_jax.training.rewards import RewardOptions, judge
from tests.training.data.conftest import write_lines

ROWS = [
    {
        "messages": [{"role": "user", "content": f"{i} and {i}?"}],
        "enable_thinking": bool(i % 2),
        "answer": str(2 * i),
        "tests": [{"given": i}],
    }
    for i in range(5)
]
LENGTH = 64


def write_table(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return str(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", write_lines), ("a.parquet", write_table)],
    ids=["lines", "table"],
)
def test_rewards_get_all_fields_of_the_record_that_a_row_is_of(tokenizer, tmp_path, name, write):
    source = SourceOptions(write(tmp_path / name, ROWS))
    data = DataOptions((source,), length=LENGTH)
    rows, records = PromptSource(source, tokenizer, data, room=9), PromptRecords(data)
    assert len(rows) == 5
    for i, expected in enumerate(ROWS):
        row = rows[i]
        record = records[row["place"]]
        assert record.fields == expected
        assert judge([RewardOptions("exact")], record, f" {2 * i}\n")[0] == 1
        ids = row["input_ids"][row["attention_mask"]].tolist()
        assert ids == tokenizer.apply_chat_template(
            expected["messages"], add_generation_prompt=True, enable_thinking=bool(i % 2)
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages = []; give messages, [{"),
        ({"messages": ["Hello"]}, 'messages = ["Hello"]; give messages, [{'),
        ({"messages": [{"content": "Hello"}]}, 'messages = [{"content": "Hello"}]; give messages'),
        ({"answer": "4"}, "messages is missing; give messages, [{"),
        ({"messages": "Hello"}, "messages is a string that is not JSON"),
        ({"messages": [{"role": "assistant", "content": "4"}]}, "messages ends with the assistant"),
    ],
)
def test_records_that_are_no_prompts_are_named_with_the_field(tokenizer, fields, message):

    with pytest.raises(UserError) as error:
        tokenise_prompt(Record("a.jsonl:3", fields), tokenizer, SourceOptions("a.jsonl"))
    assert str(error.value).startswith(f"a.jsonl:3: {message}")


def test_a_prepared_directory_is_no_source_of_prompts(tokenizer, tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    data = DataOptions((SourceOptions(str(tmp_path)),), length=LENGTH)
    message = f"^{tmp_path}: prompts are not prepared ahead; name the files$"
    with pytest.raises(UserError, match=message):
        PromptSource(data.sources[0], tokenizer, data, room=9)
    with pytest.raises(UserError, match=message):
        PromptRecords(data)
