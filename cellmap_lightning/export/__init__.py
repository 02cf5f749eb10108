"""Export of trained models for other programs, and prediction with exported models; see docs/export.md."""
