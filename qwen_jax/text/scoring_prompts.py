"""What embedders, rerankers and process reward models were trained to read.

Embedder (arXiv 2506.05176): a document is its plain text, a query has the task before it; both end
with <|endoftext|>, whose hidden state is the vector. There is no space after `Query:`.

Reranker (likewise): a conversation that asks whether the document meets the query; its answer,
"yes" or "no", is read at the next token.

Process reward model (arXiv 2501.07301): a conversation in which each step of the assistant's
message ends with <extra_0>, at which the model judges it.

The control tokens are put in as ids, and all that is given is plain text: nothing in a query, a
document or a step can forge one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.text.tokenizers import Tokenizer, join_parts

# The task of the published examples.
WEB_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"

STEP = "<extra_0>"

_JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".'
)


def document_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text to embed as it is.

    Raises:
      UserError: the tokenizer has no <|endoftext|>, or the text is none.
    """
    (end,) = _control(tokenizer, "<|endoftext|>")
    return [*tokenizer.encode(text, allow_special=False), end]


def query_ids(tokenizer: Tokenizer, query: str, instruction: str = WEB_SEARCH) -> list[int]:
    """Ids of a query to embed, with the task that it is for in one sentence.

    Raises:
      UserError: as `document_ids`.
    """
    _check_texts(query=query, instruction=instruction)
    return document_ids(tokenizer, f"Instruct: {instruction}\nQuery:{query}")


def rerank_ids(
    tokenizer: Tokenizer, query: str, document: str, instruction: str = WEB_SEARCH
) -> list[int]:
    """Ids of the prompt whose next token says whether the document meets the query.

    Raises:
      UserError: the tokenizer lacks a control token, or an argument is no text.
    """
    _check_texts(query=query, document=document, instruction=instruction)
    tokens = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
    start, end, think, end_think = _control(tokenizer, *tokens)
    asked = f"user\n<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
    judge = [start, f"system\n{_JUDGE}", end, "\n", start, asked, end, "\n"]
    answer = [start, "assistant\n", think, "\n\n", end_think, "\n\n"]
    return join_parts(tokenizer, [*judge, *answer])


def answer_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Ids of the reranker's answers "no" and "yes".

    Raises:
      UserError: the vocabulary has not both.
    """
    no, yes = (tokenizer.token_to_id(answer) for answer in ("no", "yes"))
    if no is None or yes is None:
        raise UserError('the vocabulary has no tokens "no" and "yes"; take a reranker')
    return no, yes


def solution_ids(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], steps: Sequence[str]
) -> list[int]:
    """Ids of a conversation that ends with a solution, each step followed by <extra_0>.

    Args:
      tokenizer: of the model.
      messages: the conversation before the solution.
      steps: the solution, which becomes the assistant's message.

    Raises:
      UserError: no step, one that is no text or holds <extra_0>, an assistant's message before
        them, a tokenizer or chat template of another kind of model, or whatever is wrong with the
        messages.
    """
    step_id, end = _control(tokenizer, STEP, "<|im_end|>")
    if not isinstance(steps, list | tuple) or not steps:
        raise UserError("steps should be a list of texts, at least one")
    for number, step in enumerate(steps, 1):
        if not isinstance(step, str) or not step or STEP in step:
            raise UserError(f"step {number} should be a text without {STEP}, and not empty")
    if not isinstance(messages, list | tuple):
        raise UserError("messages should be a list of objects with role and content")
    last = messages[-1] if messages else None
    if isinstance(last, Mapping) and last.get("role") == "assistant":
        raise UserError(
            "messages end with the assistant's, and the steps would be a second one; give one of "
            "the two"
        )
    ids = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": steps[0]}], allow_special=False
    )
    # Nobody but the template writes that token, so that its last one ends the first step.
    if end not in ids or step_id in ids:
        raise UserError(
            f"the chat template should end messages with <|im_end|> and not write {STEP}; take a "
            "process reward model's"
        )
    place = len(ids) - 1 - ids[::-1].index(end)
    more = [part for step in steps[1:] for part in (step, step_id)]
    return [*ids[:place], step_id, *join_parts(tokenizer, more), *ids[place:]]


def split_steps(solution: str) -> list[str]:
    """The steps of a solution in which <extra_0> ends each, the last one with or without it."""
    return solution.removesuffix(STEP).split(STEP)


def step_token_id(tokenizer: Tokenizer) -> int:
    """Id of the token at which steps are judged.

    Raises:
      UserError: the tokenizer has none.
    """
    return _control(tokenizer, STEP)[0]


def _control(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    added = tokenizer.added_tokens
    missing = [token for token in tokens if token not in added]
    if missing:
        raise UserError(
            f"the tokenizer has no token {', '.join(missing)}, which these prompts need; take the "
            "tokenizer of a model for this"
        )
    return [added[token] for token in tokens]


def _check_texts(**texts: str) -> None:
    for field, text in texts.items():
        if not isinstance(text, str):
            raise UserError(f"{field} should be a string, is {str(text)[:40]!r}")
