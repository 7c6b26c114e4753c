"""Arrays with named axes, low-rank values, and their products. Nothing here traces a function."""
