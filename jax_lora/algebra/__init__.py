"""Arrays with named axes, and the low-rank value that is built of them. Nothing here traces."""
