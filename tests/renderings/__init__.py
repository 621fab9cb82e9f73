"""Plain PyTorch renderings of formulas that transformers has no class for."""
