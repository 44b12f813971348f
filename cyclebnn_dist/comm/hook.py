"""The hook: what DistributedDataParallel calls with every bucket of gradients, in place of its own all-reduce."""

# No postponed annotations here: DDP compares those of a hook with classes, and refuses strings.
from typing import Any

import torch
from torch.distributed import GradBucket
from torch.nn.parallel import DistributedDataParallel

from cyclebnn_dist.comm.reducer import Reducer


class BucketHook:
    """Hands buckets to a reducer, at the step and width of its latest ``begin_step``."""

    def __init__(self, reducer: Reducer, index: dict[int, int]) -> None:
        """``index`` maps the ``id`` of a parameter to its place in the reducer's layout."""
        self._reducer = reducer
        self._index = index

    def reduce_bucket(self, state: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Collective: every rank calls this. Average a bucket in place; ``state`` is DDP's and not used.

        DDP insists on the names ``state`` and ``bucket``, and on a function or method rather than an object.
        """
        indices = [self._index[id(parameter)] for parameter in bucket.parameters()]
        return self._reducer.reduce_flat(bucket.buffer(), parameters=indices)


def register_hook(wrapped: DistributedDataParallel, reducer: Reducer) -> None:
    """Let ``wrapped`` average its gradients with ``reducer``; call it before the first backward pass.

    Before every backward pass that ends an accumulation, call ``reducer.begin_step``; run the pass within
    ``reducer.reraising()``, because DDP does not let the errors of a hook through.
    """
    places = {parameter.name: parameter.index for parameter in reducer.layout.parameters}
    index = {id(parameter): places[name] for name, parameter in wrapped.module.named_parameters()}
    wrapped.register_comm_hook(None, BucketHook(reducer, index).reduce_bucket)
