"""The console: pages for browsers over the same workspace and engine as the API. Each subject has a module.

Pages are rendered on the server; htmx loads their live parts again. `render.py` has the templates, adds headers, makes
errors pages, and reads and checks forms.
"""
