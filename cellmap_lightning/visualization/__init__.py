"""Figures, previews and viewer links."""
