"""Held-out problems, solved once per setting by the shipped model."""

import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import torch
from scipy.stats import binomtest

from compressed_cache.cache import CompressedCache
from compressed_cache.hf.loading import load
from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.reasoner.problems import extract_answer, make_problem
from compressed_cache.versions import cache_argument

BUDGETS: tuple[int, ...] = (180, 280)
CORE: tuple[str, ...] = (
    "full",
    "random",
    "streaming_llm",
    "knorm",
    "h2o",
    "tova",
    "snapkv",
    "rkv",
    "keydiff",
)
"""What the demo runs unless asked for others."""
STEPS = 20


@dataclass(frozen=True)
class Setting:
    """One row of the table. The full cache has no budget and nothing to protect."""

    policy: str
    """As for ``CompressedCache``."""
    budget: int | None = None
    protect_prompt: bool = False

    def __str__(self) -> str:
        if self.budget is None:
            return self.policy
        return f"{self.policy}, budget {self.budget}{' + prompt' * self.protect_prompt}"


@dataclass(frozen=True)
class Row:
    """What one setting gave."""

    policy: str
    budget: int | None
    protect_prompt: bool
    correct: int
    problems: int
    accuracy: float
    accuracy_low: float
    """Lower end of the 95% Wilson interval."""
    accuracy_high: float
    mean_tokens: float
    """Tokens generated per problem, end of text included."""
    tokens_per_s: float
    """Of all rows of the batch together, prefill included."""
    cache_bytes: int
    """Of the whole batch, the policy's state included."""
    evicted_tokens: int
    """Per head of the first layer, the most of all rows."""


@dataclass(frozen=True)
class Refusal:
    """Why a setting gave nothing."""

    policy: str
    budget: int | None
    protect_prompt: bool
    why: str


def settings(policies: list[str], budgets: list[int]) -> list[Setting]:
    """All rows of a demo: full once, the others at each budget with and without the prompt."""
    full = [Setting("full")] if "full" in policies else []
    return full + [
        Setting(policy, budget, protect_prompt)
        for budget in budgets
        for protect_prompt in (False, True)
        for policy in policies
        if policy != "full"
    ]


class Exam:
    """The model and one left-padded batch of held-out problems."""

    def __init__(self, *, problems: int, seed: int) -> None:
        self.seed = seed
        self.tokenizer, self.model = load(MODEL_PATH)
        self.problems = [make_problem(seed + i, STEPS) for i in range(problems)]
        prompts = [problem.prompt for problem in self.problems]
        self.inputs = self.tokenizer(prompts, return_tensors="pt", padding=True)
        traces = [len(self.tokenizer(problem.trace).input_ids) for problem in self.problems]
        # A chain of thought that went astray must not run for ever.
        self.max_new_tokens = int(1.1 * max(traces))

    def take(self, setting: Setting) -> Row:
        """Solves all problems under one setting.

        Raises:
            NotImplementedError: a policy that cannot serve the model.
            ValueError: a setting that cannot work, such as a budget that is too small.
        """
        cache = CompressedCache(
            setting.policy, setting.budget or 1, protect_prompt=setting.protect_prompt
        )
        started = time.perf_counter()
        with torch.inference_mode():
            output = self.model.generate(
                **self.inputs,
                **cache_argument(cache),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
            )
        seconds = time.perf_counter() - started
        answers = output[:, self.inputs.input_ids.shape[1] :]
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        lengths = (answers != self.tokenizer.pad_token_id).sum(dim=1)
        correct = sum(
            extract_answer(text) == problem.answer
            for text, problem in zip(texts, self.problems, strict=True)
        )
        total = len(self.problems)
        interval = binomtest(correct, total).proportion_ci(0.95, method="wilson")
        return Row(
            policy=setting.policy,
            budget=setting.budget,
            protect_prompt=setting.protect_prompt,
            correct=correct,
            problems=total,
            accuracy=correct / total,
            accuracy_low=float(interval.low),
            accuracy_high=float(interval.high),
            mean_tokens=lengths.float().mean().item(),
            tokens_per_s=lengths.sum().item() / seconds,
            cache_bytes=cache.nbytes,
            evicted_tokens=cache.evicted_tokens,
        )

    def attempt(self, setting: Setting) -> Row | Refusal:
        """The same, or why it cannot be."""
        try:
            return self.take(setting)
        except (NotImplementedError, ValueError) as error:
            return Refusal(**asdict(setting), why=str(error))


def rows(
    exam: Exam, planned: Sequence[Setting], *, workers: int, threads: int
) -> Iterator[Row | Refusal]:
    """Rows in the order planned, measured by ``workers`` processes of ``threads`` threads."""
    if workers == 1:
        torch.set_num_threads(threads)
        yield from map(exam.attempt, planned)
        return
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(len(exam.problems), exam.seed, threads),
    ) as pool:
        try:
            # With ``map``, what is left would be cancelled, and the pool fail to say that it broke.
            for future in [pool.submit(_attempt, setting) for setting in planned]:
                yield future.result()
        except BaseException:
            # Else the pool would wait for them.
            for process in multiprocessing.active_children():
                process.kill()
            raise


_worker: Exam


def _start_worker(problems: int, seed: int, threads: int) -> None:
    global _worker
    # Ctrl-C reaches all processes of a terminal; the demo itself ends these.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _worker = Exam(problems=problems, seed=seed)


def _attempt(setting: Setting) -> Row | Refusal:
    return _worker.attempt(setting)
