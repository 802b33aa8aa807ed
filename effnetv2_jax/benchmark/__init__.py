"""Programs that do the same work, each in a process and an environment of its own, timed in turn.

`protocol.py` is what they share; `ours.py` is this project, `peer_pytorch.py` and
`peer_keras.py` are what
else one could use. None of the three imports another, so each needs its own libraries alone.
"""
