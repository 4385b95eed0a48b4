"""A model's FFN blocks: found, recorded, their neurons chosen and their weights compacted; sessions and caches."""
