"""Decoded voxels, cached in memory, in shared memory or on disk."""
