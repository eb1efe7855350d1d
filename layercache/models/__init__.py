"""Adapters: what LayerCache knows of diffusers' transformers, pipelines and schedulers."""

from layercache.models.adapters import (
    Adapter,
    BlockList,
    adapter_for,
    register_adapter,
    supported_models,
)
from layercache.models.fingerprint import model_fingerprint, setting_of

__all__ = [
    "Adapter",
    "BlockList",
    "adapter_for",
    "model_fingerprint",
    "register_adapter",
    "setting_of",
    "supported_models",
]
