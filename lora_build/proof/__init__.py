"""That a build is right, and stays it.

The manifest says what it was made of and what came out, provenance where, when and from what; `verify` holds the bytes
to the manifest, and the checks hold the build to its base and adapters: by what it answers, and by a merge in memory.
`references` finds a build by what people call it, `diff` says what two of them differ in.
"""
