"""Batches on their way to the device."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def to_device(batch: Any, device: torch.device) -> Any:
    """Tensors on the device, also inside dictionaries, lists and named tuples; everything else as it is."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if _is_named_tuple(batch):
        return type(batch)(*(to_device(value, device) for value in batch))
    return [to_device(value, device) for value in batch] if isinstance(batch, list) else batch


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
            batch, copied = ready
            computing = torch.cuda.current_stream(device)
            computing.wait_event(copied)
            _keep_memory_for(computing, batch)
            yield batch
        if following is None:
            return
        ready = following, arrived


def _keep_memory_for(stream: torch.cuda.Stream, batch: Any) -> None:
    """The batch's memory is not given to others before this stream is done with it."""
    if isinstance(batch, Tensor):
        batch.record_stream(stream)
    elif isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list) or _is_named_tuple(batch):
        for value in batch:
            _keep_memory_for(stream, value)


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")
