"""What the tools call: pictures, pages and clips in; labels and selected patches out.

Plain functions on numpy arrays and bytes. No model, no torch.distributed, and no shard format: the scripts under
`tools/` glue these functions to the shard writer.
"""
