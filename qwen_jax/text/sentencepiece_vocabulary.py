"""A SentencePiece vocabulary with byte fallback: `tokenizer.model`, as CodeQwen1.5 is trained with.

The pieces and their merges run in the `tokenizers` library, put together as transformers'
LlamaTokenizer puts them: spaces become "▁", and one is put before a text that has none there.
(SentencePiece itself puts it before every text.)
"""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from qwen_jax.errors import UserError
from qwen_jax.text.huggingface_vocabulary import HuggingFaceVocabulary, with_added_tokens
from qwen_jax.text.spelling import SPACE
from qwen_jax.text.tokenizer_config import AddedToken, TokenizerConfig

# The kinds of pieces and of models in sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_BPE = 2


def load_sentencepiece(path: Path, config: TokenizerConfig) -> HuggingFaceVocabulary:
    """The pipeline of a tokenizer.model.

    `add_prefix_space`, `legacy` (a space also after each added token), `add_bos_token` and
    `add_eos_token` of tokenizer_config.json count.

    Raises:
      UserError: the file is broken, isn't BPE with byte fallback, or normalises text.
    """
    model = _read_model(path)
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    # Merges never lead to control tokens: whoever types one gets its characters.
    words = [piece.piece for piece in model.pieces if piece.type == _NORMAL]
    pipeline = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=_merges(words, vocab), fuse_unk=True, byte_fallback=True)
    )
    has_space = _switch(path, config, "add_prefix_space", model.normalizer_spec.add_dummy_prefix)
    legacy = _switch(path, config, "legacy", False)
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE,
        prepend_scheme="never" if not has_space else "always" if legacy else "first",
        split=False,
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_space:
        steps.append(decoders.Strip(content=" ", left=1))
    pipeline.decoder = decoders.Sequence(steps)

    named = {token.content for token in config.added_tokens}
    own = [
        AddedToken(piece.piece, special=piece.type != _USER_DEFINED, id=i)
        for i, piece in enumerate(model.pieces)
        if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED) and piece.piece not in named
    ]
    vocabulary = with_added_tokens(pipeline, (*own, *config.added_tokens), path)
    pipeline.post_processor = _post_processor(path, config, pipeline)
    return vocabulary


def _read_model(path: Path) -> Any:
    # Imported here: the reader of its format takes time, and few checkpoints need it.
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the file") from None
    except DecodeError:
        model.Clear()
    if not model.pieces:
        raise UserError(f"{path}: not a SentencePiece model; download the file again")
    rules = model.normalizer_spec
    pieces = {piece.piece for piece in model.pieces}
    refused = {
        "model_type is not BPE": model.trainer_spec.model_type != _BPE,
        "it has no piece for each byte": not pieces.issuperset(f"<0x{i:02X}>" for i in range(256)),
        "it has unused pieces": any(piece.type == _UNUSED for piece in model.pieces),
        "it normalises text (precompiled_charsmap)": bool(rules.precompiled_charsmap),
        "it removes spaces (remove_extra_whitespaces)": rules.remove_extra_whitespaces,
        "it keeps spaces as they are (escape_whitespaces)": not rules.escape_whitespaces,
        "it puts spaces behind words (treat_whitespace_as_suffix)": (
            model.trainer_spec.treat_whitespace_as_suffix
        ),
    }
    for reason, found in refused.items():
        if found:
            raise UserError(f"{path}: {reason}; only BPE with byte fallback, as is, can be read")
    return model


def _merges(words: list[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of words that makes a word, those that make words of lower id first."""
    known = set(words)
    merges = []
    for word in words:
        pairs = [(word[:n], word[n:]) for n in range(1, len(word))]
        pairs = [pair for pair in pairs if known.issuperset(pair)]
        merges += sorted(pairs, key=lambda pair: (len(pair[0]), vocab[pair[0]], vocab[pair[1]]))
    return merges


def _switch(path: Path, config: TokenizerConfig, name: str, default: bool) -> bool:
    value = config.fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UserError(f"{path.parent / 'tokenizer_config.json'}: {name} must be true or false")
    return value


def _post_processor(
    path: Path, config: TokenizerConfig, pipeline: tokenizers.Tokenizer
) -> processors.TemplateProcessing | None:
    """What is put around every text that asks for it."""
    around = []
    for name in ("bos", "eos"):
        token = config.named_tokens.get(f"{name}_token")
        if not _switch(path, config, f"add_{name}_token", False):
            around.append(None)
            continue
        if token is None or pipeline.token_to_id(token) is None:
            raise UserError(
                f"{path.parent / 'tokenizer_config.json'}: add_{name}_token needs a {name}_token"
                " that is in the vocabulary"
            )
        around.append(token)
    before, after = around
    if before is None and after is None:
        return None
    return processors.TemplateProcessing(
        single=[part for part in (before, "$A", after) if part is not None],
        special_tokens=[(t, pipeline.token_to_id(t)) for t in around if t is not None],
    )
