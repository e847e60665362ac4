"""One thread per process: the machines that run these tests are small and several ranks share them."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
