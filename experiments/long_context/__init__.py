"""Reading beyond the trained length."""
