"""Bytes on disk <-> parameter trees: name tables, streaming readers and writers, the hub."""
