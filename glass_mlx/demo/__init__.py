"""The demo model, and how it was trained."""
