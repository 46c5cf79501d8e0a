"""Independent pieces of work, each computed by one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from .inputs import Device

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], device: Device
) -> Iterator[tuple[Item, Result]]:
    """Yield every item with what `work` makes of it, in order.

    On a CPU, as many items at a time as torch has threads, each computed by one of them. Many small ones
    would be slow otherwise: all threads wait for each other after every one, which on a busy machine costs
    milliseconds.
    """
    threads = torch.get_num_threads()
    if torch.device(device).type != "cpu" or min(threads, len(items)) == 1:
        for item in items:
            yield item, work(item)
        return

    @torch.no_grad()
    def alone(item: Item) -> Result:
        return work(item)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from zip(items, pool.map(alone, items), strict=True)
    finally:
        torch.set_num_threads(threads)
