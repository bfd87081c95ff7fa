"""How many bytes a forward leaves in memory until its backward, on any machine."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Storages(TorchDispatchMode):
    """Remembers, without holding it, every storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                # A freed storage's address is given out anew, so the newest owner counts.
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result


def kept_bytes(forward: Callable[[], Tensor], *not_counted: nn.Module | Tensor) -> int:
    """Bytes of the storages that live on after forward() while its result does, the result's own left out.

    not_counted: modules, whose parameters and buffers don't count, and inputs. Fake tensors serve as well as real ones.
    """
    known = {t.untyped_storage()._cdata for module in not_counted for t in _tensors(module)}
    with _Storages() as storages:
        result = forward()
    known.add(result.untyped_storage()._cdata)
    return sum(size for key, (ref, size) in storages.made.items() if key not in known and not ref.expired())


def _tensors(thing: Any) -> list[Tensor]:
    return [*thing.parameters(), *thing.buffers()] if isinstance(thing, nn.Module) else [thing]
