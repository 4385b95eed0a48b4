"""A queue in which clients take turns."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class RoundRobinQueue(Generic[T]):
    """Serves clients in turn; within one client, first come, first served. The caller does the locking."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()  # the next client first

    def __len__(self) -> int:
        return sum(map(len, list(self._waiting.values())))

    def push(self, client: str, item: T) -> None:
        self._waiting.setdefault(client, deque()).append(item)

    def pop(self) -> T | None:
        """Take the next item; None if the queue is empty."""
        if not self._waiting:
            return None
        client, items = self._waiting.popitem(last=False)
        first = items.popleft()
        if items:
            self._waiting[client] = items  # at the end: all other clients come before its next item
        return first

    def peek(self) -> T | None:
        """The item that ``pop`` would take."""
        return next((items[0] for items in self._waiting.values()), None)

    def place(self, client: str) -> int | None:
        """How many items come before a client's first; None if it has none."""
        return next((i for i, name in enumerate(self._waiting) if name == client), None)

    def remove(self, client: str, item: T) -> bool:
        """Take out a client's item; returns whether it was waiting."""
        items = self._waiting.get(client, ())
        if item not in items:
            return False
        items.remove(item)
        if not items:
            del self._waiting[client]
        return True

    def clear(self) -> list[T]:
        """Take out all items."""
        items = [item for waiting in self._waiting.values() for item in waiting]
        self._waiting.clear()
        return items
