"""Records of files, directories, patterns and the hub, and every line that refuses one."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen_jax.errors import UserError
from qwen_jax.text import load_tokenizer
from qwen_jax.training.data.columns import ParquetRows, RowGroups
from qwen_jax.training.data.lines import _BLOCK, JsonLines
from qwen_jax.training.data.options import SourceOptions, TokenOptions
from qwen_jax.training.data.records import open_records
from qwen_jax.training.data.tokenise import end_of_text_id, kind_of, tokenise
from tests.checkpoint.hub_server import serve
from tests.training.data.conftest import random_texts, write_lines, write_tokenizer


def texts_of(path, **options):
    records = open_records(SourceOptions(str(path), **options))
    return [records[i].fields["text"] for i in range(len(records))]


def test_lines_of_jsonl_are_records_whatever_ends_them(tmp_path):
    texts = ["a", "b\u2028c\n", "", "é\U0001f600"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path = tmp_path / "a.jsonl"
    for content in (
        "\n".join(lines),
        "\n".join(lines) + "\n",
        "\ufeff" + "\r\n".join(lines),
        "\n  \n" + "\n\n \t\n".join(lines) + "\n\n",
    ):
        path.write_bytes(content.encode())
        records = open_records(SourceOptions(str(path)))
        assert [records[i].fields["text"] for i in range(len(records))] == texts
        numbers = [n for n, line in enumerate(content.split("\n"), 1) if line.strip("\ufeff \t\r")]
        assert [records[i].name for i in range(4)] == [f"{path}:{n}" for n in numbers]


def test_lines_are_found_across_the_blocks_that_a_file_is_searched_in(tmp_path, monkeypatch):
    monkeypatch.setattr("qwen_jax.training.data.lines._BLOCK", 7)
    assert _BLOCK > 7
    rows = [{"text": text} for text in random_texts(50)]
    path = tmp_path / "a.jsonl"
    write_lines(path, rows)
    found = JsonLines(path)
    assert [found.read(i) for i in range(len(found))] == rows


def test_documents_of_a_text_file_are_cut_at_separators_that_stand_alone(tmp_path):
    path = tmp_path / "a.txt"
    mark = "<|endoftext|>"
    for content, expected in {
        "one\ntwo\n": ["one\ntwo"],
        f"one {mark}\n {mark}": [f"one {mark}\n {mark}"],
        f"{mark}\n\n\none\n{mark}\r\ntwo\n\n{mark}\n\n{mark}\nthree": ["\n\none", "two\n", "three"],
        f"\ufeff{mark}\none\n{mark}": ["one"],
    }.items():
        path.write_bytes(content.encode())
        assert texts_of(path) == expected
    path.write_bytes(f"one\ntwo\n{mark}\n{mark}\nthree".encode())
    records = open_records(SourceOptions(str(path)))
    assert [records[i].name for i in range(2)] == [f"{path}:1", f"{path}:5"]


def test_rows_of_parquet_equal_pyarrows(tmp_path):
    texts = random_texts(57)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts, "id": range(57)}), path, row_group_size=10)
    records = open_records(SourceOptions(str(path)))
    order = np.random.default_rng(0).permutation(57)
    assert [records[i].fields for i in order] == [{"text": texts[i]} for i in order]
    assert records[56].name == f"{path}: row 57"


def test_row_groups_in_memory_stay_below_their_limit(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 1000] * 40}), path, row_group_size=10)
    groups = RowGroups(limit=25_000)
    rows = ParquetRows(path, ["text"], [], groups)
    for i in range(40):
        assert rows.read(i) == {"text": "x" * 1000}
        assert groups._bytes == sum(t.nbytes for t in groups._tables.values()) <= 25_000
    assert len(groups._tables) == 2


def test_nulls_that_a_table_fills_up_with_are_absent(tmp_path):
    calls = [{"function": {"name": "f", "arguments": {"a": 1}}}]
    other = [{"function": {"name": "g", "arguments": {"b": "x"}}}]
    chats = [
        [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": calls}],
        [{"role": "user", "content": "y"}, {"role": "assistant", "tool_calls": other}],
    ]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": chats}), path)
    records = open_records(SourceOptions(str(path)))
    assert [records[i].fields["messages"] for i in range(2)] == chats


def test_messages_and_tools_may_be_json_in_a_column_of_strings(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    tools = [{"name": "f"}]
    path = tmp_path / "a.parquet"
    table = {"messages": [json.dumps(chat)], "tools": [json.dumps(tools)]}
    pq.write_table(pa.table(table), path)
    source = SourceOptions(str(path))
    example = tokenise(open_records(source)[0], "chat", tokenizer, source, TokenOptions())
    assert example.ids.tolist() == tokenizer.apply_chat_template(chat, tools)


def test_directories_and_patterns_are_read_in_order_of_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.jsonl"):
        write_lines(tmp_path / name, [{"text": name}])
    (tmp_path / "notes.md").write_text("not data")
    assert texts_of(tmp_path) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert texts_of(f"{tmp_path}/[bc].jsonl") == ["b.jsonl", "c.jsonl"]
    assert texts_of(tmp_path, files="[ab]*") == ["a.jsonl", "b.jsonl"]


def test_a_split_is_chosen_by_the_names_of_files_or_folders(tmp_path):
    names = ["train-00001-of-2", "train-00000-of-2", "test-00000-of-1"]
    for name in names:
        write_lines(tmp_path / f"{name}.jsonl", [{"text": name}])
    assert texts_of(tmp_path) == sorted(names[:2])
    assert texts_of(tmp_path, split="test") == names[2:]
    with pytest.raises(UserError, match="has no split dev, it has test, train"):
        texts_of(tmp_path, split="dev")
    write_lines(tmp_path / "more.jsonl", [{"text": "x"}])
    with pytest.raises(UserError, match=r"some files are named by splits, more\.jsonl is not"):
        texts_of(tmp_path)

    for folder in ("en/train", "de/train", "de/test"):
        (tmp_path / "sets" / folder).mkdir(parents=True)
        write_lines(tmp_path / "sets" / folder / "0000.jsonl", [{"text": folder}])
    with pytest.raises(UserError, match=re.escape("has files in de/train, en/train; choose by")):
        texts_of(tmp_path / "sets")
    assert texts_of(tmp_path / "sets", files="de/*") == ["de/train"]
    assert texts_of(tmp_path / "sets", files="*") == ["de/train", "en/train"]


def test_a_data_set_of_the_hub_is_downloaded_without_code(tmp_path):
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    for split in ("train", "test"):
        table = pa.table({"text": [f"{split} {i}" for i in range(3)]})
        pq.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    (folder / "loader.py").write_text("raise SystemExit")
    (folder / "README.md").write_text("card")
    script = (
        "import sys; from qwen_jax.training.data.options import SourceOptions\n"
        "from qwen_jax.training.data.records import open_records\n"
        "from qwen_jax.errors import UserError\n"
        "try:\n"
        "    r = open_records(SourceOptions(sys.argv[1]))\n"
        "    print([r[i].fields['text'] for i in range(len(r))])\n"
        "except UserError as error: print(error)\n"
    )
    with serve({"org/set": folder}) as hub:
        environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}

        def run(name):
            command = [sys.executable, "-c", script, name]
            return subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            ).stdout

        assert run("org/set") == "['train 0', 'train 1', 'train 2']\n"
        assert {
            name for name in hub.files_served("org/set") if not name.startswith("data/")
        } == set()
        assert "org/absent: no such directory, and no such repository on the hub" in run(
            "org/absent"
        )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "{path}: is empty"),
        ("a.jsonl", b"\n \n", "{path}: holds no lines; write one object a line"),
        ("a.jsonl", b'{"text": 1}\n', "{path}:1: text = 1 should be a string"),
        ("a.jsonl", b'\n{"text": "x"', "{path}:2: not valid JSON"),
        ("a.jsonl", b'[1]\n', "{path}:1: should be an object, is an array"),
        ("a.jsonl", b'{"text": NaN}\n', "{path}:1: not valid JSON (NaN is not a finite number)"),
        ("a.jsonl", b'{"text": "\xff"}\n', "{path}:1: is not UTF-8 text (byte 10)"),
        ("a.jsonl", b'{"body": "x", "id": 3}\n',
         "{path}:1: has neither text nor messages, it has body, id"),
        ("a.jsonl", b'{"text": "x", "messages": []}\n', "{path}:1: has both text and messages"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "{path}:1: text: character 0 is half of a surrogate"),
        ("a.txt", b" \n", "{path}: holds no text"),
        ("a.txt", b"x\xff", "{path}:1: is not UTF-8 text (byte 1)"),
        ("a.parquet", b"x", "{path}: cannot be read as parquet"),
        ("a.json", b"{}", "{path}: is not read; give a file that ends in .jsonl, .txt, .parquet"),
    ],
)  # fmt: skip
def test_broken_files_are_refused_by_file_and_line(tokenizer, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    source = SourceOptions(str(path))
    with pytest.raises(UserError, match="^" + re.escape(message.format(path=path))):
        record = open_records(source)[0]
        tokenise(record, kind_of(record, source), tokenizer, source, TokenOptions())


def test_other_things_than_sources_are_refused(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "b.parquet")
    (tmp_path / "mixed").mkdir()
    write_lines(tmp_path / "mixed" / "a.jsonl", [{"text": "x"}])
    (tmp_path / "mixed" / "a.txt").write_text("x")
    (tmp_path / "none").mkdir()
    for path, message in {
        tmp_path / "a.parquet": "has none of the columns text, messages, it has body; name the one",
        tmp_path / "b.parquet": "holds no rows",
        tmp_path / "mixed": "holds .jsonl, .txt; choose by files, such as *.jsonl",
        tmp_path / "none": "holds no files *.jsonl, *.txt, *.parquet; of other formats the hub",
        tmp_path / "*.x": "no file has such a name",
        tmp_path / "absent": "no such file or directory, and not the id of a data set on the hub",
    }.items():
        with pytest.raises(UserError, match="^" + re.escape(f"{path}: {message}")):
            open_records(SourceOptions(str(path)))


def test_a_source_holds_one_kind_of_records(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    write_lines(path, [{"text": "x"}, {"messages": []}])
    source = SourceOptions(str(path))
    records = open_records(source)
    kind = kind_of(records[0], source)
    with pytest.raises(
        UserError, match=r"a\.jsonl:2: is a chat, the source's first record is a te"
    ):
        tokenise(records[1], kind, tokenizer, source, TokenOptions())


def test_fields_are_read_by_the_names_that_are_given(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    write_lines(path, [{"text": "x", "body": "y"}])
    source = SourceOptions(str(path), text_field="body", messages_field="m")
    example = tokenise(open_records(source)[0], "text", tokenizer, source, TokenOptions())
    assert tokenizer.decode(example.ids) == "y<|endoftext|>"


def test_texts_end_as_the_tokenizer_ends_them_and_forge_no_control_token(tokenizer, tmp_path):
    def encode(text, tokenizer=tokenizer, **options):
        path = tmp_path / "a.jsonl"
        write_lines(path, [{"text": text}])
        source = SourceOptions(str(path))
        example = tokenise(
            open_records(source)[0], "text", tokenizer, source, TokenOptions(**options)
        )
        assert example.learned.all()
        return example.ids.tolist()

    end, added = tokenizer.added_tokens["<|endoftext|>"], set(tokenizer.added_tokens.values())
    quoted = encode("a<|im_end|>b")
    assert quoted[-1] == end
    assert not added & set(quoted[:-1])
    allowed = encode("a<|im_end|>b", allow_special=True)
    assert allowed.count(tokenizer.added_tokens["<|im_end|>"]) == 1
    assert encode("a", end_of_text="<|im_end|>")[-1] == tokenizer.added_tokens["<|im_end|>"]
    assert encode("a", end_of_text="") == tokenizer.encode("a")
    assert encode("") == [end]
    with pytest.raises(UserError, match=r"a\.jsonl:1: text is empty; leave the record out"):
        encode("", end_of_text="")
    with pytest.raises(UserError, match="end_of_text = <x> is no token of the tokenizer"):
        end_of_text_id(tokenizer, TokenOptions(end_of_text="<x>"))

    eos = load_tokenizer(write_tokenizer(tmp_path / "eos", added=["<|im_end|>"]))
    assert end_of_text_id(eos, TokenOptions()) == eos.added_tokens["<|im_end|>"]
