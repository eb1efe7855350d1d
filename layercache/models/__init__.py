"""Adapters: what LayerCache knows of diffusers' transformers, pipelines and schedulers."""
