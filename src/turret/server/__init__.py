"""The HTTP server of one base and its adapters. `app.create(state)` is the ASGI application; `run.run` serves it."""
