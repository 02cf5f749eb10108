"""Reading and writing Zarr arrays and OME-NGFF metadata: stores, retries, integrity checks, chunks."""
