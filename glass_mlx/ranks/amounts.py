"""How much is measured, unless told otherwise."""

# Read at most this many tokens, and stop earlier at this efficiency (``agreement.py``).
DEFAULT_TOKENS, DEFAULT_STABLE_AT = 65536, 0.97

# From here on ranks are worth using, where they are measured while nobody waits.
FIRST_STABLE_AT = 0.8

# Of the answers for dropped neurons; with the constant, products are over 64 columns.
DEFAULT_RANK = 63
# Routed experts, of which there are many narrow ones, have so many times fewer columns.
_FEWER = 4


def answer_rank(experts: int, rank: int = DEFAULT_RANK) -> int:
    """The rank of the answers of a block with so many routed experts, 0 if it is dense, where dense blocks have
    ``rank``."""
    return max(1, (rank + 1) // _FEWER - 1) if experts else rank
