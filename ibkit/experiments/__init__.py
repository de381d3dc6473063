"""Experiments on what the papers say, each with its figures; notebooks 04 to 06 step through them."""
