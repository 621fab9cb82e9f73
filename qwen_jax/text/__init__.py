"""Text room: tokenizers, chat templates, streamed decoding and what comes back."""

from qwen_jax.text.infill import file_infill, infill_stop_ids, repository_infill
from qwen_jax.text.parsing import Reply, ReplyParser, ToolCall, parse_reply, thinking_is_open
from qwen_jax.text.streaming import StopStrings, StreamDecoder
from qwen_jax.text.tokenizers import Tokenizer, check_vocabulary_fits, load_tokenizer

__all__ = [
    "Reply",
    "ReplyParser",
    "StopStrings",
    "StreamDecoder",
    "Tokenizer",
    "ToolCall",
    "check_vocabulary_fits",
    "file_infill",
    "infill_stop_ids",
    "load_tokenizer",
    "parse_reply",
    "repository_infill",
    "thinking_is_open",
]
