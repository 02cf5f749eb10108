"""Prediction of whole volumes, written block by block."""
