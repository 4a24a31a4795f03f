"""Packs side by side on the cores of a processor.

The operators of a small model are too short to be split among threads: most of the time would go to waiting for one
another, and all of it where another program takes one of the cores. Whole packs are worth a thread each. The sums are
taken in the order of the packs, so the result does not depend on which thread was faster.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from rehearsal.models.lora import rewrites_weights
from rehearsal.models.packed import is_narrow, packed_attention

P = TypeVar("P")
R = TypeVar("R")


def pack_workers(model: Any) -> int:
    """How many packs to work on at the same time: one for each thread of a processor, for models that are not wide and
    stay as they are in a pass."""
    return torch.get_num_threads() if is_narrow(model) and not rewrites_weights(model) else 1


def _in_order(work: Callable[[P], R], packs: Iterable[P], workers: int) -> Iterator[R]:
    """``work`` of each pack, in order, at most ``workers`` of them begun and not yet taken."""

    gradients = torch.is_grad_enabled()

    def alone(pack: P) -> R:
        # Both settings belong to the calling thread, and a pool's threads do nothing else.
        torch.set_num_threads(1)
        with torch.set_grad_enabled(gradients):
            return work(pack)

    waiting: list[Future[R]] = []
    with ThreadPoolExecutor(workers, thread_name_prefix="rehearsal-pack") as pool:
        try:
            for pack in packs:
                waiting.append(pool.submit(alone, pack))
                if len(waiting) > workers:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def map_packs(models: Sequence[Any], work: Callable[[P], R], packs: Sequence[P], workers: int) -> Iterator[R]:
    """``work(pack)`` for each pack, in order, with packed attention switched on for ``models``.

    Args:
        models: the models that ``work`` calls. The switch is the model's, not the thread's, so it is set here, once.
        work: runs in several threads at once.
        packs: what to work on.
        workers: threads; 1 stays in this one.
    """
    if not models:
        if workers == 1 or len(packs) == 1:
            yield from (work(pack) for pack in packs)
        else:
            yield from _in_order(work, packs, workers)
        return
    with packed_attention(models[0]):
        yield from map_packs(models[1:], work, packs, workers)


def accumulate_gradients(
    models: Sequence[Any], parameters: Sequence[Sequence[torch.nn.Parameter]],
    losses_of: Callable[[P], tuple[Sequence[Tensor | None], R]], packs: Sequence[P], workers: int,
    onto: Callable[[Tensor], Tensor] = lambda parameter: parameter,
) -> Generator[R, None, None]:  # fmt: skip
    """Add the gradients of every pack's losses to the parameters, in the order of the packs.

    Args:
        models: the models that ``losses_of`` calls.
        parameters: for each loss what it is differentiated by, and nothing else is; those that it does not reach are
            left alone.
        losses_of: the losses of a pack (None for one without a gradient), as many as there are sets of parameters, and
            whatever else is worth telling about it.
        packs: what to work on.
        workers: threads.
        onto: for each parameter the tensor whose ``grad`` holds the sum, which may have a higher precision.

    Yields:
        the second thing that ``losses_of`` returned, pack by pack. Gradients are added as the results are taken.
    """

    flat = [parameter for some in parameters for parameter in some]

    def work(pack: P) -> tuple[list[Tensor | None], R]:
        with torch.enable_grad():
            losses, rest = losses_of(pack)
            alive = [i for i, loss in enumerate(losses) if loss is not None and loss.requires_grad]
            found: list[Tensor | None] = []
            for i, (loss, some) in enumerate(zip(losses, parameters, strict=True)):
                if loss is None or i not in alive:
                    found += [None] * len(some)
                else:
                    found += torch.autograd.grad(loss, list(some), retain_graph=i != alive[-1], allow_unused=True)
            return found, rest

    for gradients, rest in map_packs(models, work, packs, workers):
        # While packs keep all threads busy, more of them for a sum would only take turns with those.
        with _threads(1) if workers > 1 else contextlib.nullcontext():
            for parameter, gradient in zip(flat, gradients, strict=True):
                if gradient is None:
                    continue
                holder = onto(parameter)
                if holder.grad is None:
                    holder.grad = gradient.to(holder.dtype)
                else:
                    holder.grad += gradient
        yield rest


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    """So many threads for the operators that this thread calls inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
