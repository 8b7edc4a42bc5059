"""Real workers, real nodes, real faults, and a history that is checked.

``python -m tests.soak --seconds 120 --seed 7 --database postgresql``

Clients append elements that occur once, log in and out, and change ids, at three
workers on three nodes and one database, while a nemesis breaks things: the database,
the database and a node at once, a node or a worker process. Every page is checked
against what was acknowledged before it was asked for, and all sessions at the end, when
everything is whole again, and once more after every node has lost its memory.
"""
