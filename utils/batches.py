"""Batches on their way to the device."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor


def to_device(batch: Mapping, device: torch.device) -> dict:
    """Tensors on the device, everything else as it is."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def batches_on(device: torch.device, batches: Iterable[Mapping]) -> Iterator[dict]:
    """The batches on the device. On CUDA the next one travels while the current one is computed with."""
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in batches)
        return
    copying = torch.cuda.Stream(device)
    source, ready = iter(batches), None
    while True:
        with torch.cuda.stream(copying):
            following = next(source, None)
            following = None if following is None else to_device(following, device)
            arrived = copying.record_event()
        if ready is not None:
            yield _handed_over(*ready, device)
        if following is None:
            return
        ready = following, arrived


def _handed_over(batch: dict, arrived: torch.cuda.Event, device: torch.device) -> dict:
    """The stream that computes waits for the copy, and the memory is not reused before it is done with it."""
    current = torch.cuda.current_stream(device)
    current.wait_event(arrived)
    for value in batch.values():
        if isinstance(value, Tensor):
            value.record_stream(current)
    return batch
