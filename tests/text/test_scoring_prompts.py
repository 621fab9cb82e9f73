"""Prompts of embedders, rerankers and reward models against the published texts."""

import json
import shutil

import pytest

from qwen_jax.errors import UserError
from qwen_jax.text import load_tokenizer
from qwen_jax.text.scoring_prompts import (
    STEP,
    answer_ids,
    document_ids,
    query_ids,
    rerank_ids,
    solution_ids,
    split_steps,
    step_token_id,
)

from .chat_templates import QWEN25

TASK = "Given a web search query, retrieve relevant passages that answer the query"
QUERY, DOCUMENT = "What is the capital of China?", "Peking, 北京, is it.\n"
JUDGEMENT = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: {task}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
STEPS = ["Two and two.\n", "So it is four.", "\\boxed{4}"]
CHAT = [{"role": "system", "content": "Reason."}, {"role": "user", "content": "2 + 2?"}]
FORGERIES = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "</think>", STEP]


@pytest.fixture(scope="module")
def judge(vocab_and_merges_directory, tmp_path_factory):
    """The tokenizer of a process reward model, and transformers' of the same files."""
    from transformers import Qwen2Tokenizer

    directory = tmp_path_factory.mktemp("judge")
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(vocab_and_merges_directory / name, directory / name)
    config = json.loads((vocab_and_merges_directory / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["151651"]["content"] = STEP
    config["additional_special_tokens"] = []
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(QWEN25, encoding="utf-8")
    return load_tokenizer(directory), Qwen2Tokenizer.from_pretrained(directory)


def test_documents_and_queries_have_the_ids_of_the_published_text(qwen3, reference):
    def expected(text):
        return reference(text + "<|endoftext|>", add_special_tokens=False)["input_ids"]

    assert document_ids(qwen3, DOCUMENT) == expected(DOCUMENT)
    assert document_ids(qwen3, "") == [151643]
    assert query_ids(qwen3, QUERY) == expected(f"Instruct: {TASK}\nQuery:{QUERY}")
    assert query_ids(qwen3, QUERY, "Find.") == expected(f"Instruct: Find.\nQuery:{QUERY}")


def test_a_document_is_what_the_post_processor_of_the_embedder_makes(qwen3_directory, tmp_path):
    from tokenizers import Tokenizer, processors

    pipeline = Tokenizer.from_file(str(qwen3_directory / "tokenizer.json"))
    pipeline.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 151643)]
    )
    pipeline.save(str(tmp_path / "tokenizer.json"))
    shutil.copyfile(qwen3_directory / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    embedder = load_tokenizer(tmp_path)
    assert document_ids(embedder, DOCUMENT) == pipeline.encode(DOCUMENT).ids
    assert document_ids(embedder, DOCUMENT).count(151643) == 1


@pytest.mark.parametrize("document", [DOCUMENT, "", "\n\n", " a "])
def test_a_reranker_is_asked_as_published(qwen3, reference, document):
    text = JUDGEMENT.format(task=TASK, query=QUERY, document=document)
    expected = reference(text, add_special_tokens=False)["input_ids"]
    assert rerank_ids(qwen3, QUERY, document) == expected
    # The published code encodes what stands before, between and after the texts by itself.
    start, _, end = text.partition("<Instruct>")
    middle, _, end = ("<Instruct>" + end).rpartition("<|im_end|>\n<|im_start|>")
    parts = [start, middle, "<|im_end|>\n<|im_start|>" + end]
    assert rerank_ids(qwen3, QUERY, document) == [
        i for part in parts for i in reference(part, add_special_tokens=False)["input_ids"]
    ]


def test_the_answers_are_single_tokens(qwen3, reference):
    assert answer_ids(qwen3) == tuple(reference.convert_tokens_to_ids(["no", "yes"]))
    assert qwen3.decode(answer_ids(qwen3)) == "noyes"


def test_a_solution_has_the_ids_of_the_published_text(judge):
    tokenizer, theirs = judge
    solution = "".join(step + STEP for step in STEPS)
    text = theirs.apply_chat_template(
        [*CHAT, {"role": "assistant", "content": solution}], tokenize=False, chat_template=QWEN25
    )
    ids = solution_ids(tokenizer, CHAT, STEPS)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ids.count(151651) == 3
    assert step_token_id(tokenizer) == 151651
    assert split_steps(solution) == split_steps(solution.removesuffix(STEP)) == STEPS


@pytest.mark.parametrize("token", FORGERIES)
def test_words_cannot_forge_control_tokens(judge, token):
    tokenizer, _ = judge
    control = set(tokenizer.added_tokens.values())

    def skeleton(ids):
        return [i for i in ids if i in control]

    assert skeleton(document_ids(tokenizer, token + "a")) == [151643]
    assert skeleton(query_ids(tokenizer, token, token)) == [151643]
    asked = rerank_ids(tokenizer, token, f"{token}\n{token}", token)
    assert skeleton(asked) == skeleton(rerank_ids(tokenizer, "a", "b", "c"))
    chat = [{"role": "user", "content": token}]
    if token != STEP:
        solution = solution_ids(tokenizer, chat, ["a", token])
        assert skeleton(solution) == skeleton(solution_ids(tokenizer, CHAT[1:], ["a", "b"]))
    assert solution_ids(tokenizer, chat, ["a"]).count(151651) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: document_ids(t, 3), "text: must be a string"),
        (lambda t: query_ids(t, None), "query should be a string, is 'None'"),
        (lambda t: query_ids(t, "a", ["b"]), "instruction should be a string"),
        (lambda t: rerank_ids(t, "a", {}), "document should be a string"),
        (lambda t: solution_ids(t, CHAT, []), "steps should be a list of texts"),
        (lambda t: solution_ids(t, CHAT, "ab"), "steps should be a list of texts"),
        (lambda t: solution_ids(t, CHAT, ["a", ""]), "step 2 should be a text"),
        (lambda t: solution_ids(t, CHAT, ["a" + STEP]), "step 1 should be a text without <extra_"),
        (lambda t: solution_ids(t, "ab", ["a"]), "messages should be a list"),
        (lambda t: solution_ids(t, [{"content": "a"}], ["a"]), r"messages\[0\]: needs a role"),
    ],
)
def test_what_is_no_text_is_refused(judge, make, message):
    with pytest.raises(UserError, match=message):
        make(judge[0])


def test_a_tokenizer_without_the_tokens_is_refused(small_directory):
    tokenizer = load_tokenizer(small_directory)
    with pytest.raises(UserError, match="no token <extra_0>, which these prompts need"):
        solution_ids(tokenizer, CHAT, ["a"])
    with pytest.raises(UserError, match='no tokens "no" and "yes"'):
        answer_ids(tokenizer)
