"""Parts that a user may bring along: found by a built-in name, in a file of his own, or as a class of a module.

    sapo                 the file of that name in the package
    ./mine.py            any path that ends in .py, relative to the working directory; it holds one such class
    package.module:Mine  a class of an installed module

Files and modules run with all rights of the process that loads them.
"""

import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from sapo_learner.config import did_you_mean
from sapo_learner.errors import ConfigError

Part = TypeVar("Part")


def find_class(name: str, base: type[Part], *, package: ModuleType, kind: str) -> type[Part]:
    """The subclass of `base` that `name` stands for; a ConfigError says why there is none.

    package: holds the built-in parts, one per file. kind: what messages call such a part, and the section of run.yaml
    that names it. A file is read anew at every call.
    """
    where = f"{kind}.name"
    module_name, colon, class_name = name.partition(":")
    if name.endswith(".py"):
        return _only(base, _file(Path(name), kind, where), where=f"{where} {name}")
    if colon:
        module = _imported(lambda: importlib.import_module(module_name), module_name, f"{where} {name}")
        return _named(class_name, base, module, where=f"{where} {name}")
    known = sorted(each.name for each in pkgutil.iter_modules(package.__path__))
    if name not in known:
        raise ConfigError(
            f"unknown {kind} {name!r}, {did_you_mean(name, known)}",
            where=where, fix="one of your own is a file like ./mine.py, or module:ClassName",
        )  # fmt: skip
    return _only(base, importlib.import_module(f"{package.__name__}.{name}"), where=f"{where} {name}")


def _file(path: Path, kind: str, where: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(
            f"no file {path}", where=where, fix=f"paths are relative to the working directory, {Path.cwd()}"
        )
    module_name = f"sapo_{kind}:{path.resolve()}"  # no import can ask for it, and two files of one name do not meet
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module, execute = importlib.util.module_from_spec(spec), spec.loader.exec_module

    def load() -> ModuleType:
        sys.modules[module_name] = module  # annotations are looked up there
        execute(module)
        return module

    return _imported(load, str(path), where)


def _imported(load: Callable[[], ModuleType], source: str, where: str) -> ModuleType:
    try:
        return load()
    except Exception as error:  # somebody else's code, which may raise anything
        reason = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
        raise ConfigError(
            f"{source} cannot be imported: {type(error).__name__}: {reason}{_line(error)}", where=where
        ) from None


def _line(error: Exception) -> str:
    """Where it happened, outside of the import machinery and of this file."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f", {error.filename}, line {error.lineno}"
    frames = [each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith("<frozen")]
    own = [each for each in frames if each.filename != __file__]
    return f", {own[-1].filename}, line {own[-1].lineno}" if own else ""


def _parts(base: type[Part], module: ModuleType) -> dict[str, type[Part]]:
    """The concrete subclasses of `base` that the module defines, not those it imports."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not inspect.isabstract(value)
    }


def _only(base: type[Part], module: ModuleType, *, where: str) -> type[Part]:
    parts = _parts(base, module)
    if len(parts) != 1:
        found = f"{len(parts)}: {', '.join(sorted(parts))}" if parts else "none"
        raise ConfigError(
            f"must define one class derived from {base.__module__}.{base.__name__}, found {found}",
            where=where, fix="name the class: module:ClassName" if parts else "",
        )  # fmt: skip
    return next(iter(parts.values()))


def _named(class_name: str, base: type[Part], module: ModuleType, *, where: str) -> type[Part]:
    found = getattr(module, class_name, None)
    if isinstance(found, type) and issubclass(found, base) and not inspect.isabstract(found):
        return found
    what = "there is no such class" if found is None else "it is no concrete subclass"
    raise ConfigError(
        f"{what} of {base.__module__}.{base.__name__} in {module.__name__}",
        where=where, fix=did_you_mean(class_name, _parts(base, module)),
    )  # fmt: skip
