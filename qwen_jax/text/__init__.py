"""Text room: tokenizers, chat templates and streamed decoding."""

from qwen_jax.text.streaming import StopStrings, StreamDecoder
from qwen_jax.text.tokenizers import Tokenizer, check_vocabulary_fits, load_tokenizer

__all__ = [
    "StopStrings",
    "StreamDecoder",
    "Tokenizer",
    "check_vocabulary_fits",
    "load_tokenizer",
]
