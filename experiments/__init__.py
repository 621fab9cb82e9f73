"""Studies that train or run models and end in a report."""
