"""Conversion of volumes of any format to OME-NGFF."""
