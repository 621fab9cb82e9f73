"""Prompts -> text: sampling, the decode loop, streaming."""
