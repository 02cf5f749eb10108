"""Datasets over one crop and over many."""
