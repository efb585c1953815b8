"""How often a piece of code would wait for a GPU, counted without one."""

from torch import Tensor
from torch.overrides import TorchFunctionMode


class HostReads(TorchFunctionMode):
    """Counts the reads of a tensor's values, for each of which the host would wait for a GPU."""

    READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.on_host: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.__name__ in self.READS and not any(args[0] is tensor for tensor in self.on_host):
            self.count += 1
        if function.__name__ == "cpu":
            self.on_host.append(result)
        return result
