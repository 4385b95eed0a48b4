"""The chat in a terminal: messages typed, answers shown."""
