"""Benchmarks: one command each, outside the tests. They print ratios that one run measures."""
