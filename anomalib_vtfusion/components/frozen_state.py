"""Keeps a frozen submodule out of a module's state, so that a checkpoint holds only what was learned."""

from typing import Any

from torch import nn


def leave_out_of_state(module: nn.Module, name: str) -> None:
    """Leave submodule ``name`` out of ``module.state_dict()``, and do not miss it in ``load_state_dict(strict=True)``.

    Pickling the whole module, as Anomalib's torch export does, still takes the submodule along.
    """
    module.register_state_dict_post_hook(_Drop(name))
    module.register_load_state_dict_pre_hook(_PutBack(name))


class _Drop:
    """Removes a submodule's entries from a state."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        del module, metadata
        for key in [key for key in state if key.startswith(f"{prefix}{self.name}.")]:
            del state[key]


class _PutBack:
    """Adds a submodule's own entries to a state about to be loaded."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *unused: object) -> None:
        del unused
        own = getattr(module, self.name).state_dict()
        state.update({f"{prefix}{self.name}.{key}": value for key, value in own.items()})
