"""The hook: what DistributedDataParallel calls with every bucket of gradients, in place of its own all-reduce."""

# No postponed annotations here: DDP compares those of a hook with classes, and refuses strings.
from typing import Any, NoReturn

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
    ``reducer.reraising()``, because DDP does not let the errors of a hook through. ``wrapped.join`` raises from now on.
    """
    places = {parameter.name: parameter.index for parameter in reducer.layout.parameters}
    index = {id(parameter): places[name] for name, parameter in wrapped.module.named_parameters()}
    wrapped.register_comm_hook(None, BucketHook(reducer, index).reduce_bucket)
    wrapped.join_hook = refuse_join  # type: ignore[method-assign]


def refuse_join(**kwargs: Any) -> NoReturn:
    """In place of what DDP's ``join`` calls: a rank out of data would answer with zeros, at no step and no width.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "DistributedDataParallel.join is not supported beside a quantized all-reduce: every rank takes part in every "
        "step. Give all ranks equally many batches, as cyclebnn_dist.data does, and leave join out"
    )
