"""The tensors of each method: one file a method, with its start, what is stored, and how it is mounted."""
