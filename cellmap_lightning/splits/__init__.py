"""The crops of each split: CSV files, manifests, rules and leakage checks."""
