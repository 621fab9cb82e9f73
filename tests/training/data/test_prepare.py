"""Prepared directories: their bytes, what reads them, and what refuses them."""

import json
import re
import shutil

import numpy as np
import pytest

from qwen_jax.errors import UserError
from qwen_jax.text import load_tokenizer
from qwen_jax.training.data import prepare as prepare_module
from qwen_jax.training.data.indexed import IndexedRecords, fingerprint
from qwen_jax.training.data.options import SourceOptions, TokenOptions
from qwen_jax.training.data.prepare import prepare
from qwen_jax.training.data.records import open_records
from qwen_jax.training.data.tokenise import kind_of, tokenise
from tests.text.chat_templates import QWEN25
from tests.training.data.conftest import ADDED, chat_file, text_file, write_lines, write_tokenizer

PART = 7
DEFAULT = TokenOptions()


def run(target, tokenizer_directory, path, options=DEFAULT, **arguments):
    source = SourceOptions(str(path))
    return prepare(target, tokenizer_directory, source, options, records_a_part=PART, **arguments)


def bytes_of(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return chat_file(tmp_path_factory.mktemp("chats") / "chats.jsonl", 38)


@pytest.fixture
def prepared(tmp_path, tokenizer_directory, chats):
    run(tmp_path / "prepared", tokenizer_directory, chats)
    return tmp_path / "prepared"


@pytest.mark.parametrize("write", [text_file, chat_file], ids=["texts", "chats"])
@pytest.mark.parametrize("unused", [0, 70_000])
def test_what_is_read_is_what_tokenising_gives(tmp_path, write, unused):
    """Also where ids take 32 bits."""
    directory = write_tokenizer(tmp_path / "tokenizer", unused=unused)
    tokenizer = load_tokenizer(directory)
    path = write(tmp_path / "a.jsonl", 38)
    options = TokenOptions(learn=("user",))
    meta = run(tmp_path / "out", directory, path, options)
    assert meta.dtype == ("uint32" if unused else "uint16")
    assert meta.records == (7, 7, 7, 7, 7, 3)
    source = SourceOptions(path)
    records = open_records(source)
    kind = kind_of(records[0], source)
    found = IndexedRecords(tmp_path / "out", tokenizer, options)
    assert len(found) == 38
    for i in np.random.default_rng(0).permutation(38):
        expected = tokenise(records[int(i)], kind, tokenizer, source, options)
        np.testing.assert_array_equal(found[int(i)].ids, expected.ids)
        np.testing.assert_array_equal(found[int(i)].learned, expected.learned)
        assert found[int(i)].ids.dtype == np.int32
    assert sum(meta.tokens) == sum(len(found[i].ids) for i in range(38))


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path, tokenizer_directory, chats):
    results = {}
    for workers in (1, 2, 3):
        calls = []
        run(
            tmp_path / str(workers),
            tokenizer_directory,
            chats,
            workers=workers,
            on_part=lambda done, total, calls=calls: calls.append((done, total)),
        )
        results[workers] = bytes_of(tmp_path / str(workers))
        assert calls[0] == (0, 38)
        assert calls[-1] == (38, 38)
        assert len(calls) == 7
    assert len(results[1]) == 6 * 3 + 2
    assert results[1] == results[2] == results[3]


def test_a_run_that_failed_goes_on_with_what_is_missing(
    tmp_path, tokenizer_directory, chats, prepared, monkeypatch
):
    target = tmp_path / "again"
    written = []
    original = prepare_module._write_part

    def write(job, number, *rest):
        if len(written) == 3:
            (job.target / ".00003.partial-00").mkdir()
            raise KeyboardInterrupt
        written.append(number)
        original(job, number, *rest)

    monkeypatch.setattr(prepare_module, "_write_part", write)
    with pytest.raises(KeyboardInterrupt):
        run(target, tokenizer_directory, chats)
    tokenizer = load_tokenizer(tokenizer_directory)
    with pytest.raises(UserError, match=r"is not finished; run tools\.prepare_data again to go on"):
        IndexedRecords(target, tokenizer, TokenOptions())
    shutil.rmtree(target / "00001")
    written.clear()
    written_before = {"00000", "00002"}
    monkeypatch.setattr(
        prepare_module,
        "_write_part",
        lambda job, number, *rest: (written.append(number), original(job, number, *rest)),
    )
    run(target, tokenizer_directory, chats)
    assert written == [1, 3, 4, 5]
    assert written_before <= {path.name for path in target.iterdir()}
    assert bytes_of(target) == bytes_of(prepared)
    written.clear()
    run(target, tokenizer_directory, chats)
    assert written == []


def test_a_broken_record_stops_the_run_by_its_name(tmp_path, tokenizer_directory):
    rows = [{"text": "x"}] * 30
    rows[17] = {"text": None, "id": 4}
    path = tmp_path / "a.jsonl"
    write_lines(path, rows)
    for workers in (1, 2):
        with pytest.raises(UserError, match=re.escape(f"{path}:18: has neither text nor messages")):
            run(tmp_path / "out", tokenizer_directory, path, workers=workers)
    assert not (tmp_path / "out" / "meta.json").exists()


def test_a_directory_of_other_settings_is_not_mixed_up(
    tmp_path, tokenizer_directory, chats, prepared
):
    with pytest.raises(UserError, match="prepared: was begun with other options; give another di"):
        run(prepared, tokenizer_directory, chats, TokenOptions(thinking=False))
    longer = tmp_path / "chats.jsonl"
    shutil.copy(chats, longer)
    run(prepared, tokenizer_directory, longer)
    with longer.open("a") as file:
        file.write(longer.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="was begun with other records, files; give another direc"):
        run(prepared, tokenizer_directory, longer)
    other = write_tokenizer(tmp_path / "template", template=QWEN25)
    with pytest.raises(UserError, match="was begun with other chat_templates; give another"):
        run(prepared, other, chats)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(UserError, match="full: holds other things; give a new directory"):
        run(tmp_path / "full", tokenizer_directory, chats)
    with pytest.raises(UserError, match="x: cannot be written"):
        run(tmp_path / "full" / "x", tokenizer_directory, chats)


def test_data_of_another_tokenizer_template_or_option_is_refused(tmp_path, tokenizer, prepared):
    def refusal(tokenizer=tokenizer, **options):
        with pytest.raises(UserError) as caught:
            IndexedRecords(prepared, tokenizer, TokenOptions(**options))
        return str(caught.value).removeprefix(f"{prepared}: ")

    added = [*ADDED[:-1], "<other>"]
    other = load_tokenizer(write_tokenizer(tmp_path / "other", added))
    assert refusal(other).startswith("was made with another tokenizer than the checkpoint's")
    template = load_tokenizer(write_tokenizer(tmp_path / "template", template=QWEN25))
    assert refusal(template).startswith("was made with another chat template than the")
    assert refusal(learn=("user",)).startswith(
        'was made with learn = ["assistant"], now it is ["user"]; prepare the data anew'
    )
    # What is of texts alone does not matter to chats.
    IndexedRecords(prepared, tokenizer, TokenOptions(end_of_text="<|im_end|>"))


def test_options_of_chats_do_not_matter_to_texts(tmp_path, tokenizer_directory, tokenizer):
    run(tmp_path / "out", tokenizer_directory, text_file(tmp_path / "a.jsonl", 9))
    IndexedRecords(tmp_path / "out", tokenizer, TokenOptions(learn=("user",), thinking=False))
    with pytest.raises(UserError, match=r"was made with end_of_text = null, now it is \"\"; prep"):
        IndexedRecords(tmp_path / "out", tokenizer, TokenOptions(end_of_text=""))


def test_damage_is_found_when_a_directory_is_opened(tokenizer, prepared):
    def refusal():
        with pytest.raises(UserError) as caught:
            IndexedRecords(prepared, tokenizer, TokenOptions())[15]
        return str(caught.value)

    path = prepared / "00002" / "tokens.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    expected = f"{path}: has {len(whole) - 2} bytes, should have {len(whole)}; prepare"
    assert refusal().startswith(expected)
    path.write_bytes(whole)
    ends = prepared / "00002" / "ends.npy"
    kept = np.load(ends)
    np.save(ends, kept[:-1])
    assert refusal() == f"{ends}: is not what meta.json says; prepare the data anew"
    ends.write_bytes(b"x")
    assert refusal().startswith(f"{ends}: cannot be read")
    np.save(ends, kept)
    (prepared / "00001" / "learned.bin").unlink()
    assert refusal() == f"{prepared / '00001' / 'learned.bin'}: no such file; prepare the data anew"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "format = 9 is not supported: this is 1"),
        ({"dtype": "int8"}, 'dtype = "int8" is not supported: known are uint16 and uint32'),
        ({"kind": "x"}, 'kind = "x" is not supported'),
        ({"records": [1]}, "records and tokens are not of the same parts"),
        ({"more": 1}, "unknown field more"),
        ({"tokens": None}, "tokens is missing and needed"),
    ],
)
def test_a_meta_file_of_another_form_is_refused(tokenizer, prepared, change, message):
    path = prepared / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=re.escape(str(path)) + ": " + re.escape(message)):
        IndexedRecords(prepared, tokenizer, TokenOptions())


def test_fingerprints_tell_tokenizers_apart(tmp_path, tokenizer, tokenizer_directory):
    assert fingerprint(tokenizer) == fingerprint(load_tokenizer(tokenizer_directory))
    merges = tmp_path / "merges"
    shutil.copytree(tokenizer_directory, merges)
    text = (merges / "merges.txt").read_text(encoding="utf-8")
    (merges / "merges.txt").write_text(text.replace("h e\n", ""), encoding="utf-8")
    assert fingerprint(load_tokenizer(merges)) != fingerprint(tokenizer)
