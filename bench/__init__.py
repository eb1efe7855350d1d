"""Benchmarks, studies and training: what the project measures itself with, not installed."""
