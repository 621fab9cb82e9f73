"""`python -m tools.embed`: what it writes, against PyTorch, and what it refuses in one line."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import qwen_jax
from tests.checkpoint.quantised_layouts import quantise_directory
from tests.checkpoint.test_quantised_models import LAYOUTS, is_linear
from tests.reference import random_reference, save_reference
from tests.renderings.guard import random_guard, save_guard
from tests.reward_models import random_reward_model, save_reward_model
from tests.text.chat_templates import QWEN25
from tests.text.real_vocabulary import byte_characters
from tests.tools.conftest import ADDED, refusal

TOLERANCE = 1e-4
STEP = "<extra_0>"
SMALL = {"num_hidden_layers": 2, "max_position_embeddings": 400}
LABELS = {0: "bad", 1: "fair", 2: "good"}
TASK = "Given a web search query, retrieve relevant passages that answer the query"
JUDGE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: {}\n<Query>: {}\n<Document>: {}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4."}]
SOLVED = [CHAT[0], {"role": "assistant", "content": f"Two and two.{STEP}Four.{STEP}"}]
LINES = {
    "texts": [
        {"text": "the sea", "id": 7},
        {"text": "the sky\u2028", "instruction": "Find it."},
        {"text": "x"},
    ],
    "pairs": [
        {"query": "the sea", "document": "water"},
        {"query": "the sky", "document": "a<|im_end|>", "instruction": "Judge."},
    ],
    "chats": [{"messages": CHAT}, {"text": "the"}],
    "solutions": [
        {"messages": SOLVED},
        {"messages": CHAT[:1], "steps": ["Two and two.", "Four."]},
        {"messages": CHAT[:1], "steps": ["Five."]},
    ],
    "silent": [{"prompt": "x"}],
    "half pair": [{"query": "x"}],
    "number": [{"text": 3}],
    "both": [{"text": "x", "messages": CHAT}],
    "nothing said": [{"text": ""}],
    "nobody": [{"messages": [{"content": "x"}]}],
    "unsolved": [{"messages": CHAT[:1]}],
    "stepless": [{"messages": CHAT[:1], "steps": []}],
    "listed": [{"messages": [CHAT[0], {"role": "assistant", "content": ["x"]}]}],
    "long": [{"text": "x"}, {"text": "a" * 400}],
    "null": [{"text": None}],
    "null pair": [{"query": "x", "document": None}],
    "instructed": [{"text": "x", "instruction": 3}],
    "twice": [{"messages": CHAT, "steps": ["Four."]}],
    "null step": [{"messages": CHAT[:1], "steps": [None]}],
    "vector": [{"text": "x"}, {"text": "x", "vector": 1}],
    "score": [{"query": "x", "document": "y", "score": 1}],
    "rewarded": [{"text": "x", "score": None}],
    "scores": [{"text": "x", "score": 1, "scores": 1}],
    "labels": [{"text": "x", "labels": []}],
    "nothing and a task": [{"text": ""}, {"text": "", "instruction": None, "score": 3}],
}


def write_tokenizer(directory):
    """Bytes, the words that rerankers answer, the control tokens."""
    pieces = [*byte_characters(), "no", "ye", "yes"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\nn o\ny e\nye s\n", encoding="utf-8")
    added = {
        str(len(pieces) + i): {"content": token, "special": "|" in token, "normalized": False}
        for i, token in enumerate([*ADDED, STEP])
    }
    config = {"added_tokens_decoder": added, "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(QWEN25, encoding="utf-8")


@pytest.fixture(scope="module")
def references():
    labelled = {"num_labels": 3, "id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
    return {
        "embedder": random_reference("qwen3", 31, AutoModel, **SMALL),
        "reranker": random_reference("qwen3", 32, tie_word_embeddings=True, **SMALL),
        "classifier": random_reference(
            "qwen3", 33, AutoModelForSequenceClassification, **labelled, **SMALL
        ),
        "tagger": random_reference(
            "qwen3", 34, AutoModelForTokenClassification, **labelled, **SMALL
        ),
        "reward": random_reward_model(1, 35, **SMALL),
        "process": random_reward_model(2, 36, **SMALL),
        "guard": random_guard(37),
    }


@pytest.fixture(scope="module")
def models(references, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, reference in references.items():
        saves = {"reward": save_reward_model, "process": save_reward_model, "guard": save_guard}
        save = saves.get(name, save_reference)
        write_tokenizer(save(reference, root / name))
    linked(root / "embedder", root / "wordless", without="tokenizer_config.json")
    linked(root / "classifier", root / "ambiguous", without="config.json")
    config = json.loads((root / "classifier" / "config.json").read_text())
    config["id2label"] = {"0": "good", "1": "fair", "2": "good"}
    (root / "ambiguous" / "config.json").write_text(json.dumps(config))
    linked(root / "embedder", root / "broken", without="model.safetensors")
    weights = safetensors.numpy.load_file(root / "embedder" / "model.safetensors")
    # The letter z, which one line has.
    weights["embed_tokens.weight"][list(byte_characters()).index("z"), 3] = np.nan
    safetensors.numpy.save_file(weights, root / "broken" / "model.safetensors", {"format": "pt"})
    shutil.copytree(root / "reranker", root / "answerless")
    vocabulary = (root / "answerless" / "vocab.json").read_text(encoding="utf-8")
    vocabulary = vocabulary.replace('"yes"', '"yea"')
    (root / "answerless" / "vocab.json").write_text(vocabulary, encoding="utf-8")
    (root / "answerless" / "merges.txt").write_text("#version: 0.2\nn o\ny e\nye a\n")
    for model in list(root.iterdir()):
        linked(model, root / "weightless" / model.name, without="model.safetensors")
    return root


def linked(source, target, without):
    """A directory with the files of another but one."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.name != without:
            (target / path.name).symlink_to(path)


@pytest.fixture(scope="module")
def tokenizer(models):
    return qwen_jax.load_tokenizer(models / "embedder")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("input")
    for name, rows in LINES.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (directory / f"{name}.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    (directory / "broken.jsonl").write_text('{"text": "x"}\n{"text":')
    (directory / "list.jsonl").write_text("[1]")
    (directory / "string.jsonl").write_text('"x"')
    (directory / "none.jsonl").write_text("null")
    (directory / "pretty.jsonl").write_text(json.dumps({"text": "x"}, indent=2))
    (directory / "nan.jsonl").write_text('{"text": "x", "note": [NaN]}')
    (directory / "huge.jsonl").write_text('{"text": "x", "note": -1e999}')
    (directory / "unknown letter.jsonl").write_text('{"text": "x"}\n\n{"text": "z"}')
    (directory / "empty.jsonl").write_text("\n")
    (directory / "surrogate.jsonl").write_text('{"text": "x", "note": "\\ud800"}')
    return directory


WRITES = {
    "embed": ("embedder", "texts", ["--batch_size=2"]),
    "cut": ("embedder", "texts", ["--dimensions=10", "--instruction=Look."]),
    "half": ("embedder", "texts", ["--dtype=bfloat16"]),
    "embed with a language model": ("reranker", "texts", []),
    "rerank": ("reranker", "pairs", []),
    "rerank for a task": ("reranker", "pairs", ["--instruction=Look."]),
    "reward": ("reward", "chats", []),
    "step_reward": ("process", "solutions", []),
    "classify": ("classifier", "chats", []),
    "tokens": ("tagger", "chats", []),
    "guard": ("guard", "chats", []),
    "surrogate": ("embedder", "surrogate", []),
    "longer": ("embedder", "long", ["--allow_longer"]),
    "nothing said": ("embedder", "nothing and a task", []),
}
REFUSES = {
    "silent": ("embedder", "silent", [], "{file}:1: needs text; has prompt"),
    "half pair": ("reranker", "half pair", [], "{file}:1: needs document; has query"),
    "number": ("embedder", "number", [], "{file}:1: text should be a string, is 3"),
    "both": ("classifier", "both", [], "{file}:1: needs either text or messages; has text, mess"),
    "nothing said": ("classifier", "nothing said", [], "{file}:1: the text is empty"),
    "nobody": ("reward", "nobody", [], "{file}:1: messages[0]: needs a role"),
    "unsolved": ("process", "unsolved", [], "{file}:1: needs steps, or messages of which the la"),
    "stepless": ("process", "stepless", [], "{file}:1: steps should be a list of texts"),
    "listed": ("process", "listed", [], "{file}:1: the content of the assistant's last message"),
    "long": ("embedder", "long", [], "{file}:3: 401 tokens are longer than max_position_embeddi"),
    "broken": ("embedder", "broken", [], "{file}:2: not valid JSON (Expecting value at column"),
    "list": ("embedder", "list", [], "{file}:1: should be an object, is an array; write "),
    "empty": ("embedder", "empty", [], "{file}: holds no lines"),
    "absent": ("embedder", "absent", [], "{file}: cannot be read (No such file"),
    "no model": ("nowhere", "texts", [], "{model}: no such directory"),
    "wordless": ("wordless", "texts", [], "{file}:1: the tokenizer has no token <|endoftext|>"),
    "answerless": ("answerless", "pairs", [], "{model}: the vocabulary has no tokens \"no\" and"),
    "dimensions": ("embedder", "texts", ["--dimensions=65"], "{model}: dimensions = 65 should b"),
    "cut scores": ("reranker", "pairs", ["--dimensions=3"], "--dimensions is for --task=embed"),
    "told to score": ("reward", "chats", ["--instruction=x"], "--instruction is for --task=embed"),
    "string": ("embedder", "string", [], "{file}:1: should be an object, is a string; write one"),
    "none": ("embedder", "none", [], "{file}:1: should be an object, is null; write one object"),
    "pretty": ("embedder", "pretty", [], "{file}:1: not valid JSON (Expecting property name enclos"
               "ed in double quotes at column 2); write one object a line"),
    "nan": ("embedder", "nan", [], "{file}:1: not valid JSON (NaN is not a finite number)"),
    "huge": ("embedder", "huge", [], "{file}:1: not valid JSON (-1e999 is not a finite number)"),
    "null": ("embedder", "null", [], "{file}:1: text should be a string, is null"),
    "null pair": ("reranker", "null pair", [], "{file}:1: document should be a string, is null"),
    "null chat": ("reward", "null", [], "{file}:1: text should be a string, is null"),
    "instructed": ("embedder", "instructed", [], "{file}:1: instruction should be a string, is 3"),
    "twice": ("process", "twice", [], "{file}:1: messages end with the assistant's, and "),
    "null step": ("process", "null step", [], "{file}:1: step 1 should be a text without <extra_0"),
    "vector": ("embedder", "vector", [], "{file}:3: the results have a field vector too; rename"),
    "score": ("reranker", "score", [], "{file}:1: the results have a field score too; rename"),
    "rewarded": ("reward", "rewarded", [], "{file}:1: the results have a field score too; rename"),
    "scores": ("classifier", "scores", [], "{file}:1: the results have a field scores too; rena"),
    "labels": ("tagger", "labels", [], "{file}:1: the results have a field labels too; rename"),
    "two names": ("ambiguous", "chats", [], "{model}/config.json: id2label has 2 labels of the na"),
    "no vocabulary": ("embedder", "pairs", [], "{model}: the model is an embedder without an out"
                      "put head, which cannot answer yes or no; take a reranker\n"),
    "no labels": ("reranker", "chats", ["--task=classify"], "{model}: the model is a language mod"
                  "el, which has no such labels; take a classifier or a reward model\n"),
    "no reward": ("classifier", "chats", ["--task=reward"], "{model}: the model has 3 labels, whe"
                  "re a reward is one; take a reward model, or give --task=classify\n"),
    "steps": ("process", "chats", ["--task=reward"], "{model}: the model has 2 labels, where a re"
              "ward is one; take a reward model, or give --task=step_reward\n"),
    "no labels of classes": ("guard", "chats", ["--task=classify"], "{model}: the model is a gua"),
    "no risks": ("classifier", "chats", ["--task=guard"], "{model}: the model is a sequence cla"),
    "no steps": ("reward", "solutions", ["--task=step_reward"], "{model}: the model has 1 label, "
                 "where step rewards are of two; take a process reward model, or give --task=re"),
    "no such task": ("embedder", "texts", ["--task=guess"], "flag --task=guess: value should be"),
    "no batch": ("embedder", "texts", ["--batch_size=0"], "flag --batch_size=0"),
    "not packed": ("embedder", "texts", ["--weights=packed"], "{model}: is not quantised, so"),
    "taken": ("embedder", "texts", ["--workdir={taken}"], "{taken}/embed: exists already"),
    "file as workdir": ("embedder", "texts", ["--workdir={file}"], "{file}/embed: cannot be wri"),
    "no place": ("embedder", "texts", ["--workdir=/proc/zz"], "/proc/zz/embed: cannot be written"),
    "empty workdir": ("embedder", "texts", ["--workdir="], "--workdir is empty; give a path"),
    "empty input": ("embedder", "texts", ["--input="], "--input is empty; give a path"),
    "nobody's input": ("embedder", "texts", ["--input=~nobody-at-all/x"], "--input=~nobody-at-al"),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(models, files, run_tool, tmp_path_factory):
    """(workdir, exit status, stdout, stderr) of each command line above."""
    cases = {**WRITES, **{f"refuse {name}": case[:3] for name, case in REFUSES.items()}}
    root = tmp_path_factory.mktemp("workdirs")
    (root / "taken" / "embed").mkdir(parents=True)
    (root / "taken" / "embed" / "results.jsonl").write_text("precious")
    outcomes = {}
    for name, (model, file, more) in cases.items():
        # What is refused is refused before weights are read.
        if name.startswith("refuse "):
            model = f"weightless/{model}"
        places = {"taken": root / "taken", "file": files / f"{file}.jsonl"}
        source = [f"--model={models / model}", f"--input={files / file}.jsonl"]
        workdir = root / name
        more = [argument.format(**places) for argument in more]
        done = run_tool("embed", *source, f"--workdir={workdir}", *more)
        outcomes[name] = (workdir, done.returncode, done.stdout, done.stderr)
    assert (root / "taken" / "embed" / "results.jsonl").read_text() == "precious"
    return outcomes


@pytest.fixture(scope="module")
def written(results):
    """The folder of a case, and the lines in it."""

    def read(name, task):
        workdir, code, out, err = results[name]
        assert (code, err) == (0, "")
        folder = workdir / task
        assert [path.name for path in workdir.iterdir()] == [task]
        text = (folder / "results.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.split("\n")[:-1]]
        assert out == f"{len(rows)} lines in {folder / 'results.jsonl'}\n"
        return folder, rows

    return read


def run(reference, ids):
    with torch.no_grad():
        return reference(torch.as_tensor([ids]))


def check_vectors(rows, reference, tokenizer, texts, dimensions=64, tolerance=TOLERANCE):
    for row, text in zip(rows, texts, strict=True):
        ids = tokenizer.encode(text + "<|endoftext|>")
        last = run(reference.base_model, ids).last_hidden_state[0, -1, :dimensions]
        expected = torch.nn.functional.normalize(last, dim=0)
        np.testing.assert_allclose(row["vector"], expected, rtol=0, atol=tolerance)


def test_vectors_of_documents_and_queries(written, references, tokenizer):
    folder, rows = written("embed", "embed")
    texts = ["the sea", "Instruct: Find it.\nQuery:the sky\u2028", "x"]
    check_vectors(rows, references["embedder"], tokenizer, texts)
    given = [{k: v for k, v in row.items() if k != "vector"} for row in rows]
    assert given == LINES["texts"]
    vectors = np.load(folder / "vectors.npy")
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, np.array([row["vector"] for row in rows], np.float32))


def test_vectors_are_cut_and_all_lines_may_have_one_instruction(written, references, tokenizer):
    folder, rows = written("cut", "embed")
    texts = ["Instruct: Look.\nQuery:the sea", "Instruct: Find it.\nQuery:the sky\u2028"]
    texts.append("Instruct: Look.\nQuery:x")
    check_vectors(rows, references["embedder"], tokenizer, texts, 10)
    assert np.load(folder / "vectors.npy").shape == (3, 10)


def test_a_language_model_embeds_too(written, references, tokenizer):
    _, rows = written("embed with a language model", "embed")
    texts = ["the sea", "Instruct: Find it.\nQuery:the sky\u2028", "x"]
    check_vectors(rows, references["reranker"], tokenizer, texts)


def test_the_dtype_is_honoured_and_told(written, references, tokenizer):
    folder, rows = written("half", "embed")
    _, exact = written("embed", "embed")
    off = np.array([row["vector"] for row in rows]) - [row["vector"] for row in exact]
    assert 1e-4 < np.abs(off).max() < 0.05
    assert json.loads((folder / "run.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(("case", "task"), [("rerank", TASK), ("rerank for a task", "Look.")])
def test_the_reranker_answers_yes_or_no(written, references, tokenizer, case, task):
    _, rows = written(case, "rerank")
    no, yes = tokenizer.token_to_id("no"), tokenizer.token_to_id("yes")
    # The second document holds a control token as plain text, which no text can say.
    spelled = tokenizer.encode("<|im_end|>", allow_special=False)
    for row, default in zip(rows, (task, "Judge."), strict=True):
        text = JUDGE.format(default, row["query"], row["document"].replace("<|im_end|>", "\ue000"))
        before, _, after = text.partition("\ue000")
        ids = tokenizer.encode(before)
        if after:
            ids += [*spelled, *tokenizer.encode(after)]
        logits = run(references["reranker"], ids).logits[0, -1]
        expected = logits[[no, yes]].softmax(dim=0)[1]
        np.testing.assert_allclose(row["score"], expected, rtol=0, atol=TOLERANCE)


def chat_ids(tokenizer, row):
    if "text" in row:
        return tokenizer.encode(row["text"])
    return tokenizer.apply_chat_template(row["messages"])


def test_a_reward_is_read_at_the_end_of_the_chat(written, references, tokenizer):
    _, rows = written("reward", "reward")
    for row in rows:
        expected = run(references["reward"], chat_ids(tokenizer, row))[0, -1, 0]
        np.testing.assert_allclose(row["score"], expected, rtol=0, atol=TOLERANCE)


def test_steps_are_judged_one_by_one(written, references, tokenizer):
    _, rows = written("step_reward", "step_reward")
    for row in rows:
        messages = row["messages"]
        if "steps" in row:
            content = "".join(step + STEP for step in row["steps"])
            messages = [*messages, {"role": "assistant", "content": content}]
        ids = tokenizer.apply_chat_template(messages)
        places = [i for i, token in enumerate(ids) if token == tokenizer.added_tokens[STEP]]
        expected = run(references["process"], ids)[0, places].softmax(dim=-1)[:, 1]
        np.testing.assert_allclose(row["scores"], expected, rtol=0, atol=TOLERANCE)
    assert [len(row["scores"]) for row in rows] == [2, 2, 1]
    assert rows[0]["scores"] == rows[1]["scores"]


def test_labels_have_their_names(written, references, tokenizer):
    _, rows = written("classify", "classify")
    for row in rows:
        expected = run(references["classifier"], chat_ids(tokenizer, row)).logits[0]
        assert list(row["scores"]) == list(LABELS.values())
        np.testing.assert_allclose(list(row["scores"].values()), expected, rtol=0, atol=TOLERANCE)


def test_tokens_have_labels(written, references, tokenizer):
    _, rows = written("tokens", "classify")
    for row in rows:
        ids = chat_ids(tokenizer, row)
        expected = run(references["tagger"], ids).logits[0]
        assert row["tokens"] == [tokenizer.decode(i) for i in ids]
        assert row["labels"] == [LABELS[int(best)] for best in expected.argmax(dim=1)]
        scores = [list(of_token.values()) for of_token in row["scores"]]
        np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE)


def test_a_guard_judges_tokens_by_name(written, references, tokenizer):
    _, rows = written("guard", "guard")
    for row in rows:
        ids = chat_ids(tokenizer, row)
        expected = run(references["guard"], ids)[0]
        assert row["tokens"] == [tokenizer.decode(i) for i in ids]
        assert list(row["scores"][0]["risk_level"]) == ["Safe", "Unsafe", "Controversial"]
        assert list(row["scores"][0]["query_category"])[:2] == ["Violent", "LABEL_1"]
        scores = [[s for part in token.values() for s in part.values()] for token in row["scores"]]
        np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE)


def test_a_run_tells_what_it_was_made_with(written, models):
    folder, _ = written("cut", "embed")
    assert sorted(path.name for path in folder.iterdir()) == [
        "results.jsonl", "run.json", "vectors.npy",
    ]  # fmt: skip
    told = json.loads((folder / "run.json").read_text())
    assert told["task"] == "embed"
    assert told["versions"]["jax"] == jax.__version__
    assert told["device"]
    assert "git" in told
    assert told["flags"]["dimensions"] == 10
    assert told["config"] == json.loads((models / "embedder" / "config.json").read_text())


def test_half_a_surrogate_pair_in_another_field_is_kept(written):
    _, rows = written("surrogate", "embed")
    assert rows[0]["note"] == "\ud800"


def test_a_text_beyond_the_positions_runs_where_allowed(results):
    workdir, code, _, err = results["longer"]
    assert (code, (workdir / "embed" / "vectors.npy").exists()) == (0, True)
    assert err.startswith("warning: the text is longer than the model's 400 positions")


@pytest.mark.parametrize("name", REFUSES)
def test_bad_input_is_refused_in_one_line(name, results, models, files):
    workdir, code, out, err = results[f"refuse {name}"]
    model, file, _, message = REFUSES[name]
    places = {"model": models / "weightless" / model, "file": files / f"{file}.jsonl"}
    places["taken"] = workdir.parent / "taken"
    assert (code, out) == (1, "")
    assert err.startswith(message.format(**places)), err
    assert err.count("\n") == 1
    assert not workdir.exists()


def test_an_empty_document_has_a_vector(written, references, tokenizer):
    _, rows = written("nothing said", "embed")
    check_vectors(rows, references["embedder"], tokenizer, ["", ""])
    assert rows[1]["score"] == 3


def test_scores_that_are_not_numbers_name_their_line(run_tool, models, files, tmp_path):
    file = files / "unknown letter.jsonl"
    done = run_tool(
        "embed", f"--model={models / 'broken'}", f"--input={file}", f"--workdir={tmp_path / 'new'}"
    )
    assert (done.returncode, done.stdout) == (1, "")
    warning, line = done.stderr.splitlines()
    assert warning.startswith("warning: ")
    assert line == (
        f"{file}:3: its scores are NaN or infinite in float32; download the checkpoint again"
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("tool", "model", "what"),
    [
        ("generate", "embedder", "an embedder without an output head"),
        ("generate", "process", "a reward model"),
        ("chat", "tagger", "a token classifier"),
    ],
)
def test_what_writes_no_text_is_refused_before_its_weights_are_read(
    run_tool, models, tool, model, what
):
    directory = models / "weightless" / model
    prompt = ["--prompt=x"] if tool == "generate" else []
    line = refusal(run_tool(tool, f"--model={directory}", *prompt))
    assert line == (
        f"{directory}: the model is {what}, which writes no text; tools.embed makes vectors and "
        "scores with it"
    )


@pytest.fixture(scope="module")
def bare(models, tmp_path_factory):
    """An embedder of which the tensors alone tell that it is one; quantised."""
    directory = tmp_path_factory.mktemp("bare")
    save_reference(random_reference("qwen3", 37, AutoModel, **SMALL), directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    quantise_directory(directory, *LAYOUTS["gptq 4 bits"], is_linear)
    write_tokenizer(directory)
    return directory


@pytest.mark.parametrize("tool", ["embed", "generate"])
def test_what_the_tensors_tell_is_refused_in_one_line_too(run_tool, bare, files, tmp_path, tool):
    given = {
        "embed": [f"--input={files / 'pairs.jsonl'}", f"--workdir={tmp_path / 'new'}"],
        "generate": ["--prompt=x"],
    }
    line = refusal(run_tool(tool, f"--model={bare}", *given[tool]))
    assert line.startswith(f"{bare}: the model is an embedder without an output head, which ")


def test_help_lists_every_flag(run_tool):
    result = run_tool("embed", "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("Makes vectors or scores")
    for name in ("model", "workdir", "input", "task", "dimensions", "instruction", "weights"):
        assert f"--{name}: " in result.stdout
