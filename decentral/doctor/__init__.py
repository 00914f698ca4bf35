"""What is wrong with the machines of a run, found out before it begins.

A `Check` looks at a node, and judges what it has seen on all of them: `checks.py` has the list, each is a file.
Nodes are looked at here, on a Ray cluster (`cluster.py`), or wherever one answers at an address (`post.py`). They visit
one another over the transport that workers use (`visits.py`), and `clocks.py` and `links.py` judge what that came to.
"""
