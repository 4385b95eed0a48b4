"""What options of ``evaluate`` and ``tradeoff`` may name. It imports nothing, so that help and errors come at once."""

# The names of all selectors (``selectors.py``), in the order of the reports, and of those that need global statistics.
SELECTORS = (
    *("dense", "random", "magnitude", "static", "griffin", "glass-a", "glass-i", "expected", "griffin+", "glass-i+"),
    *("glass-uniform", "glass", "oracle"),
)
GLOBAL = ("static", "glass-a", "glass-i", "glass-i+")

# The kinds of decoders that the dense model is compared with (``decoders.py``).
DECODERS = ("griffin", "glass", "verified")

# The bundled prompts (``prompts.py``): beginnings of prose, requests to an assistant that books and orders, and open
# instructions.
PROMPT_SETS = ("prose", "dialogue", "chats")
DEFAULT_PROMPTS = "prose,dialogue"
