"""megatron_ove: trains OCR-aware vision encoders from a laptop CPU to a SLURM cluster, with one code path.

Importing this package imports nothing heavy; `megatron_ove.config` works without torch.
"""

__version__ = "0.1.0"
