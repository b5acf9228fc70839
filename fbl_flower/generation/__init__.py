"""Synthetic images of any class, made on the client: knowledge filling (paper Sec. IV.B)."""
