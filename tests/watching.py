"""Who is to see a call that passes torch's dispatcher by: modes, and a class; and bits to compare."""

import json
import tempfile

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(getattr(function, "__module__", ""))
        return function(*args, **(kwargs or {}))


class Trace:
    """The observer of execution traces alone, without a profiler; ``seen`` has the names that it wrote."""

    def __enter__(self):
        self.file = tempfile.NamedTemporaryFile("r", suffix=".json")
        self.observer = torch.profiler.ExecutionTraceObserver().register_callback(self.file.name)
        self.observer.start()
        return self

    def __exit__(self, *_):
        self.observer.stop()
        self.observer.unregister_callback()
        self.seen = [node["name"] for node in json.load(self.file)["nodes"]]
        self.file.close()


class Sub(torch.Tensor):
    pass
