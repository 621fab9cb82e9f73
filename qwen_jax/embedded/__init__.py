"""The small chat model that the package ships: its problems, its tokenizer, its files."""
