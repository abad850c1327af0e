"""The fields of a policy: its options, of simple types, and the policies it is made of."""

import dataclasses
import inspect
import operator
from typing import Any

import torch

from compressed_cache.wording import shown

_CHECKED: dict[str, tuple[type | tuple[type, ...], str]] = {
    "float": ((int, float), "a float"),
    "bool": (bool, "a bool"),
    "str": (str, "a str"),
}
_WHOLE = {"int": "an int", "int | None": "an int or None"}
_PARTS = ("base", "prompt", "decoding")


def whole_number(value: Any) -> int | None:
    """What ``value`` stands for as an int, as a number of NumPy or a tensor without dimensions may;
    None of a bool and of all else."""
    if isinstance(value, bool) or getattr(value, "shape", ()) != ():
        return None
    if getattr(value, "dtype", None) == torch.bool:
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_fields(policy: Any) -> None:
    """Raises ``TypeError`` for a value of another type, and for what only looks like a field; makes
    ints of whole numbers of other kinds."""
    of = type(policy)
    own = {
        name for name, kind in inspect.get_annotations(of).items() if "ClassVar" not in str(kind)
    }
    if left := own - {field.name for field in dataclasses.fields(policy)}:
        raise TypeError(
            f"{of.__name__}.{min(left)} is no option yet. Write "
            "@dataclass(frozen=True, kw_only=True) above the class"
        )
    for field in dataclasses.fields(policy):
        value = getattr(policy, field.name)
        # With postponed annotations the type of a field is its name.
        kind = getattr(field.type, "__name__", str(field.type))
        if kind in _WHOLE and (value is not None or kind == "int"):
            number = whole_number(value)
            if number is None:
                raise TypeError(f"{field.name} must be {_WHOLE[kind]}, got {shown(value)}")
            object.__setattr__(policy, field.name, number)
        elif kind in _CHECKED:
            allowed, wording = _CHECKED[kind]
            if not isinstance(value, allowed) or (isinstance(value, bool) and kind != "bool"):
                raise TypeError(f"{field.name} must be {wording}, got {shown(value)}")


def own_options(part: Any) -> list[str]:
    """The fields of a policy, or of a class of policies, that are not policies."""
    return [field.name for field in dataclasses.fields(part) if field.name not in _PARTS]
