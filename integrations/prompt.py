"""A context and its questions as tokens."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compressed_cache.policies.fields import whole_number
from compressed_cache.wording import shown

logger = logging.getLogger(__name__)

# A chat template writes it where a question will stand.
_PLACE = "\n<|question|>"


@dataclass(frozen=True)
class Prompt:
    """What is read once, and what is read after it for each answer."""

    context: list[int]
    questions: list[list[int]]
    suffix: str = ""
    """What stands between a question and the answer."""


def pair(
    contexts: Sequence[str], question: str | None, questions: Any
) -> list[tuple[str, list[str]]]:
    """Each context with its questions.

    Args:
        contexts: the texts.
        question: one for all contexts, or None.
        questions: several for all contexts, a list of them for each context, or None.

    Raises:
        ValueError: both are given, none is in a list, or there are lists for other contexts.
        TypeError: something else than texts.
    """
    if not isinstance(question, str | None):
        raise TypeError(
            f"question must be a text, got {shown(question)}. Pass several as questions."
        )
    if question is not None and questions is not None:
        raise ValueError("question and questions must not both be given. Leave one of them out.")
    if questions is None:
        questions = ["" if question is None else question]
    elif not _is_list(questions):
        raise TypeError(
            f"questions must be a list of texts, got {questions!r}. Pass one text as question."
        )
    if any(map(_is_list, questions)):
        lists = [list(each) if _is_list(each) else [each] for each in questions]
        if len(lists) != len(contexts):
            raise ValueError(
                f"questions must have one list for each of {len(contexts)} contexts, got "
                f"{len(lists)}. Pass a list of texts to ask all of them about every context."
            )
    else:
        lists = [list(questions)] * len(contexts)
    if not all(lists):
        raise ValueError("questions must have at least one text for each context, got none")
    return list(zip(contexts, lists, strict=True))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def make_prompt(
    tokenizer: Any,
    context: str,
    questions: Sequence[str],
    *,
    answer_prefix: str = "",
    max_context_length: int | None = None,
    enable_thinking: bool = False,
    model_length: int | None = None,
) -> Prompt:
    """The tokens of a context and of what follows it for each question.

    With a chat template context and question are one message of the user, and the answer begins
    with ``answer_prefix``. Without one they are ``bos + context`` and
    ``question + "\\n" + answer_prefix``. Where no question makes a token, the last one of the
    context takes its place.

    Args:
        tokenizer: that of the model.
        context: the text.
        questions: those about it.
        answer_prefix: what each answer begins with.
        max_context_length: tokens of the context that are read; the rest is cut off its end.
        enable_thinking: passed on to the chat template.
        model_length: tokens the model can see, None if it does not tell.

    Raises:
        ValueError: an empty context or question, or more tokens than the model can see.
        TypeError: something else than texts.
    """
    for name, text in (("context", context), *(("question", text) for text in questions)):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a text, got {text!r} ({type(text).__name__})")
    if not context.strip():
        raise ValueError(f"context must not be empty, got {context!r}")
    if not isinstance(answer_prefix, str):
        raise TypeError(f"answer_prefix must be a text, got {shown(answer_prefix)}")
    if max_context_length is not None:
        max_context_length = positive("max_context_length", max_context_length)
    before, after = _around(tokenizer, context, enable_thinking)
    prompt = Prompt(
        _tokens(tokenizer, before),
        [_tokens(tokenizer, question + after + answer_prefix) for question in questions],
        after,
    )
    if max_context_length is not None and len(prompt.context) > max_context_length:
        logger.warning(
            "context is cut from %d to %d tokens", len(prompt.context), max_context_length
        )
        del prompt.context[max_context_length:]
    if not any(prompt.questions) and len(prompt.context) > 1:
        # Something must be read before there is an answer.
        last = prompt.context.pop()
        prompt.questions[:] = [[last] for _ in questions]
    _check_length(prompt, model_length)
    return prompt


def positive(name: str, value: Any) -> int:
    """A whole number from 1 on; raises for any other ``value``, that of an argument ``name``."""
    number = whole_number(value)
    if number is None:
        raise TypeError(f"{name} must be an int >= 1, got {shown(value)}")
    if number < 1:
        raise ValueError(f"{name} must be >= 1, got {number}")
    return number


def _around(tokenizer: Any, context: str, enable_thinking: bool) -> tuple[str, str]:
    """All that stands before a question, and all between it and the answer."""
    if tokenizer.chat_template is None:
        return (tokenizer.bos_token or "") + context, "\n"
    place = _PLACE
    while place in context:
        place += "#"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": context + place}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=enable_thinking,
    )
    if text.count(place) != 1:
        raise ValueError(
            "chat_template must write the text of the user once and as it is, got "
            f"{text.count(place)} times. Set tokenizer.chat_template to None or to another one."
        )
    before, after = text.split(place)
    return before, after


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _check_length(prompt: Prompt, model_length: int | None) -> None:
    if not all(prompt.questions):
        raise ValueError(
            "question must have at least one token, got an empty one. Leave out question and "
            "questions for the continuation of a context, which must have two tokens then."
        )
    longest = max(len(question) for question in prompt.questions)
    if model_length is None or len(prompt.context) + longest <= model_length:
        return
    if longest >= model_length:
        raise ValueError(
            f"question must be shorter than the {model_length} tokens the model can see, got "
            f"{longest} tokens"
        )
    raise ValueError(
        f"context and question must fit into the {model_length} tokens the model can see, got "
        f"{len(prompt.context)} + {longest}. Pass max_context_length={model_length - longest} to "
        "cut the context."
    )
