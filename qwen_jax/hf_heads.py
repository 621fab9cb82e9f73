"""The head of a model <-> `architectures` in config.json, and the labels and sizes beside it."""

from typing import Any

from qwen_jax.config import GuardSpec, HeadKind, ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.json_fields import Fields

# How an architecture's name ends -> what reads the final hidden states. With "Text" in front it is
# of a text tower alone.
_HEADS = {
    "ForCausalLM": HeadKind.VOCABULARY,
    "ForConditionalGeneration": HeadKind.VOCABULARY,
    "Model": HeadKind.NONE,
    "TextModel": HeadKind.NONE,
    "ForSequenceClassification": HeadKind.SCORE,
    "ForTokenClassification": HeadKind.SCORE_WITH_BIAS,
    "TextForSequenceClassification": HeadKind.SCORE,
    "TextForTokenClassification": HeadKind.SCORE_WITH_BIAS,
    "ForRewardModel": HeadKind.TWO_LAYER_SCORE,
    "ForProcessRewardModel": HeadKind.TWO_LAYER_SCORE,
    "ForGuardModel": HeadKind.GUARD,
}

# The sizes of a guard, as config.json calls them.
_GUARD_SIZES = {
    "inner_size": "guard_inner_size",
    "risk_levels": "num_risk_level",
    "categories": "num_category",
    "query_risk_levels": "num_query_risk_level",
    "query_categories": "num_query_category",
}

# Labels of the heads whose code has the number in it.
_FIXED_LABELS = {"ForRewardModel": 1, "ForProcessRewardModel": 2}


def read_head(fields: Fields, stem: str, is_tower: bool) -> dict[str, Any]:
    """The fields of `ModelConfig` that say what reads the final hidden states.

    Args:
      fields: of config.json.
      stem: that the names of the family's architectures begin with.
      is_tower: whether the family is the text tower of vision-language models.

    Raises:
      UserError: an architecture that is not known, or labels that are none.
    """
    architectures = fields.take("architectures", "list of strings", [])
    if not architectures:
        return {}
    ending = architectures[0].removeprefix(stem)
    endings = _endings(is_tower)
    if len(architectures) > 1 or ending not in endings or not architectures[0].startswith(stem):
        known = ", ".join(stem + ending for ending in endings)
        raise fields.refuse("architectures", architectures, f"for this model_type, known: {known}")
    head = _HEADS[ending]
    if head in (HeadKind.VOCABULARY, HeadKind.NONE):
        return {"head": head}
    if head is HeadKind.GUARD:
        sizes = {name: fields.require(of, "integer") for name, of in _GUARD_SIZES.items()}
        guard = GuardSpec(**sizes)
        return {"head": head, "num_labels": sum(guard.widths), "guard": guard}
    labels = fields.values.get("id2label")
    default = len(labels) if isinstance(labels, dict) else 2
    num_labels = _FIXED_LABELS.get(ending) or fields.take("num_labels", "integer", default)
    if num_labels < 1:
        raise fields.refuse("num_labels", num_labels, "at least 1 is needed")
    return {"head": head, "num_labels": num_labels}


def write_head(config: ModelConfig, stem: str, is_tower: bool) -> dict[str, Any]:
    """The fields of config.json that read back as the head of `config`; arguments as `read_head`.

    Raises:
      UserError: a number of labels that no architecture with this head has.
    """
    fields: dict[str, Any] = {"architectures": [_architecture(config, stem, is_tower)]}
    if config.guard is not None:
        fields |= {of: getattr(config.guard, name) for name, of in _GUARD_SIZES.items()}
    elif config.num_labels:
        labels = {i: f"LABEL_{i}" for i in range(config.num_labels)}
        fields["id2label"] = {str(i): label for i, label in labels.items()}
        fields["label2id"] = {label: i for i, label in labels.items()}
    return fields


def _architecture(config: ModelConfig, stem: str, is_tower: bool) -> str:
    endings = [
        ending
        for ending in _endings(is_tower)
        if _HEADS[ending] is config.head
        and _FIXED_LABELS.get(ending, config.num_labels) == config.num_labels
    ]
    if not endings:
        raise UserError(
            f"a config.json of model_type {config.family} cannot say {config.num_labels} labels "
            f"of a {config.head.value} head"
        )
    return stem + endings[0]


def _endings(is_tower: bool) -> list[str]:
    """How names of architectures may end; of those of a head, the first is written."""
    whole = [ending for ending in _HEADS if not ending.startswith("Text")]
    return [ending for ending in _HEADS if is_tower and ending not in whole] + whole
