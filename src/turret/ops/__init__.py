"""The operations of a transformer: what each computes, and how each device computes it."""
