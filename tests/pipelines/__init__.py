"""Tests on pipelines of diffusers, tiny and random."""
