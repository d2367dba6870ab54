"""The HTTP server of bases and their adapters: `app.run(Services(...), socket)` serves it."""
