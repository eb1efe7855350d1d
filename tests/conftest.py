"""Settings of the whole test run: one thread, no network, reproducible examples."""

from __future__ import annotations

import os

# Before torch is imported anywhere: its thread pool reads this once. The tests are small, and
# parallel workers that each start a pool slow one another down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from hypothesis import settings

settings.register_profile("layercache", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("layercache")
