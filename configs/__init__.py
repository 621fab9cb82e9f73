"""Published models and experiments, one Python file a family."""
