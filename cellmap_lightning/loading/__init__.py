"""Data loading, from samples to batches on the device: samplers, worker processes, prefetching, resuming."""
