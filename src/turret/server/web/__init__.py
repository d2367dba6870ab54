"""The console: pages for browsers over the same workspace and engine. Rendered here, with htmx for what is live.

    door.py      headers, errors as a line in a page, the way to the sign-in
    forms.py     a form, and proof that it is ours
    render.py    templates, and words for numbers
    a file a page

Refuses to know how anything is done.
"""
