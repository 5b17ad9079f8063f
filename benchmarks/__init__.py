"""Benchmarks: one command each, apart from the tests. They print ratios measured in the same run."""
