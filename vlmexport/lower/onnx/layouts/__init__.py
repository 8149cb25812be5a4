"""One module per directory layout."""
