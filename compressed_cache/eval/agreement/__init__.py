"""Agreement: what a policy would have said at each token of a text that the full cache wrote.

``text`` is such a text, ``reader`` a model that reads token by token, ``writing`` lets the full
cache write, ``reading`` reads through several caches side by side, and ``statistics`` makes a row
of it. ``sweep.agreement`` does all of this for cells of a sweep.
"""
