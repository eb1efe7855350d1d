"""Rivals of the benchmark, each in a short file that cites its source."""
