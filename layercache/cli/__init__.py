"""The `layercache` command."""

from layercache.cli._commands import main

__all__ = ["main"]
