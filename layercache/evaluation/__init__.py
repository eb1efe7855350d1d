"""Evaluation: measured speed and image fidelity of plans and of the methods they compete with."""
