"""The lowest floor: coordinates, metadata and chunks. Knows numpy and zarr, and neither torch nor Lightning."""
