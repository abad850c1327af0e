"""How many facts of a long text a model still finds once its cache was compressed.

    python -m bench.lookups --model FOLDER

Each text is filler in which numbers are hidden, as in the "needles" of RULER
(https://arxiv.org/abs/2404.06654); most are asked for by nobody. A question is asked *after* the
text was compressed, as in the pipeline, where one text serves many questions, or *with* it, so that
the last queries of the prompt are those of the question. It writes a row for each policy and
way of asking as soon as it is there, leaves out what the file has, and can be stopped and gone on
with; ``python -m bench.real_models page`` shows them in ``docs/results.md``.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils import logging

import compressed_cache.integrations  # noqa: F401  (makes the task of the pipeline known)
from bench.results_page import LOOKUPS, read_lines
from compressed_cache import CompressedCache
from compressed_cache.eval.sweep.loaded import digest
from compressed_cache.integrations.pipeline import TASK
from compressed_cache.policies import make_policy
from compressed_cache.policies.capabilities import ReadsTwice, find
from compressed_cache.versions import cache_argument

POLICIES = (
    "full",
    "random",
    "streaming_llm",
    "knorm",
    "keydiff",
    "lagkv",
    "expected_attention",
    "h2o",
    "tova",
    "snapkv",
    "snapkv+adakv",
    "pyramidkv",
    "rkv",
    "morphkv",
    "curdkv",
    "finch",
    "kvzip",
    "kvzip+adakv",
)
_FACTS = 16  # in a text
_ANSWER = 12  # tokens, at most
_FILLER: tuple[str, ...] = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
"""That of RULER."""
_COLOURS = ("amber", "black", "blue", "brown", "golden", "green", "grey", "pink", "red", "silver")
_PLACES = ("bridge", "castle", "forest", "garden", "harbour", "island", "market", "mill", "tower")


class Fact(NamedTuple):
    """A number with a name."""

    name: str
    number: str

    @property
    def sentence(self) -> str:
        return f"The code of the {self.name} is {self.number}."

    @property
    def question(self) -> str:
        return f"What is the code of the {self.name}? Answer with the number alone."


class Text(NamedTuple):
    """A text, and what is asked about it."""

    words: str
    asked: list[Fact]


@dataclass(frozen=True)
class Lookups:
    """One row: a policy, a budget, and when the question comes."""

    model: str
    weights: str
    policy: str
    budget: int | None
    asked: str
    """``"after"`` or ``"with"``."""
    length: int
    """Tokens of a text, as asked for."""
    tokens: float
    """The same as it came out, on average."""
    right: int
    questions: int
    seconds: float
    torch: str


def make_text(seed: int, tokens: int, tokenizer: Any, *, questions: int) -> Text:
    """Filler of about so many tokens with facts in between, and some of them to ask for."""
    draw = random.Random(seed)
    names = draw.sample([f"{one} {other}" for one in _COLOURS for other in _PLACES], _FACTS)
    facts = [Fact(name, str(draw.randrange(100_000, 1_000_000))) for name in names]
    used = len(tokenizer.encode(" ".join(fact.sentence for fact in facts)))
    lines = len(tokenizer.encode(" ".join(_FILLER)))
    sentences = list(_FILLER) * max(1, (tokens - used) // lines)
    for place, fact in zip(
        sorted(draw.sample(range(len(sentences)), _FACTS), reverse=True), facts, strict=True
    ):
        sentences.insert(place, fact.sentence)
    return Text(" ".join(sentences), draw.sample(facts, questions))


class Asker:
    """A model that is asked about texts."""

    def __init__(self, folder: str, dtype: str) -> None:
        # Typed by transformers as what it is not.
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        make: Any = pipeline
        self._pipe = make(TASK, model=self.model, tokenizer=self.tokenizer)

    def after(self, text: Text, policy: str, budget: int | None) -> Iterator[bool]:
        """Whether it answers right what is asked once the text is compressed."""
        cache = {} if budget is None else {"policy": policy, "budget": budget}
        questions = [fact.question for fact in text.asked]
        found = self._pipe(text.words, questions=questions, max_new_tokens=_ANSWER, **cache)
        for fact, answer in zip(text.asked, found["answers"], strict=True):
            yield fact.number in answer

    def with_text(self, text: Text, policy: str, budget: int | None) -> Iterator[bool]:
        """Whether it answers right what is asked at the end of the prompt."""
        for fact in text.asked:
            message = {"role": "user", "content": f"{text.words}\n\n{fact.question}"}
            inputs = self.tokenizer.apply_chat_template(
                [message], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            cache = CompressedCache("full") if budget is None else CompressedCache(policy, budget)
            output = self.model.generate(
                **inputs, **cache_argument(cache), max_new_tokens=_ANSWER, do_sample=False
            )
            answer = self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
            yield fact.number in answer


def main(arguments: list[str] | None = None) -> None:
    """Measures, or goes on where it was."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.lookups",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--length", type=int, default=4000, help="tokens of a text")
    parser.add_argument("--texts", type=int, default=10)
    parser.add_argument("--questions", type=int, default=4, help="to each text; half with it")
    parser.add_argument("--budgets", default="512")
    parser.add_argument(
        "--dtype", default="bfloat16", help="float32 where the processor multiplies no bfloat16"
    )
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--out", type=Path, default=LOOKUPS)
    measure(parser.parse_args(arguments))


def measure(options: argparse.Namespace) -> None:
    """Appends what the file has not."""
    asker = Asker(options.model, options.dtype)
    logging.disable_progress_bar()
    name, weights = Path(options.model).name, digest(asker.model)
    budgets = [int(part) for part in options.budgets.split(",")]
    known = {
        tuple(row[key] for key in ("weights", "length", "policy", "budget", "asked"))
        for row in read_lines(options.out)
    }
    cells = [
        (policy, budget, asked)
        for policy in options.policies.split(",")
        for budget in ([None] if policy == "full" else budgets)
        for asked in ("after", "with")
        if (weights, options.length, policy, budget, asked) not in known
        # Their second pass comes before any question.
        and not (asked == "with" and find(make_policy(policy), ReadsTwice))
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for policy, budget, asked in tqdm(cells, unit="cell"):
        questions = options.questions if asked == "after" else options.questions // 2
        ask = asker.after if asked == "after" else asker.with_text
        started, answers, lengths = time.perf_counter(), [], []
        for seed in range(options.texts):
            text = make_text(seed, options.length, asker.tokenizer, questions=questions)
            lengths.append(len(asker.tokenizer.encode(text.words)))
            answers += ask(text, policy, budget)
        row = Lookups(
            model=name,
            weights=weights,
            policy=policy,
            budget=budget,
            asked=asked,
            length=options.length,
            tokens=sum(lengths) / len(lengths),
            right=sum(answers),
            questions=len(answers),
            seconds=round(time.perf_counter() - started, 1),
            torch=torch.__version__,
        )
        with options.out.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")


if __name__ == "__main__":
    main()
