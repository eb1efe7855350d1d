"""A small trained flow-matching model that ships with the package (needs torch and diffusers).

It exists so that every part of LayerCache can be run, tested and compared without a download. Its
figures say nothing about any real checkpoint.
"""

from layercache.reference.pipeline import call_arguments, load_pipeline
from layercache.reference.prompts import prompts

__all__ = ["call_arguments", "load_pipeline", "prompts"]
