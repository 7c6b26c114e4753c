"""Rows of text on disk, turned into batches of ids: formats, tokens, masks, order."""
