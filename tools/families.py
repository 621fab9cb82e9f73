"""The table of model families in README.md, each mark backed by a named test.

    python -m tools.families           # prints it
    python -m tools.families --check   # exit status 1 where README.md has another one
    python -m tools.families --write   # puts it into README.md

Released sizes are those of the presets. Nothing is run: a test counts if its file defines it. That
it runs for the family's model_type is a test of its own, in tests/tools/test_families.py.
"""

import ast
import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from absl import flags

from configs.models import PRESETS
from qwen_jax.errors import UserError
from tools import command_line

_CHECK = flags.DEFINE_bool("check", False, "Fail where README.md has another table.")
_WRITE = flags.DEFINE_bool("write", False, "Put the table into README.md.")

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- families -->\n", "<!-- end of families -->\n"
COLUMNS = ("logits", "cache", "export", "quantised")


@dataclasses.dataclass(frozen=True)
class Family:
    """A row.

    Attributes:
      title: its first cell.
      presets: pattern that the names of its presets match as a whole, with groups `line` and
        `size`; empty where it has none of its own.
      logits: tests that the numbers are right, as pytest node ids without parameters.
      cache: tests that decoding with a cache gives the same.
      export: tests that what is written is what was read.
      quantised: tests that packed weights give the logits of what they stand for.
      model_type: that those of the tests that run for several must run for; empty for none.
    """

    title: str
    presets: str
    logits: Sequence[str]
    cache: Sequence[str]
    export: Sequence[str]
    quantised: Sequence[str]
    model_type: str = ""


_DENSE = {
    "logits": ["tests/models/test_decoder.py::test_logits_and_hidden_states_equal_the_reference"],
    "cache": ["tests/models/test_decoder.py::test_cached_decode_equals_one_full_pass"],
    "export": [
        "tests/checkpoint/test_conversion.py::test_what_is_written_loads_in_transformers_bit_by_bit"
    ],
    "quantised": [
        "tests/checkpoint/test_quantised_models.py::"
        "test_logits_are_those_of_the_dequantised_reference"
    ],
}
_SPARSE_OR_HYBRID = {
    "logits": ["tests/models/test_families.py::test_logits_and_hidden_states_equal_the_reference"],
    "cache": ["tests/models/test_families.py::test_cached_decode_equals_one_full_pass"],
    "export": [
        "tests/checkpoint/test_layouts.py::test_what_is_written_loads_in_transformers_bit_by_bit"
    ],
    "quantised": [
        "tests/checkpoint/test_quantised_models.py::"
        "test_fused_matrices_and_stacked_experts_stay_packed"
    ],
}

FAMILIES = (
    Family(
        "Qwen",
        r"(?P<line>qwen)-(?P<size>[\d_]+b)(-chat)?",
        logits=[
            "tests/models/test_qwen1.py::test_without_stretching_it_equals_a_renamed_qwen2",
            "tests/models/test_qwen1.py::test_beyond_the_trained_length_it_equals_the_formulas",
        ],
        cache=["tests/models/test_qwen1.py::test_greedy_ids_equal_the_formulas_row_by_row"],
        export=["tests/models/test_qwen1.py::test_export_holds_the_published_layout"],
        quantised=[
            "tests/checkpoint/test_quantised_models.py::"
            "test_fused_projections_and_the_zero_biases_beside_them"
        ],
    ),
    Family(
        "CodeQwen1.5",
        r"(?P<line>codeqwen1\.5)-(?P<size>7b)(-chat)?",
        **_DENSE,
        model_type="qwen2",
    ),
    Family(
        "Qwen1.5, Qwen2, Qwen2.5, QwQ",
        r"(?P<line>qwen(1\.5|2|2\.5)(-coder|-math)?|qwq)-(?P<size>[\d.]+b)"
        r"(-chat|-instruct|-preview)?",
        **_DENSE,
        model_type="qwen2",
    ),
    Family(
        "Qwen1.5-MoE, Qwen2-57B",
        r"(?P<line>qwen1\.5-moe|qwen2)-(?P<size>a2\.7b|57b-a14b)(-chat|-instruct)?",
        **_SPARSE_OR_HYBRID,
        model_type="qwen2_moe",
    ),
    Family(
        "Qwen2.5-1M",
        r"(?P<line>qwen2\.5)-(?P<size>[\d.]+b)-instruct-1m",
        logits=[
            "tests/nn/test_dual_chunk.py::test_equals_the_position_rules_pair_by_pair",
            "tests/models/test_dual_chunk.py::test_inside_a_chunk_the_reference_s_plain_attention",
            "tests/models/test_dual_chunk.py::"
            "test_a_full_pass_over_many_chunks_equals_the_formulas",
        ],
        cache=[
            "tests/models/test_dual_chunk.py::"
            "test_padded_rows_and_cached_decode_equal_the_formulas"
        ],
        export=[*_DENSE["export"], "tests/test_presets.py::test_config_json_round_trip"],
        quantised=_DENSE["quantised"],
    ),
    Family(
        "reward models",
        r"(?P<line>qwen2(\.5)?-math-p?rm|qwen2\.5-math-7b-prm800k|worldpm)"
        r"(-(?P<size>72b|7b)(-helpsteer2|-rlhflow|-ultrafeedback)?)?",
        logits=["tests/models/test_heads.py::test_the_two_layer_head_equals_linear_relu_linear"],
        cache=[],
        export=[
            "tests/models/test_heads.py::test_a_reward_model_is_written_under_the_published_names"
        ],
        quantised=[
            "tests/checkpoint/test_quantised_models.py::"
            "test_other_heads_are_those_of_the_dequantised_reference"
        ],
    ),
    Family(
        "Qwen3, Qwen3Guard-Gen",
        r"(?P<line>qwen3(guard-gen)?)-(?P<size>[\d.]+b)(-base|-saferl|(-instruct|-thinking)-2507)?",
        **_DENSE,
        model_type="qwen3",
    ),
    Family(
        "Qwen3Guard-Stream",
        r"(?P<line>qwen3guard-stream)-(?P<size>[\d.]+b)",
        logits=["tests/models/test_heads.py::test_a_guard_judges_every_token_as_its_formulas_say"],
        cache=["tests/models/test_heads.py::test_a_guard_decodes_with_a_cache"],
        export=["tests/models/test_heads.py::test_a_guard_is_written_under_the_published_names"],
        quantised=[],
    ),
    Family(
        "Qwen3-Embedding, Qwen3-Reranker",
        r"(?P<line>qwen3-(embedding|reranker))-(?P<size>[\d.]+b)",
        logits=[
            *_DENSE["logits"],
            "tests/models/test_heads.py::test_embedders_load_under_every_published_spelling",
        ],
        cache=_DENSE["cache"],
        export=[
            *_DENSE["export"],
            "tests/models/test_heads.py::test_a_bare_model_as_transformers_saves_it",
        ],
        quantised=[
            *_DENSE["quantised"],
            "tests/checkpoint/test_quantised_models.py::"
            "test_other_heads_are_those_of_the_dequantised_reference",
        ],
        model_type="qwen3",
    ),
    Family(
        "Qwen3-MoE",
        r"(?P<line>qwen3(-coder)?)-(?P<size>\d+b-a\d+b)(-base|(-instruct|-thinking)(-2507)?)?",
        **_SPARSE_OR_HYBRID,
        model_type="qwen3_moe",
    ),
    Family(
        "Qwen3-Next",
        r"(?P<line>qwen3(-coder)?-next)(-base|-(?P<size>80b-a3b)(-instruct|-thinking))?",
        **_SPARSE_OR_HYBRID,
        model_type="qwen3_next",
    ),
    Family(
        "Qwen3.5",
        r"(?P<line>qwen3\.5)-(?P<size>[\d.]+b)(-base)?",
        **_SPARSE_OR_HYBRID,
        model_type="qwen3_5_text",
    ),
    Family(
        "Qwen3.5-MoE",
        r"(?P<line>qwen3\.5)-(?P<size>\d+b-a\d+b)(-base)?",
        **_SPARSE_OR_HYBRID,
        model_type="qwen3_5_moe_text",
    ),
    Family(
        "classifiers of texts and tokens",
        "",
        logits=[
            "tests/models/test_heads.py::test_a_sequence_classifier_reads_the_last_real_token",
            "tests/models/test_heads.py::test_a_token_classifier_reads_every_token",
        ],
        cache=[],
        export=[
            "tests/models/test_heads.py::"
            "test_a_sequence_classifier_is_written_as_transformers_reads_it",
            "tests/models/test_heads.py::"
            "test_a_token_classifier_is_written_as_transformers_reads_it",
        ],
        quantised=[
            "tests/checkpoint/test_quantised_models.py::"
            "test_other_heads_are_those_of_the_dequantised_reference"
        ],
    ),
)  # fmt: skip

# Parts of a name that are not spelled with a capital alone.
_SPELLED = {
    "7b": "7B", "codeqwen1.5": "CodeQwen1.5", "moe": "MoE", "prm": "PRM", "prm800k": "PRM800K",
    "qwen3guard": "Qwen3Guard", "qwq": "QwQ", "rm": "RM", "worldpm": "WorldPM",
}  # fmt: skip


def main() -> None:
    """Prints, checks or writes the table."""
    table = families_table()
    path = ROOT / "README.md"
    if not (_CHECK.value or _WRITE.value):
        print(table, end="")
        return
    readme = path.read_text(encoding="utf-8")
    wanted = with_table(readme, table)
    if _WRITE.value:
        path.write_text(wanted, encoding="utf-8")
    elif readme != wanted:
        raise UserError("README.md: the table of families is old; run tools.families --write")


def with_table(readme: str, table: str) -> str:
    """`readme` with `table` between its two marks.

    Raises:
      UserError: it does not have each mark once, in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise UserError(f"README.md: needs one {BEGIN.strip()} and, below, one {END.strip()}")
    return before + BEGIN + table + END + after


def families_table(
    families: Iterable[Family] = FAMILIES, presets: Iterable[str] = tuple(PRESETS)
) -> str:
    """The table in Markdown, and below it the tests that its numbers stand for.

    Args:
      families: the rows.
      presets: names, each of which must belong to one row.

    Raises:
      UserError: a preset of no row or of two, or a test that is not there.
    """
    families, presets = list(families), list(presets)
    for name in presets:
        titles = [family.title for family in families if re.fullmatch(family.presets, name)]
        if len(titles) != 1:
            raise UserError(f"preset {name} belongs to {' and '.join(titles) or 'no family'}")
    tests = [test for family in families for column in COLUMNS for test in getattr(family, column)]
    numbers = {test: number for number, test in enumerate(dict.fromkeys(tests), 1)}
    for test in numbers:
        _require_test(test)
    lines = [f"| family | released | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for family in families:
        cells = [family.title, _released(family, presets)]
        for column in COLUMNS:
            marks = [f"[{numbers[t]}]({_file(t)})" for t in getattr(family, column)]
            cells.append(", ".join(marks) or "-")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"{number}. `{test}`" for test, number in numbers.items())]
    return "\n".join(lines) + "\n"


def _file(test: str) -> str:
    return test.partition("::")[0]


def _require_test(test: str) -> None:
    """Refuses a node id whose file does not define its function."""
    path, _, function = test.partition("::")
    try:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{test}: there is no such file") from None
    if function not in (node.name for node in tree.body if isinstance(node, ast.FunctionDef)):
        raise UserError(f"{test}: the file has no such test")


def _released(family: Family, presets: Iterable[str]) -> str:
    """The sizes of each line of a family, in the order of the presets."""
    sizes: dict[str, dict[str, None]] = {}
    for name in presets:
        if match := re.fullmatch(family.presets, name):
            line = "-".join(_SPELLED.get(p, p.capitalize()) for p in match["line"].split("-"))
            sizes.setdefault(line, {})
            if match["size"]:
                sizes[line][match["size"].upper().replace("_", ".")] = None
    return "; ".join(f"{line} {', '.join(found)}".strip() for line, found in sizes.items()) or "-"


if __name__ == "__main__":
    command_line.run(main)
