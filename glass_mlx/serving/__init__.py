"""The engine and its HTTP API, and the chat page."""
