"""A parity report as console table, JSON, JUnit XML and HTML."""
