"""The console: pages for browsers over the same workspace and engine as the API. Each page has a module.

Pages are rendered on the server; htmx loads their live parts again. `forms.py` reads and checks forms. `render.py` has
the templates, adds headers, and makes errors pages.
"""
