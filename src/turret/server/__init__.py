"""The HTTP server of bases and their adapters. `app.create(state)` is the ASGI application; `run.run` serves it."""
