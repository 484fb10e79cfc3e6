"""Buffers whose number of rows is only known after the fit, and that load from a checkpoint all the same."""

from torch import nn


class VariableBuffers(nn.Module):
    """Module that takes the shape of the buffers named in `variable_buffers` from the state that it loads."""

    variable_buffers: tuple[str, ...] = ()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        for name in self.variable_buffers:
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and saved.shape[1:] == own.shape[1:]:
                setattr(self, name, own.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
