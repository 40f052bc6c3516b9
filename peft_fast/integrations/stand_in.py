"""install_as_peft(): `import peft` gives peft_fast, for this process, where real peft is absent or not imported yet.

    import peft_fast; peft_fast.install_as_peft()     PEFT_FAST_AS_PEFT=1, which `import peft_fast` reads
    python -m peft_fast.as_peft script.py --its arguments                  torchrun -m peft_fast.as_peft script.py

transformers, TRL, accelerate and diffusers then do all that they do for peft, SFTTrainer(peft_config=...) included. It
is the one place where names outside of the given model are touched, and only on the user's call.

How: a finder at the front of sys.meta_path answers for `peft`, `peft.X` and for the distribution `peft`. What it gives
are modules of their own that ask peft_fast's module of the same path for every name, so that classes are the same ones.
Libraries that were imported before, and found no peft then, get what they would have imported.
"""

import ast
import dis
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "PEFT_FAST_AS_PEFT"
ASKERS = ("transformers", "trl", "accelerate", "diffusers")  # who imports peft if `is_peft_available()`


def _missing(module: str, name: str) -> str:
    return (
        f"peft_fast stands in for peft in this process (install_as_peft), and {module}.{name} is not built in it: use "
        f"real peft, with `pip install peft` and without install_as_peft and {VARIABLE}, for what needs it"
    )


class _StandIn(ModuleType):
    """The module `peft.X`: its names are those of `peft_fast.X`."""

    def __init__(self, name: str) -> None:
        super().__init__(name, f"peft_fast in the place of {name}: see peft_fast.install_as_peft")
        self._real = importlib.import_module(_our_name(name))
        if name == "peft":
            self.__version__ = _version()
        if hasattr(self._real, "__path__"):
            self.__path__ = []  # a package whose modules are the finder's to find

    def __getattr__(self, name: str) -> Any:
        real = vars(self)["_real"]
        if hasattr(real, name):
            return getattr(real, name)
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        caller = inspect.currentframe()
        caller = caller.f_back if caller is not None else None
        message = _missing(self.__name__, name)
        if caller is not None and caller.f_code.co_code[caller.f_lasti] == dis.opmap["IMPORT_FROM"]:
            raise ImportError(message, name=self.__name__)  # for which Python has words that say less
        raise AttributeError(message)

    def __dir__(self) -> Iterable[str]:
        return sorted({*vars(self), *dir(self._real)})


def _our_name(name: str) -> str:
    return "peft_fast" + name.removeprefix("peft")


def _version() -> str:
    from peft_fast.config import PEFT_VERSION

    return PEFT_VERSION


class _Distribution(importlib.metadata.Distribution):
    """The metadata of a package `peft`, which transformers and accelerate ask for its version."""

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            summary = "peft_fast in the place of peft (peft_fast.install_as_peft)"
            return f"Metadata-Version: 2.1\nName: peft\nVersion: {_version()}\nSummary: {summary}\n"
        return "peft\n" if filename == "top_level.txt" else None

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent / path


class _Finder(importlib.metadata.DistributionFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname.partition(".")[0] != "peft":
            return None
        try:
            found = importlib.util.find_spec(_our_name(fullname))
        except ModuleNotFoundError:  # its parent is no package
            found = None
        if found is None:
            parent, _, name = fullname.rpartition(".")
            raise ModuleNotFoundError(_missing(parent, name), name=fullname)
        is_package = found.submodule_search_locations is not None
        return importlib.machinery.ModuleSpec(fullname, self, origin=found.origin, is_package=is_package)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Its names are there already."""

    def find_distributions(self, context: Any = importlib.metadata.DistributionFinder.Context()) -> Any:  # noqa: B008
        return [_Distribution()] if context.name in (None, "peft") else []


def is_installed() -> bool:
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def install_as_peft() -> None:
    """Have `import peft`, here and in every library of this process, give peft_fast. A second call does nothing.

    Real peft on the disk is left out of account. Raises RuntimeError where it has been imported already: the libraries
    around hold its classes then.
    """
    if is_installed():
        return
    if "peft" in sys.modules:
        raise RuntimeError(
            "install_as_peft must come before the first `import peft`, and peft is imported already "
            f"({getattr(sys.modules['peft'], '__file__', None)}). Call it at the top of the script, or use python -m "
            "peft_fast.as_peft; for a model that peft has made there is peft_fast.accelerate(model)"
        )
    sys.meta_path.insert(0, _Finder())
    importlib.import_module("peft")
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ASKERS and module is not None:
            _tell(module)


def _tell(module: ModuleType) -> None:
    """Give a module that was imported before what it imports from peft where peft is available."""
    asks = vars(module).get("is_peft_available")
    if asks is None:
        return
    if hasattr(asks, "cache_clear"):
        asks.cache_clear()
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError):  # no source: nothing that could be read off it
        return
    for statement in tree.body:
        if isinstance(statement, ast.If) and "is_peft_available()" in ast.unparse(statement.test):
            if "not is_peft_available()" in ast.unparse(statement.test):
                continue
            _import_of_peft(statement.body, vars(module))


def _import_of_peft(statements: list[ast.stmt], namespace: dict[str, Any]) -> None:
    for statement in statements:
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                if alias.name.partition(".")[0] == "peft":
                    found = importlib.import_module(alias.name)
                    namespace[alias.asname or "peft"] = found if alias.asname else sys.modules["peft"]
        elif isinstance(statement, ast.ImportFrom) and (statement.module or "").partition(".")[0] == "peft":
            found = importlib.import_module(str(statement.module))
            for alias in statement.names:
                namespace[alias.asname or alias.name] = getattr(found, alias.name)


def install_if_asked() -> None:
    """What `import peft_fast` does with the environment variable. Raises ValueError for a value but 0 and 1."""
    value = os.environ.get(VARIABLE, "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {value!r}")
    if value == "1":
        install_as_peft()
