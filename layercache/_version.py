"""The version of the installed package."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("layercache-flow")
except PackageNotFoundError:
    VERSION = "from source"
