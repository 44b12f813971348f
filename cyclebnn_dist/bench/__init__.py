"""Benchmarks a user runs on their own machines; each compares variants that run in turn, and prints ratios."""
