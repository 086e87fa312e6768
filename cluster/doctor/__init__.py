"""`pluglm doctor`: what would go wrong, found before hours are spent."""
