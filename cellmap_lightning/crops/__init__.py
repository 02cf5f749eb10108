"""One annotated crop: its raw volume, its label arrays, and their measurements."""
