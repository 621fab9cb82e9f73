"""What `python -m tools.benchmark` measures: the flags of each workload, and how it runs."""
