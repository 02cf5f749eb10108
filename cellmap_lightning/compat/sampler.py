"""`cellmap_data.sampler`."""

from cellmap_lightning.sampling.positions import ClassBalancedSampler

__all__ = ["ClassBalancedSampler"]
