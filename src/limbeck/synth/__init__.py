"""Data from teachers: steps that turn rows into other rows."""
