"""One annotated crop: its raw volume, its label arrays and what is measured of them."""
