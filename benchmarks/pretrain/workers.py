"""Data-parallel training over processes.

On a busy machine two threads inside one process wait for each other at every barrier; two processes meet once a step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    """Number of this process, 0 when there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    """Go on when every process has come here, so that what process 0 has written can be read."""
    if dist.is_initialized():
        dist.barrier()


def average_gradients(parameters: Iterable[nn.Parameter], seconds: float) -> float:
    """Replace all gradients by their mean over the processes, in one message.

    Args:
        parameters: Parameters whose gradients are averaged; a missing gradient counts as zero.
        seconds: Clock of this process.

    Returns:
        Clock of process 0, so that all of them stop at the same step.
    """
    if world_size() == 1:
        return seconds
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    clock = torch.tensor([seconds if rank() == 0 else 0.0])
    gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
    message = torch.cat([g.flatten() for g in gradients] + [clock.to(gradients[0])])
    dist.all_reduce(message)
    position = 0
    for gradient in gradients:
        part = message[position : position + gradient.numel()]
        gradient.copy_(part.view_as(gradient) / world_size())
        position += gradient.numel()
    return float(message[-1])


def _enter(number: int, count: int, port: int, function: Callable[..., None], arguments: tuple) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=number, world_size=count)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()


def launch(function: Callable[..., None], arguments: tuple, count: int, port: int = 29517) -> None:
    """Run ``function(*arguments)`` in ``count`` processes that know each other; in this one if ``count`` is 1."""
    if count == 1:
        function(*arguments)
    else:
        torch.multiprocessing.spawn(_enter, (count, port, function, arguments), nprocs=count)
