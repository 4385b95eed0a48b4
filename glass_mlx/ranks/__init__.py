"""Global statistics: measured, written, found for a model, shared."""
