"""Settings as frozen dataclasses whose fields hold what their annotations say."""

import numbers
import types
import typing
from collections.abc import Sequence
from dataclasses import fields
from typing import Any


def check_types(settings: Any) -> None:
    """Check every field of a dataclass against its annotation; lists (from JSON) become tuples.

    Numbers of numpy become Python's.
    Knows int, float (an int will do), str, bool, None, tuples of these, unions and dicts by name.
    Raises ValueError that names the field, the type and the value.
    """
    hints = typing.get_type_hints(type(settings))
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, list):
            value = tuple(value)
        elif hasattr(value, "dtype") and isinstance(value, numbers.Integral):
            value = int(value)
        elif hasattr(value, "dtype") and isinstance(value, numbers.Real):
            value = float(value)
        object.__setattr__(settings, field.name, value)
        check_type(field.name, value, hints[field.name])


def check_type(name: str, value: Any, kind: Any) -> None:
    """Raise ValueError that names the value unless it is of the annotated kind."""
    if not _fits(value, kind):
        shown = str(kind).replace("<class '", "").replace("'>", "")
        raise ValueError(f"{name} must be {shown}, got {value!r}")


def _fits(value: Any, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1] is Ellipsis:
            return all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if origin is list:
        return isinstance(value, list) and all(_fits(v, arguments[0]) for v in value)
    if origin is Sequence:
        return isinstance(value, list | tuple) and all(_fits(v, arguments[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)
