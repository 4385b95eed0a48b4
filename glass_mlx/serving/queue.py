"""A queue in which clients take turns."""

from __future__ import annotations

from collections import OrderedDict, deque

from .catalogue import Source
from .request import Ticket


class FairQueue:
    """Tickets that wait, in the order in which they came for each client; clients take turns."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[tuple[Ticket, Source]]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, list(self._waiting.values())))

    def push(self, client: str, ticket: Ticket, source: Source) -> None:
        self._waiting.setdefault(client, deque()).append((ticket, source))

    def pop(self) -> tuple[Ticket, Source] | None:
        if not self._waiting:
            return None
        client, tickets = self._waiting.popitem(last=False)
        first = tickets.popleft()
        if tickets:
            self._waiting[client] = tickets  # at the end: the others come before its next one
        return first

    def remove(self, ticket: Ticket) -> bool:
        """Take out a ticket; False if it is not waiting."""
        client = ticket.request.client
        for waiting in self._waiting.get(client, ()):
            if waiting[0] is ticket:
                self._waiting[client].remove(waiting)
                if not self._waiting[client]:
                    del self._waiting[client]
                return True
        return False

    def drain(self) -> list[Ticket]:
        tickets = [ticket for waiting in self._waiting.values() for ticket, _ in waiting]
        self._waiting.clear()
        return tickets
