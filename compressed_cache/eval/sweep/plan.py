"""Which cells a sweep has."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from compressed_cache.cache import CompressedCache
from compressed_cache.eval.results.row import Agreement, Option, Result
from compressed_cache.hf.checks import check_first_pass
from compressed_cache.policies import option_names
from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.wording import listing

FORMAT = 1
SHIPPED = "shipped"
"""What the shipped model is called, whose folder differs from machine to machine."""


def named(model: str) -> str:
    """What a plan calls a model."""
    return SHIPPED if Path(model).resolve() == MODEL_PATH.resolve() else model


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One policy at one budget on one task: a row."""

    task: str
    policy: str
    options: Mapping[str, Option]
    """Further arguments of the cache, as far as given."""
    budget: int | None
    seed: int

    @property
    def name(self) -> str:
        """Its folder, which no other cell of the sweep has."""
        policy = self.policy.replace("/", "-")
        budget = [] if self.budget is None else [str(self.budget)]
        return ".".join([self.task, policy, *budget, str(self.seed)])

    @property
    def cache_arguments(self) -> dict[str, Any]:
        """Those of ``CompressedCache`` behind the policy."""
        return dict(self.options) | ({} if self.budget is None else {"budget": self.budget})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was asked for. All of it shapes the rows, so that a folder holds one plan."""

    model: str
    tasks: list[str]
    policies: list[str]
    budgets: list[int]
    seeds: int
    options: dict[str, dict[str, Option]] = field(default_factory=dict)
    """Of policies by name; those under ``""`` are for all of them but ``full``."""
    limit: int | None = None
    batch_size: int = 1
    gen_kwargs: dict[str, Any] = field(default_factory=dict)
    model_args: dict[str, Any] = field(default_factory=dict)
    chat: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    measure: str = Result.measure
    prompts: list[str] = field(default_factory=list)
    """Those of the only task where it is a file of the user's; none: tasks of this package."""

    @property
    def is_agreement(self) -> bool:
        """Whether policies read what the full cache wrote, which its cell must have done before."""
        return self.measure == Agreement.measure

    @property
    def pretrained(self) -> str:
        """What the model is loaded from."""
        return str(MODEL_PATH) if self.model == SHIPPED else self.model

    def cells(self) -> list[Cell]:
        """All cells; those of the first seed come first, so that a sweep cut short is whole."""
        return [
            Cell(
                task=task,
                policy=policy,
                options=self._options(policy, seed),
                budget=budget,
                seed=seed,
            )
            for seed in range(self.seeds)
            for task in self.tasks
            for policy in self.policies
            for budget in ([None] if policy == "full" else self.budgets)
            if not (self.is_agreement and policy == "full" and seed)
        ]

    def writer(self, task: str) -> Cell:
        """With agreement the cell that writes the texts which the others of the task read."""
        return next(cell for cell in self.cells() if (cell.task, cell.policy) == (task, "full"))

    def repeating(self) -> list[str]:
        """The policies whose rows are the same under every seed: decoding is greedy."""
        if self.gen_kwargs.get("do_sample") or self.seeds == 1:
            return []
        return [policy for policy in self.policies if not self._draws(policy)]

    def given(self, policy: str) -> dict[str, Option]:
        """The options that were asked for of a policy."""
        shared = {} if policy == "full" else self.options.get("", {})
        return shared | self.options.get(policy, {})

    def to_json(self) -> dict[str, Any]:
        """What the folder keeps."""
        prompts = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()
        text = {"prompts": prompts} if self.prompts else {"prompts": None}
        return {"format": FORMAT} | asdict(self) | text

    def _options(self, policy: str, seed: int) -> dict[str, Option]:
        return ({"seed": seed} if self._draws(policy) else {}) | self.given(policy)

    def _draws(self, policy: str) -> bool:
        return "seed" in option_names(policy) and "seed" not in self.given(policy)


def problems(plan: Plan, config: Any) -> Iterator[str]:
    """Everything about policies, options and budgets that a cache would refuse.

    Args:
        plan: whose tasks are not looked at.
        config: of the model, None where it is not known.
    """
    known = []
    for policy in plan.policies:
        try:
            option_names(policy)
            known.append(policy)
        except ValueError as error:
            yield f"--policies: {error}"
    if strangers := [name for name in plan.options if name and name not in plan.policies]:
        yield f"--policy-args: {listing(strangers)} not among --policies {listing(plan.policies)}"
    if not plan.budgets and any(policy != "full" for policy in plan.policies):
        yield "--budgets must be given, all policies but full need one"
    heard = set()
    for cell in replace(plan, policies=known).cells():
        try:
            cache = CompressedCache(cell.policy, config=config, **cell.cache_arguments)
            check_first_pass(cache.policy)
        except (NotImplementedError, TypeError, ValueError) as error:
            where = cell.policy if cell.budget is None else f"{cell.policy} at {cell.budget}"
            if (problem := f"{where}: {error}") not in heard:
                heard.add(problem)
                yield problem
