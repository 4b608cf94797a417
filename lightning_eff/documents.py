"""Files written whole or not at all, and plain documents that are what they should be or an error that says why.

Whoever is killed while he writes leaves the file that was there before; whoever reads a file that was cut off, edited
or written by another program gets a ``ValueError`` with the file's name.
"""

from __future__ import annotations

import csv
import errno
import functools
import pickle
import secrets
import shutil
import sys
import types
import zipfile
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
P = ParamSpec("P")

_MALFORMED = (
    ValueError,  # json, UTF-8 and numpy raise kinds of it
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,  # torch's archive reader, and RecursionError
    EOFError,
    MemoryError,  # a size that was made up
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    csv.Error,
)


@contextmanager
def whole_file(path: str | Path) -> Generator[Path, None, None]:
    """Yield a path to write to; when the block ends without an error, what was written takes the place of ``path``.

    The file is written beside ``path`` under a name of its own that ends in ``.part``, which a process that dies leaves
    behind; of several that write at a time the last one stays. Folders are made; permissions of a file that is replaced
    are kept; the target of a link, not the link, is replaced; what is no file, as a device, is written to directly.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        beside.touch(exist_ok=False)
        if path.exists():
            shutil.copymode(path, beside)  # before anything is in it
        yield beside
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> Path:
    """Write a text as UTF-8, whole or not at all; see :func:`whole_file`. Returns the path."""
    with whole_file(path) as beside:
        # no translation of line ends: what is read back is what was written
        beside.write_text(text, encoding="utf-8", newline="")
    return Path(path)


@contextmanager
def reading(what: str) -> Generator[None, None, None]:
    """Make one ``ValueError``, which begins with ``what``, of all that a malformed document raises inside the block.

    Errors of the operating system (no such file, no permission) pass.

    Args:
        what: e.g. ``"plan.json holds no pruning plan"``.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place before the beginning of the file was asked for
            raise
        raise ValueError(f"{what}: it tells of places that it does not have") from error
    except _MALFORMED as error:
        missing = isinstance(error, KeyError) and f"it has no {error}"
        raise ValueError(f"{what}: {missing or str(error) or type(error).__name__}") from error


def whole_state(load: Callable[P, None]) -> Callable[P, None]:
    """Decorate a method that takes up a saved state, in attributes that it sets: all of the state is taken, or nothing.

    A state that does not fit is a ``ValueError``, see :func:`reading`, and attributes are as they were.
    """

    @functools.wraps(load)
    def taken(*args: P.args, **kwargs: P.kwargs) -> None:
        owner = args[0]
        before = dict(vars(owner))
        try:
            with reading(f"{type(owner).__name__} cannot go on from this checkpoint"):
                load(*args, **kwargs)
        except BaseException:
            vars(owner).clear()
            vars(owner).update(before)
            raise

    return taken


def parsed(kind: Any, value: Any, name: str) -> Any:
    """Return ``value`` as ``kind``, whose every part it must fit.

    Args:
        kind: a type as in an annotation, of plain Python: numbers, text, ``None``, ``Any``, unions, ``Literal``,
            lists, tuples, sequences and mappings of them, and dataclasses, which are built from mappings unless they
            are there already. Whole numbers pass for ``float``, truth values for no number, lists for tuples.
        value: what was read.
        name: of the value, for the error.

    Raises:
        ValueError: the value or a part of it has another type, or a dataclass lacks an entry or has one too many.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        others = [part for part in parts if part is not type(None)]
        if len(others) == 1:
            return parsed(others[0], value, name)
        for part in others:
            with suppress(ValueError):
                return parsed(part, value, name)
        raise _other(kind, value, name)
    if origin is Literal:
        if any(value == part and type(value) is type(part) for part in parts):
            return value
    elif isinstance(kind, type) and is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if isinstance(value, Mapping):
            return _built(kind, value, name)
    elif origin is tuple and parts[-1] is not Ellipsis:
        if isinstance(value, list | tuple) and len(value) == len(parts):
            return tuple(
                parsed(part, entry, f"{name}[{i}]") for i, (part, entry) in enumerate(zip(parts, value, strict=True))
            )
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        if isinstance(value, Mapping):
            keys = {key: parsed(parts[0], key, f"a key of {name}") for key in value}
            return {keys[key]: parsed(parts[1], entry, f"{name}[{key!r}]") for key, entry in value.items()}
    elif isinstance(origin, type) and issubclass(origin, Sequence):
        if isinstance(value, list | tuple):
            entries = [parsed(parts[0], entry, f"{name}[{i}]") for i, entry in enumerate(value)]
            return tuple(entries) if origin is tuple else entries
    elif isinstance(value, bool) or kind is bool:
        if kind is bool and isinstance(value, bool):
            return value
    elif kind is float and isinstance(value, int) and abs(value) > sys.float_info.max:
        pass
    elif isinstance(value, (int, float) if kind is float else type(None) if kind is None else kind):
        return value
    raise _other(kind, value, name)


def _built(kind: type[T], entries: Mapping[str, Any], name: str) -> T:
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind) if field.init}  # type: ignore[arg-type]
    needed = {field.name for field in known.values() if field.default is MISSING and field.default_factory is MISSING}
    if strange := entries.keys() - known.keys():
        raise ValueError(f"expected {name} to have {', '.join(known)}, got {', '.join(map(str, strange))} besides")
    if absent := needed - entries.keys():
        raise ValueError(f"expected {name} to have {', '.join(sorted(absent))}, got {', '.join(map(str, entries))}")
    return kind(**{key: parsed(hints[key], entry, f"{name}.{key}") for key, entry in entries.items()})


def _other(kind: Any, value: Any, name: str) -> ValueError:
    shown = str(kind).replace("typing.", "").replace("collections.abc.", "") if get_args(kind) else kind.__name__
    told = repr(value)
    return ValueError(f"expected {name} to be {shown}, got {told if len(told) < 80 else told[:77] + '...'}")
