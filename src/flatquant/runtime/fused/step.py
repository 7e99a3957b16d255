"""A decode step recorded as one CUDA graph."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flatquant.runtime.packedcache import PackedCache, Room

if TYPE_CHECKING:
    from flatquant.runtime.fused.model import Fused


class Step:
    """A decode step for one cache, recorded once and replayed. It holds no cache, and goes when the room goes."""

    def __init__(self, fused: Fused, cache: PackedCache) -> None:
        device = fused.device
        self.moved = cache.room.moved
        self.ids = torch.zeros((cache.room.batch, 1), dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.ids)
        # Kernels are compiled and tuned outside of the recording; what these runs write, the first replay overwrites.
        now, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        stream.wait_stream(now)
        with torch.cuda.stream(stream), cache.room.rehearsed():
            for _ in range(2):
                fused.logits(fused.hidden(self.ids, self.positions, cache, {}))
        now.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with _recording(self.graph, stream):
            self.logits = fused.logits(fused.hidden(self.ids, self.positions, cache, {}))
            cache.room.used += 1

    def __call__(self, ids: Tensor, positions: Tensor, room: Room) -> Tensor:
        self.ids.copy_(ids)
        self.positions.copy_(positions.expand_as(self.ids))
        self.graph.replay()
        room.length += 1
        return self.logits.clone()


@contextlib.contextmanager
def _recording(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
    """`torch.cuda.graph` beside threads that allocate memory and sample meanwhile.

    A recording takes part in the device's generator of random numbers: whoever else draws from it then gets an error.
    A step draws nothing, so it takes part in another generator.
    """
    torch.cuda.synchronize(stream.device)
    gc.collect()
    generator = torch.cuda.default_generators[stream.device.index]
    state = generator.graphsafe_get_state()
    with torch.cuda.stream(stream):
        generator.graphsafe_set_state(torch.Generator(stream.device))
        try:
            graph.capture_begin(capture_error_mode="thread_local")
        finally:
            generator.graphsafe_set_state(state)
        try:
            yield
        finally:
            graph.capture_end()
