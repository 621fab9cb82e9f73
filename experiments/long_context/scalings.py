"""Several scalings on a command line."""

from qwen_jax.errors import UserError


def split_scalings(text: str) -> list[str]:
    """Those that are listed by commas, where an option of one, NAME=VALUE, is no other.

    Raises:
      UserError: one is empty or there twice.
    """
    found: list[str] = []
    for part in text.split(","):
        if "=" in part and found:
            found[-1] += f",{part}"
        else:
            found.append(part)
    if len(set(found)) < len(found) or "" in found:
        raise UserError(f"--rope={text} should be different scalings by commas")
    return found
