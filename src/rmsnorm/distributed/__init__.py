"""Norms of tensors that lie on several ranks. Nothing imports this before a DTensor arrives."""
