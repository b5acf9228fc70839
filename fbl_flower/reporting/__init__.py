"""The run directory and the pictures in it."""
