"""Pure functions on arrays: importance, ranking, layer budgets, slicing, compensation."""
