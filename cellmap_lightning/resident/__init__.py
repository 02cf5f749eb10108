"""Regions that are resident on a device, and the batches that are gathered from them."""
