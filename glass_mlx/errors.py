"""Errors that a user can act on; the command lines print them as one line."""


class GlassError(Exception):
    """Something the user asked for cannot be done; the message says what is wrong and what to do."""


class StatsError(GlassError):
    """A global-ranks file is damaged or belongs to another model."""
