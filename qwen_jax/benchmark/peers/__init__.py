"""Scripts that measure other packages, in environments of their own."""
