"""Shows installed plugins to Anomalib: models and datamodules that other distributions register by entry point.

Anomalib finds a model by its name only once somebody has imported it. The start-up file of this distribution calls
:func:`install` at interpreter start. That puts a finder on :data:`sys.meta_path` which looks at two names only,
``anomalib.models`` and ``anomalib.data``. Right after one of them has run, :mod:`anomalib_vtfusion.registration` loads
every entry point of the group with the same name, from any distribution. So a plugin is found by ``--model NAME``,
``get_model`` and ``from anomalib.models import NAME``, in a spawned worker as well.

The environment variable ``ANOMALIB_PLUGINS=0`` turns all of this off. This module runs at every interpreter start: it
imports only what the interpreter has loaded by then, and is kept small.
"""

import os
import sys
from _thread import get_ident  # ``threading`` has the same function, but is not loaded yet at interpreter start

TYPE_CHECKING = False  # type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

REGISTRIES = ("anomalib.models", "anomalib.data")
OFF_SWITCH = "ANOMALIB_PLUGINS"


def enabled() -> bool:
    """Tell whether plugins are loaded: true unless ``ANOMALIB_PLUGINS`` is ``0``, ``false``, ``no`` or ``off``."""
    return os.environ.get(OFF_SWITCH, "").strip().lower() not in {"0", "false", "no", "off"}


def install() -> None:
    """Load plugins as soon as Anomalib's registries are imported, or now for a registry that already is.

    The start-up files call this. Calling it again does nothing new.
    """
    if not enabled():
        return
    if not any(type(finder).__qualname__ == "RegistryFinder" for finder in sys.meta_path):
        sys.meta_path.insert(0, RegistryFinder())
    for registry in REGISTRIES:
        if registry in sys.modules:
            _load_plugins(registry)


class RegistryFinder:
    """Finds the two registries where the other finders find them, and wraps their loaders."""

    def __init__(self) -> None:
        self._searching: set[tuple[int, str]] = set()

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Return the spec that the other finders give, with a loader that loads plugins after the module has run."""
        if fullname not in REGISTRIES:
            return None
        # Another import hook may search all finders in turn, this one included.
        search = (get_ident(), fullname)
        if search in self._searching:
            return None
        self._searching.add(search)
        try:
            for finder in list(sys.meta_path):
                find_spec = getattr(finder, "find_spec", None)
                spec = find_spec(fullname, path, target) if find_spec and finder is not self else None
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = RegistryLoader(spec.loader)
                    return spec
        finally:
            self._searching.discard(search)
        return None


class RegistryLoader:
    """Is the host's own loader in all but ``exec_module``, and hands the module back to that loader there."""

    def __init__(self, loader: "Any") -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def exec_module(self, module: "ModuleType") -> None:
        """Run the module as the host's loader does, then load the plugins of that registry."""
        # Put back first: resources, inspect and reload must see the loader that they know.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _load_plugins(module.__name__)


def _load_plugins(registry: str) -> None:
    if enabled():
        from anomalib_vtfusion.registration import load_plugins

        load_plugins(registry)
