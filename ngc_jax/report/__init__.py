"""Pages and their parts, in HTML and in Markdown: the stability page, reports of studies.

For: `blocks` (the parts), `page` (whole pages), `figures` (drawing). Not for: content.
"""
