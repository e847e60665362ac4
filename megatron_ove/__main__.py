"""`python -m megatron_ove ...`, which is also how torchrun starts ranks: `torchrun ... -m megatron_ove train ...`."""

from __future__ import annotations

from megatron_ove.cli.main import main

# Guarded, because processes started with "spawn" import this module again.
if __name__ == "__main__":
    raise SystemExit(main())
