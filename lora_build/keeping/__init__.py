"""Keeping builds: which there are below a project's output folders, what state they are in, and what may go.

`places` says where to look, `record` reads what a build says of itself, `index` remembers that, `today` holds a build
to what its recipe makes now, `listing` puts it together, `wanted` picks some of it.
`pins` are the builds that stay, `needs` what else holds one, `collecting` removes the others.
"""
