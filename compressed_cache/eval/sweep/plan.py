"""Which cells a sweep has."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lm_eval.utils import simple_parse_args_string

from compressed_cache.eval.results.row import Agreement, Option, Result
from compressed_cache.hf.checks import check_first_prompt
from compressed_cache.integrations.harness.arguments import PressArguments
from compressed_cache.policies import option_names
from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.wording import listing, shown

FORMAT = 1
SHIPPED = "shipped"
"""What the shipped model is called, whose folder differs from machine to machine."""
LOSSLESS = "lossless"
"""The option of a setting that is none of its cache: the cache drafts, and a full one verifies."""
_AGREES = "lossless says what the full cache says. Leave it out to measure agreement"


def named(model: str) -> str:
    """What a plan calls a model."""
    return SHIPPED if Path(model).resolve() == MODEL_PATH.resolve() else model


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One setting of a policy at one budget on one task: a row."""

    task: str
    setting: str
    """As the plan has it."""
    options: Mapping[str, Option]
    """Further arguments of the cache, as far as given."""
    budget: int | None
    seed: int

    @property
    def name(self) -> str:
        """Its folder, which no other cell of the sweep has."""
        policy, *options = self.setting.split(":", 1)
        setting = ",".join([policy.replace("/", "-"), *(quote(one, "=,") for one in options)])
        budget = [] if self.budget is None else [str(self.budget)]
        return ".".join([self.task, setting, *budget, str(self.seed)])

    @property
    def policy(self) -> str:
        """Its name."""
        return policy_of(self.setting)

    @property
    def press(self) -> PressArguments:
        """The recipe of its caches.

        Raises:
            TypeError: ``lossless`` is neither true nor false.
        """
        arguments = dict(self.options) | ({} if self.budget is None else {"budget": self.budget})
        lossless = arguments.pop(LOSSLESS, False)
        if not isinstance(lossless, bool):
            raise TypeError(f"lossless must be true or false, got {shown(lossless)}")
        return PressArguments(self.policy, arguments, lossless)


def policy_of(setting: str) -> str:
    """The name of the policy in a setting."""
    return setting.partition(":")[0]


def options_of(setting: str) -> dict[str, Option]:
    """The options in a setting."""
    return simple_parse_args_string(setting.partition(":")[2])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was asked for."""

    model: str
    tasks: list[str]
    policies: list[str]
    """Settings: names, or names with options, such as ``h2o:interval=8,recent=16``."""
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
                setting=setting,
                options=self._options(setting, seed),
                budget=budget,
                seed=seed,
            )
            for seed in range(self.seeds)
            for task in self.tasks
            for setting in self.policies
            for budget in ([None] if policy_of(setting) == "full" else self.budgets)
            if not (self.is_agreement and policy_of(setting) == "full" and seed)
        ]

    def writer(self, task: str) -> Cell:
        """With agreement the cell that writes the texts which the others of the task read."""
        return next(cell for cell in self.cells() if (cell.task, cell.policy) == (task, "full"))

    def repeating(self) -> list[str]:
        """The settings whose rows are the same under every seed: decoding is greedy."""
        if self.gen_kwargs.get("do_sample") or self.seeds == 1:
            return []
        return [setting for setting in self.policies if not self._draws(setting)]

    def given(self, setting: str) -> dict[str, Option]:
        """The options that were asked for of a setting; its own come before those of its policy."""
        policy = policy_of(setting)
        shared = {} if policy == "full" else self.options.get("", {})
        return shared | self.options.get(policy, {}) | options_of(setting)

    def to_json(self) -> dict[str, Any]:
        """What the folder keeps."""
        found = {"format": FORMAT} | asdict(self)
        prompts = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()
        found["prompts"] = prompts if self.prompts else None
        del found["options"]
        return found | {"given": {setting: self.given(setting) for setting in self.policies}}

    def _options(self, setting: str, seed: int) -> dict[str, Option]:
        return ({"seed": seed} if self._draws(setting) else {}) | self.given(setting)

    def _draws(self, setting: str) -> bool:
        return "seed" in option_names(policy_of(setting)) and "seed" not in self.given(setting)


def extended(there: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """What a folder keeps of its plan and of a further one.

    Raises:
        ValueError: plans that differ in more than tasks, policies, budgets and seeds, so that one
            name could mean two rows.
    """
    here = json.loads(json.dumps(here))
    # Sweeps of before there was a choice.
    there = {"measure": Result.measure, "prompts": None} | there
    if "options" in there:
        # Those of before there were settings.
        policies, options = there["policies"], there.pop("options")
        of_old = Plan(model="", tasks=[], policies=policies, budgets=[], seeds=1, options=options)
        there["given"] = {setting: of_old.given(setting) for setting in policies}
    lists, kept = ("tasks", "policies", "budgets"), there["given"]
    names = [name for name in here | there if name not in (*lists, "seeds", "given")]
    found = [(name, there.get(name), here.get(name)) for name in names]
    found += [
        (f"options of {setting}", kept[setting], given)
        for setting, given in here["given"].items()
        if setting in kept
    ]
    if differing := [f"{name} {old} there, {new} here" for name, old, new in found if old != new]:
        raise ValueError("; ".join(differing))
    return here | {
        **{name: list(dict.fromkeys(there[name] + here[name])) for name in lists},
        "seeds": max(there["seeds"], here["seeds"]),
        "given": kept | here["given"],
    }


def problems(plan: Plan, config: Any) -> Iterator[str]:
    """Everything about policies, options and budgets that a cache would refuse.

    Args:
        plan: whose tasks are not looked at.
        config: of the model, None where it is not known.
    """
    known = []
    policies = list(dict.fromkeys(map(policy_of, plan.policies)))
    for policy in policies:
        try:
            option_names(policy)
            known += [setting for setting in plan.policies if policy_of(setting) == policy]
        except ValueError as error:
            yield f"--policies: {error}"
    if strangers := [name for name in plan.options if name and name not in policies]:
        yield f"--policy-args: {listing(strangers)} not among --policies {listing(policies)}"
    if not plan.budgets and any(policy != "full" for policy in policies):
        yield "--budgets must be given, all policies but full need one"
    if plan.is_agreement:
        lossless = [one for one in known if plan.given(one).get(LOSSLESS)]
        yield from (f"{one}: {_AGREES}" for one in lossless)
    heard = set()
    for cell in replace(plan, policies=known).cells():
        try:
            check_first_prompt(cell.press.make_cache(config).policy)
        except (NotImplementedError, TypeError, ValueError) as error:
            where = cell.setting if cell.budget is None else f"{cell.setting} at {cell.budget}"
            if (problem := f"{where}: {error}") not in heard:
                heard.add(problem)
                yield problem
