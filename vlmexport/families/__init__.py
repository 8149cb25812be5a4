"""Family modules: only what the generic split cannot detect."""
