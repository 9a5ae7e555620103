"""Scripts that reproduce published tables and measure cost: ``python -m benchmarks.NAME``."""
