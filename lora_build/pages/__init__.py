"""Pages: what people look at. One file of HTML, which asks no network: the report of a sweep, or of some builds.

`content` is what a report says, `findings` what it works out of points and builds, `html` the file.
"""
