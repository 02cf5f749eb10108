"""The content of a batch: arrays, layout, bytes and the compact form."""
