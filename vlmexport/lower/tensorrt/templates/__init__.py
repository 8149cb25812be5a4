"""Files that exports carry to the machine that runs them, copied as they are; none of them imports vlmexport."""
