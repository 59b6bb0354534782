"""Functions of tensors that are recorded as CUDA graphs and replayed: one launch instead of thousands.

What is recorded is a sequence of kernels with fixed addresses. So the function must not read a value on the host, have
shapes that depend on one, or take anything but its inputs from outside that may be replaced by another tensor.
Reference: "CUDA Graphs" in the notes of PyTorch.
"""

import functools
import logging
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

logger = logging.getLogger(__name__)

MOST_GRAPHS = 8         # kinds of inputs that are recorded; each graph keeps the memory it works in


def reason_against(model: nn.Module) -> str | None:
    """Why a graph of a model would not do what the model does: what a module of it says as `not_recorded`; or None."""
    return next((reason for part in model.modules() if (reason := getattr(part, "not_recorded", None))), None)


class Recorder(Protocol):
    """How a function without arguments is run before it is recorded, and how it is recorded."""

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """Runs it as it will be recorded: whatever is made once (workspaces, compiled kernels) is made here."""

    def record(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Records it without running it: what replays it, and returns its results where they were recorded."""


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Where everything is recorded. What keeps tensors or autograd nodes for it (DDP does) is to be made there, too."""
    return torch.cuda.Stream(device)


class CudaRecorder:
    """Records on a stream that is not the caller's, as CUDA asks; the graphs of one recorder share their memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, recording_stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], Any]) -> Any:
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            result = run()
        caller.wait_stream(self.stream)
        return result

    def record(self, run: Callable[[], Any]) -> Callable[[], Any]:
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self.device.index or 0]
        drawn = generator.clone_state()
        try:
            # Only this thread is watched: that of the data loader may pin memory meanwhile.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                result = run()
        except RuntimeError:
            generator.graphsafe_set_state(drawn)      # the one inside still waits for a graph that is not to be
            raise

        def replay() -> Any:
            graph.replay()
            return result
        return replay


class Recorded:
    """A function whose first calls with inputs of a kind run as they are, on copies of the inputs; then it is recorded.

    A kind is the shapes and types of all tensors. Where recording fails, one line says why and the function goes on
    unrecorded; `recover` is called first, to undo what the attempt left behind.

    function: takes and returns tensors in dictionaries, lists and named tuples. warm_ups: calls before the recording.
    """

    def __init__(self, function: Callable[[Any], Any], recorder: Recorder, what: str, warm_ups: int = 3,
                 recover: Callable[[RuntimeError], None] = lambda error: None) -> None:
        self.function, self.recorder, self.what = function, recorder, what
        self.warm_ups, self.recover = warm_ups, recover
        self.kinds: dict[Hashable, _Kind] = {}
        self.refused = False

    def __call__(self, inputs: Any) -> Any:
        """The function's result, in memory of its own."""
        leaves, structure = tree_flatten(inputs)
        name = (str(structure), *((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in leaves))
        if self.refused or (name not in self.kinds and len(self.kinds) == MOST_GRAPHS):
            return self.function(inputs)
        kind = self.kinds.setdefault(name, _Kind(inputs))
        kind.fill(leaves)
        if kind.replay is None and kind.calls < self.warm_ups:
            kind.calls += 1
            return self.recorder.warm_up(lambda: self.function(kind.inputs))
        if kind.replay is None:
            try:
                kind.replay = self.recorder.record(lambda: self.function(kind.inputs))
            except RuntimeError as error:
                return self._unrecorded(inputs, error)
        return tree_map_only(Tensor, torch.clone, kind.replay())

    def forget(self) -> None:
        """Records anew: for whoever replaced tensors that the function uses, as loading an optimizer's state does."""
        self.kinds.clear()

    def _unrecorded(self, inputs: Any, error: RuntimeError) -> Any:
        self.recover(error)
        self.refused = True
        self.kinds.clear()
        logger.warning("cuda_graph: %s cannot be recorded and runs as without it (%s)", self.what,
                       str(error).strip().splitlines()[0])
        return self.function(inputs)


class _Kind:
    """Inputs of one kind: where they are copied to, and the graph that reads them there."""

    def __init__(self, inputs: Any) -> None:
        self.inputs = tree_map_only(Tensor, torch.empty_like, inputs)
        self.tensors = [x for x in tree_flatten(self.inputs)[0] if isinstance(x, Tensor)]
        self.calls = 0
        self.replay: Callable[[], Any] | None = None

    def fill(self, leaves: list) -> None:
        torch._foreach_copy_(self.tensors, [x for x in leaves if isinstance(x, Tensor)])
