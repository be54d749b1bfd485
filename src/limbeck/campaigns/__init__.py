"""What runs a recipe more than once."""
