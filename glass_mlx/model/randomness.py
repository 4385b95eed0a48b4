"""MLX's global random state, which samplers draw from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import mlx.core as mx


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """What is drawn meanwhile leaves the global random state as it was."""
    # The state is a key; seeding with that key's number puts it back.
    high, low = mx.random.state[0].tolist()
    try:
        yield
    finally:
        mx.random.seed((high << 32) | low)
