"""Options some of which are options themselves, in Python, in YAML and in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from types import NoneType
from typing import Any, Self, get_args, get_type_hints

from lightning_eff.arguments import plain


@dataclass(frozen=True)
class NestedOptions:
    """Base of frozen dataclasses whose fields are plain values or groups, which are dataclasses."""

    @classmethod
    def of(cls, config: Self | Mapping[str, Any] | None = None, **overrides: Any) -> Self:
        """Make options of some, or of a dict such as :meth:`to_dict` gives, and of others that replace their own.

        Args:
            config: None starts from the defaults. Groups within a dict may be dicts.
            **overrides: Fields by name; a dict for a group replaces only what it names.

        Raises:
            ValueError: A name is unknown, or a value lies outside its range.
        """
        if not isinstance(config, cls):
            given: Any = config or {}
            config = cls()._with(dict(given))
        return config._with(overrides) if overrides else config

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts of plain values: what a checkpoint's hyper-parameters may hold."""
        return plain(asdict(self))

    def _with(self, changes: dict[str, Any]) -> Self:
        _check_names(self, changes)
        hints = get_type_hints(type(self))
        return replace(self, **{name: self._group(name, hints[name], value) for name, value in changes.items()})

    def _group(self, name: str, hint: Any, value: Any) -> Any:
        """A group that was given whole or in part; plain values as they are."""
        parts = get_args(hint) or (hint,)
        kind: type[Any] | None = next((p for p in parts if isinstance(p, type) and is_dataclass(p)), None)
        if kind is None or isinstance(value, kind) or (value is None and NoneType in parts):
            return value
        if not isinstance(value, Mapping):
            told = f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"
            none = ", a dict of its fields or None" if NoneType in parts else " or a dict of its fields"
            raise ValueError(f"{name} must be {told}{none}, got {value!r}")
        mine = getattr(self, name)
        if issubclass(kind, NestedOptions):
            return kind.of(mine, **value)
        _check_names(mine, value)
        return replace(mine, **value)


def _check_names(options: Any, given: Mapping[str, Any]) -> None:
    known = {field.name for field in fields(options)}
    if unknown := set(given) - known:
        names, own = ", ".join(sorted(map(str, unknown))), ", ".join(sorted(known))
        raise ValueError(f"{type(options).__name__} has no {names}; it has {own}")


def check_literals(options: Any) -> None:
    """Raise a ValueError where a field of a dataclass holds a string that its annotation does not list."""
    for name, hint in get_type_hints(type(options)).items():
        allowed = _strings(hint)
        others = tuple(part for part in get_args(hint) if isinstance(part, type))
        others += (int,) if float in others else ()
        value = getattr(options, name)
        if allowed and value not in allowed and (isinstance(value, str) or not isinstance(value, others)):
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _strings(hint: Any) -> list[str]:
    """Strings that an annotation of literals and unions lets through."""
    return [hint] if isinstance(hint, str) else [s for part in get_args(hint) for s in _strings(part)]
