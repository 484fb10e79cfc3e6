"""Loads the models and datamodules that installed distributions register for Anomalib by entry point.

The entry-point groups are named after Anomalib's registry modules, ``anomalib.models`` and ``anomalib.data``. The name
of an entry point becomes an attribute of its module, so it should be the name of the class. A plugin that fails costs
one :class:`PluginWarning`, and nothing that Anomalib has is ever replaced. Standard library only.
"""

import sys
import warnings
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

_shown: dict[tuple[str, str], object] = {}
_warned: set[tuple[str, str]] = set()


class PluginWarning(UserWarning):
    """A plugin could not be shown to Anomalib; Anomalib goes on without it."""


def load_plugins(registry: str) -> None:
    """Load every entry point of the group ``registry`` and set it as an attribute of the module of that name.

    Args:
        registry: ``"anomalib.models"`` or ``"anomalib.data"``; the module must be imported.
    """
    try:
        found = entry_points(group=registry)
    except Exception as error:  # a broken installation of something else must not break Anomalib
        _warn("(unknown)", f"cannot read the entry points of group {registry}", error)
        return
    _load_into(sys.modules[registry], found)


def _load_into(module: ModuleType, entries: Iterable[EntryPoint]) -> None:
    """Load entry points and set them on a registry; put off those that need a module that is still being imported."""
    put_off: list[EntryPoint] = []
    waiting_for: list[ModuleType] = []
    for entry in entries:
        try:
            value = entry.load()
        except (Exception, SystemExit) as error:
            # Importing a part of the plugin or of Anomalib first leads here while that part is half imported, and
            # a class below it cannot be had yet. That is no fault of the plugin.
            unfinished = _unfinished(module, entry.value.partition(".")[0].partition(":")[0])
            if unfinished:
                put_off.append(entry)
                waiting_for += unfinished
            else:
                _warn(_distribution(entry), f"cannot load {entry.name} = {entry.value}", error)
            continue
        _show(module, entry, value)
    if put_off:
        _retry_later(module, put_off, waiting_for)


def _show(module: ModuleType, entry: EntryPoint, value: object) -> None:
    """Set a loaded class as attribute of a registry, unless the name is taken or it is no class."""
    key = (module.__name__, entry.name)
    taken = vars(module).get(entry.name, value)
    if not isinstance(value, type):
        _warn(_distribution(entry), f"{entry.name} = {entry.value} is not a class", None)
        return
    # What stands there after a reload of the host was set by this function, and may be replaced.
    if taken is not value and taken is not _shown.get(key):
        _warn(_distribution(entry), f"{module.__name__} already has the name {entry.name}: not replaced", None)
        return
    setattr(module, entry.name, value)
    _shown[key] = value
    public = getattr(module, "__all__", None)
    if public is not None and entry.name not in public:
        module.__all__ = [*public, entry.name]  # type: ignore[attr-defined]


def _unfinished(registry: ModuleType, plugin: str) -> list[ModuleType]:
    """List modules of Anomalib and of one plugin that are being imported now, less the registry itself."""
    return [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in {"anomalib", plugin} and module is not registry and _is_initializing(module)
    ]


def _is_initializing(module: ModuleType) -> bool:
    # The mark that the import system itself goes by when it reports a partially initialized module.
    return getattr(getattr(module, "__spec__", None), "_initializing", False) is True


def _retry_later(module: ModuleType, entries: list[EntryPoint], waiting_for: list[ModuleType]) -> None:
    """Load entry points on the first use of a registry after one of the modules they may wait for is imported."""
    plain: Any = type(module)

    class WaitingRegistry(plain):  # type: ignore[misc]
        """The registry while plugins are put off; turns back into a plain module with the next try."""

        def __getattribute__(self, name: str) -> object:
            ready = not name.startswith("__") and not all(map(_is_initializing, waiting_for))
            if ready and type(self) is WaitingRegistry:
                self.__class__ = plain
                _load_into(self, entries)
            return plain.__getattribute__(self, name)

    module.__class__ = WaitingRegistry


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value.partition(":")[0]


def _warn(distribution: str, problem: str, error: BaseException | None) -> None:
    """Warn once for each distribution and cause, however many entry points fail for it."""
    cause = f"{type(error).__name__}: {error}" if error is not None else problem
    if (distribution, cause) in _warned:
        return
    _warned.add((distribution, cause))
    text = problem if error is None else f"{problem} ({cause})"
    warnings.warn(
        f"Anomalib plugin {distribution}: {text}. ANOMALIB_PLUGINS=0 loads no plugins.", PluginWarning, stacklevel=2
    )
