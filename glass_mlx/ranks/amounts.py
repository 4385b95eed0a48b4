"""How much is measured, unless told otherwise."""

# Read at most this many tokens, and stop earlier when the better halves of the neurons overlap this much.
DEFAULT_TOKENS, DEFAULT_STABLE_AT = 65536, 0.95

# Of the answers for dropped neurons; with the constant, products are over 64 columns.
DEFAULT_RANK = 63
