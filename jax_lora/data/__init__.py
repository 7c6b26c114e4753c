"""Load text data sets and make batches: formats, tokenization, loss masks, order."""
