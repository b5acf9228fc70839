"""What the `fbl-flower` command can do: runs, tables, generators, and Flower's own programs."""
