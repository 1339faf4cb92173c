"""Copies tensors to the host without blocking: through pinned memory and a separate stream on a GPU."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

IN_FLIGHT = 64 * 2**20
"""bytes that may be in flight before the oldest copy is waited for"""


class Transfer:
    """Delivers tensors on the host, in the order in which they were sent."""

    def __init__(self, stays: bool = False) -> None:
        """`stays`: tensors are delivered where they are instead."""
        self._stays = stays
        self._waiting: deque[tuple[Any, torch.Tensor, Callable[[torch.Tensor], None]]] = deque()
        self._bytes = 0
        self._streams: dict[torch.device, Any] = {}

    def send(self, tensor: torch.Tensor, arrived: Callable[[torch.Tensor], None]) -> None:
        """Copy `tensor`, held by nobody else. `arrived` gets it on the host now, or at a later `send` or `finish`."""
        if self._stays or tensor.device.type == "cpu":
            arrived(tensor)
        elif tensor.device.type != "cuda":
            arrived(tensor.cpu())
        else:
            self._send_from_gpu(tensor, arrived)

    def finish(self) -> None:
        """Wait until everything that was sent has arrived."""
        while self._waiting:
            self._arrive()

    def _send_from_gpu(self, tensor: torch.Tensor, arrived: Callable[[torch.Tensor], None]) -> None:
        device = tensor.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
            there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            there.record(stream)
        tensor.record_stream(stream)  # otherwise its memory is reused before the copy is done
        self._waiting.append((there, host, arrived))
        self._bytes += host.nbytes
        while self._waiting and (self._bytes > IN_FLIGHT or self._waiting[0][0].query()):
            self._arrive()

    def _arrive(self) -> None:
        there, host, arrived = self._waiting.popleft()
        there.synchronize()
        self._bytes -= host.nbytes
        arrived(host)
