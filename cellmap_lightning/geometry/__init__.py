"""Boxes, lattices, affine maps and resampling, in nm; numpy only."""
