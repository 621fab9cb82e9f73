"""Command lines: flags in, one call into the package, output."""
