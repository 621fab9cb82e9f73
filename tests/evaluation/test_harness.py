"""lm-evaluation-harness on local tasks: through us and through transformers, one checkpoint."""

import builtins
import itertools
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
import yaml

import qwen_jax
from qwen_jax.embedded.tokenizer import write_tokenizer
from qwen_jax.errors import UserError
from qwen_jax.evaluation.harness import HarnessOptions, harness_model, run_harness
from qwen_jax.evaluation.harness_requests import Respondent
from tests.reference import random_reference, save_reference

# Of a log probability, and of a sum of them by the token: one is about 5 nats here.
TOLERANCE = 1e-4
NATS = 5
LENGTH = 96
WORDS = "the sea rises in the hills above a town where snow lies until the end of April".split()
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    # No context at all: the likelihood is that of the whole choice.
    "bare choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "target_delimiter": "",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "bits_per_byte")],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["e", "th"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def words(rng, count):
    return " ".join(rng.choices(WORDS, k=count))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    reference = random_reference("qwen3", 71, num_hidden_layers=2, max_position_embeddings=LENGTH)
    save_reference(reference, directory)
    write_tokenizer(directory, [" ".join(WORDS)] * 20, 320)
    return directory


@pytest.fixture(scope="module")
def theirs(checkpoint):
    from lm_eval.models.huggingface import HFLM

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)


@pytest.fixture(scope="module")
def respondent(checkpoint):
    model, params = qwen_jax.load_pretrained(checkpoint)
    return Respondent(model, params, qwen_jax.load_tokenizer(checkpoint), LENGTH, batch_size=4)


@pytest.fixture(scope="module")
def task_path(tmp_path_factory, theirs):
    """Documents short and longer than the model reads; half the answers are what it writes."""
    directory, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)
    documents = [
        {
            "question": words(rng, rng.choice([1, 3, 9, 30, 120])),
            "choices": [words(rng, rng.randint(1, 6)) for _ in range(3)],
            "gold": rng.randrange(3),
            "text": words(rng, rng.choice([1, 20, 200])),
        }
        for _ in range(14)
    ]
    documents[0]["question"] = "the sea "
    settings = TASKS["answers"]["generation_kwargs"]
    asked = [SimpleNamespace(args=(d["question"], dict(settings))) for d in documents]
    written = theirs.generate_until(asked, disable_tqdm=True)
    for i, (document, text) in enumerate(zip(documents, written, strict=True)):
        document["answer"] = text if i % 2 else "no"
    data = directory / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, fields in TASKS.items():
        task = {
            "task": name.replace(" ", "_"),
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            **fields,
        }
        (directory / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return directory


@pytest.fixture(autouse=True)
def local_cache(monkeypatch, tmp_path_factory):
    import datasets

    folder = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def evaluate(model, task_path, names, **options):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_path), include_defaults=False)
    return simple_evaluate(
        model, tasks=list(names), task_manager=manager, bootstrap_iters=0, **options
    )


def answers(results, task):
    """What the model answered, document by document."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["resps"] for sample in samples]


def numbers(responses):
    """Log probabilities, and greedy flags where there are any."""
    flat = [one for document in responses for request in document for one in request]
    if isinstance(flat[0], tuple | list):
        return np.array([score for score, _ in flat]), [greedy for _, greedy in flat]
    return np.array(flat), []


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_scores_and_likelihoods_are_those_of_transformers(theirs, respondent, task_path, chat):
    names = ["choices", "bare_choices", "texts", "answers"][: 4 if not chat else 1]
    names += ["answers"] if chat else []
    options = {"apply_chat_template": chat, "num_fewshot": 0}
    expected = evaluate(theirs, task_path, names, **options)
    found = evaluate(harness_model(respondent, "m"), task_path, names, **options)
    for name in names:
        scores, own = expected["results"][name], found["results"][name]
        assert own.keys() == scores.keys()
        for metric, value in scores.items():
            if isinstance(value, float):
                assert own[metric] == pytest.approx(value, rel=1e-5), (name, metric)
        if name == "answers":
            assert answers(found, name) == answers(expected, name)
            continue
        (log_probs, greedy), (own_log_probs, own_greedy) = (
            numbers(answers(results, name)) for results in (expected, found)
        )
        assert len(set(log_probs.round(3))) > 9
        np.testing.assert_allclose(own_log_probs, log_probs, rtol=TOLERANCE / NATS, atol=TOLERANCE)
        assert own_greedy == greedy
    accuracy = expected["results"]["choices"]["acc,none"]
    assert 0 < accuracy < 1


def test_what_is_reported_is_what_the_harness_found(theirs, respondent, task_path, capfd):
    """And without a word of it on standard output."""
    names = ["choices", "answers"]
    seeds = {"random_seed": 0, "numpy_random_seed": 0, "fewshot_random_seed": 0}
    expected = evaluate(theirs, task_path, names, limit=9, num_fewshot=2, **seeds)
    capfd.readouterr()
    options = HarnessOptions(tuple(names), task_path, limit=9, num_fewshot=2)
    figures, samples = run_harness(respondent, options, "some/model")
    asked = [
        sorted(json.dumps(sample["arguments"]) for sample in found)
        for found in (samples, itertools.chain(*expected["samples"].values()))
    ]
    assert asked[0] == asked[1]
    assert capfd.readouterr() == ("", "")
    assert [(f.name, f.metric, f.count) for f in figures] == [
        ("choices", "acc", 9), ("choices", "acc_norm", 9), ("answers", "exact_match", 9)
    ]  # fmt: skip
    for figure in figures:
        assert figure.value == expected["results"][figure.name][f"{figure.metric},none"]
        p = figure.value
        error = (p * (1 - p) / 8) ** 0.5
        assert figure.high == pytest.approx(p + 1.96 * error)
    assert 0 < figures[0].value < 1
    assert len(samples) == 18
    assert {sample["task"] for sample in samples} == set(names)


def test_stop_strings_cut_and_special_tokens_stop(respondent):
    context = " ".join(WORDS)
    (whole,) = respondent.texts([(context, {"max_gen_toks": 12})])
    settings = {"max_gen_toks": 12, "until": [whole[3:5], whole[5:7]]}
    assert respondent.texts([(context, settings)]) == [whole[: whole.index(whole[3:5])]]
    # A token that is written ends the text where a task names it.
    writing = respondent.read_settings({"until": ["<|im_start|>", "x"]})
    tokens = respondent.tokenizer.added_tokens
    assert writing.stop_ids == (tokens["<|im_start|>"], tokens["<|im_end|>"])
    assert writing.stop_strings == ("x",)


def test_what_stands_before_a_text_without_context_is_the_prefix(theirs, respondent):
    """Also where the context is blank, which the harness moves behind its end."""
    ids = respondent.encode("the sea")
    assert respondent.prefix_id == theirs.prefix_token_id
    ((expected, _),) = theirs._loglikelihood_tokens([(None, [theirs.prefix_token_id], ids)], True)
    ((found, _),) = respondent.likelihoods([([], ids)])
    assert found == pytest.approx(expected, rel=TOLERANCE / NATS)


def test_requests_of_other_settings_are_answered_in_order(respondent):
    rng = random.Random(1)
    requests = [
        (words(rng, 2 + 9 * (i % 3)), {"max_gen_toks": 3 + i % 2, "until": []}) for i in range(5)
    ]
    apart = [respondent.texts([request])[0] for request in requests]
    assert respondent.texts(requests) == apart


def test_sampling_is_honoured_and_seeded(respondent):
    request = ("the sea", {"do_sample": True, "temperature": 5.0, "top_k": 40, "max_gen_toks": 8})
    first = respondent.texts([request] * 5)
    assert len(set(first)) > 1
    assert respondent.texts([request] * 5) == first
    off = {**request[1], "do_sample": False, "top_k": None}
    greedy = respondent.texts([("the sea", off), ("the sea", {"max_gen_toks": 8})])
    assert greedy[0] == greedy[1]
    writing = respondent.read_settings({"temperature": 0.7, "top_p": 0.9})
    assert (writing.options.temperature, writing.options.top_p) == (0.7, 0.9)


def test_thinking_is_not_part_of_the_answer(respondent, monkeypatch):
    from qwen_jax.evaluation import harness_requests
    from qwen_jax.inference.completion import Completion

    def stand_in(*arguments, stop_strings, **options):
        # The thinking may hold what ends the answer.
        assert stop_strings == ()
        return [Completion("<think>\none\n\ntwo\n</think>\n\n42\n\nmore", [1], "stop")]

    monkeypatch.setattr(harness_requests, "complete_all", stand_in)
    thinking = Respondent(
        respondent.model, respondent.params, respondent.tokenizer, LENGTH, enable_thinking=True
    )
    assert thinking.texts([("q", {"until": ["\n\n"], "max_gen_toks": 9})]) == ["42"]
    with pytest.raises(UserError, match=r"^choices: answers are scored .* no thinking; leave"):
        request = SimpleNamespace(args=("a", "b"), task_name="choices")
        harness_model(thinking, "m").loglikelihood([request])


def test_an_open_last_message_goes_on(theirs, respondent):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " The answer is "}]
    model = harness_model(respondent, "m")
    for messages, opens in ((chat[:1], True), (chat, False)):
        assert model.apply_chat_template(messages, opens) == theirs.apply_chat_template(
            messages, opens
        )
    assert model.chat_template(True) == theirs.chat_template(True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "generation_kwargs: num_beams = 4 is not supported; leave it out"),
        ({"do_sample": True}, "generation_kwargs: do_sample = True needs a temperature above 0"),
        ({"until": ["a<|im_end|>"]}, "generation_kwargs: until = 'a<|im_end|>' has a control"),
        ({"max_gen_toks": LENGTH}, f"max_gen_toks = {LENGTH} leaves no room for a context in"),
        ({"top_p": 2.0}, "top_p = 2.0 should be"),
    ],
)
def test_a_setting_that_is_not_honoured_is_refused_by_name(respondent, settings, message):
    with pytest.raises(UserError) as error:
        respondent.texts([("the sea", settings)])
    assert str(error.value).startswith(message)


def test_tasks_that_cannot_be_run_are_named(respondent, task_path, tmp_path, monkeypatch):
    from lm_eval import tasks

    class OwnTasksOnly(tasks.TaskManager):
        """The harness's index takes half a minute to make."""

        def __init__(self, include_path, include_defaults):
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", OwnTasksOnly)
    with pytest.raises(UserError, match=f"^task choses is not in the harness nor in {task_path};"):
        run_harness(respondent, HarnessOptions(("choices", "choses"), task_path), "m")
    (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: json\noutput_type: x\n")
    with pytest.raises(UserError, match=r"^task broken cannot be loaded \("):
        run_harness(respondent, HarnessOptions(("broken",), tmp_path), "m")
    with pytest.raises(UserError, match=f"^{tmp_path / 'no'}: no directory of task files"):
        run_harness(respondent, HarnessOptions(("choices",), tmp_path / "no"), "m")
    with pytest.raises(UserError, match="a continuation of 0 tokens cannot be scored: 1 to 96"):
        respondent.likelihoods([([1], [])])
    real = builtins.__import__

    def without(name, *arguments):
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"need lm-eval; install it \(pip install lm-eval\)$"):
        harness_model(respondent, "m")
