"""Modules that answer to another package's name: the tree of modules, and the version metadata of the package."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


class StandIn(ModuleType):
    """A module whose names live elsewhere and are looked up there at each access.

    Patching a name here patches it where it lives, so that tests written for the peer reach the code that runs.

    Args:
        name: dotted name of the module.
        version: what `__version__` says.
        sources: where names are looked up, first match first: dotted names of modules, or dictionaries.
    """

    def __init__(self, name: str, version: str, sources: tuple[str | Mapping[str, Any], ...]):
        super().__init__(name, f"{name}, answered by pyqlora.")
        self.__dict__.update(
            __spec__=ModuleSpec(name, None, is_package=True),
            __path__=[],
            __version__=version,
            _sources=sources,
            _patched={},
        )

    def _namespaces(self):
        for source in self._sources:
            yield vars(importlib.import_module(source)) if isinstance(source, str) else source

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            for source in self._sources:
                if isinstance(source, str):
                    module = importlib.import_module(source)
                    if hasattr(module, name):
                        return getattr(module, name)
                elif name in source:
                    return source[name]
        elif name == "__all__":
            return dir(self)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}: pyqlora does not stand in for it")

    def __setattr__(self, name: str, value: Any) -> None:
        spaces = [] if name.startswith("__") else self._namespaces()
        home = next((space for space in spaces if name in space), self.__dict__)
        if home is not self.__dict__:
            self._patched.setdefault(name, (home, home[name]))
        home[name] = value

    def __delattr__(self, name: str) -> None:
        if name in self._patched:
            home, value = self._patched.pop(name)
            home[name] = value
        else:
            super().__delattr__(name)

    def __dir__(self) -> list[str]:
        names = {name for name in self.__dict__ if not name.startswith("_")}
        for space in self._namespaces():
            names.update(space.get("__all__") or (name for name in space if not name.startswith("_")))
        return sorted(names)


def module_tree(root: str, version: str, modules: Mapping[str, tuple]) -> dict[str, StandIn]:
    """Stand-ins for `root` and, by the keys of `modules` ("" is root itself), for the modules below it."""
    tree: dict[str, StandIn] = {}
    for path, sources in modules.items():
        name = f"{root}.{path}" if path else root
        tree[name] = module = StandIn(name, version, sources)
        parent, _, last = name.rpartition(".")
        if parent:
            tree[parent].__dict__[last] = module
    return tree


def refused_class(name: str, message: str, base: type = object) -> type:
    """A class to import and to ask isinstance about, which raises NotImplementedError when it is made."""

    def refuse(cls: type, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(message)

    return type(name, (base,), {"__new__": refuse, "__doc__": message})


def refused_request(name: str, message: str) -> type:
    """A class of configurations that can be made with any arguments, and raise NotImplementedError when one is read."""

    def accept(self: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def refuse(self: Any, attribute: str) -> None:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        raise NotImplementedError(message)

    return type(name, (), {"__init__": accept, "__getattr__": refuse, "__doc__": message})


def refused_function(message: str) -> Any:
    """A function to import, which raises NotImplementedError when it is called."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(message)

    return refuse


class VersionFinder(importlib.metadata.DistributionFinder):
    """Tells `importlib.metadata` the versions of the packages stood in for; it finds no modules."""

    def __init__(self, versions: Mapping[str, str]):
        self.versions = versions

    def find_spec(self, name, path=None, target=None) -> None:
        """None: the modules are in sys.modules already."""

    def find_distributions(self, context: Any = None):
        """The distribution of `context.name`, or all of them."""
        wanted = getattr(context, "name", None)
        return [_Distribution(name, version) for name, version in self.versions.items() if wanted in (None, name)]


class _Distribution(importlib.metadata.Distribution):
    """A distribution without files: its name and version."""

    def __init__(self, name: str, version: str):
        self._text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: pyqlora's stand-in\n"

    def read_text(self, filename: str) -> str | None:
        return self._text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent / path


def forget_availability() -> None:
    """Let transformers ask again which packages there are: it remembers the answers."""
    utils = sys.modules.get("transformers.utils.import_utils")
    for name in ("is_bitsandbytes_available", "is_peft_available", "is_peft_greater_or_equal"):
        getattr(getattr(utils, name, None), "cache_clear", int)()
