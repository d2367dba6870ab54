"""HTTP over a workspace and an engine: decode, call, encode. Refuses to know how anything is done, and torch.

`create(served)` gives the ASGI application, `run` serves it until SIGTERM.
"""
