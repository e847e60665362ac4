"""What tools/ call: plain functions from pictures and clips to labels; no model, no torch.distributed."""
