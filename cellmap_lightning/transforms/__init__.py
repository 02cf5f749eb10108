"""Spatial and intensity augmentation, normalization of raw, and encoding of targets."""
