"""Caches of decoded voxels: in process memory, in shared memory or on disk."""
