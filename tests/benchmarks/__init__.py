"""What a run costs: python -m tests.benchmarks; docs/performance.md has the tables, and says how to read them."""
