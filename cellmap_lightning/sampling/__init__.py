"""From crops to batches: specs, positions, reads, loaders. Adds torch, and does not know Lightning."""
