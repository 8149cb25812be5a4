"""The command line: one small module per command; it parses and prints, nothing else."""
