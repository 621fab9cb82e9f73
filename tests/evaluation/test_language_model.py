"""What measures predictions refuses models that make none."""

import pytest
from transformers import AutoModel, AutoModelForTokenClassification

from qwen_jax.errors import UserError
from qwen_jax.evaluation.language_model import check_language_model
from qwen_jax.evaluation.quantisation import measure_divergence
from tests.models.test_heads import write_embedder
from tests.reference import random_reference, save_reference
from tests.reward_models import random_reward_model, save_reward_model

SMALL = {"num_hidden_layers": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_reference(random_reference("qwen3", 51, **SMALL), root / "language model")
    # Only its tensors tell that it is none.
    embedder = random_reference("qwen3", 52, AutoModel, **SMALL)
    write_embedder(embedder, root / "an embedder", "", "Qwen3ForCausalLM")
    tagger = random_reference("qwen2", 53, AutoModelForTokenClassification, **SMALL)
    save_reference(tagger, root / "a token classifier")
    save_reward_model(random_reward_model(1, 54, **SMALL), root / "a reward model")
    return root


@pytest.mark.parametrize("kind", ["an embedder", "a token classifier", "a reward model"])
def test_a_model_without_predictions_is_refused_by_its_kind(models, kind):
    directory, language_model = models / kind, models / "language model"
    message = f"^{directory}: the model is {kind}.* makes no predictions of the next token, which "
    with pytest.raises(UserError, match=message + "are needed$"):
        check_language_model(directory, "are needed")
    for pair in ((directory, language_model), (language_model, directory)):
        with pytest.raises(UserError, match=message + "are what is compared$"):
            measure_divergence(*pair)


def test_a_language_model_passes(models):
    check_language_model(models / "language model", "are needed")
