import functools

import pytest

import qwen_jax
from tests.inference.random_models import FAMILIES, load_random, with_head
from tests.reference import random_reference, save_reference
from tests.text.chat_templates import QWEN3
from tests.text.real_vocabulary import write_qwen1_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The real vocabulary, where rare characters take several tokens."""
    directory = write_qwen1_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    (directory / "chat_template.jinja").write_text(QWEN3, encoding="utf-8")
    return qwen_jax.load_tokenizer(directory)


@pytest.fixture(scope="session")
def load_narrow(tmp_path_factory):
    """Loads a random model with an embedding for each token of the real vocabulary."""

    def load(**fields):
        fields = {"vocab_size": 151936, "hidden_size": 16, "intermediate_size": 32, **fields}
        reference = random_reference("qwen3", seed=5, num_hidden_layers=2, **fields)
        return qwen_jax.load_pretrained(save_reference(reference, tmp_path_factory.mktemp("model")))

    return load


@pytest.fixture(scope="session")
def narrow(load_narrow):
    return load_narrow()


@pytest.fixture(scope="session")
def load_family(tmp_path_factory):
    """Loads, each once, the models of FAMILIES; the hybrid has an MTP head."""

    @functools.cache
    def load_(name):
        family, fields = FAMILIES[name]
        model, params = load_random(tmp_path_factory.mktemp(name), family, **fields)
        return with_head(model, params) if name == "hybrid" else (model, params)

    return load_


@pytest.fixture(scope="session")
def dense(load_family):
    return load_family("dense")


@pytest.fixture(scope="session")
def hybrid(load_family):
    return load_family("hybrid")
