"""Text to ids and back, for every vocabulary format that Qwen checkpoints have."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.text.chat import (
    CHATML,
    ChatTemplates,
    encode_chat_safely,
    encode_chatml,
    read_chat_templates,
    render_chat,
)
from qwen_jax.text.huggingface_vocabulary import (
    HuggingFaceVocabulary,
    load_tokenizer_json,
    load_vocab_and_merges,
)
from qwen_jax.text.sentencepiece_vocabulary import load_sentencepiece
from qwen_jax.text.streaming import StreamDecoder
from qwen_jax.text.tiktoken_vocabulary import TiktokenVocabulary, load_tiktoken
from qwen_jax.text.tokenizer_config import TokenizerConfig, read_tokenizer_config


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of one checkpoint; build it with `load_tokenizer`.

    Attributes:
      vocabulary: the encoder.
      config: named and added tokens, and tokenizer_config.json.
      chat_templates: the checkpoint's own templates.
    """

    vocabulary: HuggingFaceVocabulary | TiktokenVocabulary = dataclasses.field(repr=False)
    config: TokenizerConfig = dataclasses.field(repr=False)
    chat_templates: ChatTemplates = dataclasses.field(repr=False)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included: `len(tokenizer)` in transformers."""
        return self.vocabulary.size

    @property
    def max_id(self) -> int:
        """The highest id that encoding can give."""
        return self.vocabulary.max_id

    def has_vocabulary_of(self, other: "Tokenizer") -> bool:
        """Whether every id is the same bytes in both, so that one's ids can be the other's."""
        ids = range(max(self.max_id, other.max_id) + 1)
        mine, theirs = self.vocabulary, other.vocabulary
        return all(mine.bytes_of(i) == theirs.bytes_of(i) for i in ids)

    @functools.cached_property
    def added_tokens(self) -> dict[str, int]:
        """Ids of all tokens beside the BPE vocabulary, special or not."""
        return {token.content: token.id for token in self.vocabulary.added_tokens}

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the added tokens that skip_special_tokens drops."""
        return {t.content: t.id for t in self.vocabulary.added_tokens if t.special}

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    @property
    def eos_token_id(self) -> int | None:
        """Id of the checkpoint's eos_token, None where it names none."""
        return self._named_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id of the checkpoint's pad_token, None where it names none."""
        return self._named_id("pad_token")

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's default template, None where it has none (ChatML is then used)."""
        template = self.chat_templates.by_name.get("default")
        return None if template is None else template.source

    def token_to_id(self, token: str) -> int | None:
        """The id of an added token or of a byte-level piece such as "Ġhello", else None."""
        return self.vocabulary.id_of(token)

    def encode(
        self,
        text: str,
        allow_special: bool = True,
        add_special_tokens: bool = False,
        continues: bool = False,
    ) -> list[int]:
        """Ids of a text.

        Args:
          text: normalised to NFC by the pipeline.
          allow_special: whether "<|im_end|>" in the text becomes its control id. With False every
            added token is plain text, special or not. (`split_special_tokens=True` in transformers
            does so only for special=true and still finds <think> and <tool_call>.)
          add_special_tokens: whether to run the post-processor of tokenizer.json, by which
            Qwen3-Embedding appends <|endoftext|>; it needs allow_special.
          continues: whether the text stands behind a control token, where SentencePiece puts no
            space before it; it needs allow_special=False.

        Raises:
          UserError: the text isn't a string or holds half of a surrogate pair.
        """
        if not isinstance(text, str):
            raise UserError(f"text: must be a string, found {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"text: character {error.start} is half of a surrogate pair; decode the text anew"
            ) from None
        if add_special_tokens:
            if not allow_special:
                raise UserError("add_special_tokens: needs allow_special=True")
            return self.vocabulary.encode_with_post_processor(text)
        if not allow_special:
            return self.vocabulary.encode_plain(text, continues)
        if continues:
            raise UserError("continues: needs allow_special=False")
        return self.vocabulary.encode(text)

    def decode(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of ids, without any clean-up of spaces.

        Bytes that aren't UTF-8 become U+FFFD, and the space that SentencePiece puts before a text
        is taken away again. An id that the tokenizer doesn't know (a model's table is padded beyond
        the vocabulary) has no text, as in transformers.
        """
        ids = ids if isinstance(ids, Iterable) else (ids,)
        data = b"".join(self._bytes_of(int(i), skip_special_tokens) for i in ids)
        spelling = self.vocabulary.spelling
        text = data.decode("utf-8", errors=spelling.errors)
        return text.removeprefix(" ") if spelling.drops_first_space else text

    def stream(self, skip_special_tokens: bool = True, continues: bool = False) -> StreamDecoder:
        """A decoder for ids that come one by one.

        Args:
          skip_special_tokens: whether special tokens have no text.
          continues: whether the ids follow others, so that their first space is their own.
        """
        spelling = self.vocabulary.spelling
        return StreamDecoder(
            lambda token_id: self._bytes_of(token_id, skip_special_tokens),
            spelling.errors,
            spelling.drops_first_space and not continues,
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        allow_special: bool = True,
        **template_variables: Any,
    ) -> list[int] | str:
        """A conversation as the model was trained to see it.

        Args:
          messages: dicts with `role` and what the template reads (`content`, `tool_calls`...).
          tools: JSON schemas of functions that the model may call.
          add_generation_prompt: whether to open the assistant's turn at the end.
          tokenize: ids if True, text if False.
          allow_special: whether control tokens inside the messages' and tools' strings become
            control ids. Pass False for words that a stranger wrote. With tokenize=False it has no
            effect, since a text can't tell the two apart.
          **template_variables: further variables of the template, e.g. enable_thinking=False.

        Raises:
          UserError: messages or tools are malformed; the template is broken, refuses them, or
            loops without end.
        """
        arguments = {
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "named_tokens": self.config.named_tokens,
            "template_variables": template_variables,
        }
        added = self.vocabulary.added_tokens
        encode_plain = functools.partial(self.encode, allow_special=False)
        if tokenize and not allow_special:
            return encode_chat_safely(
                self.chat_templates, messages, added, encode_plain, **arguments
            )
        text = render_chat(self.chat_templates, messages, **arguments)
        if not tokenize:
            return text
        if self.chat_templates.choose(tools) is CHATML:
            return encode_chatml(text, added, encode_plain)
        return self.encode(text)

    def _named_id(self, name: str) -> int | None:
        token = self.config.named_tokens.get(name)
        return None if token is None else self.vocabulary.id_of(token)

    def _bytes_of(self, token_id: int, skip_special_tokens: bool) -> bytes:
        if token_id < 0 or token_id > self.max_id:
            return b""
        if skip_special_tokens and token_id in self._special_ids:
            return b""
        return self.vocabulary.bytes_of(token_id) or b""


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a local checkpoint directory; nothing is downloaded or executed.

    Takes tokenizer.json, else vocab.json with merges.txt, else qwen.tiktoken, else
    tokenizer.model.

    Raises:
      UserError: there is none of these files, or one of the files read is broken.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: not a directory; give the directory of a checkpoint")
    config = read_tokenizer_config(directory)
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    if (path := directory / "tokenizer.json").is_file():
        vocabulary = load_tokenizer_json(path, config)
    elif vocab.is_file() and merges.is_file():
        vocabulary = load_vocab_and_merges(vocab, merges, config)
    elif (path := directory / "qwen.tiktoken").is_file():
        vocabulary = load_tiktoken(path)
    elif (path := directory / "tokenizer.model").is_file():
        vocabulary = load_sentencepiece(path, config)
    else:
        raise UserError(
            f"{directory}: no tokenizer; looked for tokenizer.json, vocab.json with merges.txt,"
            " qwen.tiktoken and tokenizer.model"
        )
    for name in ("eos_token", "pad_token"):
        token = config.named_tokens.get(name)
        if token is not None and vocabulary.id_of(token) is None:
            raise UserError(
                f"{directory / 'tokenizer_config.json'}: {name} {token!r} is not in the vocabulary;"
                " name a token that is"
            )
    return Tokenizer(vocabulary, config, read_chat_templates(directory, config))


def check_vocabulary_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Checks that every id of the tokenizer has a row in the model's embedding table.

    Raises:
      UserError: the tokenizer can give an id of `vocab_size` or more; names the token.
    """
    if tokenizer.max_id < vocab_size:
        return
    names = {token_id: token for token, token_id in tokenizer.added_tokens.items()}
    token = names.get(tokenizer.max_id) or tokenizer.decode(tokenizer.max_id)
    raise UserError(
        f"tokenizer: token {token!r} has id {tokenizer.max_id}, but the model's vocab_size is"
        f" {vocab_size}; take the tokenizer and the model from one checkpoint"
    )


def join_parts(tokenizer: Tokenizer, parts: Sequence[int | str]) -> list[int]:
    """Control ids, and between them the ids of plain text, in which nothing can forge one."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        elif part:
            ids += tokenizer.encode(part, allow_special=False, continues=True)
    return ids
