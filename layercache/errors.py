"""The errors that LayerCache raises. Each message states the symptom, the value and the fix."""

from __future__ import annotations

_NETWORK = ("requests", "httpx", "httpx2", "httpcore", "httpcore2")


class LayerCacheError(Exception):
    """Base of every error that LayerCache raises on purpose."""


class StatsError(LayerCacheError, ValueError):
    """A statistics file or object is malformed, truncated, or of an unsupported version."""


class PlanError(LayerCacheError, ValueError):
    """A plan file or object is malformed, truncated, or of an unsupported version."""


class BudgetError(LayerCacheError, ValueError):
    """A budget cannot be read or cannot be met."""


class OptionError(LayerCacheError, ValueError):
    """An option is unknown or not of its type."""


class ModelMismatchError(LayerCacheError, ValueError):
    """A plan or statistics belong to another model, schedule or setting."""


class UnsupportedModelError(LayerCacheError, TypeError):
    """No adapter knows this transformer class."""


def of_network(error: BaseException) -> bool:
    """Whether an error comes from a library that talks to the network, and not from an answer."""
    return type(error).__module__.partition(".")[0] in _NETWORK


class UnknownWordError(LayerCacheError, ValueError):
    """A caption has a word that the reference model was not trained on."""
