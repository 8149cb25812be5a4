"""Emitters: parts and quantized weights become the files of one format. Packing lives here only."""
